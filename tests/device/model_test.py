"""The transformer against plain numpy, and what may not see what."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from roc.device import attention, paged, rotary

B, T = 2, 12


@pytest.fixture(scope="module")
def tokens_BT():
  return np.random.default_rng(0).integers(0, 40, (B, T)).astype(np.int32)


@pytest.fixture(scope="module")
def hidden(policy):
  return jax.jit(policy.hidden)


# ------------------------------------------------------------ numpy reference


def np_rope(x_THE, position_T, theta):
  """Rotation of the plane (x[i], x[i + E/2]) by position * theta^(-2i/E)."""
  half = x_THE.shape[-1] // 2
  angle_TE = position_T[:, None] * theta ** (-np.arange(half) / half)
  z = x_THE[..., :half] + 1j * x_THE[..., half:]
  z = z * np.exp(1j * angle_TE)[:, None]
  return np.concatenate([z.real, z.imag], axis=-1)


def np_norm(x, scale, eps):
  return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps) * scale


def np_attention(q_THE, k_TKE, v_TKE, may_TT):
  out = np.zeros_like(q_THE)
  n_heads, n_kv = q_THE.shape[1], k_TKE.shape[1]
  for t in range(len(q_THE)):
    for h in range(n_heads):
      kv = h // (n_heads // n_kv)
      seen = np.flatnonzero(may_TT[t])
      logits = k_TKE[seen, kv] @ q_THE[t, h] / np.sqrt(q_THE.shape[-1])
      p = np.exp(logits - logits.max())
      out[t, h] = (p / p.sum()) @ v_TKE[seen, kv]
  return out


def np_hidden(c, params, tokens_T):
  """The whole network for one row, in float64 and loops."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  x = p["embed"]["embedding"][tokens_T]
  n = len(tokens_T)
  position_T, may_TT = np.arange(n), np.tril(np.ones((n, n), bool))
  for i in range(c.n_layers):
    layer = jax.tree.map(lambda a: a[i], p["layers"])  # noqa: B023
    project = lambda name, h: h @ layer[f"{name}_proj"]["kernel"]  # noqa: B023
    norm = lambda name, h: np_norm(
      h,
      layer[f"{name}_norm"]["scale"],  # noqa: B023
      c.norm_eps,
    )
    h = norm("attn", x)
    q = norm("q", project("q", h).reshape(n, c.n_heads, c.head_dim))
    k = norm("k", project("k", h).reshape(n, c.n_kv_heads, c.head_dim))
    v = project("v", h).reshape(n, c.n_kv_heads, c.head_dim)
    q = np_rope(q, position_T, c.rope_theta)
    k = np_rope(k, position_T, c.rope_theta)
    x = x + project("o", np_attention(q, k, v, may_TT).reshape(n, -1))
    h = norm("mlp", x)
    gate = project("gate", h)
    x = x + project("down", gate / (1 + np.exp(-gate)) * project("up", h))
  return np_norm(x, p["final_norm"]["scale"], c.norm_eps)


def test_rope_rotates_planes():
  x_BTHE = np.random.default_rng(1).normal(size=(B, T, 3, 8)).astype(np.float32)
  position_BT = np.stack([np.arange(T), np.arange(T) * 7 + 3])
  frequency_E = rotary.frequencies(8, 1e4)
  turn = lambda x, position: rotary.Rotation(position, frequency_E)(x)
  got = jax.jit(turn)(x_BTHE, position_BT)
  want = np.stack(
    [np_rope(x, pos, 1e4) for x, pos in zip(x_BTHE, position_BT, strict=True)]
  )
  np.testing.assert_allclose(got, want, atol=1e-5)
  # Position 0 is the identity, and a rotation keeps lengths.
  np.testing.assert_array_equal(got[0, 0], x_BTHE[0, 0])
  np.testing.assert_allclose(
    np.linalg.norm(got, axis=-1), np.linalg.norm(x_BTHE, axis=-1), rtol=1e-5
  )


def test_grouped_attention_equals_loops():
  rng = np.random.default_rng(2)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  q_BTHE, k_BTKE, v_BTKE = draw(B, T, 6, 8), draw(B, T, 2, 8), draw(B, T, 2, 8)
  may_BTT = rng.random((B, T, T)) < 0.5
  may_BTT |= np.eye(T, dtype=bool)
  heads_first = lambda x: x.transpose(0, 2, 1, 3)
  got = jax.jit(attention.grouped)(
    q_BTHE, heads_first(k_BTKE), heads_first(v_BTKE), may_BTT
  )
  for b in range(B):
    want = np_attention(q_BTHE[b], k_BTKE[b], v_BTKE[b], may_BTT[b])
    np.testing.assert_allclose(got[b], want, atol=2e-6)


def test_network_equals_numpy(policy, params, hidden, tokens_BT):
  got = hidden(params, tokens_BT)
  assert got.shape == (B, T, 32) and got.dtype == jnp.float32
  for b in range(B):
    want = np_hidden(policy.config, params, tokens_BT[b])
    np.testing.assert_allclose(got[b], want, atol=2e-5)


