"""A key/value cache in pages, and attention over the pages that are filled.

The pool holds P pages of Z tokens for every layer. A row (a rollout, or a
prompt that several rollouts share) owns an ordered table of page numbers; what
it holds at position t stands in page t // Z of its table, at t % Z. Memory
follows the tokens that exist, pages can be shared, and a row can be set aside
and taken up again by keeping its table.

Attention walks over the table's columns with a running softmax (as
FlashAttention, arXiv 2205.14135) and stops after the last filled page of the
longest row. A page that a row may not see contributes an exact zero, so what
comes out for a row does not depend on how long the others are.
"""

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp

from roc.core import products

_NEG_INF = -1e30

# This module's or another's: arrays whose axes begin with layers and pages.
AnyPool = TypeVar("AnyPool")

NO_PAGE = -1  # in a table: nothing there; writes to it are dropped


@dataclasses.dataclass(frozen=True)
class Pool:
  """Keys and values of all layers."""

  # Tokens last: a product with few queries reads keys along them.
  k_LPKEZ: jax.Array
  v_LPKZE: jax.Array


@dataclasses.dataclass(frozen=True)
class Place:
  """Where the tokens of one call go and what they may see."""

  position_BT: jax.Array  # int32
  page_BT: jax.Array  # int32: page written to; NO_PAGE for padding
  table_BJ: jax.Array  # int32
  n_columns: jax.Array  # int32 []: table columns that anyone may see


for _cls in (Pool, Place):
  jax.tree_util.register_dataclass(
    _cls,
    data_fields=[f.name for f in dataclasses.fields(_cls)],
    meta_fields=[],
  )


def empty(
  n_layers: int,
  n_pages: int,
  page: int,
  n_kv_heads: int,
  head_dim: int,
  dtype: jnp.dtype,
) -> Pool:
  """A pool of zeros."""
  lead = (n_layers, n_pages, n_kv_heads)
  return Pool(
    jnp.zeros((*lead, head_dim, page), dtype),
    jnp.zeros((*lead, page, head_dim), dtype),
  )


