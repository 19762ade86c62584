"""The filter: its program run by a small BPF machine, and by the kernel."""

import ctypes
import errno
import os
import pathlib
import re
import struct
import subprocess
import sys
import textwrap

import pytest

from roc.host.sandbox import seccomp

ROOT = pathlib.Path(__file__).parents[3]
MACHINES = ("x86_64", "aarch64")
ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
ALLOWED = 0
TABLES = (seccomp._ALWAYS_DENIED, seccomp._ALWAYS_ABSENT, seccomp._METADATA)

# By hand, so that a slip in the module's own table is noticed.
NUMBERS = {
  "x86_64": {
    "read": 0,
    "write": 1,
    "open": 2,
    "openat": 257,
    "openat2": 437,
    "mmap": 9,
    "ioctl": 16,
    "kill": 62,
    "getppid": 110,
    "clone": 56,
    "fork": 57,
    "vfork": 58,
    "execve": 59,
    "futex": 202,
    "socket": 41,
    "socketpair": 53,
    "truncate": 76,
    "ftruncate": 77,
    "chmod": 90,
    "fchmodat": 268,
    "utimensat": 280,
    "setxattr": 188,
    "personality": 135,
    "setpriority": 141,
    "ioprio_set": 251,
    "sched_setaffinity": 203,
    "setrlimit": 160,
    "prlimit64": 302,
    "getrandom": 318,
    "memfd_create": 319,
    "ptrace": 101,
    "mount": 165,
    "unshare": 272,
    "bpf": 321,
    "keyctl": 250,
    "shmget": 29,
    "mknodat": 259,
    "fcntl": 72,
    "setsockopt": 54,
    "tkill": 200,
    "tgkill": 234,
    "rt_sigqueueinfo": 129,
  },
  "aarch64": {
    "read": 63,
    "write": 64,
    "openat": 56,
    "openat2": 437,
    "mmap": 222,
    "ioctl": 29,
    "kill": 129,
    "getppid": 173,
    "clone": 220,
    "execve": 221,
    "futex": 98,
    "socket": 198,
    "socketpair": 199,
    "truncate": 45,
    "ftruncate": 46,
    "fchmodat": 53,
    "utimensat": 88,
    "setxattr": 5,
    "personality": 92,
    "setpriority": 140,
    "ioprio_set": 30,
    "sched_setaffinity": 122,
    "setrlimit": 164,
    "prlimit64": 261,
    "getrandom": 278,
    "memfd_create": 279,
    "ptrace": 117,
    "mount": 40,
    "unshare": 97,
    "bpf": 280,
    "keyctl": 219,
    "shmget": 194,
    "mknodat": 33,
    "fcntl": 25,
    "setsockopt": 208,
    "tkill": 130,
    "tgkill": 131,
    "rt_sigqueueinfo": 138,
  },
}
for table in NUMBERS.values():  # the same everywhere
  table |= {"io_uring_setup": 425, "clone3": 435, "fchmodat2": 452}
  table |= {"landlock_restrict_self": 446, "pidfd_open": 434}


def run(program: bytes, arch: int, number: int, arguments=()) -> int:
  """Runs the program as the kernel would; returns the errno, 0 for allowed."""
  words = [*arguments, *[0] * (6 - len(arguments))]
  words = [word & 0xFFFFFFFFFFFFFFFF for word in words]
  data = struct.pack("<IIQ6Q", number & 0xFFFFFFFF, arch, 0xDEAD, *words)
  lines = list(struct.iter_unpack("<HBBI", program))
  at, accumulator, n_steps = 0, 0, 0
  while True:
    code, if_true, if_false, k = lines[at]
    at += 1
    n_steps += 1
    if code == 0x20:
      assert k % 4 == 0
      (accumulator,) = struct.unpack_from("<I", data, k)
    elif code == 0x54:
      accumulator &= k
    elif code == 0x15:
      at += if_true if accumulator == k else if_false
    elif code == 0x35:
      at += if_true if accumulator >= k else if_false
    elif code == 0x05:
      at += k
    elif code == 0x06:
      assert n_steps < 30, "the search is not balanced"
      if k == 0x7FFF0000:
        return ALLOWED
      assert k & 0xFFFF0000 == 0x00050000, "neither allowed nor failed"
      return k & 0xFFFF
    else:
      raise AssertionError(f"unknown instruction {code:#x}")


