"""Rotary position embeddings, plain and stretched."""

import math

import jax
import jax.numpy as jnp


def frequencies(head_dim: int, theta: float) -> jax.Array:
  """Radians a position, of each half pair: float32 [head_dim / 2]."""
  half = head_dim // 2
  return theta ** (-jnp.arange(half, dtype=jnp.float32) / half)


def stretch(
  frequency_E: jax.Array,
  factor: float,
  low_freq_factor: float,
  high_freq_factor: float,
  original_length: int,
) -> jax.Array:
  """Frequencies for longer texts than a model was pretrained with (Llama 3.1).

  Those that turn fewer than `low_freq_factor` times within the original length
  are divided by the factor, those that turn more than `high_freq_factor` times
  stay, and in between one goes over into the other (`rope_type: llama3` in
  transformers).
  """
  turns_E = original_length * frequency_E / (2 * jnp.pi)
  span = high_freq_factor - low_freq_factor
  keep_E = jnp.clip((turns_E - low_freq_factor) / span, 0.0, 1.0)
  return frequency_E * (keep_E + (1 - keep_E) / factor)


def yarn(
  frequency_E: jax.Array,
  theta: float,
  factor: float,
  original_length: int,
  beta_fast: float,
  beta_slow: float,
) -> jax.Array:
  """Frequencies for longer texts as YaRN has them (arXiv 2309.00071, §3.2).

  Half pairs that turn more than `beta_fast` times within the original length
  stay, those that turn fewer than `beta_slow` times are divided by the factor,
  and in between one goes over into the other, linearly in their index, its
  bounds rounded outwards (`rope_type: yarn` in transformers).
  """
  half = len(frequency_E)

  def index(turns: float) -> float:
    """Of the half pair that turns so often, counted in fractions."""
    ratio = original_length / (turns * 2 * math.pi)
    return half * math.log(ratio) / math.log(theta)

  low = max(math.floor(index(beta_fast)), 0)
  high = min(math.ceil(index(beta_slow)), 2 * half - 1)
  span = high - low or 0.001
  i_E = jnp.arange(half, dtype=jnp.float32)
  divide_E = jnp.clip((i_E - low) / span, 0.0, 1.0)
  return frequency_E * (1 - divide_E) + frequency_E / factor * divide_E


class Rotation:
  """Rotary position embedding, halves rotated (RoFormer, arXiv 2104.09864).

  The angles are the same in every layer, so they are computed once.
  """

  def __init__(
    self, position_BT: jax.Array, frequency_E: jax.Array, scale: float = 1.0
  ):
    """Takes positions, and radians a position of each half pair.

    Args:
      position_BT: of the tokens.
      frequency_E: see `frequencies`.
      scale: that queries and keys are multiplied by as they are turned.
    """
    angle_BT1E = (
      position_BT[..., None, None].astype(jnp.float32)
      * frequency_E[None, None, None]
    )
    self._cos_BT1E, self._sin_BT1E = jnp.cos(angle_BT1E), jnp.sin(angle_BT1E)
    if scale != 1.0:
      self._cos_BT1E, self._sin_BT1E = (
        self._cos_BT1E * scale,
        self._sin_BT1E * scale,
      )

  def __call__(self, x_BTHE: jax.Array) -> jax.Array:
    """Turns queries or keys by the angle of their position."""
    a, b = jnp.split(x_BTHE, 2, axis=-1)
    cos, sin = self._cos_BT1E, self._sin_BT1E
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
