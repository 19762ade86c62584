"""Policy losses per token, and the weights that turn them into one number.

A loss here is an array over tokens and reduces nothing. What a token counts is
decided once, on the whole batch (`token_weights`), so that the sum of
weight * loss over microbatches and hosts is exactly that of the batch. All
losses take log-probs, never a model; a token that the policy did not sample has
loss 0 and gradient 0 whatever its log-probs hold. Where they are passed the
tokens of rows with weight alone, the same holds for all other rows. Log ratios
are cut off at +-`logprobs.LOG_RATIO_BOUND`, so no ratio overflows.
"""

import jax
import jax.numpy as jnp

from roc.core import logprobs, masks, metrics, shapes

Stats = dict[str, metrics.Mean]

WEIGHT_KINDS = ("prompt", "token", "sequence", "dr_grpo")


def _clipped(
  ratio_BT: jax.Array,
  adv_B: jax.Array,
  is_model_BT: jax.Array,
  low: float,
  high: float,
  dual_clip: float | None = None,
) -> tuple[jax.Array, Stats]:
  """-min(r A, clip(r, low, high) A), and shares of clipped tokens by side.

  The minimum is written as a choice between ratio and bound, so that a clipped
  token has gradient 0 exactly, however far its ratio is.
  """
  adv_B1 = _constant_B1(adv_B)
  is_low_BT, is_high_BT = _sides(ratio_BT, adv_B1, low, high)
  used_BT = jnp.where(is_low_BT, low, jnp.where(is_high_BT, high, ratio_BT))
  stats = _ratio_stats(ratio_BT, is_low_BT, is_high_BT, is_model_BT)
  if dual_clip is not None:
    is_dual_BT = (ratio_BT > dual_clip) & (adv_B1 < 0)
    used_BT = jnp.where(is_dual_BT, dual_clip, used_BT)
    stats["clip_ratio/dual"] = metrics.mean(is_dual_BT, is_model_BT)
  return jnp.where(is_model_BT, -used_BT * adv_B1, 0.0), stats


def _constant_B1(adv_B) -> jax.Array:
  return jax.lax.stop_gradient(adv_B.astype(jnp.float32))[:, None]


def _sides(ratio_BT, adv_B1, low, high) -> tuple[jax.Array, jax.Array]:
  """Where clipping removes the gradient, at the lower and the upper bound."""
  return (ratio_BT < low) & (adv_B1 < 0), (ratio_BT > high) & (adv_B1 > 0)


def _ratio_stats(ratio_BT, is_low_BT, is_high_BT, is_model_BT) -> Stats:
  return {
    "ratio": metrics.mean(ratio_BT, is_model_BT),
    "clip_ratio/low": metrics.mean(is_low_BT, is_model_BT),
    "clip_ratio/high": metrics.mean(is_high_BT, is_model_BT),
    "clip_ratio/region": metrics.mean(is_low_BT | is_high_BT, is_model_BT),
  }


@shapes.checked
def clipped_surrogate(
  logp_new_BT: jax.Array,
  logp_old_BT: jax.Array,
  adv_B: jax.Array,
  is_model_BT: jax.Array,
  *,
  eps_low: float = 0.2,
  eps_high: float = 0.28,
  dual_clip: float | None = None,
) -> tuple[jax.Array, Stats]:
  """-min(r A, clip(r, 1 - eps_low, 1 + eps_high) A), r = new / old per token.

  PPO's clipped surrogate (arXiv 1707.06347, Eq. 7) with separate bounds
  (Clip-Higher, DAPO, arXiv 2503.14476; the values of GRPO-RoC, arXiv
  2508.20722). `dual_clip` = c > 1 also bounds the loss by -c A where A < 0
  (arXiv 1912.09729, Eq. 5). With new == old the gradient is that of
  REINFORCE with the advantage as its return.

  Args:
    logp_new_BT: float [B, T], differentiated.
    logp_old_BT: float [B, T], of the policy that sampled; constant.
    adv_B: float [B], one advantage per rollout.
    is_model_BT: bool [B, T].
    eps_low: lower width of the trust region.
    eps_high: upper width of the trust region.
    dual_clip: c, or None for no second clip.

  Returns:
    (loss_BT, stats): float32 [B, T], 0 off MODEL tokens; `metrics.Mean` of
    ratio and of the shares of clipped tokens.

  Raises:
    ValueError: dual_clip is not above 1.
  """
  if dual_clip is not None and not dual_clip > 1:
    raise ValueError(f"dual_clip is {dual_clip}; it must be above 1, or None.")
  ratio_BT = jnp.exp(logprobs.log_ratio(logp_new_BT, logp_old_BT, is_model_BT))
  low, high = 1.0 - eps_low, 1.0 + eps_high
  return _clipped(ratio_BT, adv_B, is_model_BT, low, high, dual_clip)


