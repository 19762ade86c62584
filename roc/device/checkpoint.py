"""Checkpoints of everything, of which the newest whole one is always found.

A checkpoint is a directory `step_00000123/` with the arrays (Orbax),
`extra.json` (cursor, filter state, whatever is not an array) and a manifest
(`roc.device.manifest`) with a checksum of every file and the shape and dtype of
every array. It is written under another name, the manifest last, and gets its
own name by one atomic rename. So a process that is killed while it saves leaves
the older checkpoints as they were, and a file that was cut or flipped later is
noticed before it is believed.

The directory must be on a file system that all processes share and that renames
atomically, or in an object store such as `gs://bucket/run`. There nothing can
be renamed: a checkpoint is written under its own name, and the manifest, the
last file, makes it whole.
"""

import contextlib
import dataclasses
import errno
import json
import logging
import os
import pathlib
import re
import shutil
from collections.abc import Generator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from roc import errors
from roc.device import manifest as manifest_lib

_EXTRA = "extra.json"
_ARRAYS = "arrays"
_FORMAT = 1
_NAME = re.compile(r"step_(\d+)$")


@dataclasses.dataclass(frozen=True)
class Restored:
  """What `Checkpoints.restore` found."""

  step: int
  state: Any  # the tree that was asked for, bit for bit as it was saved
  extra: dict[str, Any]
  notes: list[str]  # one sentence for each checkpoint that was passed over


class Checkpoints:
  """The checkpoints of one run, in one directory."""

  def __init__(
    self,
    directory: str | os.PathLike[str],
    *,
    keep: int = 3,
    is_remote: bool | None = None,
  ):
    """Finds nothing and makes nothing yet.

    Args:
      directory: made on the first save.
      keep: how many to leave.
      is_remote: whether it is in an object store; None: as its name says.
    """
    if keep < 1:
      raise ValueError(f"keep must be at least 1, got {keep}")
    self.directory = as_path(directory)
    is_local = isinstance(self.directory, pathlib.Path)
    self._is_remote = not is_local if is_remote is None else is_remote
    self.keep = keep
    self.notes: list[str] = []  # of the latest `restore`

  def steps(self) -> list[int]:
    """Returns the steps that have a finished checkpoint, oldest first."""
    if not self.directory.is_dir():
      return []
    found = (_NAME.match(p.name) for p in self.directory.iterdir())
    return sorted(int(m[1]) for m in found if m)

  def latest_step(self) -> int | None:
    """Returns the newest of `steps`, its contents not verified, or None."""
    return max(self.steps(), default=None)

  def path(self, step: int) -> manifest_lib.Path:
    """Returns where the checkpoint of `step` lies, or would."""
    return self.directory / f"step_{step:08d}"

  def save(
    self, step: int, state: Any, extra: dict[str, Any]
  ) -> manifest_lib.Path:
    """Writes a checkpoint and returns when it is whole on disk.

    Every process of a multi-host run calls this with the same step.

    Args:
      step: its number; a checkpoint of the same step is replaced, or set aside
        under another name if it is broken.
      state: tree of jax arrays (typed PRNG keys too) and numpy arrays.
      extra: what JSON can hold; tuples come back as lists.

    Returns:
      The directory of the checkpoint.

    Raises:
      errors.UserError: it cannot be written; older checkpoints are untouched.
    """
    leaves = _named_leaves(state)
    text = json.dumps(extra)
    target = self.path(step)
    partial = target
    if not self._is_remote:
      partial = self.directory / f"unfinished_{target.name}"
    try:
      if _is_first_process():
        self.directory.mkdir(parents=True, exist_ok=True)
        manifest_lib.remove(partial)
        partial.mkdir(parents=True, exist_ok=True)
      _barrier("checkpoint_begin")
      _write_arrays(partial / _ARRAYS, leaves)
      if _is_first_process():
        (partial / _EXTRA).write_text(text)
        body = {"format": _FORMAT, "leaves": _described(leaves)}
        manifest_lib.write(partial, body, is_remote=self._is_remote)
        if not self._is_remote:
          self._make_room(target)
          partial.rename(target)
          manifest_lib.sync(self.directory)
        self._remove_old()
      _barrier("checkpoint_end")
    except Exception as e:
      with contextlib.suppress(Exception):
        manifest_lib.remove(partial)
      if not _disk_error(e):
        raise
      raise errors.UserError(self._cannot_write(step, e)) from e
    return target

  def restore(
    self,
    abstract_state: Any,
    step: int | None = None,
    *,
    is_partial: bool = False,
  ) -> Restored | None:
    """Reads the newest whole checkpoint, or that of `step`.

    Reads only: a broken checkpoint stays where it is and `notes` names it.

    Args:
      abstract_state: tree of `jax.ShapeDtypeStruct` (or arrays), each with the
        sharding that the array is to get, on whatever mesh; a leaf without one
        goes to the first device, a numpy leaf stays numpy.
      step: this one and no other.
      is_partial: `abstract_state` may ask for some of the saved arrays only.

    Returns:
      What was found, or None if no checkpoint was ever finished here.

    Raises:
      errors.UserError: `step` is not there or not whole, no checkpoint of
        several is whole, or shapes, dtypes or names differ from those saved.
    """
    self.notes = notes = []
    if self.directory.is_dir():
      for path in sorted(self.directory.glob("unfinished_*")):
        notes.append(f"passed over {path}: a save was interrupted there")
    steps = self.steps() if step is None else [step]
    for candidate in reversed(steps):
      path = self.path(candidate)
      try:
        manifest = manifest_lib.verify(path)
        extra = json.loads((path / _EXTRA).read_text())
      except manifest_lib.Broken as e:
        notes.append(f"passed over {path}: {e}")
        continue
      if manifest["format"] != _FORMAT:
        raise errors.UserError(
          f"checkpoint {path} has format {manifest['format']} and this program"
          f" reads format {_FORMAT}; use the version of roc that wrote it"
        )
      state = _read_arrays(path, manifest["leaves"], abstract_state, is_partial)
      return Restored(candidate, state, extra, list(notes))
    if steps:
      raise errors.UserError(
        f"no checkpoint under {self.directory} is whole ({'; '.join(notes)});"
        " move the directory away to start over, or restore its files"
      )
    return None

  def _make_room(self, target: manifest_lib.Path) -> None:
    """Clears the name of `target`; what is broken there is kept aside."""
    if not target.exists():
      return
    try:
      manifest_lib.verify(target)
    except manifest_lib.Broken:
      n = 0
      while (aside := target.with_name(f"broken_{target.name}_{n}")).exists():
        n += 1
      target.rename(aside)
      return
    replaced = target.with_name(f"replaced_{target.name}")
    shutil.rmtree(replaced, ignore_errors=True)
    target.rename(replaced)

  def _remove_old(self) -> None:
    steps = self.steps()
    if self._is_remote:  # what has no manifest is not one of those to keep
      steps = [s for s in steps if (self.path(s) / manifest_lib.NAME).exists()]
    old = [self.path(s) for s in steps[: -self.keep]]
    for pattern in ("unfinished_*", "replaced_*"):
      old.extend(self.directory.glob(pattern))
    for path in old:
      manifest_lib.remove(path)

  def _cannot_write(self, step: int, e: Exception) -> str:
    latest = self.latest_step()
    left = (
      "there is no older one"
      if latest is None
      else f"the one of step {latest} is untouched"
    )
    return (
      f"cannot write the checkpoint of step {step} under {self.directory}:"
      f" {_disk_error(e) or e}; {left}; mend that and run the same command"
      " again"
    )


