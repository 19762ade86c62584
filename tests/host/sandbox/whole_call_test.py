"""Limits hold for all of a call, however its processes came to be.

And between the cells of a session nothing of it runs.
"""

import time

import pytest

from roc.host.sandbox import Limits, linux
from roc.layout import ToolStatus

# Children that are their maker's siblings, as clone(2) can make them.
CLONE = """
import ctypes, os, time
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
number = {'x86_64': 56, 'aarch64': 220}[os.uname().machine]
def sibling(flags=0x8000):
  return libc.syscall(*map(ctypes.c_long, (number, flags | 17, 0, 0, 0, 0)))
"""
SLOW = pytest.mark.slow
TOOLS = ["python", pytest.param("session", marks=SLOW)]
WEAKER = [
  pytest.param(t, marks=SLOW) for t in ("confined", "filtered", "process")
]


@pytest.fixture(scope="session", params=["isolated", *WEAKER])
def shared_box(request, boxes):
  """The sandbox of each tier; in the fast set of the strongest."""
  return boxes(request.param)


def run(box, code, tool, limits):
  name = ("whole call", tool)
  try:
    if tool == "session":
      assert box.run("1", tool=tool, trajectory=name).stdout == "1\n"
    return box.run(code, tool=tool, trajectory=name, limits=limits)
  finally:
    box.end_trajectory(name)


@pytest.mark.parametrize("tool", TOOLS)
def test_siblings_are_processes_of_the_call(box, tool):
  code = CLONE + (
    "for _ in range(300):\n  if sibling() == 0:\n    time.sleep(9)\n"
    "    os._exit(0)\n  time.sleep(0.002)\ntime.sleep(9)"
  )
  result = run(box, code, tool, Limits(wall_s=15))
  assert (result.status, result.cause) == (ToolStatus.RESOURCE, "processes")


@pytest.mark.parametrize("tool", TOOLS)
def test_siblings_hold_memory_of_the_call(box, tool):
  code = CLONE + (
    "for _ in range(7):\n  if sibling() == 0: break\n"
    "kept = bytearray(b'x') * (60 << 20)\ntime.sleep(9)"
  )
  limits = Limits(total_memory_mb=256, wall_s=15)
  result = run(box, code, tool, limits)
  assert (result.status, result.cause) == (ToolStatus.MEMORY, "total")


SHARED = (
  "import ctypes, mmap, os, time\nfor _ in range(7):\n"
  "  if os.fork() == 0: break\nshared = mmap.mmap(-1, 45 << 20)\n"
  "for _ in range(45): shared.write(b'x' * (1 << 20))\n"
)


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize(
  "hide", ["", "shared.madvise(mmap.MADV_DONTNEED)\n"], ids=["seen", "hidden"]
)
def test_shared_memory_is_memory(box, hide, tool):
  """What the kernel keeps for a mapping counts, resident there or not."""
  code = SHARED + hide + "time.sleep(9)"
  limits = Limits(total_memory_mb=100, wall_s=15)
  result = run(box, code, tool, limits)
  assert (result.status, result.cause) == (ToolStatus.MEMORY, "total")


def test_memory_that_all_share_is_counted_once(box):
  code = (
    "import mmap, os, time\nshared = mmap.mmap(-1, 45 << 20)\n"
    "for _ in range(45): shared.write(b'x' * (1 << 20))\n"
    "for _ in range(6):\n  if os.fork() == 0:\n    time.sleep(0.3)\n"
    "    os._exit(0)\ntime.sleep(0.4)\nprint('fits')"
  )
  result = box.run(code, limits=Limits(total_memory_mb=192))
  assert (result.status, result.stdout) == (ToolStatus.OK, "fits\n")


# The first thread ends and leaves the process to another one; for /proc it is
# a zombie without memory then.
HEADLESS = """
import os, threading, time
for _ in range({n}):
  if os.fork() == 0: break
def rest():
  time.sleep(0.1)
  {rest}
threading.Thread(target=rest).start()
import ctypes
exit = {{'x86_64': 60, 'aarch64': 93}}[os.uname().machine]
ctypes.CDLL(None).syscall(exit, 0)
"""


