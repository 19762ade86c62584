"""Namespaces and forks by raw system calls, and mounts in a namespace.

`os.unshare` and `os.setns` came with Python 3.12, and a fork whose child is the
caller's sibling, or the first process of a pid namespace, never did.
"""

import ctypes
import itertools
import os
import platform
import signal
import socket
import typing

NEWNS = 0x00020000
NEWUTS = 0x04000000
NEWIPC = 0x08000000
NEWUSER = 0x10000000
NEWPID = 0x20000000
NEWNET = 0x40000000
SIBLING = 0x00008000  # CLONE_PARENT: the child's parent is the caller's

_CLONE_CHILD_CLEARTID = 0x00200000
_CLONE_CHILD_SETTID = 0x01000000
_PR_SET_PDEATHSIG = 1
_PR_GET_TID_ADDRESS = 40
_MS_NOSUID, _MS_NODEV = 2, 4
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOSUID = 1, 2
_SYS_MOUNT_SETATTR = 442
# clone(2)'s number, and whether the thread pointer comes before the child's id.
_CLONE = {"x86_64": (56, False), "aarch64": (220, True)}

_CLONE_VM = 0x00000100
_STACK_BYTES = 1 << 14

_libc = ctypes.CDLL(None, use_errno=True)
_python = ctypes.PyDLL(None, use_errno=True)  # calls keep the interpreter lock
_syscall = _python.syscall
_syscall.restype = ctypes.c_long
_syscall.argtypes = [ctypes.c_long] * 6
_python.clone.argtypes = [
  ctypes.c_void_p,
  ctypes.c_void_p,
  ctypes.c_int,
  ctypes.c_void_p,
]
_read_one = ctypes.cast(_libc.fgetc_unlocked, ctypes.c_void_p).value
_libc.fdopen.restype = ctypes.c_void_p
_libc.setvbuf.argtypes = [
  ctypes.c_void_p,
  ctypes.c_void_p,
  ctypes.c_int,
  ctypes.c_size_t,
]
_FULLY_BUFFERED = 0
_buffer = ctypes.create_string_buffer(64)
# First processes take turns: one that has not come as far as read(2) yet must
# not share its stack with the next.
_N_STACKS = 16
_stacks = ctypes.create_string_buffer(_N_STACKS * _STACK_BYTES)
_turns = itertools.cycle(range(1, _N_STACKS + 1))


def _check(returned: int, what: str) -> int:
  if returned < 0:
    number = ctypes.get_errno()
    raise OSError(number, f"{what}: {os.strerror(number)}")
  return returned


def is_supported() -> bool:
  """Whether the calls' numbers are known for this processor."""
  return platform.machine() in _CLONE


def _clone_arguments() -> tuple[int, int, tuple[int, int]]:
  """Number, flags and last arguments of clone(2), as fork(2) would have them.

  The kernel is told where the C library keeps the thread's id, to renew it.
  """
  number, is_tls_first = _CLONE[platform.machine()]
  tid = ctypes.c_ulong(0)
  if _libc.prctl(_PR_GET_TID_ADDRESS, ctypes.byref(tid), 0, 0, 0) != 0:
    return number, int(signal.SIGCHLD), (0, 0)
  flags = signal.SIGCHLD | _CLONE_CHILD_SETTID | _CLONE_CHILD_CLEARTID
  last = (0, tid.value) if is_tls_first else (tid.value, 0)
  return number, int(flags), last


_arguments: list[tuple[int, int, tuple[int, int]]] = []


def bare_fork(flags: int = 0) -> int:
  """Forks a process with one thread; no hook of Python's or the C library's.

  What the hooks renew is unchanged when the only thread forks, and each costs
  pages copied in every child.

  Args:
    flags: of clone(2), such as `SIBLING`.

  Returns:
    0 in the child, its pid in the caller.

  Raises:
    OSError: the kernel refused.
  """
  if not _arguments:
    _arguments.append(_clone_arguments())
  number, basic, last = _arguments[0]
  return _check(_syscall(number, basic | flags, 0, 0, *last), "clone")


def fork_without_hooks() -> int:
  """Forks by the C library, which renews its own locks; no hook of Python's.

  A thread that Python has joined may still be on its way out in the C library
  and hold a lock of it.

  Raises:
    OSError: the kernel refused.
  """
  return _check(_python.fork(), "fork")


def fork() -> int:
  """`os.fork` without its warning that other threads exist.

  Python's hooks run, so that the child is fit to have threads of its own.
  """
  _python.PyOS_BeforeFork()
  try:
    pid = fork_without_hooks()
  except OSError:
    _python.PyOS_AfterFork_Parent()
    raise
  if pid == 0:
    _python.PyOS_AfterFork_Child()
  else:
    _python.PyOS_AfterFork_Parent()
  return pid


def open_lifeline(fd: int) -> int:
  """Returns a C stream for `start_first_process`, by its address.

  Args:
    fd: reading end of a pipe into which nobody writes.

  Raises:
    OSError: there is no memory.
  """
  stream = _libc.fdopen(fd, b"r")
  if not stream:
    raise OSError(ctypes.get_errno(), "fdopen")
  _libc.setvbuf(stream, _buffer, _FULLY_BUFFERED, len(_buffer))
  return stream


def start_first_process(lifeline: int) -> int:
  """Starts process 1 of a new pid namespace, a sibling; returns its pid.

  It shares this process' memory, so that it costs next to nothing, and does
  nothing with it: it waits in read(2) until it is killed, or until the pipe
  ends with the last process that could write to it. Signals from inside its
  namespace do not reach it; where this process ignores SIGCHLD, so does it, and
  the kernel reaps the namespace's orphans. Those that wait can share a stack:
  whichever comes back only ends, in one way or another.

  Args:
    lifeline: from `open_lifeline`.

  Raises:
    OSError: the kernel refused.
  """
  top = (ctypes.addressof(_stacks) + next(_turns) * _STACK_BYTES) & ~63
  flags = _CLONE_VM | SIBLING | NEWPID | signal.SIGCHLD
  return _check(_python.clone(_read_one, top, int(flags), lifeline), "clone")


