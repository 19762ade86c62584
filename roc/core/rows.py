"""Row masks beside resample on correct: which rollouts may teach at all.

Each one answers a single question about a rollout or a group, so they stack by
`&` with each other and with the kept rows of `roc.core.resample`.
"""

import jax
import jax.numpy as jnp

from roc import layout
from roc.core import shapes

OVERLONG_KINDS = ("keep", "mask", "soft")


@shapes.checked
def is_eligible(outcome_NO: jax.Array) -> jax.Array:
  """Where a rollout belongs to its group: the environment did its part.

  Args:
    outcome_NO: int [N, O], `layout.Outcome`.

  Returns:
    bool [N, O]: False for VOID.
  """
  return outcome_NO != layout.Outcome.VOID


@shapes.checked
def has_reward_spread(reward_NO: jax.Array, keep_NO: jax.Array) -> jax.Array:
  """Groups whose rewards are not all equal: the others carry no signal.

  Dynamic sampling of DAPO (arXiv 2503.14476, Eq. 11), there for rewards of 0
  and 1 alone; a group of wrong rollouts with rewards 0 and 0.3 has something
  to say. The largest reward is compared with the smallest: a standard deviation
  would let the rounding noise of equal rewards pass as signal.

  Args:
    reward_NO: float [N, O]; entries that are not looked at may hold anything.
    keep_NO: bool [N, O], rows to look at.

  Returns:
    bool [N]; False for a group with fewer than two such rows.
  """
  top_N = jnp.max(jnp.where(keep_NO, reward_NO, -jnp.inf), axis=-1)
  low_N = jnp.min(jnp.where(keep_NO, reward_NO, jnp.inf), axis=-1)
  return top_N > low_N


@shapes.checked
def has_no_void_turn(has_void_turn_NO: jax.Array) -> jax.Array:
  """Rollouts in which every turn holds a complete call or an answer.

  The void-turn filter of SimpleTIR (arXiv 2509.02479) drops the
  whole trajectory, not the turn alone.

  Args:
    has_void_turn_NO: bool [N, O].

  Returns:
    bool [N, O], True for rows that may carry loss.
  """
  return ~has_void_turn_NO


@shapes.checked
def is_length_ok(kind: str, is_truncated_NO: jax.Array) -> jax.Array:
  """Rows that a truncation rule leaves in the loss.

  "keep": a truncated rollout stays, with its reward of 0 (GRPO-RoC's choice,
  arXiv 2508.20722); "mask": it carries no loss (overlong filtering,
  DAPO section 3.4); "soft": it stays and `soft_overlong_penalty` is added to
  its reward.

  Args:
    kind: one of `OVERLONG_KINDS`.
    is_truncated_NO: bool [N, O].

  Returns:
    bool [N, O].

  Raises:
    ValueError: unknown kind.
  """
  if kind not in OVERLONG_KINDS:
    raise ValueError(
      f"Unknown overlong rule {kind!r}: choose one of {OVERLONG_KINDS}."
    )
  if kind == "mask":
    return ~is_truncated_NO
  return jnp.ones_like(is_truncated_NO)


@shapes.checked
def soft_overlong_penalty(
  length_NO: jax.Array, *, max_length: int, buffer: int
) -> jax.Array:
  """Linear punishment inside the last `buffer` tokens of the budget.

  DAPO (arXiv 2503.14476, Eq. 13): 0 up to max_length - buffer, then falling
  linearly to -1 at max_length, and -1 beyond. To be added to the reward after
  the filter, which looks at raw outcomes alone.

  Args:
    length_NO: int [N, O], response length in tokens.
    max_length: the budget.
    buffer: width of the ramp, 1 to max_length.

  Returns:
    float32 [N, O] in [-1, 0].

  Raises:
    ValueError: the buffer does not fit the budget.
  """
  if not 0 < buffer <= max_length:
    raise ValueError(
      f"Soft overlong penalty: buffer {buffer} must lie in 1..max_length"
      f" = {max_length}."
    )
  over_NO = (length_NO - (max_length - buffer)).astype(jnp.float32)
  return -jnp.clip(over_NO / buffer, 0.0, 1.0)
