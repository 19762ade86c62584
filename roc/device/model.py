"""Decoder-only transformers of one block, as pure functions of params.

RMSNorm, grouped-query attention, rotary positions, SwiGLU, tied or untied head:
Qwen3 (arXiv 2505.09388) with a norm of queries and keys, Qwen2.5 (arXiv
2412.15115) with biases in place of it, Llama 3 (arXiv 2407.21783) with neither
and with stretched rotary positions; each as in Hugging Face's `modeling_*`.
Layers are stacked on a leading axis and scanned, so compile time does not grow
with depth.

Flax NNX builds the module once; `Policy` splits it at the border. From there on
the parameters are a plain nested dict of arrays and every method is a pure
function of them, used by the rollout engine and by the train step alike. The
engine may hold them *fused* (`Policy.fuse`): the same block with its input
projections side by side, fewer and larger products for few rows.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from roc.device import attention as attention_lib
from roc.device import paged, paged_tpu, rotary

Params = dict[str, Any]
Pool = paged.Pool | paged_tpu.Pool


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
  qk_norm: bool = True  # RMSNorm of each head's queries and keys (Qwen3)
  qkv_bias: bool = False  # biases of the query, key, value products (Qwen2.5)
  rope_theta: float = 1e4
  # Llama 3.1's stretching of rotary positions beyond the length that it was
  # pretrained with; a factor of 1 stretches nothing.
  rope_factor: float = 1.0
  rope_low_freq_factor: float = 1.0
  rope_high_freq_factor: float = 4.0
  rope_original_length: int = 8192
  norm_eps: float = 1e-6
  tie_embeddings: bool = True
  dtype: str = "float32"  # compute; parameters are always float32
  remat: str = "none"  # "none" | "full": recompute each layer in backward
  # "xla": plain operations; "pallas": kernels that only a TPU runs; "auto":
  # those on a TPU if the heads suit them, else plain operations.
  attention: str = "auto"


# Keys and values go in, the attention's output and the new cache come out.
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


class Block(nnx.Module):
  """One layer: attention and SwiGLU, each behind an RMSNorm and a residual."""

  def __init__(
    self, config: ModelConfig, *, rngs: nnx.Rngs, is_fused: bool = False
  ):
    c = config
    dtype = jnp.dtype(c.dtype)

    def linear(n_in, n_out, scale=1.0, use_bias=False):
      init = nnx.initializers.variance_scaling(scale, "fan_in", "normal")
      return nnx.Linear(
        n_in, n_out, use_bias=use_bias, dtype=dtype, kernel_init=init, rngs=rngs
      )

    qkv_linear = functools.partial(linear, c.d_model, use_bias=c.qkv_bias)

    def norm(n):
      return nnx.RMSNorm(n, epsilon=c.norm_eps, dtype=jnp.float32, rngs=rngs)

    residual_scale = 1.0 / (2 * c.n_layers)
    self.config = c
    self.is_fused = is_fused
    self.attn_norm = norm(c.d_model)
    if is_fused:
      n_heads = c.n_heads + 2 * c.n_kv_heads
      self.qkv_proj = qkv_linear(n_heads * c.head_dim)
      self.gate_up_proj = linear(c.d_model, 2 * c.d_ff)
    else:
      self.q_proj = qkv_linear(c.n_heads * c.head_dim)
      self.k_proj = qkv_linear(c.n_kv_heads * c.head_dim)
      self.v_proj = qkv_linear(c.n_kv_heads * c.head_dim)
      self.gate_proj = linear(c.d_model, c.d_ff)
      self.up_proj = linear(c.d_model, c.d_ff)
    if c.qk_norm:
      self.q_norm = norm(c.head_dim)
      self.k_norm = norm(c.head_dim)
    self.o_proj = linear(c.n_heads * c.head_dim, c.d_model, residual_scale)
    self.mlp_norm = norm(c.d_model)
    self.down_proj = linear(c.d_ff, c.d_model, residual_scale)

  def __call__(
    self, x_BTD: jax.Array, turn: rotary.Rotation, attend: Attend
  ) -> tuple[jax.Array, Any]:
    """Returns the residual stream after this layer and what `attend` kept."""
    c = self.config
    dtype = jnp.dtype(c.dtype)
    lead = x_BTD.shape[:2]
    h_BTD = self.attn_norm(x_BTD).astype(dtype)
    q_BTHE, k_BTKE, v_BTKE = (
      x.reshape(*lead, -1, c.head_dim) for x in self._qkv(h_BTD)
    )
    if c.qk_norm:
      q_BTHE, k_BTKE = self.q_norm(q_BTHE), self.k_norm(k_BTKE)
    q_BTHE, k_BTKE = turn(q_BTHE).astype(dtype), turn(k_BTKE).astype(dtype)
    out_BTHE, kept = attend(q_BTHE, k_BTKE, v_BTKE)
    x_BTD += self.o_proj(out_BTHE.reshape(*lead, -1)).astype(x_BTD.dtype)
    h_BTD = self.mlp_norm(x_BTD).astype(dtype)
    gate_BTF, up_BTF = self._gate_up(h_BTD)
    h_BTF = jax.nn.silu(gate_BTF) * up_BTF
    x_BTD += self.down_proj(h_BTF).astype(x_BTD.dtype)
    return x_BTD, kept

  def _qkv(self, h_BTD: jax.Array) -> Sequence[jax.Array]:
    if not self.is_fused:
      return self.q_proj(h_BTD), self.k_proj(h_BTD), self.v_proj(h_BTD)
    c = self.config
    n_q, n_kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    return jnp.split(self.qkv_proj(h_BTD), (n_q, n_q + n_kv), axis=-1)

  def _gate_up(self, h_BTD: jax.Array) -> Sequence[jax.Array]:
    if not self.is_fused:
      return self.gate_proj(h_BTD), self.up_proj(h_BTD)
    return jnp.split(self.gate_up_proj(h_BTD), 2, axis=-1)


class Transformer(nnx.Module):
  """Embedding, a stack of `Block`s, final norm, head."""

  def __init__(
    self, config: ModelConfig, *, rngs: nnx.Rngs, is_fused: bool = False
  ):
    c = config

    @nnx.split_rngs(splits=c.n_layers)
    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(rngs):
      return Block(c, rngs=rngs, is_fused=is_fused)

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
    if is_fused or not c.tie_embeddings:
      self.head = nnx.Linear(
        c.d_model,
        c.vocab_size,
        use_bias=False,
        kernel_init=nnx.initializers.normal(0.02),
        rngs=rngs,
      )


class Policy:
  """The model as pure functions of `params` (a nested dict of arrays).

  Holds only static structure: build one, close over it, jit what uses it.
  """

  def __init__(
    self,
    config: ModelConfig,
    mesh: jax.sharding.Mesh | None = None,
    n_ids: int = 0,
  ):
    """Builds a policy.

    Args:
      config: shapes.
      mesh: that `hidden` runs on, which the Pallas kernels have to know; None:
        a single device.
      n_ids: of the tokenizer; those beyond are never drawn, see
        `logprobs.mask_ids`. 0: the whole vocabulary.

    Raises:
      ValueError: shapes that cannot be.
    """
    if config.vocab_size < 1:
      raise ValueError(
        f"model.vocab_size is {config.vocab_size}; it must be positive"
      )
    if config.n_heads % config.n_kv_heads:
      raise ValueError(
        f"model.n_heads={config.n_heads} must be a multiple of "
        f"model.n_kv_heads={config.n_kv_heads}"
      )
    objection = paged_tpu.objection(
      config.n_heads, config.n_kv_heads, config.head_dim, config.dtype
    )
    if config.attention == "pallas" and objection:
      raise ValueError(f"model.attention=pallas {objection}")
    self.config = config
    self.mesh = mesh
    self.n_ids = n_ids
    self._suits_pallas = not objection
    plain = nnx.split(_abstract(config, is_fused=False))
    fused = nnx.split(_abstract(config, is_fused=True))
    self._splits = (plain, fused)
    self.abstract_params: Params = nnx.to_pure_dict(plain[1])

  @property
  def uses_pallas(self) -> bool:
    """Whether attention runs in Pallas kernels (`ModelConfig.attention`)."""
    if self.config.attention != "auto":
      return self.config.attention == "pallas"
    return self._suits_pallas and jax.default_backend() == "tpu"

  def init(self, key: jax.Array) -> Params:
    """Fresh float32 parameters; consumes `key`. Jit with out_shardings."""
    module = Transformer(self.config, rngs=nnx.Rngs(params=key))
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))

  def _module(self, params: Params) -> Transformer:
    graphdef, abstract = self._splits["qkv_proj" in params["layers"]]
    # Both are dicts flattened in key order, so leaves correspond.
    state = jax.tree.unflatten(
      jax.tree.structure(abstract), jax.tree.leaves(params)
    )
    return nnx.merge(graphdef, state)

  def unembedding(self, params: Params) -> jax.Array:
    """The head's matrix [D, V]: the embedding's transpose when tied."""
    if "head" in params:
      return params["head"]["kernel"]
    return params["embed"]["embedding"].T

  def fuse(self, params: Params) -> Params:
    """Parameters as the engine holds them: cast once, projections fused.

    The same numbers in the compute dtype (norms stay float32), with q, k and v
    side by side, gate and up side by side, and the head as its own matrix. All
    methods take either form.
    """
    dtype = jnp.dtype(self.config.dtype)
    layers = dict(params["layers"])

    def beside(*names: str) -> Params:
      parts = [layers.pop(name) for name in names]
      join = lambda *xs: jnp.concatenate(xs, axis=-1)
      return jax.tree.map(join, *parts)

    layers |= {
      "qkv_proj": beside("q_proj", "k_proj", "v_proj"),
      "gate_up_proj": beside("gate_proj", "up_proj"),
    }
    cast = lambda path, x: x if "norm" in path[-2].key else x.astype(dtype)
    return jax.tree_util.tree_map_with_path(
      cast,
      params | {"layers": layers, "head": {"kernel": self.unembedding(params)}},
    )

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
    may_BTT = None
    if not self.uses_pallas:
      may_BTT = attention_lib.may_attend(B, T, segment_BT)

    def attend(q, k, v):
      if may_BTT is None:
        return attention_lib.splash(q, k, v, segment_BT, mesh=self.mesh), None
      heads_first = lambda x: x.transpose(0, 2, 1, 3)
      args = q, heads_first(k), heads_first(v), may_BTT
      return attention_lib.grouped(*args), None

    module = self._module(params)
    layer_def, layers = nnx.split(module.layers)
    turn = self._rotation(position_BT)

    def body(x_BTD, layer):
      x_BTD, _ = nnx.merge(layer_def, layer)(x_BTD, turn, attend)
      return x_BTD, None

    if self.config.remat == "full":
      body = jax.checkpoint(body)
    x_BTD = module.embed(tokens_BT).astype(jnp.float32)
    x_BTD, _ = jax.lax.scan(body, x_BTD, layers)
    return module.final_norm(x_BTD)

  def append(
    self,
    params: Params,
    pool: Pool,
    tokens_BT: jax.Array,
    place: paged.Place,
  ) -> tuple[jax.Array, Pool]:
    """Feeds tokens to rows behind what their pages already hold.

    Args:
      params: as from `init` or `fuse`.
      pool: cache of all rows.
      tokens_BT: int ids, left-aligned.
      place: which tokens are real and where they go (`paged.place`).

    Returns:
      hidden states [B, T, D] float32 (anything where `place` says padding) and
      the pool with the new keys and values.
    """
    module = self._module(params)
    layer_def, layers = nnx.split(module.layers)
    turn = self._rotation(place.position_BT)
    lib = paged_tpu if isinstance(pool, paged_tpu.Pool) else paged

    def body(carry, xs):
      x_BTD, pool = carry
      i, layer = xs
      attend = functools.partial(lib.attend, pool, place, i)
      return nnx.merge(layer_def, layer)(x_BTD, turn, attend), None

    # Not `embed()`, which would cast the whole table for a few rows of it.
    x_BTD = jnp.take(module.embed.embedding[...], tokens_BT, axis=0)
    carry = (x_BTD.astype(jnp.float32), pool)
    steps = (jnp.arange(self.config.n_layers), layers)
    (x_BTD, pool), _ = jax.lax.scan(body, carry, steps)
    return module.final_norm(x_BTD), pool

  def empty_pool(self, n_pages: int, page: int) -> Pool:
    """An empty cache of `n_pages` pages of `page` tokens."""
    c = self.config
    lib = paged_tpu if self.uses_pallas else paged
    return lib.empty(
      c.n_layers, n_pages, page, c.n_kv_heads, c.head_dim, jnp.dtype(c.dtype)
    )

  def _rotation(self, position_BT: jax.Array) -> rotary.Rotation:
    c = self.config
    frequency_E = rotary.frequencies(c.head_dim, c.rope_theta)
    if c.rope_factor != 1.0:
      frequency_E = rotary.stretch(
        frequency_E,
        c.rope_factor,
        c.rope_low_freq_factor,
        c.rope_high_freq_factor,
        c.rope_original_length,
      )
    return rotary.Rotation(position_BT, frequency_E)


def _abstract(config: ModelConfig, *, is_fused: bool) -> Transformer:
  return nnx.eval_shape(
    lambda: Transformer(config, rngs=nnx.Rngs(0), is_fused=is_fused)
  )
