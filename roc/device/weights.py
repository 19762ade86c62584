"""Weights between Hugging Face folders (safetensors) and the parameter tree.

Matrices there are [out, in], ours are [in, out]; layers there are apart, ours
are stacked. `load` makes room for the stacks on the devices and then reads
tensor by tensor: every device gets its own part, in the file's own type, and
converts it as it puts it into place. So the host never holds more than one
tensor, however large the model.
"""

import contextlib
import dataclasses
import functools
import json
import math
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from roc import errors, places
from roc.device import families, sharding, tensor_files
from roc.device import model as model_lib

SINGLE_FILE = tensor_files.SINGLE_FILE
INDEX_FILE = tensor_files.INDEX_FILE
_SHARD_BYTES = 2 << 30
_MODE = 0o644
_N_NAMED = 5  # names in a message
_IGNORED = re.compile(r".*\.rotary_emb\.inv_freq")  # old exports hold it

# Ours -> theirs; matrices are transposed, embeddings and vectors are not.
_PREFIX = "model."
_LAYER = _PREFIX + "layers.{}."
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

  def dtype(self, of_matrices: str) -> jnp.dtype:
    """Of the parameter: vectors are few, and stay float32."""
    return jnp.dtype("float32" if self.is_vector else of_matrices)

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
  folder: str | places.Path,
  policy: model_lib.Policy,
  mesh: jax.sharding.Mesh,
  *,
  dtype: str = "float32",
) -> model_lib.Params:
  """Reads a folder's weights into parameters, laid out over a mesh.

  Args:
    folder: with safetensors of float32, float16 or bfloat16; also in an object
      store, of which one file at a time is copied to this machine.
    policy: of the same shapes.
    mesh: that the parameters are for.
    dtype: of the matrices; vectors are float32.

  Raises:
    errors.UserError: a file is missing or cut off, or tensors are missing,
      left over or of other shapes or types; names them.
  """
  source = _with_prefix(tensor_files.Folder(places.as_path(folder)))
  leaves = jax.tree_util.tree_map_with_path(
    lambda path, x: Leaf(sharding.path_name(path), x.shape),
    policy.abstract_params,
  )
  _check(source, jax.tree.leaves(leaves), policy.config.tie_embeddings)
  place_of = {
    name: (leaf, i)
    for leaf in jax.tree.leaves(leaves)
    for i, name in enumerate(leaf.names)
  }
  placed = _stacks(jax.tree.leaves(leaves), mesh, dtype)
  for name, tensor in source.read(list(place_of)):
    leaf, i = place_of[name]
    part = _place(tensor, leaf, mesh)
    where = sharding.param_sharding(mesh, leaf.path, leaf.shape)
    if leaf.is_stacked:
      part = _put_layer(where)(placed[leaf.path], part, i)
    else:
      part = _copy_as(where, leaf.dtype(dtype))(part)
    # One after the other, so that the host holds one at a time.
    placed[leaf.path] = jax.block_until_ready(part)
    del tensor, part
  return jax.tree.map(lambda leaf: placed[leaf.path], leaves)


def _with_prefix(source: tensor_files.Folder) -> tensor_files.Folder:
  """Names of a model that was saved without its head as those of a whole one.

  transformers leaves `model.` out of a base model's names, and adds it as it
  loads one.
  """
  if not any(name.startswith(_PREFIX) for name in source.tensors):
    source.tensors = {
      name if name == _NAMES["head/kernel"] else _PREFIX + name: tensor
      for name, tensor in source.tensors.items()
    }
  return source


def _stacks(
  leaves: list[Leaf], mesh: jax.sharding.Mesh, dtype: str
) -> dict[str, jax.Array]:
  """Room on the devices for what has several layers."""
  stacked = [leaf for leaf in leaves if leaf.is_stacked]
  make = lambda: {x.path: jnp.zeros(x.shape, x.dtype(dtype)) for x in stacked}
  where = {
    x.path: sharding.param_sharding(mesh, x.path, x.shape) for x in stacked
  }
  return jax.jit(make, out_shardings=where)()


def _place(
  tensor: np.ndarray, leaf: Leaf, mesh: jax.sharding.Mesh
) -> jax.Array:
  """A tensor in its own type, its parts on the devices that keep them."""
  tensor = tensor.T if leaf.is_transposed else tensor
  if tensor.dtype == np.float16:  # not every accelerator knows it
    tensor = tensor.astype(np.float32)
  where = sharding.param_sharding(mesh, leaf.path, leaf.shape)
  if leaf.is_stacked:
    spec = jax.sharding.PartitionSpec(*where.spec[1:])
    where = jax.sharding.NamedSharding(mesh, spec)
  part = lambda index: tensor[index]
  return jax.make_array_from_callback(tensor.shape, where, part)


@functools.cache
def _put_layer(where: jax.sharding.NamedSharding) -> Callable[..., jax.Array]:
  """Sets a layer of a stack, in place."""
  put = lambda stack, layer, i: jax.lax.dynamic_update_index_in_dim(
    stack, layer.astype(stack.dtype), i, axis=0
  )
  return jax.jit(put, donate_argnums=0, out_shardings=where)


@functools.cache
def _copy_as(
  where: jax.sharding.NamedSharding, dtype: Any
) -> Callable[..., jax.Array]:
  """Never the array itself, which may lie in the file's own pages."""
  copy = lambda x: jnp.copy(x).astype(dtype)
  return jax.jit(copy, out_shardings=where)


