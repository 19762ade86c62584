"""The TPU kernels against the plain operations, as far as a CPU can tell.

Splash attention is interpreted. The paged kernel cannot be: here what surrounds
it (layout, page numbers, lengths, writes) runs with a stand-in in its place,
which is held against the reference that comes with the kernel. Whether the real
ones compile is asked in `tpu_compile_test`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu import ragged_paged_attention as rpa

from roc.device import attention, paged, paged_tpu, sharding

B, H, K, E = 2, 4, 2, 8
L, P, Z, J = 3, 12, 4, 5  # of the pool

splash = functools.partial(attention.splash, interpret=True)


def draw(rng, *shape):
  return rng.normal(size=shape).astype(np.float32)


def plain(q_BTHE, k_BTKE, v_BTKE, segment_BT=None):
  heads_first = lambda x: jnp.swapaxes(x, 1, 2)
  may_BTT = attention.may_attend(*q_BTHE.shape[:2], segment_BT)
  return attention.grouped(
    q_BTHE, heads_first(k_BTKE), heads_first(v_BTKE), may_BTT
  )


# ----------------------------------------------------------- whole sequences


@pytest.fixture
def small_blocks(monkeypatch):
  """Several blocks a row, so that some are skipped and some cut."""
  monkeypatch.setattr(attention, "_BLOCKS", (128,))


@pytest.mark.parametrize(
  "has_segments", [pytest.param(False, marks=pytest.mark.slow), True]
)
def test_splash_equals_plain(small_blocks, has_segments):
  """Values and gradients, T not a multiple of a block, rows and heads split."""
  T, mesh = 150, sharding.make_mesh(2, 1, 2)
  rng = np.random.default_rng(0)
  args = draw(rng, B, T, H, E), draw(rng, B, T, K, E), draw(rng, B, T, K, E)
  weight_BTHE = draw(rng, B, T, H, E)
  segment_BT = None
  if has_segments:
    segment_BT = np.arange(T)[None] // np.array([[40], [141]])

  def both(attend):
    def loss(*args):
      out_BTHE = attend(*args)
      return jnp.sum(out_BTHE * weight_BTHE), out_BTHE

    grad_fn = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
    (_, out_BTHE), grads = jax.jit(grad_fn)(*args)
    return out_BTHE, *grads

  got = both(lambda *args: splash(*args, segment_BT, mesh=mesh))
  want = both(lambda *args: plain(*args, segment_BT))
  for x, y in zip(got, want, strict=True):
    assert np.abs(y).max() > 0.5
    # Sums of 150 terms of about 1 in another order.
    np.testing.assert_allclose(x, y, atol=5e-6)


@pytest.mark.slow
def test_hidden_is_the_same_by_either(monkeypatch, make_policy, params):
  monkeypatch.setattr(attention, "splash", splash)
  # Their heads are too small for the real kernels, not for these.
  monkeypatch.setattr(paged_tpu, "objection", lambda *_: "")
  rng = np.random.default_rng(1)
  tokens_BT = rng.integers(0, 40, (B, 20)).astype(np.int32)
  segment_BT = np.array([[1] * 9 + [2] * 11, [1] * 20])
  position_BT = np.tile(np.arange(20), (B, 1)) - 9 * (segment_BT == 2)
  got, want = (
    jax.jit(make_policy(attention=name).hidden)(
      params, tokens_BT, position_BT, segment_BT
    )
    for name in ("pallas", "xla")
  )
  np.testing.assert_allclose(got, want, atol=1e-5)


# -------------------------------------------------------------- paged caches


def stand_in(
  q_QHE, kv_PZKE, n_keys_B, page_BJ, start_B, n_rows_1, *, sm_scale, **blocks
):
  """The paged kernel's contract, in operations that jit."""
  for name, limit in (
    ("num_kv_pages_per_block", page_BJ.shape[1]),
    ("num_queries_per_block", q_QHE.shape[0]),
  ):
    assert 1 <= blocks.get(name, 1) <= limit
  row_Q = jnp.searchsorted(start_B, jnp.arange(len(q_QHE)), side="right") - 1
  row_Q = jnp.minimum(row_Q, n_rows_1[0] - 1)
  n_behind_Q = start_B[row_Q + 1] - 1 - jnp.arange(len(q_QHE))
  position_Q = n_keys_B[row_Q] - 1 - n_behind_Q
  # The kernel reads outside the pool where a number is no page of it; even
  # where the mask hides what it read, that is a fault.
  page_QJ = page_BJ[row_Q]
  page_QJ = jnp.where(page_QJ < 0, len(kv_PZKE), page_QJ)
  kv_QJZKE = kv_PZKE.at[page_QJ].get(mode="fill", fill_value=jnp.nan)
  kv_QAKE = kv_QJZKE.reshape(len(q_QHE), -1, *kv_PZKE.shape[2:])
  n_each = q_QHE.shape[1] // (kv_QAKE.shape[2] // 2)
  k_QAHE = jnp.repeat(kv_QAKE[:, :, 0::2], n_each, axis=2)
  v_QAHE = jnp.repeat(kv_QAKE[:, :, 1::2], n_each, axis=2)
  logits_QHA = jnp.einsum("qhe,qahe->qha", q_QHE, k_QAHE) * sm_scale
  may_QA = jnp.arange(k_QAHE.shape[1])[None] <= position_Q[:, None]
  logits_QHA = jnp.where(may_QA[:, None], logits_QHA, -1e30)
  p_QHA = jax.nn.softmax(logits_QHA, axis=-1)
  return jnp.einsum("qha,qahe->qhe", p_QHA, v_QAHE)