def ask(machine, name, *arguments, may_change_metadata=False, landlock_abi=7):
  """Returns what becomes of a call by name, with the given arguments."""
  program = seccomp.build(
    machine, may_change_metadata=may_change_metadata, landlock_abi=landlock_abi
  )
  return run(program, ARCH[machine], NUMBERS[machine][name], arguments)


@pytest.fixture(params=MACHINES)
def machine(request):
  return request.param


def test_another_machine_is_an_error():
  with pytest.raises(ValueError, match="riscv64"):
    seccomp.build("riscv64", may_change_metadata=True, landlock_abi=0)


def test_ordinary_calls_pass(machine):
  for name in (
    *("read", "write", "openat", "openat2", "mmap", "futex", "getppid"),
    *("execve", "setrlimit", "getrandom", "ftruncate", "truncate"),
    *("landlock_restrict_self", "pidfd_open", "clone", "prlimit64"),
  ):
    assert ask(machine, name) == ALLOWED, name


@pytest.mark.parametrize(
  "name",
  [
    *("socket", "ptrace", "mount", "unshare", "bpf", "keyctl", "shmget"),
    *("mknodat", "io_uring_setup"),
  ],
)
def test_calls_that_no_calculation_needs_are_refused(machine, name):
  assert ask(machine, name, may_change_metadata=True) == errno.EPERM


@pytest.mark.parametrize("name", ["clone3", "memfd_create"])
def test_calls_with_a_fallback_seem_absent(machine, name):
  assert ask(machine, name) == errno.ENOSYS


THREAD, FORK = 0x3D0F00, 0x1200011
NEW_MOUNTS, NEW_GROUPS, NEW_NAMES, NEW_IPC = 1 << 17, 1 << 25, 1 << 26, 1 << 27
NEW_USERS, NEW_PIDS, NEW_NET = 1 << 28, 1 << 29, 1 << 30
UNIX, INET, TIPC = 1, 2, 30
STREAM, DGRAM, RAW, SEQPACKET, CLOEXEC = 1, 2, 3, 5, 0o2000000
TCGETS, TIOCSTI, TIOCLINUX, SETFLAGS = 0x5401, 0x5412, 0x541C, 0x40086602


@pytest.mark.parametrize(
  "name, arguments, is_allowed",
  [
    ("clone", (THREAD,), True),
    ("clone", (FORK,), True),
    ("clone", (NEW_MOUNTS,), False),
    ("clone", (NEW_GROUPS,), False),
    ("clone", (NEW_NAMES,), False),
    ("clone", (NEW_IPC,), False),
    ("clone", (NEW_USERS | FORK,), False),
    ("clone", (NEW_PIDS,), False),
    ("clone", (NEW_NET | THREAD,), False),
    ("socketpair", (UNIX, STREAM | CLOEXEC), True),
    ("socketpair", (UNIX, SEQPACKET), True),
    ("socketpair", (UNIX, DGRAM), False),
    ("socketpair", (UNIX, RAW | CLOEXEC), False),
    ("socketpair", (TIPC, STREAM), False),
    ("socketpair", (INET, STREAM), False),
    ("personality", (0xFFFFFFFF,), True),
    ("personality", (0,), True),
    ("personality", (0x0040000,), False),
    ("ioctl", (0, TCGETS), True),
    ("ioctl", (0, TIOCSTI), False),
    ("ioctl", (0, TIOCLINUX), False),
    ("ioctl", (0, SETFLAGS), False),
    ("ioctl", (0, 1 << 32 | TIOCSTI), False),  # the kernel drops the high half
    ("prlimit64", (0, 7), True),
    ("prlimit64", (1, 7), False),
    ("prlimit64", (0, 10), False),  # the mark of a call
    ("setrlimit", (7,), True),
    ("setrlimit", (10,), False),
    ("prlimit64", (1 << 32, 7), True),  # is pid 0 for the kernel
    ("sched_setaffinity", (0,), True),
    ("sched_setaffinity", (4321,), False),
    ("setpriority", (0, 0, 5), True),
    ("setpriority", (0, 4321, 5), False),
    ("setpriority", (2, 0, 5), False),
    ("ioprio_set", (1, 0), True),
    ("ioprio_set", (3, 0), False),
    ("ioprio_set", (1, 4321), False),
    ("fcntl", (0, 3), True),
    ("fcntl", (0, 4, 0x800), True),
    ("fcntl", (0, 8, 4321), False),
    ("fcntl", (0, 10, 9), False),
    ("fcntl", (0, 15, 0), False),
    ("fcntl", (1, 1031, 1 << 20), False),
    ("ioctl", (0, 0x8901), False),
    ("ioctl", (0, 0x8902), False),
    ("setsockopt", (0, 1, 2), True),
    ("setsockopt", (0, 1, 7), False),
    ("setsockopt", (0, 1, 32), False),
    ("tgkill", (4321, 4321, 9), True),
    ("kill", (4321, 9), True),
    ("kill", (0, 15), True),
    ("kill", (-1, 9), False),
    ("kill", (0xFFFFFFFF, 9), False),
  ],
)
def test_arguments_decide(machine, name, arguments, is_allowed):
  expected = ALLOWED if is_allowed else errno.EPERM
  assert ask(machine, name, *arguments) == expected


