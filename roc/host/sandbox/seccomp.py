"""A seccomp filter that takes from a program what no calculation needs.

It is a deny-list: a list of what may be called breaks with every new libc and
library, and the boundary is Landlock, the user id or a namespace anyway. The
filter closes what those leave open. Three rules keep programs alive:

- Nothing is killed. A refused call fails with EPERM, which Python shows as
  PermissionError, a plain failure of the program, where a kill would read as a
  crash of it.
- Calls that libraries fall back from get ENOSYS, the answer of a kernel which
  does not have them. So do calls newer than this table, those of the x32 ABI
  and those of a foreign architecture (int 0x80 from 64-bit code): the numbers
  would mean something else there, and a denied one must not get through.
- Of arguments only what the kernel itself reads is compared: the low 32 bits.
"""

import ctypes
import dataclasses
import errno
import os
import struct
import sys
from collections.abc import Callable

# Name, number on x86_64, number on aarch64; "-" where there is no such call.
_ALWAYS_DENIED = """
  # The network. socketpair stays (see below): asyncio wakes itself through one.
  socket 41 198, connect 42 203, bind 49 200, listen 50 201,
  # Other processes of the same user: the supervisor, the trainer, another call.
  ptrace 101 117, process_vm_readv 310 270, process_vm_writev 311 271,
  process_madvise 440 440, process_mrelease 448 448, kcmp 312 272,
  pidfd_getfd 438 438, migrate_pages 256 238, move_pages 279 239,
  # It takes a directory of /proc for a pidfd, that of any process.
  pidfd_send_signal 424 424,
  # Mounts and namespaces; clone's flags are looked at below.
  mount 165 40, umount2 166 39, pivot_root 155 41, move_mount 429 429,
  open_tree 428 428, open_tree_attr 467 467, fsopen 430 430, fsconfig 431 431,
  fsmount 432 432, fspick 433 433, mount_setattr 442 442, statmount 457 457,
  listmount 458 458, chroot 161 51, unshare 272 97, setns 308 268,
  # Wide and often broken kernel surface.
  bpf 321 280, perf_event_open 298 241, userfaultfd 323 282,
  io_uring_setup 425 425, io_uring_enter 426 426, io_uring_register 427 427,
  add_key 248 217, request_key 249 218, keyctl 250 219, lookup_dcookie 212 18,
  modify_ldt 154 -, iopl 172 -, ioperm 173 -, fanotify_init 300 262,
  fanotify_mark 301 263,
  # Files by handle pass by every check of a path; devices are not files.
  name_to_handle_at 303 264, open_by_handle_at 304 265, mknod 133 -,
  mknodat 259 33,
  # The machine: its kernel, clock, name, swap, quotas and log.
  kexec_load 246 104, kexec_file_load 320 294, init_module 175 105,
  finit_module 313 273, delete_module 176 106, reboot 169 142, acct 163 89,
  swapon 167 224, swapoff 168 225, quotactl 179 60, quotactl_fd 443 443,
  syslog 103 116, settimeofday 164 170, clock_settime 227 112,
  clock_adjtime 305 266, adjtimex 159 171, sethostname 170 161,
  setdomainname 171 162, vhangup 153 58,
  # What a whole user or machine shares: watches (which also tell what other
  # calls open), slots for requests, the writing out of all disks.
  inotify_init 253 -, inotify_init1 294 26, io_setup 206 0, sync 162 81,
  syncfs 306 267,
  # Rules without end: kernel memory that nobody counts.
  landlock_create_ruleset 444 444, landlock_add_rule 445 445,
  # Objects that outlive the call, outside its files and uncounted.
  shmget 29 194, shmat 30 196, shmctl 31 195, semget 64 190, semop 65 193,
  semtimedop 220 192, semctl 66 191, msgget 68 186, msgsnd 69 189,
  msgrcv 70 188, msgctl 71 187, mq_open 240 180, mq_unlink 241 181,
"""
# clone3 passes its flags by pointer, which no filter can follow; glibc then
# uses clone. A memfd is memory that neither the address-space limit nor any
# file quota counts; programs go on with a file, as where the kernel has none.
_ALWAYS_ABSENT = """
  clone3 435 435, memfd_create 319 279, memfd_secret 447 447,
"""
# What Landlock leaves out: owners, modes, times and attributes of any file
# that this user owns, whether the program may write to it or not.
_METADATA = """
  chmod 90 -, fchmod 91 52, fchmodat 268 53, fchmodat2 452 452,
  chown 92 -, lchown 94 -, fchown 93 55, fchownat 260 54,
  utime 132 -, utimes 235 -, futimesat 261 -, utimensat 280 88,
  setxattr 188 5, lsetxattr 189 6, fsetxattr 190 7, setxattrat 463 463,
  removexattr 197 14, lremovexattr 198 15, fremovexattr 199 16,
  removexattrat 466 466, file_setattr 469 469,
"""
_LAST_KNOWN = 470  # listns, of Linux 6.19, on both architectures

