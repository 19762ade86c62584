"""Removes what a program left behind, without trusting a bit of it.

The tree may hold links to anywhere, directories without permissions, 10^5
files, or a depth that no path can name. So: nothing is followed, nothing
recurses, and a nested directory is first moved up beside its ancestor, which
makes every path one component long.
"""

import contextlib
import itertools
import os
import stat

WORK, TRASH = "work", "trash"
SCRATCH = b"/scratch"  # what the model reads for the call's directory
_PACKAGE = os.path.dirname(os.path.abspath(__file__))
_ordinals = itertools.count(1)  # no name comes twice in a sandbox's life


class Places:
  """Directories of calls on disk, below the sandbox's root.

  Args:
    root: the sandbox's directory.
    box: where an isolated call's disk in memory is; no directories are made
      then. "" otherwise.
    library_dirs: where the interpreter's modules lie.
  """

  def __init__(self, root: str, box: str, library_dirs: list[str]):
    self._root = root
    self._box = box
    # As in a report: what is left is the module's own path.
    dirs = {os.path.join(d, "") for d in (*library_dirs, _PACKAGE) if d}
    self._libraries = [
      (os.fsencode(d), b"") for d in sorted(dirs, key=len, reverse=True)
    ]

  def make(self, uid: int | None) -> str:
    """Returns a new directory that belongs to `uid`; "" in memory.

    Raises:
      OSError: the disk is full, or the root is gone.
    """
    if self._box:
      return ""
    path = os.path.join(self._root, WORK, str(next(_ordinals)))
    try:
      os.mkdir(path, 0o700)
    except (
      FileNotFoundError
    ):  # below `confined` a program can remove its parent
      os.makedirs(os.path.dirname(path), 0o711, exist_ok=True)
      os.mkdir(path, 0o700)
    if uid is not None:
      os.chown(path, uid, uid)
    return path

  def hidden(self, path: str) -> list[tuple[bytes, bytes]]:
    """Returns paths that the model must not read, and what is shown instead."""
    return [
      (os.fsencode(path or self._box), SCRATCH),
      (os.fsencode(self._root), SCRATCH),
      *self._libraries,
    ]

  def discard(self, path: str) -> None:
    """Empties a place at once; the keeper deletes what was in it.

    Below tier `confined` a program may have removed its directory, or the
    sandbox's, or put a link in its place: what cannot be moved away stays.
    """
    if not path:
      return
    with contextlib.suppress(OSError):
      os.rmdir(path)  # most programs leave it empty
      return
    trash = os.path.join(self._root, TRASH)
    with contextlib.suppress(OSError):
      _open_up(path)
    with contextlib.suppress(OSError):
      os.makedirs(trash, 0o711, exist_ok=True)
      os.rename(path, os.path.join(trash, os.path.basename(path)))


def _open_up(path: str) -> None:
  """Lets a directory be moved, which takes write permission for its "..".

  Raises:
    OSError: it is no directory; a link is not followed.
  """
  flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
  fd = os.open(path, flags)
  try:
    os.chmod(f"/proc/self/fd/{fd}", 0o700)
  finally:
    os.close(fd)


def empty_directory(root: str) -> int:
  """Deletes everything in `root`, following no link; `root` itself stays.

  Args:
    root: a directory that only this process still writes to.

  Returns:
    How many entries could not be deleted (0 when `root` is empty now).
  """
  n_left = 0
  n_moved = 0
  root_fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
  try:
    queue = os.listdir(root_fd)
    while queue:
      name = queue.pop()
      try:
        if not stat.S_ISDIR(os.lstat(name, dir_fd=root_fd).st_mode):
          os.unlink(name, dir_fd=root_fd)
          continue
        # Moving a directory needs write permission on it, for its "..".
        os.chmod(name, 0o700, dir_fd=root_fd)
        moved, n_moved = _flatten(root_fd, name, n_moved)
        queue.extend(moved)
        os.rmdir(name, dir_fd=root_fd)
      except OSError:
        n_left += 1
  finally:
    os.close(root_fd)
  return n_left


def _flatten(root_fd: int, name: str, n_moved: int) -> tuple[list[str], int]:
  """Unlinks the files of root/name and moves its directories into root."""
  moved = []
  flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
  fd = os.open(name, flags, dir_fd=root_fd)
  try:
    for entry in os.listdir(fd):
      if stat.S_ISDIR(os.lstat(entry, dir_fd=fd).st_mode):
        os.chmod(entry, 0o700, dir_fd=fd)
        n_moved += 1
        target = f".up.{os.getpid()}.{n_moved}"
        os.rename(entry, target, src_dir_fd=fd, dst_dir_fd=root_fd)
        moved.append(target)
      else:
        os.unlink(entry, dir_fd=fd)
  finally:
    os.close(fd)
  return moved, n_moved


def remove_directory(root: str) -> None:
  """Deletes `root` and all in it; a missing one, or leftovers, are no error."""
  with contextlib.suppress(OSError):
    empty_directory(root)
    os.rmdir(root)
