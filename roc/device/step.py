"""The losses of a batch, and the state that an update changes.

`learner.Learner` turns a loss into an update. The two losses, `sft_loss` and
`grpo_loss`, are sums of weight * per-token loss whose weights were fixed on the
whole batch beforehand, so splitting the rows into microbatches or over devices
does not change what is optimised.
"""

import dataclasses
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


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """The policy-gradient loss."""

  # The surrogate. Clip widths: gspo about 3e-4 and 4e-4 (with the normaliser
  # "sequence"), cispo about 1 and 4.
  kind: Literal["clip", "gspo", "cispo"] = "clip"
  eps_low: float = 0.2  # lower clip bound: 1 - eps_low
  eps_high: float = 0.28  # upper clip bound: 1 + eps_high
  dual_clip: float = 0.0  # bound for negative advantages, above 1; 0: off
  # What a token is divided by: the tokens of its prompt's group, all tokens of
  # the batch, those of its rollout, or a constant length.
  normaliser: Literal["prompt", "token", "sequence", "dr_grpo"] = "prompt"
  scale_by_std: bool = True  # divide advantages by the group's deviation
  ddof: int = 1  # of that deviation
  kl_coef: float = 0.0  # weight of the divergence from the first policy
  entropy_coef: float = 0.0  # weight of the entropy bonus
  # Weight by trainer over sampler probability; needs old_logprobs=recompute.
  correction: Literal["none", "tis", "icepop", "sequence", "geometric"] = "none"
  correction_low: float = 0.5  # ratios under it are dropped
  correction_high: float = 2.0  # ratios over it are dropped, or cut by tis
  # Old log-probs: as sampled, or computed again by the train step.
  old_logprobs: Literal["sampler", "recompute"] = "sampler"
  logprob_chunk: int = 1024  # tokens whose logits exist at one time


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
  `kl_coef` is not 0.
  """
  c = config
  surrogate = {
    "clip": lambda *a: losses.clipped_surrogate(
      *a,
      eps_low=c.eps_low,
      eps_high=c.eps_high,
      dual_clip=c.dual_clip or None,
    ),
    "gspo": lambda *a: losses.gspo(*a, eps_low=c.eps_low, eps_high=c.eps_high),
    "cispo": lambda *a: losses.cispo(
      *a, eps_low=c.eps_low, eps_high=c.eps_high
    ),
  }[c.kind]

  def loss_fn(params, batch):
    logp_BT, entropy_BT = score(
      policy, params, batch, chunk=c.logprob_chunk, temperature=temperature
    )
    is_model_BT = batch["roles_BT"] == layout.Role.MODEL
    logp_old_BT = batch["logp_old_BT"]
    logp_sampler_BT = batch["logp_sampler_BT"]
    loss_BT, stats = surrogate(
      logp_BT, logp_old_BT, batch["advantage_B"], is_model_BT
    )
    weight_BT = batch["weight_BT"]
    if c.correction != "none":
      weight_BT *= _correction(c, logp_old_BT, logp_sampler_BT, is_model_BT)
    kl_BT = None
    if c.kl_coef:
      kl_BT = losses.kl_k3(logp_BT, batch["logp_ref_BT"], is_model_BT)
      stats["kl"] = metrics.mean(kl_BT, is_model_BT)
    loss_BT = losses.with_regularizers(
      loss_BT,
      is_model_BT,
      kl_BT=kl_BT,
      kl_coef=c.kl_coef,
      entropy_BT=entropy_BT,
      entropy_coef=c.entropy_coef,
    )
    loss = jnp.sum(weight_BT * loss_BT)
    stats |= {
      "loss": metrics.Mean(loss, jnp.sum(batch["weight_BT"])),
      "entropy": metrics.mean(entropy_BT, is_model_BT),
      "mismatch_kl": corrections.mismatch_kl(
        logp_BT, logp_sampler_BT, is_model_BT
      ),
    }
    return loss, stats

  return loss_fn


def _correction(
  c: LossConfig,
  logp_old_BT: jax.Array,
  logp_sampler_BT: jax.Array,
  is_model_BT: jax.Array,
) -> jax.Array:
  """Weights for sampling under other numerics than those trained."""
  args = (logp_old_BT, logp_sampler_BT, is_model_BT)
  bounds = {"low": c.correction_low, "high": c.correction_high}
  if c.correction == "tis":
    return corrections.token_tis(*args, cap=c.correction_high)
  if c.correction == "icepop":
    return corrections.icepop(*args, **bounds)
  if c.correction == "sequence":
    return corrections.sequence_mask(*args, **bounds)
  return corrections.geometric_mask(*args, **bounds)
