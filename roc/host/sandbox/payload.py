"""The file in memory that carries a call's code in and its record out.

Its first page is shared: the child maps it, writes how the program ended, and
the supervisor reads it afterwards. No descriptor of it is left when the
program runs, so `os.write` cannot reach it. A pipe holds no megabytes that
nobody may ever read; a file in memory does, so stdin comes in one too.
"""

import contextlib
import ctypes
import dataclasses
import fcntl
import mmap
import os
import tempfile

RECORD_BYTES = 512
_CODE_AT = mmap.PAGESIZE
_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
_SHARED = mmap.MAP_SHARED
_FAILED = ctypes.c_void_p(-1).value
_FIXED_SIZE = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
  ctypes.c_void_p,
  ctypes.c_size_t,
  *(ctypes.c_int,) * 3,
  ctypes.c_long,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def memory_file(name: str, *parts: bytes) -> int:
  """Returns a descriptor of a new file in memory that holds `parts`.

  Its size is fixed: programs get such files, and what they could add to one
  would be memory that no limit counts.
  """
  if hasattr(os, "memfd_create"):
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
  else:  # Python built against an old C library
    with tempfile.TemporaryFile() as f:
      fd = os.dup(f.fileno())
  for part in parts:
    view = memoryview(part)
    while view:
      view = view[os.write(fd, view) :]
  with contextlib.suppress(OSError):  # a file on disk knows no seals
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _FIXED_SIZE)
  return fd


def stdin_file(data: bytes) -> int:
  """Returns a descriptor from which `data` can be read."""
  fd = memory_file("stdin", data)
  os.lseek(fd, 0, os.SEEK_SET)
  return fd


@dataclasses.dataclass
class Program:
  """A call's files on their way to its process; -1 for none.

  Attributes:
    job_fd: the job file.
    stdin_fd: what the program reads.
  """

  job_fd: int
  stdin_fd: int = -1

  @classmethod
  def pack(cls, code: str, stdin: bytes) -> "Program":
    """Returns the files of new code.

    Raises:
      OSError: there are too many open files, or no memory.
    """
    packed = cls(job_file(code))
    if stdin:
      try:
        packed.stdin_fd = stdin_file(stdin)
      except OSError:
        packed.close()
        raise
    return packed

  @property
  def fds(self) -> list[int]:
    """The descriptors in use, the job file's first."""
    return [fd for fd in (self.job_fd, self.stdin_fd) if fd >= 0]

  def take_job(self) -> int:
    """Returns the job file, which is the caller's to close from now on."""
    fd, self.job_fd = self.job_fd, -1
    return fd

  def take_stdin(self) -> list[int]:
    """Returns the input, if there is one, which is the caller's to close."""
    fd, self.stdin_fd = self.stdin_fd, -1
    return [fd] if fd >= 0 else []

  def close(self) -> None:
    """Gives back what nobody has taken."""
    for fd in (self.take_job(), *self.take_stdin()):
      if fd >= 0:
        os.close(fd)


def job_file(code: str) -> int:
  """Returns a descriptor of a file with an empty record and the code."""
  return memory_file("job", bytes(_CODE_AT), code.encode("utf-8"))


def read_record(job_fd: int) -> bytes:
  """Returns what the child noted; zeros if it did not come to that."""
  return os.pread(job_fd, RECORD_BYTES, 0)


class Record:
  """The shared page, mapped for writing; holds no descriptor.

  Python's own `mmap` keeps a duplicate of the descriptor, which a program
  could write to.
  """

  def __init__(self, job_fd: int):
    address = _libc.mmap(None, _CODE_AT, _READ_WRITE, _SHARED, job_fd, 0)
    if address == _FAILED:
      number = ctypes.get_errno()
      raise OSError(number, f"mmap: {os.strerror(number)}")
    self._address = address

  def write(self, note: bytes) -> None:
    """Notes how the program ended; the last note stands."""
    ctypes.memmove(self._address, note, min(len(note), RECORD_BYTES))

  def close(self) -> None:
    """Unmaps the page."""
    _libc.munmap(self._address, _CODE_AT)


def read_code(job_fd: int) -> str:
  """Returns the code that `job_file` was given."""
  size = os.fstat(job_fd).st_size - _CODE_AT
  return os.pread(job_fd, size, _CODE_AT).decode("utf-8")
