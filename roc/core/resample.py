"""Resample on correct: clean positives, a diverse sample of negatives.

Of O rollouts drawn for a prompt, G are kept: among the correct ones those with
few failed tool calls and one well-formed answer, among the wrong ones a sample
that looks like the original. A rollout is kept when its rank among the rollouts
of its own sign is below that sign's quota; every mode is a choice of ranking
score and of quotas:

  "sort": the authors' released rule. Cleanest correct rollouts, first wrong
    ones in the order of their ids; nothing is random.
  "inverse": the paper's rule (arXiv 2508.20722). Correct rollouts without
    replacement with weight 1 / (p_total + eps), wrong ones uniformly. The paper
    leaves p_total = 0 open; eps sets how strong the filter is, and eps -> 0
    approaches "sort".
  "stratified": the quotas of "sort", random within each sign: the control that
    differs from RoC in nothing but its preference for clean correct rollouts.
  "balanced": as many correct as wrong ones where there are enough, random
    within each sign: PODS (arXiv 2504.13818), whose subset of largest reward
    variance is this one when rewards are 0 and 1.
  "uniform": G of the O at random, blind to outcome and penalty. It often keeps
    one sign only of a mixed group, which then trains nothing, so it is no
    control for what the filter selects by.
  "none": all O = G of them: plain GRPO.

Ranks are counted by comparing all pairs of a group, [N, O, O]: exact,
free of position, and on every backend faster than sorting 32 numbers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from roc import layout
from roc.core import shapes

MODES = ("sort", "inverse", "stratified", "balanced", "uniform", "none")
RANDOM_MODES = ("inverse", "stratified", "balanced", "uniform")
# Salt of the random stream, apart from those of sampling.
_STREAM = 1


def _status_bits(statuses) -> int:
  """A set of statuses as bits of an int, NONE (-1) at bit 0."""
  return sum(1 << (int(status) + 1) for status in statuses)


_JUDGED_BITS = _status_bits(layout.JUDGED_STATUSES)
_FAILED_BITS = _status_bits(layout.FAILED_STATUSES)


class CallCounts(NamedTuple):
  """Tool calls of each rollout, by typed status."""

  n_judged_NO: jax.Array  # int32 [N, O], the sandbox did its part
  n_failed_NO: jax.Array  # int32 [N, O], of those, the model's fault


class Penalties(NamedTuple):
  """How unclean a rollout is; float32 [N, O] each."""

  p_err_NO: jax.Array
  p_format_NO: jax.Array
  p_total_NO: jax.Array


class Kept(NamedTuple):
  """Kept rollouts as positions, dense in G."""

  index_NG: jax.Array  # int32 [N, G], positions along O, ascending
  is_filled_NG: jax.Array  # bool [N, G], False where the group kept fewer


@shapes.checked
def count_calls(tool_status_NOC: jax.Array) -> CallCounts:
  """Judged and failed tool calls of each rollout.

  Args:
    tool_status_NOC: int [N, O, C], `layout.ToolStatus`, NONE as padding.

  Returns:
    `CallCounts`. INFRA counts in neither: the sandbox failed, not the model.
  """
  # A status indexes into constant bits: no gather, one pass over C.
  shift_NOC = tool_status_NOC.astype(jnp.int32) + 1
  return CallCounts(
    jnp.sum((_JUDGED_BITS >> shift_NOC) & 1, axis=-1, dtype=jnp.int32),
    jnp.sum((_FAILED_BITS >> shift_NOC) & 1, axis=-1, dtype=jnp.int32),
  )


@shapes.checked
def penalties(
  tool_status_NOC: jax.Array, n_answers_NO: jax.Array, n_turns_NO: jax.Array
) -> Penalties:
  """Tool-error and format penalty of each rollout.

  GRPO-RoC (arXiv 2508.20722). Eq. 4: p_err = failed calls / calls, 0.5 without
  any call, which encourages tool use. Eq. 5: p_format = 1 without an answer,
  else min(1, (answers - 1) / turns). p_total = p_err + p_format. Failure is
  read off the typed status: text could be forged by the policy, and the
  authors' search for the word "error" misses timeouts.

  Args:
    tool_status_NOC: int [N, O, C], `layout.ToolStatus`, NONE as padding.
    n_answers_NO: int [N, O], well-formed answers.
    n_turns_NO: int [N, O], turns of the model; 0 is taken as 1.

  Returns:
    `Penalties`, float32: p_err and p_format in [0, 1], p_total in [0, 2].
  """
  return count_penalties(count_calls(tool_status_NOC), n_answers_NO, n_turns_NO)


@shapes.checked
def count_penalties(
  calls: CallCounts, n_answers_NO: jax.Array, n_turns_NO: jax.Array
) -> Penalties:
  """`penalties` of calls that are counted already.

  Args:
    calls: int [N, O], judged calls and the failed ones among them.
    n_answers_NO: int [N, O], well-formed answers.
    n_turns_NO: int [N, O], turns of the model; 0 is taken as 1.

  Returns:
    `Penalties`, float32 [N, O] each.
  """
  n_judged_NO, n_failed_NO = calls
  p_err_NO = jnp.where(
    n_judged_NO > 0,
    n_failed_NO.astype(jnp.float32)
    / jnp.maximum(n_judged_NO, 1).astype(jnp.float32),
    0.5,
  )
  surplus_NO = (n_answers_NO - 1).astype(jnp.float32)
  turns_NO = jnp.maximum(n_turns_NO, 1).astype(jnp.float32)
  p_format_NO = jnp.where(
    n_answers_NO > 0, jnp.minimum(1.0, surplus_NO / turns_NO), 1.0
  )
  return Penalties(p_err_NO, p_format_NO, p_err_NO + p_format_NO)


@shapes.checked
def quotas(
  mode: str,
  n_pos_N: jax.Array,
  n_neg_N: jax.Array,
  *,
  n_keep: int,
  min_pos: int,
  min_neg: int,
) -> tuple[jax.Array, jax.Array]:
  """How many correct and wrong rollouts a group keeps.

  "sort", the rule of the authors' release (github.com/microsoft/rStar,
  rstar2_agent/down_sample): round(count * G / n), halves to even, then wrong
  and, overriding, correct rollouts lifted to their minimum. Where the two
  roundings do not add up to G (odd G, where the release stops with an
  assertion), wrong ones get G minus the correct ones. "inverse", the rule of
  the paper (section on GRPO-RoC): floor(wrong * G / n) wrong ones, the rest
  correct, neither below its minimum. "stratified": those of "sort".
  "balanced": ceil(G / 2) correct ones, the rest wrong, neither below its
  minimum (PODS, arXiv 2504.13818: either half may be the larger of an odd G).
  A minimum never asks for more than there are, and what one side lacks the
  other fills.

  Args:
    mode: one of `MODES` that have quotas: all but "uniform" and "none".
    n_pos_N: int32 [N], correct rollouts.
    n_neg_N: int32 [N], wrong rollouts.
    n_keep: G.
    min_pos: least number of correct rollouts, where there are any.
    min_neg: least number of wrong rollouts, where there are any.

  Returns:
    (quota_pos_N, quota_neg_N), int32, adding to G wherever the group has at
    least G rollouts; meaningless elsewhere.
  """
  n_N = jnp.maximum(n_pos_N + n_neg_N, 1)
  least_pos_N = jnp.minimum(min_pos, n_pos_N)
  least_neg_N = jnp.minimum(min_neg, n_neg_N)
  if mode in ("sort", "stratified"):
    quota_pos_N = _round_half_even(n_pos_N * n_keep, n_N)
    # Equals the rounded share of the wrong ones unless G is odd.
    quota_neg_N = n_keep - quota_pos_N
    is_low_N = quota_neg_N <= least_neg_N
    quota_pos_N = jnp.where(is_low_N, n_keep - least_neg_N, quota_pos_N)
    quota_pos_N = jnp.where(
      quota_pos_N <= least_pos_N, least_pos_N, quota_pos_N
    )
  elif mode == "balanced":
    quota_neg_N = jnp.maximum(n_keep // 2, least_neg_N)
    quota_pos_N = jnp.maximum(n_keep - quota_neg_N, least_pos_N)
  else:
    quota_neg_N = jnp.maximum(n_neg_N * n_keep // n_N, least_neg_N)
    quota_pos_N = jnp.maximum(n_keep - quota_neg_N, least_pos_N)
  quota_pos_N = jnp.clip(
    quota_pos_N, n_keep - n_neg_N, jnp.minimum(n_pos_N, n_keep)
  )
  return quota_pos_N, n_keep - quota_pos_N


def _round_half_even(num_N: jax.Array, den_N: jax.Array) -> jax.Array:
  """round(num / den) as Python does it, in integers."""
  floor_N = num_N // den_N
  twice_N = 2 * (num_N - floor_N * den_N)
  goes_up_N = (twice_N > den_N) | ((twice_N == den_N) & (floor_N % 2 == 1))
  return floor_N + goes_up_N.astype(floor_N.dtype)


def _uniform_NO(
  key: jax.Array, group_id_N: jax.Array, rollout_id_NO: jax.Array
) -> jax.Array:
  """One number in (0, 1) per rollout, a function of its two ids alone."""
  key_N = jax.vmap(jax.random.fold_in, (None, 0))(key, group_id_N)
  key_NO = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(
    key_N, rollout_id_NO
  )
  # A folded key is itself the output of the hash, used for nothing else: its
  # bits are the draw, for half the price of hashing once more.
  bits_NO = jax.random.key_data(key_NO)[..., 0]
  return ((bits_NO >> 9).astype(jnp.float32) + 0.5) * 2.0**-23


def _class_and_quota(
  mode, outcome_NO, n_keep, min_pos, min_neg
) -> tuple[jax.Array, jax.Array]:
  """Which rollouts compete with each other, and for how many places."""
  is_pos_NO = outcome_NO == layout.Outcome.CORRECT
  is_neg_NO = outcome_NO == layout.Outcome.WRONG
  if mode == "uniform":
    class_NO = jnp.where(is_pos_NO | is_neg_NO, 0, -1)
    return class_NO, jnp.full_like(class_NO, n_keep)
  quota_pos_N, quota_neg_N = quotas(
    mode,
    jnp.sum(is_pos_NO, axis=-1, dtype=jnp.int32),
    jnp.sum(is_neg_NO, axis=-1, dtype=jnp.int32),
    n_keep=n_keep,
    min_pos=min_pos,
    min_neg=min_neg,
  )
  quota_NO = jnp.where(is_pos_NO, quota_pos_N[:, None], quota_neg_N[:, None])
  # Rollouts that are VOID form a class of their own, out of everybody's way.
  return outcome_NO.astype(jnp.int32), quota_NO


def _score_NO(
  mode, key, outcome_NO, p_total_NO, eps, rollout_id_NO, group_id_N
) -> jax.Array:
  """What the rollouts of a class are ranked by; the lowest are kept."""
  is_pos_NO = outcome_NO == layout.Outcome.CORRECT
  p_total_NO = p_total_NO.astype(jnp.float32)
  if mode == "sort":
    return jnp.where(is_pos_NO, p_total_NO, 0.0)
  uniform_NO = _uniform_NO(key, group_id_N, rollout_id_NO)
  if mode != "inverse":
    return uniform_NO
  # The clock of a rollout with weight w rings at Exponential(w).
  return -jnp.log(uniform_NO) * jnp.where(is_pos_NO, p_total_NO + eps, 1.0)


def _rank_NO(
  score_NO: jax.Array, class_NO: jax.Array, rollout_id_NO: jax.Array
) -> jax.Array:
  """Rank of each rollout among those of its class, lowest score first.

  Equal scores rank by rollout id. Classes do not see each other.
  """
  score_NO1, score_N1O = score_NO[:, :, None], score_NO[:, None, :]
  id_NO1, id_N1O = rollout_id_NO[:, :, None], rollout_id_NO[:, None, :]
  comes_before_NOO = (score_N1O < score_NO1) | (
    (score_N1O == score_NO1) & (id_N1O < id_NO1)
  )
  is_peer_NOO = class_NO[:, :, None] == class_NO[:, None, :]
  return jnp.sum(comes_before_NOO & is_peer_NOO, axis=-1, dtype=jnp.int32)


def step_key(seed: int, step: int | jax.Array) -> jax.Array:
  """The PRNG key that a run with this seed chooses with at a step."""
  return jax.random.fold_in(
    jax.random.fold_in(jax.random.key(seed), _STREAM), step
  )


def _check(mode, key, n_rollouts, n_keep, min_pos, min_neg, eps) -> None:
  """Refuses sizes that cannot be, at trace time."""
  if mode not in MODES:
    raise ValueError(f"Unknown resample mode {mode!r}: choose one of {MODES}.")
  if n_keep < 2:
    raise ValueError(
      f"resample: n_keep is {n_keep}; a group needs at least 2 rollouts to have"
      " a baseline."
    )
  if n_keep > n_rollouts:
    raise ValueError(
      f"resample: n_keep {n_keep} exceeds the {n_rollouts} rollouts drawn per"
      " group; draw more or keep fewer."
    )
  if mode == "none" and n_keep != n_rollouts:
    raise ValueError(
      f"resample: mode 'none' keeps every rollout, so n_keep {n_keep} must"
      f" equal the {n_rollouts} rollouts drawn per group."
    )
  if min_pos < 0 or min_neg < 0 or min_pos + min_neg > n_keep:
    raise ValueError(
      f"resample: min_pos {min_pos} and min_neg {min_neg} must not be negative"
      f" and must fit together into n_keep {n_keep}."
    )
  if mode == "inverse" and isinstance(eps, int | float) and not eps > 0:
    raise ValueError(
      f"resample: eps is {eps}; it must be above 0, or a clean rollout would"
      " have infinite weight (mode 'sort' is that limit)."
    )
  if mode in RANDOM_MODES and key is None:
    raise ValueError(f"resample: mode {mode!r} draws at random; pass a key.")


@shapes.checked
def resample(
  mode: str,
  key: jax.Array | None,
  outcome_NO: jax.Array,
  p_total_NO: jax.Array,
  *,
  n_keep: int,
  min_pos: int = 1,
  min_neg: int = 1,
  eps: float | jax.Array = 0.1,
  rollout_id_NO: jax.Array | None = None,
  group_id_N: jax.Array | None = None,
) -> jax.Array:
  """Chooses the G of O rollouts of each group that enter the update.

  The module's docstring describes the modes. The choice depends on scores and
  ids, never on positions or neighbours: a permutation of rollouts or groups
  permutes the result. Rollouts with outcome VOID are outside: never kept, not
  counted in any quota. Sampling without replacement is a race of exponential
  clocks, the same as Gumbel top-k (arXiv 1903.06059).

  Args:
    mode: one of `MODES`.
    key: PRNG key of the step; folded with the group id, then the rollout id.
      May be None for "sort" and "none".
    outcome_NO: int [N, O], `layout.Outcome`.
    p_total_NO: float [N, O], from `penalties`.
    n_keep: G, at least 2.
    min_pos: correct rollouts to keep at least, where there are as many.
    min_neg: wrong rollouts to keep at least, where there are as many.
    eps: added to p_total in mode "inverse".
    rollout_id_NO: int32 [N, O], distinct in a group; positions when left out.
    group_id_N: int32 [N], the problem's place in the run's order; positions
      when left out.

  Returns:
    keep_NO, bool [N, O]: exactly G True in every group that has G rollouts
    which are not VOID. A group with fewer is dropped, all False; in mode "none"
    it keeps what it has. A group of one sign keeps G of that sign.

  Raises:
    ValueError: unknown mode, sizes that cannot be, or a missing key.
  """
  n_groups, n_rollouts = outcome_NO.shape
  _check(mode, key, n_rollouts, n_keep, min_pos, min_neg, eps)
  is_eligible_NO = outcome_NO != layout.Outcome.VOID
  if mode == "none":
    return is_eligible_NO
  if rollout_id_NO is None:
    rollout_id_NO = jnp.broadcast_to(jnp.arange(n_rollouts), outcome_NO.shape)
  if group_id_N is None:
    group_id_N = jnp.arange(n_groups)
  class_NO, quota_NO = _class_and_quota(
    mode, outcome_NO, n_keep, min_pos, min_neg
  )
  score_NO = _score_NO(
    mode, key, outcome_NO, p_total_NO, eps, rollout_id_NO, group_id_N
  )
  rank_NO = _rank_NO(score_NO, class_NO, rollout_id_NO)
  n_eligible_N1 = jnp.sum(is_eligible_NO, axis=-1, keepdims=True)
  return is_eligible_NO & (n_eligible_N1 >= n_keep) & (rank_NO < quota_NO)


@shapes.checked
def take_kept(keep_NO: jax.Array, n_keep: int) -> Kept:
  """Kept rollouts as dense positions, for a train batch of fixed shape.

  Args:
    keep_NO: bool [N, O], at most `n_keep` True per group.
    n_keep: G.

  Returns:
    `Kept`: index_NG int32 ascending among the filled places, and is_filled_NG.
    Places that are not filled hold positions of rollouts that were not kept;
    they must carry no loss.
  """
  order_NO = jnp.argsort(~keep_NO, axis=-1, stable=True).astype(jnp.int32)
  n_kept_N1 = jnp.sum(keep_NO, axis=-1, keepdims=True, dtype=jnp.int32)
  place_1G = jnp.arange(n_keep, dtype=jnp.int32)[None]
  return Kept(order_NO[:, :n_keep], place_1G < n_kept_N1)
