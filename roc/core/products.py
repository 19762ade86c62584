"""Matrix products whose operands are rounded and whose sums are not.

Compute in bfloat16 means: the operands of every product are rounded to it, the
products are added up in float32, and what comes out stays float32 until it
enters another product. So numbers are rounded at the same places wherever they
are computed, by the train step on whole rows or by the rollout engine on one
token a row, and the two differ by the order of their sums only, which float32
hides well. Gradients of weights are float32 sums as well.

Rounding is spelt as `reduce_precision`: a cast there and back is an operation
that compilers may leave out.
"""

import functools
import math

import jax
import jax.numpy as jnp

from roc.core import shapes

_LN_2 = math.log(2.0)


def rounded(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
  """An array in a dtype, rounded to it whatever a compiler thinks of that."""
  dtype = jnp.dtype(dtype)
  if x.dtype == dtype or dtype == jnp.float32:
    return x.astype(dtype)
  kind = jnp.finfo(dtype)
  return jax.lax.reduce_precision(x, kind.nexp, kind.nmant).astype(dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def through(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
  """`rounded`, in float32; the gradient passes as if nothing were rounded."""
  return rounded(x, dtype).astype(jnp.float32)


@through.defjvp
def _through_jvp(dtype, primals, tangents):
  return through(primals[0], dtype), tangents[0].astype(jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def product(
  subscripts: str, dtype: jax.typing.DTypeLike, x: jax.Array, y: jax.Array
) -> jax.Array:
  """An einsum of two operands with a float32 result.

  Args:
    subscripts: such as "btd,df->btf"; every letter stands in two of the three.
    dtype: to which the operands are rounded.
    x: float.
    y: float.

  Returns:
    float32. Gradients have their operand's dtype; those that come in are
    rounded as the operands are.
  """
  return einsum(subscripts, dtype, x, y)


def einsum(
  subscripts: str, dtype: jax.typing.DTypeLike, x: jax.Array, y: jax.Array
) -> jax.Array:
  """`product` for those who differentiate it themselves."""
  x_axes, y_axes = subscripts.partition("->")[0].split(",")
  shapes.require_axes(
    f"products.einsum {subscripts}",
    {"x": x, "y": y},
    {"x": x_axes, "y": y_axes},
  )
  f32 = jnp.float32
  x, y = rounded(x, dtype), rounded(y, dtype)
  times = lambda x, y: jnp.einsum(subscripts, x, y, preferred_element_type=f32)
  if jnp.dtype(dtype) == f32:
    return times(x, y)
  # XLA's CPU backend lacks some products of bfloat16 with float32 sums, and
  # computes the others in float32 as well.
  return jax.lax.platform_dependent(
    x,
    y,
    cpu=lambda x, y: times(x.astype(f32), y.astype(f32)),
    default=times,
  )


def _forward(subscripts, dtype, x, y):
  # The first is an activation, smaller when rounded; the second may be a
  # weight, which is there anyway.
  of_x = jnp.zeros((0,), x.dtype)
  return einsum(subscripts, dtype, x, y), (rounded(x, dtype), of_x, y)


def _backward(subscripts, dtype, residuals, g):
  x, of_x, y = residuals
  x_axes, _, rest = subscripts.partition(",")
  y_axes, _, out_axes = rest.partition("->")
  g_x = einsum(f"{out_axes},{y_axes}->{x_axes}", dtype, g, y)
  g_y = einsum(f"{x_axes},{out_axes}->{y_axes}", dtype, x, g)
  return g_x.astype(of_x.dtype), g_y.astype(y.dtype)


product.defvjp(_forward, _backward)


def top(largest: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
  """What to take off logits before `exp`, so that rounding is no matter of it.

  Softmax over parts of a row takes off the largest logit so far, over the whole
  row the largest of all. Where the weights are rounded, the two differ by more
  than a scale unless that scale is a power of two; so the logit is taken up to
  the next multiple of ln 2.
  """
  if jnp.dtype(dtype) == jnp.float32:
    return largest
  return jnp.maximum(largest, jnp.ceil(largest / _LN_2) * _LN_2)
