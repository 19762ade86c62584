"""Resample on correct against the authors' code, by hand, and by law.

`rstar2_golden.json` holds outputs of the selection rule in microsoft/rStar at
commit ecbfb94 (rstar2_agent/down_sample), run with numpy in place of torch.
"""

import functools
import inspect
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from roc import layout
from roc.core import resample

GOLDEN = json.loads(
  (pathlib.Path(__file__).parent / "rstar2_golden.json").read_text()
)
S = layout.ToolStatus
WRONG, CORRECT, VOID = layout.Outcome
# "none" chooses nothing.
CHOOSING_MODES = tuple(m for m in resample.MODES if m != "none")
# Wrong rollouts stay where there were any, and so do correct ones.
SIGNED_MODES = tuple(m for m in CHOOSING_MODES if m != "uniform")
penalties = jax.jit(resample.penalties)
count_calls = jax.jit(resample.count_calls)
quotas = jax.jit(
  resample.quotas, static_argnames=("mode", "n_keep", "min_pos", "min_neg")
)


def groups(n_groups, n_drawn, seed=0, void_share=0.0):
  """Random outcomes, penalties of the real kind, and shuffled rollout ids."""
  rng = np.random.default_rng(seed)
  accuracy = rng.uniform(0, 1, (n_groups, 1))
  outcome = (rng.uniform(size=(n_groups, n_drawn)) < accuracy).astype(np.int8)
  outcome[rng.uniform(size=outcome.shape) < void_share] = VOID
  n_calls = rng.integers(1, 6, outcome.shape)
  p = rng.integers(0, n_calls + 1) / n_calls + rng.integers(0, 2, outcome.shape)
  ids = rng.permuted(np.tile(np.arange(n_drawn), (n_groups, 1)), axis=1)
  return outcome, p.astype(np.float32), ids.astype(np.int32)


@functools.partial(
  jax.jit, static_argnames=("mode", "n_keep", "min_pos", "min_neg")
)
def jitted(mode, key, outcome, p, ids, group_id, eps, n_keep, min_pos, min_neg):
  return resample.resample(
    mode,
    key,
    outcome,
    p,
    n_keep=n_keep,
    min_pos=min_pos,
    min_neg=min_neg,
    eps=eps,
    rollout_id_NO=ids,
    group_id_N=group_id,
  )


def run(
  mode,
  outcome,
  p,
  ids=None,
  group_id=None,
  *,
  key=0,
  eps=0.1,
  n_keep=8,
  min_pos=1,
  min_neg=1,
):
  """The resampler under jit; one signature, so that compilations are shared."""
  n_groups, n_drawn = outcome.shape
  if ids is None:
    ids = np.tile(np.arange(n_drawn, dtype=np.int32), (n_groups, 1))
  if group_id is None:
    group_id = np.arange(n_groups, dtype=np.int32)
  key = jax.random.key(key)
  return jitted(
    mode, key, outcome, p, ids, group_id, eps, n_keep, min_pos, min_neg
  )


# Penalties -----------------------------------------------------------------


def status(*calls):
  return jnp.array([[[*calls] + [S.NONE] * (4 - len(calls))]], jnp.int8)


@pytest.mark.parametrize(
  ("calls", "expected"),
  [
    ((), 0.5),
    ((S.OK,), 0.0),
    ((S.ERROR,), 1.0),
    ((S.TIMEOUT, S.OK), 0.5),
    ((S.MEMORY, S.OK), 0.5),
    ((S.OUTPUT_LIMIT, S.OK), 0.5),
    ((S.CRASH, S.OK), 0.5),
    ((S.EXIT, S.OK), 0.5),
    ((S.RESOURCE, S.OK), 0.5),
    ((S.REJECTED, S.OK, S.OK, S.OK), 0.25),
    ((S.REJECTED, S.ERROR, S.OK), 2 / 3),
    # The sandbox's own failure is in neither part of the fraction.
    ((S.INFRA,), 0.5),
    ((S.INFRA, S.OK), 0.0),
    ((S.INFRA, S.ERROR, S.OK, S.INFRA), 0.5),
  ],
)
def test_p_err_by_status(calls, expected):
  one = jnp.ones((1, 1), jnp.int32)
  p = penalties(status(*calls), one, one)
  np.testing.assert_allclose(p.p_err_NO, [[expected]], rtol=1e-7)


