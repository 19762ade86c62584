"""Decoder-only transformers of one block, as pure functions of params.

`network` has the modules. Layers are stacked on a leading axis and scanned, so
compile time does not grow with depth.

Flax NNX builds the module once; `Policy` splits it at the border. From there on
the parameters are a plain nested dict of arrays and every method is a pure
function of them, used by the rollout engine and by the train step alike. The
engine may hold them *fused* (`Policy.fuse`): the same block with its input
projections side by side, fewer and larger products for few rows.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from roc.core import products
from roc.device import attention as attention_lib
from roc.device import lora, network, paged, paged_tpu, rotary

ModelConfig = network.ModelConfig
ROPE_SCALINGS = network.ROPE_SCALINGS
Params = dict[str, Any]
Pool = paged.Pool | paged_tpu.Pool


class Policy:
  """The model as pure functions of `params` (a nested dict of arrays).

  Holds only static structure: build one, close over it, jit what uses it.
  """

  def __init__(
    self,
    config: ModelConfig,
    mesh: jax.sharding.Mesh | None = None,
    n_ids: int = 0,
    adapters: lora.LoraConfig = network.NO_ADAPTERS,
  ):
    """Builds a policy.

    Args:
      config: shapes.
      mesh: that `hidden` runs on, which the Pallas kernels have to know; None:
        a single device.
      n_ids: of the tokenizer; those beyond are never drawn, see
        `logprobs.mask_ids`. 0: the whole vocabulary.
      adapters: that parameters may have (`lora.join`).

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
    self.lora = adapters
    self._suits_pallas = not objection
    self._split = functools.cache(
      lambda is_fused, is_joined: nnx.split(
        network.abstract(
          config,
          adapters if is_joined else network.NO_ADAPTERS,
          is_fused=is_fused,
        )
      )
    )
    plain = self._split(False, False)[1]
    self.abstract_params: Params = nnx.to_pure_dict(plain)
    self._widths = {
      name: leaf["kernel"].shape[-1]
      for name, leaf in self.abstract_params["layers"].items()
      if "kernel" in leaf
    }
    # Compiled once for all engines.
    self._fuse = jax.jit(self.fuse)
    self._round = jax.jit(
      lambda tree: jax.tree.map(lambda x: products.rounded(x, self.dtype), tree)
    )

  @property
  def uses_pallas(self) -> bool:
    """Whether attention runs in Pallas kernels (`ModelConfig.attention`)."""
    if self.config.attention != "auto":
      return self.config.attention == "pallas"
    return self._suits_pallas and jax.default_backend() == "tpu"

  @property
  def dtype(self) -> jnp.dtype:
    """Of the operands of products, those of the head included."""
    return jnp.dtype(self.config.dtype)

  def init(self, key: jax.Array) -> Params:
    """Fresh float32 parameters; consumes `key`. Jit with out_shardings."""
    module = network.Transformer(self.config, rngs=nnx.Rngs(params=key))
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))

  def init_adapters(self, key: jax.Array) -> Params:
    """Fresh adapters, which add nothing yet; consumes `key`."""
    return lora.init(key, self.abstract_params, self.lora)

  def join(self, base: Params, adapters: Params) -> Params:
    """Base, fused or not, and adapters as from `init_adapters`, in one tree."""
    if _is_fused(base):
      adapters = lora.fuse(adapters, self._widths)
    return lora.join(base, adapters)

  def merged(self, params: Params) -> Params:
    """The base alone, float32, with what adapters add added up."""
    return lora.merged(params, self.lora)

  def _module(self, params: Params) -> network.Transformer:
    graphdef, abstract = self._split(_is_fused(params), lora.is_joined(params))
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

    The same matrices in the compute dtype (norms and biases stay float32), with
    q, k and v side by side, gate and up side by side, and the head as its own
    matrix. All methods take either form.
    """
    params, adapters = lora.split(params)
    layers = dict(params["layers"])

    def beside(*names: str) -> Params:
      parts = [layers.pop(name) for name in names]
      join = lambda *xs: jnp.concatenate(xs, axis=-1)
      return jax.tree.map(join, *parts)

    layers |= {
      "qkv_proj": beside("q_proj", "k_proj", "v_proj"),
      "gate_up_proj": beside("gate_proj", "up_proj"),
    }
    head = {"kernel": self.unembedding(params)}
    fused = self.join(params | {"layers": layers, "head": head}, adapters)
    return jax.tree_util.tree_map_with_path(
      lambda path, x: (
        products.rounded(x, self.dtype) if lora.is_matrix(path) else x
      ),
      fused,
    )

  def hold(self, params: Params) -> Params:
    """`fuse`, compiled; what is fused already is shared and not copied."""
    if not _is_fused(params):
      return self._fuse(params)
    base, adapters = lora.split(params)
    return lora.join(base, self._round(adapters))

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
        return attention_lib.splash(
          *(q, k, v, segment_BT), dtype=self.dtype, mesh=self.mesh
        ), None
      heads_first = lambda x: x.transpose(0, 2, 1, 3)
      args = q, heads_first(k), heads_first(v), may_BTT
      return attention_lib.grouped(*args, dtype=self.dtype), None

    module = self._module(params)
    layer_def, layers = nnx.split(module.layers)
    turn = self._rotation(position_BT)

    def body(x_BTD, layer):
      x_BTD, _ = nnx.merge(layer_def, layer)(x_BTD, turn, attend)
      return x_BTD, None

    if self.config.remat == "full":
      body = jax.checkpoint(body)
    x_BTD, _ = jax.lax.scan(body, module.rows(tokens_BT), layers)
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

    carry = (module.rows(tokens_BT), pool)
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
    if c.rope_scaling == "yarn":
      frequency_E = rotary.yarn(
        frequency_E,
        c.rope_theta,
        c.rope_factor,
        c.rope_original_length,
        c.rope_beta_fast,
        c.rope_beta_slow,
      )
      return rotary.Rotation(position_BT, frequency_E, c.rope_attention_factor)
    if c.rope_factor != 1.0:
      frequency_E = rotary.stretch(
        frequency_E,
        c.rope_factor,
        c.rope_low_freq_factor,
        c.rope_high_freq_factor,
        c.rope_original_length,
      )
    return rotary.Rotation(position_BT, frequency_E)


def _is_fused(params: Params) -> bool:
  return "qkv_proj" in params["layers"]
