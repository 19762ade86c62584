"""The paged cache as TPUs like it, read by a Pallas kernel.

The same cache as `paged` (pages, tables, `Place`), in the layout of JAX's
ragged paged attention (jax.experimental.pallas.ops.tpu; Ragged Paged Attention,
arXiv 2604.15464). The kernel reads from memory only the pages that a row has
filled, and a whole page with all its heads in one piece; `paged` reads as many
pages for every row as the longest one has.

The pages of all layers are one array, which the kernel sees as L * P pages: a
slice of a layer would be a copy. `paged.place`, `copy_pages` and `clear_pages`
serve both pools.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import ragged_paged_attention as rpa

from roc.core import products
from roc.device import paged

# Keys a row that the kernel holds at a time, and queries: as the kernel's own
# table of tuned sizes has them for most shapes.
_KEY_BLOCK = 512
_QUERY_BLOCK = 32
_HEAD_DIM = 128  # the only one that the kernel compiles for


@dataclasses.dataclass(frozen=True)
class Pool:
  """Keys and values of all layers: on axis K key, value, key, value, ..."""

  kv_LPZKE: jax.Array


jax.tree_util.register_dataclass(Pool, data_fields=["kv_LPZKE"], meta_fields=[])


def objection(n_heads: int, n_kv_heads: int, head_dim: int, dtype: str) -> str:
  """Why the kernel cannot take such heads; empty where it can."""
  if head_dim != _HEAD_DIM:
    return f"needs a head_dim of {_HEAD_DIM}, not {head_dim}"
  kind = jnp.dtype(dtype)
  try:
    # What the kernel itself will ask, and raise.
    n_in_block, _ = rpa.kernel.get_min_heads_per_blk(
      n_heads, 2 * n_kv_heads, kind, kind
    )
  except ValueError:
    n_in_block = 0
  # A part of the heads must fill registers of 8 rows.
  if not n_in_block or (n_in_block < n_heads and n_in_block % 8):
    return f"cannot lay out {n_heads} / {n_kv_heads} heads of {dtype}"
  return ""


def empty(
  n_layers: int,
  n_pages: int,
  page: int,
  n_kv_heads: int,
  head_dim: int,
  dtype: jnp.dtype,
) -> Pool:
  """A pool of zeros."""
  shape = (n_layers, n_pages, page, 2 * n_kv_heads, head_dim)
  return Pool(jnp.zeros(shape, dtype))


def attend(
  pool: Pool,
  place: paged.Place,
  layer: jax.Array,
  q_BTHE: jax.Array,
  k_BTKE: jax.Array,
  v_BTKE: jax.Array,
) -> tuple[jax.Array, Pool]:
  """Writes new keys and values to their pages, then attends causally.

  Args:
    pool: of all layers.
    place: of the new tokens.
    layer: int32 [], whose pages.
    q_BTHE: queries.
    k_BTKE: keys of the same tokens.
    v_BTKE: values of the same tokens.

  Returns:
    [B, T, H, E] float32 (anything for padding), and the pool.
  """
  pool = _write(pool, place, layer, k_BTKE, v_BTKE)
  return _read(pool, place, layer, q_BTHE), pool


def _write(pool: Pool, place: paged.Place, layer, k_BTKE, v_BTKE) -> Pool:
  _, P, Z, _, E = pool.kv_LPZKE.shape
  # A negative index would count from the end; one past the end is dropped.
  page_BT = jnp.where(place.page_BT == paged.NO_PAGE, P, place.page_BT)
  at_BT = place.position_BT % Z
  kv_BTKE = jnp.stack([k_BTKE, v_BTKE], axis=3)
  kv_BTKE = kv_BTKE.reshape(*page_BT.shape, -1, E)
  kv_BTKE = products.rounded(kv_BTKE, pool.kv_LPZKE.dtype)
  return Pool(pool.kv_LPZKE.at[layer, page_BT, at_BT].set(kv_BTKE, mode="drop"))


def _read(pool: Pool, place: paged.Place, layer, q_BTHE) -> jax.Array:
  B, T, H, E = q_BTHE.shape
  L, P, Z, K, _ = pool.kv_LPZKE.shape
  J = place.table_BJ.shape[1]
  # A row without pages is read all the same, and -1 is outside the pool.
  page_BJ = jnp.maximum(paged.own_pages(place.table_BJ), 0) + layer * P
  # The T queries of a row are its last T tokens, padding included: padding
  # stands behind what is real and reads on into whatever is there. A row
  # without a real token reads as little as it may.
  is_real_B = jnp.any(place.page_BT != paged.NO_PAGE, axis=1)
  n_keys_B = jnp.where(is_real_B, place.position_BT[:, -1] + 1, T)
  q_BTHE = products.rounded(q_BTHE * E**-0.5, pool.kv_LPZKE.dtype)
  out_BTHE = rpa.ragged_paged_attention(
    q_BTHE.reshape(B * T, H, E),
    pool.kv_LPZKE.reshape(L * P, Z, K, E),
    n_keys_B.astype(jnp.int32),
    page_BJ.astype(jnp.int32),
    jnp.arange(B + 1, dtype=jnp.int32) * T,
    jnp.array([B], jnp.int32),
    sm_scale=1.0,
    num_kv_pages_per_block=min(J, max(1, _KEY_BLOCK // Z)),
    num_queries_per_block=min(B * T, _QUERY_BLOCK),
  )
  return out_BTHE.reshape(B, T, H, E).astype(jnp.float32)
