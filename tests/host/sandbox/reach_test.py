"""Programs that reach for what no limit names: the kernel's own memory, numbers
that a whole user shares, files that all may open, the files of later cells.

None is INFRA, outlasts its limits, is noticed beside it, or keeps what it took.
"""

import dataclasses

import pytest

from roc.host.sandbox import Limits, watch
from roc.layout import ToolStatus

SLOW = pytest.mark.slow
WEAKER = [
  pytest.param(t, marks=SLOW) for t in ("confined", "filtered", "process")
]
LIMITS = Limits(wall_s=0.4, cpu_s=1, total_memory_mb=384)


@pytest.fixture(scope="session", params=["isolated", *WEAKER])
def shared_box(request, boxes):
  """The sandbox of each tier; in the fast set of the strongest."""
  return boxes(request.param)


PRELUDE = """
import array, ctypes, fcntl, mmap, os, resource, signal, socket, struct, sys
import threading, time
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
is_arm = os.uname().machine == 'aarch64'
def call(on_x86, on_arm, *a):
  return libc.syscall(ctypes.c_long(on_arm if is_arm else on_x86), *(
    ctypes.c_long(x) if isinstance(x, int) else x for x in a))
def lift(*kinds):
  for kind in kinds:
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (hard, hard))
def forever():
  while True: pass
"""
ATTACKS = {
  "tables of pages": (
    "lift(resource.RLIMIT_AS)\nm = mmap.mmap(-1, 1 << 40, flags=0x4022)\n"
    "m.madvise(15)\nfor i in range(0, 1 << 40, 2 << 20): m[i]"
  ),
  "mappings that are never touched": (
    "lift(resource.RLIMIT_AS)\n"
    "kept = [mmap.mmap(-1, 1 << 34, flags=0x4022) for _ in range(900)]\n"
    "time.sleep(9)"
  ),
  "rules without end": (
    "attribute = struct.pack('QQ', 0, 1)\nfor _ in range(60):\n"
    "  fd = call(444, 444, attribute, 16, 0)\n"
    "  for port in range(65536):\n"
    "    if call(445, 445, fd, 2, struct.pack('QQ', 1, port), 0): os._exit(0)"
  ),
  "timers without end": (
    "event = (ctypes.c_int * 16)(0, 0, 10, 0)\nt = ctypes.c_void_p()\n"
    "while True: libc.timer_create(0, event, ctypes.byref(t))"
  ),
  "signals that wait": (
    "signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\n"
    "while True: libc.sigqueue(os.getpid(), 40, None)"
  ),
  "locks of single bytes": (
    "f = open('f', 'wb')\nwhile True:\n  for i in range(0, 1 << 30, 2):\n"
    "    fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, i)"
  ),
  "locks on what all may open": (
    "for path in (os.devnull, '/dev/zero', os.__file__):\n"
    "  try: fcntl.flock(os.open(path, os.O_RDONLY), fcntl.LOCK_EX)\n"
    "  except OSError: pass\ntime.sleep(9)"
  ),
  "an ear at the library": (
    "fd = libc.inotify_init()\nfor path in (os.devnull, os.__file__,\n"
    "    os.path.dirname(os.__file__)):\n"
    "  libc.inotify_add_watch(fd, path.encode(), 0xfff)\ntime.sleep(9)"
  ),
  "descriptors under way": (
    "lift(resource.RLIMIT_NOFILE)\nkept = []\ntry:\n  while True:\n"
    "    a, b = socket.socketpair()\n    kept += a, b\n"
    "    fds = array.array('i', [a.fileno()] * 200)\n"
    "    a.setblocking(False)\n    try:\n"
    "      while True: a.sendmsg([b'x'], [(1, 1, fds)])\n"
    "    except BlockingIOError: pass\nexcept OSError: pass\ntime.sleep(9)"
  ),
  "sockets inside sockets": (
    "a, b = socket.socketpair()\nwhile True:\n  c, d = socket.socketpair()\n"
    "  fds = array.array('i', [a.fileno(), b.fileno()])\n"
    "  c.sendmsg([b'x'], [(1, 1, fds)])\n"
    "  a, b = c, d"
  ),
  "an input that grows": (
    "for n in (1 << 20, 1 << 33):\n  try: os.ftruncate(0, n)\n"
    "  except OSError: pass\nwhile True: os.write(0, bytes(1 << 20))"
  ),
  "an input that shrinks below a mapping": (
    "m = mmap.mmap(0, 4096, prot=1)\nos.ftruncate(0, 0)\nm[0]"
  ),
  "an output of packets": (
    "fcntl.fcntl(1, fcntl.F_SETFL, os.O_DIRECT | os.O_WRONLY)\n"
    "while True: os.write(1, b'x')"
  ),
  "an output that changes later": (
    "m = mmap.mmap(-1, 4096)\nm[:5] = b'first'\nspan = (ctypes.c_ulong * 2)(\n"
    "  ctypes.addressof(ctypes.c_char.from_buffer(m)), 5)\n"
    "while call(278, 75, 1, span, 1, 8) > 0: m[:5] = b'later'"
  ),
  "an output into itself": (
    "fd = os.open('/proc/self/fd/1', os.O_RDONLY | os.O_NONBLOCK)\n"
    "os.write(1, b'x' * 999)\nwhile True: os.splice(fd, 1, 999)"
  ),
  # Filters: exit_group is answered by nobody; wait4 and close are refused.
  "an end that nobody answers": (
    "code = struct.pack('HBBI' * 4, 32, 0, 0, 0,\n"
    "  21, 0, 1, 94 if is_arm else 231, 6, 0, 0, 0x7fc00000,\n"
    "  6, 0, 0, 0x7fff0000)\nlibc.prctl(38, 1, 0, 0, 0)\n"
    "keep = ctypes.create_string_buffer(code)\n"
    "call(317, 277, 1, 8, struct.pack('HxxxxxxQ', 4, ctypes.addressof(keep)))"
  ),
  "no waiting and no closing": (
    "numbers = (260, 57) if is_arm else (61, 3)\n"
    "code = struct.pack('HBBI' * 5, 32, 0, 0, 0, 21, 1, 0, numbers[0],\n"
    "  21, 0, 1, numbers[1], 6, 0, 0, 0x50001, 6, 0, 0, 0x7fff0000)\n"
    "keep = ctypes.create_string_buffer(code)\n"
    "libc.prctl(38, 1, 0, 0, 0)\n"
    "call(317, 277, 1, 0, struct.pack('HxxxxxxQ', 5, ctypes.addressof(keep)))"
  ),
  "a list of locks without end": (
    "node = (ctypes.c_ulong * 3)()\nnode[0] = ctypes.addressof(node)\n"
    "call(273, 99, node, 24)\nthreading.Thread(target=call, args=(\n"
    "  273, 99, node, 24)).start()"
  ),
  "dies as slowly as it can": (
    "os.nice(19)\nos.sched_setscheduler(0, 5, os.sched_param(0))\n"
    "kept = bytearray(b'x') * (90 << 20)\n"
    "for _ in range(12): os.fork() or forever()\nforever()"
  ),
  "memory that it offers back": (
    "for how in (8, 20, 21):\n  m = mmap.mmap(-1, 90 << 20)\n"
    "  m.write(b'x' * (90 << 20))\n  m.madvise(how)\n"
    "libc.prctl(67, 1, 0, 0, 0)\ntime.sleep(0.3)"
  ),
  "memory that no fork has": (
    "m = mmap.mmap(-1, 60 << 20, flags=0x22)\nm.write(b'x' * (60 << 20))\n"
    "m.madvise(10)\nfor _ in range(8):\n  if os.fork() == 0:\n"
    "    own = bytearray(b'y') * (60 << 20)\n    time.sleep(9)\ntime.sleep(9)"
  ),
  "a signal of real time": "os.kill(os.getpid(), 40)\ntime.sleep(9)",
  "a signal that leaves a core": (
    "lift(resource.RLIMIT_CORE)\nlibc.prctl(4, 1, 0, 0, 0)\n"
    "os.kill(os.getpid(), signal.SIGQUIT)\ntime.sleep(9)"
  ),
  "slack of an hour": (
    "libc.prctl(29, 1 << 42, 0, 0, 0)\nfor _ in range(9):\n"
    "  os.fork() or time.sleep(0.5) or os._exit(0)\ntime.sleep(0.1)"
  ),
  "signals at what runs it": (
    "above = os.getppid() or 1  # out of sight in a namespace of its own\n"
    "for pid in (above, os.getpgid(above)) if above > 1 else (1,):\n"
    "  for number in (19, 18, 15, 9):\n"
    "    for act in (os.kill, lambda p, n: os.kill(-p, n),\n"
    "      lambda p, n: call(200, 130, p, n),\n"
    "      lambda p, n: call(234, 131, p, p, n),\n"
    "      lambda p, n: signal.pidfd_send_signal(os.pidfd_open(p), n)):\n"
    "      try: act(pid, number)\n      except OSError: pass"
  ),
}
# What names a number to signal would end the tests themselves where nothing
# confines it.
_HARMS_AT_T0 = {"signals at what runs it"}


