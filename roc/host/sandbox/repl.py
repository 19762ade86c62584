"""A session: cells that share a namespace, each with a checkpoint before it.

The process that holds the namespace is the guardian. It forks a runner, which
waits for the next cell and runs it. If the runner comes to the end of the cell
it becomes the guardian of the state after it, and forks a runner in its turn;
the old guardian is killed from outside. If the runner dies (a crash, or the
supervisor's SIGKILL at a deadline) the guardian says how and forks another one
from the state before the cell: nothing is replayed, nothing else is lost.

    guardian n --fork--> runner n+1 --cell done--> guardian n+1 --fork--> ...

The cell's result is delivered only then. Cells can reach
all of this; what they gain is to lose their own session. Messages to the
supervisor (`hello PID`, `done CODE`, `died STATUS CPU_MS RSS_KB`) carry the
sender's pid by the kernel's word. When a runner has said hello, guardian and
runner are stopped until the next cell comes, so that nothing runs in between.
"""

import contextlib
import functools
import inspect
import io
import json
import os
import random
import resource
import signal
import socket
import sys
import threading
import types
import typing
from collections.abc import Callable

from roc.host.sandbox import (
  image,
  linux,
  namespaces,
  payload,
  report,
  script,
  source,
  thread_pools,
  verdict,
)

HELLO, DONE, DIED = b"hello", b"done", b"died"
_MAX_MESSAGE = 1 << 16
_wait4 = os.wait4
_getpid = os.getpid
_get_state, _set_state = random.getstate, random.setstate
_exit = os._exit
_set_trace, _set_profile = sys.settrace, sys.setprofile
_threads = threading.enumerate
_get_limit, _set_limit = resource.getrlimit, resource.setrlimit
_get_depth, _set_depth = sys.getrecursionlimit, sys.setrecursionlimit
_main_thread = threading.main_thread
_frames = sys._current_frames
_ALL_SIGNALS = frozenset(signal.valid_signals())
_set_mask = signal.pthread_sigmask
_set_timer = signal.setitimer


def serve(
  channel: socket.socket,
  main: types.ModuleType,
  reporter: report.Reporter,
  limit: Callable[[dict], None],
) -> typing.NoReturn:
  """Guards and runs, in turns, until the channel closes or nobody is left.

  Args:
    channel: to the supervisor.
    main: the module that cells run in.
    reporter: writes tracebacks.
    limit: takes on the limits of a cell.
  """
  script.allow_depth(4)
  reserve = _Reserve()
  reserve.open()
  while True:
    pid = _fork()
    if pid == 0:
      _run_next_cell(channel, main, reporter, limit, reserve)
      # The cell is done: this process is the guardian of what it has become.
      continue
    blocked = _set_mask(signal.SIG_BLOCK, _ALL_SIGNALS)
    ended, status, usage = _wait4(-1, 0)
    while ended != pid:  # cells leave children behind, which end too
      ended, status, usage = _wait4(-1, 0)
    _set_mask(signal.SIG_SETMASK, blocked)
    cpu_ms = round((usage.ru_utime + usage.ru_stime) * 1e3)
    channel.send(b"%s %d %d %d" % (DIED, status, cpu_ms, usage.ru_maxrss))


class _Reserve:
  """What it takes to receive and to end a cell when a cell used up all.

  Between cells the soft limits are as high as the hard ones, until the next
  cell takes on its own, and recursion is deep enough for what is done here.
  """

  def __init__(self):
    self._depth = self._deep = _get_depth()

  def open(self) -> None:
    """Lifts the limits."""
    with contextlib.suppress(BaseException):
      self._depth = _get_depth()
      _set_depth(max(self._depth, self._deep))
    for kind in (resource.RLIMIT_AS, resource.RLIMIT_NOFILE):
      with contextlib.suppress(BaseException):
        hard = _get_limit(kind)[1]
        _set_limit(kind, (hard, hard))

  def close(self) -> None:
    """Puts the depth of recursion back to what the cells before have set."""
    with contextlib.suppress(BaseException):
      _set_depth(self._depth)


