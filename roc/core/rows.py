"""Row masks beside resample on correct: which rollouts may teach at all.

Each one answers a single question about a rollout or a group, so they stack by
`&` with each other and with the kept rows of `roc.core.resample`.
"""

import jax
import jax.numpy as jnp

from roc import layout

OVERLONG_KINDS = ("keep", "mask", "soft")


def is_eligible(outcome_NO: jax.Array) -> jax.Array:
  """Where a rollout belongs to its group: the environment did its part.

  Args:
    outcome_NO: int [N, O], `layout.Outcome`.

  Returns:
    bool [N, O]: False for VOID.
  """
  return outcome_NO != layout.Outcome.VOID


def has_reward_spread(
  outcome_NO: jax.Array, keep_NO: jax.Array | None = None
) -> jax.Array:
  """Groups with a correct and a wrong rollout: the others carry no signal.

  Dynamic sampling of DAPO (arXiv 2503.14476, Eq. 11: 0 < number correct < G),
  decided on the integer outcomes. A float standard deviation would let rounding
  noise of equal rewards pass as signal.

  Args:
    outcome_NO: int [N, O], `layout.Outcome`.
    keep_NO: bool [N, O], rows to look at; all that are not VOID when left out.

  Returns:
    bool [N]; False for a group without rows.
  """
  if keep_NO is None:
    keep_NO = is_eligible(outcome_NO)
  has_correct_N = jnp.any(keep_NO & (outcome_NO == layout.Outcome.CORRECT), -1)
  has_wrong_N = jnp.any(keep_NO & (outcome_NO == layout.Outcome.WRONG), -1)
  return has_correct_N & has_wrong_N


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