def test_every_status_but_three_is_a_failure_of_the_model():
  for s in S:
    n_judged, n_failed = count_calls(status(s))
    is_judged = s not in (S.NONE, S.INFRA)
    assert bool(n_judged[0, 0] == 1) == is_judged, s
    assert bool(n_failed[0, 0] == 1) == (is_judged and s != S.OK), s


@pytest.mark.parametrize(
  ("answers", "turns", "expected"),
  [
    (0, 1, 1.0),
    (1, 1, 0.0),
    (1, 7, 0.0),
    (2, 2, 0.5),
    (3, 2, 1.0),
    (9, 2, 1.0),
    (2, 0, 1.0),
    (0, 0, 1.0),
  ],
)
def test_p_format(answers, turns, expected):
  p = penalties(status(S.OK), jnp.array([[answers]]), jnp.array([[turns]]))
  np.testing.assert_array_equal(p.p_format_NO, [[expected]])
  np.testing.assert_array_equal(p.p_total_NO, [[expected]])


def test_penalties_depend_on_status_alone():
  # A result tag that the model writes itself is a MODEL token, never a call:
  # the penalties have no input through which text could reach them.
  names = tuple(inspect.signature(resample.penalties).parameters)
  assert names == ("tool_status_NOC", "n_answers_NO", "n_turns_NO")


def test_padding_of_calls_is_inert():
  short = jnp.array([[[S.ERROR, S.OK, S.OK]]], jnp.int8)
  padded = jnp.pad(short, ((0, 0), (0, 0), (0, 9)), constant_values=S.NONE)
  one = jnp.ones((1, 1), jnp.int32)
  a, b = (penalties(s, one, one) for s in (short, padded))
  np.testing.assert_array_equal(a.p_total_NO, b.p_total_NO)


# The authors' rule ---------------------------------------------------------


@pytest.mark.parametrize("case", list(GOLDEN["kept_counts[P,pos,neg]"]))
def test_golden_kept_counts(case):
  """`case` reads like "32->16 min2/2"."""
  sizes, minima = case.split(" min")
  n, k = map(int, sizes.split("->"))
  min_pos, min_neg = map(int, minima.split("/"))
  table = np.array(GOLDEN["kept_counts[P,pos,neg]"][case])
  n_pos = table[:, 0]
  # -1 switches minima off in the release; 0 does here.
  min_pos, min_neg = max(min_pos, 0), max(min_neg, 0)
  pos, neg = quotas(
    "sort",
    jnp.array(n_pos),
    jnp.array(n - n_pos),
    n_keep=k,
    min_pos=min_pos,
    min_neg=min_neg,
  )
  np.testing.assert_array_equal(pos, table[:, 1])
  np.testing.assert_array_equal(neg, table[:, 2])
  outcome = (np.arange(n) < n_pos[:, None]).astype(np.int8)
  keep = run(
    "sort",
    outcome,
    np.zeros(outcome.shape, np.float32),
    n_keep=k,
    min_pos=min_pos,
    min_neg=min_neg,
  )
  np.testing.assert_array_equal((keep & (outcome == CORRECT)).sum(-1), pos)
  np.testing.assert_array_equal((keep & (outcome == WRONG)).sum(-1), neg)


@pytest.mark.parametrize("index", range(len(GOLDEN["selections"])))
def test_golden_selections(index):
  case = GOLDEN["selections"][index]
  n, err, total = case["n"], case["err"], case["tot"]
  calls = np.full((1, n, 8), S.NONE, np.int8)
  for o in range(n):
    calls[0, o, : total[o]] = S.OK
    calls[0, o, : err[o]] = S.TIMEOUT
  # In the recorded runs the format penalty is 1 without a call, else 0.
  n_answers = (np.array([total]) > 0).astype(np.int32)
  p = penalties(calls, n_answers, np.ones((1, n), np.int32))
  keep = run(
    "sort",
    np.array([case["reward"]], np.int8),
    p.p_total_NO,
    n_keep=case["k"],
    min_pos=case["min"],
    min_neg=case["min"],
  )
  assert np.flatnonzero(keep[0]).tolist() == case["kept"]


