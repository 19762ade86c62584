"""The network as flax modules: one block, stacked and scanned by `model`.

RMSNorm, grouped-query attention, rotary positions, SwiGLU, tied or untied head:
Qwen3 (arXiv 2505.09388) with a norm of queries and keys, Qwen2.5 (arXiv
2412.15115) with biases in place of it, Llama 3 (arXiv 2407.21783) with neither
and with stretched rotary positions; each as in Hugging Face's `modeling_*`.

Matrix products round their operands to the compute dtype; everything between
them, and the residual stream, is float32 (`roc.core.products`).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from roc.core import products
from roc.device import lora, rotary

ROPE_SCALINGS = ("llama3", "yarn")
Dtype = Literal["float32", "bfloat16"]
NO_ADAPTERS = lora.LoraConfig()
_DEVIATION = 0.02  # of fresh embeddings


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
  # How rotary positions are stretched beyond the length of pretraining: as
  # Llama 3.1 does ("llama3") or "yarn"; a factor of 1 stretches nothing.
  rope_scaling: str = "llama3"
  rope_factor: float = 1.0
  rope_low_freq_factor: float = 1.0
  rope_high_freq_factor: float = 4.0
  rope_original_length: int = 8192
  rope_beta_fast: float = 32.0
  rope_beta_slow: float = 1.0
  rope_attention_factor: float = 1.0  # of queries and of keys, with yarn
  norm_eps: float = 1e-6
  tie_embeddings: bool = True
  # Of the operands of matrix products and of the cache; all else is float32.
  dtype: Dtype = "float32"
  # "full": recompute each layer in the backward pass.
  remat: Literal["none", "full"] = "none"
  # "xla": plain operations; "pallas": kernels that only a TPU runs; "auto":
  # those on a TPU if the heads suit them, else plain operations.
  attention: Literal["auto", "xla", "pallas"] = "auto"


# Keys and values go in, the attention's output and the new cache come out.
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


class Linear(nnx.Linear):
  """Weights as of `nnx.Linear`, a float32 result, and maybe an adapter."""

  def __init__(
    self, *args: Any, rank: int = 0, scale: float = 1.0, **settings: Any
  ):
    super().__init__(*args, **settings)
    self.rank = rank
    self.scale = scale
    if rank:  # as shapes; `lora.init` has the numbers
      self.lora_a = nnx.Param(jnp.zeros((self.in_features, rank)))
      self.lora_b = nnx.Param(jnp.zeros((rank, self.out_features)))

  def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
    """[B, T, in] float32 -> [B, T, out] float32."""
    times = functools.partial(products.product, "btd,df->btf", self.dtype)
    out = times(inputs, self.kernel[...])
    if self.rank:
      low = times(inputs, self.lora_a[...])
      out += self.scale * times(low, self.lora_b[...])
    return out if self.bias is None else out + self.bias[...][None, None]


class Block(nnx.Module):
  """One layer: attention and SwiGLU, each behind an RMSNorm and a residual."""

  def __init__(
    self,
    config: ModelConfig,
    adapters: lora.LoraConfig,
    *,
    rngs: nnx.Rngs,
    is_fused: bool = False,
  ):
    c = config

    def linear(name, n_in, n_out, scale=1.0, use_bias=False):
      init = nnx.initializers.variance_scaling(scale, "fan_in", "normal")
      return Linear(
        n_in,
        n_out,
        rank=adapters.rank_of(name),
        scale=adapters.scale,
        use_bias=use_bias,
        dtype=jnp.dtype(c.dtype),
        kernel_init=init,
        rngs=rngs,
      )

    def qkv_linear(name, n_heads):
      n_out = n_heads * c.head_dim
      return linear(name, c.d_model, n_out, use_bias=c.qkv_bias)

    def norm(n):
      return nnx.RMSNorm(n, epsilon=c.norm_eps, dtype=jnp.float32, rngs=rngs)

    residual_scale = 1.0 / (2 * c.n_layers)
    self.config = c
    self.is_fused = is_fused
    self.attn_norm = norm(c.d_model)
    if is_fused:
      self.qkv_proj = qkv_linear("qkv_proj", c.n_heads + 2 * c.n_kv_heads)
      self.gate_up_proj = linear("gate_up_proj", c.d_model, 2 * c.d_ff)
    else:
      self.q_proj = qkv_linear("q_proj", c.n_heads)
      self.k_proj = qkv_linear("k_proj", c.n_kv_heads)
      self.v_proj = qkv_linear("v_proj", c.n_kv_heads)
      self.gate_proj = linear("gate_proj", c.d_model, c.d_ff)
      self.up_proj = linear("up_proj", c.d_model, c.d_ff)
    if c.qk_norm:
      self.q_norm = norm(c.head_dim)
      self.k_norm = norm(c.head_dim)
    n_values = c.n_heads * c.head_dim
    self.o_proj = linear("o_proj", n_values, c.d_model, residual_scale)
    self.mlp_norm = norm(c.d_model)
    self.down_proj = linear("down_proj", c.d_ff, c.d_model, residual_scale)

  def __call__(
    self, x_BTD: jax.Array, turn: rotary.Rotation, attend: Attend
  ) -> tuple[jax.Array, Any]:
    """Returns the residual stream after this layer and what `attend` kept."""
    c = self.config
    lead = x_BTD.shape[:2]
    h_BTD = self.attn_norm(x_BTD)
    q_BTHE, k_BTKE, v_BTKE = (
      x.reshape(*lead, -1, c.head_dim) for x in self._qkv(h_BTD)
    )
    if c.qk_norm:
      q_BTHE, k_BTKE = self.q_norm(q_BTHE), self.k_norm(k_BTKE)
    out_BTHE, kept = attend(turn(q_BTHE), turn(k_BTKE), v_BTKE)
    x_BTD += self.o_proj(out_BTHE.reshape(*lead, -1))
    h_BTD = self.mlp_norm(x_BTD)
    gate_BTF, up_BTF = self._gate_up(h_BTD)
    x_BTD += self.down_proj(jax.nn.silu(gate_BTF) * up_BTF)
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
    self,
    config: ModelConfig,
    adapters: lora.LoraConfig = NO_ADAPTERS,
    *,
    rngs: nnx.Rngs,
    is_fused: bool = False,
  ):
    c = config

    @nnx.split_rngs(splits=c.n_layers)
    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(rngs):
      return Block(c, adapters, rngs=rngs, is_fused=is_fused)

    self.config = c
    self.embed = nnx.Embed(
      c.vocab_size,
      c.d_model,
      embedding_init=nnx.initializers.normal(_DEVIATION),
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
        kernel_init=nnx.initializers.normal(_DEVIATION),
        rngs=rngs,
      )

  def rows(self, tokens_BT: jax.Array) -> jax.Array:
    """Embeddings of ids, [B, T, D] float32.

    Not `embed()`, which would cast the whole table for a few rows of it.
    """
    x_BTD = jnp.take(self.embed.embedding[...], tokens_BT, axis=0)
    return products.through(x_BTD, self.config.dtype)


def abstract(
  config: ModelConfig,
  adapters: lora.LoraConfig = NO_ADAPTERS,
  *,
  is_fused: bool,
) -> Transformer:
  """The network with shapes in place of arrays."""
  return nnx.eval_shape(
    lambda: Transformer(config, adapters, rngs=nnx.Rngs(0), is_fused=is_fused)
  )
