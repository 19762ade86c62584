"""What is drawn does not depend on the schedule, and nothing is fed twice."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from roc import layout
from roc.core import metrics
from roc.device import engine as engine_lib
from roc.device import model, sampling, sharding
from roc.device import step as step_lib

STOP_IDS = (1, 2, 3, 4)
CONFIG = sampling.SamplingConfig(
  n_slots=4,
  chunk=5,
  extend_chunk=3,
  extend_rows=3,
  cache_length=64,
  page=8,
  max_tokens=40,
)
N_JOBS = 7


@dataclasses.dataclass(frozen=True)
class Job:
  """A rollout to draw: each observation follows a turn that ended by itself."""

  request: engine_lib.Request
  observations: tuple[tuple[int, ...], ...]


@dataclasses.dataclass
class Record:
  """What came of a job: all ids, and the drawn ones with their log-probs."""

  ids: list[int]
  is_drawn: list[bool]
  logps: list[float]
  n_fed: int = 0
  n_turns: int = 0


@pytest.fixture(scope="module")
def jobs():
  """Two problems; the same prompt for every rollout of a problem."""
  rng = np.random.default_rng(0)
  prompts = [rng.integers(5, 40, n).tolist() for n in (1, 18)]
  task_B = np.arange(N_JOBS) % 2
  key_B2 = sampling.rollout_keys(
    0, 1, jnp.asarray(task_B), jnp.arange(N_JOBS) // 2
  )
  return [
    Job(
      engine_lib.Request(prompts[task], np.asarray(key), 40),
      tuple(
        tuple(rng.integers(5, 40, n).tolist()) for n in rng.integers(1, 8, 3)
      ),
    )
    for task, key in zip(task_B, key_B2, strict=True)
  ]


@pytest.fixture(scope="module")
def engine(policy, params):
  """One engine, compiled once; every test leaves it empty."""
  made = engine_lib.Engine(policy, CONFIG, STOP_IDS)
  made.set_params(params)
  yield made
  assert made.n_rollouts == 0


@pytest.fixture
def greedy_engine(policy, params):
  greedy = dataclasses.replace(CONFIG, temperature=0.0)
  made = engine_lib.Engine(policy, greedy, STOP_IDS)
  made.set_params(params)
  return made


def drive(engine, jobs, *, order=None, delay=lambda job, turn: 0):
  """Runs jobs to their end under a schedule.

  Args:
    engine: with nothing submitted.
    jobs: to run.
    order: order of submission.
    delay: decode calls that an observation waits for, by job and turn.

  Returns:
    A `Record` for each job.
  """
  order = list(range(len(jobs)) if order is None else order)
  records = [Record(list(j.request.prompt), [False] * 99, []) for j in jobs]
  for record, job in zip(records, jobs, strict=True):
    record.is_drawn = [False] * len(job.request.prompt)
  handles = engine.submit([jobs[i].request for i in order])
  running = dict(zip(handles, order, strict=True))
  due: dict[int, int] = {}
  for now in range(1000):
    ready = [handle for handle, at in due.items() if at <= now]
    feed = {}
    for handle in ready:
      del due[handle]
      record, job = records[running[handle]], jobs[running[handle]]
      feed[handle] = job.observations[record.n_turns - 1]
      record.ids += feed[handle]
      record.is_drawn += [False] * len(feed[handle])
    engine.extend(feed)
    for handle, drawn in engine.decode().items():
      if handle not in running:  # another test's
        continue
      record, job = records[running[handle]], jobs[running[handle]]
      record.ids += drawn.tokens
      record.is_drawn += [True] * len(drawn.tokens)
      record.logps += drawn.logps
      if not drawn.is_stopped:
        continue
      record.n_turns += 1
      left = job.observations[record.n_turns - 1 :]
      is_whole = drawn.tokens[-1] in STOP_IDS
      if left and is_whole and len(left[0]) < engine.budget_left(handle):
        due[handle] = now + 1 + delay(running[handle], record.n_turns)
      else:
        engine.release([handle])
        del running[handle]
    if not running:
      return records
  raise AssertionError("the schedule does not end")


@pytest.fixture(scope="module")
def plain(engine, jobs):
  """The schedule that the others are compared to, and what was prefilled."""
  before = engine.prefilled_tokens
  records = drive(engine, jobs)
  return records, engine.prefilled_tokens - before


def rows_of(records):
  T = 64
  tokens_BT = np.zeros((len(records), T), np.int32)
  logp_BT = np.zeros((len(records), T), np.float32)
  is_drawn_BT = np.zeros((len(records), T), bool)
  for b, record in enumerate(records):
    n = len(record.ids)
    tokens_BT[b, :n] = record.ids
    is_drawn_BT[b, :n] = record.is_drawn
    logp_BT[b][is_drawn_BT[b]] = record.logps
  return tokens_BT, logp_BT, is_drawn_BT


# ------------------------------------------------------------ same as training


def test_logps_equal_the_train_step(policy, params, plain):
  records, _ = plain
  tokens_BT, logp_BT, is_drawn_BT = rows_of(records)
  assert is_drawn_BT.sum() > 60
  scored_BT, _ = jax.jit(
    lambda params, tokens_BT: step_lib.score(
      policy, params, {"tokens_BT": tokens_BT}, chunk=128, temperature=1.0
    )
  )(params, tokens_BT)
  np.testing.assert_allclose(
    logp_BT[is_drawn_BT], np.asarray(scored_BT)[is_drawn_BT], atol=1e-5
  )
  # A comparison of noise with noise would pass as well.
  assert np.std(logp_BT[is_drawn_BT]) > 0.5


@pytest.mark.slow
def test_logps_in_bfloat16_are_near_the_train_step(make_policy, params, jobs):
  """Both round at the same places, and differ where sums fall on a border.

  Where embedding, head and softmax are rounded by one of them only, the mean is
  5e-3.
  """
  low = make_policy(dtype="bfloat16")
  engine = engine_lib.Engine(low, CONFIG, STOP_IDS)
  engine.set_params(params)
  tokens_BT, logp_BT, is_drawn_BT = rows_of(drive(engine, jobs))

  def scored(policy):
    run = jax.jit(
      lambda params, tokens_BT: step_lib.score(
        policy, params, {"tokens_BT": tokens_BT}, chunk=128, temperature=1.0
      )
    )
    return np.asarray(run(params, tokens_BT)[0])[is_drawn_BT]

  error = np.abs(logp_BT[is_drawn_BT] - scored(low))
  assert error.mean() < 1e-3
  # Rounding itself is no small matter, so the two do share it.
  exact = scored(make_policy())
  assert np.abs(scored(low) - exact).mean() > 4 * error.mean()


def test_greedy_equals_teacher_forcing(policy, params, greedy_engine, jobs):
  records = drive(greedy_engine, jobs[:3])
  tokens_BT, _, is_drawn_BT = rows_of(records)
  hidden_BTD = jax.jit(policy.hidden)(params, tokens_BT)
  likeliest_BT = np.argmax(hidden_BTD @ policy.unembedding(params), axis=-1)
  is_drawn_BT = is_drawn_BT[:, 1:]
  assert is_drawn_BT.sum() > 20
  np.testing.assert_array_equal(
    likeliest_BT[:, :-1][is_drawn_BT], tokens_BT[:, 1:][is_drawn_BT]
  )


def test_nothing_is_fed_twice(jobs, plain):
  """Every token but the last pending one enters the cache exactly once.

  Of a prompt all but its last token is prefilled, once for all rollouts that
  start with it; that one is pending and the first decode feeds it. An
  observation prefills the pending stop token of the
  turn before it and all its own tokens but the last: as many as it is long.
  """
  records, n_prefilled = plain
  prompts = {tuple(j.request.prompt) for j in jobs}
  assert len(prompts) == 2 < len(jobs)
  n_prompt = sum(len(prompt) - 1 for prompt in prompts)
  n_observed = sum(
    len(r.ids) - len(j.request.prompt) - sum(r.is_drawn)
    for r, j in zip(records, jobs, strict=True)
  )
  assert n_observed > 10
  assert n_prefilled == n_prompt + n_observed


# --------------------------------------------------------- schedule invariance


def assert_same_bits(records, others):
  for a, b in zip(records, others, strict=True):
    assert a.ids == b.ids
    assert a.logps == b.logps


@pytest.mark.bits
@pytest.mark.parametrize("seed", range(6))
def test_schedule_does_not_change_a_bit(engine, jobs, plain, seed):
  """Any order of submission, any tool latency."""
  rng = np.random.default_rng(seed)
  delay_JU = rng.integers(0, 9, (N_JOBS, 4))
  records = drive(
    engine,
    jobs,
    order=rng.permutation(N_JOBS).tolist(),
    delay=lambda job, turn: delay_JU[job, turn],
  )
  assert_same_bits(plain[0], records)


@pytest.mark.bits
@pytest.mark.parametrize(
  "changes",
  [
    {"share_prompts": False},
    {"cache_tokens": 72},
    pytest.param(
      {"cache_tokens": 80, "cache_length": 60}, marks=pytest.mark.slow
    ),
    {"chunk": 1},
    pytest.param({"chunk": 16}, marks=pytest.mark.slow),
    pytest.param({"chunk": 2, "cache_tokens": 96}, marks=pytest.mark.slow),
  ],
  ids=str,
)
def test_how_it_is_set_up_does_not_change_a_bit(
  policy, params, jobs, plain, changes
):
  """Sharing prompts, the cache's size and the chunk decide the speed only."""
  config = dataclasses.replace(CONFIG, **changes)
  other = engine_lib.Engine(policy, config, STOP_IDS)
  other.set_params(params)
  n_before = other.prefilled_tokens
  records = drive(other, jobs, order=[6, 1, 4, 3, 2, 5, 0])
  assert_same_bits(plain[0], records)
  n_prefilled = other.prefilled_tokens - n_before
  assert (n_prefilled > plain[1]) == ("share_prompts" in changes)


