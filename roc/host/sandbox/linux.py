"""The few kernel facts that Python does not wrap: process tree, prctl, clocks.

Which process belongs to which call is the question here. Process groups and
sessions do not answer it (a program leaves both by `setsid`), parents neither
(an orphan is handed to the nearest subreaper). A hard resource limit does: it
is inherited through fork and exec and cannot be raised again, so a call's
number is written into RLIMIT_LOCKS, which Linux has not used since 2.4.25.
"""

import contextlib
import ctypes
import os
import resource
import signal
import time
import typing
from collections.abc import Callable

_RLIMIT_LOCKS = 10
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38
_MADV_COLLAPSE = 25
_PF_EXITING = 4
_HUGE = 2 << 20
_PR_SET_DUMPABLE = 4
_PR_SET_KEEPCAPS = 8
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_RAISE = 2
_CAPABILITY_VERSION_3 = 0x20080522
CAP_CHOWN = 1 << 0
CAP_DAC_OVERRIDE = 1 << 1
CAP_DAC_READ_SEARCH = 1 << 2
CAP_KILL = 1 << 5
CAP_SETGID = 1 << 6
CAP_SETUID = 1 << 7
CAP_SYS_ADMIN = 1 << 21

_libc = ctypes.CDLL(None, use_errno=True)
# Made once, for a child copies every page that it writes to. The words are two
# each of effective, permitted and inheritable.
_capability_header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
_capability_words = (ctypes.c_uint32 * 6)()
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_own_tag = resource.getrlimit(_RLIMIT_LOCKS)[1]


def _prctl(option: int, value: int) -> None:
  if _libc.prctl(option, value, 0, 0, 0) != 0:
    number = ctypes.get_errno()
    raise OSError(number, f"prctl({option}): {os.strerror(number)}")


def die_with_parent(how: int = int(signal.SIGKILL)) -> None:
  """Asks for signal `how` when the thread that forked this process ends."""
  _prctl(_PR_SET_PDEATHSIG, how)


def adopt_orphans() -> None:
  """Makes this process the parent of its descendants' orphans."""
  _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def hide_memory() -> None:
  """Closes this process to debuggers and to readers of its /proc files."""
  _prctl(_PR_SET_DUMPABLE, 0)


def show_memory() -> None:
  """Takes `hide_memory` back, which a change of user brings by itself."""
  _prctl(_PR_SET_DUMPABLE, 1)


def pause_forever() -> typing.NoReturn:
  """Sleeps until killed."""
  while True:
    _libc.pause()


def forbid_new_privileges() -> None:
  """Makes setuid binaries powerless for this process and all below it."""
  _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def effective_capabilities() -> int:
  """Returns the capabilities that this process may use now, as bits."""
  with open("/proc/self/status") as f:
    return next(int(line.split()[1], 16) for line in f if "CapEff" in line)


def hold_capabilities(kept: int, on_exec: bool = False) -> None:
  """Gives up all capabilities but `kept` of those held.

  Args:
    kept: bits of capabilities 0 to 31; 0 for none.
    on_exec: whether the programs that are started keep them too, which root's
      do anyway.

  Raises:
    OSError: the kernel refused.
  """
  header, words = _capability_header, _capability_words
  _check_capability(_libc.capget(header, words), "capget")
  permitted = words[1] & kept
  inheritable = permitted if on_exec else 0
  words[:] = [permitted, permitted, inheritable, 0, 0, 0]
  _check_capability(_libc.capset(header, words), "capset")
  for number in range(inheritable.bit_length()):
    if inheritable >> number & 1:
      raised = _libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, number, 0, 0)
      _check_capability(raised, "prctl(PR_CAP_AMBIENT)")


def _check_capability(returned: int, name: str) -> None:
  if returned != 0:
    number = ctypes.get_errno()
    raise OSError(number, f"{name}: {os.strerror(number)}")


def become(uid: int, keeps: int) -> None:
  """Turns root into an ordinary user for good, with `keeps` capabilities.

  The group gets the same number and is the only one.

  Raises:
    OSError: the kernel refused.
  """
  if keeps:
    _prctl(_PR_SET_KEEPCAPS, 1)
  os.setgroups([])
  os.setresgid(uid, uid, uid)
  os.setresuid(uid, uid, uid)
  hold_capabilities(keeps, on_exec=True)


def flush_c_streams() -> None:
  """Writes out what C code left in stdio buffers."""
  _libc.fflush(None)


