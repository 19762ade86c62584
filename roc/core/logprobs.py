"""Token log-probs and entropy straight from hidden states, in chunks.

The logits of a batch, [B, T, V] in float32, are by far its largest array: 10 GB
at B * T = 16k and V = 152k. Here they exist for one chunk of tokens at a time,
in the forward pass and again in the backward pass, which recomputes them. Only
the log of the normaliser and the entropy are kept in between, one number each
per token.
"""

import functools
from typing import Literal, NamedTuple, overload

import jax
import jax.numpy as jnp

from roc.core import products, shapes

_NO_SHARE = -1e30

# Log ratios of two policies are cut off here before anything is done with
# them: e^20 = 5e8 is far beyond every clipping bound and far from overflow.
# The bound of verl (`negative_approx_kl` in verl/trainer/ppo/core_algos.py).
LOG_RATIO_BOUND = 20.0


@overload
def token_logprobs(
  hidden_BTD: jax.Array,
  unembed_DV: jax.Array,
  target_BT: jax.Array,
  *,
  chunk: int = ...,
  temperature: float = ...,
  n_ids: int = ...,
  dtype: jax.typing.DTypeLike | None = ...,
  with_entropy: Literal[True] = ...,
) -> tuple[jax.Array, jax.Array]: ...


@overload
def token_logprobs(
  hidden_BTD: jax.Array,
  unembed_DV: jax.Array,
  target_BT: jax.Array,
  *,
  chunk: int = ...,
  temperature: float = ...,
  n_ids: int = ...,
  dtype: jax.typing.DTypeLike | None = ...,
  with_entropy: bool,
) -> tuple[jax.Array, jax.Array | None]: ...


