"""Landlock rules: read the libraries, own the scratch directory, nothing else.

Landlock is the confinement that needs no privilege and cannot be undone. What
it does not cover is left to the seccomp filter: UDP and other sockets, and the
mode, owner, times and attributes of any file that can be named. Whether a file
exists, and its stat(2), stay visible.
"""

import contextlib
import ctypes
import errno
import os
import stat
import sys

# The same on every architecture.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_ASK_VERSION = 1  # LANDLOCK_CREATE_RULESET_VERSION
_PATH_BENEATH = 1  # LANDLOCK_RULE_PATH_BENEATH

_EXECUTE = 1 << 0
_WRITE_FILE = 1 << 1
_READ_FILE = 1 << 2
_READ_DIR = 1 << 3
_MAKE_CHAR = 1 << 6
_MAKE_BLOCK = 1 << 11
# How many rights on files each version knows, from the first on.
_RIGHTS_BY_ABI = (13, 14, 15, 15, 16, 16, 16, 16, 17)
_TCP = 0b11  # bind and connect, from version 4 on
_SCOPES = 0b11  # abstract unix sockets and signals, from version 6 on
# From version 7 on: what a program tries in vain is part of its result, and no
# reason to fill the machine's audit log.
_UNLOGGED = 1  # LANDLOCK_RESTRICT_SELF_LOG_SAME_EXEC_OFF

_DEVICES = (
  "/dev/null",
  "/dev/zero",
  "/dev/full",
  "/dev/random",
  "/dev/urandom",
)


class _RulesetAttributes(ctypes.Structure):
  """struct landlock_ruleset_attr; older kernels take it while the rest is 0."""

  _fields_ = [
    ("files", ctypes.c_uint64),
    ("network", ctypes.c_uint64),
    ("scopes", ctypes.c_uint64),
  ]


class _PathBeneath(ctypes.Structure):
  """struct landlock_path_beneath_attr; its packing moves no field."""

  _fields_ = [("allowed", ctypes.c_uint64), ("parent_fd", ctypes.c_int32)]


_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.restype = ctypes.c_long
_syscall.argtypes = [ctypes.c_long] * 5  # addresses too: no wrapping per call


def abi() -> int:
  """Returns the version of Landlock that this kernel enforces, 0 for none."""
  if not sys.platform.startswith("linux"):
    return 0
  return max(_syscall(_CREATE_RULESET, 0, 0, _ASK_VERSION, 0), 0)


def default_read_paths(interpreter_dirs: list[str]) -> list[str]:
  """Returns what a Python program reads that is no secret of this machine.

  Of /etc only what programs complain about when it is there but cannot be read;
  nothing of /proc, /sys and home directories.

  Args:
    interpreter_dirs: where the interpreter and its libraries are.
  """
  major, minor = sys.version_info[:2]
  return [
    "/usr",
    "/bin",
    "/sbin",
    "/lib",
    "/lib32",
    "/lib64",
    "/etc/ld.so.cache",
    "/etc/fonts",
    "/etc/localtime",
    "/etc/mime.types",
    f"/etc/python{major}.{minor}",  # Debian's sitecustomize points there
    *interpreter_dirs,
  ]


def default_device_paths() -> list[str]:
  """Returns the devices that every program may use."""
  return list(_DEVICES)


def _without_nested(paths: list[str]) -> list[str]:
  """Drops what does not exist or lies below another path, links resolved."""
  kept: list[str] = []
  for path in sorted({os.path.realpath(p) for p in paths if os.path.exists(p)}):
    # Sorted so, a directory stands before all that it holds.
    if not any(path.startswith(above.rstrip("/") + "/") for above in kept):
      kept.append(path)
  return kept


class Ruleset:
  """Rules prepared once; each forked child puts itself under a fresh copy.

  A copy, because a ruleset that was inherited is shared: the scratch directory
  that one child adds to it would be open to the next.
  """

  def __init__(self, version: int, rules: list[tuple[int, int]]):
    known = min(version, len(_RIGHTS_BY_ABI))
    every_right = (1 << _RIGHTS_BY_ABI[known - 1]) - 1
    self._attributes = _RulesetAttributes(
      files=every_right,
      network=_TCP if known >= 4 else 0,
      scopes=_SCOPES if known >= 6 else 0,
    )
    self._flags = _UNLOGGED if known >= 7 else 0
    self._rules = [_PathBeneath(*rule) for rule in rules]
    no_devices = every_right & ~(_MAKE_CHAR | _MAKE_BLOCK)
    self._scratch_rule = _PathBeneath(no_devices, -1)
    self._rules_and_scratch = [
      ctypes.addressof(rule) for rule in (*self._rules, self._scratch_rule)
    ]

  @classmethod
  def prepare(cls, read_paths: list[str], device_paths: list[str]) -> "Ruleset":
    """Opens what the rules name; what does not exist is left out.

    Args:
      read_paths: directories and files to read and execute.
      device_paths: devices to read and write.

    Raises:
      OSError: there is no Landlock here, or a path cannot be opened.
    """
    version = abi()
    if version == 0:
      raise OSError(errno.ENOSYS, "Landlock is not available")
    rules: list[tuple[int, int]] = []
    with contextlib.ExitStack() as undo:
      for paths, rights in (
        (_without_nested(read_paths), _READ_FILE | _READ_DIR | _EXECUTE),
        (_without_nested(device_paths), _READ_FILE | _WRITE_FILE),
      ):
        for path in paths:
          fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
          undo.callback(os.close, fd)
          is_directory = stat.S_ISDIR(os.fstat(fd).st_mode)
          rules.append((rights & (~0 if is_directory else ~_READ_DIR), fd))
      undo.pop_all()
    return cls(version, rules)

  def close(self) -> None:
    """Closes the prepared descriptors; the rules cannot be used after."""
    while self._rules:
      os.close(self._rules.pop().parent_fd)

  def restrict(self, scratch: str) -> None:
    """Puts the calling thread and all it starts under the rules, for good.

    Files below `scratch` may be made, changed, removed and run; all else that
    no rule names cannot even be opened. From version 4 on TCP is refused, from
    version 6 on signals to processes outside and abstract unix sockets too.

    Args:
      scratch: an existing directory.

    Raises:
      OSError: the kernel refused; `no_new_privs` must be set before.
    """
    attributes = ctypes.addressof(self._attributes)
    size = ctypes.sizeof(_RulesetAttributes)
    ruleset = _checked(_CREATE_RULESET, attributes, size, 0)
    try:
      fd = os.open(scratch, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
      try:
        self._scratch_rule.parent_fd = fd
        for address in self._rules_and_scratch:
          _checked(_ADD_RULE, ruleset, _PATH_BENEATH, address)
      finally:
        os.close(fd)
      _checked(_RESTRICT_SELF, ruleset, self._flags, 0)
    finally:
      os.close(ruleset)


def _checked(number: int, *arguments: int) -> int:
  result = _syscall(number, *arguments, 0)
  if result < 0:
    cause = ctypes.get_errno()
    message = f"Landlock, system call {number}: {os.strerror(cause)}"
    if number == _RESTRICT_SELF and cause == errno.EPERM:
      message += " (no_new_privs is not set)"
    raise OSError(cause, message)
  return result