def test_what_is_guarded_is_sent_no_signal(machine):
  def asked(name, *arguments):
    program = seccomp.build(
      machine, may_change_metadata=True, landlock_abi=0, guarded=(4321, 77)
    )
    return run(program, ARCH[machine], NUMBERS[machine][name], arguments)

  for pid in (4321, 77):
    refused = [asked("kill", pid), asked("kill", -pid), asked("tkill", pid)]
    refused += [asked("tgkill", pid, pid), asked("tgkill", 5, pid)]
    refused += [asked("rt_sigqueueinfo", pid), asked("kill", -1)]
    assert set(refused) == {errno.EPERM}
  passed = [asked("kill", 0), asked("kill", 5), asked("kill", -5)]
  passed += [asked("tkill", 5), asked("tgkill", 5, 6)]
  assert set(passed) == {ALLOWED}


@pytest.mark.parametrize(
  "name, arguments",
  [
    ("fchmodat", ()),
    ("fchmodat2", ()),
    ("utimensat", ()),
    ("setxattr", ()),
    ("ioctl", (0, SETFLAGS)),
  ],
)
def test_metadata_is_refused_on_demand(machine, name, arguments):
  assert ask(machine, name, *arguments) == errno.EPERM
  assert ask(machine, name, *arguments, may_change_metadata=True) == ALLOWED


def test_old_metadata_calls_of_x86_are_refused():
  assert ask("x86_64", "chmod") == errno.EPERM
  assert ask("x86_64", "chmod", may_change_metadata=True) == ALLOWED


@pytest.mark.parametrize("abi, is_allowed", [(0, 1), (1, 0), (2, 0), (3, 1)])
def test_truncation_is_refused_where_landlock_does_not_know_it(
  machine, abi, is_allowed
):
  refused = ALLOWED if is_allowed else errno.EPERM
  assert ask(machine, "truncate", landlock_abi=abi) == refused
  assert ask(machine, "ftruncate", landlock_abi=abi) == ALLOWED
  for flags in (os.O_RDONLY, os.O_WRONLY | os.O_TRUNC, os.O_RDWR | os.O_TRUNC):
    assert ask(machine, "openat", 0, 0, flags, landlock_abi=abi) == ALLOWED
  for flags in (os.O_RDONLY | os.O_TRUNC, os.O_TRUNC | 3):
    assert ask(machine, "openat", 0, 0, flags, landlock_abi=abi) == refused
    if machine == "x86_64":
      assert ask(machine, "open", 0, flags, landlock_abi=abi) == refused
  absent = ALLOWED if is_allowed else errno.ENOSYS
  assert ask(machine, "openat2", landlock_abi=abi) == absent


def test_foreign_numbers_seem_absent(machine):
  program = seccomp.build(machine, may_change_metadata=True, landlock_abi=7)
  number = NUMBERS[machine]["read"]
  i386, arm = 0x40000003, 0x40000028
  other = ARCH[MACHINES[1 - MACHINES.index(machine)]]
  for arch in (i386, arm, other):
    assert run(program, arch, number) == errno.ENOSYS
  for beyond in (471, 0x40000000, 0x40000000 | number, 0x7FFFFFFF, -1):
    assert run(program, ARCH[machine], beyond) == errno.ENOSYS


