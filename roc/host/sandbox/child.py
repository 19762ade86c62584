"""What runs in the forked child: take on limits, run the program, note its end.

The server's loop *returns* in the child (see `server.serve`), so that below the
program's frames lie only this file's and the entry point's, with none of the
server's state. The program may still patch anything it can reach; therefore
the end is written defensively and every failure of it falls back to the plain
exit code, which the server reads anyway.
"""

import atexit
import builtins
import contextlib
import dataclasses
import errno
import importlib.machinery
import mmap
import os
import random
import resource
import signal
import sys
import threading
import types
import typing

from roc.host.sandbox import contract, linux, report, verdict

# Bound now: the program may replace the originals.
_exit = os._exit
_getpid = os.getpid
_type_name = type.__dict__["__name__"].__get__  # no metaclass overrides this
_SETUP_FD = 3
_HEADROOM_BYTES = 32 << 20  # for the report of a program that ran out of memory
_SPARE_TASKS = 1024  # RLIMIT_NPROC counts the whole user; see `_set_limits`


@dataclasses.dataclass(frozen=True)
class Job:
  """One call, as the server hands it to the child that runs it."""

  code: str
  limits: contract.Limits
  seed: str  # hex digest of (run seed, trajectory, call index)
  tag: int
  scratch: str
  stdin_fd: int
  stdout_fd: int
  stderr_fd: int
  setup_fd: int
  record: mmap.mmap
  server_pid: int
  base_bytes: int  # address space before the program adds to it
  n_tasks: int  # of this user, when the server started
  library_dirs: list[str]


def run(job: Job) -> typing.NoReturn:
  """Runs the job's program in this process and ends the process."""
  code = 1
  try:
    try:
      reporter = _prepare(job)
    except BaseException as error:
      os.write(job.setup_fd, f"{type(error).__name__}: {error}"[:500].encode())
      _exit(1)
    os.close(_SETUP_FD)  # from here on nobody can claim a failed setup
    code = _execute(job, reporter)
  finally:
    _exit(code)
  raise AssertionError("unreachable")


def _prepare(job: Job) -> report.Reporter:
  """Takes on descriptors, limits, environment and seeds of the call."""
  os.setsid()
  linux.die_with_parent()
  if os.getppid() != job.server_pid:
    raise OSError("the server died while it forked")
  signal.set_wakeup_fd(-1)
  signal.signal(signal.SIGCHLD, signal.SIG_DFL)
  signal.signal(signal.SIGTERM, signal.SIG_DFL)
  linux.set_tag(job.tag)
  os.dup2(job.stdin_fd, 0)
  os.dup2(job.stdout_fd, 1)
  os.dup2(job.stderr_fd, 2)
  os.dup2(job.setup_fd, _SETUP_FD)
  os.closerange(_SETUP_FD + 1, os.sysconf("SC_OPEN_MAX"))
  os.chdir(job.scratch)
  os.environ["HOME"] = job.scratch
  os.environ["TMPDIR"] = job.scratch
  sys.argv = [report.TOOL_FILE]
  sys.path.insert(0, "")
  reporter = report.Reporter(job.scratch, job.library_dirs)
  reporter.install()
  report.show_source(job.code)
  reseed(job.seed)
  _set_limits(job)
  return reporter


