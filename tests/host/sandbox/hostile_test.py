"""Programs that mean harm in ways that no other test has.

None is INFRA, none outlasts its limit, none is noticed by a neighbour, and none
leaves anything behind.
"""

import os
import signal

import pytest

from roc.host.sandbox import Limits, linux
from roc.layout import ToolStatus

SLOW = pytest.mark.slow
WEAKER = [
  pytest.param(t, marks=SLOW) for t in ("confined", "filtered", "process")
]


@pytest.fixture(scope="session", params=["isolated", *WEAKER])
def shared_box(request, boxes):
  return boxes(request.param)


PRELUDE = """
import array, ctypes, fcntl, mmap, os, resource, signal, socket, subprocess, sys
import threading, time
libc = ctypes.CDLL(None, use_errno=True)
def orphan(code):
  if os.fork() == 0:
    os.setsid()
    if os.fork(): os._exit(0)
    code()
    os._exit(0)
  os.wait()
def hog(): return bytearray(b'x') * (60 << 20)
def forever():
  while True: pass
"""
HOG = "[os.fork() for _ in range(3)]\nkept = hog()\ntime.sleep(9)"

ALONE = {
  "adopts its own orphans": "libc.prctl(36, 1)\norphan(forever)",
  "outlives its parent": "orphan(lambda: (libc.prctl(1, 0), forever()))",
  "leaves its group": "os.fork() or (os.setpgid(0, 0), forever())",
  "orphans that hop": (
    "def hop():\n  while True:\n    if os.fork(): os._exit(0)\norphan(hop)"
  ),
  "hops for ever": "while True:\n  if os.fork(): os._exit(0)",
  "executes itself for ever": (
    "open('a.sh', 'w').write('exec sh a.sh')\n"
    "os.execv('/bin/sh', ['sh', 'a.sh'])"
  ),
  "stops all of itself": "os.fork()\nos.killpg(0, signal.SIGSTOP)",
  "stops its children": (
    "for _ in range(5):\n  if os.fork() == 0:\n"
    "    os.kill(os.getpid(), signal.SIGSTOP)"
  ),
  "signals whatever it finds": (
    "for pid in range(2, 400):\n  try: signal.pidfd_send_signal(\n"
    "    os.pidfd_open(pid), signal.SIGCONT)\n  except OSError: pass\n"
    "1 / 0"
  ),
  "a storm of signals": (
    "signal.signal(10, lambda *a: None)\nos.fork()\n"
    "while True: os.killpg(0, 10)"
  ),
  "a timer that kills": "signal.signal(14, forever) and signal.alarm(0)\n"
  "signal.setitimer(0, 0.01, 0.01)\nsignal.signal(14, signal.SIG_DFL)\n"
  "forever()",
  "names itself like a field": (
    "libc.prctl(15, b') Z 0 0 ((')\nfor _ in range(40):\n"
    "  if os.fork() == 0: time.sleep(9)\ntime.sleep(9)"
  ),
  "hides its memory": "libc.prctl(4, 0)\n" + HOG,
  "memory in pipes": (
    "kept = []\ntry:\n  while True:\n    r, w = os.pipe()\n"
    "    os.set_blocking(w, False)\n    kept.append((r, w))\n"
    "    fcntl.fcntl(w, 1031, 1 << 20)\n    os.write(w, bytes(1 << 20))\n"
    "except OSError: pass\ntime.sleep(0.2)"
  ),
  "memory in sockets": (
    "kept = []\ntry:\n  while True:\n    a, b = socket.socketpair()\n"
    "    kept.append((a, b))\n    a.setsockopt(1, 7, 1 << 24)\n"
    "    a.setblocking(False)\n    a.send(bytes(1 << 22))\n"
    "except OSError: pass\ntime.sleep(0.2)"
  ),
  "memory in huge pages": (
    "area = mmap.mmap(-1, 400 << 20, flags=0x22)\narea.madvise(14)\n"
    "for i in range(0, 400 << 20, 4096): area[i] = 1\nos.fork()\n"
    "for i in range(0, 400 << 20, 4096): area[i] = 2\ntime.sleep(2)"
  ),
  "memory that is locked": "libc.mlockall(3)\n" + HOG,
  "memory of files that are mapped": (
    "for i in range(60):\n  f = open(f'f{i}', 'w+b')\n  f.truncate(1 << 20)\n"
    "  m = mmap.mmap(f.fileno(), 1 << 20)\n  m[:] = b'x' * (1 << 20)\n"
    "  os.unlink(f'f{i}')"
  ),
  "a file of a terabyte": (
    "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    "f = open('f', 'wb')\nf.truncate(1 << 40)"
  ),
  "a pipe with a name": "os.mkfifo('p')\nopen('p')",
  "names that are no text": (
    "for i in range(300):\n"
    "  name = bytes([1 + i % 45, 200 + i % 50]) * 30 + b'%d' % i\n"
    "  os.mkdir(name)\n  os.chmod(name, 0) if i % 2 else None"
  ),
  "output from a hundred writers": (
    "for _ in range(100):\n"
    "  threading.Thread(target=lambda: os.write(1, b'x' * 9999)).start()"
  ),
  "output when it is over": (
    "def late():\n  while True: os.write(1, b'y' * 4096)\norphan(late)"
  ),
  "output by splice": (
    "r, w = os.pipe()\nos.write(w, b'z' * 60_000)\n"
    "os.fork() or forever()\nos.splice(r, 1, 60_000)\nforever()"
  ),
  "an output that it reads itself": (
    "fd = os.open('/proc/self/fd/1', os.O_RDONLY)\n"
    "while True: print('x' * 999) or os.read(fd, 999)"
  ),
  "its standard streams in another order": (
    "os.dup2(1, 5)\nos.dup2(2, 1)\nos.dup2(5, 2)\nos.close(0)\n1 / 0"
  ),
  "limits of nothing": (
    "for kind in range(16):\n  try: resource.setrlimit(kind, (0, 0))\n"
    "  except (OSError, ValueError): pass\nprint(1)"
  ),
  "priority": (
    "for act in (lambda: os.nice(-20), lambda: os.setpriority(2, 0, -20),\n"
    "  lambda: os.sched_setscheduler(0, 1, os.sched_param(99)),\n"
    "  lambda: os.setpriority(1, 0, 19)):\n  try: act()\n"
    "  except OSError: pass\nforever()"
  ),
  "a debugger of itself": (
    "pid = os.fork()\nif pid == 0:\n  libc.ptrace(0, 0, 0, 0)\n  forever()\n"
    "libc.ptrace(16, pid, 0, 0)\nos._exit(0)"
  ),
  "an end within an end": (
    "import atexit\nclass A:\n  def __del__(self): forever()\nkept = A()\n"
    "atexit.register(lambda: os.fork() and forever())\nraise SystemExit(A())"
  ),
}