def test_stand_in_equals_the_reference_of_the_kernel():
  """Ragged: three rows of 1, 4 and 2 queries, and room for a fourth row."""
  rng = np.random.default_rng(6)
  args = (
    draw(rng, 7, H, E),
    draw(rng, P, Z, 2 * K, E),
    np.array([9, 4, 13, 0], np.int32),
    rng.integers(0, P, (4, J)).astype(np.int32),
    np.array([0, 1, 5, 7, 7], np.int32),
    np.array([3], np.int32),
  )
  want_QHE = rpa.ref_ragged_paged_attention(*args, sm_scale=0.3)
  got_QHE = jax.jit(functools.partial(stand_in, sm_scale=0.3))(*args)
  np.testing.assert_allclose(got_QHE, want_QHE, atol=1e-6)


@pytest.fixture
def kernel(monkeypatch):
  monkeypatch.setattr(rpa, "ragged_paged_attention", stand_in)


def both_pools(rng):
  """The same random numbers in either layout."""
  k_LPZKE, v_LPZKE = draw(rng, L, P, Z, K, E), draw(rng, L, P, Z, K, E)
  xla = paged.Pool(
    jnp.asarray(k_LPZKE.transpose(0, 1, 3, 4, 2)),
    jnp.asarray(v_LPZKE.transpose(0, 1, 3, 2, 4)),
  )
  return xla, paged_tpu.Pool(combined(k_LPZKE, v_LPZKE))


def combined(k_LPZKE, v_LPZKE):
  kv = jnp.stack([k_LPZKE, v_LPZKE], axis=4)
  return kv.reshape(L, P, Z, 2 * K, E)


def same_cache(xla, tpu):
  k_LPZKE = xla.k_LPKEZ.transpose(0, 1, 4, 2, 3)
  v_LPZKE = xla.v_LPKZE.transpose(0, 1, 3, 2, 4)
  np.testing.assert_array_equal(combined(k_LPZKE, v_LPZKE), tpu.kv_LPZKE)


# Tables of rows that hold 9, 4, 0, 18 and, for nobody, 7 tokens; the first two
# share a page.
TABLE_BJ = np.array(
  [
    [7, 2, 5, -1, -1],
    [7, 3, 0, -1, -1],
    [1, 10, -1, -1, -1],
    [4, 6, 8, 9, 11],
    [-1, -1, -1, -1, -1],
  ],
  np.int32,
)
START_B = np.array([9, 4, 0, 18, 7], np.int32)