@pytest.mark.slow
@pytest.mark.parametrize("n_slots", [2, 7])
def test_other_slot_counts_agree_closely(policy, params, jobs, plain, n_slots):
  """Another number of rows is another program, rounded in another way."""
  config = dataclasses.replace(CONFIG, n_slots=n_slots, extend_rows=2)
  other = engine_lib.Engine(policy, config, STOP_IDS)
  other.set_params(params)
  records = drive(other, jobs)
  is_same = [a.ids == b.ids for a, b in zip(plain[0], records, strict=True)]
  assert sum(is_same) >= N_JOBS - 1
  for a, b, same in zip(plain[0], records, is_same, strict=True):
    if same:
      np.testing.assert_allclose(a.logps, b.logps, atol=1e-4)


@pytest.mark.bits
def test_other_slots_do_not_change_a_bit(engine, jobs, plain):
  """Rollouts that sit in other slots, released in the middle of a turn."""
  slots = engine.submit([jobs[3].request, jobs[4].request])
  engine.decode()
  engine.release(slots[1:])
  records = drive(engine, jobs[:2])
  engine.release(slots[:1])
  assert_same_bits(plain[0][:2], records)


@pytest.mark.bits
def test_weights_from_a_mesh_are_the_same_weights(engine, params, jobs, plain):
  """However training lays them out, the engine samples on its own device."""
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  shardings = sharding.param_shardings(mesh, params)
  engine.set_params(jax.device_put(params, shardings))
  records = drive(engine, jobs)
  engine.set_params(params)
  assert_same_bits(plain[0], records)