@pytest.fixture(scope="session")
def neighbour():
  """Runs something else beside an attack and returns what became of it."""

  def beside(box, attack):
    code = "x = sum(range(99_999))\nprint(x)"
    limits = Limits(wall_s=20, cpu_s=20)
    other = box.submit(code, trajectory="neighbour", limits=limits)
    result = attack()
    assert other.result().stdout == "4999850001\n"
    return result

  return beside


@pytest.mark.parametrize("code", ALONE.values(), ids=ALONE.keys())
def test_a_hostile_program_hurts_only_itself(box, neighbour, code):
  limits = Limits(wall_s=1, total_memory_mb=384)
  result = neighbour(box, lambda: box.run(PRELUDE + code, limits=limits))
  assert result.status != ToolStatus.INFRA, result
  assert (result.retries, box.stats()["restarts"]) == (0, 0)


def test_hogs_are_memory_whatever_they_do_about_it(box):
  for name in ("hides its memory", "memory that is locked"):
    limits = Limits(wall_s=9, total_memory_mb=384)
    result = box.run(PRELUDE + ALONE[name], limits=limits)
    assert (result.status, result.cause) == (ToolStatus.MEMORY, "total"), name


CELLS = {
  "descriptors with a message": (
    "fds = [os.dup(1) for _ in range(20)]\nchannel = socket.socket(fileno=3)\n"
    "channel.sendmsg([b'done 0'], [(1, 1, array.array('i', fds))])\nforever()"
  ),
  "descriptors with another": (
    "fds = [os.dup(1) for _ in range(20)]\nchannel = socket.socket(fileno=3)\n"
    "while True:\n"
    "  channel.sendmsg([b'hello 1'], [(1, 1, array.array('i', fds))])"
  ),
  "false credentials": (
    "channel = socket.socket(fileno=3)\nimport struct\n"
    "for pid in (1, 2, os.getppid(), 99999):\n  try: channel.sendmsg(\n"
    "    [b'done 0'], [(1, 2, struct.pack('3i', pid, 0, 0))])\n"
    "  except OSError: pass"
  ),
  "its output in the channel's place": "os.dup2(1, 3)",
  "the channel in the output's place": "os.dup2(3, 1)\nprint('done 0')",
  "a channel that is full": (
    "os.set_blocking(3, False)\ntry:\n  while True: os.write(3, b'')\n"
    "except OSError: pass"
  ),
  "a long message": "os.write(3, b'done 0' + b' ' * 60_000)",
  "eats what is sent to it": (
    "def eat():\n  while True: os.read(3, 99)\n"
    "for _ in range(3): threading.Thread(target=eat, daemon=True).start()"
  ),
  "stops its next runner": (
    "receive = socket.recv_fds\ndef stop(*a):\n"
    "  os.kill(os.getppid(), 19)\n  return receive(*a)\nsocket.recv_fds = stop"
  ),
  "wakes its guardian for ever": (
    "parent = os.getppid()\nif os.fork() == 0:\n  os.setsid()\n"
    "  while True: os.kill(parent, 18)"
  ),
  "a guardian that goes": (
    "frame = sys._getframe()\nwhile 'DIED' not in frame.f_globals:\n"
    "  frame = frame.f_back\nframe.f_globals['_wait4'] = os._exit"
  ),
  "a guardian that works": (
    "frame = sys._getframe()\nwhile 'DIED' not in frame.f_globals:\n"
    "  frame = frame.f_back\n"
    "frame.f_globals['_wait4'] = lambda *a: forever()"
  ),
  "a runner in every process": (
    "frame = sys._getframe()\nwhile 'DIED' not in frame.f_globals:\n"
    "  frame = frame.f_back\nfork = frame.f_globals['_fork']\n"
    "frame.f_globals['_fork'] = lambda: os.fork() and os.fork() and fork()"
  ),
  "memory when it is over": (
    "receive = socket.recv_fds\ndef grow(*a):\n  global kept\n  kept = hog()\n"
    "  return receive(*a)\nsocket.recv_fds = grow"
  ),
}