def as_path(name: str | os.PathLike[str]) -> manifest_lib.Path:
  """An absolute path, or one of an object store such as `gs://bucket/run`."""
  if "://" in os.fspath(name):
    return epath.Path(name)
  return pathlib.Path(name).absolute()


# ------------------------------------------------------------------ contents


def _named_leaves(tree: Any) -> dict[str, Any]:
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


def _described(leaves: dict[str, Any]) -> dict[str, Any]:
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


def _write_arrays(path: manifest_lib.Path, leaves: dict[str, Any]) -> None:
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


def _read_arrays(
  path: manifest_lib.Path,
  saved: dict[str, Any],
  abstract: Any,
  is_partial: bool,
) -> Any:
  wanted = _named_leaves(abstract)
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
      arrays = checkpointer.restore(path / _ARRAYS, args=args)

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
  path: manifest_lib.Path,
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
      if name not in wanted
    ]
  if found:
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    raise errors.UserError(
      f"checkpoint {path} belongs to another configuration: {found[0]}{more};"
      " use the configuration that it was made with, or another --workdir"
    )


# ------------------------------------------------------------------ plumbing


def _is_first_process() -> bool:
  return jax.process_index() == 0


def _barrier(name: str) -> None:
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def _disk_error(e: BaseException | None) -> str:
  """What is wrong with the disk, also when tensorstore reports it; or ""."""
  codes = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EROFS,
    errno.EPERM,
    errno.EFBIG,
  )
  while e is not None:
    for code in codes:
      if os.strerror(code) in str(e) or getattr(e, "errno", None) == code:
        return os.strerror(code)
    e = e.__cause__
  return ""