def test_rollouts_of_a_group_differ(plain):
  group = [tuple(r.ids) for r in plain[0][1::2]]
  assert len(set(group)) == len(group) == 3


def test_key_decides_what_is_drawn(engine, jobs, plain):
  """The same key draws the same again; another step's key does not."""
  job = dataclasses.replace(jobs[1], observations=())
  key = np.asarray(
    sampling.rollout_keys(0, 2, jnp.asarray([1]), jnp.asarray([0]))[0]
  )
  other = dataclasses.replace(
    job, request=dataclasses.replace(job.request, key=key)
  )
  same, different = drive(engine, [job, other])
  n = len(same.ids)
  assert same.ids == plain[0][1].ids[:n]
  assert different.ids != same.ids


# --------------------------------------------------------- stops and budgets


def test_turns_end_at_stop_ids(plain):
  for record in plain[0]:
    drawn = [t for t, d in zip(record.ids, record.is_drawn, strict=True) if d]
    n_stops = sum(t in STOP_IDS for t in drawn)
    assert n_stops in (record.n_turns, record.n_turns - 1)


def first_stop(record):
  """How many tokens a rollout's first turn has."""
  drawn = [t for t, d in zip(record.ids, record.is_drawn, strict=True) if d]
  stops = [i for i, t in enumerate(drawn) if t in STOP_IDS]
  return 1 + stops[0] if stops else 0