@shapes.checked
def gspo(
  logp_new_BT: jax.Array,
  logp_old_BT: jax.Array,
  adv_B: jax.Array,
  is_model_BT: jax.Array,
  *,
  eps_low: float = 3e-4,
  eps_high: float = 4e-4,
) -> tuple[jax.Array, Stats]:
  """The clipped surrogate with one ratio per sequence.

  GSPO (arXiv 2507.18071): s = exp(mean over tokens of log(new / old)), clipped
  as a whole (Eq. 5 to 7). Written per token as in its Eq. 13 and 14, where the
  value is s and the gradient flows through the token: weighted by "sequence"
  weights the sum is exactly the sequence objective.

  Args:
    logp_new_BT: float [B, T], differentiated.
    logp_old_BT: float [B, T], of the policy that sampled; constant.
    adv_B: float [B], one advantage per rollout.
    is_model_BT: bool [B, T].
    eps_low: lower width; widths are those of a geometric mean, hence tiny.
    eps_high: upper width.

  Returns:
    (loss_BT, stats) as `clipped_surrogate`; a row without MODEL tokens has
    ratio 1 and loss 0.
  """
  log_ratio_BT = logprobs.log_ratio(logp_new_BT, logp_old_BT, is_model_BT)
  mean_B1 = masks.masked_mean(log_ratio_BT, is_model_BT, -1).value[:, None]
  # The sequence's value with the token's gradient: x - sg(x) is 0.
  log_s_BT = (
    jax.lax.stop_gradient(mean_B1)
    + log_ratio_BT
    - jax.lax.stop_gradient(log_ratio_BT)
  )
  low, high = 1.0 - eps_low, 1.0 + eps_high
  return _clipped(jnp.exp(log_s_BT), adv_B, is_model_BT, low, high)


@shapes.checked
def cispo(
  logp_new_BT: jax.Array,
  logp_old_BT: jax.Array,
  adv_B: jax.Array,
  is_model_BT: jax.Array,
  *,
  eps_low: float = 1.0,
  eps_high: float = 4.0,
) -> tuple[jax.Array, Stats]:
  """-sg(clip(r, 1 - eps_low, 1 + eps_high)) A log(new), r = new / old.

  CISPO (MiniMax-M1, arXiv 2506.13585, Eq. 4 and 5): clips the importance weight
  instead of the update, so every token keeps a gradient. eps_low = 1 means no
  lower bound, as there; the cap of 5 is that of ScaleRL (arXiv 2510.13786).

  Args:
    logp_new_BT: float [B, T], differentiated.
    logp_old_BT: float [B, T], of the policy that sampled; constant.
    adv_B: float [B], one advantage per rollout.
    is_model_BT: bool [B, T].
    eps_low: lower width of the weight.
    eps_high: upper width of the weight.

  Returns:
    (loss_BT, stats) as `clipped_surrogate`; here "clip_ratio/*" are shares of
    tokens with a clipped weight on the side where it would matter for PPO.
  """
  log_ratio_BT = logprobs.log_ratio(logp_new_BT, logp_old_BT, is_model_BT)
  ratio_BT = jax.lax.stop_gradient(jnp.exp(log_ratio_BT))
  low, high = 1.0 - eps_low, 1.0 + eps_high
  adv_B1 = _constant_B1(adv_B)
  logp_BT = jnp.where(is_model_BT, logp_new_BT.astype(jnp.float32), 0.0)
  loss_BT = -jnp.clip(ratio_BT, low, high) * adv_B1 * logp_BT
  sides = _sides(ratio_BT, adv_B1, low, high)
  stats = _ratio_stats(ratio_BT, *sides, is_model_BT)
  return jnp.where(is_model_BT, loss_BT, 0.0), stats


@shapes.checked
def token_weights(
  is_model_NGT: jax.Array,
  kind: str,
  *,
  is_kept_NG: jax.Array,
  max_length: int | None = None,
) -> jax.Array:
  """What each token counts; computed once, on the whole batch.

  loss = sum(weight * loss_per_token). A row that is kept but has no advantage
  still counts in the denominators; leave it out of `is_kept_NG` to change that.

  Kinds:
    "prompt": mean over the tokens of a prompt's kept rollouts, then mean over
      the prompts that have any (GRPO-RoC, arXiv 2508.20722, Eq. 6).
    "token": mean over all tokens (DAPO, arXiv 2503.14476, Eq. 8).
    "sequence": mean over the tokens of a rollout, then mean over rollouts
      (GRPO, arXiv 2402.03300, Eq. 3; the one in which GSPO is exact).
    "dr_grpo": sum over tokens / max_length, then mean over rollouts
      (arXiv 2503.20783), free of length bias.

  Args:
    is_model_NGT: bool [N, G, T].
    kind: one of `WEIGHT_KINDS`.
    is_kept_NG: bool [N, G], rows that may carry loss.
    max_length: the constant of "dr_grpo": the budget in tokens.

  Returns:
    weight_NGT, float32 [N, G, T]: 0 off MODEL tokens and for rows not kept,
    all 0 where nothing is left. All kinds but "dr_grpo" sum to 1.

  Raises:
    ValueError: unknown kind, or "dr_grpo" without a positive max_length.
  """
  if kind not in WEIGHT_KINDS:
    raise ValueError(
      f"Unknown normaliser {kind!r}: choose one of {WEIGHT_KINDS}."
    )
  counts_NGT = is_model_NGT & is_kept_NG[:, :, None]
  n_NG = jnp.sum(counts_NGT, axis=-1, dtype=jnp.float32)
  n_rows = jnp.sum(n_NG > 0, dtype=jnp.float32)
  if kind == "token":
    den_NG = jnp.broadcast_to(jnp.sum(n_NG), n_NG.shape)
  elif kind == "sequence":
    den_NG = n_NG * n_rows
  elif kind == "prompt":
    n_N1 = jnp.sum(n_NG, axis=-1, keepdims=True)
    n_live = jnp.sum(n_N1 > 0, dtype=jnp.float32)
    den_NG = jnp.broadcast_to(n_N1 * n_live, n_NG.shape)
  else:
    if max_length is None or max_length <= 0:
      raise ValueError(
        f"Normaliser 'dr_grpo' needs a positive max_length, not {max_length}."
      )
    den_NG = jnp.broadcast_to(n_rows * max_length, n_NG.shape)
  weight_NG1 = (1.0 / jnp.maximum(den_NG, 1.0))[:, :, None]
  return jnp.where(counts_NGT, weight_NG1, 0.0)


