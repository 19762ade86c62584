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
import os
import pathlib
import re
import shutil
from typing import Any

import jax
from jax.experimental import multihost_utils

from roc import errors, places
from roc.device import manifest as manifest_lib
from roc.device import saved_arrays

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

  def __init__(self, directory: str | os.PathLike[str], *, keep: int = 3):
    """Args: directory, made on the first save; keep, how many to leave."""
    if keep < 1:
      raise ValueError(f"keep must be at least 1, got {keep}")
    self.directory = places.absolute(places.as_path(directory))
    self.keep = keep
    self.notes: list[str] = []  # of the latest `restore`

  @property
  def _is_remote(self) -> bool:
    return places.is_remote(self.directory)

  def steps(self) -> list[int]:
    """Returns the steps that have a finished checkpoint, oldest first."""
    if not self.directory.is_dir():
      return []
    found = (_NAME.match(p.name) for p in self.directory.iterdir())
    return sorted(int(m[1]) for m in found if m)

  def latest_step(self) -> int | None:
    """Returns the newest of `steps`, its contents not verified, or None."""
    return max(self.steps(), default=None)

  def newest_whole_step(self) -> int | None:
    """Returns the step that `restore` would find, or None."""
    return next((s for s in reversed(self.steps()) if self._is_whole(s)), None)

  def _is_whole(self, step: int) -> bool:
    try:
      manifest_lib.verify(self.path(step))
    except manifest_lib.Broken:
      return False
    return True

  def path(self, step: int) -> places.Path:
    """Returns where the checkpoint of `step` lies, or would."""
    return self.directory / f"step_{step:08d}"

  def save(self, step: int, state: Any, extra: dict[str, Any]) -> places.Path:
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
    leaves = saved_arrays.named(state)
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
      saved_arrays.write(partial / _ARRAYS, leaves)
      if _is_first_process():
        (partial / _EXTRA).write_text(text)
        body = {"format": _FORMAT, "leaves": saved_arrays.described(leaves)}
        manifest_lib.write(partial, body)
        if not self._is_remote:
          self._make_room(target)
          partial.rename(target)
          manifest_lib.sync(self.directory)
        self._remove_old()
      _barrier("checkpoint_end")
    except Exception as e:
      with contextlib.suppress(Exception):
        manifest_lib.remove(partial)
      if _disk_error(e):
        raise errors.UserError(self._cannot_write(step, e)) from e
      with places.reaching(target, "written"):
        raise
    return target

  def set_aside(self, after: int, directory: pathlib.Path) -> list[int]:
    """Moves checkpoints newer than a step away, so that the run forgets them.

    Else they would count as the newest. In an object store, which renames
    nothing, they are deleted.

    Args:
      after: the step.
      directory: of the local disk; made if there is something to move.

    Returns:
      Their steps.
    """
    newer = [step for step in self.steps() if step > after]
    if _is_first_process():
      # The newest first: whatever interrupts, those that are left have no gap.
      for step in reversed(newer):
        if self._is_remote:
          manifest_lib.remove(self.path(step))
        else:
          directory.mkdir(parents=True, exist_ok=True)
          shutil.move(self.path(step), directory)
    _barrier("checkpoint_set_aside")
    return newer

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
    with places.reaching(self.directory, "read"):
      return self._restore(abstract_state, step, is_partial)

  def _restore(
    self, abstract_state: Any, step: int | None, is_partial: bool
  ) -> Restored | None:
    self.notes = notes = []
    if self.directory.is_dir():
      for path in sorted(self.directory.glob("unfinished_*")):
        notes.append(f"passed over {path}: a save was interrupted there")
    if step is not None and not self.path(step).is_dir():
      raise errors.UserError(
        f"there is no checkpoint of step {step} under {self.directory}"
        f" ({self._others(step)})"
      )
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
      state = saved_arrays.read(
        path / _ARRAYS, manifest["leaves"], abstract_state, is_partial
      )
      return Restored(candidate, state, extra, list(notes))
    if step is not None:
      raise errors.UserError(
        f"the checkpoint of step {step} under {self.directory} is not whole"
        f" ({notes[-1].rpartition(': ')[2]}); give another step"
        f" ({self._others(step)}) or restore its files"
      )
    if steps:
      raise errors.UserError(
        f"no checkpoint under {self.directory} is whole ({'; '.join(notes)});"
        " move the directory away to start over, or restore its files"
      )
    return None

  def _others(self, step: int) -> str:
    others = [str(s) for s in self.steps() if s != step]
    return f"there is {', '.join(others)}" if others else "there is no other"

  def _make_room(self, target: places.Path) -> None:
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
    kept = steps[-self.keep :]
    if self._is_remote:  # what has no manifest is none, and counts for none
      is_whole = lambda s: (self.path(s) / manifest_lib.NAME).exists()
      whole = [s for s in steps if is_whole(s)]
      kept = [*whole[-self.keep :], *(s for s in steps if s > max(whole))]
    old = [self.path(s) for s in steps if s not in kept]
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
