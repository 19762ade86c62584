"""What is drawn does not depend on the schedule, and nothing is fed twice."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from roc.device import engine as engine_lib
from roc.device import sampling
from roc.device import step as step_lib

STOP_IDS = (1, 2, 3, 4)
CONFIG = sampling.SamplingConfig(
  n_slots=4,
  chunk=5,
  extend_chunk=3,
  extend_rows=3,
  cache_length=64,
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
  prompts = [rng.integers(5, 40, n).tolist() for n in (1, 6)]
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
  """One engine, compiled once; every test leaves all slots free."""
  made = engine_lib.Engine(policy, CONFIG, STOP_IDS)
  made.set_params(params)
  yield made
  assert made.n_free == CONFIG.n_slots


@pytest.fixture
def greedy_engine(policy, params):
  greedy = dataclasses.replace(CONFIG, temperature=0.0)
  made = engine_lib.Engine(policy, greedy, STOP_IDS)
  made.set_params(params)
  return made


def drive(engine, jobs, *, order=None, n_busy=4, delay=lambda job, turn: 0):
  """Runs jobs to their end under a schedule.

  Args:
    engine: with all slots free.
    jobs: to run.
    order: order of submission.
    n_busy: most slots in use at a time.
    delay: decode calls that an observation waits for, by job and turn.

  Returns:
    A `Record` for each job.
  """
  waiting = list(range(len(jobs)) if order is None else order)
  records = [Record(list(j.request.prompt), [False] * 99, []) for j in jobs]
  for record, job in zip(records, jobs, strict=True):
    record.is_drawn = [False] * len(job.request.prompt)
  running: dict[int, int] = {}
  due: dict[int, int] = {}
  for now in range(1000):
    n_new = min(engine.n_free, n_busy - len(running), len(waiting))
    new, waiting = waiting[:n_new], waiting[n_new:]
    slots = engine.submit([jobs[i].request for i in new])
    running |= dict(zip(slots, new, strict=True))
    ready = [slot for slot, at in due.items() if at <= now]
    if ready:
      feed = {}
      for slot in ready:
        del due[slot]
        record, job = records[running[slot]], jobs[running[slot]]
        feed[slot] = job.observations[record.n_turns - 1]
        record.ids += feed[slot]
        record.is_drawn += [False] * len(feed[slot])
      engine.extend(feed)
    done = []
    for slot, drawn in engine.decode().items():
      if slot not in running:  # another test's
        continue
      record, job = records[running[slot]], jobs[running[slot]]
      record.ids += drawn.tokens
      record.is_drawn += [True] * len(drawn.tokens)
      record.logps += drawn.logps
      if not drawn.is_stopped:
        continue
      record.n_turns += 1
      left = job.observations[record.n_turns - 1 :]
      is_whole = drawn.tokens[-1] in STOP_IDS
      if left and is_whole and len(left[0]) < engine.budget_left(slot):
        due[slot] = now + 1 + delay(running[slot], record.n_turns)
      else:
        done.append(slot)
    engine.release(done)
    for slot in done:
      del running[slot]
    if not running and not waiting:
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

  Of a prompt all but its last token is prefilled; that one is pending and the
  first decode feeds it. An observation prefills the pending stop token of the
  turn before it and all its own tokens but the last: as many as it is long.
  """
  records, n_prefilled = plain
  n_prompt = sum(len(j.request.prompt) - 1 for j in jobs)
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


@pytest.mark.parametrize(
  "schedule",
  [
    {"order": [6, 5, 4, 3, 2, 1, 0]},
    {"order": [3, 0, 6, 2, 5, 1, 4], "n_busy": 3},
    {"n_busy": 1},
    {"delay": lambda job, turn: (job * 5 + turn * 3) % 7},
    {"order": [1, 3, 5, 0, 2, 4, 6], "delay": lambda job, turn: job % 3},
  ],
  ids=["reversed", "three slots", "one slot", "slow tools", "both"],
)
def test_schedule_does_not_change_a_bit(engine, jobs, plain, schedule):
  assert_same_bits(plain[0], drive(engine, jobs, **schedule))


def test_other_slots_do_not_change_a_bit(engine, jobs, plain):
  """Rollouts that sit in other slots, released in the middle of a turn."""
  slots = engine.submit([jobs[3].request, jobs[4].request])
  engine.decode()
  engine.release(slots[1:])
  records = drive(engine, jobs[:2], n_busy=2)
  engine.release(slots[:1])
  assert_same_bits(plain[0][:2], records)


@pytest.mark.parametrize("chunk", [1, pytest.param(16, marks=pytest.mark.slow)])
def test_chunk_length_does_not_change_a_bit(policy, params, jobs, plain, chunk):
  other = engine_lib.Engine(
    policy, dataclasses.replace(CONFIG, chunk=chunk), STOP_IDS
  )
  other.set_params(params)
  assert_same_bits(plain[0], drive(other, jobs))


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
  with pytest.raises(ValueError, match="exceed slot"):
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
  with pytest.raises(ValueError, match="5 requests for 4 slots"):
    engine.submit([good] * 5)
  with pytest.raises(ValueError, match="at least one token"):
    engine.submit([dataclasses.replace(good, prompt=[])])
  with pytest.raises(ValueError, match="cache_length=64"):
    engine.submit([dataclasses.replace(good, budget=64)])
  assert engine.n_free == CONFIG.n_slots
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
