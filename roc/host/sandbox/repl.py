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

import ast
import contextlib
import functools
import io
import json
import os
import random
import signal
import socket
import sys
import threading
import types
import typing
from collections.abc import Callable

from roc.host.sandbox import (
  linux,
  namespaces,
  payload,
  report,
  script,
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
  while True:
    pid = _fork()
    if pid == 0:
      _run_next_cell(channel, main, reporter, limit)
      # The cell is done: this process is the guardian of what it has become.
      continue
    blocked = _set_mask(signal.SIG_BLOCK, _ALL_SIGNALS)
    ended, status, usage = _wait4(-1, 0)
    while ended != pid:  # cells leave children behind, which end too
      ended, status, usage = _wait4(-1, 0)
    _set_mask(signal.SIG_SETMASK, blocked)
    cpu_ms = round((usage.ru_utime + usage.ru_stime) * 1e3)
    channel.send(b"%s %d %d %d" % (DIED, status, cpu_ms, usage.ru_maxrss))


def _fork() -> int:
  """Forks with as few hooks as may be."""
  if len(_frames()) == 1:
    return namespaces.bare_fork()
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
) -> None:
  pid = _getpid()
  channel.send(b"%s %d" % (HELLO, pid))
  cell, fds = _receive(channel, pid)
  code, record = payload.read_code(fds[0]), payload.Record(fds[0])
  _renew_stdin(fds[1] if len(fds) > 1 else None)
  os.close(fds[0])
  limit(cell["limits"])
  report.show_source(cell["file"], code)
  run = functools.partial(_run_cell, code, cell["file"], main)
  end = script.execute(run, reporter)
  with contextlib.suppress(BaseException):
    _join_threads()
  with contextlib.suppress(BaseException):
    linux.flush_c_streams()
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


def _run_cell(code: str, file: str, main: types.ModuleType) -> None:
  """Runs statements; a bare expression at the end is echoed."""
  tree = ast.parse(code, file)
  last = None
  if tree.body and isinstance(tree.body[-1], ast.Expr):
    last = ast.Interactive([tree.body.pop()])
  exec(compile(tree, file, "exec", dont_inherit=True), main.__dict__)
  if last is not None:
    exec(compile(last, file, "single", dont_inherit=True), main.__dict__)


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
