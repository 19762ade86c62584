"""A decoder-only transformer with the Qwen3 block, as pure functions of params.

RMSNorm, grouped-query attention with q/k norm, rotary positions, SwiGLU, tied
or untied head (Qwen3 technical report, arXiv 2505.09388; block as in Hugging
Face `modeling_qwen3`). Layers are stacked on a leading axis and scanned, so
compile time does not grow with depth.

Flax NNX builds the module once; `Policy` splits it at the border. From there on
the parameters are a plain nested dict of arrays and every method is a pure
function of them, used by the rollout engine and by the train step alike.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

Params = dict[str, Any]

# Finite, so that a row that may attend to nothing softmaxes to something
# finite too; such rows are padding and their output is never read.
_NEG_INF = -1e30


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Shapes of the network. Defaults are the quickstart's."""

  vocab_size: int = 0  # 0: as many as the tokenizer has
  d_model: int = 128
  n_layers: int = 4
  n_heads: int = 4
  n_kv_heads: int = 2
  head_dim: int = 32
  d_ff: int = 384
  rope_theta: float = 1e4
  norm_eps: float = 1e-6
  tie_embeddings: bool = True
  dtype: str = "float32"  # compute; parameters are always float32
  remat: str = "none"  # "none" | "full": recompute each layer in backward


# Keys and values go in, the attention's output and the new cache come out.
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


class Block(nnx.Module):
  """One layer: attention and SwiGLU, each behind an RMSNorm and a residual."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    c = config
    dtype = jnp.dtype(c.dtype)

    def linear(n_in, n_out, scale=1.0):
      init = nnx.initializers.variance_scaling(scale, "fan_in", "normal")
      return nnx.Linear(
        n_in, n_out, use_bias=False, dtype=dtype, kernel_init=init, rngs=rngs
      )

    def norm(n):
      return nnx.RMSNorm(n, epsilon=c.norm_eps, dtype=jnp.float32, rngs=rngs)

    residual_scale = 1.0 / (2 * c.n_layers)
    self.config = c
    self.attn_norm = norm(c.d_model)
    self.q_proj = linear(c.d_model, c.n_heads * c.head_dim)
    self.k_proj = linear(c.d_model, c.n_kv_heads * c.head_dim)
    self.v_proj = linear(c.d_model, c.n_kv_heads * c.head_dim)
    self.q_norm = norm(c.head_dim)
    self.k_norm = norm(c.head_dim)
    self.o_proj = linear(c.n_heads * c.head_dim, c.d_model, residual_scale)
    self.mlp_norm = norm(c.d_model)
    self.gate_proj = linear(c.d_model, c.d_ff)
    self.up_proj = linear(c.d_model, c.d_ff)
    self.down_proj = linear(c.d_ff, c.d_model, residual_scale)

  def __call__(
    self, x_BTD: jax.Array, position_BT: jax.Array, attend: Attend
  ) -> tuple[jax.Array, Any]:
    """Returns the residual stream after this layer and what `attend` kept."""
    c = self.config
    dtype = jnp.dtype(c.dtype)
    lead = x_BTD.shape[:2]
    h_BTD = self.attn_norm(x_BTD).astype(dtype)
    q_BTHE = self.q_proj(h_BTD).reshape(*lead, c.n_heads, c.head_dim)
    k_BTKE = self.k_proj(h_BTD).reshape(*lead, c.n_kv_heads, c.head_dim)
    v_BTKE = self.v_proj(h_BTD).reshape(*lead, c.n_kv_heads, c.head_dim)
    q_BTHE = rope(self.q_norm(q_BTHE), position_BT, c.rope_theta)
    k_BTKE = rope(self.k_norm(k_BTKE), position_BT, c.rope_theta)
    out_BTHE, kept = attend(q_BTHE.astype(dtype), k_BTKE.astype(dtype), v_BTKE)
    x_BTD += self.o_proj(out_BTHE.reshape(*lead, -1)).astype(x_BTD.dtype)
    h_BTD = self.mlp_norm(x_BTD).astype(dtype)
    h_BTF = jax.nn.silu(self.gate_proj(h_BTD)) * self.up_proj(h_BTD)
    x_BTD += self.down_proj(h_BTF).astype(x_BTD.dtype)
    return x_BTD, kept


class Transformer(nnx.Module):
  """Embedding, a stack of `Block`s, final norm, head."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    c = config

    @nnx.split_rngs(splits=c.n_layers)
    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(rngs):
      return Block(c, rngs=rngs)

    self.embed = nnx.Embed(
      c.vocab_size,
      c.d_model,
      embedding_init=nnx.initializers.normal(0.02),
      rngs=rngs,
    )
    self.layers = stack(rngs)
    self.final_norm = nnx.RMSNorm(
      c.d_model, epsilon=c.norm_eps, dtype=jnp.float32, rngs=rngs
    )
    if not c.tie_embeddings:
      self.head = nnx.Linear(
        c.d_model,
        c.vocab_size,
        use_bias=False,
        kernel_init=nnx.initializers.normal(0.02),
        rngs=rngs,
      )


