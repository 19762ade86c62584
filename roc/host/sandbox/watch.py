"""Adds up what all processes of a call use: memory, and disk in its directory.

The kernel bounds each process and each file; the sums are looked at from
outside, some forty times a second.
"""

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Iterable, Iterator

from roc.host.sandbox import linux

_LOOK_S = 0.002  # of CPU that a look at memory or disk may take
_DEEPEST = 64  # directories below a call's own
_LONGEST = 3500  # of a path; the kernel takes 4,096 bytes, the name included
_MOST_MAPPINGS = 10_000  # of a process whose memory is to be counted


@dataclasses.dataclass(frozen=True)
class Survey:
  """All processes of a call at one moment.

  Attributes:
    pids: those of which a thread lives.
    n_threads: of these together.
    n_zombies: those that are dead and wait for their parent to notice.
  """

  pids: list[int]
  n_threads: int
  n_zombies: int


def survey(tops: Iterable[int], at_most: int) -> Survey:
  """Returns processes and all below them; the walk ends past `at_most`."""
  pids: list[int] = []
  n_threads, seen = 0, {0}
  front = list(tops)
  while front and len(seen) <= at_most + 1:
    pid = front.pop()
    if pid in seen:
      continue
    seen.add(pid)
    n = linux.n_threads(pid)
    if n:
      pids.append(pid)
      n_threads += n
      front += linux.children(pid)
  return Survey(pids, n_threads, len(seen) - 1 - len(pids))


class Memory:
  """The memory of one call's processes beyond what they were forked with."""

  def __init__(self):
    self._exact: dict[int, tuple[int, int, dict[bytes, float]]] = {}
    self.largest_kb = 0  # address space of the largest, at the last look

  def is_over(
    self, pids: list[int], space_kb: int, base_kb: int, limit_kb: int
  ) -> bool:
    """Whether the processes hold more than `limit_kb` together.

    Sizes are quick to read and count a page once for each process that has it;
    what is mapped may be held though it is not resident. Only where the sums
    are above the limit, the pages are counted: private ones in shares, shared
    memory whole. That takes the kernel a walk over all pages, so each look does
    some processes, those that were never counted first; until its turn comes a
    process counts as it was.

    Args:
      pids: the processes.
      space_kb: address space of the process that they were forked from.
      base_kb: resident size of that process.
      limit_kb: for all together.
    """
    sizes = {pid: linux.memory_kb(pid) for pid in pids}
    self.largest_kb = max((space for space, _ in sizes.values()), default=0)
    spaces = [
      # What was started by exec is far smaller than what it was forked from.
      s if 2 * s < space_kb else max(0, s - space_kb)
      for s, _ in sizes.values()
    ]
    if max(sum(size for _, size in sizes.values()), sum(spaces)) <= limit_kb:
      return False
    self._exact = {p: self._exact[p] for p in self._exact if p in sizes}
    end = time.thread_time() + _LOOK_S
    try:
      for pid in [*(p for p in pids if p not in self._exact), *self._exact]:
        self._exact.pop(pid, None)  # to be the last in turn
        self._exact[pid] = *_private_kb(pid), _shared_kb(pid)
        if time.thread_time() > end:
          break
    except PermissionError:
      rough = (max(0, size - base_kb) for _, size in sizes.values())
      return sum(rough) > limit_kb
    shared: dict[bytes, float] = {}
    total = 0
    for pid, (private_kb, swapped_kb, mapped) in self._exact.items():
      total += min(private_kb, sizes[pid][1]) + swapped_kb
      shared.update(mapped)
    return total + sum(shared.values()) > limit_kb


def _private_kb(pid: int) -> tuple[int, int]:
  """Memory that is no file's, each page shared out: resident and in swap."""
  found = {b"Pss_Anon:": 0, b"SwapPss:": 0}
  for line in linux.read_memory_file(pid, "smaps_rollup").splitlines():
    words = line.split()
    if words and words[0] in found:
      found[words[0]] = int(words[1])
  return found[b"Pss_Anon:"], found[b"SwapPss:"]


def _shared_kb(pid: int) -> dict[bytes, float]:
  """Sizes of the shared memory without a file's name, by its inode.

  Memory in tens of thousands of pieces takes long to count, time that the
  neighbours wait: it is taken for too much.
  """
  found: dict[bytes, float] = {}
  data = linux.read_memory_file(pid, "maps")
  if data.count(b"\n") > _MOST_MAPPINGS:
    return {b"": math.inf}
  if b"/dev/zero" not in data and b"/memfd:" not in data:
    return found
  for line in data.splitlines():
    words = line.split(None, 5)
    if len(words) > 5 and words[5].startswith((b"/dev/zero", b"/memfd:")):
      start, _, end = words[0].partition(b"-")
      end_kb = (int(words[2], 16) + int(end, 16) - int(start, 16)) >> 10
      found[words[4]] = max(end_kb, found.get(words[4], 0))
  return found


class Disk:
  """What lies in a call's directory on disk; follows no link.

  Directories that are nested so deeply that the walk would be slow, or that no
  path can name, are too many as well.

  Args:
    root: the directory, "" for none; what a program hides from us counts as
      nothing.
    n_bytes: that all files may take together.
    n_entries: that there may be.
  """

  def __init__(self, root: str, n_bytes: int, n_entries: int):
    self._root = root
    self._n_bytes = n_bytes
    self._n_entries = n_entries
    self._walk: Iterator[float] | None = None
    self._seen, self._size = 0, 0.0

  def restart(self) -> None:
    """Has the next look begin anew."""
    self._walk = None

  def look(self) -> bool | None:
    """Goes on for a moment.

    Returns:
      True when there is too much; False when all has been seen and there is
      not; None when there is more to be seen.
    """
    if not self._root:
      return False
    if self._walk is None:
      self._walk, self._seen, self._size = _sizes(self._root), 0, 0.0
    end = time.thread_time() + _LOOK_S
    for size in self._walk:
      self._seen += 1
      self._size += size
      if self._seen > self._n_entries or self._size > self._n_bytes:
        self._walk = None
        return True
      if self._seen % 64 == 0 and time.thread_time() > end:
        return None
    self._walk = None
    return False


def _sizes(root: str) -> Iterator[float]:
  """Yields the size of each entry below a directory."""
  folders = [(root, 0)]
  while folders:
    folder, depth = folders.pop()
    if depth > _DEEPEST or len(folder) > _LONGEST:
      yield math.inf
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
      for entry in entries:
        size = 0
        with contextlib.suppress(OSError):
          size = entry.stat(follow_symlinks=False).st_blocks * 512
          if entry.is_dir(follow_symlinks=False):
            folders.append((entry.path, depth + 1))
        yield size
