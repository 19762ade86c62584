"""From token roles to booleans, and sums over where a boolean holds.

Every helper that divides returns the denominator too: a mean alone cannot be
added up over microbatches or hosts.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from roc import layout
from roc.core import shapes


@shapes.checked
def is_model(roles: jax.Array) -> jax.Array:
  """Where the policy itself sampled the token: the only tokens with loss.

  Args:
    roles: int [..., T], `layout.Role`.

  Returns:
    bool [..., T].
  """
  return roles == layout.Role.MODEL


@shapes.checked
def is_valid(roles: jax.Array) -> jax.Array:
  """Where there is a token at all, padding excluded.

  Args:
    roles: int [..., T], `layout.Role`.

  Returns:
    bool [..., T].
  """
  return roles != layout.Role.PAD


@shapes.checked
def is_prompt(roles: jax.Array) -> jax.Array:
  """Where the token belongs to the prompt, before anything was sampled.

  Args:
    roles: int [..., T], `layout.Role`.

  Returns:
    bool [..., T].
  """
  return roles == layout.Role.PROMPT


@shapes.checked
def is_observation(roles: jax.Array) -> jax.Array:
  """Where the environment spoke: tool output and the tags around it.

  Args:
    roles: int [..., T], `layout.Role`.

  Returns:
    bool [..., T].
  """
  return (roles == layout.Role.TOOL) | (roles == layout.Role.TEMPLATE)


class Masked(NamedTuple):
  """A reduction over the True entries together with how many there were."""

  value: jax.Array
  n: jax.Array  # float32, the number of True entries


@shapes.checked
def masked_sum(x: jax.Array, where: jax.Array, axis=None) -> Masked:
  """Sum of x where a boolean holds, and the count of such entries.

  NaN or infinity at False entries reaches neither the sum nor its gradient.

  Args:
    x: float array.
    where: bool array of the same shape.
    axis: as in `jnp.sum`.

  Returns:
    `Masked` (value float32, n float32); (0, 0) where nothing is True.
  """
  kept = jnp.where(where, x.astype(jnp.float32), 0.0)
  return Masked(
    jnp.sum(kept, axis=axis), jnp.sum(where, axis=axis, dtype=jnp.float32)
  )


@shapes.checked
def masked_mean(x: jax.Array, where: jax.Array, axis=None) -> Masked:
  """Mean of x where a boolean holds, and its denominator.

  Args:
    x: float array.
    where: bool array of the same shape.
    axis: as in `jnp.mean`.

  Returns:
    `Masked` (value float32, n float32); the mean of nothing is 0, with n = 0
    and gradient 0.
  """
  total, n = masked_sum(x, where, axis)
  return Masked(total / jnp.maximum(n, 1.0), n)
