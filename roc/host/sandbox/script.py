"""Runs one program in this process and says how it ended.

The program may patch anything that it can reach, so the end is written
defensively: what is needed afterwards is bound before it runs.
"""

import _thread
import atexit
import builtins
import contextlib
import errno
import os
import resource
import sys
import threading
import types
import typing
from collections.abc import Callable

from roc.host.sandbox import linux, payload, report, source, verdict

HEADROOM_BYTES = 32 << 20  # for the report of a program that ran out of memory

_RECURSION_LIMIT = 1000  # the interpreter's own default

# Bound now: the program may replace the originals.
_getpid = os.getpid
_count_threads = _thread._count
_at_threads_exit = threading._threading_atexits  # pyrefly: ignore
_type_name = type.__dict__["__name__"].__get__  # no metaclass overrides this


def main_module() -> types.ModuleType:
  """Returns the module that programs run in, in place of the runner's own."""
  main = types.ModuleType("__main__")
  main.__dict__["__builtins__"] = builtins
  sys.modules["__main__"] = main
  return main


def run(
  code: str,
  main: types.ModuleType,
  record: payload.Record,
  reporter: report.Reporter,
) -> int:
  """Runs a whole program and returns the exit code; leaves the record."""

  def program() -> None:
    file = report.TOOL_FILE
    compiled = source.compile_script(code, file, reporter.scratch)
    exec(compiled, main.__dict__)

  pid = _getpid()
  allow_depth(3)
  end = execute(program, reporter)
  with contextlib.suppress(BaseException):
    if _count_threads() or _at_threads_exit:
      threading._shutdown()  # pyrefly: ignore  # joins threads, as exit does
  with contextlib.suppress(BaseException):
    atexit._run_exitfuncs()
  with contextlib.suppress(BaseException):
    linux.flush_c_streams()
  if _getpid() == pid:  # a fork of the program that fell through to here
    record.write(verdict.pack_record(end.ending, end.error_type))
  return end.code


def allow_depth(n_below: int) -> None:
  """Gives a program the depth of recursion that it has in a plain interpreter.

  Args:
    n_below: frames between the caller's and the program's first, `exec` itself
      among them.
  """
  frame: types.FrameType | None = sys._getframe(1)
  while frame is not None:
    n_below += 1
    frame = frame.f_back
  sys.setrecursionlimit(_RECURSION_LIMIT + n_below)


class End(typing.NamedTuple):
  """How a program ended: the record's word, exception, exit code."""

  ending: bytes
  error_type: str
  code: int


def execute(program: Callable[[], None], reporter: report.Reporter) -> End:
  """Runs a program; an exception is reported as the interpreter would."""
  try:
    program()
  except SystemExit as error:
    name = _type_name(type(error)) if error.code else ""
    return End(b"exit", name, _exit_code(error))
  except BaseException as error:
    _report(error, reporter)
    return End(classify(error), _type_name(type(error)), 1)
  return End(b"ok", "", 0)


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
  soft, hard = resource.getrlimit(resource.RLIMIT_AS)
  with contextlib.suppress(BaseException):
    if soft != resource.RLIM_INFINITY:
      _limit_memory(soft + HEADROOM_BYTES, hard)  # a report needs some
  try:
    sys.excepthook(type(error), error, error.__traceback__)
  except BaseException:
    try:
      reporter.write(error)
    except BaseException:
      with contextlib.suppress(BaseException):
        os.write(2, f"{_type_name(type(error))}\n".encode())
  with contextlib.suppress(BaseException):
    _limit_memory(soft, hard)


def _limit_memory(soft: int, hard: int) -> None:
  if hard != resource.RLIM_INFINITY:  # which is -1
    soft = min(soft, hard)
  resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