def _fork() -> int:
  """Forks with as few hooks as may be."""
  if len(_frames()) == 1:
    return namespaces.fork_without_hooks()
  generator = _get_state()  # the hooks would seed it anew
  pid = namespaces.fork()
  if pid == 0:
    _set_state(generator)
  return pid


def _run_next_cell(
  channel: socket.socket,
  main: types.ModuleType,
  reporter: report.Reporter,
  limit: Callable[[dict], None],
  reserve: "_Reserve",
) -> None:
  pid = _getpid()
  channel.send(b"%s %d" % (HELLO, pid))
  cell, fds = _receive(channel, pid)
  code = source.clean(payload.read_code(fds[0]))
  record = payload.Record(fds[0])
  _renew_stdin(fds[1] if len(fds) > 1 else None)
  os.close(fds[0])
  report.show_source(cell["file"], code)
  run = functools.partial(_run_cell, code, cell["file"], main, reporter.scratch)
  reserve.close()
  limit(cell["limits"])
  end = script.execute(run, reporter)
  reserve.open()
  with contextlib.suppress(BaseException):
    thread_pools.finish()
  with contextlib.suppress(BaseException):
    _join_threads()
  with contextlib.suppress(BaseException):
    linux.flush_c_streams()
  with contextlib.suppress(BaseException):
    _reopen_output()
  if _getpid() != pid:  # a fork of the cell that fell through to here
    _exit(end.code)
  record.write(verdict.pack_record(end.ending, end.error_type))
  record.close()
  _settle()
  channel.send(b"%s %d" % (DONE, end.code))
  if len(_frames()) > 1 and _fork():
    # Threads that go on would change the checkpoint under its guardian; a fork
    # leaves them behind. This process is killed from outside.
    linux.pause_forever()


def _receive(channel: socket.socket, pid: int) -> tuple[dict, list[int]]:
  """Waits for a cell; one that was meant for a runner now dead is dropped."""
  while True:
    data, fds, _, _ = socket.recv_fds(channel, _MAX_MESSAGE, 2)
    if not data:
      _exit(0)
    cell = json.loads(data)
    if cell["to"] == pid:
      return cell, fds
    for fd in fds:
      os.close(fd)


def _run_cell(code: str, file: str, main: types.ModuleType, home: str) -> None:
  """Runs statements; a bare expression at the end is echoed."""
  parts = source.compile_cell(code, file, home)
  if any(part.co_flags & inspect.CO_COROUTINE for part in parts):
    import asyncio  # few cells await, and it is large

    asyncio.run(_await_parts(parts, main))
    return
  for part in parts:
    exec(part, main.__dict__)


async def _await_parts(
  parts: list[types.CodeType], main: types.ModuleType
) -> None:
  for part in parts:
    result = eval(part, main.__dict__)
    if part.co_flags & inspect.CO_COROUTINE:
      await result


def _renew_stdin(fd: int | None) -> None:
  """Gives the cell an input of its own: what came with it, or nothing."""
  if fd is None:
    fd = os.open(os.devnull, os.O_RDONLY)
  os.dup2(fd, 0)
  os.close(fd)
  sys.stdin = io.TextIOWrapper(
    io.BufferedReader(io.FileIO(0, closefd=False)),
    encoding="utf-8",
    errors="surrogateescape",
  )


def _reopen_output() -> None:
  """Replaces output streams that the cell has closed."""
  for fd, name in ((1, "stdout"), (2, "stderr")):
    stream = getattr(sys, name, None)
    if stream is None or getattr(stream, "closed", False):
      fresh = image.open_output(fd)
      setattr(sys, name, fresh)
      setattr(sys, f"__{name}__", fresh)


def _join_threads() -> None:
  """Waits for threads, as the end of a script does; daemons go on."""
  for thread in _threads():
    if thread is not _main_thread() and not thread.daemon:
      thread.join()


def _settle() -> None:
  """Takes back what a cell may have left running in the interpreter."""
  _set_trace(None)
  _set_profile(None)
  for timer in (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF):
    _set_timer(timer, 0)
