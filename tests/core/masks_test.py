"""Role masks and reductions that carry their denominator."""

import jax
import jax.numpy as jnp
import numpy as np

from roc import layout
from roc.core import masks

ROLES = jnp.array([[1, 1, 4, 2, 3, 2, 0]], jnp.int8)


def test_role_masks_by_hand():
  as_ints = lambda x: x[0].astype(int).tolist()
  assert as_ints(masks.is_model(ROLES)) == [0, 0, 0, 1, 0, 1, 0]
  assert as_ints(masks.is_valid(ROLES)) == [1, 1, 1, 1, 1, 1, 0]
  assert as_ints(masks.is_prompt(ROLES)) == [1, 1, 0, 0, 0, 0, 0]
  assert as_ints(masks.is_observation(ROLES)) == [0, 0, 1, 0, 1, 0, 0]


def test_every_role_is_exactly_one_kind():
  roles = jnp.array(list(layout.Role), jnp.int8)
  n_kinds = (
    masks.is_model(roles).astype(int)
    + masks.is_prompt(roles)
    + masks.is_observation(roles)
    + ~masks.is_valid(roles)
  )
  np.testing.assert_array_equal(n_kinds, 1)


def test_sum_and_mean_return_the_denominator():
  x = jnp.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
  where = jnp.array([[True, False, True], [False, False, False]])
  total, n = masks.masked_sum(x, where, axis=-1)
  np.testing.assert_array_equal(total, [4.0, 0.0])
  np.testing.assert_array_equal(n, [2.0, 0.0])
  mean, n = masks.masked_mean(x, where, axis=-1)
  np.testing.assert_array_equal(mean, [2.0, 0.0])
  np.testing.assert_array_equal(n, [2.0, 0.0])


def test_nan_where_false_reaches_neither_value_nor_gradient():
  x = jnp.array([1.0, jnp.nan, jnp.inf])
  where = jnp.array([True, False, False])
  value, grad = jax.value_and_grad(lambda x: masks.masked_mean(x, where).value)(
    x
  )
  assert float(value) == 1.0
  np.testing.assert_array_equal(grad, [1.0, 0.0, 0.0])


def test_bfloat16_is_summed_in_float32():
  x = jnp.ones(1000, jnp.bfloat16)
  total, n = masks.masked_sum(x, jnp.ones(1000, bool))
  assert total.dtype == n.dtype == jnp.float32
  assert float(total) == 1000.0
