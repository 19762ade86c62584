"""The arrays of a checkpoint, by name, written and read by Orbax.

A file of its own per array and device would be too many small ones: Orbax packs
them (OCDBT), in parts that every process writes and reads by itself.
"""

import contextlib
import logging
import re
from collections.abc import Generator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from roc import errors, places

# Updates counted for a schedule, which older checkpoints have and nobody reads.
_UNREAD = re.compile(r"opt_state\.(1\.)?2\.count")


def named(tree: Any) -> dict[str, Any]:
  """Returns `{"params.layers.q_proj": array}`, free of container types."""
  leaves = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    name = jax.tree_util.keystr(path, simple=True, separator=".") or "value"
    if name in leaves:
      raise ValueError(f"two leaves of the state are named {name}")
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
      raise TypeError(
        f"leaf {name} of the state is a {type(leaf).__name__}, not an array;"
        " make it one or put it into `extra`"
      )
    leaves[name] = leaf
  return leaves


def _is_key(leaf: Any) -> bool:
  return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _describe(leaf: Any) -> str:
  return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def described(leaves: dict[str, Any]) -> dict[str, Any]:
  """Returns what the manifest says of each array."""
  described = {}
  for name, leaf in leaves.items():
    stored = jax.random.key_data(leaf) if _is_key(leaf) else leaf
    described[name] = {
      "is": _describe(leaf),
      "shape": list(stored.shape),
      "dtype": str(stored.dtype),
    }
    if _is_key(leaf):
      described[name]["key"] = str(jax.random.key_impl(leaf))
  return described


def _handler() -> ocp.PyTreeCheckpointHandler:
  return ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=False)


def write(path: places.Path, leaves: dict[str, Any]) -> None:
  # Orbax refuses arrays without elements; their shape is in the manifest.
  arrays = {
    name: jax.random.key_data(leaf) if _is_key(leaf) else leaf
    for name, leaf in leaves.items()
    if leaf.size
  }
  if arrays:
    with _quiet(), ocp.Checkpointer(_handler()) as checkpointer:
      checkpointer.save(path, args=ocp.args.PyTreeSave(arrays))


@contextlib.contextmanager
def _quiet() -> Generator[None, None, None]:
  """No logged tracebacks of threads that write: `save` raises it itself."""
  before = logging.root.manager.disable
  logging.disable(logging.ERROR)
  try:
    yield
  finally:
    logging.disable(before)


def read(
  path: places.Path,
  saved: dict[str, Any],
  abstract: Any,
  is_partial: bool,
) -> Any:
  wanted = named(abstract)
  _require_same(path, saved, wanted, is_partial)
  restore_args = {}
  for name, leaf in wanted.items():
    if not leaf.size:
      continue
    if isinstance(leaf, np.ndarray | np.generic):
      restore_args[name] = ocp.RestoreArgs(restore_type=np.ndarray)
      continue
    shape, dtype = saved[name]["shape"], saved[name]["dtype"]
    restore_args[name] = ocp.ArrayRestoreArgs(
      sharding=_sharding(leaf), global_shape=tuple(shape), dtype=np.dtype(dtype)
    )
  arrays = {}
  if restore_args:
    args = ocp.args.PyTreeRestore(
      item=dict.fromkeys(restore_args, 0),
      restore_args=restore_args,
      partial_restore=True,
    )
    with ocp.Checkpointer(_handler()) as checkpointer:
      arrays = checkpointer.restore(path, args=args)

  def rebuilt(name, leaf):
    if not leaf.size:
      # Nothing was saved because there is nothing in it.
      is_numpy = isinstance(leaf, np.ndarray)
      empty = np.zeros(leaf.shape, leaf.dtype)
      return empty if is_numpy else jax.device_put(empty, _sharding(leaf))
    if _is_key(leaf):
      return jax.random.wrap_key_data(arrays[name], impl=saved[name]["key"])
    return arrays[name]

  leaves = [rebuilt(name, leaf) for name, leaf in wanted.items()]
  return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def _sharding(leaf: Any) -> jax.sharding.Sharding:
  sharding = getattr(leaf, "sharding", None)
  return sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])


def _require_same(
  path: places.Path,
  saved: dict[str, Any],
  wanted: dict[str, Any],
  is_partial: bool,
) -> None:
  found = [
    f"{name} is {saved[name]['is'] if name in saved else 'not in it'} and"
    f" should be {_describe(leaf)}"
    for name, leaf in wanted.items()
    if name not in saved or saved[name]["is"] != _describe(leaf)
  ]
  if not is_partial:
    found += [
      f"{name} is {saved[name]['is']} and should not be there"
      for name in saved
      if name not in wanted and not _UNREAD.fullmatch(name)
    ]
  if found:
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    raise errors.UserError(
      f"checkpoint {path} belongs to another configuration: {found[0]}{more};"
      " use the configuration that it was made with, or another --workdir"
    )