@pytest.mark.parametrize(
  ("T", "n_B"),
  [(1, (1, 1, 1, 1, 0)), (1, (1, 0, 1, 0, 0)), (6, (3, 6, 5, 2, 0))],
  ids=["draw", "draw with idle rows", "feed"],
)
def test_paged_kernel_equals_plain(kernel, T, n_B):
  rng = np.random.default_rng(2)
  xla, tpu = both_pools(rng)
  n = np.array(n_B, np.int32)
  place = paged.place(
    jnp.asarray(TABLE_BJ), jnp.asarray(START_B), n, length=T, page=Z
  )
  rows = len(n)
  # Fresh functions: what is compiled must not outlive the stand-in.
  attend = jax.jit(lambda *args: paged_tpu.attend(*args))
  plain_attend = jax.jit(lambda *args: paged.attend(*args))
  for layer in range(L):
    args = (
      *(place, jnp.int32(layer), draw(rng, rows, T, H, E)),
      *(draw(rng, rows, T, K, E), draw(rng, rows, T, K, E)),
    )
    before = tpu
    want_BTHE, xla = plain_attend(xla, *args)
    got_BTHE, tpu = attend(tpu, *args)
    assert got_BTHE.shape == want_BTHE.shape
    is_real_BT = np.arange(T)[None] < n[:, None]
    np.testing.assert_allclose(
      np.asarray(got_BTHE)[is_real_BT],
      np.asarray(want_BTHE)[is_real_BT],
      atol=2e-6,
    )
    # What is written is the same bit for bit: padding is not, and nothing in
    # another layer.
    same_cache(xla, tpu)
    is_new = np.any(before.kv_LPZKE != tpu.kv_LPZKE, axis=(3, 4))
    assert is_new.sum() == n.sum() and is_new[layer].sum() == n.sum()


@pytest.mark.parametrize("n_at_once", [2, 4])
def test_columns_at_once_agree_with_one_by_one(monkeypatch, n_at_once):
  """As on a GPU: two turns of two columns, or all four in one."""
  rng = np.random.default_rng(0)
  rows, n_columns = 6, 4
  pool = paged.empty(1, rows * n_columns, Z, K, E, jnp.float32)
  pool = jax.tree.map(lambda x: jnp.asarray(draw(rng, *x.shape)), pool)
  table_BJ = rng.permutation(rows * n_columns).reshape(rows, n_columns)
  start_B = rng.integers(0, n_columns * Z, rows)
  n_B = np.array([1, 1, 0, 1, 1, 1])
  args = (draw(rng, rows, 1, n, E) for n in (H, K, K))
  q_BTHE, k_BTKE, v_BTKE = map(jnp.asarray, args)

  def attend():
    place = paged.place(table_BJ, start_B, n_B, length=1, page=Z)
    out_BTHE, _ = paged.attend(
      pool, place, jnp.int32(0), q_BTHE, k_BTKE, v_BTKE
    )
    return np.asarray(out_BTHE)[n_B > 0]

  want = attend()
  monkeypatch.setattr(paged, "_columns_at_once", lambda J: n_at_once)
  np.testing.assert_allclose(attend(), want, atol=1e-6)


@pytest.mark.bits
@pytest.mark.parametrize("lib", [paged, paged_tpu])
def test_rows_read_no_page_of_others(kernel, lib):
  """Whatever stands in them, even what is not a number."""
  rng = np.random.default_rng(3)
  pool = both_pools(rng)[lib is paged_tpu]
  # The second row is longer, so the first one's missing pages are looked up.
  table_BJ = np.array([[7, -1, -1, -1, -1], [4, 11, 8, 9, 6]], np.int32)
  place = paged.place(
    jnp.asarray(table_BJ),
    jnp.array([1, 14]),
    jnp.array([3, 6]),
    length=6,
    page=Z,
  )
  args = draw(rng, 2, 6, H, E), draw(rng, 2, 6, K, E), draw(rng, 2, 6, K, E)
  attend = jax.jit(
    lambda pool: lib.attend(pool, place, jnp.int32(1), *args)[0][0, :3]
  )
  others = np.setdiff1d(np.arange(P), table_BJ[0])
  broken = jax.tree.map(lambda x: x.at[:, others].set(jnp.nan), pool)
  np.testing.assert_array_equal(attend(broken), attend(pool))


