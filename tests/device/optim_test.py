"""The schedule's curve and what one step of the optimizer does."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from roc import config
from roc.device import optim


def settings(**changes):
  base = config.TrainConfig(steps=20, lr=0.1, warmup=4, schedule="constant")
  return dataclasses.replace(base, **changes)


def curve(c, n=25):
  schedule = optim.learning_rate(c)
  return np.array([float(schedule(i)) for i in range(n)])


def test_warm_up_then_constant():
  rates = curve(settings())
  np.testing.assert_allclose(rates[:4], [0.025, 0.05, 0.075, 0.1], rtol=1e-6)
  np.testing.assert_allclose(rates[4:], 0.1, rtol=1e-6)


def test_warm_up_then_cosine():
  rates = curve(settings(schedule="cosine"))
  np.testing.assert_allclose(rates[:4], [0.025, 0.05, 0.075, 0.1], rtol=1e-6)
  want = [0.05 * (1 + math.cos(math.pi * i / 16)) for i in range(17)]
  np.testing.assert_allclose(rates[4:21], want, atol=1e-7)
  # Half-way down in the middle; never below zero after the end.
  assert rates[12] == pytest.approx(0.05)
  np.testing.assert_allclose(rates[20:], 0.0, atol=1e-8)
  assert rates[19] > 0  # the last step is trained too


def test_no_warm_up():
  assert curve(settings(warmup=0))[0] == pytest.approx(0.1)


def test_the_first_update_already_moves():
  params = {"w": jnp.array([1.0, -2.0])}
  optimizer = optim.make_optimizer(settings(grad_clip=0.0))
  updates, _ = optimizer.update(
    {"w": jnp.array([3.0, -0.5])}, optimizer.init(params), params
  )
  # Adam's first step is the sign of the gradient; the learner multiplies it by
  # the learning rate, which is not 0.
  np.testing.assert_allclose(updates["w"], [-1.0, 1.0], rtol=1e-5)
  assert curve(settings())[0] == pytest.approx(0.025)


def test_weight_decay_is_decoupled():
  params = {"w": jnp.array([1.0, -2.0])}
  optimizer = optim.make_optimizer(settings(weight_decay=0.5))
  updates, _ = optimizer.update(
    {"w": jnp.zeros(2)}, optimizer.init(params), params
  )
  np.testing.assert_allclose(updates["w"], [-0.5, 1.0], rtol=1e-5)


@pytest.mark.parametrize(("clip", "scale"), [(1.0, 0.2), (10.0, 1.0), (0.0, 1)])
def test_gradients_are_clipped_by_their_global_norm(clip, scale):
  grads = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
  optimizer = optim.make_optimizer(settings(grad_clip=clip))
  state = optimizer.init(grads)
  _, state = optimizer.update(grads, state, grads)
  (mu,) = [
    s.mu for s in _flatten(state) if isinstance(s, optax.ScaleByAdamState)
  ]
  np.testing.assert_allclose(
    [mu["a"][0], mu["b"][0]], np.array([0.3, 0.4]) * scale, rtol=1e-5
  )


def _flatten(state):
  if isinstance(state, tuple) and not hasattr(state, "_fields"):
    for part in state:
      yield from _flatten(part)
  else:
    yield state