def place(
  table_BJ: jax.Array,
  start_B: jax.Array,
  n_B: jax.Array,
  *,
  length: int,
  page: int,
) -> Place:
  """Places `n_B` new tokens of each row behind the `start_B` it holds.

  Args:
    table_BJ: pages of each row.
    start_B: tokens that the row already holds.
    n_B: real tokens of this call; those from there on are padding.
    length: T, tokens a row in this call.
    page: Z.
  """
  step_T = jnp.arange(length)
  position_BT = start_B[:, None] + step_T[None]
  column_BT = jnp.minimum(position_BT // page, table_BJ.shape[1] - 1)
  page_BT = jnp.take_along_axis(table_BJ, column_BT, axis=1)
  page_BT = jnp.where(step_T[None] < n_B[:, None], page_BT, NO_PAGE)
  last_B = jnp.where(n_B > 0, start_B + n_B - 1, -1)
  n_columns = jnp.max(last_B) // page + 1
  return Place(position_BT, page_BT, table_BJ, n_columns)


def attend(
  pool: Pool,
  place: Place,
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


def _write(pool: Pool, place: Place, layer, k_BTKE, v_BTKE) -> Pool:
  _, P, _, Z, _ = pool.v_LPKZE.shape
  # A negative index would count from the end; one past the end is dropped.
  page_BT = jnp.where(place.page_BT == NO_PAGE, P, place.page_BT)
  at_BT = place.position_BT % Z
  return Pool(
    pool.k_LPKEZ.at[layer, page_BT, :, :, at_BT].set(
      products.rounded(k_BTKE, pool.k_LPKEZ.dtype), mode="drop"
    ),
    pool.v_LPKZE.at[layer, page_BT, :, at_BT].set(
      products.rounded(v_BTKE, pool.v_LPKZE.dtype), mode="drop"
    ),
  )


def _read(pool: Pool, place: Place, layer, q_BTHE) -> jax.Array:
  B, T, H, E = q_BTHE.shape
  K, Z = pool.v_LPKZE.shape[2:4]
  # Queries that share keys side by side: M = H / K * T of them.
  q_BKME = q_BTHE.reshape(B, T, K, H // K, E).transpose(0, 2, 3, 1, 4)
  q_BKME = q_BKME.reshape(B, K, -1, E) * E**-0.5
  out_BKME = _walk(pool, place, layer, q_BKME)
  out = out_BKME.reshape(B, K, H // K, T, E).transpose(0, 3, 1, 2, 4)
  return out.reshape(B, T, H, E)


def _walk(pool: Pool, place: Place, layer, q_BKME: jax.Array) -> jax.Array:
  """Attends to one table column after the other, with a running softmax."""
  B, K, M, E = q_BKME.shape
  Z, W = pool.v_LPKZE.shape[3], _columns_at_once(place.table_BJ.shape[1])
  table_BJ = own_pages(place.table_BJ)
  table_BJ = jnp.pad(table_BJ, ((0, 0), (0, -table_BJ.shape[1] % W)), "edge")
  last_BM = jnp.tile(place.position_BT, (1, M // place.position_BT.shape[1]))
  dtype = pool.v_LPKZE.dtype

  def some(i, state):
    top_BKM, mass_BKM, out_BKME = state
    page_BW = jax.lax.dynamic_slice_in_dim(table_BJ, i * W, W, axis=1)
    get = lambda x: x.at[layer, page_BW].get(mode="clip")
    k_BWKEZ, v_BWKZE = get(pool.k_LPKEZ), get(pool.v_LPKZE)
    logits_BKMWZ = products.product("bkme,bwkez->bkmwz", dtype, q_BKME, k_BWKEZ)
    entry_WZ = (i * W * Z + jnp.arange(W * Z)).reshape(1, 1, W, Z)
    may_BMWZ = entry_WZ <= last_BM[..., None, None]
    logits_BKMWZ = jnp.where(may_BMWZ[:, None], logits_BKMWZ, _NEG_INF)
    most_BKM = products.top(jnp.max(logits_BKMWZ, axis=(-2, -1)), dtype)
    new_BKM = jnp.maximum(top_BKM, most_BKM)
    p_BKMWZ = jnp.exp(logits_BKMWZ - new_BKM[..., None, None])
    fade_BKM = jnp.exp(top_BKM - new_BKM)
    mass_BKM = mass_BKM * fade_BKM + _sum(p_BKMWZ)
    part_BKME = products.product("bkmwz,bwkze->bkme", dtype, p_BKMWZ, v_BWKZE)
    return new_BKM, mass_BKM, out_BKME * fade_BKM[..., None] + part_BKME

  zero_BKM = jnp.zeros((B, K, M), jnp.float32)
  state = zero_BKM + _NEG_INF, zero_BKM, jnp.zeros((B, K, M, E), jnp.float32)
  if table_BJ.shape[1] == W:
    state = some(0, state)
  else:
    n_turns = (place.n_columns + W - 1) // W
    state = jax.lax.fori_loop(0, n_turns, some, state)
  _, mass_BKM, out_BKME = state
  # A call without any real token reads no page.
  return out_BKME / jnp.maximum(mass_BKM, 1e-30)[..., None]


def _columns_at_once(J: int) -> int:
  """One on a CPU, whose caches hold what is gathered; else many.

  A GPU returns to the host after each turn of a loop, so up to 16 pages of each
  row are read in one go; on an H200 that halves the time of attention.
  """
  return 1 if jax.default_backend() == "cpu" else min(J, 16)


def _sum(x_BKMWZ: jax.Array) -> jax.Array:
  """Sums the last two axes; on a CPU in an order that is always the same.

  Its backend reduces small and large arrays in different orders, so that the
  bits would depend on the other axes.
  """
  if jax.default_backend() != "cpu":
    return jnp.sum(x_BKMWZ, axis=(-2, -1))
  x_BKMN = x_BKMWZ.reshape(*x_BKMWZ.shape[:3], -1)
  while (n := x_BKMN.shape[-1]) > 1:
    half = (n + 1) // 2
    rest = x_BKMN[..., half:]
    if n % 2:
      rest = jnp.pad(rest, ((0, 0), (0, 0), (0, 0), (0, 1)))
    x_BKMN = x_BKMN[..., :half] + rest
  return x_BKMN[..., 0]


def own_pages(table_BJ: jax.Array) -> jax.Array:
  """Tables with a row's first page where it has none.

  What is read there is masked, and yet 0 times another row's broken numbers
  would not be 0.
  """
  return jnp.where(table_BJ == NO_PAGE, table_BJ[:, :1], table_BJ)


def copy_pages(
  pool: AnyPool, source_R: jax.Array, target_R: jax.Array
) -> AnyPool:
  """Copies whole pages, in all layers; a target of NO_PAGE copies nothing."""
  P = _n_pages(pool)
  target_R = jnp.where(target_R == NO_PAGE, P, target_R)
  copy = lambda x: x.at[:, target_R].set(
    jnp.take(x, source_R, axis=1, mode="clip"), mode="drop"
  )
  return jax.tree.map(copy, pool)


def clear_pages(pool: AnyPool, page_R: jax.Array) -> AnyPool:
  """Zeros pages: a masked entry adds 0 times its value, so none may be NaN."""
  P = _n_pages(pool)
  page_R = jnp.where(page_R == NO_PAGE, P, page_R)
  return jax.tree.map(lambda x: x.at[:, page_R].set(0, mode="drop"), pool)


def _n_pages(pool) -> int:
  return jax.tree.leaves(pool)[0].shape[1]