def test_the_search_finds_every_rule(machine):
  """Binary search against the plain table, for all numbers."""
  some = tuple(range(4000, 4010))
  cases = ((True, 0, ()), (False, 1, ()), (False, 1, some), (False, 7, some))
  for may_change, abi, guarded in cases:
    program = seccomp.build(
      machine,
      may_change_metadata=may_change,
      landlock_abi=abi,
      guarded=guarded,
    )
    assert len(program) // 8 < 1000
    rules = seccomp._rules(machine, may_change, abi, guarded)
    for number in range(seccomp._LAST_KNOWN + 1):
      rule = rules.get(number)
      if rule is None:
        assert run(program, ARCH[machine], number) == ALLOWED, number
      elif not rule.checks:
        assert run(program, ARCH[machine], number) == rule.error, number


def table_entries():
  entries = [
    entry
    for table in (
      *TABLES,
      *(names for names, _ in seccomp._argument_rules(False, 1, (1,))),
    )
    for line in table.splitlines()
    if "#" not in line
    for entry in line.split(",")
    if entry.strip()
  ]
  return {name: numbers for name, *numbers in map(str.split, entries)}


HEADERS = {
  "x86_64": "x86_64-linux-gnu/asm/unistd_64.h",
  "aarch64": "asm-generic/unistd.h",
}


def test_no_number_is_named_twice(machine):
  i = MACHINES.index(machine)
  numbers = [n[i] for n in table_entries().values() if n[i] != "-"]
  assert len(numbers) == len(set(numbers)) > 100


def test_numbers_are_those_of_the_kernel_headers(machine):
  header = pathlib.Path("/usr/include", HEADERS[machine])
  if not header.exists():
    pytest.skip(f"no kernel headers: {header}")
  pattern = r"^#define\s+__NR(?:3264)?_(\w+)\s+(\d+)$"
  found = re.findall(pattern, header.read_text(), re.MULTILINE)
  kernel = {name: int(number) for name, number in found}
  newest = max(kernel.values())
  i = MACHINES.index(machine)
  for name, numbers in table_entries().items():
    if numbers[i] == "-":
      assert name not in kernel, name
    elif name in kernel or int(numbers[i]) <= newest:
      assert kernel[name] == int(numbers[i]), name
  for name, number in NUMBERS[machine].items():
    assert kernel.get(name, number) == number, name


# What follows asks the kernel.

needs_seccomp = pytest.mark.skipif(
  not seccomp.is_supported(), reason="this kernel takes no seccomp filter"
)
PRELUDE = """
import ctypes, errno, os, sys
from roc.host.sandbox import seccomp
libc = ctypes.CDLL(None, use_errno=True)
def refused(call, *arguments):
  try:
    call(*arguments)
  except PermissionError:
    return True
  return False
def fails(name, *arguments):
  result = getattr(libc, name)(*arguments)
  return errno.errorcode[ctypes.get_errno()] if result == -1 else result
assert libc.prctl(38, 1, 0, 0, 0) == 0  # no_new_privs
seccomp.Filter.prepare(may_change_metadata=False, landlock_abi=7).install()
"""


def confined(code: str, cwd: pathlib.Path) -> str:
  """Runs code under the filter in a fresh interpreter; returns its output."""
  done = subprocess.run(
    [sys.executable, "-c", PRELUDE + textwrap.dedent(code)],
    cwd=cwd,
    env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "TMPDIR": str(cwd)},
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


