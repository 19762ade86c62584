"""The losses of a batch, and the state that an update changes.

`learner.Learner` turns a loss into an update. The two losses, `sft_loss` and
`grpo_loss`, are sums of weight * per-token loss whose weights were fixed on the
whole batch beforehand, so splitting the rows into microbatches or over devices
does not change what is optimised.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from roc import layout
from roc.core import corrections, logprobs, losses, metrics
from roc.device import model as model_lib

Metrics = dict[str, metrics.Mean]
Batch = dict[str, jax.Array]
LossFn = Callable[[model_lib.Params, Batch], tuple[jax.Array, Metrics]]


SURROGATES: dict[str, Callable] = {
  "clip": losses.clipped_surrogate,
  "gspo": losses.gspo,
  "cispo": losses.cispo,
}
CORRECTIONS: dict[str, Callable] = {
  "tis": corrections.token_tis,
  "icepop": corrections.icepop,
  "sequence": corrections.sequence_mask,
  "geometric": corrections.geometric_mask,
}


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """The policy-gradient loss."""

  # The surrogate; gspo goes with the normaliser "sequence".
  kind: Literal["clip", "gspo", "cispo"] = "clip"
  # Lower clip bound: 1 - eps_low; None: the surrogate's own width.
  eps_low: float | None = None
  # Upper clip bound: 1 + eps_high; None: the surrogate's own width.
  eps_high: float | None = None
  dual_clip: float = 0.0  # bound for negative advantages, above 1; 0: off
  # What a token is divided by: the tokens of its prompt's group, all tokens of
  # the batch, those of its rollout, or a constant length.
  normaliser: Literal["prompt", "token", "sequence", "dr_grpo"] = "prompt"
  scale_by_std: bool = True  # divide advantages by the group's deviation
  ddof: int = 1  # of that deviation
  kl_coef: float = 0.0  # weight of the divergence from the first policy
  entropy_coef: float = 0.0  # weight of the entropy bonus
  # Weight of the surrogate by trainer over sampler probability; needs
  # old_logprobs=recompute.
  correction: Literal["none", "tis", "icepop", "sequence", "geometric"] = "none"
  # Ratios under it are dropped, tis has no such bound; None: the correction's.
  correction_low: float | None = None
  # Ratios over it are dropped, or cut by tis; None: the correction's own.
  correction_high: float | None = None
  # Old log-probs: as sampled, or computed again by the train step.
  old_logprobs: Literal["sampler", "recompute"] = "sampler"
  logprob_chunk: int = 1024  # tokens whose logits exist at one time


def with_own_bounds(config: LossConfig) -> LossConfig:
  """Bounds that are None become those of the chosen surrogate and correction.

  They are the defaults of the functions in `roc.core`, which give their source.
  A bound that the choice does not have stays None.
  """
  own = {}
  for function, names in (
    (SURROGATES[config.kind], {"eps_low": "eps_low", "eps_high": "eps_high"}),
    (
      CORRECTIONS.get(config.correction),
      {"low": "correction_low", "high": "correction_high"},
    ),
  ):
    stated = inspect.signature(function).parameters if function else {}
    for name, setting in names.items():
      if name in stated and getattr(config, setting) is None:
        own[setting] = stated[name].default
  return dataclasses.replace(config, **own)


@dataclasses.dataclass(frozen=True)
class TrainState:
  """What an update changes; also a tree of shapes or shardings of it."""

  params: Any  # what is trained: model_lib.Params, or adapters alone
  opt_state: Any
  step: Any  # int32 [], updates made
  base: Any = None  # uint32 [2], of what is frozen (`lora.fingerprint`)


jax.tree_util.register_dataclass(
  TrainState,
  data_fields=["params", "opt_state", "step", "base"],
  meta_fields=[],
)


def score(
  policy: model_lib.Policy,
  params: model_lib.Params,
  batch: Batch,
  *,
  chunk: int,
  temperature: float,
) -> tuple[jax.Array, jax.Array]:
  """Log-prob and entropy of every token given those before it.

  Returns:
    logp_BT and entropy_BT, float32; column 0, which nothing predicts, is 0.
  """
  tokens_BT = batch["tokens_BT"]
  hidden_BTD = policy.hidden(
    params, tokens_BT, batch.get("position_BT"), batch.get("segment_BT")
  )
  logp_BT, entropy_BT = logprobs.token_logprobs(
    hidden_BTD[:, :-1],
    policy.unembedding(params),
    tokens_BT[:, 1:],
    chunk=chunk,
    temperature=temperature or 1.0,
    n_ids=policy.n_ids,
    dtype=policy.dtype,
  )
  first = ((0, 0), (1, 0))
  return jnp.pad(logp_BT, first), jnp.pad(entropy_BT, first)


def sft_loss(policy: model_lib.Policy, chunk: int) -> LossFn:
  """Cross-entropy of the model's own tokens.

  The batch holds tokens_BT, roles_BT, segment_BT, position_BT and weight_BT
  (`sft_weights`).
  """

  def loss_fn(params, batch):
    logp_BT, entropy_BT = score(
      policy, params, batch, chunk=chunk, temperature=1.0
    )
    is_model_BT = batch["roles_BT"] == layout.Role.MODEL
    logp_BT = jnp.where(is_model_BT, logp_BT, 0.0)
    return -jnp.sum(batch["weight_BT"] * logp_BT), {
      "loss": metrics.mean(-logp_BT, is_model_BT),
      "entropy": metrics.mean(entropy_BT, is_model_BT),
    }

  return loss_fn


def sft_weights(roles_BT: jax.Array) -> jax.Array:
  """1 / (model tokens in the batch) on each of them, 0 elsewhere."""
  is_model_BT = roles_BT == layout.Role.MODEL
  return is_model_BT / jnp.maximum(jnp.sum(is_model_BT), 1)


def grpo_loss(
  policy: model_lib.Policy, config: LossConfig, temperature: float
) -> LossFn:
  """The surrogate of `config.kind` on kept rollouts.

  The batch holds tokens_BT, roles_BT, logp_sampler_BT, logp_old_BT,
  advantage_B and weight_BT (`losses.token_weights`), and logp_ref_BT where
  `kl_coef` is not 0. A row without weight adds exactly 0 to the loss, to its
  gradient and to the metrics, whatever it holds.
  """
  c = with_own_bounds(config)
  bounds = {"eps_low": c.eps_low, "eps_high": c.eps_high}
  if c.kind == "clip":
    bounds["dual_clip"] = c.dual_clip or None
  surrogate = functools.partial(SURROGATES[c.kind], **bounds)

  def loss_fn(params, batch):
    weight_BT = batch["weight_BT"]
    is_live_BT = (batch["roles_BT"] == layout.Role.MODEL) & (weight_BT > 0)
    logp_BT, entropy_BT = score(
      policy,
      params,
      _without_dead_tokens(batch, is_live_BT),
      chunk=c.logprob_chunk,
      temperature=temperature,
    )
    logp_old_BT = batch["logp_old_BT"]
    logp_sampler_BT = batch["logp_sampler_BT"]
    loss_BT, stats = surrogate(
      logp_BT, logp_old_BT, batch["advantage_B"], is_live_BT
    )
    if c.correction != "none":
      correction_BT = _correction(c, logp_old_BT, logp_sampler_BT, is_live_BT)
      stats |= correction_stats(correction_BT, is_live_BT)
      loss_BT *= correction_BT
    kl_BT = None
    if c.kl_coef:
      kl_BT = losses.kl_k3(logp_BT, batch["logp_ref_BT"], is_live_BT)
      stats["kl"] = metrics.mean(kl_BT, is_live_BT)
    loss_BT = losses.with_regularizers(
      loss_BT,
      is_live_BT,
      kl_BT=kl_BT,
      kl_coef=c.kl_coef,
      entropy_BT=entropy_BT,
      entropy_coef=c.entropy_coef,
    )
    loss = jnp.sum(weight_BT * loss_BT)
    stats |= {
      "loss": metrics.Mean(loss, jnp.sum(weight_BT)),
      "entropy": metrics.mean(entropy_BT, is_live_BT),
      "mismatch_kl": corrections.mismatch_kl(
        logp_BT, logp_sampler_BT, is_live_BT
      ),
    }
    return loss, stats

  return loss_fn


def _without_dead_tokens(batch: Batch, is_live_BT: jax.Array) -> Batch:
  """Rows that carry no loss become padding before the model reads them.

  A rollout whose logits are not finite would make them so again here, and then
  a weight of 0 does not help: the backward pass multiplies it by NaN.
  """
  is_live_B1 = jnp.any(is_live_BT, axis=-1, keepdims=True)
  return batch | {"tokens_BT": jnp.where(is_live_B1, batch["tokens_BT"], 0)}


def _correction(
  c: LossConfig,
  logp_old_BT: jax.Array,
  logp_sampler_BT: jax.Array,
  is_live_BT: jax.Array,
) -> jax.Array:
  """Weights for sampling under other numerics than those trained."""
  bounds = {"low": c.correction_low, "high": c.correction_high}
  if c.correction == "tis":
    del bounds["low"]
  return CORRECTIONS[c.correction](
    logp_old_BT, logp_sampler_BT, is_live_BT, **bounds
  )


def correction_stats(
  correction_BT: jax.Array, is_live_BT: jax.Array
) -> Metrics:
  """The mean weight, and the shares of tokens and whole rows that it drops."""
  is_dropped_BT = is_live_BT & (correction_BT == 0)
  is_live_B = jnp.any(is_live_BT, axis=-1)
  is_dropped_B = is_live_B & jnp.all(is_dropped_BT == is_live_BT, axis=-1)
  return {
    "correction/weight": metrics.mean(correction_BT, is_live_BT),
    "correction/tokens_dropped": metrics.mean(is_dropped_BT, is_live_BT),
    "correction/rows_dropped": metrics.mean(is_dropped_B, is_live_B),
  }
