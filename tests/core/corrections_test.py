"""Off-policy weights by hand, constant, and measured without bias."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from roc.core import corrections, metrics

RATIO = np.array([[0.25, 1.0, 3.0, 9.0, 7.0], [1.0, 1.0, 1.0005, 1.0, 7.0]])
SAMPLER = jnp.full((2, 5), -1.0)
TRAINER = SAMPLER + jnp.log(jnp.array(RATIO, jnp.float32))
IS_MODEL = jnp.array([[True, True, True, True, False]] * 2)
EVERY = (
  corrections.token_tis,
  corrections.icepop,
  corrections.sequence_mask,
  corrections.geometric_mask,
)


@pytest.mark.parametrize(
  ("function", "kwargs", "expected"),
  [
    (
      corrections.token_tis,
      {},
      [[0.25, 1, 2, 2, 0], [1, 1, 1.0005, 1, 0]],
    ),
    (
      corrections.icepop,
      {},
      [[0, 1, 3, 0, 0], [1, 1, 1.0005, 1, 0]],
    ),
    # Products: 0.25 * 1 * 3 * 9 = 6.75 and 1.0005.
    (
      corrections.sequence_mask,
      {},
      [[0] * 5, [1.0005] * 4 + [0]],
    ),
    (
      corrections.sequence_mask,
      {"high": 7.0},
      [[6.75] * 4 + [0], [1.0005] * 4 + [0]],
    ),
    (
      corrections.sequence_mask,
      {"high": 7.0, "low": 2.0, "reweight": False},
      [[1] * 4 + [0], [0] * 5],
    ),
    # Geometric means: 6.75 ** 0.25 = 1.61 and 1.000125.
    (corrections.geometric_mask, {}, [[0] * 5, [1] * 4 + [0]]),
    (
      corrections.geometric_mask,
      {"low": 1.5, "high": 2.0},
      [[1] * 4 + [0], [0] * 5],
    ),
  ],
)
def test_weights_by_hand(function, kwargs, expected):
  weight = function(TRAINER, SAMPLER, IS_MODEL, **kwargs)
  assert weight.dtype == jnp.float32
  np.testing.assert_allclose(weight, expected, rtol=1e-5)


@pytest.mark.parametrize("function", EVERY)
def test_equal_policies_weigh_one(function):
  weight = function(SAMPLER, SAMPLER, IS_MODEL)
  np.testing.assert_array_equal(weight, IS_MODEL)


@pytest.mark.parametrize("function", EVERY)
@pytest.mark.parametrize("far", [1e6, np.inf])
def test_weights_are_constant_and_finite_for_the_farthest_ratios(function, far):
  trainer = TRAINER.at[0, 0].set(far).at[:, 4].set(jnp.nan)

  def total(trainer):
    return jnp.sum(function(trainer, SAMPLER, IS_MODEL))

  value, grad = jax.value_and_grad(total)(trainer)
  assert np.isfinite(value)
  np.testing.assert_array_equal(grad, 0.0)


@pytest.mark.parametrize("function", EVERY)
def test_a_row_without_model_tokens_weighs_nothing(function):
  weight = function(TRAINER, SAMPLER, jnp.zeros((2, 5), bool))
  np.testing.assert_array_equal(weight, 0.0)


@pytest.mark.parametrize("function", EVERY)
def test_jit_equals_eager(function):
  np.testing.assert_allclose(
    jax.jit(function)(TRAINER, SAMPLER, IS_MODEL),
    function(TRAINER, SAMPLER, IS_MODEL),
    rtol=1e-6,
  )


def test_mismatch_by_hand_and_never_negative():
  kl = corrections.mismatch_kl(TRAINER, SAMPLER, IS_MODEL)
  ratio = RATIO[:, :4]
  expected = (ratio - 1 - np.log(ratio)).mean()
  np.testing.assert_allclose(
    metrics.finalize({"kl": kl})["kl"], expected, rtol=1e-5
  )
  same = corrections.mismatch_kl(SAMPLER, SAMPLER, IS_MODEL)
  assert (float(same.num), float(same.den)) == (0.0, 8.0)


def test_mismatch_estimates_the_divergence_of_sampler_from_trainer():
  sampler, trainer = np.array([0.5, 0.3, 0.2]), np.array([0.4, 0.35, 0.25])
  # Tokens exactly as often as the sampler would draw them.
  tokens = np.repeat([[0, 1, 2]], [5, 3, 2], axis=1)
  kl = corrections.mismatch_kl(
    jnp.array(np.log(trainer)[tokens], jnp.float32),
    jnp.array(np.log(sampler)[tokens], jnp.float32),
    jnp.ones(tokens.shape, bool),
  )
  true_kl = (sampler * np.log(sampler / trainer)).sum()
  np.testing.assert_allclose(
    metrics.finalize({"kl": kl})["kl"], true_kl, rtol=1e-4
  )


@pytest.mark.parametrize("far", [89.0, 1e6, -1e6, np.inf, -np.inf])
def test_mismatch_of_the_farthest_policies_is_finite(far):
  kl = corrections.mismatch_kl(SAMPLER + far, SAMPLER, IS_MODEL)
  assert np.isfinite(kl.num) and float(kl.num) > 0


def test_mismatch_resolves_the_last_bits():
  # exp(x) - 1 - x in float32 would be lost below 1e-4.
  trainer = SAMPLER + 2.0**-12
  kl = corrections.mismatch_kl(trainer, SAMPLER, IS_MODEL)
  np.testing.assert_allclose(
    metrics.finalize({"kl": kl})["kl"], 2.0**-25, rtol=0.1
  )