def attack(box, code: str, tool: str):
  return box.submit(
    PRELUDE + code,
    stdin="input",
    tool=tool,
    trajectory=("reach", tool),
    limits=LIMITS,
  )


@pytest.mark.parametrize("name", ATTACKS)
def test_whoever_reaches_out_hurts_only_itself(box, name):
  if box.tier == "process" and name in _HARMS_AT_T0:
    pytest.skip("nothing confines signals at this tier")
  limits = Limits(wall_s=20, cpu_s=20)
  beside = box.submit("print(sum(range(99_999)))", limits=limits)
  code = ATTACKS[name]
  attacks = [attack(box, code, tool) for tool in ("python", "session")]
  results = [a.result(20) for a in attacks]
  after = [
    box.run(c, tool="session", trajectory=("reach", "session"), limits=LIMITS)
    for c in ("1", "2")
  ]
  box.end_trajectory(("reach", "session"))
  ends = {r.status for r in (*results, *after)}
  assert not ends & {ToolStatus.INFRA, ToolStatus.REJECTED}, (results, after)
  assert [r.retries for r in results] == [0, 0]
  assert beside.result().stdout == "4999850001\n"


@pytest.mark.parametrize("name", ["tables of pages", "mappings that are never"])
def test_a_cell_that_lifts_its_limit_on_memory_is_memory(any_cell, name):
  """Its kernel's tables are no memory of a process, so its size must tell."""
  cell = any_cell
  cell(PRELUDE)
  code = next(code for n, code in ATTACKS.items() if n.startswith(name))
  result = cell(code, limits=dataclasses.replace(LIMITS, wall_s=5, cpu_s=5))
  assert (result.status, result.cause) == (ToolStatus.MEMORY, "process")