def _set_limits(job: Job) -> None:
  limits = job.limits
  space = job.base_bytes + (limits.memory_mb << 20)
  cpu = -int(-limits.cpu_s // 1)
  n_bytes = limits.file_mb << 20
  # The kernel counts every task of the user, the trainer's threads included,
  # and nothing at all for uid 0. The exact bound is the server's count of the
  # call's processes; this one only stops a bomb between two of its looks.
  n_tasks = job.n_tasks + limits.n_processes + _SPARE_TASKS
  for kind, soft, hard in (
    (resource.RLIMIT_CORE, 0, 0),
    (resource.RLIMIT_CPU, cpu, cpu + 1),
    (resource.RLIMIT_FSIZE, n_bytes, n_bytes),
    (resource.RLIMIT_NOFILE, limits.n_files, limits.n_files),
    (resource.RLIMIT_NPROC, n_tasks, n_tasks),
    (resource.RLIMIT_AS, space, space + _HEADROOM_BYTES),
  ):
    ceiling = resource.getrlimit(kind)[1]
    if ceiling != resource.RLIM_INFINITY:
      soft, hard = min(soft, ceiling), min(hard, ceiling)
    resource.setrlimit(kind, (soft, hard))


def reseed(seed: str) -> None:
  """Sets the global generators of `random` and numpy from a hex digest.

  numpy that is not loaded yet is seeded when the program imports it. Generators
  that a program makes itself without a seed draw from the kernel, as ever.
  """
  digest = bytes.fromhex(seed)
  random.seed(int.from_bytes(digest, "big"))
  numpy_random = sys.modules.get("numpy.random")
  if numpy_random is not None:
    _seed_numpy(numpy_random, digest)
  else:
    sys.meta_path.insert(0, _SeedOnImport(digest))


def _seed_numpy(numpy_random: typing.Any, digest: bytes) -> None:
  words = [int.from_bytes(digest[i : i + 4], "big") for i in range(0, 32, 4)]
  numpy_random.seed(words)


class _SeedOnImport:
  """Import hook that seeds `numpy.random` right after its first import."""

  def __init__(self, digest: bytes):
    self._digest = digest

  def find_spec(self, name, path=None, target=None):
    del target
    if name != "numpy.random":
      return None
    sys.meta_path.remove(self)
    spec = importlib.machinery.PathFinder.find_spec(name, path)
    loader: typing.Any = spec.loader if spec is not None else None
    if loader is not None:
      load = loader.exec_module

      def load_and_seed(module):
        load(module)
        _seed_numpy(module, self._digest)

      loader.exec_module = load_and_seed
    return spec


def _execute(job: Job, reporter: report.Reporter) -> int:
  """Runs the program and returns the exit code; leaves the record."""
  main = types.ModuleType("__main__")
  main.__dict__["__builtins__"] = builtins
  sys.modules["__main__"] = main
  pid = _getpid()
  ending, error_type, code = b"ok", "", 0
  try:
    program = compile(job.code, report.TOOL_FILE, "exec", dont_inherit=True)
    exec(program, main.__dict__)
  except SystemExit as error:
    error_type = _type_name(type(error)) if error.code else ""
    ending, code = b"exit", _exit_code(error)
  except BaseException as error:
    ending, error_type, code = classify(error), _type_name(type(error)), 1
    _report(error, reporter)
  with contextlib.suppress(BaseException):
    threading._shutdown()  # pyrefly: ignore  # joins threads, as exit does
  with contextlib.suppress(BaseException):
    atexit._run_exitfuncs()
  with contextlib.suppress(BaseException):
    linux.flush_c_streams()
  if _getpid() == pid:  # a fork of the program that fell through to here
    note = verdict.pack_record(ending, error_type)
    job.record[: len(note)] = note
  return code


def _exit_code(error: SystemExit) -> int:
  """What CPython would exit with; prints a message as it would."""
  if error.code is None:
    return 0
  if isinstance(error.code, int):
    return error.code & 0xFF
  with contextlib.suppress(BaseException):
    print(error.code, file=sys.stderr)
  return 1


def classify(error: BaseException) -> bytes:
  """Returns the record's word for an uncaught exception.

  `memory` for MemoryError; `resource` where a limit on processes, threads,
  descriptors, file size or disk refused the program; else `error`.
  """
  if isinstance(error, MemoryError):
    return b"memory"
  if isinstance(error, OSError) and error.errno in (
    errno.EFBIG,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EMFILE,
    errno.ENFILE,
    errno.EAGAIN,  # fork under RLIMIT_NPROC
  ):
    return b"resource"
  # CPython raises a bare RuntimeError for a thread that cannot start.
  if type(error) is RuntimeError and "start new thread" in str(error):
    return b"resource"
  return b"error"


def _report(error: BaseException, reporter: report.Reporter) -> None:
  """Prints the traceback, by the program's own excepthook if it set one."""
  with contextlib.suppress(BaseException):
    space = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (space, space))
  try:
    sys.excepthook(type(error), error, error.__traceback__)
  except BaseException:
    try:
      reporter.write(error)
    except BaseException:
      with contextlib.suppress(BaseException):
        os.write(2, f"{_type_name(type(error))}\n".encode())