@pytest.mark.parametrize("code", CELLS.values(), ids=CELLS.keys())
def test_a_hostile_cell_hurts_only_its_session(any_cell, neighbour, code):
  cell, limits = any_cell, Limits(wall_s=1, total_memory_mb=384)
  assert cell(PRELUDE).status == ToolStatus.OK
  results = [neighbour(cell.box, lambda: cell(code, limits=limits))]
  results += [cell(c, limits=limits) for c in ("1", "os.abort()", "2", "3")]
  assert ToolStatus.INFRA not in {r.status for r in results}, results
  assert cell.box.stats()["restarts"] == 0


def test_a_process_cannot_take_off_its_mark(box, tools):
  code = PRELUDE + (
    "def hide():\n  for n in (5, 0):\n"
    "    try: libc.setrlimit(10, (ctypes.c_ulong * 2)(n, n))\n"
    "    except OSError: pass\n  print(os.getpid(), flush=True)\n"
    "  time.sleep(30)\norphan(hide)\ntime.sleep(0.3)"
  )
  before = set(linux.descendants(box.supervisor_pid, 9999))
  assert box.run(code).status == ToolStatus.OK
  if box.tier == "process":  # as the manual says
    for pid in set(linux.descendants(box.supervisor_pid, 9999)) - before:
      linux.kill_marked(pid)
    return
  assert not tools.survivors(box)


def test_namespaces_end_with_supervisor_and_keeper(tools):
  """Killed in one moment, so that neither can see to it."""
  box = tools.Sandbox(n_workers=2)
  with box:
    if box.tier != "isolated":
      pytest.skip("there are no namespaces at this tier")
    daemon = PRELUDE + "orphan(lambda: time.sleep(99))\ntime.sleep(99)"
    calls = [box.submit(daemon, limits=Limits(wall_s=99)) for _ in "12"]
    keeper, supervisor = box._link.keeper_pid, box.supervisor_pid
    assert tools.wait_until(lambda: len(tools.survivors(box)) >= 6, 5)
    pids = linux.descendants(keeper, 9999)
    for number in (signal.SIGSTOP, signal.SIGKILL):
      for pid in (keeper, supervisor):
        os.kill(pid, number)
    alive = lambda: [pid for pid in pids if tools.is_alive(pid)]
    assert tools.wait_until(lambda: not alive(), 3), alive()
    for call in calls:
      box.cancel(call)
