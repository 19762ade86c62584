"""(numerator, denominator) pairs add exactly over any split."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from roc.core import metrics


def test_mean_by_hand():
  m = metrics.mean(
    jnp.array([1.0, 5.0, jnp.nan]), jnp.array([True, True, False])
  )
  assert (float(m.num), float(m.den)) == (6.0, 2.0)
  assert metrics.finalize({"x": m}) == {"x": 3.0}


def test_booleans_count():
  m = metrics.mean(jnp.array([True, False, True, True]))
  assert metrics.finalize({"share": m}) == {"share": 0.75}


def test_parts_add_exactly_to_the_whole():
  rng = np.random.default_rng(0)
  x = rng.integers(0, 1000, 60).astype(np.float32)
  where = rng.integers(0, 2, 60).astype(bool)
  # Unequal parts, one of them without a single True entry.
  where[:7] = False
  whole = metrics.mean(jnp.array(x), jnp.array(where))
  parts = {"m": metrics.Mean(jnp.zeros(()), jnp.zeros(()))}
  for part in (slice(0, 7), slice(7, 18), slice(18, 60)):
    new = {"m": metrics.mean(jnp.array(x[part]), jnp.array(where[part]))}
    parts = metrics.add(parts, new)
  assert float(parts["m"].num) == float(whole.num)
  assert float(parts["m"].den) == float(whole.den)
  assert (
    metrics.finalize(parts)["m"] == np.float64(x[where].sum()) / where.sum()
  )


def test_devices_add_exactly():
  mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
  rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
  x = jnp.arange(64.0)
  one = metrics.mean(x, x % 3 == 0)
  spread = jax.device_put(x, rows)
  eight = jax.jit(lambda x: metrics.mean(x, x % 3 == 0))(spread)
  assert metrics.finalize({"a": one}) == metrics.finalize({"a": eight})


def test_what_was_not_measured_is_left_out_and_nan_stays():
  empty = metrics.mean(jnp.ones(3), jnp.zeros(3, bool))
  broken = metrics.mean(jnp.array([jnp.nan]))
  result = metrics.finalize({"empty": empty, "broken": broken})
  assert list(result) == ["broken"]
  assert math.isnan(result["broken"])


def test_ratio_of_totals():
  m = metrics.ratio(jnp.array([[1, 2], [0, 0]]), jnp.array([[4, 4], [2, 2]]))
  assert metrics.finalize({"r": m}) == {"r": 0.25}


def test_no_gradient():
  grad = jax.grad(lambda x: metrics.mean(x).num + metrics.ratio(x, x).den)
  np.testing.assert_array_equal(grad(jnp.ones(3)), 0.0)