def test_budget_is_exact(engine, jobs, plain):
  """Cut before its first stop, a rollout is a prefix of the uncut one."""
  long = max(range(N_JOBS), key=lambda i: first_stop(plain[0][i]))
  request = jobs[long].request
  n_prompt, n_turn = len(request.prompt), first_stop(plain[0][long])
  assert n_turn > 6
  for budget in (1, CONFIG.chunk, n_turn - 1):
    cut = dataclasses.replace(request, budget=budget)
    (slot,) = engine.submit([cut])
    tokens, is_stopped = [], False
    while drawn := engine.decode():
      assert not is_stopped
      tokens += drawn[slot].tokens
      is_stopped = drawn[slot].is_stopped
    assert is_stopped and engine.budget_left(slot) == 0
    assert tokens == plain[0][long].ids[n_prompt : n_prompt + budget]
    engine.release([slot])


def test_stop_at_the_end_of_the_budget(engine, jobs, plain):
  """A stop id as the very last token is drawn and seen."""
  n_turn = first_stop(plain[0][0])
  request = dataclasses.replace(jobs[0].request, budget=n_turn)
  (record,) = drive(engine, [Job(request, ((9,),))])
  assert record.ids == plain[0][0].ids[: 1 + n_turn]
  assert record.n_turns == 1


def test_extending_counts_against_the_budget(engine, jobs):
  (slot,) = engine.submit([dataclasses.replace(jobs[0].request, budget=40)])
  drawn = []
  while chunk := engine.decode():
    drawn += chunk[slot].tokens
  left = 40 - len(drawn)
  assert drawn[-1] in STOP_IDS and left > 4
  assert engine.budget_left(slot) == left
  with pytest.raises(ValueError, match="exceed rollout"):
    engine.extend({slot: [9] * (left + 1)})
  assert engine.budget_left(slot) == left
  engine.extend({slot: [9] * (left - 2)})
  assert engine.budget_left(slot) == 2
  tokens = []
  while chunk := engine.decode():
    tokens += chunk[slot].tokens
  assert 1 <= len(tokens) <= 2
  engine.release([slot])


def test_a_full_budget_of_observation_draws_nothing(engine, jobs):
  (slot,) = engine.submit([jobs[0].request])
  while engine.decode():
    pass
  engine.extend({slot: [9] * engine.budget_left(slot)})
  assert engine.decode() == {}
  engine.release([slot])


# ------------------------------------------------------------------- misuse


def test_requests_that_cannot_be(engine, jobs):
  good = jobs[0].request
  with pytest.raises(ValueError, match="at least one token"):
    engine.submit([dataclasses.replace(good, prompt=[])])
  with pytest.raises(ValueError, match="cache_length=64"):
    engine.submit([dataclasses.replace(good, budget=64)])
  assert engine.n_rollouts == 0
  # The whole cache may be used.
  slots = engine.submit([dataclasses.replace(good, budget=63)])
  engine.release(slots)


def test_weights_may_not_change_in_flight(engine, params, jobs):
  slots = engine.submit([jobs[0].request])
  with pytest.raises(RuntimeError, match="in flight"):
    engine.set_params(params)
  engine.release(slots)
  engine.set_params(params)


def test_weights_come_first(policy, jobs):
  fresh = engine_lib.Engine(policy, CONFIG, STOP_IDS)
  with pytest.raises(RuntimeError, match="set_params"):
    fresh.submit([jobs[0].request])
  with pytest.raises(RuntimeError, match="set_params"):
    fresh.decode()


