"""Attention over whole sequences: in plain operations, and as a TPU kernel.

`grouped` runs everywhere and is the reference. `splash` is JAX's splash
attention (jax.experimental.pallas.ops.tpu): FlashAttention (arXiv 2205.14135)
that skips the blocks which nobody may see. Neither the logits nor the mask
[T, T] ever exist in memory, forward or backward.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_mask as masks,
)

from roc.core import products
from roc.device import sharding

# Finite, so that a row that may attend to nothing softmaxes to something
# finite too; such rows are padding and their output is never read.
_NEG_INF = -1e30
_BLOCKS = (512, 256, 128)  # of queries and of keys; the largest that divides T


def may_attend(B: int, T: int, segment_BT: jax.Array | None) -> jax.Array:
  """Who may see whom in whole rows: causal, and within segments.

  Returns:
    bool [B, T queries, T keys].
  """
  causal_TT = jnp.tril(jnp.ones((T, T), bool))
  may_BTT = jnp.broadcast_to(causal_TT[None], (B, T, T))
  if segment_BT is not None:
    may_BTT &= segment_BT[:, :, None] == segment_BT[:, None, :]
  return may_BTT


def grouped(
  q_BTHE: jax.Array,
  k_BKTE: jax.Array,
  v_BKTE: jax.Array,
  may_attend_BTT: jax.Array,
  *,
  dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
  """Grouped-query attention; softmax in float32.

  Weights enter the product with the values before they are normalised, as they
  have to where a row is read page by page (`paged`).

  Args:
    q_BTHE: queries.
    k_BKTE: keys, in the cache's layout (heads before time).
    v_BKTE: values, likewise.
    may_attend_BTT: bool [B, queries, keys].
    dtype: of the products' operands.

  Returns:
    [B, T, H, E] float32.
  """
  B, T, H, E = q_BTHE.shape
  K = k_BKTE.shape[1]
  # Queries of one kv head side by side, so each is a single matrix product.
  q = q_BTHE.reshape(B, T, K, H // K, E).transpose(0, 2, 3, 1, 4)
  q_BKME = q.reshape(B, K, (H // K) * T, E) * E**-0.5
  logits = products.product("bkme,bkte->bkmt", dtype, q_BKME, k_BKTE)
  logits = logits.reshape(B, K, H // K, T, -1)
  logits = jnp.where(may_attend_BTT[:, None, None], logits, _NEG_INF)
  top = products.top(jnp.max(logits, axis=-1, keepdims=True), dtype)
  p = jnp.exp(logits - jax.lax.stop_gradient(top))
  p_BKMT = p.reshape(B, K, -1, p.shape[-1])
  mass_BKM1 = jnp.maximum(jnp.sum(p_BKMT, axis=-1, keepdims=True), 1e-30)
  out = products.product("bkmt,bkte->bkme", dtype, p_BKMT, v_BKTE) / mass_BKM1
  out = out.reshape(B, K, H // K, T, E).transpose(0, 3, 1, 2, 4)
  return out.reshape(B, T, H, E)


def splash(
  q_BTHE: jax.Array,
  k_BTKE: jax.Array,
  v_BTKE: jax.Array,
  segment_BT: jax.Array | None = None,
  *,
  dtype: jax.typing.DTypeLike = jnp.float32,
  mesh: jax.sharding.Mesh | None = None,
  interpret: bool = False,
) -> jax.Array:
  """Grouped-query causal attention; softmax in float32.

  Args:
    q_BTHE: queries; B a multiple of the mesh's data * fsdp.
    k_BTKE: keys; K a multiple of the mesh's tensor.
    v_BTKE: values.
    segment_BT: int; tokens attend within their own segment only.
    dtype: of what the kernel is given.
    mesh: over which rows and heads are split (a kernel cannot be split by the
      compiler); None on a single device.
    interpret: run the kernel's body as JAX operations, on any device.

  Returns:
    [B, T, H, E] float32.
  """
  T, E = q_BTHE.shape[1], q_BTHE.shape[-1]
  # Behind the end: causal order alone keeps it from what is real.
  n_more = -T % _BLOCKS[-1]

  def heads_first(x_BTHE):
    x_BTHE = products.rounded(x_BTHE, dtype)
    x_BTHE = jnp.pad(x_BTHE, ((0, 0), (0, n_more), (0, 0), (0, 0)))
    return x_BTHE.transpose(0, 2, 1, 3)

  args = [heads_first(x) for x in (q_BTHE * E**-0.5, k_BTKE, v_BTKE)]
  if segment_BT is not None:
    args.append(jnp.pad(segment_BT, ((0, 0), (0, n_more))))

  on_device = functools.partial(_splash, interpret=interpret)
  if mesh is not None:
    heads = sharding.spec_of(("batch", "heads"))
    rows = sharding.spec_of(("batch",))
    on_device = jax.shard_map(
      on_device,
      mesh=mesh,
      in_specs=(heads,) * 3 + (rows,) * (len(args) - 3),
      out_specs=heads,
      check_vma=False,  # the kernel does not say over which axes it varies
    )
  out_BHTE = on_device(*args)[:, :, :T]
  return out_BHTE.transpose(0, 2, 1, 3).astype(jnp.float32)


def _splash(q_BHTE, k_BKTE, v_BKTE, segment_BT=None, *, interpret) -> Any:
  _, H, T, _ = q_BHTE.shape
  block = next(n for n in _BLOCKS if T % n == 0)
  kernel = splash_attention.make_splash_mha_single_device(
    masks.MultiHeadMask([masks.CausalMask((T, T))] * H),
    block_sizes=splash_attention.BlockSizes(
      block_q=block,
      block_kv=block,
      block_q_dkv=block,
      block_kv_dkv=block,
      block_kv_dkv_compute=block,
      block_q_dq=block,
      block_kv_dq=block,
    ),
    interpret=interpret,
  )
  if segment_BT is None:
    return jax.vmap(kernel)(q_BHTE, k_BKTE, v_BKTE)
  segments = splash_attention.SegmentIds(segment_BT, segment_BT)
  return jax.vmap(kernel)(q_BHTE, k_BKTE, v_BKTE, segments)
