"""From drawn rollouts to the rows of an update: filter, advantages, weights.

One jitted function over the trajectory tensors of a step. Its order matters:
resampling looks at raw correctness and penalties alone, shaping of the reward
comes after it, and advantages are taken over what is left.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from roc import layout
from roc.core import advantages, losses, masks, metrics, resample, rows
from roc.core import trajectories as trajectories_lib
from roc.device import step as step_lib

Mode = Literal["sort", "inverse", "stratified", "balanced", "uniform", "none"]


@dataclasses.dataclass(frozen=True)
class FilterConfig:
  """Resample on correct, and the row filters that stack on it."""

  mode: Mode = "sort"  # how the n_kept of n_drawn rollouts are chosen
  n_drawn: int = 16  # rollouts drawn per problem
  n_kept: int = 8  # rollouts of them that are trained on
  min_pos: int = 1  # correct rollouts kept if there are as many
  min_neg: int = 1  # wrong rollouts kept if there are as many
  eps: float = 0.1  # inverse: weight 1 / (penalty + eps)
  drop_equal_reward: bool = True  # leave out groups of one and the same reward
  drop_void_turns: bool = False  # leave out rollouts with a void turn
  # Truncated rollouts: keep with reward 0, leave out, or penalise by length.
  overlong: Literal["keep", "mask", "soft"] = "keep"
  overlong_buffer: int = 16  # soft: last tokens of max_tokens that cost


@dataclasses.dataclass(frozen=True)
class Selection:
  """What the filter did with N groups of O rollouts.

  Attributes:
    batch: rows [N * G, ...] for `step.grpo_loss`.
    keep_NO: bool, chosen by the resampler.
    is_live_NO: bool, kept and left in the loss by every row filter.
    advantage_NO: float32, 0 where not live.
    penalties: `resample.Penalties` of each rollout.
    metrics: undivided means by name.
  """

  batch: step_lib.Batch
  keep_NO: jax.Array
  is_live_NO: jax.Array
  advantage_NO: jax.Array
  penalties: resample.Penalties
  metrics: step_lib.Metrics


jax.tree_util.register_dataclass(
  Selection,
  data_fields=[f.name for f in dataclasses.fields(Selection)],
  meta_fields=[],
)


def select(
  traj: trajectories_lib.Trajectories,
  key: jax.Array,
  filter_config: FilterConfig,
  loss_config: step_lib.LossConfig,
  max_tokens: int,
) -> Selection:
  """Resamples, filters rows, and lays out the update's batch.

  Args:
    traj: a step's rollouts.
    key: PRNG key of the step.
    filter_config: see `FilterConfig`.
    loss_config: normaliser and advantage settings are read here.
    max_tokens: the completion budget, for the soft overlong penalty and the
      constant-length normaliser.
  """
  f = filter_config
  penalties = resample.penalties(traj.tool_status, traj.n_answers, traj.n_turns)
  keep_NO = resample.resample(
    f.mode,
    key,
    traj.outcome,
    penalties.p_total_NO,
    n_keep=f.n_kept,
    min_pos=f.min_pos,
    min_neg=f.min_neg,
    eps=f.eps,
    rollout_id_NO=traj.rollout_id,
    group_id_N=traj.place,
  )
  is_live_NO = keep_NO & rows.is_length_ok(f.overlong, traj.is_truncated)
  if f.drop_void_turns:
    is_live_NO &= rows.has_no_void_turn(traj.has_void_turn)
  if f.drop_equal_reward:
    is_live_NO &= rows.has_reward_spread(traj.reward, is_live_NO)[:, None]
  reward_NO = traj.reward
  if f.overlong == "soft":
    reward_NO += rows.soft_overlong_penalty(
      _completion_length(traj), max_length=max_tokens, buffer=f.overlong_buffer
    )
  advantage_NO = advantages.group_advantages(
    reward_NO,
    is_live_NO,
    scale_by_std=loss_config.scale_by_std,
    ddof=loss_config.ddof,
  )
  taken = resample.take_kept(keep_NO, f.n_kept)
  take = lambda x_NO: jnp.take_along_axis(x_NO, taken.index_NG, axis=1)
  kept = traj.take(taken.index_NG)
  weight_NGT = losses.token_weights(
    masks.is_model(kept.roles),
    loss_config.normaliser,
    is_kept_NG=take(is_live_NO) & taken.is_filled_NG,
    max_length=max_tokens,
  )
  flat = lambda x_NG: x_NG.reshape(-1, *x_NG.shape[2:])
  batch = {
    "tokens_BT": flat(kept.tokens),
    "roles_BT": flat(kept.roles),
    "logp_sampler_BT": flat(kept.logp_sampler),
    "logp_old_BT": flat(kept.logp_sampler),
    "advantage_B": flat(take(advantage_NO)),
    "weight_BT": flat(weight_NGT),
  }
  stats = rollout_metrics(traj) | filter_metrics(traj, keep_NO, is_live_NO)
  return Selection(batch, keep_NO, is_live_NO, advantage_NO, penalties, stats)


def _completion_length(traj) -> jax.Array:
  is_completion = (traj.roles != layout.Role.PAD) & (
    traj.roles != layout.Role.PROMPT
  )
  return jnp.sum(is_completion, axis=-1, dtype=jnp.int32)


def rollout_metrics(
  traj: trajectories_lib.Trajectories,
) -> step_lib.Metrics:
  """What was drawn, before any filter; rollouts of outcome VOID are outside."""
  is_in_NO = rows.is_eligible(traj.outcome)
  calls = resample.count_calls(traj.tool_status)
  is_correct_NO = traj.outcome == layout.Outcome.CORRECT
  has_spread_N = rows.has_reward_spread(traj.reward, is_in_NO)
  n_in_N = jnp.maximum(jnp.sum(is_in_NO, axis=-1), 1)
  reward_NO = jnp.where(is_in_NO, traj.reward, 0.0)
  mean_N = jnp.sum(reward_NO, axis=-1) / n_in_N
  square_NO = jnp.square(reward_NO - mean_N[:, None]) * is_in_NO
  std_N = jnp.sqrt(jnp.sum(square_NO, axis=-1) / n_in_N)
  stats = {
    "reward": metrics.mean(traj.reward, is_in_NO),
    "reward_std": metrics.mean(std_N, jnp.any(is_in_NO, axis=-1)),
    "accuracy": metrics.mean(is_correct_NO, is_in_NO),
    "frac_reward_zero_std": metrics.mean(~has_spread_N),
    "completions/mean_length": metrics.mean(_completion_length(traj), is_in_NO),
    "completions/clipped_ratio": metrics.mean(traj.is_truncated, is_in_NO),
    "num_turns/mean": metrics.mean(traj.n_turns, is_in_NO),
    "tools/call_frequency": metrics.mean(calls.n_judged_NO, is_in_NO),
    "tools/failure_frequency": metrics.ratio(
      calls.n_failed_NO * is_in_NO, calls.n_judged_NO * is_in_NO
    ),
  }
  # Of all calls, the sandbox's own faults included.
  is_call_NOC = traj.tool_status != layout.ToolStatus.NONE
  for status in layout.ToolStatus:
    if status not in (layout.ToolStatus.NONE, layout.ToolStatus.OK):
      stats[f"errors/{status.name.lower()}"] = metrics.mean(
        traj.tool_status == status, is_call_NOC
      )
  return stats


def filter_metrics(
  traj: trajectories_lib.Trajectories,
  keep_NO: jax.Array,
  is_live_NO: jax.Array,
) -> step_lib.Metrics:
  """What the filter changed: shares of failing calls by sign, kept counts."""
  is_pos_NO = traj.outcome == layout.Outcome.CORRECT
  is_neg_NO = traj.outcome == layout.Outcome.WRONG
  calls = resample.count_calls(traj.tool_status)

  def err_ratio(is_counted_NO):
    return metrics.ratio(
      calls.n_failed_NO * is_counted_NO, calls.n_judged_NO * is_counted_NO
    )

  is_live_group_N = jnp.any(is_live_NO, axis=-1)
  per_group = lambda is_NO: metrics.mean(jnp.sum(is_NO, axis=-1))
  return {
    "roc/pos_kept": per_group(keep_NO & is_pos_NO),
    "roc/neg_kept": per_group(keep_NO & is_neg_NO),
    "roc/groups_dropped": metrics.mean(~is_live_group_N),
    "roc/err_ratio_pos_before": err_ratio(is_pos_NO),
    "roc/err_ratio_pos_after": err_ratio(is_pos_NO & keep_NO),
    "roc/err_ratio_neg_before": err_ratio(is_neg_NO),
    "roc/err_ratio_neg_after": err_ratio(is_neg_NO & keep_NO),
    "roc/no_tool_share": metrics.mean(
      calls.n_judged_NO == 0, is_pos_NO & keep_NO
    ),
  }