def test_settings_that_cannot_be(policy):
  for changes, match in (
    ({"n_slots": 0}, "n_slots is 0"),
    ({"cache_tokens": 56}, "cannot hold one rollout"),
  ):
    with pytest.raises(ValueError, match=match):
      engine_lib.Engine(policy, dataclasses.replace(CONFIG, **changes), ())


def test_chunks_are_collected_one_by_one(engine, jobs):
  with pytest.raises(RuntimeError, match="dispatch comes before"):
    engine.collect()
  assert not engine.dispatch()
  (handle,) = engine.submit([jobs[0].request])
  assert engine.dispatch()
  with pytest.raises(RuntimeError, match="collect comes before"):
    engine.dispatch()
  with pytest.raises(ValueError, match="middle of a turn"):
    engine.extend({handle: [9]})
  engine.release([handle])
  assert engine.collect() == {}


# ----------------------------------------------------------------- whole runs


def test_nothing_is_compiled_after_the_start(policy, params, jobs):
  fresh = engine_lib.Engine(policy, CONFIG, STOP_IDS)
  fresh.set_params(params)
  # Feed, draw and copy.
  assert fresh.stats() == {"compilations": 3}
  drive(fresh, jobs, order=[6, 5, 4, 3, 2, 1, 0], delay=lambda j, t: j)
  fresh.set_params(jax.tree.map(lambda x: x * 1.01, params))
  drive(fresh, jobs[:3])
  assert fresh.stats()["compilations"] == 0


def test_stats(engine, jobs):
  engine.stats()
  n_before = engine.prefilled_tokens
  records = drive(engine, jobs)
  row = engine.stats()
  assert row.keys() == {
    "compilations",
    "decode_tokens_per_s",
    "prefill_tokens_per_s",
    "extend_tokens_per_s",
    "slot_occupancy",
    "cache_use",
    "cache_use_max",
  }
  assert 0.3 < row["slot_occupancy"] <= 1
  assert 0 < row["cache_use"] <= row["cache_use_max"] <= 1
  n_prompt = 17  # one prompt has a single token, the other 18
  n_answered = engine.prefilled_tokens - n_before - n_prompt
  rate = row["extend_tokens_per_s"] / row["prefill_tokens_per_s"]
  assert rate == pytest.approx(n_answered / n_prompt)
  assert sum(map(sum, (r.is_drawn for r in records))) > 60
  assert engine.stats() == {"compilations": 0}


def test_parked_rollouts_leave_their_slots(policy, params, jobs):
  """More rollouts than slots are under way while tools are slow."""
  config = dataclasses.replace(CONFIG, n_slots=2, cache_tokens=8 * 64)
  small = engine_lib.Engine(policy, config, STOP_IDS)
  small.set_params(params)
  handles = small.submit([j.request for j in jobs])
  stopped = set()
  while drawn := small.decode():
    stopped |= {h for h, d in drawn.items() if d.is_stopped}
  assert stopped == set(handles)
  small.release(handles)


def test_broken_logits_break_their_rollout_only(policy, params, jobs, plain):
  """Then the cache that it filled is as good as new."""
  engine = engine_lib.Engine(policy, CONFIG, STOP_IDS)
  bad = jax.tree.map(lambda x: x, params)
  poisoned = jobs[1].request.prompt[2]
  bad["embed"] = {
    "embedding": params["embed"]["embedding"].at[poisoned].set(np.nan)
  }
  bad["head"] = {"kernel": params["embed"]["embedding"].T}
  engine.set_params(params)
  engine._params = engine.policy.fuse(bad)
  handles = engine.submit([jobs[1].request, jobs[3].request, jobs[0].request])
  seen = {}
  while not set(handles[:2]) <= seen.keys():
    seen = engine.decode() | seen
  for handle in handles[:2]:
    assert seen[handle].is_broken and seen[handle].is_stopped
    assert seen[handle].tokens == [] == seen[handle].logps
  whole = seen[handles[2]]
  assert not whole.is_broken
  assert whole.tokens == plain[0][0].ids[1 : 1 + len(whole.tokens)]
  engine.release(handles)
  engine.set_params(params)
  assert_same_bits(plain[0], drive(engine, jobs))
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(engine._pool))


