"""Row masks that stack beside the resampler."""

import jax.numpy as jnp
import numpy as np
import pytest

from roc.core import rows

# Outcomes: 0 wrong, 1 correct, 2 void.
OUTCOME = jnp.array(
  [[0, 1, 0, 1], [1, 1, 1, 1], [0, 0, 2, 2], [1, 2, 2, 1], [2, 2, 2, 2]],
  jnp.int8,
)


def test_void_is_outside():
  np.testing.assert_array_equal(
    rows.is_eligible(OUTCOME).sum(-1), [4, 4, 2, 2, 0]
  )


def test_spread_is_of_the_rewards_of_rows_that_are_looked_at():
  reward = jnp.where(OUTCOME == 2, jnp.nan, OUTCOME.astype(jnp.float32))
  spread = rows.has_reward_spread(reward, rows.is_eligible(OUTCOME))
  np.testing.assert_array_equal(spread, [True, False, False, False, False])
  keep = jnp.array([[True, False, True, False]])
  assert not rows.has_reward_spread(reward[:1], keep)[0]
  is_first_pair = jnp.array([[True, True, False, False]])
  assert rows.has_reward_spread(reward[:1], is_first_pair)[0]


def test_spread_of_graded_rewards():
  """Wrong rollouts with different rewards teach; equal ones do not."""
  reward = jnp.array([[0.0, 0.3, 0.0], [0.1, 0.1, 0.1], [0.7, 0.7, 0.9]])
  everything = jnp.ones_like(reward, bool)
  np.testing.assert_array_equal(
    rows.has_reward_spread(reward, everything), [True, False, True]
  )


def test_void_turn_rows_are_out():
  np.testing.assert_array_equal(
    rows.has_no_void_turn(jnp.array([[True, False]])), [[False, True]]
  )


def test_overlong_rules():
  is_truncated = jnp.array([[True, False]])
  np.testing.assert_array_equal(
    rows.is_length_ok("mask", is_truncated), [[False, True]]
  )
  for kind in ("keep", "soft"):
    np.testing.assert_array_equal(
      rows.is_length_ok(kind, is_truncated), [[True, True]]
    )
  with pytest.raises(ValueError, match="'drop': choose one of"):
    rows.is_length_ok("drop", is_truncated)


def test_soft_penalty_is_the_ramp_of_dapo():
  length = jnp.array([[0, 80, 85, 90, 100, 130]])
  penalty = rows.soft_overlong_penalty(length, max_length=100, buffer=20)
  np.testing.assert_allclose(penalty, [[0.0, 0.0, -0.25, -0.5, -1.0, -1.0]])
  assert penalty.dtype == jnp.float32


@pytest.mark.parametrize("buffer", [0, 101])
def test_soft_penalty_refuses_a_buffer_that_does_not_fit(buffer):
  with pytest.raises(ValueError, match=f"buffer {buffer} must lie in"):
    rows.soft_overlong_penalty(
      jnp.zeros((1, 1), jnp.int32), max_length=100, buffer=buffer
    )
