"""Where every array lives, as two tables that can be read without devices.

`MESH_AXIS_OF` maps a logical axis to a mesh axis; `PARAM_RULES` names the
logical axes of every parameter by a regex on its path. The mesh is
(data, fsdp, tensor): rows of a batch are split over data and fsdp, parameters
over fsdp and tensor.
"""

import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor")

MESH_AXIS_OF: dict[str, str | tuple[str, ...] | None] = {
  "batch": ("data", "fsdp"),
  "vocab": "tensor",
  "embed": "fsdp",
  "heads": "tensor",
  "ffn": "tensor",
  "layer": None,
  "rank": None,
  "norm": None,
}

# First match wins; paths look like "layers/q_proj/kernel".
PARAM_RULES: tuple[tuple[str, tuple[str, ...]], ...] = (
  (r"embed/embedding", ("vocab", "embed")),
  (r"head/kernel", ("embed", "vocab")),
  (r"layers/[qkv]_proj/kernel", ("layer", "embed", "heads")),
  (r"layers/[qkv]_proj/bias", ("layer", "heads")),
  (r"layers/o_proj/kernel", ("layer", "heads", "embed")),
  (r"layers/(gate|up)_proj/kernel", ("layer", "embed", "ffn")),
  (r"layers/down_proj/kernel", ("layer", "ffn", "embed")),
  (r"layers/([qkv]|gate|up)_proj/lora_a", ("layer", "embed", "rank")),
  (r"layers/[qkv]_proj/lora_b", ("layer", "rank", "heads")),
  (r"layers/(gate|up)_proj/lora_b", ("layer", "rank", "ffn")),
  (r"layers/o_proj/lora_a", ("layer", "heads", "rank")),
  (r"layers/down_proj/lora_a", ("layer", "ffn", "rank")),
  (r"layers/(o|down)_proj/lora_b", ("layer", "rank", "embed")),
  (r"layers/\w+_norm/scale", ("layer", "norm")),
  (r"final_norm/scale", ("norm",)),
)


def make_mesh(data: int, fsdp: int, tensor: int) -> jax.sharding.Mesh:
  """A mesh over the first data * fsdp * tensor devices.

  Raises:
    ValueError: the machine has fewer devices than that.
  """
  shape = (data, fsdp, tensor)
  wanted, devices = int(np.prod(shape)), jax.devices()
  if wanted > len(devices):
    raise ValueError(
      f"mesh data={data} fsdp={fsdp} tensor={tensor} needs {wanted} devices, "
      f"this machine has {len(devices)}"
    )
  return jax.make_mesh(
    shape,
    MESH_AXES,
    axis_types=(AxisType.Auto,) * 3,
    devices=devices[:wanted],
  )


def spec_of(logical_axes: tuple[str, ...]) -> PartitionSpec:
  """The partition of an array with these logical axes.

  Raises:
    ValueError: two axes want the same mesh axis.
  """
  entries = [MESH_AXIS_OF[axis] for axis in logical_axes]
  used = [
    name
    for entry in entries
    if entry is not None
    for name in ((entry,) if isinstance(entry, str) else entry)
  ]
  if len(set(used)) != len(used):
    raise ValueError(f"{logical_axes} use one mesh axis twice: {entries}")
  return PartitionSpec(*entries)


def path_name(path: tuple[Any, ...]) -> str:
  """A pytree path as "layers/q_proj/kernel"."""
  return "/".join(str(getattr(k, "key", getattr(k, "name", k))) for k in path)


def fit(
  mesh: jax.sharding.Mesh,
  logical_axes: tuple[str, ...],
  shape: tuple[int, ...],
) -> NamedSharding:
  """The sharding of an array of this shape.

  An axis that its mesh axis does not divide (a vocabulary of 337 over two
  devices) stays whole.
  """
  entries = [
    entry if entry is None or n % _size(mesh, entry) == 0 else None
    for entry, n in zip(spec_of(logical_axes), shape, strict=True)
  ]
  return NamedSharding(mesh, PartitionSpec(*entries))


def _size(mesh: jax.sharding.Mesh, entry: str | tuple[str, ...]) -> int:
  names = (entry,) if isinstance(entry, str) else entry
  return int(np.prod([mesh.shape[name] for name in names]))


def param_sharding(
  mesh: jax.sharding.Mesh, path: str, shape: tuple[int, ...]
) -> NamedSharding:
  """The sharding of one parameter.

  Raises:
    ValueError: no rule matches its path.
  """
  for pattern, logical_axes in PARAM_RULES:
    if re.fullmatch(pattern, path):
      return fit(mesh, logical_axes, shape)
  raise ValueError(f"no sharding rule for parameter {path!r}")


def param_shardings(mesh: jax.sharding.Mesh, params: Any) -> Any:
  """The sharding of every parameter, as a tree like `params`."""
  return jax.tree_util.tree_map_with_path(
    lambda path, x: param_sharding(mesh, path_name(path), x.shape), params
  )


def state_shardings(mesh: jax.sharding.Mesh, state: Any) -> Any:
  """Shardings of an optimizer state: moments lie as their parameter does.

  A leaf whose path ends like a parameter's is a moment of it; counters and
  other scalars are replicated.
  """

  def one(path, leaf):
    name = path_name(path)
    for pattern, logical_axes in PARAM_RULES:
      if len(leaf.shape) == len(logical_axes) and re.search(
        rf"(^|/){pattern}$", name
      ):
        return fit(mesh, logical_axes, leaf.shape)
    return replicated(mesh)

  return jax.tree_util.tree_map_with_path(one, state)


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Rows over data and fsdp; other axes whole."""
  return NamedSharding(mesh, spec_of(("batch",)))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
  """The same on every device."""
  return NamedSharding(mesh, PartitionSpec())