@pytest.mark.slow
def test_ids_beyond_the_tokenizer_are_never_drawn(policy, params, jobs):
  """Their share goes to the others, in the train step alike."""
  n_ids = 30
  embedding = params["embed"]["embedding"]
  loud = {"embed": {"embedding": embedding.at[n_ids:].multiply(3.0)}}
  loud = params | loud
  jobs = [
    Job(dataclasses.replace(job.request, prompt=[7 + i % 5]), ())
    for i, job in enumerate(jobs)
  ]
  padded = model.Policy(policy.config, n_ids=n_ids)
  drawn = {}
  for used in (policy, padded):
    made = engine_lib.Engine(used, CONFIG, STOP_IDS)
    made.set_params(loud)
    tokens_BT, logp_BT, is_drawn_BT = rows_of(drive(made, jobs))
    scored_BT, _ = jax.jit(
      lambda tokens_BT, used=used: step_lib.score(
        used, loud, {"tokens_BT": tokens_BT}, chunk=128, temperature=1.0
      )
    )(tokens_BT)
    np.testing.assert_allclose(
      logp_BT[is_drawn_BT], np.asarray(scored_BT)[is_drawn_BT], atol=1e-5
    )
    drawn[used.n_ids] = tokens_BT[is_drawn_BT]
  assert np.mean(drawn[0] >= n_ids) > 0.1
  assert np.all(drawn[n_ids] < n_ids) and len(drawn[n_ids]) > 40


@pytest.mark.parametrize(
  ("temperature", "how", "share"),
  [
    (0.6, {"top_p": 0.8}, (0.6, 0.95)),
    *(
      pytest.param(*case, marks=pytest.mark.slow)
      for case in (
        (1.0, {}, (1 - 1e-4, 1 + 1e-4)),
        (0.6, {}, (1 - 1e-4, 1 + 1e-4)),
        (1.0, {"top_k": 3}, (0.2, 0.9)),
        (1.0, {"top_p": 0.8}, (0.6, 0.95)),
        (0.6, {"min_p": 0.2}, (0.3, 0.95)),
      )
    ),
  ],
)
def test_ratio_of_the_policy_that_sampled(
  policy, params, jobs, temperature, how, share
):
  """It is 1 with recomputed old log-probs, however tokens were drawn.

  With the sampler's it is the probability of the tokens among which was drawn.
  """
  config = dataclasses.replace(CONFIG, temperature=temperature, **how)
  engine = engine_lib.Engine(policy, config, STOP_IDS)
  engine.set_params(params)
  records = drive(engine, jobs)
  B, T = len(records), CONFIG.cache_length
  tokens_BT = np.zeros((B, T), np.int32)
  roles_BT = np.zeros((B, T), np.int8)
  sampler_BT = np.zeros((B, T), np.float32)
  for b, record in enumerate(records):
    tokens_BT[b, : len(record.ids)] = record.ids
    at = np.flatnonzero(record.is_drawn)
    roles_BT[b, at] = layout.Role.MODEL
    sampler_BT[b, at] = record.logps
  logp_BT, _ = jax.jit(
    lambda params, tokens_BT: step_lib.score(
      policy,
      params,
      {"tokens_BT": tokens_BT},
      chunk=64,
      temperature=temperature,
    )
  )(params, tokens_BT)
  loss = jax.jit(
    step_lib.grpo_loss(
      policy, step_lib.LossConfig(logprob_chunk=64), temperature
    )
  )
  is_model_BT = roles_BT == layout.Role.MODEL

  def row_of(old_BT):
    batch = {
      "tokens_BT": tokens_BT,
      "roles_BT": roles_BT,
      "logp_sampler_BT": sampler_BT,
      "logp_old_BT": old_BT,
      "advantage_B": np.where(np.arange(B) % 2, 1, -1).astype(np.float32),
      "weight_BT": (is_model_BT / is_model_BT.sum()).astype(np.float32),
    }
    return metrics.finalize(loss(params, batch)[1])

  row = row_of(np.asarray(logp_BT))
  assert row["ratio"] == pytest.approx(1.0, abs=1e-5)
  assert row["clip_ratio/region"] == 0.0
  low, high = share
  assert low < row_of(sampler_BT)["ratio"] < high
  if not how:
    assert row["mismatch_kl"] < 1e-6
