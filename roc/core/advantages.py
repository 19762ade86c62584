"""Advantages relative to the group, over the rollouts that were kept.

The baseline is that of the rows which enter the update: after resampling, the
mean of all drawn rollouts would no longer centre the gradient.
"""

import jax
import jax.numpy as jnp

from roc.core import shapes


@shapes.checked
def group_advantages(
  reward_NO: jax.Array,
  keep_NO: jax.Array,
  *,
  scale_by_std: bool = True,
  ddof: int = 1,
  eps: float = 1e-6,
) -> jax.Array:
  """(reward - mean) / (std + eps) over the kept rollouts of each group.

  GRPO-RoC (arXiv 2508.20722, Eq. 7) with the details of its released code:
  ddof = 1 and eps = 1e-6 added to the standard deviation. `jnp.std` would take
  ddof = 0. Without the division it is Dr. GRPO's (arXiv 2503.20783).

  Args:
    reward_NO: float [N, O]; entries that are not kept may hold anything.
    keep_NO: bool [N, O], e.g. from `resample.resample`.
    scale_by_std: whether to divide by the standard deviation.
    ddof: the standard deviation divides by (number kept - ddof).
    eps: added to the standard deviation.

  Returns:
    float32 [N, O]; 0 for rows that are not kept and, exactly, for groups whose
    kept rewards are all equal or fewer than two.

  Raises:
    ValueError: ddof is neither 0 nor 1.
  """
  if ddof not in (0, 1):
    raise ValueError(f"group_advantages: ddof is {ddof}; it must be 0 or 1.")
  reward_NO = jnp.where(keep_NO, reward_NO.astype(jnp.float32), 0.0)
  n_N1 = jnp.sum(keep_NO, axis=-1, keepdims=True, dtype=jnp.float32)
  mean_N1 = jnp.sum(reward_NO, -1, keepdims=True) / jnp.maximum(n_N1, 1.0)
  centred_NO = jnp.where(keep_NO, reward_NO - mean_N1, 0.0)
  # Equal rewards such as 0.1 do not average to themselves in floats, and the
  # division by a tiny std would blow the rest up to order one.
  top_N1 = jnp.max(jnp.where(keep_NO, reward_NO, -jnp.inf), -1, keepdims=True)
  low_N1 = jnp.min(jnp.where(keep_NO, reward_NO, jnp.inf), -1, keepdims=True)
  has_spread_N1 = top_N1 > low_N1
  if scale_by_std:
    sum_sq_N1 = jnp.sum(jnp.square(centred_NO), -1, keepdims=True)
    std_N1 = jnp.sqrt(sum_sq_N1 / jnp.maximum(n_N1 - ddof, 1.0))
    centred_NO = centred_NO / (std_N1 + eps)
  return jnp.where(keep_NO & has_spread_N1, centred_NO, 0.0)
