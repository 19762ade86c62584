"""Weights between Hugging Face folders (safetensors) and the parameter tree.

A folder holds `model.safetensors`, or several files and an index. Every device
reads its own part of every tensor, one parameter after the other, so a process
never holds the whole model on the host. Matrices there are [out, in], ours are
[in, out]; layers there are apart, ours are stacked.
"""

import contextlib
import dataclasses
import json
import math
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from roc import errors
from roc.device import families, sharding
from roc.device import model as model_lib

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_SHARD_BYTES = 4 << 30
_PLACED_BYTES = 256 << 20  # read and handed over at a time
_N_NAMED = 5  # names in a message
_IGNORED = re.compile(r".*\.rotary_emb\.inv_freq")  # old exports hold it

# Ours -> theirs; matrices are transposed, embeddings and vectors are not.
_LAYER = "model.layers.{}."
_NAMES = {
  "embed/embedding": "model.embed_tokens.weight",
  "final_norm/scale": "model.norm.weight",
  "head/kernel": "lm_head.weight",
  "layers/attn_norm/scale": _LAYER + "input_layernorm.weight",
  "layers/mlp_norm/scale": _LAYER + "post_attention_layernorm.weight",
}
for _name in ("q_norm", "k_norm"):
  _NAMES[f"layers/{_name}/scale"] = f"{_LAYER}self_attn.{_name}.weight"
for _name in ("q_proj", "k_proj", "v_proj", "o_proj"):
  _NAMES[f"layers/{_name}/kernel"] = f"{_LAYER}self_attn.{_name}.weight"
  _NAMES[f"layers/{_name}/bias"] = f"{_LAYER}self_attn.{_name}.bias"
for _name in ("gate_proj", "up_proj", "down_proj"):
  _NAMES[f"layers/{_name}/kernel"] = f"{_LAYER}mlp.{_name}.weight"


@dataclasses.dataclass(frozen=True)
class Leaf:
  """A parameter and the tensors that it is made of."""

  path: str
  shape: tuple[int, ...]

  @property
  def is_stacked(self) -> bool:
    return self.path.startswith("layers/")

  @property
  def is_transposed(self) -> bool:
    return self.path.endswith("/kernel")

  @property
  def is_vector(self) -> bool:
    return self.path.endswith(("/scale", "/bias"))

  @property
  def names(self) -> list[str]:
    """Of the tensors, layer by layer."""
    name = _NAMES[self.path]
    n = self.shape[0] if self.is_stacked else 1
    return [name.format(i) for i in range(n)]

  @property
  def tensor_shape(self) -> tuple[int, ...]:
    """Of each of them."""
    shape = self.shape[1:] if self.is_stacked else self.shape
    return shape[::-1] if self.is_transposed else shape


def load(
  folder: str | pathlib.Path,
  policy: model_lib.Policy,
  mesh: jax.sharding.Mesh,
  *,
  dtype: str = "float32",
) -> model_lib.Params:
  """Reads a folder's weights into parameters, laid out over a mesh.

  Args:
    folder: with safetensors of float32, float16 or bfloat16.
    policy: of the same shapes.
    mesh: that the parameters are for.
    dtype: of the matrices; vectors are float32.

  Raises:
    errors.UserError: a file is missing or cut off, or tensors are missing,
      left over or of other shapes; names them.
  """
  with contextlib.ExitStack() as stack:
    files = _Files(pathlib.Path(folder), stack)
    leaves = jax.tree_util.tree_map_with_path(
      lambda path, x: Leaf(sharding.path_name(path), x.shape),
      policy.abstract_params,
    )
    files.check(jax.tree.leaves(leaves), policy.config.tie_embeddings)

    def read(leaf: Leaf) -> jax.Array:
      kind = np.float32 if leaf.is_vector else jnp.dtype(dtype)
      # One after the other, so that the host holds one at a time.
      return jax.block_until_ready(_place(files, leaf, mesh, kind))

    return jax.tree.map(read, leaves)