_CLONE_NEW = 0x7E020000  # namespaces: NS, CGROUP, UTS, IPC, USER, PID, NET
_QUERY_PERSONALITY = 0xFFFFFFFF
_EVERYONE = 0xFFFFFFFF  # pid -1
_RLIMIT_LOCKS = 10
_AF_UNIX = 1
_SOCK_KIND, _SOCK_STREAM, _SOCK_SEQPACKET = 0xF, 1, 5
_SO_SNDBUF, _SO_SNDBUFFORCE = 7, 32
_F_SETOWN, _F_SETSIG, _F_SETOWN_EX, _F_SETPIPE_SZ = 8, 10, 15, 1031
_O_TRUNC, _O_ACCMODE = 0x200, 0x3
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C
_FIOSETOWN, _SIOCSPGRP = 0x8901, 0x8902
_METADATA_IOCTLS = (
  0x40086602,  # FS_IOC_SETFLAGS
  0x40087602,  # FS_IOC_SETVERSION
  0x401C5820,  # FS_IOC_FSSETXATTR
  0x40806685,  # FS_IOC_ENABLE_VERITY
)

_MACHINES = ("x86_64", "aarch64")
_AUDIT_ARCHES = (0xC000003E, 0xC00000B7)

# Classic BPF, as far as it is used here.
_LOAD = 0x20  # BPF_LD | BPF_W | BPF_ABS
_AND = 0x54  # BPF_ALU | BPF_AND | BPF_K
_IF_EQUAL = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_IF_AT_LEAST = 0x35  # BPF_JMP | BPF_JGE | BPF_K
_JUMP = 0x05  # BPF_JMP | BPF_JA
_RETURN = 0x06  # BPF_RET | BPF_K
_ALLOW = 0x7FFF0000
_FAIL = 0x00050000
_AT_NUMBER, _AT_ARCH, _AT_ARGUMENTS = 0, 4, 16  # in struct seccomp_data

_PR_SET_SECCOMP = 22
_SECCOMP_MODE_FILTER = 2

_Instruction = tuple[int, int, int, int]  # code, jump if true, if false, k


@dataclasses.dataclass(frozen=True)
class _Check:
  """Refuses by one argument: by listed values, or by all but the listed."""

  argument: int
  values: tuple[int, ...]
  refuses_listed: bool = False
  mask: int = 0xFFFFFFFF


@dataclasses.dataclass(frozen=True)
class _Rule:
  """Fails a call with `error`: always, or when one of the checks refuses."""

  error: int
  checks: tuple[_Check, ...] = ()