def slow_sort(outcome, p, ids, n_keep, min_pos, min_neg):
  """The rule again, one group at a time, in plain Python."""
  keep = np.zeros(outcome.shape, bool)
  for n in range(len(outcome)):
    in_order = sorted(range(outcome.shape[1]), key=lambda o: ids[n, o])
    pos = [o for o in in_order if outcome[n, o] == CORRECT]
    neg = [o for o in in_order if outcome[n, o] == WRONG]
    if len(pos) + len(neg) < n_keep:
      continue
    share = n_keep / (len(pos) + len(neg))
    n_neg, n_pos = round(len(neg) * share), round(len(pos) * share)
    n_neg = n_neg if n_neg + n_pos == n_keep else n_keep - n_pos
    if n_neg <= min(min_neg, len(neg)):
      n_neg = min(min_neg, len(neg))
      n_pos = n_keep - n_neg
    if n_pos <= min(min_pos, len(pos)):
      n_pos = min(min_pos, len(pos))
      n_neg = n_keep - n_pos
    chosen = sorted(pos, key=lambda o: p[n, o])[:n_pos] + neg[:n_neg]
    keep[n, chosen] = True
  return keep


@pytest.mark.parametrize(
  ("n_drawn", "n_keep", "minimum"), [(16, 8, 1), (14, 7, 2), (9, 4, 0)]
)
def test_sort_agrees_with_a_slow_reference(n_drawn, n_keep, minimum):
  outcome, p, ids = groups(200, n_drawn, seed=n_drawn, void_share=0.2)
  sizes = {"n_keep": n_keep, "min_pos": minimum, "min_neg": minimum}
  keep = run("sort", outcome, p, ids, **sizes)
  np.testing.assert_array_equal(keep, slow_sort(outcome, p, ids, **sizes))


def test_odd_group_where_the_release_stops_with_an_assertion():
  # 14 -> 7 with 7 correct: both sides round 3.5 to 4.
  outcome = np.array([[1] * 7 + [0] * 7], np.int8)
  keep = run("sort", outcome, np.zeros((1, 14), np.float32), n_keep=7)
  assert keep[0, :7].sum() == 4
  assert keep[0, 7:].sum() == 3


def test_sort_never_raises_the_mean_penalty_of_positives():
  outcome, p, ids = groups(100, 16, seed=3)
  keep = np.asarray(run("sort", outcome, p, ids, n_keep=8))
  for n in range(100):
    is_pos = outcome[n] == CORRECT
    if (keep[n] & is_pos).any():
      assert p[n, keep[n] & is_pos].mean() <= p[n, is_pos].mean() + 1e-6


# The paper's rule ----------------------------------------------------------