@pytest.mark.parametrize("tool", TOOLS)
def test_processes_without_their_first_thread_hold_memory(box, tool):
  rest = "kept = bytearray(b'x') * (60 << 20); time.sleep(9)"
  code = HEADLESS.format(n=7, rest=rest)
  limits = Limits(total_memory_mb=256, wall_s=15)
  result = run(box, code, tool, limits)
  assert (result.status, result.cause) == (ToolStatus.MEMORY, "total")


@pytest.mark.parametrize("tool", TOOLS)
def test_processes_without_their_first_thread_are_processes(box, tool):
  code = HEADLESS.format(n=30, rest="time.sleep(9)")
  result = run(box, code, tool, Limits(wall_s=15))
  assert (result.status, result.cause) == (ToolStatus.RESOURCE, "processes")


@pytest.mark.parametrize("tool", TOOLS)
def test_zombies_without_end_are_resource(box, tool):
  code = (
    "import os, time\nfor _ in range(4000):\n"
    "  if os.fork() == 0: os._exit(0)\ntime.sleep(9)"
  )
  result = run(box, code, tool, Limits(wall_s=15))
  assert result.status == ToolStatus.RESOURCE


def test_threads_without_end_are_resource(box):
  code = (
    "import threading, time\nthreading.stack_size(1 << 16)\n"
    "for _ in range(2000):\n"
    "  threading.Thread(target=time.sleep, args=(3,)).start()"
  )
  result = box.run(code, limits=Limits(wall_s=15))
  assert result.status == ToolStatus.RESOURCE, result


def test_children_that_have_ended_are_no_processes(box):
  code = (
    "import os, time\nfor _ in range(30):\n  if os.fork() == 0: os._exit(0)\n"
    "time.sleep(0.2)\nprint('fine')"
  )
  result = box.run(code)
  assert (result.status, result.stdout) == (ToolStatus.OK, "fine\n")


# ---------------------------------------------------------- between two cells

# What a cell may leave behind so as to run on when it is over.
IDLERS = {
  "a forged end": "os.write(3, b'done 0')\nwhile True: pass",
  "a forged end and processes": (
    "os.write(3, b'done 0')\nfor _ in range(20):\n  if os.fork() == 0: break\n"
    "kept = bytearray(b'x') * (30 << 20)\nwhile True: pass"
  ),
  "a forged end and greeting": (
    "os.write(3, b'done 0')\nif os.fork() == 0:\n"
    "  os.write(3, b'hello %d' % os.getpid())\nwhile True: pass"
  ),
  "the next runner": (
    "import socket\ndef forever(*a):\n  while True: pass\n"
    "socket.recv_fds = forever"
  ),
  "the next runner's children": (
    "import socket\ndef forever(*a):\n  while os.fork(): pass\n"
    "  while True: pass\nsocket.recv_fds = forever"
  ),
  "a thread in C": (
    "import ctypes\ndef forever(_):\n  while True: pass\n"
    "kept = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(forever)\n"
    "thread = ctypes.c_ulong()\nctypes.CDLL(None).pthread_create(\n"
    "  ctypes.byref(thread), None, kept, None)"
  ),
  "a handler of signals": (
    "import signal\ndef again(*a):\n  while True: pass\n"
    "for s in (17, 18, 20, 21): signal.signal(s, again)"
  ),
  "a timer that continues": (
    "import ctypes\nlibc = ctypes.CDLL(None)\n"
    "event = (ctypes.c_int * 16)(0, 0, 18, 0)\ntimer = ctypes.c_void_p()\n"
    "libc.timer_create(0, event, ctypes.byref(timer))\n"
    "each = (ctypes.c_long * 4)(0, 50_000_000, 0, 50_000_000)\n"
    "libc.timer_settime(timer, 0, each, None)\n"
    "import signal\ndef busy(*a):\n  while True: pass\n"
    "signal.signal(signal.SIGCONT, busy)"
  ),
  "an orphan": (
    "if os.fork() == 0:\n  os.setsid()\n  if os.fork(): os._exit(0)\n"
    "  while True: pass"
  ),
}