# ----------------------------------------------------------- who may see whom


def test_no_token_sees_a_later_one(policy, params, tokens_BT):
  """The gradient of each position by each input is exactly 0 above it."""
  embed_BTD = params["embed"]["embedding"][tokens_BT]

  def influence(t):
    def out(x_BTD):
      # A vocabulary of exactly these inputs, so that they can be varied.
      table = x_BTD.reshape(B * T, -1)
      ids = jnp.arange(B * T).reshape(B, T)
      wide = params | {"embed": {"embedding": table}}
      hidden_BTD = policy.hidden(wide, ids)
      at_t = jax.lax.dynamic_index_in_dim(hidden_BTD, t, 1)
      # Squared: a plain sum after a norm has directions without gradient.
      return jnp.sum(at_t**3)

    return jnp.abs(jax.grad(out)(embed_BTD)).sum(-1)

  influence_TBT = jax.jit(jax.vmap(influence))(jnp.arange(T))
  for b in range(B):
    seen_TT = np.asarray(influence_TBT[:, b])
    assert np.all(seen_TT[np.triu_indices(T, 1)] == 0.0)
    assert np.all(seen_TT[np.tril_indices(T)] > 0.0)


def test_packed_segments_are_as_alone(params, hidden, tokens_BT):
  a, b = tokens_BT[0, :5], tokens_BT[0, 5:10]
  segment_BT = np.array([[1] * 5 + [2] * 5 + [0] * 2] * B, np.int32)
  position_BT = np.array([[*range(5), *range(5), 0, 0]] * B, np.int32)
  packed = hidden(params, tokens_BT, position_BT, segment_BT)
  for part, where in ((a, slice(0, 5)), (b, slice(5, 10))):
    alone = hidden(params, np.stack([part, part]))
    np.testing.assert_allclose(packed[0, where], alone[0], atol=1e-5)
  # Other tokens in the first segment change nothing in the second: not a bit.
  changed_BT = tokens_BT.copy()
  changed_BT[:, :5] = (changed_BT[:, :5] + 1) % 40
  again = hidden(params, changed_BT, position_BT, segment_BT)
  np.testing.assert_array_equal(packed[:, 5:10], again[:, 5:10])
  assert np.abs(packed[:, :5] - again[:, :5]).max() > 1e-2


def test_padding_after_the_end_is_inert(params, hidden, tokens_BT):
  changed_BT = tokens_BT.copy()
  changed_BT[:, 8:] = 0
  np.testing.assert_array_equal(
    hidden(params, tokens_BT)[:, :8], hidden(params, changed_BT)[:, :8]
  )


# --------------------------------------------------------------------- cache


# Pages of four tokens, handed out in no order.
TABLE_BJ = np.array([[7, 2, 5], [1, 6, 0]], np.int32)


@functools.cache
def compiled_append(policy, length):
  """Feeds `length` tokens to two rows with pages of four."""

  @jax.jit
  def fed(params, pool, tokens_BT, start_B, n_B):
    place = paged.place(TABLE_BJ, start_B, n_B, length=length, page=4)
    return policy.append(params, pool, tokens_BT, place)

  return fed


def append(policy, params, pool, tokens_BT, start_B, n_B):
  fed = compiled_append(policy, tokens_BT.shape[1])
  return fed(params, pool, tokens_BT, np.array(start_B), np.array(n_B))


@pytest.mark.parametrize("is_fused", [False, True])
@pytest.mark.parametrize("step", [1, 3, 4, 7])
def test_append_in_pieces_equals_whole(
  policy, params, hidden, tokens_BT, step, is_fused
):
  weights = policy.fuse(params) if is_fused else params
  pool = policy.empty_pool(8, 4)
  pieces = []
  for start in range(0, T, step):
    part_BT = tokens_BT[:, start : start + step]
    n = part_BT.shape[1]
    hidden_BTD, pool = append(
      policy, weights, pool, part_BT, [start] * 2, [n] * 2
    )
    pieces.append(hidden_BTD)
  whole = hidden(params, tokens_BT)
  np.testing.assert_allclose(np.concatenate(pieces, 1), whole, atol=1e-5)


def test_append_to_rows_of_unequal_length(policy, params, hidden, tokens_BT):
  """Padding is neither written nor read."""
  pool = policy.empty_pool(8, 4)
  first_BT = tokens_BT[:, :4].copy()
  first_BT[1, 2:] = 39  # row 1 has two tokens only, the rest is padding
  _, pool = append(policy, params, pool, first_BT, [0, 0], [4, 2])
  for untouched in (2, 5, 6, 0, 3, 4):
    assert not np.any(pool.v_LPKZE[:, untouched])
  assert not np.any(pool.v_LPKZE[:, 1, :, 2:])
  second_BT = np.stack([tokens_BT[0, 4:8], tokens_BT[1, 2:6]])
  got, _ = append(policy, params, pool, second_BT, [4, 2], [4, 4])
  whole = hidden(params, tokens_BT)
  np.testing.assert_allclose(got[0], whole[0, 4:8], atol=1e-5)
  np.testing.assert_allclose(got[1], whole[1, 2:6], atol=1e-5)


