"""Where numbers are rounded, that nothing else is, and what gradients see."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from roc.core import products

BF16 = jnp.bfloat16


def draw(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def np_rounded(x):
  return x.astype(ml_dtypes.bfloat16).astype(np.float64)


@pytest.mark.parametrize("is_jitted", [False, True])
def test_rounding_is_to_the_nearest(is_jitted):
  x = draw(1000) * 10.0 ** np.arange(-5, 5).repeat(100)
  x = np.append(x, [0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8]).astype(np.float32)
  run = lambda x: products.rounded(x, BF16)
  got = (jax.jit(run) if is_jitted else run)(x)
  assert got.dtype == BF16
  np.testing.assert_array_equal(
    np.asarray(got).view(np.uint16),
    x.astype(ml_dtypes.bfloat16).view(np.uint16),
  )


def test_rounding_there_and_back_is_not_left_out():
  x = draw(64)
  got = jax.jit(lambda x: products.through(x, BF16) * 3.0)(x)
  np.testing.assert_array_equal(got, np_rounded(x).astype(np.float32) * 3)
  assert np.any(np.asarray(got) != x * 3)
  # Straight through: the gradient of the cube at the rounded number.
  g = jax.jit(jax.grad(lambda x: jnp.sum(products.through(x, BF16) ** 3)))(x)
  np.testing.assert_allclose(g, 3 * np_rounded(x) ** 2, rtol=1e-6)


def worst(want, n_terms, size):
  """How far a float32 sum may be off, in whatever order it is added up.

  Each of n products passes through at most n roundings of 2^-24: it is off by
  at most n 2^-24 / (1 - n 2^-24) of the sum of the products' sizes (Higham,
  Accuracy and Stability of Numerical Algorithms, section 3.1).
  """
  unit = n_terms * 2.0**-24
  return unit / (1 - unit) * size + 2.0**-24 * np.abs(want)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_product_rounds_its_operands_only(dtype):
  """Against float64, as near as float32 sums come on any processor."""
  x, y, g = draw(3, 5, 300), draw(300, 7, seed=1), draw(3, 5, 7, seed=2)
  exact = lambda x: x.astype(np.float64)
  low, other = exact, np_rounded
  if dtype == "bfloat16":
    low, other = other, low
  run = lambda x, y: products.product("btd,df->btf", dtype, x, y)
  out, pull = jax.vjp(jax.jit(run), x, y)
  assert out.dtype == jnp.float32
  g_x, g_y = pull(jnp.asarray(g))
  for got, subscripts, a, b, n_terms in (
    (out, "btd,df->btf", x, y, 300),
    (g_x, "btf,df->btd", g, y, 7),
    (g_y, "btd,btf->df", x, g, 3 * 5),
  ):
    times = lambda of, s=subscripts, a=a, b=b: np.einsum(s, of(a), of(b))
    bound = worst(times(low), n_terms, times(lambda x: np.abs(low(x))))
    assert np.all(np.abs(got - times(low)) <= bound)
    # Operands rounded otherwise, or a result in bfloat16, would be seen.
    assert np.mean(np.abs(times(other) - times(low)) > bound) > 0.5
    in_bf16 = np_rounded(times(low).astype(np.float32))
    assert np.mean(np.abs(in_bf16 - times(low)) > bound) > 0.5


def test_gradients_have_their_operands_dtype():
  x, y = jnp.asarray(draw(2, 3), BF16), draw(3, 4)
  loss = lambda x, y: products.product("bd,df->bf", BF16, x, y).sum()
  g_x, g_y = jax.grad(loss, argnums=(0, 1))(x, y)
  assert (g_x.dtype, g_y.dtype) == (BF16, jnp.float32)


def test_rounded_softmax_does_not_depend_on_what_was_taken_off():
  """Over half of a row first, and over all of it."""
  logits = draw(50, 64) * 4
  weights = lambda x, top: np.asarray(
    products.rounded(jnp.exp(x - top), BF16), np.float64
  )

  def both(top_of):
    half = top_of(logits[:, :32].max(-1, keepdims=True))
    whole = top_of(logits.max(-1, keepdims=True))
    scale = np.exp(np.asarray(half, np.float64) - whole)
    return weights(logits[:, :32], half) * scale, weights(logits[:, :32], whole)

  in_parts, at_once = both(lambda x: np.asarray(products.top(x, BF16)))
  # But for numbers that lie on the border between two, none is rounded twice.
  assert np.mean(np.abs(in_parts / at_once - 1) > 1e-5) < 2e-3
  in_parts, at_once = both(lambda x: x)
  assert np.mean(np.abs(in_parts / at_once - 1) > 1e-5) > 0.2


def test_what_is_taken_off_is_the_largest_or_little_more():
  largest = np.append(draw(200) * 30, [0.0, -1e30, np.log(2) * 5])
  largest = largest.astype(np.float32)
  np.testing.assert_array_equal(products.top(largest, jnp.float32), largest)
  top = np.asarray(products.top(largest, BF16))
  assert np.all(top >= largest)
  # Nothing overflows where all is masked.
  usual = largest > -1e29
  assert np.all((top - largest)[usual] < np.log(2) + 1e-4)