@needs_seccomp
def test_the_kernel_refuses_what_the_filter_names(tmp_path):
  out = confined(
    """
    import resource, socket
    for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX):
      for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        assert refused(socket.socket, family, kind)
    assert refused(socket.socketpair, socket.AF_UNIX, socket.SOCK_DGRAM)
    open("mine", "w").close()
    assert refused(os.chmod, "mine", 0o777)
    assert refused(os.chown, "mine", -1, -1)
    assert refused(os.utime, "mine")
    assert refused(os.setxattr, "mine", "user.a", b"b")
    assert refused(os.mkfifo, "pipe")
    assert refused(os.kill, -1, 0)
    assert refused(os.sched_setaffinity, os.getppid(), {0})
    assert refused(os.setpriority, os.PRIO_USER, 0, 19)
    assert refused(resource.prlimit, os.getppid(), resource.RLIMIT_CPU)
    assert fails("unshare", 0x10000000) == "EPERM"
    assert fails("setns", 0, 0) == "EPERM"
    assert fails("mount", b"none", b"/tmp", b"tmpfs", 0, None) == "EPERM"
    assert fails("chroot", b"/") == "EPERM"
    assert fails("ptrace", 0, 0, 0, 0) == "EPERM"
    assert fails("personality", 0x0040000) == "EPERM"
    assert fails("personality", -1) == 0
    assert fails("shmget", 0, 4096, 0o1600) == "EPERM"
    assert fails("process_vm_readv", os.getppid(), 0, 0, 0, 0, 0) == "EPERM"
    assert fails("ioctl", 0, 0x5412, 0) == "EPERM"
    by_number = {"x86_64": (250, 425, 435), "aarch64": (219, 425, 435)}
    keyctl, io_uring_setup, clone3 = by_number[os.uname().machine]
    assert fails("syscall", keyctl, 0, -3, 1) == "EPERM"
    assert fails("syscall", io_uring_setup, 1, 0) == "EPERM"
    assert fails("syscall", clone3, 0, 0) == "ENOSYS"
    assert fails("syscall", 471, 0, 0) == "ENOSYS"
    if hasattr(os, "memfd_create"):
      try:
        os.memfd_create("x")
      except OSError as error:
        assert error.errno == errno.ENOSYS
      else:
        raise AssertionError("memfd_create")
    if os.uname().machine == "x86_64":
      assert fails("syscall", 0x40000000 | 39) == "ENOSYS"  # getpid of x32
    print("held")
    """,
    tmp_path,
  )
  assert out == "held\n"


@needs_seccomp
def test_programs_still_live(tmp_path):
  out = confined(
    """
    import asyncio, concurrent.futures, resource, socket, subprocess, tempfile
    import multiprocessing, signal, threading

    async def add(a, b):
      await asyncio.sleep(0.001)
      return a + b
    assert asyncio.run(add(1, 2)) == 3

    barrier = threading.Barrier(62)
    threads = [threading.Thread(target=barrier.wait) for _ in range(61)]
    for thread in threads:
      thread.start()
    barrier.wait(30)
    for thread in threads:
      thread.join()

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
      assert list(pool.map(abs, range(-3, 0))) == [3, 2, 1]
    with tempfile.TemporaryDirectory() as folder:
      with tempfile.NamedTemporaryFile("w+", dir=folder) as f:
        f.write("x")
        f.truncate(0)
    done = subprocess.run(["echo", "hello"], capture_output=True, text=True)
    assert done.stdout == "hello\\n"
    code = "import socket; socket.socket()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert b"PermissionError" in done.stderr  # the filter survives exec
    here, there = multiprocessing.Pipe()
    here.send(1)
    assert there.recv() == 1
    a, b = socket.socketpair()
    a.sendall(b"x")
    assert b.recv(1) == b"x"
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 64), hard))
    os.nice(1)
    os.sched_setaffinity(0, os.sched_getaffinity(0))
    pid = os.fork()
    if pid == 0:
      signal.pause()
    os.kill(pid, 9)
    assert os.waitpid(pid, 0)[1] == 9
    a.close(), b.close(), here.close(), there.close()
    print("lived")
    """,
    tmp_path,
  )
  assert out == "lived\n"


@needs_seccomp
def test_filters_stack(tmp_path):
  out = confined(
    """
    seccomp.Filter.prepare(True, 0).install()
    assert refused(os.chmod, ".", 0o700)  # the stricter one holds
    print("stacked")
    """,
    tmp_path,
  )
  assert out == "stacked\n"


def test_a_missing_preparation_is_named(monkeypatch):
  """As the kernel answers all but root: root needs no preparation."""

  def call():
    ctypes.set_errno(errno.EACCES)
    return -1

  prepared = seccomp.Filter(b"")
  monkeypatch.setattr(prepared, "_call", call)
  with pytest.raises(PermissionError, match="no_new_privs is not set"):
    prepared.install()