def test_a_later_cell_may_hold_what_an_earlier_one_was_given(cell):
  large, small = Limits(memory_mb=400), Limits(memory_mb=32)
  assert cell("kept = bytearray(300 << 20)", limits=large).clean
  code = "import time\ntime.sleep(0.1)\nprint(len(kept) >> 20)"
  assert cell(code, limits=small).stdout == "300\n"


KEEP = """
receive, kept = socket.recv_fds, []
def keep(*a):
  data, fds, *rest = receive(*a)
  kept.extend(map(os.dup, fds))
  return data, fds, *rest
socket.recv_fds = keep
"""
REFILL = """
lift(resource.RLIMIT_FSIZE)
n = 0
for fd in kept:
  try:
    for i in range(64): n += os.pwrite(fd, bytes(1 << 20), (1 + i) << 20)
  except OSError: pass
print(n)
"""
REWRITE = """
for fd in kept:
  for act in (lambda: os.pwrite(fd, b'infra\\0x\\0', 0),
    lambda: os.pwrite(fd, b'\\xff' * 4096, 0), lambda: os.ftruncate(fd, 0),
    lambda: fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB),
    lambda: fcntl.fcntl(fd, 1033, 0xf), lambda: os.set_blocking(fd, False)):
    try: act()
    except OSError: pass
if os.fork() == 0:
  while True: os.pwrite(kept[-1], b'infra\\0x\\0', 0)
"""


def test_the_files_of_cells_hold_nothing_more(any_cell):
  """A session can keep them: memory of no process and of no directory."""
  cell = any_cell
  cell(PRELUDE + KEEP)
  assert cell("1", stdin="input").stdout == "1\n"
  result = cell(REFILL, stdin="input", limits=Limits(wall_s=5))
  assert (result.status, result.stdout) == (ToolStatus.OK, "0\n")


def test_the_records_of_cells_tell_no_tales(any_cell):
  cell = any_cell
  cell(PRELUDE + KEEP)
  results = [cell(c, stdin="input", limits=LIMITS) for c in ("1", REWRITE, "2")]
  assert ToolStatus.INFRA not in {r.status for r in results}, results


HOARD = """
lift(resource.RLIMIT_NOFILE)
n, hoard = 0, []
try:
  while True:
    hoard += socket.socketpair()
    try: hoard[-1].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 24)
    except PermissionError: pass
    hoard[-1].setblocking(False)
    try:
      while True: n += hoard[-1].send(bytes(1 << 16))
    except BlockingIOError: pass
except OSError: pass
try:
  fcntl.fcntl(os.pipe()[1], 1031, 1 << 20)
except OSError: pass
hoard = None
print(n >> 20)
"""


def test_what_waits_in_sockets_is_little(strong_box, cell):
  """It counts as no process' memory, so there must not be much of it."""
  limits = Limits(wall_s=9, cpu_s=9)
  result = strong_box.run(PRELUDE + HOARD, limits=limits)
  assert int(result.stdout) <= 16, result
  cell(PRELUDE)
  result = cell(HOARD, limits=limits)
  assert int(result.stdout) <= 128, result


def test_memory_that_was_swapped_out_is_memory(monkeypatch):
  """No machine of ours has swap: its kernel's words are played."""
  files = {
    "statm": b"100000 256 0 0 0 0 0",
    "smaps_rollup": b"Pss_Anon: 1024 kB\nSwapPss:  204800 kB\n",
    "maps": b"",
  }
  monkeypatch.setattr(
    watch.linux, "read_memory_file", lambda pid, name: files[name]
  )
  memory = watch.Memory()
  assert memory.is_over([1], 0, 0, 150 << 10)
  assert not memory.is_over([1], 0, 0, 250 << 10)
