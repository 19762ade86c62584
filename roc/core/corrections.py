"""Weights for tokens whose sampler was not quite the policy being trained.

The engine that sampled and the program that trains may disagree in the last
bits (or more, with a stale or quantised sampler). Each correction looks at
pi_trainer / pi_sampler of the sampled tokens and returns a constant weight per
token, to be multiplied into any loss of `roc.core.losses`. Measure the gap
always (`mismatch_kl`), correct it where it matters.
"""

import jax
import jax.numpy as jnp

from roc.core import logprobs, masks, metrics, shapes


def _log_ratio_BT(logp_trainer_BT, logp_sampler_BT, is_model_BT) -> jax.Array:
  """log(pi_trainer / pi_sampler) without gradient, 0 off MODEL tokens."""
  return jax.lax.stop_gradient(
    logprobs.log_ratio(logp_trainer_BT, logp_sampler_BT, is_model_BT)
  )


@shapes.checked
def token_tis(
  logp_trainer_BT: jax.Array,
  logp_sampler_BT: jax.Array,
  is_model_BT: jax.Array,
  *,
  high: float = 2.0,
) -> jax.Array:
  """Truncated importance sampling per token: min(ratio, high).

  Truncation after Ionides (2008), per token as in "Your Efficient RL Framework
  Secretly Brings You Off-Policy RL Training" (Yao et al., 2025), at 2.

  Args:
    logp_trainer_BT: float [B, T], under the weights being trained.
    logp_sampler_BT: float [B, T], as recorded while sampling.
    is_model_BT: bool [B, T].
    high: largest weight.

  Returns:
    weight_BT, float32 [B, T], constant; 0 off MODEL tokens.
  """
  log_ratio_BT = _log_ratio_BT(logp_trainer_BT, logp_sampler_BT, is_model_BT)
  weight_BT = jnp.minimum(jnp.exp(log_ratio_BT), high)
  return jnp.where(is_model_BT, weight_BT, 0.0)


@shapes.checked
def icepop(
  logp_trainer_BT: jax.Array,
  logp_sampler_BT: jax.Array,
  is_model_BT: jax.Array,
  *,
  low: float = 0.5,
  high: float = 5.0,
) -> jax.Array:
  """The ratio itself inside [low, high], no gradient outside.

  IcePop (Ring-1T technical report, arXiv 2510.18855): double-sided masking of
  single tokens; bounds 0.5 and 5.

  Args:
    logp_trainer_BT: float [B, T], under the weights being trained.
    logp_sampler_BT: float [B, T], as recorded while sampling.
    is_model_BT: bool [B, T].
    low: smallest ratio that is kept.
    high: largest ratio that is kept.

  Returns:
    weight_BT, float32 [B, T], constant; 0 off MODEL tokens.
  """
  log_ratio_BT = _log_ratio_BT(logp_trainer_BT, logp_sampler_BT, is_model_BT)
  ratio_BT = jnp.exp(log_ratio_BT)
  is_close_BT = is_model_BT & (ratio_BT >= low) & (ratio_BT <= high)
  return jnp.where(is_close_BT, ratio_BT, 0.0)


@shapes.checked
def sequence_mask(
  logp_trainer_BT: jax.Array,
  logp_sampler_BT: jax.Array,
  is_model_BT: jax.Array,
  *,
  low: float = 0.0,
  high: float = 3.0,
  reweight: bool = True,
) -> jax.Array:
  """Whole rollouts by the ratio of the whole sequence, none out of bounds.

  Masked importance sampling on sequences ("When Speed Kills Stability", Liu et
  al., 2025): every token of a row is weighted by the product of its ratios, and
  the row is left out where that product is outside [low, high].

  Args:
    logp_trainer_BT: float [B, T], under the weights being trained.
    logp_sampler_BT: float [B, T], as recorded while sampling.
    is_model_BT: bool [B, T].
    low: smallest sequence ratio that is kept.
    high: largest sequence ratio that is kept.
    reweight: whether kept rows are weighted by their ratio, or by 1.

  Returns:
    weight_BT, float32 [B, T], constant; 0 off MODEL tokens.
  """
  log_ratio_BT = _log_ratio_BT(logp_trainer_BT, logp_sampler_BT, is_model_BT)
  total_B1 = jnp.sum(log_ratio_BT, axis=-1, keepdims=True)
  is_close_B1 = (total_B1 >= jnp.log(low)) & (total_B1 <= jnp.log(high))
  # Rows above the bound must not overflow to infinity on their way to 0.
  ratio_B1 = jnp.exp(jnp.where(is_close_B1, total_B1, 0.0))
  weight_B1 = jnp.where(is_close_B1, ratio_B1 if reweight else 1.0, 0.0)
  return jnp.where(is_model_BT, weight_B1, 0.0)


@shapes.checked
def geometric_mask(
  logp_trainer_BT: jax.Array,
  logp_sampler_BT: jax.Array,
  is_model_BT: jax.Array,
  *,
  low: float = 0.999,
  high: float = 1.001,
) -> jax.Array:
  """Whole rollouts by the geometric mean of their token ratios, as 0 or 1.

  The mean removes the growth of a sequence's ratio with its length, so that
  long rollouts are not the first to go; bounds as in the geometric rejection
  presets of verl's rollout correction.

  Args:
    logp_trainer_BT: float [B, T], under the weights being trained.
    logp_sampler_BT: float [B, T], as recorded while sampling.
    is_model_BT: bool [B, T].
    low: smallest geometric mean that is kept.
    high: largest geometric mean that is kept.

  Returns:
    weight_BT, float32 [B, T], constant; 0 off MODEL tokens.
  """
  log_ratio_BT = _log_ratio_BT(logp_trainer_BT, logp_sampler_BT, is_model_BT)
  mean_B = masks.masked_mean(log_ratio_BT, is_model_BT, axis=-1).value
  is_close_B = (mean_B >= jnp.log(low)) & (mean_B <= jnp.log(high))
  return jnp.where(is_model_BT & is_close_B[:, None], 1.0, 0.0)


@shapes.checked
def mismatch_kl(
  logp_trainer_BT: jax.Array,
  logp_sampler_BT: jax.Array,
  is_model_BT: jax.Array,
) -> metrics.Mean:
  """KL(sampler || trainer) per token, estimated from the sampled tokens.

  The k3 estimator (Schulman, 2020): ratio - 1 - log ratio with ratio =
  pi_trainer / pi_sampler; unbiased and never negative.

  Args:
    logp_trainer_BT: float [B, T], under the weights being trained.
    logp_sampler_BT: float [B, T], as recorded while sampling.
    is_model_BT: bool [B, T].

  Returns:
    `metrics.Mean` over MODEL tokens.
  """
  log_ratio_BT = _log_ratio_BT(logp_trainer_BT, logp_sampler_BT, is_model_BT)
  return metrics.mean(jnp.expm1(log_ratio_BT) - log_ratio_BT, is_model_BT)