def _argument_rules(
  may_change_metadata: bool, landlock_abi: int, guarded: tuple[int, ...]
) -> list[tuple[str, _Rule]]:
  """Rules for the calls that only some arguments make harmful."""
  groups = tuple(-pid & 0xFFFFFFFF for pid in guarded)

  def only(argument: int, *values: int, mask: int = 0xFFFFFFFF) -> _Check:
    return _Check(argument, values, mask=mask)

  def never(argument: int, *values: int, mask: int = 0xFFFFFFFF) -> _Check:
    return _Check(argument, values, refuses_listed=True, mask=mask)

  def refuse(*checks: _Check) -> _Rule:
    return _Rule(errno.EPERM, checks)

  ioctls = (_TIOCSTI, _TIOCLINUX, _FIOSETOWN, _SIOCSPGRP)
  if not may_change_metadata:
    ioctls += _METADATA_IOCTLS
  rules = [
    ("clone 56 220", refuse(only(0, 0, mask=_CLONE_NEW))),
    ("personality 135 92", refuse(only(0, 0, _QUERY_PERSONALITY))),
    ("ioctl 16 29", refuse(never(1, *ioctls))),
    # A pair of datagram sockets could be pointed at any other socket.
    (
      "socketpair 53 199",
      refuse(
        only(0, _AF_UNIX),
        only(1, _SOCK_STREAM, _SOCK_SEQPACKET, mask=_SOCK_KIND),
      ),
    ),
    # What waits in pipes and sockets is memory that no limit counts: as they
    # are made they hold little.
    ("setsockopt 54 208", refuse(never(2, _SO_SNDBUF, _SO_SNDBUFFORCE))),
    # And whoever owns a descriptor is sent signals, whatever process it is.
    (
      "fcntl 72 25",
      refuse(never(1, _F_SETOWN, _F_SETSIG, _F_SETOWN_EX, _F_SETPIPE_SZ)),
    ),
    # Limits and priorities of others: the trainer's could be ruined.
    # The limit on file locks is the mark of a call, see `linux`.
    ("prlimit64 302 261", refuse(only(0, 0), never(1, _RLIMIT_LOCKS))),
    ("setrlimit 160 164", refuse(never(0, _RLIMIT_LOCKS))),
    (
      "sched_setaffinity 203 122, sched_setscheduler 144 119,"
      "sched_setparam 142 118, sched_setattr 314 274",
      refuse(only(0, 0)),  # the pid: itself
    ),
    ("setpriority 141 140", refuse(only(0, 0), only(1, 0))),
    ("ioprio_set 251 30", refuse(only(0, 1), only(1, 0))),
    ("kill 62 129", refuse(never(0, _EVERYONE, *guarded, *groups))),
  ]
  if guarded:
    rules += [
      ("tkill 200 130, rt_sigqueueinfo 129 138", refuse(never(0, *guarded))),
      (
        "tgkill 234 131, rt_tgsigqueueinfo 297 240",
        refuse(never(0, *guarded), never(1, *guarded)),
      ),
    ]
  if 1 <= landlock_abi < 3:
    # Truncation is no right of its own yet. What opens a file for reading (or,
    # as mode 3, for neither) while it empties it looks like a plain read.
    emptying = (_O_TRUNC, _O_TRUNC | _O_ACCMODE)
    mask = _O_TRUNC | _O_ACCMODE
    rules += [
      ("truncate 76 45", refuse()),
      ("open 2 -", refuse(never(1, *emptying, mask=mask))),
      ("openat 257 56", refuse(never(2, *emptying, mask=mask))),
      ("openat2 437 437", _Rule(errno.ENOSYS)),  # flags by pointer
    ]
  return rules


def _numbers(table: str, machine: str) -> list[int]:
  """Returns the numbers of a table's calls on one architecture."""
  lines = [line for line in table.splitlines() if "#" not in line]
  numbers = []
  for entry in "".join(lines).split(","):
    if entry.strip():
      _, *by_machine = entry.split()
      number = by_machine[_MACHINES.index(machine)]
      if number != "-":
        numbers.append(int(number))
  return numbers


def _rules(
  machine: str,
  may_change_metadata: bool,
  landlock_abi: int,
  guarded: tuple[int, ...],
) -> dict[int, _Rule]:
  tables = [
    (_ALWAYS_DENIED, _Rule(errno.EPERM)),
    (_ALWAYS_ABSENT, _Rule(errno.ENOSYS)),
    *_argument_rules(may_change_metadata, landlock_abi, guarded),
  ]
  if not may_change_metadata:
    tables.append((_METADATA, _Rule(errno.EPERM)))
  rules = {}
  for table, rule in tables:
    rules.update(dict.fromkeys(_numbers(table, machine), rule))
  return rules


def _end(rule: _Rule | None) -> list[_Instruction]:
  """Decides a call whose number is known: None allows it."""
  if rule is None:
    return [(_RETURN, 0, 0, _ALLOW)]
  refusal = (_RETURN, 0, 0, _FAIL | rule.error)
  if not rule.checks:
    return [refusal]
  code = [(_RETURN, 0, 0, _ALLOW), refusal]
  for check in reversed(rule.checks):  # what follows a check stands already
    compares = []
    for to_next, value in enumerate(reversed(check.values)):
      to_refusal = to_next + len(code) - 1
      if check.refuses_listed:
        compare = (_IF_EQUAL, to_refusal, 0, value)
      else:
        last = to_refusal if to_next == 0 else 0
        compare = (_IF_EQUAL, to_next, last, value)
      compares.insert(0, compare)
    load = (_LOAD, 0, 0, _AT_ARGUMENTS + 8 * check.argument)
    code = [load, (_AND, 0, 0, check.mask), *compares, *code]
  return code


