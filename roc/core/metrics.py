"""Metrics as (numerator, denominator) pairs, divided only at the very end.

Pairs from microbatches and hosts add to what one big batch would have given,
whatever the sizes of the parts; averages of averages do not.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from roc.core import shapes


class Mean(NamedTuple):
  """A mean that has not been divided yet; a pytree, so it crosses `jit`."""

  num: jax.Array  # float32 []
  den: jax.Array  # float32 []


@shapes.checked
def mean(x: jax.Array, where: jax.Array | None = None) -> Mean:
  """The mean of x over the entries where a boolean holds, undivided.

  Args:
    x: array of any shape; booleans count as 0 and 1.
    where: bool of the same shape; everywhere when left out.

  Returns:
    `Mean` of float32 scalars without gradient; (0, 0) where nothing is True.
  """
  x = jax.lax.stop_gradient(jnp.asarray(x, jnp.float32))
  if where is None:
    where = jnp.ones(x.shape, bool)
  return Mean(
    jnp.sum(jnp.where(where, x, 0.0)), jnp.sum(where, dtype=jnp.float32)
  )


def ratio(num: jax.Array, den: jax.Array) -> Mean:
  """A share of totals, such as failed calls over all calls.

  Args:
    num: array of any shape, summed.
    den: array of any shape, summed.

  Returns:
    `Mean` of float32 scalars without gradient.
  """
  num, den = jnp.asarray(num, jnp.float32), jnp.asarray(den, jnp.float32)
  return Mean(
    jax.lax.stop_gradient(jnp.sum(num)), jax.lax.stop_gradient(jnp.sum(den))
  )


def add(a, b):
  """Adds two equal pytrees of `Mean` pair by pair.

  Args:
    a: pytree of `Mean`.
    b: pytree of the same structure.

  Returns:
    pytree of the same structure.
  """
  return jax.tree.map(jnp.add, a, b)


def finalize(means: Mapping[str, Mean]) -> dict[str, float]:
  """Divides, on the host, once per logged step.

  A metric whose denominator is 0 was not measured and is left out: neither 0
  nor NaN would be true, and NaN is no JSON.

  Args:
    means: `Mean` by name.

  Returns:
    Python floats by name, in the given order; a NaN or infinite numerator stays
    visible as such.
  """
  host = jax.device_get(dict(means))
  return {
    name: float(m.num) / float(m.den) if math.isfinite(m.den) else math.nan
    for name, m in host.items()
    if float(m.den) != 0.0
  }