def rope(x_BTHE: jax.Array, position_BT: jax.Array, theta: float) -> jax.Array:
  """Rotary position embedding, halves rotated (RoFormer, arXiv 2104.09864)."""
  half = x_BTHE.shape[-1] // 2
  frequency_E = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle_BT1E = (
    position_BT[..., None, None].astype(jnp.float32)
    * frequency_E[None, None, None]
  )
  cos, sin = jnp.cos(angle_BT1E), jnp.sin(angle_BT1E)
  a, b = x_BTHE[..., :half], x_BTHE[..., half:]
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def attention(
  q_BTHE: jax.Array,
  k_BKTE: jax.Array,
  v_BKTE: jax.Array,
  may_attend_BTT: jax.Array,
) -> jax.Array:
  """Grouped-query attention; softmax in float32.

  Args:
    q_BTHE: queries.
    k_BKTE: keys, in the cache's layout (heads before time).
    v_BKTE: values, likewise.
    may_attend_BTT: bool [B, queries, keys].

  Returns:
    [B, T, H, E] in the dtype of `q`.
  """
  B, T, H, E = q_BTHE.shape
  K = k_BKTE.shape[1]
  # Queries of one kv head side by side, so each is a single matrix product.
  q = q_BTHE.reshape(B, T, K, H // K, E).transpose(0, 2, 3, 1, 4)
  q = q.reshape(B, K, (H // K) * T, E)
  logits = jnp.einsum(
    "bkqe,bkte->bkqt", q, k_BKTE, preferred_element_type=jnp.float32
  ) * (E**-0.5)
  logits = logits.reshape(B, K, H // K, T, -1)
  logits = jnp.where(may_attend_BTT[:, None, None], logits, _NEG_INF)
  p = jax.nn.softmax(logits, axis=-1).astype(v_BKTE.dtype)
  out = jnp.einsum("bkqt,bkte->bkqe", p.reshape(B, K, -1, p.shape[-1]), v_BKTE)
  out = out.reshape(B, K, H // K, T, E).transpose(0, 3, 1, 2, 4)
  return out.reshape(B, T, H, E).astype(q_BTHE.dtype)


@dataclasses.dataclass(frozen=True)
class Cache:
  """Keys and values of every slot; entries below a slot's length are valid."""

  k_LSKTE: jax.Array
  v_LSKTE: jax.Array


jax.tree_util.register_dataclass(
  Cache, data_fields=["k_LSKTE", "v_LSKTE"], meta_fields=[]
)


class Policy:
  """The model as pure functions of `params` (a nested dict of arrays).

  Holds only static structure: build one, close over it, jit what uses it.
  """

  def __init__(self, config: ModelConfig):
    """Raises ValueError for shapes that cannot be."""
    if config.vocab_size < 1:
      raise ValueError(
        f"model.vocab_size is {config.vocab_size}; it must be positive"
      )
    if config.n_heads % config.n_kv_heads:
      raise ValueError(
        f"model.n_heads={config.n_heads} must be a multiple of "
        f"model.n_kv_heads={config.n_kv_heads}"
      )
    self.config = config
    abstract = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    self._graphdef, state = nnx.split(abstract)
    self._treedef = jax.tree.structure(state)
    self.abstract_params: Params = nnx.to_pure_dict(state)

  def init(self, key: jax.Array) -> Params:
    """Fresh float32 parameters; consumes `key`. Jit with out_shardings."""
    module = Transformer(self.config, rngs=nnx.Rngs(params=key))
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))

  def _module(self, params: Params) -> Transformer:
    # Both are dicts flattened in key order, so leaves correspond.
    state = jax.tree.unflatten(self._treedef, jax.tree.leaves(params))
    return nnx.merge(self._graphdef, state)

  def unembedding(self, params: Params) -> jax.Array:
    """The head's matrix [D, V]: the embedding's transpose when tied."""
    if self.config.tie_embeddings:
      return params["embed"]["embedding"].T
    return params["head"]["kernel"]

  def hidden(
    self,
    params: Params,
    tokens_BT: jax.Array,
    position_BT: jax.Array | None = None,
    segment_BT: jax.Array | None = None,
  ) -> jax.Array:
    """Final-norm hidden states of whole sequences (training, scoring).

    Args:
      params: as from `init`.
      tokens_BT: int ids.
      position_BT: int positions for RoPE; default 0..T-1.
      segment_BT: int; tokens attend within their own segment only. Padding may
        hold any id: causal order alone keeps it from real tokens before it.

    Returns:
      [B, T, D] float32.
    """
    B, T = tokens_BT.shape
    if position_BT is None:
      position_BT = jnp.broadcast_to(jnp.arange(T)[None], (B, T))
    causal_TT = jnp.tril(jnp.ones((T, T), bool))
    may_BTT = jnp.broadcast_to(causal_TT[None], (B, T, T))
    if segment_BT is not None:
      may_BTT &= segment_BT[:, :, None] == segment_BT[:, None, :]

    def attend(q, k, v):
      heads_first = lambda x: x.transpose(0, 2, 1, 3)
      return attention(q, heads_first(k), heads_first(v), may_BTT), None

    module = self._module(params)
    layer_def, layers = nnx.split(module.layers)

    def body(x_BTD, layer):
      x_BTD, _ = nnx.merge(layer_def, layer)(x_BTD, position_BT, attend)
      return x_BTD, None

    if self.config.remat == "full":
      body = jax.checkpoint(body)
    x_BTD = module.embed(tokens_BT)
    x_BTD, _ = jax.lax.scan(body, x_BTD, layers)
    return module.final_norm(x_BTD)

  def empty_cache(self, n_slots: int, length: int) -> Cache:
    """Zeros [L, S, K, T, E] in the compute dtype."""
    c = self.config
    shape = (c.n_layers, n_slots, c.n_kv_heads, length, c.head_dim)
    zeros = jnp.zeros(shape, jnp.dtype(c.dtype))
    return Cache(zeros, jnp.zeros_like(zeros))

  def append(
    self,
    params: Params,
    cache: Cache,
    tokens_ST: jax.Array,
    length_S: jax.Array,
  ) -> tuple[jax.Array, Cache]:
    """Feeds tokens to every slot behind its `length` cached ones.

    Entries that a slot does not need (its tokens are padding) are written all
    the same: they lie at or beyond its length, where nothing reads before the
    next append overwrites them. The cache needs T spare entries for that.

    Args:
      params: as from `init`.
      cache: as from `empty_cache`.
      tokens_ST: int ids, left-aligned.
      length_S: valid entries per slot before this call.

    Returns:
      hidden states [S, T, D] float32 and the new cache.
    """
    T = tokens_ST.shape[1]
    position_ST = length_S[:, None] + jnp.arange(T)[None]
    entry_T = jnp.arange(cache.k_LSKTE.shape[3])
    may_STT = entry_T[None, None] <= position_ST[:, :, None]
    write = jax.vmap(
      lambda row_KTE, new_KTE, start: jax.lax.dynamic_update_slice(
        row_KTE, new_KTE, (0, start, 0)
      )
    )
    module = self._module(params)
    layer_def, layers = nnx.split(module.layers)

    def body(carry, xs):
      x_STD, k_LSKTE, v_LSKTE = carry
      i, layer = xs

      def attend(q, k, v):
        k_SKTE = write(k_LSKTE[i], k.transpose(0, 2, 1, 3), length_S)
        v_SKTE = write(v_LSKTE[i], v.transpose(0, 2, 1, 3), length_S)
        out = attention(q, k_SKTE, v_SKTE, may_STT)
        return out, (k_LSKTE.at[i].set(k_SKTE), v_LSKTE.at[i].set(v_SKTE))

      block = nnx.merge(layer_def, layer)
      x_STD, (k_LSKTE, v_LSKTE) = block(x_STD, position_ST, attend)
      return (x_STD, k_LSKTE, v_LSKTE), None

    carry = (module.embed(tokens_ST), cache.k_LSKTE, cache.v_LSKTE)
    steps = (jnp.arange(self.config.n_layers), layers)
    (x_STD, k, v), _ = jax.lax.scan(body, carry, steps)
    return module.final_norm(x_STD), Cache(k, v)
