"""The jitted update: gradients over microbatches, optimizer, metrics.

What is trained is the policy's parameters, or adapters beside a frozen base
(`lora`): then gradients, optimizer and checkpoints hold adapters alone, and the
learner keeps the base. On a single device it keeps it as the rollout engine
wants it, so that both read the same arrays.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from roc.core import metrics
from roc.device import lora, sharding
from roc.device import model as model_lib
from roc.device import step as step_lib

Batch = step_lib.Batch
TrainState = step_lib.TrainState

# Metrics of an update that left the state as it was: no row had a weight; loss,
# gradient or new parameters were not finite.
SKIPPED = "updates_skipped"
NOT_FINITE = "updates_not_finite"


class Learner:
  """`update` for one loss on one mesh."""

  def __init__(
    self,
    policy: model_lib.Policy,
    optimizer: optax.GradientTransformation,
    loss_fn: step_lib.LossFn,
    mesh: jax.sharding.Mesh,
    *,
    n_microbatches: int = 1,
  ):
    self.policy = policy
    self.mesh = mesh
    self._optimizer = optimizer
    self._loss_fn = loss_fn
    self._n_microbatches = n_microbatches
    self._has_base = bool(policy.lora.rank)
    self._shares_base = mesh.size == 1 and policy.dtype == jnp.dtype(
      policy.lora.base_dtype
    )
    self._abstract = jax.eval_shape(self._fresh, jax.random.key(0))
    whole = sharding.replicated(mesh)
    self.shardings = TrainState(
      sharding.param_shardings(mesh, self._abstract.params),
      sharding.state_shardings(mesh, self._abstract.opt_state),
      whole,
      whole if self._has_base else None,
    )
    # Empty where all parameters are trained.
    self._base: model_lib.Params = {}
    self.rows = sharding.batch_sharding(mesh)  # where a batch lies
    self._init_adapters = jax.jit(policy.init_adapters)
    self._init_opt = jax.jit(
      optimizer.init, out_shardings=self.shardings.opt_state
    )
    self._all = sharding.param_shardings(mesh, policy.abstract_params)
    self._seal = functools.partial(lora.sealed, config=policy.lora)
    self._freeze = jax.jit(self._seal, out_shardings=(self._all, whole))
    self.abstract_base = self._abstract_base()
    # Of state, base, batch and learning rate.
    self.jitted = jax.jit(
      self._update_fn,
      in_shardings=(
        self.shardings,
        jax.tree.map(lambda x: x.sharding, self.abstract_base),
        self.rows,
        whole,
      ),
      out_shardings=(self.shardings, whole),
      donate_argnums=0,
    )

  def init(self, key: jax.Array) -> TrainState:
    """Fresh parameters and optimizer, created where they are to lie."""
    params = jax.jit(self.policy.init, out_shardings=self._all)(key)
    return self.start_from(params, key)

  def start_from(
    self,
    params: model_lib.Params,
    key: jax.Array | None = None,
    opt_state: Any = None,
  ) -> TrainState:
    """Given parameters, step 0.

    Args:
      params: see `take`; given up, since the first update may donate them.
      key: likewise.
      opt_state: of the optimizer, laid out as `abstract_state` says; fresh by
        default.
    """
    trained, seal_2 = self.take(params, key)
    if opt_state is None:
      opt_state = self._init_opt(trained)
    step = jax.device_put(jnp.int32(0), self.shardings.step)
    return TrainState(trained, opt_state, step, seal_2)

  def take(
    self, params: model_lib.Params, key: jax.Array | None = None
  ) -> tuple[Any, jax.Array | None]:
    """What is trained of given parameters; the rest is kept as the base.

    Args:
      params: all of them; a base is taken from them, and adapters if they are
        there (`lora.join`).
      key: for adapters where they are not.

    Returns:
      Parameters or adapters where `TrainState` has them, and the fingerprint
      of the base, if there is one.
    """
    if not self._has_base:
      return jax.device_put(params, self.shardings.params), None
    base, adapters = lora.split(params)
    self._base, seal_2 = self._freeze(base)
    del params, base  # room for the next copy, if the caller has none
    if self._shares_base:
      self._base = self.policy.hold(self._base)
    if not adapters["layers"]:
      adapters = self._init_adapters(jax.random.key(0) if key is None else key)
    return jax.device_put(adapters, self.shardings.params), seal_2

  def params(self, trained: Any) -> model_lib.Params:
    """All parameters, from those of a `TrainState`; no array is copied."""
    return self._joined(trained, self._base)

  def update(
    self, state: TrainState, batch: Batch, rate: float | np.ndarray = 1.0
  ) -> tuple[TrainState, step_lib.Metrics]:
    """One step of the optimizer.

    Nothing changes, moments and counts included, where no row has a weight or
    where loss, gradient or new parameters are not finite; the metrics `SKIPPED`
    and `NOT_FINITE` say so.

    Args:
      state: before it; donated.
      batch: rows of the loss.
      rate: learning rate, by which the optimizer's update is multiplied.

    Raises:
      RuntimeError: there is no base yet.
    """
    if self._has_base and not self._base:
      raise RuntimeError("start_from comes before update")
    return self.jitted(state, self._base, batch, np.asarray(rate, np.float32))

  @property
  def abstract_state(self) -> TrainState:
    """Shapes, dtypes and shardings, for restoring a checkpoint."""
    return _placed(self._abstract, self.shardings)

  def place(self, batch: dict[str, Any]) -> Batch:
    """Host rows onto the mesh."""
    return jax.device_put(batch, self.rows)

  # ------------------------------------------------------------------ inside

  def _fresh_trained(self, key):
    if self._has_base:
      return self.policy.init_adapters(key)
    return self.policy.init(key)

  def _fresh(self, key):
    trained = self._fresh_trained(key)
    seal_2 = jnp.zeros(2, jnp.uint32) if self._has_base else None
    opt_state = self._optimizer.init(trained)
    return TrainState(trained, opt_state, jnp.int32(0), seal_2)

  def _abstract_base(self) -> model_lib.Params:
    """Shapes, dtypes and shardings of the base."""
    if not self._has_base:
      return {}
    base, _ = jax.eval_shape(self._seal, self.policy.abstract_params)
    if self._shares_base:
      base = jax.eval_shape(self.policy.fuse, base)
      whole = sharding.replicated(self.mesh)
      return _placed(base, jax.tree.map(lambda _: whole, base))
    return _placed(base, self._all)

  def _joined(self, trained, base):
    return self.policy.join(base, trained) if self._has_base else trained

  def _update_fn(
    self,
    state: TrainState,
    base: model_lib.Params,
    batch: Batch,
    rate: jax.Array,
  ):
    grad_fn = jax.value_and_grad(
      lambda trained, batch: self._loss_fn(self._joined(trained, base), batch),
      has_aux=True,
    )
    M = self._n_microbatches
    if M == 1:
      (loss, stats), grads = grad_fn(state.params, batch)
    else:
      parts = split_rows(batch, M)

      def add_one(total, part):
        return jax.tree.map(jnp.add, total, grad_fn(state.params, part)), None

      zeros = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype),
        jax.eval_shape(
          grad_fn, state.params, jax.tree.map(lambda x: x[0], parts)
        ),
      )
      ((loss, stats), grads), _ = jax.lax.scan(add_one, zeros, parts)
    norm = optax.tree.norm(grads)
    is_finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    # Computed twice, so that new and old parameters are never both there: here
    # each new one is reduced at once, and below it takes the place of the old.
    is_finite = jax.lax.cond(
      is_finite,
      lambda: _all_finite(self._stepped(state, grads, rate).params),
      lambda: is_finite,
    )
    has_rows = jnp.any(batch["weight_BT"] != 0)
    state = jax.lax.cond(
      is_finite & has_rows,
      lambda: self._stepped(state, grads, rate),
      lambda: state,
    )
    stats["grad_norm"] = metrics.Mean(norm, jnp.float32(1))
    stats[SKIPPED] = metrics.mean(~has_rows)
    stats[NOT_FINITE] = metrics.mean(~is_finite)
    return state, stats

  def _stepped(self, state: TrainState, grads: Any, rate: jax.Array):
    updates, opt_state = self._optimizer.update(
      grads, state.opt_state, state.params
    )
    updates = jax.tree.map(lambda u: rate * u, updates)
    params = optax.apply_updates(state.params, updates)
    return TrainState(params, opt_state, state.step + 1, state.base)


def split_rows(batch: Batch, n_parts: int) -> Batch:
  """[B, ...] as [n_parts, B / n_parts, ...].

  Row b goes to part b % n_parts, so each part holds rows of every device.
  """
  return jax.tree.map(
    lambda x: jnp.swapaxes(x.reshape(-1, n_parts, *x.shape[1:]), 0, 1), batch
  )


def join_rows(parts: Any) -> Any:
  """What `split_rows` split, in the order that it had."""
  return jax.tree.map(
    lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), parts
  )


def _all_finite(tree: Any) -> jax.Array:
  return jnp.all(
    jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)])
  )


def _placed(tree: Any, shardings: Any) -> Any:
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    tree,
    shardings,
  )