@pytest.mark.parametrize("code", IDLERS.values(), ids=IDLERS.keys())
def test_between_cells_nothing_runs(any_cell, tools, code):
  cell = any_cell
  cell("import os\nx = 1")
  result = cell(code, limits=Limits(wall_s=1))
  assert result.status != ToolStatus.INFRA, result
  box = cell.box
  time.sleep(0.4)  # to be found out
  alive = [p for p in tools.survivors(box) if tools.is_alive(p)]
  before = {p: linux.cpu_seconds(p) for p in alive}
  time.sleep(0.2)
  ran = {p: linux.cpu_seconds(p) - before[p] for p in alive}
  assert not any(ran.values()), (result, ran)
  kept = 2 + bool(box.info()["plan"]["namespaces"])
  assert len(alive) <= kept
  after = [cell("print('on')", limits=Limits(wall_s=1)) for _ in "12"]
  assert ToolStatus.INFRA not in {r.status for r in after}, after


LATER = {
  "memory_mb": (32, 400, "len(bytearray(b'x') * (150 << 20))"),
  "file_mb": (1, 30, "open('f', 'wb').write(bytes(20 << 20))"),
  "n_files": (10, 300, "len([open('/dev/null') for _ in range(100)])"),
  "n_processes": (
    2,
    40,
    "import os, time\nfor _ in range(20):\n  if os.fork() == 0:\n"
    "    time.sleep(0.3)\n    os._exit(0)\ntime.sleep(0.5)\nprint(1)",
  ),
  "cpu_s": (0.2, 8.0, "sum(range(25_000_000))"),
  "output_bytes": (10, 10_000, "print('x' * 5000)"),
}


@pytest.mark.parametrize("field", LATER)
def test_each_cell_has_its_own_limits(any_cell, field):
  cell = any_cell
  low, high, code = LATER[field]
  wall = {"wall_s": 20.0}
  small, large = (Limits(**{**wall, field: value}) for value in (low, high))
  assert cell("1", limits=small).stdout == "1\n"
  seen = [cell(code, limits=limits).status for limits in (large, small, large)]
  assert seen[0] == seen[2] == ToolStatus.OK, seen
  assert seen[1] not in (ToolStatus.OK, ToolStatus.INFRA), seen


# --------------------------------------------------------------- always an end

SETTLE = {
  "a handler that leaves zombies": (
    "import signal\ndef more(*a):\n  if os.fork() == 0: os._exit(0)\n"
    "for s in (17, 18): signal.signal(s, more)\n"
    "if os.fork() == 0: os._exit(0)"
  ),
  "a runner with zombies": (
    "import socket\nreceive = socket.recv_fds\ndef with_zombie(*a):\n"
    "  if os.fork() == 0: os._exit(0)\n  return receive(*a)\n"
    "socket.recv_fds = with_zombie"
  ),
  "a runner without its first thread": (
    "import socket, threading\ndef headless(*a):\n"
    "  threading.Thread(target=time.sleep, args=(9,)).start()\n"
    "  import ctypes\n  ctypes.CDLL(None).syscall(60, 0)\n"
    "socket.recv_fds = headless"
  ),
  "no greeting": "os.write = None\nimport socket\nsocket.socket.send = None",
  "a runner that dies at once": (
    "import socket\nsocket.recv_fds = lambda *a: os._exit(3)"
  ),
  "a runner that stops": (
    "import socket\nsocket.recv_fds = lambda *a: os.kill(os.getpid(), 19)"
  ),
}


@pytest.mark.parametrize("code", SETTLE.values(), ids=SETTLE.keys())
def test_a_cell_ends_whatever_it_leaves(any_cell, code):
  cell = any_cell
  cell("import os, time\nx = 1")
  limits = Limits(wall_s=1)
  results = [cell(c, limits=limits) for c in (code, "x", "x", "x")]
  assert ToolStatus.INFRA not in {r.status for r in results}, results
  assert max(r.wall_ms for r in results) < 3000, results
