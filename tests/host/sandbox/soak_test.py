"""Fifty thousand calls of all kinds: nothing grows, nothing is lost."""

import collections
import os
import random
import time

import pytest

from roc.host.sandbox import Limits, linux
from roc.layout import ToolStatus

N_CALLS = 50_000
N_FIFTHS = 5
FLIGHT = 64  # calls that wait at a time
CELLS = 12  # of one session, which then ends
QUICK = Limits(wall_s=0.25)
ORDINARY = Limits(wall_s=10)

# One word names its call, so that none is answered twice or with another's.
WORDS = {
  "print({n})": ToolStatus.OK,
  "import math\nprint({n} + math.floor(0.5))": ToolStatus.OK,
  "open('f', 'w').write('{n}')\nprint(open('f').read())": ToolStatus.OK,
  "print(input())": ToolStatus.OK,
  "print({n})\n1 / 0": ToolStatus.ERROR,
  "print({n})\nraise SystemExit(3)": ToolStatus.EXIT,
}
RARE = {
  "import os\nprint({n})\nos._exit(4)": ToolStatus.EXIT,
  "import os\nprint({n})\nos.abort()": ToolStatus.CRASH,
  "import os\nprint({n})\nif os.fork() == 0:\n  os.setsid()\n"
  "  os.closerange(0, 9)\n  while True: pass\n": ToolStatus.OK,
  "import os\nprint({n})\nos.symlink('/', 'l{n}')\nos.mkdir('d{n}')\n"
  "open('d{n}/e', 'w').close()": ToolStatus.OK,
  "print({n})\nkept = bytearray(8 << 30)": ToolStatus.MEMORY,
  "print({n})\nprint('x' * 9999)": ToolStatus.OUTPUT_LIMIT,
  "import numpy\nprint(int(numpy.int64({n})))": ToolStatus.OK,
  "print({n})\nkept = [open('/dev/null') for _ in range(99)]": (
    ToolStatus.RESOURCE
  ),
}
VERY_RARE = {"print({n})\nwhile True: pass": ToolStatus.TIMEOUT}


def figures(box, tools) -> dict[str, float]:
  """What must not grow."""
  pid = box.supervisor_pid
  below = linux.children(pid)
  mine = [p for p in below if not linux.is_marked(p)]
  return {
    "descriptors": tools.n_descriptors(pid),
    "own descriptors": len(os.listdir("/proc/self/fd")),
    "zombies": sum(not tools.is_alive(p) for p in below),
    "processes": len(below),
    "supervisor kB": linux.resident_kb(pid),
    "zygotes kB": sum(map(linux.resident_kb, mine)),
    "zygotes' descriptors": sum(map(tools.n_descriptors, mine)),
    "shared memory": len(os.listdir("/dev/shm")),
    "scratch": len(tools.scratch_left(box)),
  }


def settled(box, tools) -> dict[str, float]:
  """The figures at rest."""
  assert tools.wait_until(lambda: not tools.survivors(box), 5)
  time.sleep(0.5)
  return figures(box, tools)


class Load:
  """Draws calls, keeps so many in flight and checks each answer."""

  def __init__(self, box):
    self._box = box
    self._draw = random.Random(0)
    self._open: collections.deque = collections.deque()
    self._n_cells = 0
    self._due: collections.Counter = collections.Counter()  # by session
    self._n = 0
    self.walls_ms: list[float] = []
    self.n_retries = 0
    self.counts: collections.Counter = collections.Counter()

  def submit(self) -> None:
    """Sends one call."""
    self._n += 1
    at = self._draw.random()
    kinds = VERY_RARE if at < 0.004 else RARE if at < 0.06 else WORDS
    code, status = self._draw.choice([*kinds.items()])
    tool, trajectory = "python", self._n % 50
    if self._draw.random() < 0.3:
      tool, trajectory = "session", ("session", self._n_cells // CELLS)
      self._n_cells += 1
      self._due[trajectory] += 1
    future = self._box.submit(
      code.format(n=self._n),
      stdin=str(self._n),
      tool=tool,
      trajectory=trajectory,
      call_index=self._n,
      limits=QUICK if status == ToolStatus.TIMEOUT else ORDINARY,
    )
    self._open.append((self._n, code, status, trajectory, future))
    if len(self._open) >= FLIGHT:
      self.take()

  def take(self) -> None:
    """Checks the oldest answer."""
    n, code, status, trajectory, future = self._open.popleft()
    result = future.result(60)
    self.counts[result.status.name] += 1
    assert result.status == status, (n, code, result)
    assert result.stdout.split("\n")[0] == str(n), (n, code, result)
    self.n_retries += result.retries
    if status == ToolStatus.OK:
      self.walls_ms.append(result.wall_ms)
    if trajectory in self._due:
      self._due[trajectory] -= 1
      if not self._due[trajectory]:
        del self._due[trajectory]
        self._box.end_trajectory(trajectory)

  def drain(self) -> None:
    """Checks all that is open."""
    while self._open:
      self.take()
    assert not self._due


@pytest.mark.slow
def test_fifty_thousand_mixed_calls_leave_everything_flat(tools):
  with tools.Sandbox(n_workers=2, seed=1) as box:
    tools.warm_up(box)
    load = Load(box)
    seen, p99_ms = [], []
    for _ in range(N_FIFTHS):
      load.walls_ms.clear()
      for _ in range(N_CALLS // N_FIFTHS):
        load.submit()
      load.drain()
      seen.append(settled(box, tools))
      walls = sorted(load.walls_ms)
      p99_ms.append(walls[int(0.99 * len(walls))])
    assert sum(load.counts.values()) == N_CALLS
    assert load.n_retries == 0 and box.stats()["restarts"] == 0
    first, last = seen[0], seen[-1]
    for name in first:
      slack = 4 << 10 if name.endswith("kB") else 0
      assert last[name] <= first[name] + slack, (name, seen)
    assert last["zombies"] == last["scratch"] == 0
    assert p99_ms[-1] < 3 * p99_ms[0] + 5, p99_ms