def _search(runs: list[tuple[int, _Rule | None]]) -> list[_Instruction]:
  """A binary search for the run of numbers that holds a call's number."""
  if len(runs) == 1:
    return _end(runs[0][1])
  middle = len(runs) // 2
  below, above = _search(runs[:middle]), _search(runs[middle:])
  first = runs[middle][0]
  if len(below) < 1 << 8:
    return [(_IF_AT_LEAST, len(below), 0, first), *below, *above]
  # The jump of a comparison has eight bits.
  far = (_JUMP, 0, 0, len(below))
  return [(_IF_AT_LEAST, 0, 1, first), far, *below, *above]


def build(
  machine: str,
  *,
  may_change_metadata: bool,
  landlock_abi: int,
  guarded: tuple[int, ...] = (),
) -> bytes:
  """Returns the filter as the kernel wants it: packed struct sock_filter.

  Calls are found by binary search over runs of numbers with the same answer,
  about eight comparisons. From Linux 5.11 on the kernel works out at the start
  which calls are always allowed and runs no filter at all for those.

  Args:
    machine: "x86_64" or "aarch64", as platform.machine() has it.
    may_change_metadata: False refuses changes of mode, owner, times and
      attributes, which Landlock does not cover. For a user who owns nothing
      but the scratch directory True is harmless.
    landlock_abi: of the Landlock rules that will hold beside the filter, 0 for
      none. Of 1 and 2, which know no truncation, the filter takes that over.
    guarded: processes, and process groups, that are not to be signalled.

  Returns:
    Eight bytes per instruction, little-endian.

  Raises:
    ValueError: another machine.
  """
  if machine not in _MACHINES:
    raise ValueError(f"machine={machine!r} is none of {_MACHINES}")
  arch = _AUDIT_ARCHES[_MACHINES.index(machine)]
  rules = _rules(machine, may_change_metadata, landlock_abi, guarded)
  runs: list[tuple[int, _Rule | None]] = [(0, rules.get(0))]
  for number in range(1, _LAST_KNOWN + 1):
    if rules.get(number) != runs[-1][1]:
      runs.append((number, rules.get(number)))
  runs.append((_LAST_KNOWN + 1, _Rule(errno.ENOSYS)))  # x32 lies up there too
  program = [
    (_LOAD, 0, 0, _AT_ARCH),
    (_IF_EQUAL, 1, 0, arch),
    (_RETURN, 0, 0, _FAIL | errno.ENOSYS),
    (_LOAD, 0, 0, _AT_NUMBER),
    *_search(runs),
  ]
  return b"".join(struct.pack("<HBBI", *line) for line in program)


class _Program(ctypes.Structure):
  """struct sock_fprog."""

  _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_void_p)]


def _seccomp_call(program_address: int | None) -> Callable[[], int]:
  """Returns prctl(PR_SET_SECCOMP) with its arguments made, ready to call."""
  prctl = ctypes.CDLL(None, use_errno=True).prctl
  word = ctypes.c_ulong
  address = ctypes.c_void_p(program_address)
  mode = word(_SECCOMP_MODE_FILTER)
  return lambda: prctl(_PR_SET_SECCOMP, mode, address, word(0), word(0))


def is_supported() -> bool:
  """Says whether this kernel takes filters, and this process is one we know."""
  if not sys.platform.startswith("linux") or sys.maxsize < 1 << 32:
    return False
  if os.uname().machine not in _MACHINES:
    return False
  # The documented question: a filter at no address is a fault if filters are
  # known, and an invalid argument if not.
  return _seccomp_call(None)() == -1 and ctypes.get_errno() == errno.EFAULT


class Filter:
  """A filter that was prepared once and is installed in each forked child."""

  def __init__(self, program: bytes):
    self._code = ctypes.create_string_buffer(program, len(program))
    self._program = _Program(len(program) // 8, ctypes.addressof(self._code))
    self._call = _seccomp_call(ctypes.addressof(self._program))

  @classmethod
  def prepare(
    cls,
    may_change_metadata: bool,
    landlock_abi: int,
    guarded: tuple[int, ...] = (),
  ) -> "Filter":
    """Builds the filter for this machine; arguments as for `build`.

    Raises:
      ValueError: a machine that there is no table for.
    """
    return cls(
      build(
        os.uname().machine,
        may_change_metadata=may_change_metadata,
        landlock_abi=landlock_abi,
        guarded=guarded,
      )
    )

  def install(self) -> None:
    """Puts the calling thread and all it starts under the filter, for good.

    Raises:
      OSError: the kernel refused; `no_new_privs` must be set before.
    """
    if self._call() == 0:
      return
    number = ctypes.get_errno()
    message = f"prctl(PR_SET_SECCOMP): {os.strerror(number)}"
    if number == errno.EACCES:
      message += " (no_new_privs is not set)"
    raise OSError(number, message)
