"""One sandbox for all tests, and what must hold after each of them."""

import time

import pytest

from roc.host import sandbox
from roc.host.sandbox import linux, scratch
from roc.layout import ToolStatus


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


TIERS = [
  "isolated",
  pytest.param("confined", marks=pytest.mark.slow),
  pytest.param("filtered", marks=pytest.mark.slow),
  "process",
]


@pytest.fixture(scope="session", params=TIERS)
def shared_box(request):
  """A sandbox of each tier that this machine can hold."""
  made = sandbox.Sandbox(n_workers=2, seed=7, tier=request.param)
  try:
    made.start()
  except sandbox.SandboxError as error:
    pytest.skip(f"this machine does not hold the tier: {error}")
  with made:
    yield made


@pytest.fixture
def box(shared_box):
  """The shared sandbox; after the test its next call works and none is left."""
  yield shared_box
  after = shared_box.run("print('next')")
  assert (after.status, after.stdout) == (ToolStatus.OK, "next\n")
  assert wait_until(lambda: not survivors(shared_box)), survivors(shared_box)


@pytest.fixture
def tools():
  """The helpers above, for tests that need them by hand."""

  class Tools:
    pass

  Tools.survivors = staticmethod(survivors)
  Tools.wait_until = staticmethod(wait_until)
  Tools.is_alive = staticmethod(is_alive)
  Tools.scratch = scratch
  return Tools
