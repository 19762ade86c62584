"""From rollouts to rows, worked by hand on two groups of four."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from roc import layout
from roc.core import metrics
from roc.core import trajectories as trajectories_lib
from roc.device import selection
from roc.device import step as step_lib

N, T, C = 2, 8, 2
N_DRAWN = 4
SHAPE = (N, N_DRAWN)
PAD, PROMPT, MODEL, TOOL = 0, 1, 2, 3
OK, ERROR, TIMEOUT, NONE, INFRA = (
  layout.ToolStatus.OK,
  layout.ToolStatus.ERROR,
  layout.ToolStatus.TIMEOUT,
  layout.ToolStatus.NONE,
  layout.ToolStatus.INFRA,
)
CORRECT, WRONG, VOID = (
  layout.Outcome.CORRECT,
  layout.Outcome.WRONG,
  layout.Outcome.VOID,
)
FILTER = selection.FilterConfig(mode="sort", n_drawn=N_DRAWN, n_kept=2)


@pytest.fixture(scope="module")
def traj():
  """Group 0: two right, two wrong. Group 1: three right, one void."""
  roles_NOT = np.zeros((*SHAPE, T), np.int8)
  rows = {
    (0, 0): [PROMPT, PROMPT, MODEL, TOOL, MODEL],
    (0, 1): [PROMPT, PROMPT, MODEL, TOOL, MODEL, TOOL, MODEL],
    (0, 2): [PROMPT, PROMPT, MODEL, MODEL, TOOL, MODEL, MODEL, MODEL],
    (0, 3): [PROMPT, PROMPT, MODEL, MODEL],
    (1, 0): [PROMPT, MODEL, MODEL],
    (1, 1): [PROMPT, MODEL, MODEL],
    (1, 2): [PROMPT, MODEL, MODEL],
    (1, 3): [PROMPT, MODEL],
  }
  for at, row in rows.items():
    roles_NOT[at][: len(row)] = row
  rng = np.random.default_rng(0)
  is_model = roles_NOT == MODEL
  return trajectories_lib.Trajectories(
    tokens=np.where(roles_NOT > 0, rng.integers(1, 40, (*SHAPE, T)), 0).astype(
      np.int32
    ),
    roles=roles_NOT,
    logp_sampler=np.where(is_model, -rng.random((*SHAPE, T)), 0).astype(
      np.float32
    ),
    tool_status=np.array(
      [
        [[OK, NONE], [ERROR, OK], [TIMEOUT, NONE], [NONE, NONE]],
        [[OK, NONE], [OK, NONE], [INFRA, OK], [INFRA, NONE]],
      ],
      np.int8,
    ),
    n_turns=np.array([[2, 3, 2, 1], [1, 1, 1, 1]], np.int32),
    n_answers=np.array([[1, 1, 1, 0], [1, 1, 1, 0]], np.int32),
    has_void_turn=np.array([[0, 1, 0, 0], [0, 0, 0, 0]], bool),
    is_truncated=np.array([[0, 0, 1, 0], [0, 0, 0, 0]], bool),
    outcome=np.array(
      [[CORRECT, CORRECT, WRONG, WRONG], [CORRECT, CORRECT, CORRECT, VOID]],
      np.int8,
    ),
    reward=np.array([[1, 1, 0, 0], [1, 1, 1, 0]], np.float32),
    rollout_id=np.broadcast_to(np.arange(N_DRAWN, dtype=np.int32), SHAPE),
    place=np.array([10, 11], np.int32),
  ).validate_values()


@functools.cache
def compiled(config, loss):
  return jax.jit(
    lambda traj, key: selection.select(traj, key, config, loss, max_tokens=T)
  )


def select(traj, loss=None, **changes):
  """`selection.select` under jit; also the finalized metrics."""
  config = dataclasses.replace(FILTER, **changes)
  run = compiled(config, loss or step_lib.LossConfig())
  selected = run(traj, jax.random.key(0))
  return selected, metrics.finalize(selected.metrics)


@pytest.fixture(scope="module")
def selected(traj):
  return select(traj)


def test_the_cleanest_right_one_and_a_wrong_one(selected):
  got, _ = selected
  np.testing.assert_array_equal(
    got.keep_NO, [[True, False, True, False], [True, True, False, False]]
  )
  # All kept rollouts of group 1 are right: nothing to learn from them.
  np.testing.assert_array_equal(
    got.is_live_NO, [[True, False, True, False], [False] * 4]
  )
  np.testing.assert_allclose(
    got.advantage_NO[0], [0.5**0.5, 0, -(0.5**0.5), 0], rtol=1e-5
  )
  np.testing.assert_array_equal(got.advantage_NO[1], 0)
  np.testing.assert_allclose(got.penalties.p_err_NO[0], [0, 0.5, 1, 0.5])
  np.testing.assert_allclose(got.penalties.p_format_NO[0], [0, 0, 0, 1])


def test_rows_of_the_update(traj, selected):
  batch = selected[0].batch
  kept = [(0, 0), (0, 2), (1, 0), (1, 1)]
  for b, at in enumerate(kept):
    np.testing.assert_array_equal(batch["tokens_BT"][b], traj.tokens[at])
    np.testing.assert_array_equal(batch["roles_BT"][b], traj.roles[at])
    np.testing.assert_array_equal(
      batch["logp_sampler_BT"][b], traj.logp_sampler[at]
    )
  np.testing.assert_array_equal(batch["logp_old_BT"], batch["logp_sampler_BT"])
  np.testing.assert_allclose(
    batch["advantage_B"], [0.5**0.5, -(0.5**0.5), 0, 0], rtol=1e-5
  )
  # One live prompt with 2 + 5 sampled tokens; the dropped group weighs nothing.
  weight_BT = np.where(batch["roles_BT"] == MODEL, 1 / 7, 0.0)
  weight_BT[2:] = 0
  np.testing.assert_allclose(batch["weight_BT"], weight_BT, rtol=1e-6)


def test_metrics_of_what_was_drawn(selected):
  row = selected[1]
  want = {
    # The void rollout is outside: 7 of 8 count.
    "reward": 5 / 7,
    "accuracy": 5 / 7,
    "reward_std": (0.5 + 0.0) / 2,
    "frac_reward_zero_std": 1 / 2,
    "completions/mean_length": (3 + 5 + 6 + 2 + 2 + 2 + 2) / 7,
    "completions/clipped_ratio": 1 / 7,
    "num_turns/mean": (2 + 3 + 2 + 1 + 1 + 1 + 1) / 7,
    # The sandbox's own faults are no calls of the model's.
    "tools/call_frequency": (1 + 2 + 1 + 0 + 1 + 1 + 1) / 7,
    "tools/failure_frequency": 2 / 7,
    # Of all nine calls.
    "errors/error": 1 / 9,
    "errors/timeout": 1 / 9,
    "errors/infra": 2 / 9,
    "errors/memory": 0.0,
  }
  assert {k: row[k] for k in want} == pytest.approx(want, rel=1e-6)


def test_metrics_of_the_filter(selected):
  row = selected[1]
  want = {
    "roc/pos_kept": (1 + 2) / 2,
    "roc/neg_kept": (1 + 0) / 2,
    "roc/groups_dropped": 1 / 2,
    # Right: calls of 1, 2, 1, 1, 1 of which one failed; kept ones: none did.
    "roc/err_ratio_pos_before": 1 / 6,
    "roc/err_ratio_pos_after": 0.0,
    "roc/err_ratio_neg_before": 1.0,
    "roc/err_ratio_neg_after": 1.0,
    "roc/no_tool_share": 0.0,
  }
  assert {k: row[k] for k in want} == pytest.approx(want, rel=1e-6)


def test_nothing_is_filtered_in_mode_none(traj):
  got, row = select(
    traj, mode="none", n_kept=N_DRAWN, drop_equal_reward=False, min_pos=0
  )
  np.testing.assert_array_equal(got.keep_NO, traj.outcome != VOID)
  np.testing.assert_array_equal(got.is_live_NO, got.keep_NO)
  # Mean and ddof = 1 deviation over the rows that are there.
  std = np.std([1, 1, 0, 0], ddof=1)
  np.testing.assert_allclose(
    got.advantage_NO[0], np.array([1, 1, -1, -1]) * 0.5 / std, rtol=1e-5
  )
  np.testing.assert_array_equal(got.advantage_NO[1], 0)
  # The void rollout fills a row and weighs nothing.
  assert got.batch["tokens_BT"].shape == (N * N_DRAWN, T)
  np.testing.assert_array_equal(got.batch["weight_BT"][7], 0)
  assert np.all(np.sum(got.batch["weight_BT"], axis=1)[:7] > 0)
  assert row["roc/err_ratio_pos_after"] == row["roc/err_ratio_pos_before"]


def test_row_filters_stack(traj):
  # Group 0 keeps 0 and 2; 2 was cut off, which leaves one outcome: no signal.
  got, row = select(traj, overlong="mask")
  assert not np.any(got.is_live_NO)
  assert row["roc/groups_dropped"] == 1.0
  np.testing.assert_array_equal(got.batch["weight_BT"], 0)
  np.testing.assert_array_equal(got.advantage_NO, 0)
  # With everything kept, the void turn of rollout 1 leaves 0, 2 and 3.
  got, _ = select(traj, mode="none", n_kept=N_DRAWN, drop_void_turns=True)
  np.testing.assert_array_equal(got.is_live_NO[0], [True, False, True, True])
  np.testing.assert_array_equal(got.is_live_NO[1], False)


@pytest.mark.parametrize(
  ("rule", "left_out"),
  [({"overlong": "mask"}, 2), ({"drop_void_turns": True}, 1)],
)
def test_what_row_filters_leave_out_is_outside_of_the_baseline(
  traj, rule, left_out
):
  """Mean, deviation and weights are those of the three that are left."""
  loss = step_lib.LossConfig(normaliser="sequence")
  got, _ = select(traj, loss, mode="none", n_kept=N_DRAWN, **rule)
  is_left_O = np.arange(N_DRAWN) != left_out
  reward_O = np.array([1.0, 1.0, 0.0, 0.0])[is_left_O]
  want_O = (reward_O - reward_O.mean()) / reward_O.std(ddof=1)
  np.testing.assert_allclose(got.advantage_NO[0, is_left_O], want_O, rtol=1e-5)
  assert float(got.advantage_NO[0, left_out]) == 0.0
  weight_O = np.sum(got.batch["weight_BT"], axis=-1)[:N_DRAWN]
  np.testing.assert_allclose(weight_O, is_left_O / 3, rtol=1e-6)


def test_a_group_of_wrong_rollouts_with_graded_rewards_teaches(traj):
  wrong = np.full(SHAPE, WRONG, np.int8)
  graded = np.array([[0, 0.3, 0, 0], [0.3] * 4], np.float32)
  got, row = select(
    dataclasses.replace(traj, outcome=wrong, reward=graded),
    mode="none",
    n_kept=N_DRAWN,
  )
  np.testing.assert_array_equal(got.is_live_NO, [[True] * 4, [False] * 4])
  std = np.std(graded[0], ddof=1)
  np.testing.assert_allclose(
    got.advantage_NO[0], (graded[0] - 0.075) / std, rtol=1e-5
  )
  assert row["roc/groups_dropped"] == 0.5
  assert row["frac_reward_zero_std"] == 0.5


def test_soft_penalty_shapes_after_the_filter(traj):
  plain, _ = select(traj)
  loss = step_lib.LossConfig(scale_by_std=False)
  got, row = select(traj, loss, overlong="soft", overlong_buffer=4)
  np.testing.assert_array_equal(got.keep_NO, plain.keep_NO)
  # Completions of 3 and 6 of 8 tokens: the last four cost, so 0 and 2 / 4.
  np.testing.assert_allclose(
    got.advantage_NO[0], [0.75, 0, -0.75, 0], rtol=1e-6
  )
  # The reward that is reported is the one that was drawn.
  assert row["reward"] == pytest.approx(5 / 7)


def test_order_of_groups_and_rollouts_is_irrelevant(traj):
  config = {"mode": "inverse", "n_kept": 2}
  got, row = select(traj, **config)
  order_N, order_O = np.array([1, 0]), np.array([2, 0, 3, 1])
  shuffled = jax.tree.map(
    lambda x: x[order_N] if x.ndim == 1 else x[order_N][:, order_O], traj
  )
  again, row_again = select(shuffled, **config)
  for name in ("keep_NO", "is_live_NO", "advantage_NO"):
    np.testing.assert_array_equal(
      getattr(again, name), getattr(got, name)[order_N][:, order_O]
    )
  assert row_again == pytest.approx(row, rel=1e-6)


@pytest.mark.parametrize("mode", ["inverse", "uniform"])
def test_groups_of_the_same_rollouts_are_filtered_each_anew(traj, mode):
  """A problem that comes twice in a step is at two places of the run."""
  twice = lambda x: np.repeat(x[:1], 64, axis=0)
  same = trajectories_lib.Trajectories(
    **{f.name: twice(getattr(traj, f.name)) for f in dataclasses.fields(traj)}
  )
  apart = dataclasses.replace(same, place=np.arange(64, dtype=np.int32))
  alike = np.asarray(select(same, mode=mode)[0].keep_NO)
  assert (alike == alike[0]).all()
  kept = np.asarray(select(apart, mode=mode)[0].keep_NO)
  assert (kept.sum(1) == 2).all() and len(np.unique(kept, axis=0)) > 3


def test_all_void_is_no_update(traj):
  void = dataclasses.replace(traj, outcome=np.full(SHAPE, VOID, np.int8))
  got, row = select(void)
  assert not np.any(got.keep_NO)
  np.testing.assert_array_equal(got.batch["weight_BT"], 0)
  assert "reward" not in row and row["roc/groups_dropped"] == 1.0
  assert all(np.isfinite(x) for x in row.values())