@shapes.checked
def token_logprobs(
  hidden_BTD,
  unembed_DV,
  target_BT,
  *,
  chunk=1024,
  temperature=1.0,
  n_ids=0,
  dtype=None,
  with_entropy=True,
):
  """log softmax(hidden @ unembed / temperature) at the targets, and entropy.

  d logp / d logits = onehot - p and d H / d logits = -p (log p + H), so the
  backward pass needs p alone, rebuilt chunk by chunk from the saved normaliser.
  A chunk holds all rows B and a slice of T: an axis B that is sharded over
  devices stays evenly sharded in every chunk.

  Args:
    hidden_BTD: float [B, T, D], final hidden states; position t predicts
      target t, so the caller shifts by one.
    unembed_DV: float [D, V]; for a tied head the transposed embedding.
    target_BT: int [B, T]. Positions without a target may hold any valid id and
      be masked afterwards.
    chunk: tokens per chunk, over all rows and devices together; at least one
      position of every row is taken.
    temperature: divides the logits: the sampler's, so that these log-probs are
      those of the distribution that was sampled from.
    n_ids: ids from here on have no share in the distribution, see `mask_ids`;
      0: all V have.
    dtype: of the products' operands; None: as they are.
    with_entropy: whether to compute the entropy as well.

  Returns:
    (logp_BT, entropy_BT), float32 [B, T], differentiable in hidden and unembed;
    entropy is None without `with_entropy`. Products are accumulated in float32
    whatever the operands' dtype, gradients of the unembedding too.

  Raises:
    ValueError: chunk or temperature is not positive.
  """
  if chunk < 1:
    raise ValueError(f"token_logprobs: chunk is {chunk}; it must be positive.")
  if not temperature > 0:
    raise ValueError(
      f"token_logprobs: temperature is {temperature}; it must be positive."
    )
  n_rows, n_tokens = target_BT.shape
  width = min(max(1, chunk // max(n_rows, 1)), max(n_tokens, 1))
  n_pad = -n_tokens % width
  hidden_BTD = jnp.pad(hidden_BTD, ((0, 0), (0, n_pad), (0, 0)))
  target_BT = jnp.pad(target_BT, ((0, 0), (0, n_pad)))
  head = _Head(1.0 / temperature, n_ids, dtype)
  logp_BT, entropy_BT = _chunked(
    width, head, with_entropy, hidden_BTD, unembed_DV, target_BT
  )
  logp_BT = logp_BT[:, :n_tokens]
  return logp_BT, entropy_BT[:, :n_tokens] if with_entropy else None


@shapes.checked
def mask_ids(logits: jax.Array, n_ids: int) -> jax.Array:
  """Takes ids that no tokenizer writes out of the distribution.

  Published vocabularies are padded: Qwen3's tokenizer has 151,669 ids and its
  embedding 151,936 rows. The rows beyond are masked and not cut off, so that a
  vocabulary that is split over devices stays evenly split.

  Args:
    logits: float32 [..., V].
    n_ids: ids below it stay; 0: all.

  Returns:
    The logits, hugely negative (and finite: 0 * it is 0) from `n_ids` on.
  """
  V = logits.shape[-1]
  if not 0 < n_ids < V:
    return logits
  return jnp.where(jnp.arange(V) < n_ids, logits, _NO_SHARE)


@shapes.checked
def log_ratio(
  logp_BT: jax.Array, logp_other_BT: jax.Array, is_used_BT: jax.Array
) -> jax.Array:
  """log(p / p_other) of tokens, within +-`LOG_RATIO_BOUND`.

  Args:
    logp_BT: float [B, T], differentiated.
    logp_other_BT: float [B, T], constant.
    is_used_BT: bool [B, T]; what the two hold elsewhere, NaN and infinity
      included, reaches neither value nor gradient.

  Returns:
    float32 [B, T], 0 where not used; the gradient is 0 beyond the bound.
  """
  use = lambda x: jnp.where(is_used_BT, x.astype(jnp.float32), 0.0)
  ratio_BT = use(logp_BT) - jax.lax.stop_gradient(use(logp_other_BT))
  return jnp.clip(ratio_BT, -LOG_RATIO_BOUND, LOG_RATIO_BOUND)


class _Head(NamedTuple):
  """How logits are computed and what becomes of them."""

  scale: float
  n_ids: int
  dtype: jax.typing.DTypeLike | None

  def rounded(self, x: jax.Array) -> jax.Array:
    """An operand of a product."""
    return x if self.dtype is None else products.rounded(x, self.dtype)


def _logits(hidden, unembed_DV, head):
  """Float32 logits of one chunk, [B, c, V]."""
  logits = products.einsum("btd,dv->btv", hidden.dtype, hidden, unembed_DV)
  logits = logits if head.scale == 1.0 else logits * head.scale
  return mask_ids(logits, head.n_ids)


def _slice(array, i, width):
  return jax.lax.dynamic_slice_in_dim(array, i * width, width, axis=1)


def _unstack(chunks):
  """[n, B, c] as the scan stacks them -> [B, n * c]."""
  n, b, c = chunks.shape
  return chunks.transpose(1, 0, 2).reshape(b, n * c)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _chunked(width, head, with_entropy, hidden_BTD, unembed_DV, target_BT):
  out, _ = _forward(
    width, head, with_entropy, hidden_BTD, unembed_DV, target_BT
  )
  return out


def _forward(width, head, with_entropy, hidden_BTD, unembed_DV, target_BT):
  """Scans over chunks: (logp, entropy) and what the backward pass needs."""
  inputs = hidden_BTD, unembed_DV
  hidden_BTD, unembed_DV = map(head.rounded, inputs)

  def body(carry, i):
    logits = _logits(_slice(hidden_BTD, i, width), unembed_DV, head)
    target = _slice(target_BT, i, width)[:, :, None]
    at_target = jnp.take_along_axis(logits, target, axis=-1)[:, :, 0]
    top = jnp.max(logits, axis=-1, keepdims=True)
    exp = jnp.exp(logits - top)
    total = jnp.sum(exp, axis=-1)
    lse = top[:, :, 0] + jnp.log(total)
    if with_entropy:
      # H = lse - E[logit], with logits relative to the top for precision.
      centre = jnp.sum(exp * (logits - top), axis=-1) / total
      entropy = jnp.log(total) - centre
    else:
      entropy = jnp.zeros_like(lse)
    return carry, (at_target - lse, lse, entropy)

  n_chunks = target_BT.shape[1] // width
  _, stacked = jax.lax.scan(body, None, jnp.arange(n_chunks))
  logp_BT, lse_BT, entropy_BT = map(_unstack, stacked)
  residuals = (*inputs, target_BT, lse_BT, entropy_BT)
  return (logp_BT, entropy_BT), residuals


def _backward(width, head, with_entropy, residuals, cotangents):
  """Rebuilds p chunk by chunk; adds up the unembedding's gradient in f32.

  A token without cotangent contributes exactly 0 even where its hidden state is
  not finite, and 0 * NaN would be NaN.
  """
  *inputs, target_BT, lse_BT, entropy_BT = residuals
  hidden_BTD, unembed_DV = map(head.rounded, inputs)
  g_logp_BT, g_entropy_BT = cotangents

  def body(g_unembed_DV, i):
    hidden = _slice(hidden_BTD, i, width)
    target, lse, entropy, g_logp, g_entropy = (
      _slice(a, i, width)[:, :, None]
      for a in (target_BT, lse_BT, entropy_BT, g_logp_BT, g_entropy_BT)
    )
    is_used = (g_logp != 0) | (g_entropy != 0)
    hidden = jnp.where(is_used, hidden, 0)
    lse, entropy = (jnp.where(is_used, x, 0) for x in (lse, entropy))
    logp = _logits(hidden, unembed_DV, head) - lse
    push = g_logp + g_entropy * (logp + entropy) if with_entropy else g_logp
    is_target = jnp.arange(logp.shape[-1])[None, None] == target
    g_logits = jnp.where(is_target, g_logp, 0.0) - jnp.exp(logp) * push
    g_logits = products.rounded(g_logits * head.scale, hidden.dtype)
    dtype = hidden.dtype
    g_hidden = products.einsum("btv,dv->btd", dtype, g_logits, unembed_DV)
    g_unembed_DV += products.einsum("btd,btv->dv", dtype, hidden, g_logits)
    return g_unembed_DV, g_hidden.astype(inputs[0].dtype)

  n_chunks = target_BT.shape[1] // width
  zeros_DV = jnp.zeros(unembed_DV.shape, jnp.float32)
  g_unembed_DV, g_hidden = jax.lax.scan(body, zeros_DV, jnp.arange(n_chunks))
  n, b, c, d = g_hidden.shape
  g_hidden_BTD = g_hidden.transpose(1, 0, 2, 3).reshape(b, n * c, d)
  return g_hidden_BTD, g_unembed_DV.astype(inputs[1].dtype), None


_chunked.defvjp(_forward, _backward)
