"""Advantages: the released code's numbers, and exact zeros where due."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from roc.core import advantages

GOLDEN = json.loads(
  (pathlib.Path(__file__).parent / "rstar2_golden.json").read_text()
)["adv_G16"]


@pytest.mark.parametrize("ddof", [0, 1])
def test_golden_sixteen(ddof):
  reward = np.array([[i < p for i in range(16)] for p in range(1, 16)], float)
  adv = advantages.group_advantages(
    jnp.array(reward), jnp.ones((15, 16), bool), ddof=ddof
  )
  for p in range(1, 16):
    positive, negative = GOLDEN[str(p)][f"ddof{ddof}"]
    # Golden numbers are printed to six decimals.
    np.testing.assert_allclose(adv[p - 1, :p], positive, atol=1.1e-6)
    np.testing.assert_allclose(adv[p - 1, p:], negative, atol=1.1e-6)


def test_only_kept_rows_make_the_baseline():
  keep = jnp.array([[True, True, False, True, False, True]])
  reward = jnp.array([[1.0, 0.0, jnp.nan, 0.0, 99.0, 0.0]])
  adv = advantages.group_advantages(reward, keep)
  alone = advantages.group_advantages(
    jnp.array([[1.0, 0.0, 0.0, 0.0]]), jnp.ones((1, 4), bool)
  )
  np.testing.assert_array_equal(adv[0, keep[0]], alone[0])
  np.testing.assert_array_equal(adv[0, ~keep[0]], 0.0)
  np.testing.assert_allclose(adv.sum(), 0.0, atol=1e-6)


@pytest.mark.parametrize("scale_by_std", [True, False])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1])
def test_equal_rewards_give_exactly_zero(value, scale_by_std):
  adv = advantages.group_advantages(
    jnp.full((1, 7), value), jnp.ones((1, 7), bool), scale_by_std=scale_by_std
  )
  np.testing.assert_array_equal(adv, 0.0)


def test_groups_of_none_and_one_give_zero():
  keep = jnp.array([[False, False], [True, False]])
  adv = advantages.group_advantages(jnp.ones((2, 2)), keep)
  np.testing.assert_array_equal(adv, 0.0)


def test_without_std_it_is_reward_minus_mean():
  adv = advantages.group_advantages(
    jnp.array([[1.0, 0.0, 0.0, 0.0]]),
    jnp.ones((1, 4), bool),
    scale_by_std=False,
  )
  np.testing.assert_allclose(adv, [[0.75, -0.25, -0.25, -0.25]])


def test_agrees_with_numpy_and_with_jit():
  rng = np.random.default_rng(0)
  reward = rng.normal(size=(6, 10)).astype(np.float32)
  keep = rng.integers(0, 2, (6, 10)).astype(bool)
  keep[:, :2] = True
  expected = np.zeros((6, 10))
  for n in range(6):
    kept = reward[n, keep[n]].astype(np.float64)
    expected[n, keep[n]] = (kept - kept.mean()) / (kept.std(ddof=1) + 1e-6)
  for f in (advantages.group_advantages, jax.jit(advantages.group_advantages)):
    np.testing.assert_allclose(
      f(jnp.array(reward), jnp.array(keep)), expected, rtol=1e-5, atol=1e-6
    )


def test_refuses_other_ddof():
  with pytest.raises(ValueError, match="ddof is 2"):
    advantages.group_advantages(
      jnp.ones((1, 2)), jnp.ones((1, 2), bool), ddof=2
    )
