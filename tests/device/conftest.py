"""One small policy for all device tests: sharp enough to prefer some tokens."""

import dataclasses

import jax
import pytest

from roc.device import model


def sharpen(params):
  """Larger embeddings, so that logits of fresh weights differ by several."""
  embedding = params["embed"]["embedding"]
  return params | {"embed": {"embedding": embedding * 6.0}}


@pytest.fixture(scope="session")
def model_config():
  return model.ModelConfig(
    vocab_size=40,
    d_model=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    d_ff=48,
  )


@pytest.fixture(scope="session")
def make_policy(model_config):
  def make(**changes):
    return model.Policy(dataclasses.replace(model_config, **changes))

  return make


@pytest.fixture(scope="session")
def policy(make_policy):
  return make_policy()


@pytest.fixture(scope="session")
def params(policy):
  return sharpen(jax.jit(policy.init)(jax.random.key(0)))
