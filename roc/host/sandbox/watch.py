"""Adds up what all processes of a call use: memory, and disk in its directory.

The kernel bounds each process and each file; the sums are looked at from
outside, some forty times a second.
"""

import contextlib
import os
from collections.abc import Iterable

from roc.host.sandbox import linux


def memory_kb(pids: Iterable[int], shared_kb: int, enough_kb: int) -> int:
  """Returns the memory of processes beyond what they were forked with.

  Args:
    pids: the processes.
    shared_kb: resident size of the process that they were forked from.
    enough_kb: only a sum above it must be exact. Resident sizes are quick to
      read and count a page once for each process that shares it; above
      `enough_kb` proportional sizes are read instead.

  Returns:
    Kilobytes; an upper estimate where proportional sizes may not be read.
  """
  pids = list(pids)
  rough = sum(max(0, linux.resident_kb(pid) - shared_kb) for pid in pids)
  if rough <= enough_kb:
    return rough
  try:
    return sum(_proportional_kb(pid) for pid in pids)
  except PermissionError:
    return rough


def _proportional_kb(pid: int) -> int:
  """Memory that is no file's, each page shared out among its users."""
  try:
    with open(f"/proc/{pid}/smaps_rollup", "rb") as f:
      for line in f:
        if line.startswith((b"Pss_Anon:", b"Pss_Shmem:")):
          break
      else:
        return 0
      return int(line.split()[1])
  except PermissionError:
    raise
  except (OSError, ValueError):
    return 0


def is_over_disk(root: str, n_bytes: int, n_entries: int) -> bool:
  """Whether a directory holds more than that; follows no link.

  Args:
    root: the directory; what a program hides from us counts as nothing.
    n_bytes: that all files may take together.
    n_entries: that there may be; the walk ends when there are more.
  """
  folders, seen, size = [root], 0, 0
  while folders:
    with contextlib.suppress(OSError), os.scandir(folders.pop()) as entries:
      for entry in entries:
        seen += 1
        with contextlib.suppress(OSError):
          size += entry.stat(follow_symlinks=False).st_blocks * 512
          if entry.is_dir(follow_symlinks=False):
            folders.append(entry.path)
        if seen > n_entries or size > n_bytes:
          return True
  return False