def collapse_memory() -> None:
  """Puts this process' memory on huge pages, where the kernel can.

  A fork copies one entry for each page and an exit drops it again; of 54 MB of
  small pages that is a millisecond. A program that writes to a huge page splits
  it and copies four kilobytes, as ever.
  """
  with open("/proc/self/maps") as f:
    areas = [line.split() for line in f]
  for area in areas:
    is_anonymous = len(area) == 5 or area[5] == "[heap]"
    if area[1] != "rw-p" or not is_anonymous:
      continue
    start, end = (int(word, 16) for word in area[0].split("-"))
    for address in range(-(-start // _HUGE) * _HUGE, end - _HUGE + 1, _HUGE):
      # Before Linux 6.1, or no huge page is free: nothing is lost.
      _libc.madvise(ctypes.c_void_p(address), _HUGE, _MADV_COLLAPSE)


def offer_to_oom_killer() -> None:
  """Lets the kernel shoot the sandbox before it shoots the trainer."""
  with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as f:
    f.write("1000")


def lower_descriptor_limit(n: int) -> None:
  """Bounds this process' descriptors, and so what closing them all costs.

  Where Python was built without close_range(2), `os.closerange` closes every
  possible number one by one, and containers often allow a million.
  """
  hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
  soft = n if hard == resource.RLIM_INFINITY else min(n, hard)
  resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def first_tag() -> int:
  """Returns the largest call tag this process may hand out; count down."""
  hard = resource.getrlimit(_RLIMIT_LOCKS)[1]
  return 1 << 40 if hard == resource.RLIM_INFINITY else hard - 1


def set_tag(tag: int, pid: int = 0) -> None:
  """Marks a process, by default this one, and all it will ever start.

  Every process of call `tag` carries the mark.
  """
  resource.prlimit(pid, _RLIMIT_LOCKS, (tag, tag))


def read_tag(pid: int) -> int | None:
  """Returns the tag of a process, or None when it is gone."""
  try:
    return resource.prlimit(pid, _RLIMIT_LOCKS)[1]
  except PermissionError:  # of another user, and we lack CAP_SYS_RESOURCE
    return _tag_by_file(pid)
  except (OSError, ValueError):
    return None


def _tag_by_file(pid: int) -> int | None:
  try:
    with open(f"/proc/{pid}/limits", "rb") as f:
      line = next(line for line in f if line.startswith(b"Max file locks"))
  except (OSError, StopIteration):
    return None
  hard = line.split()[4]
  return resource.RLIM_INFINITY if hard == b"unlimited" else int(hard)


def cpu_seconds(pid: int) -> float:
  """Returns the CPU time of all threads of a process, 0.0 when it is gone."""
  clock = (~pid << 3) | 2  # what clock_getcpuclockid(3) computes
  try:
    return time.clock_gettime(clock)
  except OSError:
    return 0.0


def address_space_bytes() -> int:
  """Returns the size of this process' address space, as RLIMIT_AS counts."""
  with open("/proc/self/statm", "rb") as f:
    return int(f.read().split()[0]) * resource.getpagesize()


def _stat(path: str) -> list[bytes]:
  """Returns the fields of a stat file from the state on; [] when it is gone."""
  try:
    with open(f"{path}/stat", "rb") as f:
      # The command may hold anything, a ")" too: fields follow the last one.
      return f.read().rpartition(b")")[2].split()
  except OSError:
    return []


def parent(pid: int) -> int:
  """Returns the pid of a process' parent, 0 when it is gone."""
  fields = _stat(f"/proc/{pid}")
  return int(fields[1]) if fields else 0


def is_exiting(pid: int) -> bool:
  """Whether a process is on its way out, or gone."""
  fields = _stat(f"/proc/{pid}")
  if not fields:
    return True
  return fields[0] in (b"Z", b"X") or bool(int(fields[6]) & _PF_EXITING)


def n_threads(pid: int) -> int:
  """Returns how many threads of a process live; 0 for a zombie.

  A process whose first thread has ended looks like a zombie while its other
  threads run on.
  """
  fields = _stat(f"/proc/{pid}")
  if not fields:
    return 0
  n = int(fields[17])
  return n - 1 if fields[0] in (b"Z", b"X") else n


def is_stopped(pid: int) -> bool:
  """Whether no thread of a process can run before it gets SIGCONT."""
  try:
    tasks = os.listdir(f"/proc/{pid}/task")
  except OSError:
    return False
  states = [_stat(f"/proc/{pid}/task/{task}")[:1] for task in tasks]
  return all(s in ([b"T"], [b"Z"], [b"X"], []) for s in states)


def read_memory_file(pid: int, name: str) -> bytes:
  """Returns what a file of /proc says of a process' memory, b"" if it is gone.

  Of a process whose first thread has ended only the other threads tell.

  Raises:
    PermissionError: of another user, and we lack CAP_SYS_PTRACE.
  """
  try:
    with open(f"/proc/{pid}/{name}", "rb") as f:
      data = f.read()
    if data and not data.startswith(b"0 0 "):
      return data
  except (FileNotFoundError, ProcessLookupError):
    pass
  try:
    tasks = os.listdir(f"/proc/{pid}/task")
  except OSError:
    return b""
  for task in tasks:
    with (
      contextlib.suppress(FileNotFoundError, ProcessLookupError),
      open(f"/proc/{pid}/task/{task}/{name}", "rb") as f,
    ):
      data = f.read()
      if data and not data.startswith(b"0 0 "):
        return data
  return b""


def memory_kb(pid: int) -> tuple[int, int]:
  """Returns the address space and resident size of a process, 0 if gone."""
  fields = read_memory_file(pid, "statm").split()
  if not fields:
    return 0, 0
  page_kb = resource.getpagesize() >> 10
  return int(fields[0]) * page_kb, int(fields[1]) * page_kb


def resident_kb(pid: int) -> int:
  """Returns the resident size of a process, 0 when it is gone."""
  return memory_kb(pid)[1]


def _children_by_list(pid: int) -> list[int]:
  pids = []
  try:
    for task in os.listdir(f"/proc/{pid}/task"):
      with open(f"/proc/{pid}/task/{task}/children", "rb") as f:
        pids.extend(map(int, f.read().split()))
  except OSError:  # the process or a thread of it has just gone
    pass
  return pids


def _children_by_scan(pid: int) -> list[int]:
  """For kernels built without CONFIG_PROC_CHILDREN."""
  pids = []
  for name in os.listdir("/proc"):
    if not name.isdigit():
      continue
    if parent(int(name)) == pid:
      pids.append(int(name))
  return pids


_LIST_BYTES = 1 << 16
_HAS_LIST = os.path.exists(f"/proc/{os.getpid()}/task/{os.getpid()}/children")


def children(pid: int) -> list[int]:
  """Returns the pids of a process' children, zombies included."""
  return _children_by_list(pid) if _HAS_LIST else _children_by_scan(pid)


def own_children() -> Callable[[], list[int]]:
  """Returns a function that lists this one-threaded process' children.

  It costs one system call where `children` takes six.
  """
  pid = os.getpid()
  if not _HAS_LIST:
    return lambda: _children_by_scan(pid)
  fd = os.open(f"/proc/{pid}/task/{pid}/children", os.O_RDONLY | os.O_CLOEXEC)

  def read() -> list[int]:
    data = os.pread(fd, _LIST_BYTES, 0)
    if len(data) > _LIST_BYTES - 16:  # may be cut
      return _children_by_list(pid)
    return [int(word) for word in data.split()]

  return read


def descendants(pid: int, at_most: int) -> list[int]:
  """Returns the pids below a process, the walk ending past `at_most`."""
  found: list[int] = []
  front = [pid]
  while front and len(found) <= at_most:
    below = [child for parent in front for child in children(parent)]
    found.extend(below)
    front = below
  return found


def tasks_of_user() -> int:
  """Returns how many tasks this user has, as RLIMIT_NPROC counts them."""
  n = 0
  for name in os.listdir("/proc"):
    try:
      if name.isdigit() and os.stat(f"/proc/{name}").st_uid == os.getuid():
        n += len(os.listdir(f"/proc/{name}/task"))
    except OSError:
      continue
  return n


def kill_quietly(pid: int) -> None:
  """SIGKILLs a process; one that is gone or not ours is no error."""
  with contextlib.suppress(ProcessLookupError, PermissionError):
    os.kill(pid, signal.SIGKILL)


def kill_marked(pid: int, how: int = int(signal.SIGKILL)) -> None:
  """Signals a process that belongs to some call, and no other.

  Calls can lower the tag that they were given and never raise it, so a process
  with our own is none of theirs: the number was used again.
  """
  if pid and is_marked(pid):
    with contextlib.suppress(ProcessLookupError, PermissionError):
      os.kill(pid, how)


def is_marked(pid: int) -> bool:
  """Whether a process belongs to some call, this one's or a former one's."""
  return read_tag(pid) not in (None, _own_tag)


def kill_children() -> bool:
  """Kills this process's children and reaps the dead; True if none is left."""
  for pid in children(os.getpid()):
    kill_quietly(pid)
  try:
    while os.waitpid(-1, os.WNOHANG) != (0, 0):
      pass
  except ChildProcessError:
    return True
  return False


def kill_group_quietly(pgid: int) -> None:
  """SIGKILLs a process group; an empty one is no error."""
  with contextlib.suppress(ProcessLookupError, PermissionError):
    os.killpg(pgid, signal.SIGKILL)
