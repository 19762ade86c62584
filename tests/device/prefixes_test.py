"""Slots that share pages are grouped, and reading in groups changes no bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from roc.device import paged, prefixes

SHAPE = prefixes.Shape(n_groups=3, n_rows=4)
NONE = np.zeros(0, np.int32)


def pages(*numbers):
  return np.array(numbers, np.int32)


def members(groups):
  """Slots of each group in use, and its pages."""
  found = []
  for n, n_columns in enumerate(groups.n_columns_N):
    slots = [s for s, at in enumerate(groups.place_B) if at // 4 == n >= 0]
    places = [groups.place_B[s] - 4 * n for s in slots]
    np.testing.assert_array_equal(groups.row_NG[n][places], slots)
    if n_columns:
      found.append((slots, groups.table_NJ[n, :n_columns].tolist()))
    else:
      assert not slots
  return found


def test_those_that_save_most_come_first():
  a, b, c, d = pages(1), pages(5, 6, 7), pages(8, 9), pages(3, 2)
  groups = prefixes.group(
    SHAPE, 16, [a, b, NONE, b, a, c, c, b, d, d, a, b, b, b], 4
  )
  assert members(groups) == [
    ([1, 3, 7, 11], [5, 6, 7]),
    ([12, 13], [5, 6, 7]),
    ([0, 4, 10], [1]),
  ]
  # No room for c and d; slots in no group and idle ones are alone.
  for slot in (2, 5, 6, 8, 9, 14, 15):
    assert groups.place_B[slot] == paged.ALONE


def test_without_company_there_are_no_groups():
  assert prefixes.group(SHAPE, 4, [pages(1), NONE, pages(2), NONE], 2) is None
  assert prefixes.group(SHAPE, 4, [], 2) is None


@pytest.mark.parametrize(
  ("n_slots", "n_queries", "want"),
  [
    (32, 2, (8, 8)),
    (64, 5, (16, 8)),
    (64, 8, (16, 6)),
    (64, 24, (16, 2)),
    (64, 32, None),  # too many queries for one product
    (64, 1, None),  # a single query is rounded differently
    (3, 2, None),
  ],
)
def test_shape(n_slots, n_queries, want):
  shape = prefixes.Shape.of(n_slots, n_queries)
  assert (shape and (shape.n_groups, shape.n_rows)) == want


@pytest.mark.parametrize(
  "n_kv_heads, n_queries", [(1, 2), (2, 2), (2, 5), (1, 8)]
)
def test_groups_change_no_bit(n_kv_heads, n_queries):
  """Against the same rows, each of which reads all its pages itself."""
  rng = np.random.default_rng(n_queries)
  S, J, Z, E, L = 24, 5, 8, 16, 2
  shape = prefixes.Shape.of(S, n_queries)
  n_pages = S * J + 40
  pool = jax.tree.map(
    lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32)),
    paged.empty(L, n_pages, Z, n_kv_heads, E, jnp.float32),
  )
  free = iter(rng.permutation(n_pages).tolist())
  heads = [
    np.array([next(free) for _ in range(n)], np.int32) for n in (3, 1, 2)
  ]
  # Nineteen of three prompts, two alone, the rest idle.
  head_of_slot = [
    heads[i] for i in rng.permutation([0] * 9 + [1] * 4 + [2] * 6)
  ]
  head_of_slot += [NONE, NONE]
  table_SJ = np.full((S, J), paged.NO_PAGE, np.int32)
  length_S = np.zeros(S, np.int32)
  for slot, head in enumerate(head_of_slot):
    table_SJ[slot, : len(head)] = head
    table_SJ[slot, len(head) :] = [next(free) for _ in range(J - len(head))]
    length_S[slot] = rng.integers(len(head) * Z, J * Z)
  n_S = (np.arange(S) < len(head_of_slot)).astype(np.int32)
  q, k, v = (
    jnp.asarray(rng.standard_normal((S, 1, n, E), np.float32))
    for n in (n_kv_heads * n_queries, n_kv_heads, n_kv_heads)
  )

  @jax.jit
  def attend(pool, groups, q, k, v):
    place = paged.place(
      table_SJ, length_S, n_S, length=1, page=Z, groups=groups
    )
    return paged.attend(pool, place, jnp.int32(1), q, k, v)[0]

  groups = prefixes.group(shape, S, head_of_slot, J)
  assert np.sum(groups.n_columns_N > 0) >= 3
  is_live_S = n_S > 0
  plain = np.asarray(attend(pool, None, q, k, v))[is_live_S]
  got = np.asarray(attend(pool, groups, q, k, v))[is_live_S]
  np.testing.assert_array_equal(got, plain)
  unused = prefixes.no_groups(shape, S, J)
  got = np.asarray(attend(pool, unused, q, k, v))[is_live_S]
  np.testing.assert_array_equal(got, plain)


@pytest.mark.slow
def test_shared_pages_are_really_read_in_groups():
  """A group that is told other pages than its rows' tables gives other sums."""
  S, J, Z = 4, 2, 8
  pool = paged.empty(1, 9, Z, 1, 16, jnp.float32)
  pool = jax.tree.map(
    lambda x: x + jnp.arange(9.0)[None, :, None, None, None], pool
  )
  table_SJ = np.array([[8, 1], [8, 2], [8, 3], [8, 4]], np.int32)
  length_S = np.full(S, 9, np.int32)
  groups = prefixes.group(prefixes.Shape(1, 4), S, [pages(7)] * 3 + [NONE], J)
  place = paged.place(
    table_SJ, length_S, np.ones(S, np.int32), length=1, page=Z, groups=groups
  )
  q, k = jnp.ones((S, 1, 2, 16)), jnp.ones((S, 1, 1, 16))
  out, _ = paged.attend(pool, place, jnp.int32(0), q, k, k)
  np.testing.assert_allclose(out[:, 0, 0, 0], [7, 7, 7, 8], rtol=1e-3)


@pytest.mark.parametrize("n_at_once", [2, 4])
def test_columns_at_once_agree_with_one_by_one(monkeypatch, n_at_once):
  """As on a GPU: two turns of two columns, or all four in one."""
  rng = np.random.default_rng(0)
  S, J, Z, K, E = 6, 4, 8, 2, 16
  pool = jax.tree.map(
    lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32)),
    paged.empty(1, S * J, Z, K, E, jnp.float32),
  )
  table_SJ = rng.permutation(S * J).reshape(S, J).astype(np.int32)
  length_S = rng.integers(0, J * Z, S).astype(np.int32)
  n_S = np.array([1, 1, 0, 1, 1, 1], np.int32)
  q, k, v = (
    jnp.asarray(rng.standard_normal((S, 1, n, E), np.float32))
    for n in (2 * K, K, K)
  )

  def attend():
    place = paged.place(table_SJ, length_S, n_S, length=1, page=Z)
    out, _ = paged.attend(pool, place, jnp.int32(0), q, k, v)
    return np.asarray(out)[n_S > 0]

  want = attend()
  monkeypatch.setattr(paged, "_columns_at_once", lambda J: n_at_once)
  np.testing.assert_allclose(attend(), want, atol=1e-6)