def test_fused_weights_are_the_same_numbers(make_policy, policy, params):
  fused = policy.fuse(params)
  c = policy.config
  q = fused["layers"]["qkv_proj"]["kernel"][..., : c.n_heads * c.head_dim]
  np.testing.assert_array_equal(q, params["layers"]["q_proj"]["kernel"])
  up = fused["layers"]["gate_up_proj"]["kernel"][..., c.d_ff :]
  np.testing.assert_array_equal(up, params["layers"]["up_proj"]["kernel"])
  np.testing.assert_array_equal(
    policy.unembedding(fused), policy.unembedding(params)
  )
  low = make_policy(dtype="bfloat16").fuse(params)
  assert low["layers"]["o_proj"]["kernel"].dtype == jnp.bfloat16
  assert low["layers"]["q_norm"]["scale"].dtype == jnp.float32


# ---------------------------------------------------------------- structure


def n_parameters(params):
  return sum(x.size for x in jax.tree.leaves(params))


@pytest.mark.parametrize("is_tied", [True, False])
def test_parameter_count(make_policy, is_tied):
  policy = make_policy(tie_embeddings=is_tied, n_layers=3)
  c = policy.config
  per_layer = (
    c.d_model * c.head_dim * (2 * c.n_heads + 2 * c.n_kv_heads)
    + 3 * c.d_model * c.d_ff
    + 2 * c.d_model
    + 2 * c.head_dim
  )
  total = c.n_layers * per_layer + c.d_model + c.vocab_size * c.d_model
  total += 0 if is_tied else c.vocab_size * c.d_model
  assert n_parameters(policy.abstract_params) == total


def test_init_is_as_announced(policy, params):
  assert jax.tree.structure(params) == jax.tree.structure(
    policy.abstract_params
  )
  for x, y in zip(
    jax.tree.leaves(params),
    jax.tree.leaves(policy.abstract_params),
    strict=True,
  ):
    assert x.shape == y.shape and x.dtype == y.dtype == jnp.float32
  # Layers start different from each other.
  kernel = params["layers"]["q_proj"]["kernel"]
  assert np.abs(kernel[0] - kernel[1]).max() > 0.1


def test_tied_head_is_the_embedding(make_policy, policy, params):
  np.testing.assert_array_equal(
    policy.unembedding(params), params["embed"]["embedding"].T
  )
  untied = make_policy(tie_embeddings=False)
  abstract = untied.abstract_params
  head = np.ones((32, 40), np.float32)
  filled = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract)
  filled["head"]["kernel"] = head
  np.testing.assert_array_equal(untied.unembedding(filled), head)


def test_remat_changes_nothing_but_memory(
  make_policy, policy, params, tokens_BT
):
  def loss_of(p):
    return lambda params: jnp.sum(jnp.sin(p.hidden(params, tokens_BT)))

  value_and_grad = lambda p: jax.jit(jax.value_and_grad(loss_of(p)))(params)
  value, grads = value_and_grad(policy)
  value_again, grads_again = value_and_grad(make_policy(remat="full"))
  np.testing.assert_allclose(value, value_again, rtol=1e-6)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4),
    grads,
    grads_again,
  )


def test_bfloat16_is_close(make_policy, params, hidden, tokens_BT):
  low = make_policy(dtype="bfloat16")
  got = jax.jit(low.hidden)(params, tokens_BT)
  want = hidden(params, tokens_BT)
  assert got.dtype == jnp.float32
  # bfloat16 has 8 bits of mantissa: 2^-8 relative in each of some 20 roundings.
  assert 1e-6 < np.abs(got - want).max() < 0.1
  assert low.empty_pool(1, 4).k_LPKEZ.dtype == jnp.bfloat16


def n_equations(jaxpr):
  total = 0
  for eqn in jaxpr.eqns:
    total += 1
    for value in eqn.params.values():
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        total += n_equations(inner)
  return total


def test_program_does_not_grow_with_depth(make_policy, tokens_BT):
  def size(n_layers):
    policy = make_policy(n_layers=n_layers)
    whole = jax.make_jaxpr(policy.hidden)(policy.abstract_params, tokens_BT)
    pool = jax.eval_shape(lambda: policy.empty_pool(8, 4))
    place = paged.place(
      TABLE_BJ, np.zeros(B, int), np.full(B, T), length=T, page=4
    )
    piece = jax.make_jaxpr(policy.append)(
      policy.abstract_params, pool, tokens_BT, place
    )
    return n_equations(whole.jaxpr), n_equations(piece.jaxpr)

  assert size(2) == size(9)


def test_shapes_that_cannot_be(make_policy):
  with pytest.raises(ValueError, match="vocab_size is 0"):
    make_policy(vocab_size=0)
  with pytest.raises(ValueError, match="n_heads=4 must be a multiple"):
    make_policy(n_kv_heads=3)
