"""Low-rank adapters: a frozen base, and a small product beside some products.

x @ W becomes x @ W + alpha / rank * (x @ A) @ B (LoRA, arXiv 2106.09685). B is
zero at first, so that training starts from the base to the bit. Only A and B
are trained, kept by the optimizer and saved; the base is known again by its
`fingerprint`. Engine and trainer compute the two products alike, so that steps
too small to show in a bfloat16 weight are not lost in sampling; they are added
up into one matrix only on export (`merged`).

Trees: the *base* is what `Policy.init` makes, `adapters` hold A and B alone
under the same names, and `join` puts both into one tree that every method of
`Policy` takes.
"""

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from roc.core import products

TARGETS = (
  *("q_proj", "k_proj", "v_proj", "o_proj"),
  *("gate_proj", "up_proj", "down_proj"),
)
# Projections of the same input, which `Policy.fuse` puts side by side.
FUSED = {
  "qkv_proj": ("q_proj", "k_proj", "v_proj"),
  "gate_up_proj": ("gate_proj", "up_proj"),
}
A, B = "lora_a", "lora_b"
_STREAM = 0x10A  # apart from that of the base, which may have the same key
_MATRICES = ("kernel", "embedding", A, B)

Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """Training of low-rank adapters in place of all parameters."""

  rank: int = 0  # of an adapter; 0: none, all parameters are trained
  alpha: float = 32.0  # alpha / rank scales what adapters add
  # Projections of a layer that get one.
  targets: tuple[str, ...] = TARGETS
  # Of the frozen matrices. Adapters and their optimizer are float32.
  base_dtype: Literal["bfloat16", "float32"] = "bfloat16"

  @property
  def scale(self) -> float:
    """Of what adapters add."""
    return self.alpha / max(self.rank, 1)

  def rank_of(self, name: str) -> int:
    """Of the adapter of a projection, fused or not; 0: it has none."""
    return self.rank * sum(
      member in self.targets for member in FUSED.get(name, (name,))
    )


def init(key: jax.Array, base: Tree, config: LoraConfig) -> Tree:
  """Fresh adapters: A as a linear layer's weights in PyTorch and PEFT, B zero.

  Args:
    key: consumed.
    base: arrays or shapes of the base.
    config: with a rank.
  """
  layers = {}
  stream = jax.random.fold_in(key, _STREAM)
  uniform = jax.nn.initializers.variance_scaling(
    1 / 3, "fan_in", "uniform", batch_axis=0
  )
  for i, name in enumerate(TARGETS):
    if name not in config.targets:
      continue
    n_layers, n_in, n_out = base["layers"][name]["kernel"].shape
    layers[name] = {
      A: uniform(jax.random.fold_in(stream, i), (n_layers, n_in, config.rank)),
      B: jnp.zeros((n_layers, config.rank, n_out)),
    }
  return {"layers": layers}


def join(base: Tree, adapters: Tree) -> Tree:
  """Both in one tree, which shares their arrays."""
  layers = {
    name: leaf | adapters["layers"].get(name, {})
    for name, leaf in base["layers"].items()
  }
  return base | {"layers": layers}


def split(params: Tree) -> tuple[Tree, Tree]:
  """What `join` joined; adapters without layers where there are none."""
  layers, adapters = {}, {}
  for name, leaf in params["layers"].items():
    layers[name] = {k: x for k, x in leaf.items() if k not in (A, B)}
    if A in leaf:
      adapters[name] = {A: leaf[A], B: leaf[B]}
  return params | {"layers": layers}, {"layers": adapters}


def is_joined(params: Tree) -> bool:
  """Whether a tree holds adapters."""
  return any(A in leaf for leaf in params["layers"].values())


def fuse(adapters: Tree, widths: Mapping[str, int]) -> Tree:
  """Adapters for projections that lie side by side (`FUSED`).

  The A of several stand side by side, their B on the diagonal of a matrix that
  is zero elsewhere: the same sums, in fewer products.

  Args:
    adapters: as from `init`.
    widths: columns of each unfused projection.
  """
  layers = dict(adapters["layers"])
  for fused, members in FUSED.items():
    found = {name: layers.pop(name) for name in members if name in layers}
    if not found:
      continue
    parts, start = [], 0
    for name in members:
      after = sum(widths[m] for m in members) - start - widths[name]
      if name in found:
        pad = ((0, 0), (0, 0), (start, after))
        parts.append(jnp.pad(found[name][B], pad))
      start += widths[name]
    layers[fused] = {
      A: jnp.concatenate([leaf[A] for leaf in found.values()], axis=-1),
      B: jnp.concatenate(parts, axis=1),
    }
  return {"layers": layers}


def merged(params: Tree, config: LoraConfig) -> Tree:
  """The base with its adapters added up, all in float32."""
  base, adapters = split(params)
  base = jax.tree.map(lambda x: x.astype(jnp.float32), base)
  layers = dict(base["layers"])
  for name, leaf in adapters["layers"].items():
    more = jnp.einsum("lir,lro->lio", leaf[A], leaf[B])
    kernel = layers[name]["kernel"] + config.scale * more
    layers[name] = layers[name] | {"kernel": kernel}
  return base | {"layers": layers}


def is_matrix(path: tuple[Any, ...]) -> bool:
  """Whether a leaf enters products, and not a norm or a bias."""
  return path[-1].key in _MATRICES


def frozen(base: Tree, config: LoraConfig) -> Tree:
  """The base as it is kept: matrices in `base_dtype`, vectors in float32."""

  def cast(path, x):
    dtype = config.base_dtype if is_matrix(path) else jnp.float32
    return products.rounded(x, dtype)

  return jax.tree_util.tree_map_with_path(cast, base)


def sealed(base: Tree, config: LoraConfig) -> tuple[Tree, jax.Array]:
  """`frozen`, and the `fingerprint` of that."""
  base = frozen(base, config)
  return base, fingerprint(base)


def fingerprint(base: Tree) -> jax.Array:
  """Two numbers that tell bases apart, however they lie on devices.

  Sums modulo 2^32 of a hash of every number and its place; no defence against
  forgery.

  Returns:
    uint32 [2].
  """
  total_2 = jnp.zeros(2, jnp.uint32)
  for path, x in jax.tree_util.tree_leaves_with_path(base):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    salt = zlib.crc32(f"{name} {x.dtype} {x.shape}".encode())
    total_2 += _hash(x, salt)
  return total_2


def _hash(x: jax.Array, salt: int) -> jax.Array:
  u32 = jnp.uint32
  bits = {2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
  value = jax.lax.bitcast_convert_type(x, bits).astype(u32)
  place = jnp.full(x.shape, salt, u32)
  for axis in range(x.ndim):
    place = place * u32(x.shape[axis]) + jax.lax.broadcasted_iota(
      u32, x.shape, axis
    )
  mixed = (value * u32(0x9E3779B1) ^ place) * u32(0x85EBCA77)
  mixed = (mixed ^ (mixed >> 15)) * u32(0xC2B2AE3D)
  mixed ^= mixed >> 13
  again = (mixed + place) * u32(0x27D4EB2F)
  again ^= again >> 16
  return jnp.stack([jnp.sum(mixed, dtype=u32), jnp.sum(again, dtype=u32)])