@shapes.checked
def kl_k1(
  logp_new_BT: jax.Array, logp_ref_BT: jax.Array, is_model_BT: jax.Array
) -> jax.Array:
  """log(new / ref): unbiased for KL(new || ref), of high variance.

  The estimators k1, k2 and k3 are Schulman's ("Approximating KL divergence",
  2020). As a *loss* term k1 has a gradient of expectation zero; it is for
  metrics and for penalties inside the reward.

  Args:
    logp_new_BT: float [B, T].
    logp_ref_BT: float [B, T], constant.
    is_model_BT: bool [B, T].

  Returns:
    float32 [B, T], 0 off MODEL tokens.
  """
  return logprobs.log_ratio(logp_new_BT, logp_ref_BT, is_model_BT)


@shapes.checked
def kl_k2(
  logp_new_BT: jax.Array, logp_ref_BT: jax.Array, is_model_BT: jax.Array
) -> jax.Array:
  """log(new / ref)^2 / 2: biased, low variance; its gradient is KL's.

  Args:
    logp_new_BT: float [B, T].
    logp_ref_BT: float [B, T], constant.
    is_model_BT: bool [B, T].

  Returns:
    float32 [B, T], 0 off MODEL tokens.
  """
  return 0.5 * jnp.square(
    logprobs.log_ratio(logp_new_BT, logp_ref_BT, is_model_BT)
  )


@shapes.checked
def kl_k3(
  logp_new_BT: jax.Array, logp_ref_BT: jax.Array, is_model_BT: jax.Array
) -> jax.Array:
  """ref / new - 1 - log(ref / new): unbiased, never negative (GRPO's).

  Args:
    logp_new_BT: float [B, T].
    logp_ref_BT: float [B, T], constant.
    is_model_BT: bool [B, T].

  Returns:
    float32 [B, T], 0 off MODEL tokens.
  """
  log_ratio_BT = -logprobs.log_ratio(logp_new_BT, logp_ref_BT, is_model_BT)
  return jnp.expm1(log_ratio_BT) - log_ratio_BT


@shapes.checked
def with_regularizers(
  loss_BT: jax.Array,
  is_model_BT: jax.Array,
  *,
  kl_BT: jax.Array | None = None,
  kl_coef: float = 0.0,
  entropy_BT: jax.Array | None = None,
  entropy_coef: float = 0.0,
) -> jax.Array:
  """loss + kl_coef * kl - entropy_coef * entropy, per token.

  Both coefficients are 0 in GRPO-RoC (arXiv 2508.20722, section on training); a
  term with coefficient 0 is not computed at all.

  Args:
    loss_BT: float [B, T], from a policy loss.
    is_model_BT: bool [B, T].
    kl_BT: float [B, T], from `kl_k2` or `kl_k3`.
    kl_coef: weight of the KL term.
    entropy_BT: float [B, T], from `logprobs.token_logprobs`.
    entropy_coef: weight of the entropy bonus.

  Returns:
    float32 [B, T], 0 off MODEL tokens.

  Raises:
    ValueError: a coefficient is not 0 and its array is missing.
  """
  for name, array, coef in (
    ("kl", kl_BT, kl_coef),
    ("entropy", entropy_BT, entropy_coef),
  ):
    if coef and array is None:
      raise ValueError(f"{name}_coef is {coef} but {name}_BT was not passed.")
  if kl_coef and kl_BT is not None:
    loss_BT = loss_BT + kl_coef * jnp.where(is_model_BT, kl_BT, 0.0)
  if entropy_coef and entropy_BT is not None:
    bonus_BT = jnp.where(is_model_BT, entropy_BT, 0.0)
    loss_BT = loss_BT - entropy_coef * bonus_BT
  return loss_BT
