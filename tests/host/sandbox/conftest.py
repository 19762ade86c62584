"""Sandboxes for the tests, and what must hold after each test with one."""

import contextlib
import itertools
import os
import time

import pytest

from roc.host import sandbox
from roc.host.sandbox import linux, scratch
from roc.layout import ToolStatus

# In the environment of the process that starts the sandboxes, and in no call's.
CANARY_NAME, CANARY = "ROC_TEST_CANARY", "canary-5d1fb3c7a9e2"
_LATE_S = 1.0  # a call may outlast its limit by this
_GROWN_KB = 6 << 10  # the supervisor's memory may grow by this in one test


class WatchedSandbox(sandbox.Sandbox):
  """Notes by how much each call outlasted its limit."""

  def __init__(self, *args, **kw):
    super().__init__(*args, **kw)
    self.overtimes_s: list[float] = []

  def submit(self, code, **kw):
    limits = kw.get("limits") or self._limits
    future = super().submit(code, **kw)
    future.add_done_callback(lambda done: self._note(done, limits.wall_s))
    return future

  def _note(self, done, wall_s):
    if not done.cancelled():
      self.overtimes_s.append(done.result().wall_ms / 1e3 - wall_s)


def survivors(box) -> list[int]:
  """Processes of calls below a sandbox's supervisor, zygotes not among them."""
  below = linux.descendants(box.supervisor_pid, 10_000)
  return [pid for pid in below if linux.is_marked(pid)]


def wait_until(is_true, seconds: float = 2.0) -> bool:
  """Polls a condition; False when it did not come true in time."""
  deadline = time.monotonic() + seconds
  while time.monotonic() < deadline:
    if is_true():
      return True
    time.sleep(0.01)
  return is_true()


def is_alive(pid: int) -> bool:
  """True for a process that runs; a zombie does not."""
  try:
    with open(f"/proc/{pid}/stat", "rb") as f:
      return f.read().rpartition(b")")[2].split()[0] != b"Z"
  except FileNotFoundError:
    return False


def n_descriptors(pid: int) -> int:
  """Open descriptors of a process; 0 where they may not be counted."""
  try:
    return len(os.listdir(f"/proc/{pid}/fd"))
  except PermissionError:  # ours, but closed to us: see linux.hide_memory
    return 0


def scratch_left(box) -> list[str]:
  """What lies where the calls of a sandbox have their directories."""
  return os.listdir(os.path.join(box._link._root, scratch.WORK))


def warm_up(box) -> None:
  """Waits until all images are loaded: from now on nothing should grow."""
  assert box.run("import numpy, sympy").status == ToolStatus.OK
  counts = [n_descriptors(box.supervisor_pid)]
  while len(counts) < 4 or len(set(counts[-4:])) > 1:
    time.sleep(0.05)
    counts.append(n_descriptors(box.supervisor_pid))


@contextlib.contextmanager
def left_as_found(box):
  """Asserts that a test leaves nothing of its calls behind in the sandbox."""
  pid, restarts = box.supervisor_pid, box.stats()["restarts"]
  n_fds, rss_kb = n_descriptors(pid), linux.resident_kb(pid)
  box.overtimes_s.clear()
  yield box
  after = box.run("print('next')")
  assert (after.status, after.stdout) == (ToolStatus.OK, "next\n"), after
  assert box.stats()["restarts"] == restarts and box.supervisor_pid == pid
  assert wait_until(lambda: not survivors(box)), survivors(box)
  assert wait_until(lambda: not scratch_left(box)), scratch_left(box)
  assert wait_until(lambda: n_descriptors(pid) == n_fds), (
    n_fds,
    n_descriptors(pid),
  )
  assert linux.resident_kb(pid) - rss_kb < _GROWN_KB
  assert max(box.overtimes_s) < _LATE_S


@pytest.fixture(scope="session")
def boxes():
  """Gives the sandbox of a tier, None for the strongest; each starts once."""
  made: dict[str, WatchedSandbox] = {}

  def get(tier):
    if tier is None and made.get("isolated"):
      tier = "isolated"
    if tier not in made:
      box = WatchedSandbox(n_workers=2, seed=7, tier=tier)
      try:
        box.start()
      except sandbox.SandboxError as error:
        pytest.skip(f"this machine does not hold the tier: {error}")
      made[tier] = made[box.tier] = box
      warm_up(box)
    return made[tier]

  with pytest.MonkeyPatch.context() as patch:
    patch.setenv(CANARY_NAME, CANARY)
    yield get
    for box in set(made.values()):
      box.close()


TIERS = [
  "isolated",
  pytest.param("confined", marks=pytest.mark.slow),
  pytest.param("filtered", marks=pytest.mark.slow),
  "process",
]


@pytest.fixture(scope="session", params=TIERS)
def shared_box(request, boxes):
  """A sandbox of each tier that this machine can hold."""
  return boxes(request.param)


@pytest.fixture
def box(shared_box):
  """The shared sandbox of each tier, which the test leaves as it found it."""
  with left_as_found(shared_box):
    yield shared_box


@pytest.fixture
def strong_box(boxes):
  """The sandbox of the strongest tier, left as it was found."""
  with left_as_found(boxes(None)):
    yield boxes(None)


_ordinals = itertools.count()


@contextlib.contextmanager
def sessions_in(box):
  """Gives what opens sessions and returns what runs a cell in a new one."""
  opened = []

  def open_session():
    name = ("session", next(_ordinals))
    opened.append(name)

    def run(code, **kw):
      return box.run(code, tool="session", trajectory=name, **kw)

    run.box, run.trajectory = box, name
    return run

  with left_as_found(box):
    yield open_session
    for name in opened:
      box.end_trajectory(name)


@pytest.fixture
def cells(boxes):
  """Opens sessions of the strongest tier."""
  with sessions_in(boxes(None)) as open_session:
    yield open_session


@pytest.fixture
def cell(cells):
  """Runs cells in one session of the strongest tier."""
  return cells()


@pytest.fixture
def any_cell(shared_box):
  """Runs cells in one session, of each tier."""
  with sessions_in(shared_box) as open_session:
    yield open_session()


@pytest.fixture(scope="session")
def tools():
  """The helpers above, for tests that need them by hand."""

  class Tools:
    pass

  for helper in (
    survivors,
    wait_until,
    is_alive,
    n_descriptors,
    scratch_left,
    warm_up,
    left_as_found,
  ):
    setattr(Tools, helper.__name__, staticmethod(helper))
  Tools.Sandbox = WatchedSandbox
  Tools.scratch = scratch
  Tools.canary = (CANARY_NAME, CANARY)
  return Tools
