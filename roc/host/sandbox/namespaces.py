"""Namespaces by raw system calls: fork into them, join them, mount in them.

`os.unshare` and `os.setns` came with Python 3.12, and a fork whose child is the
caller's sibling, or the first process of a pid namespace, never did.
"""

import ctypes
import os
import platform
import signal

NEWNS = 0x00020000
NEWUTS = 0x04000000
NEWIPC = 0x08000000
NEWUSER = 0x10000000
NEWPID = 0x20000000
NEWNET = 0x40000000
SIBLING = 0x00008000  # CLONE_PARENT: the child's parent is the caller's

_CLONE_CHILD_CLEARTID = 0x00200000
_CLONE_CHILD_SETTID = 0x01000000
_PR_GET_TID_ADDRESS = 40
_MS_NOSUID, _MS_NODEV = 2, 4
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOSUID = 1, 2
_SYS_MOUNT_SETATTR = 442
# clone(2)'s number, and whether the thread pointer comes before the child's id.
_CLONE = {"x86_64": (56, False), "aarch64": (220, True)}

_libc = ctypes.CDLL(None, use_errno=True)
_python = ctypes.PyDLL(None, use_errno=True)  # calls keep the interpreter lock
_syscall = _python.syscall
_syscall.restype = ctypes.c_long
_syscall.argtypes = [ctypes.c_long] * 6


def _check(returned: int, what: str) -> int:
  if returned < 0:
    number = ctypes.get_errno()
    raise OSError(number, f"{what}: {os.strerror(number)}")
  return returned


def is_supported() -> bool:
  """Whether the calls' numbers are known for this processor."""
  return platform.machine() in _CLONE


def _tid_address() -> int:
  """Where the C library keeps the thread's id, for the kernel to renew it."""
  address = ctypes.c_ulong(0)
  got = _libc.prctl(_PR_GET_TID_ADDRESS, ctypes.byref(address), 0, 0, 0)
  return address.value if got == 0 else 0


def clone(flags: int = 0) -> int:
  """Forks like `os.fork`, with further flags of clone(2).

  Only for a process with one thread: the C library's own fork handlers are
  not run.

  Args:
    flags: `SIBLING` and `NEW*` in any combination.

  Returns:
    0 in the child, its pid in the caller.

  Raises:
    OSError: the kernel refused.
  """
  number, is_tls_first = _CLONE[platform.machine()]
  tid = _tid_address()
  flags |= signal.SIGCHLD
  if tid:
    flags |= _CLONE_CHILD_SETTID | _CLONE_CHILD_CLEARTID
  last = (0, tid) if is_tls_first else (tid, 0)
  _python.PyOS_BeforeFork()
  pid = _syscall(number, flags, 0, 0, *last)
  error = ctypes.get_errno()
  if pid == 0:
    _python.PyOS_AfterFork_Child()
    return 0
  _python.PyOS_AfterFork_Parent()
  if pid < 0:
    raise OSError(error, f"clone: {os.strerror(error)}")
  return pid


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


class PidNamespaces:
  """Where this process' next children are born: outside, or in one of many."""

  def __init__(self):
    # By descriptor, for /proc may be out of reach later.
    self._own = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    self._is_outside = True

  def enter(self, pid: int) -> None:
    """Has children born in the pid namespace whose process 1 is `pid`."""
    join(pid, NEWPID)
    self._is_outside = False

  def leave(self) -> None:
    """Has children born outside again, as a new namespace requires."""
    if not self._is_outside:
      _check(_libc.setns(self._own, NEWPID), "setns")
      self._is_outside = True


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