@pytest.mark.parametrize("n_pos", range(33))
def test_inverse_quotas_are_floor_and_ceil(n_pos):
  n_neg = 32 - n_pos
  pos, neg = quotas(
    "inverse",
    jnp.array([n_pos]),
    jnp.array([n_neg]),
    n_keep=16,
    min_pos=0,
    min_neg=0,
  )
  assert (int(pos[0]), int(neg[0])) == (-(-n_pos // 2), n_neg // 2)


def test_paper_quota_alone_would_lose_the_only_negative():
  outcome = np.array([[1] * 15 + [0]] * 40, np.int8)
  p = np.zeros((40, 16), np.float32)
  assert run("inverse", outcome, p, min_neg=1)[:, 15].all()
  assert not run("inverse", outcome, p, min_neg=0)[:, 15].any()


def chi_square(counts, expected):
  return float(((counts - expected) ** 2 / expected).sum())


def test_inverse_frequencies_follow_the_weights():
  """Pairs drawn without replacement from 4 positives: 6 cells, exact odds."""
  eps, n_draws = 0.1, 20_000
  p = np.array([0.0, 0.25, 0.5, 1.5], np.float32)
  outcome = np.tile(np.array([1, 1, 1, 1, 0, 0, 0, 0], np.int8), (n_draws, 1))
  p_total = np.tile(np.concatenate([p, np.zeros(4)]), (n_draws, 1))
  keep = np.asarray(
    run(
      "inverse", outcome, p_total.astype(np.float32), key=1, n_keep=4, eps=eps
    )
  )
  assert np.isfinite(keep).all()
  w = 1 / (p.astype(np.float64) + eps)
  pairs = [(i, j) for i in range(4) for j in range(i)]
  odds = np.array(
    [
      w[i] * w[j] / w.sum() * (1 / (w.sum() - w[i]) + 1 / (w.sum() - w[j]))
      for i, j in pairs
    ]
  )
  np.testing.assert_allclose(odds.sum(), 1.0)
  counts = np.array([(keep[:, i] & keep[:, j]).sum() for i, j in pairs])
  assert counts.sum() == n_draws
  # 99.9 % quantile of chi-square with 5 degrees of freedom.
  assert chi_square(counts, odds * n_draws) < 20.5
  # Negatives: 6 equally likely pairs.
  counts = np.array([(keep[:, 4 + i] & keep[:, 4 + j]).sum() for i, j in pairs])
  assert chi_square(counts, np.full(6, n_draws / 6)) < 20.5


def test_uniform_is_blind_to_outcome_and_penalty():
  n_draws = 8000
  outcome = np.tile(np.array([1, 1, 0, 0, 0, 0], np.int8), (n_draws, 1))
  p = np.tile(np.linspace(0, 2, 6, dtype=np.float32), (n_draws, 1))
  keep = np.asarray(run("uniform", outcome, p, key=2, n_keep=3))
  np.testing.assert_array_equal(keep.sum(-1), 3)
  # Standard deviation of each frequency: sqrt(0.25 / 8000) = 0.0056.
  np.testing.assert_allclose(keep.mean(0), 0.5, atol=0.025)


# The controls ---------------------------------------------------------------


@pytest.mark.parametrize("case", list(GOLDEN["kept_counts[P,pos,neg]"]))
def test_stratified_keeps_as_many_of_each_sign_as_the_authors(case):
  sizes, minima = case.split(" min")
  n, k = map(int, sizes.split("->"))
  min_pos, min_neg = (max(int(m), 0) for m in minima.split("/"))
  table = np.array(GOLDEN["kept_counts[P,pos,neg]"][case])
  outcome = (np.arange(n) < table[:, :1]).astype(np.int8)
  p = np.tile(np.linspace(0, 2, n, dtype=np.float32), (len(table), 1))
  sizes = {"n_keep": k, "min_pos": min_pos, "min_neg": min_neg}
  keep = run("stratified", outcome, p, **sizes)
  np.testing.assert_array_equal(
    (keep & (outcome == CORRECT)).sum(-1), table[:, 1]
  )
  np.testing.assert_array_equal(
    (keep & (outcome == WRONG)).sum(-1), table[:, 2]
  )


# Correct and wrong rollouts drawn, G, then how many of each are kept.
BALANCED = (
  ((8, 8), 8, (4, 4)),
  ((15, 1), 8, (7, 1)),
  ((1, 15), 8, (1, 7)),
  ((3, 13), 8, (3, 5)),
  ((13, 3), 8, (5, 3)),
  ((16, 0), 8, (8, 0)),
  ((0, 16), 8, (0, 8)),
  ((8, 8), 7, (4, 3)),
  ((14, 2), 7, (5, 2)),
  ((2, 14), 7, (2, 5)),
  ((5, 3), 8, (5, 3)),
  ((8, 8), 2, (1, 1)),
)


@pytest.mark.parametrize(("drawn", "n_keep", "kept"), BALANCED)
def test_balanced_quotas_by_hand(drawn, n_keep, kept):
  got = quotas(
    "balanced",
    *(jnp.array([n]) for n in drawn),
    n_keep=n_keep,
    min_pos=1,
    min_neg=1,
  )
  assert tuple(int(n[0]) for n in got) == kept


def test_balanced_minima_override_the_halves():
  for minima, kept in (((6, 0), (6, 2)), ((0, 6), (2, 6))):
    pos, neg = quotas(
      "balanced",
      jnp.array([8]),
      jnp.array([8]),
      n_keep=8,
      min_pos=minima[0],
      min_neg=minima[1],
    )
    assert (int(pos[0]), int(neg[0])) == kept


def test_balanced_has_the_largest_variance_of_rewards_there_is():
  """PODS: no other subset of G rewards of 0 and 1 varies more."""
  for n_pos in range(12):
    for n_keep in (4, 5, 8):
      pos, _ = quotas(
        "balanced",
        jnp.array([n_pos]),
        jnp.array([11 - n_pos]),
        n_keep=n_keep,
        min_pos=0,
        min_neg=0,
      )
      possible = range(max(0, n_keep - 11 + n_pos), min(n_pos, n_keep) + 1)
      variance = lambda k, n=n_keep: k / n * (1 - k / n)
      assert variance(int(pos[0])) == max(map(variance, possible))


@pytest.mark.parametrize("mode", ["stratified", "balanced"])
def test_a_control_is_random_within_each_sign_and_blind_to_penalty(mode):
  n_draws = 8000
  outcome = np.tile(np.array([1, 1, 1, 1, 0, 0], np.int8), (n_draws, 1))
  p = np.tile(np.linspace(0, 2, 6, dtype=np.float32), (n_draws, 1))
  keep = np.asarray(run(mode, outcome, p, key=3, n_keep=3))
  n_pos = {"stratified": 2, "balanced": 2}[mode]
  np.testing.assert_array_equal(keep[:, :4].sum(-1), n_pos)
  # Standard deviation of each frequency: sqrt(0.25 / 8000) = 0.0056.
  np.testing.assert_allclose(
    keep.mean(0), [n_pos / 4] * 4 + [0.5] * 2, atol=0.025
  )
  # Pairs of correct ones: 6 equally likely cells.
  pairs = [(i, j) for i in range(4) for j in range(i)]
  counts = np.array([(keep[:, i] & keep[:, j]).sum() for i, j in pairs])
  # 99.9 % quantile of chi-square with 5 degrees of freedom.
  assert chi_square(counts, np.full(6, n_draws / 6)) < 20.5


def test_a_small_eps_approaches_sort():
  outcome = np.tile(np.array([1] * 12 + [0] * 4, np.int8), (40, 1))
  p = np.tile(np.array([0, 1] * 6 + [0] * 4, np.float32), (40, 1))
  dirty = []
  for eps in (1.0, 0.1, 1e-6):
    keep = run("inverse", outcome, p, eps=eps)
    dirty.append(int(keep[:, 1:12:2].sum()))
  assert dirty[0] > dirty[1] > dirty[2] == 0


# Laws for every mode -------------------------------------------------------


@pytest.mark.parametrize("mode", CHOOSING_MODES)
def test_exactly_n_keep_or_dropped_and_never_void(mode):
  outcome, p, ids = groups(40, 16, seed=5, void_share=0.45)
  keep = np.asarray(run(mode, outcome, p, ids))
  n_eligible = (outcome != VOID).sum(-1)
  assert (n_eligible < 8).any() and (n_eligible >= 8).any()
  np.testing.assert_array_equal(keep.sum(-1), np.where(n_eligible >= 8, 8, 0))
  assert not keep[outcome == VOID].any()


@pytest.mark.parametrize("mode", SIGNED_MODES)
def test_both_signs_survive_wherever_both_were(mode):
  n_pos = np.arange(40) % 15 + 1
  outcome = (np.arange(16) < n_pos[:, None]).astype(np.int8)
  # The single positive is as dirty as can be.
  p = np.where(outcome == CORRECT, 2.0, 0.0).astype(np.float32)
  for n_keep in (8, 7, 2):
    keep = run(mode, outcome, p, n_keep=n_keep)
    assert (keep & (outcome == CORRECT)).any(-1).all()
    assert (keep & (outcome == WRONG)).any(-1).all()


@pytest.mark.parametrize("mode", CHOOSING_MODES)
@pytest.mark.parametrize("sign", [WRONG, CORRECT])
def test_a_group_of_one_sign_keeps_n_keep_of_it(mode, sign):
  outcome = np.full((40, 16), sign, np.int8)
  keep = run(mode, outcome, np.ones((40, 16), np.float32))
  np.testing.assert_array_equal(keep.sum(-1), 8)


@pytest.mark.parametrize("mode", CHOOSING_MODES)
def test_permuting_rollouts_and_groups_permutes_the_result(mode):
  outcome, p, ids = groups(40, 16, seed=7, void_share=0.1)
  group_id = np.arange(100, 140, dtype=np.int32)
  keep = np.asarray(run(mode, outcome, p, ids, group_id))
  rng = np.random.default_rng(0)
  rows, cols = rng.permutation(40), rng.permutation(16)
  shuffle = lambda x: x[rows][:, cols]
  again = run(mode, shuffle(outcome), shuffle(p), shuffle(ids), group_id[rows])
  np.testing.assert_array_equal(again, shuffle(keep))


@pytest.mark.parametrize("mode", CHOOSING_MODES)
def test_padding_rollouts_and_groups_is_inert(mode):
  outcome, p, ids = groups(40, 16, seed=8)
  keep = np.asarray(run(mode, outcome, p, ids))
  wide = lambda x, fill: np.pad(x, ((0, 2), (0, 3)), constant_values=fill)
  padded = run(mode, wide(outcome, VOID), wide(p, np.nan), wide(ids, 0))
  np.testing.assert_array_equal(padded[:40, :16], keep)
  assert not padded[40:].any() and not padded[:, 16:].any()


@pytest.mark.parametrize("mode", resample.RANDOM_MODES)
def test_neighbours_do_not_matter_but_key_and_group_do(mode):
  outcome, p, ids = groups(40, 16, seed=9)
  ask = lambda key, group_id: np.asarray(
    run(mode, outcome, p, ids, group_id, key=key)
  )
  group_id = np.arange(40, dtype=np.int32)
  keep = ask(0, group_id)
  changed = np.where(group_id == 5, 999, group_id).astype(np.int32)
  again = ask(0, changed)
  np.testing.assert_array_equal(np.delete(again, 5, 0), np.delete(keep, 5, 0))
  assert (again[5] != keep[5]).any()
  assert (ask(1, group_id) != keep).any()


@pytest.mark.bits
@pytest.mark.parametrize("mode", CHOOSING_MODES)
def test_jit_equals_eager_and_eight_devices_equal_one(mode):
  outcome, p, ids = groups(40, 16, seed=10, void_share=0.1)
  group_id = np.arange(40, dtype=np.int32)
  eager = resample.resample(
    mode,
    jax.random.key(0),
    jnp.array(outcome),
    jnp.array(p),
    n_keep=8,
    rollout_id_NO=jnp.array(ids),
    group_id_N=jnp.array(group_id),
  )
  one = run(mode, outcome, p, ids, group_id)
  np.testing.assert_array_equal(one, eager)
  mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
  split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
  spread = run(mode, *jax.device_put((outcome, p, ids, group_id), split))
  assert len(spread.sharding.device_set) == 8
  np.testing.assert_array_equal(spread, eager)


def test_none_keeps_all_that_are_not_void():
  outcome = np.array([[0, 1, 2, 1]], np.int8)
  keep = run("none", outcome, np.zeros((1, 4), np.float32), n_keep=4)
  np.testing.assert_array_equal(keep, [[True, True, False, True]])


@pytest.mark.parametrize(
  ("mode", "kwargs", "message"),
  [
    ("best", {"n_keep": 4}, "Unknown resample mode 'best'"),
    ("sort", {"n_keep": 1}, "at least 2 rollouts"),
    ("sort", {"n_keep": 9}, "n_keep 9 exceeds the 8 rollouts"),
    (
      "sort",
      {"n_keep": 4, "min_pos": 3, "min_neg": 2},
      "fit together into n_keep",
    ),
    ("sort", {"n_keep": 4, "min_pos": -1}, "must not be negative"),
    ("none", {"n_keep": 4}, "must equal the 8 rollouts"),
    ("inverse", {"n_keep": 4, "eps": 0.0}, "eps is 0.0; it must be above 0"),
  ],
)
def test_impossible_sizes_are_one_sentence(mode, kwargs, message):
  outcome = jnp.zeros((1, 8), jnp.int8)
  with pytest.raises(ValueError, match=message):
    resample.resample(
      mode, jax.random.key(0), outcome, jnp.zeros((1, 8)), **kwargs
    )


@pytest.mark.parametrize("mode", resample.RANDOM_MODES)
def test_random_modes_need_a_key(mode):
  outcome = jnp.zeros((1, 8), jnp.int8)
  with pytest.raises(ValueError, match="pass a key"):
    resample.resample(mode, None, outcome, jnp.zeros((1, 8)), n_keep=4)


# Dense rows ----------------------------------------------------------------


def test_take_kept_is_ascending_and_says_what_is_filled():
  keep = jnp.array(
    [
      [False, True, False, True, True],
      [False, False, False, False, False],
      [False, True, False, False, False],
    ]
  )
  index, is_filled = resample.take_kept(keep, 3)
  assert index.dtype == jnp.int32
  np.testing.assert_array_equal(index[0], [1, 3, 4])
  np.testing.assert_array_equal(is_filled.sum(-1), [3, 0, 1])
  assert int(index[2, 0]) == 1
  # Places that are not filled point at rollouts that were not kept.
  for n in range(3):
    pointed = keep[n, index[n]]
    np.testing.assert_array_equal(pointed, is_filled[n])


def test_take_kept_round_trips_a_selection():
  outcome, p, ids = groups(40, 16, seed=11)
  keep = run("inverse", outcome, p, ids)
  index, is_filled = jax.jit(resample.take_kept, static_argnums=1)(keep, 8)
  assert bool(is_filled.all())
  back = np.zeros((40, 16), bool)
  np.put_along_axis(back, np.asarray(index), True, axis=1)
  np.testing.assert_array_equal(back, keep)
