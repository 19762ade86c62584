"""The optimizer: AdamW with warm-up, a schedule and a gradient-norm clip."""

from typing import Protocol

import jax.numpy as jnp
import optax


class OptimSettings(Protocol):
  """What `config.TrainConfig` and `config.SftConfig` both hold."""

  @property
  def steps(self) -> int: ...
  @property
  def lr(self) -> float: ...
  @property
  def warmup(self) -> int: ...
  @property
  def schedule(self) -> str: ...
  @property
  def weight_decay(self) -> float: ...
  @property
  def b1(self) -> float: ...
  @property
  def b2(self) -> float: ...
  @property
  def grad_clip(self) -> float: ...


def learning_rate(c: OptimSettings) -> optax.Schedule:
  """Updates made so far to learning rate; the first update already moves."""

  def schedule(count):
    warm = jnp.minimum(1.0, (count + 1) / max(c.warmup, 1))
    if c.schedule == "constant":
      return c.lr * warm
    done = jnp.clip((count - c.warmup) / max(c.steps - c.warmup, 1), 0.0, 1.0)
    return c.lr * warm * 0.5 * (1.0 + jnp.cos(jnp.pi * done))

  return schedule


def make_optimizer(c: OptimSettings) -> optax.GradientTransformation:
  """Clip by global norm, then AdamW (arXiv 1711.05101)."""
  adamw = optax.adamw(
    learning_rate(c), b1=c.b1, b2=c.b2, weight_decay=c.weight_decay
  )
  if not c.grad_clip:
    return adamw
  return optax.chain(optax.clip_by_global_norm(c.grad_clip), adamw)