def unshare(flags: int) -> None:
  """Moves this process into new namespaces (a new pid one: its children)."""
  _check(_libc.unshare(flags), "unshare")


def join(pid: int, flags: int) -> None:
  """Enters the `flags` namespaces of a process that is not reaped yet."""
  fd = os.pidfd_open(pid)
  try:
    _check(_libc.setns(fd, flags), "setns")
  finally:
    os.close(fd)


class Nursery:
  """Pid namespaces, one after the other, for a process' children to be born in.

  One is always ready before it is needed. A process that has entered another
  namespace cannot make a new one before it is back in its own, and inside a
  user namespace there is no way back: there a second process makes them.

  Args:
    can_return: whether this process has rights over its own pid namespace.
    lifeline_fd: reading end of a pipe; when the supervisor, which alone holds
      the other end, is dead, the namespaces end.

  Attributes:
    spare: process 1 of the namespace that is ready; 0 when there is none.
    midwife: pid of the second process; 0 where there is none.

  Raises:
    OSError: the kernel refused.
  """

  def __init__(self, can_return: bool, lifeline_fd: int):
    self._lifeline = open_lifeline(lifeline_fd)
    # By descriptor, for /proc may be out of reach later.
    self._own = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    self.midwife, self._line = 0, None
    if not can_return:
      self.midwife, self._line = _start_midwife(self._lifeline)
    self.spare = self._make()

  def enter(self) -> int:
    """Has the next child born in the spare namespace; returns its process 1."""
    if not self.spare:
      self.spare = self._make()
    pid, self.spare = self.spare, 0
    join(pid, NEWPID)
    return pid

  def renew(self) -> int:
    """Makes the next spare namespace; returns its process 1.

    Returns:
      0 where the kernel refused; `enter` tries again, and says why.
    """
    try:
      self.spare = self.spare or self._make()
    except OSError:
      self.spare = 0
    return self.spare

  def _make(self) -> int:
    if self._line is None:
      _check(_libc.setns(self._own, NEWPID), "setns")
      return start_first_process(self._lifeline)
    self._line.send(b"?")
    pid = int(self._line.recv(32) or b"-1")
    if pid < 0:
      raise OSError(-pid, f"clone: {os.strerror(-pid)}")
    return pid


def _start_midwife(lifeline: int) -> tuple[int, socket.socket]:
  """Forks the process that makes pid namespaces for one that cannot.

  Returns:
    Its pid, and the socket to ask it by.
  """
  ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
  pid = bare_fork(SIBLING)
  if pid == 0:
    ours.close()
    _be_midwife(theirs, lifeline)
  theirs.close()
  return pid, ours


def _be_midwife(sock: socket.socket, lifeline: int) -> typing.NoReturn:
  """Makes a pid namespace for every byte that comes, until none can come."""
  _libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
  try:
    while sock.recv(1):
      try:
        answer = start_first_process(lifeline)
      except OSError as error:
        answer = -(error.errno or 1)
      sock.send(b"%d" % answer)
  finally:
    os._exit(0)
  raise AssertionError("unreachable")


def keep_mounts_private() -> None:
  """Lets no later mount of this namespace reach another one."""
  got = _libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
  _check(got, "mount private")


def make_mounts_read_only() -> None:
  """Makes everything that is mounted now read-only, setuid files powerless.

  Raises:
    OSError: before Linux 5.12, or a mount that may not be changed.
  """
  attributes = (ctypes.c_uint64 * 4)(
    _MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOSUID, 0, 0, 0
  )
  got = _syscall(
    _SYS_MOUNT_SETATTR,
    _AT_FDCWD,
    ctypes.cast(ctypes.c_char_p(b"/"), ctypes.c_void_p).value,
    _AT_RECURSIVE,
    ctypes.addressof(attributes),
    ctypes.sizeof(attributes),
  )
  _check(got, "mount_setattr")


def mount_tmpfs(
  path: str, n_bytes: int, n_inodes: int, uid: int | None
) -> None:
  """Mounts an empty file system in memory of that size, owned by `uid`."""
  options = f"size={n_bytes},nr_inodes={n_inodes},mode=0700"
  if uid is not None:
    options += f",uid={uid},gid={uid}"
  got = _libc.mount(
    b"tmpfs",
    os.fsencode(path),
    b"tmpfs",
    _MS_NOSUID | _MS_NODEV,
    options.encode(),
  )
  _check(got, "mount tmpfs")


def set_hostname(name: str) -> None:
  """Names the machine in this UTS namespace."""
  data = name.encode()
  _check(_libc.sethostname(data, len(data)), "sethostname")


def write_id_maps(
  pid: int, uids: list[list[int]], gids: list[list[int]], is_privileged: bool
) -> None:
  """Maps ids to themselves in the user namespace of a process.

  Args:
    pid: a process that has just entered a new user namespace.
    uids: [first, how many] ranges of users.
    gids: the same of groups.
    is_privileged: whether this process may map more than its own ids; else
      setgroups(2) must be given up in the namespace.
  """
  if not is_privileged:
    with open(f"/proc/{pid}/setgroups", "w") as f:
      f.write("deny")
  for name, ranges in (("uid_map", uids), ("gid_map", gids)):
    with open(f"/proc/{pid}/{name}", "w") as f:
      f.write("".join(f"{first} {first} {n}\n" for first, n in ranges))