def test_pages_are_copied_and_cleared_in_either_pool():
  xla, tpu = both_pools(np.random.default_rng(4))
  source_R = np.array([3, 5, -1], np.int32)
  target_R = np.array([8, -1, -1], np.int32)
  xla = paged.copy_pages(xla, source_R, target_R)
  tpu = paged.copy_pages(tpu, source_R, target_R)
  same_cache(xla, tpu)
  np.testing.assert_array_equal(tpu.kv_LPZKE[:, 8], tpu.kv_LPZKE[:, 3])
  page_R = np.array([2, -1], np.int32)
  tpu = paged.clear_pages(tpu, page_R)
  same_cache(paged.clear_pages(xla, page_R), tpu)
  assert not tpu.kv_LPZKE[:, 2].any() and tpu.kv_LPZKE[:, -1].all()


@pytest.mark.slow
def test_append_is_the_same_by_either(kernel, monkeypatch, make_policy, params):
  """A whole network: prompts by pieces, a fork, then single tokens."""
  monkeypatch.setattr(paged_tpu, "objection", lambda *_: "")
  rng = np.random.default_rng(5)
  calls = [  # (tokens fed, real ones of each row, page copied before it)
    (6, (6, 0, 3, 6, 0), None),
    (6, (1, 0, 0, 5, 0), None),
    (1, (1, 1, 1, 1, 0), (2, 3)),  # row 1 takes over the 7 tokens of row 0
    (1, (1, 1, 0, 1, 0), None),
    (6, (1, 3, 2, 6, 0), None),
  ]
  fed = [(T, n, rng.integers(0, 40, (5, T)), pair) for T, n, pair in calls]

  def run(name):
    policy = make_policy(attention=name)
    append = jax.jit(policy.append)
    fused = policy.fuse(params)
    pool, start_B, real = policy.empty_pool(P, Z), np.zeros(5, np.int32), []
    for T, n, tokens_BT, pair in fed:
      n_B = np.array(n, np.int32)
      if pair:
        pool = paged.copy_pages(pool, *(np.array([x]) for x in pair))
        start_B[1] = 7
      place = paged.place(
        jnp.asarray(TABLE_BJ), jnp.asarray(start_B), n_B, length=T, page=Z
      )
      hidden_BTD, pool = append(fused, pool, tokens_BT, place)
      real.append(np.asarray(hidden_BTD)[np.arange(T)[None] < n_B[:, None]])
      start_B = start_B + n_B
    return np.concatenate(real), pool

  got_D, tpu = run("pallas")
  want_D, xla = run("xla")
  assert isinstance(tpu, paged_tpu.Pool) and isinstance(xla, paged.Pool)
  np.testing.assert_allclose(got_D, want_D, atol=2e-5)


# -------------------------------------------------------------------- choice


def test_which_attention(monkeypatch, make_policy):
  assert not make_policy(head_dim=128).uses_pallas  # this is no TPU
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
  assert make_policy(head_dim=128).uses_pallas
  assert not make_policy(head_dim=128, attention="xla").uses_pallas
  assert not make_policy(head_dim=64).uses_pallas
  with pytest.raises(ValueError, match="head_dim of 128, not 64"):
    make_policy(head_dim=64, attention="pallas")


@pytest.mark.parametrize(
  ("n_heads", "n_kv_heads", "dtype", "can"),
  [
    *((16, 8, "bfloat16", True), (4, 1, "bfloat16", True)),
    *((6, 3, "bfloat16", False), (4, 2, "float32", True)),
    *((12, 6, "float32", False), (16, 16, "float32", False)),
  ],
)
def test_heads_that_the_kernel_can_lay_out(n_heads, n_kv_heads, dtype, can):
  """The first, second, fourth and last as compiling for v5p showed."""
  objection = paged_tpu.objection(n_heads, n_kv_heads, 128, dtype)
  assert (objection == "") == can