def _check(
  source: tensor_files.Folder, leaves: list[Leaf], is_tied: bool
) -> None:
  """Raises a UserError unless the tensors are those of the model."""
  wanted = {name: leaf for leaf in leaves for name in leaf.names}
  missing = [name for name in wanted if name not in source.tensors]
  if missing:
    raise _error(source, "lacks", missing)
  allowed = {*wanted, *([_NAMES["head/kernel"]] if is_tied else [])}
  surplus = [
    name
    for name in source.tensors
    if name not in allowed and not _IGNORED.match(name)
  ]
  if surplus:
    raise _error(source, "holds, and the model has no place for,", surplus)
  for name, leaf in wanted.items():
    tensor = source.tensors[name]
    path = source.path / tensor.file
    if tensor.shape != leaf.tensor_shape:
      raise errors.UserError(
        f"{path}: {name} is of shape {tensor.shape}, and config.json says"
        f" {leaf.tensor_shape}"
      )
    if tensor.kind not in tensor_files.DTYPES:
      raise errors.UserError(
        f"{path}: {name} is of type {tensor.kind}; weights must be"
        f" {', '.join(tensor_files.DTYPES)}"
      )


def _error(
  source: tensor_files.Folder, what: str, names: list[str]
) -> errors.UserError:
  more = len(names) - _N_NAMED
  listed = ", ".join(names[:_N_NAMED])
  rest = f" and {more} more" if more > 0 else ""
  return errors.UserError(f"{source.path} {what} {listed}{rest}")


def export(
  params: model_lib.Params,
  config: model_lib.ModelConfig,
  folder: str | places.Path,
  *,
  dtype: str = "bfloat16",
  shard_bytes: int = _SHARD_BYTES,
  fields: Mapping[str, Any] | None = None,
  side_files: Sequence[pathlib.Path] = (),
) -> None:
  """Writes a folder that `load`, transformers and others read.

  It gets its name when it is whole. In an object store, where nothing can be
  renamed, config.json, without which it is none, is written last; one file at a
  time is made on this machine first.

  Args:
    params: as from `Policy.init`.
    config: of the model.
    folder: that must not exist yet.
    dtype: float32, float16 or bfloat16.
    shard_bytes: most bytes of a file.
    fields: all of config.json, where it is not to be ours.
    side_files: such as a tokenizer, that are copied into it; of a folder what
      is in it.

  Raises:
    errors.UserError: the folder exists, or cannot be written; nothing of it is
      left behind.
  """
  folder = places.as_path(folder)
  with places.reaching(folder, "written"):
    if folder.exists():
      raise errors.UserError(f"{folder} exists; name a new folder")
    partial = folder
    if isinstance(folder, pathlib.Path):
      partial = folder.with_name(f".{folder.name}.unfinished")
    try:
      places.remove(partial)
      partial.mkdir(parents=True)
      _write_shards(partial, params, dtype, shard_bytes)
      for path in side_files:
        if path.is_dir():  # of chat templates
          (partial / path.name).mkdir()
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
          where = partial / file.relative_to(path.parent).as_posix()
          places.copy_file(file, where)
      fields = families.to_fields(config, dtype) if fields is None else fields
      text = json.dumps(dict(fields), indent=2)
      (partial / families.CONFIG_FILE).write_text(text + "\n")
      if isinstance(partial, pathlib.Path):
        partial.rename(folder)
    except BaseException as e:
      with contextlib.suppress(Exception):
        places.remove(partial)
      if isinstance(e, OSError) and not places.is_remote(folder):
        raise errors.UserError(
          f"{folder} cannot be written: {e.strerror}"
        ) from e
      raise


def _write_shards(
  folder: places.Path, params: model_lib.Params, dtype: str, shard_bytes: int
) -> None:
  """The files of the weights, and an index if there are several."""
  item = jnp.dtype(dtype).itemsize
  shards: list[list[tuple[str, Leaf, Any, int]]] = [[]]
  n_held = n_all = 0
  for path, x in jax.tree_util.tree_leaves_with_path(params):
    leaf = Leaf(sharding.path_name(path), x.shape)
    for i, name in enumerate(leaf.names):
      n_bytes = math.prod(leaf.tensor_shape) * item
      if shards[-1] and n_held + n_bytes > shard_bytes:
        shards.append([])
        n_held = 0
      shards[-1].append((name, leaf, x, i))
      n_held += n_bytes
      n_all += n_bytes
  weight_map = {}
  for i, shard in enumerate(shards, 1):
    file = SINGLE_FILE
    if len(shards) > 1:
      file = f"model-{i:05}-of-{len(shards):05}.safetensors"
    tensors = {name: _fetch(leaf, x, j, dtype) for name, leaf, x, j in shard}
    with places.made_here(folder / file) as path:
      safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
      path.chmod(_MODE)  # the library lets only the owner read
    weight_map |= dict.fromkeys(tensors, file)
  if len(shards) > 1:
    index = {"metadata": {"total_size": n_all}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _fetch(leaf: Leaf, x: Any, i: int, dtype: str) -> np.ndarray:
  """A tensor from its devices, as files have it."""
  tensor = np.asarray(x[i] if leaf.is_stacked else x, jnp.dtype(dtype))
  return np.ascontiguousarray(tensor.T if leaf.is_transposed else tensor)
