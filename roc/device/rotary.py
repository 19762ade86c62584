"""Rotary position embeddings, plain and stretched."""

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


class Rotation:
  """Rotary position embedding, halves rotated (RoFormer, arXiv 2104.09864).

  The angles are the same in every layer, so they are computed once.
  """

  def __init__(self, position_BT: jax.Array, frequency_E: jax.Array):
    """Takes positions, and radians a position of each half pair."""
    angle_BT1E = (
      position_BT[..., None, None].astype(jnp.float32)
      * frequency_E[None, None, None]
    )
    self._cos_BT1E, self._sin_BT1E = jnp.cos(angle_BT1E), jnp.sin(angle_BT1E)

  def __call__(self, x_BTHE: jax.Array) -> jax.Array:
    """Turns queries or keys by the angle of their position."""
    a, b = jnp.split(x_BTHE, 2, axis=-1)
    cos, sin = self._cos_BT1E, self._sin_BT1E
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
