"""The jitted update: gradients over microbatches, optimizer, metrics.

A `Learner` turns a loss function into `update(state, batch)` on a mesh. The two
losses, `sft_loss` and `grpo_loss`, are sums of weight * per-token loss whose
weights were fixed on the whole batch beforehand, so splitting the rows into
microbatches or over devices does not change what is optimised.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from roc import layout
from roc.core import corrections, logprobs, losses, metrics
from roc.device import model as model_lib
from roc.device import sharding

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

  params: Any  # model_lib.Params
  opt_state: Any
  step: Any  # int32 [], updates made


jax.tree_util.register_dataclass(
  TrainState, data_fields=["params", "opt_state", "step"], meta_fields=[]
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


class Learner:
  """`update` and `score` for one loss on one mesh; holds no arrays."""

  def __init__(
    self,
    policy: model_lib.Policy,
    optimizer: optax.GradientTransformation,
    loss_fn: LossFn,
    mesh: jax.sharding.Mesh,
    *,
    n_microbatches: int = 1,
  ):
    self.policy = policy
    self.mesh = mesh
    self._optimizer = optimizer
    self._loss_fn = loss_fn
    self._n_microbatches = n_microbatches
    self._abstract = jax.eval_shape(self._fresh, jax.random.key(0))
    self.shardings = TrainState(
      sharding.param_shardings(mesh, self._abstract.params),
      sharding.state_shardings(mesh, self._abstract.opt_state),
      sharding.replicated(mesh),
    )
    self._rows = sharding.batch_sharding(mesh)
    self._init = jax.jit(self._fresh, out_shardings=self.shardings)
    self._init_opt = jax.jit(self._with_params, out_shardings=self.shardings)
    self.update = jax.jit(
      self._update_fn,
      in_shardings=(self.shardings, self._rows),
      out_shardings=(self.shardings, sharding.replicated(mesh)),
      donate_argnums=0,
    )

  def init(self, key: jax.Array) -> TrainState:
    """Fresh parameters and optimizer, created where they are to lie."""
    return self._init(key)

  def start_from(self, params: model_lib.Params) -> TrainState:
    """Given parameters, fresh optimizer, step 0."""
    params = jax.device_put(params, self.shardings.params)
    return self._init_opt(params)

  @property
  def abstract_state(self) -> TrainState:
    """Shapes, dtypes and shardings, for restoring a checkpoint."""
    return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      self._abstract,
      self.shardings,
    )

  def place(self, batch: dict[str, Any]) -> Batch:
    """Host rows onto the mesh."""
    return jax.device_put(batch, self._rows)

  def _fresh(self, key):
    return self._with_params(self.policy.init(key))

  def _with_params(self, params):
    return TrainState(params, self._optimizer.init(params), jnp.int32(0))

  def _update_fn(self, state: TrainState, batch: Batch):
    grad_fn = jax.grad(self._loss_fn, has_aux=True)
    M = self._n_microbatches
    if M == 1:
      grads, stats = grad_fn(state.params, batch)
    else:
      # Row b goes to microbatch b % M, so each holds rows of every device.
      parts = jax.tree.map(
        lambda x: jnp.swapaxes(x.reshape(-1, M, *x.shape[1:]), 0, 1), batch
      )

      def add_one(total, part):
        return jax.tree.map(jnp.add, total, grad_fn(state.params, part)), None

      zeros = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype),
        jax.eval_shape(
          grad_fn, state.params, jax.tree.map(lambda x: x[0], parts)
        ),
      )
      (grads, stats), _ = jax.lax.scan(add_one, zeros, parts)
    updates, opt_state = self._optimizer.update(
      grads, state.opt_state, state.params
    )
    params = optax.apply_updates(state.params, updates)
    stats["grad_norm"] = metrics.Mean(optax.tree.norm(grads), jnp.float32(1))
    return TrainState(params, opt_state, state.step + 1), stats