def _place(
  files: "_Files", leaf: Leaf, mesh: jax.sharding.Mesh, dtype: Any
) -> jax.Array:
  """A parameter on its devices, a few layers at a time.

  The layers of one matrix of a 14B model are 14 GB in float32: stacked on the
  host first, they would be most of what it holds.
  """
  where = sharding.param_sharding(mesh, leaf.path, leaf.shape)

  def read(names: Sequence[str]) -> jax.Array:
    shape = (len(names), *leaf.shape[1:]) if leaf.is_stacked else leaf.shape
    part = lambda index: files.read(leaf, names, index, dtype)
    return jax.make_array_from_callback(shape, where, part)

  n_layers = leaf.shape[0] if leaf.is_stacked else 1
  layer_bytes = math.prod(leaf.shape) // n_layers * jnp.dtype(dtype).itemsize
  n = max(1, _PLACED_BYTES // layer_bytes)
  if n >= n_layers:
    return read(leaf.names)
  fill = lambda: jnp.zeros(leaf.shape, dtype)
  whole = jax.jit(fill, out_shardings=where)()
  put = jax.jit(
    lambda whole, part, first: jax.lax.dynamic_update_slice_in_dim(
      whole, part, first, axis=0
    ),
    donate_argnums=0,
    out_shardings=where,
  )
  for first in range(0, n_layers, n):
    part = read(leaf.names[first : first + n])
    whole = jax.block_until_ready(put(whole, part, first))
  return whole


class _Files:
  """The tensors of a folder."""

  def __init__(self, folder: pathlib.Path, stack: contextlib.ExitStack):
    self._folder = folder
    self._file_of: dict[str, str] = {}
    self._open: dict[str, Any] = {}
    for name in self._file_names():
      path = folder / name
      try:
        opened = stack.enter_context(safetensors.safe_open(path, "numpy"))
      except FileNotFoundError as e:
        raise errors.UserError(f"{path} is missing") from e
      except (safetensors.SafetensorError, OSError) as e:
        raise errors.UserError(
          f"{path} is no whole safetensors file ({e}); fetch it again"
        ) from e
      self._open[name] = opened
      self._file_of |= dict.fromkeys(opened.keys(), name)

  def _file_names(self) -> list[str]:
    path = self._folder / INDEX_FILE
    if not path.exists():
      if not (self._folder / SINGLE_FILE).exists():
        raise errors.UserError(
          f"{self._folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}"
        )
      return [SINGLE_FILE]
    try:
      names = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
      return sorted(set(names.values()))
    except (ValueError, KeyError, AttributeError, TypeError) as e:
      raise errors.UserError(f"{path} is no index of safetensors") from e

  def check(self, leaves: list[Leaf], is_tied: bool) -> None:
    """Raises a UserError unless the tensors are those of the model."""
    wanted = {name: leaf for leaf in leaves for name in leaf.names}
    missing = [name for name in wanted if name not in self._file_of]
    if missing:
      raise self._error("lacks", missing)
    extra = {_NAMES["head/kernel"]} if is_tied else set()
    surplus = [
      name
      for name in self._file_of
      if name not in wanted | dict.fromkeys(extra) and not _IGNORED.match(name)
    ]
    if surplus:
      raise self._error("holds, and the model has no place for,", surplus)
    for name, leaf in wanted.items():
      shape = tuple(self._slice(name).get_shape())
      if shape != leaf.tensor_shape:
        raise errors.UserError(
          f"{self._folder / self._file_of[name]}: {name} is of shape {shape},"
          f" and config.json says {leaf.tensor_shape}"
        )

  def _error(self, what: str, names: list[str]) -> errors.UserError:
    more = len(names) - _N_NAMED
    listed = ", ".join(names[:_N_NAMED])
    rest = f" and {more} more" if more > 0 else ""
    return errors.UserError(f"{self._folder} {what} {listed}{rest}")

  def _slice(self, name: str) -> Any:
    return self._open[self._file_of[name]].get_slice(name)

  def read(
    self,
    leaf: Leaf,
    names: Sequence[str],
    index: tuple[slice, ...],
    dtype: Any,
  ) -> np.ndarray:
    """A part of a parameter that is made of some of its tensors."""
    if not leaf.is_stacked:
      return self._read(leaf, names[0], index, dtype)
    names = names[index[0]]
    layer = self._read(leaf, names[0], index[1:], dtype)
    part = np.empty((len(names), *layer.shape), dtype)
    part[0] = layer
    for i, name in enumerate(names[1:], 1):
      part[i] = self._read(leaf, name, index[1:], dtype)
    return part

  def _read(
    self, leaf: Leaf, name: str, index: tuple[slice, ...], dtype: Any
  ) -> np.ndarray:
    tensor = self._slice(name)[index[::-1] if leaf.is_transposed else index]
    tensor = tensor.T if leaf.is_transposed else tensor
    return np.asarray(tensor, dtype)


def export(
  params: model_lib.Params,
  config: model_lib.ModelConfig,
  folder: str | pathlib.Path,
  *,
  dtype: str = "bfloat16",
  shard_bytes: int = _SHARD_BYTES,
) -> None:
  """Writes a folder that `load`, transformers and others read.

  Args:
    params: as from `Policy.init`.
    config: of the model.
    folder: that must not exist yet.
    dtype: float32, float16 or bfloat16.
    shard_bytes: most bytes of a file.

  Raises:
    errors.UserError: the folder exists, or cannot be written; nothing of it is
      left behind.
  """
  folder = pathlib.Path(folder)
  partial = folder.with_name(folder.name + ".partial")
  if folder.exists():
    raise errors.UserError(f"{folder} exists; name a new folder")
  try:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    fields = families.to_fields(config, dtype)
    text = json.dumps(fields, indent=2) + "\n"
    (partial / families.CONFIG_FILE).write_text(text, encoding="utf-8")
    _write_shards(partial, _tensors(params, dtype), shard_bytes)
    partial.rename(folder)
  except OSError as e:
    shutil.rmtree(partial, ignore_errors=True)
    raise errors.UserError(f"{folder} cannot be written: {e.strerror}") from e


def _tensors(
  params: model_lib.Params, dtype: str
) -> Iterator[tuple[str, np.ndarray]]:
  """One tensor after the other, each fetched when its turn comes."""
  for path, x in jax.tree_util.tree_leaves_with_path(params):
    leaf = Leaf(sharding.path_name(path), x.shape)
    for i, name in enumerate(leaf.names):
      tensor = np.asarray(x[i] if leaf.is_stacked else x, jnp.dtype(dtype))
      tensor = tensor.T if leaf.is_transposed else tensor
      yield name, np.ascontiguousarray(tensor)


def _write_shards(
  folder: pathlib.Path,
  tensors: Iterator[tuple[str, np.ndarray]],
  shard_bytes: int,
) -> None:
  shards: list[list[str]] = []
  held: dict[str, np.ndarray] = {}
  n_held = n_all = 0

  def flush() -> None:
    name = f"part-{len(shards):05}.safetensors"
    _save(held, folder / name)
    shards.append(list(held))
    held.clear()

  for name, tensor in tensors:
    if held and n_held + tensor.nbytes > shard_bytes:
      flush()
      n_held = 0
    held[name] = tensor
    n_held += tensor.nbytes
    n_all += tensor.nbytes
  flush()
  if len(shards) == 1:
    (folder / "part-00000.safetensors").rename(folder / SINGLE_FILE)
    return
  weight_map = {}
  for i, names in enumerate(shards):
    final = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
    (folder / f"part-{i:05}.safetensors").rename(folder / final)
    weight_map |= dict.fromkeys(names, final)
  index = {"metadata": {"total_size": n_all}, "weight_map": weight_map}
  (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _save(tensors: Mapping[str, np.ndarray], path: pathlib.Path) -> None:
  safetensors.numpy.save_file(dict(tensors), path, metadata={"format": "pt"})
