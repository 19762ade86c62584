"""Directories that belong to one process and to one set of settings.

The lock dies with the process that holds it; files are written whole or not at
all; two records are told apart in the words of whoever set them.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import types
from collections.abc import Mapping
from typing import Any

from roc import errors, places

_LOCK = ".lock"
CONTENTS = "contents of "  # begins the names of digests in a record


def lock(
  directory: pathlib.Path,
  name: str = "workdir",
  otherwise: str = "give another --workdir",
) -> int:
  """Makes a directory, if need be, and locks it against other processes.

  Args:
    directory: where the lock file goes.
    name: what the directory is to the user.
    otherwise: what the user may do instead of using it.

  Returns:
    A descriptor that holds the lock; closing it, or the end of the process,
    lets go.

  Raises:
    errors.UserError: not writable, or locked by a live process.
  """
  try:
    directory.mkdir(parents=True, exist_ok=True)
    fd = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
  except OSError as e:
    raise errors.UserError(
      f"cannot write to {name} {directory}: {e.strerror}; {otherwise} or mend"
      " its permissions"
    ) from e
  try:
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError:
    holder = os.read(fd, 32).decode(errors="replace").strip() or "another"
    os.close(fd)
    raise errors.UserError(
      f"{name} {directory} is in use by process {holder}; wait for it, end it"
      f" or {otherwise}"
    ) from None
  os.ftruncate(fd, 0)
  os.write(fd, str(os.getpid()).encode())
  return fd


def differences(
  before: Mapping[str, Any],
  after: Mapping[str, Any],
  defaults: Mapping[str, Any] = types.MappingProxyType({}),
) -> str:
  """How two records differ.

  A record is not changed by what this program has learnt since it was written:
  a setting that it lacks had its default, and of a digest that one of the two
  lacks nothing is known.

  Args:
    before: an earlier record.
    after: the one of now.
    defaults: of the settings.

  Returns:
    `seed (0 -> 1), ...`, three at most by name; empty when equal.
  """
  defaults = json.loads(json.dumps(dict(defaults)))
  before = {**{k: v for k, v in defaults.items() if k in after}, **before}
  changed = [
    f"{key} ({before.get(key, 'unset')} -> {after.get(key, 'unset')})"
    for key in {**after, **before}
    if before.get(key) != after.get(key, defaults.get(key))
    and not (key.startswith(CONTENTS) and (key in before) != (key in after))
  ]
  more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
  return ", ".join(changed[:3]) + more


def statements(gin_text: str) -> dict[str, str]:
  """Returns `{"gin Limits.wall_s": "5.0"}`, one per statement of the text."""
  found, joined = {}, ""
  for line in gin_text.splitlines():
    if not line.strip() or line.lstrip().startswith("#"):
      continue
    # gin continues a statement with a backslash and indents the next line.
    joined += line.strip().removesuffix("\\")
    if not line.endswith("\\"):
      name, _, value = joined.partition("=")
      found[f"gin {name.strip()}"] = value.strip()
      joined = ""
  return found


def write_json(path: places.Path, value: Any) -> None:
  """Writes a file of indented JSON, whole or not at all."""
  write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: places.Path, text: str) -> None:
  """Writes a file whole or not at all, as object stores do by themselves."""
  if not isinstance(path, pathlib.Path):
    path.write_text(text)
    return
  partial = path.with_name(f".{path.name}.partial")
  try:
    with open(partial, "w") as f:
      f.write(text)
      f.flush()
      os.fsync(f.fileno())
    partial.replace(path)
  except OSError as e:
    with contextlib.suppress(OSError):  # a read-only file system
      partial.unlink(missing_ok=True)
    raise unwritable(path, e) from e


def unwritable(path: pathlib.Path, e: OSError) -> errors.UserError:
  """The error that a failed write becomes."""
  return errors.UserError(
    f"cannot write {path}: {e.strerror}; the checkpoints are untouched, so mend"
    " that and run the same command again"
  )
