"""The optimizer: AdamW with warm-up, a schedule and a gradient-norm clip."""

from typing import Protocol

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
  """Steps of the run before this one to learning rate; the first one moves.

  A linear warm-up to `lr` in step `warmup`, then `lr` for ever or a cosine that
  would reach 0 one step after the last.
  """
  after = optax.constant_schedule(c.lr)
  if c.schedule == "cosine":
    after = optax.cosine_decay_schedule(c.lr, max(c.steps - c.warmup, 1))
  if c.warmup < 2:
    ramp = optax.constant_schedule(c.lr)
  else:
    ramp = optax.linear_schedule(c.lr / c.warmup, c.lr, c.warmup - 1)
  return optax.join_schedules([ramp, after], [c.warmup])


def make_optimizer(c: OptimSettings) -> optax.GradientTransformation:
  """Clip by global norm, then AdamW (arXiv 1711.05101) at learning rate 1.

  `Learner.update` multiplies what it gives by the rate, which belongs to the
  run and not to the optimizer: another run may go on with its state.
  """
  adamw = optax.adamw(1.0, b1=c.b1, b2=c.b2, weight_decay=c.weight_decay)
  if not c.grad_clip:
    return adamw
  return optax.chain(optax.clip_by_global_norm(c.grad_clip), adamw)
