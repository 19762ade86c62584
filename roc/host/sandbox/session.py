"""The supervisor's side of a session: who guards, who runs, who is a stray.

See `repl` for the other side. What a session's processes say decides nothing
but the course of that session: the sender of each message is known by the
kernel's word, and whatever does not fit ends the session.

A session is idle or settling or runs a cell. While it is idle its guardian and
its runner are stopped; whoever finds a way on shows by the CPU time it takes.
A cell is over when the session has settled: a runner waits, both are stopped,
and nothing else of the session is alive.
"""

import collections
import contextlib
import dataclasses
import json
import os
import signal
import socket
import struct
import time
import typing
from collections.abc import Callable, Sequence

from roc import layout
from roc.host.sandbox import (
  contract,
  linux,
  payload,
  repl,
  running,
  script,
  watch,
  wire,
)

_CREDENTIALS = struct.Struct("3i")
_ANCILLARY = socket.CMSG_SPACE(_CREDENTIALS.size)
LOST = "The session ended; its variables are gone.\n"
FIRST_FILE = "<tool>"
_HEADROOM_KB = script.HEADROOM_BYTES >> 9  # twice: bases are not quite equal
_MOST_STRAYS = 256  # killed at a time
_MAX_WAIT_STATUS = 0xFFFF


class Cell(typing.NamedTuple):
  """A cell that waits for its session to be idle."""

  message: dict
  limits: contract.Limits


@dataclasses.dataclass(eq=False)
class Session:
  """One trajectory's namespace.

  Attributes:
    key: the trainer's name of it.
    tag: see `linux.set_tag`.
    uid: that it runs under; None for the trainer's.
    scratch: its directory on disk; "" where that is in memory.
    channel: to its processes.
    stdout_fd: reading end of its standard output.
    stderr_fd: reading end of its standard error.
    init_pid: process 1 of its pid namespace; 0 without one.
    main_pid: the process that a zygote forked.
    guard: pid of the process that guards the state.
    runner: pid of the one that waits for a cell or runs it; 0 for none.
    runner_fd: pidfd of the runner.
    runner_name: what the runner calls itself, its pid in its own namespace.
    base_kb: resident size of what it was forked from.
    space_kb: address space of what it was forked from.
    cell: what runs.
    waiting: cells to come.
    n_cells: cells that were started.
    memory_mb: the largest that a cell was allowed.
    birth: number of its birth.
    settle_by: when it must have settled; 0.0 while it is idle or runs a cell,
      infinite before its processes are known.
    settle_at: when it is to be looked at again, if a runner waits.
    idle_cpu_s: CPU time of guardian and runner when it became idle.
    is_born: its processes are known; the runner may say hello before that.
    is_dead: it is over, and its rest is being cleaned up.
  """

  key: str
  tag: int
  uid: int | None
  scratch: str
  channel: socket.socket
  stdout_fd: int
  stderr_fd: int
  init_pid: int = 0
  main_pid: int = 0
  guard: int = 0
  runner: int = 0
  runner_fd: int = -1
  runner_name: int = 0
  base_kb: int = 0
  space_kb: int = 0
  cell: running.Running | None = None
  waiting: collections.deque[Cell] = dataclasses.field(
    default_factory=collections.deque
  )
  n_cells: int = 0
  memory_mb: int = 0
  birth: int = 0
  settle_by: float = float("inf")
  settle_at: float = 0.0
  idle_cpu_s: float = 0.0
  is_born: bool = False
  is_dead: bool = False

  @property
  def is_idle(self) -> bool:
    """Whether a runner waits for a cell and nothing runs."""
    return self.cell is None and not self.settle_by and not self.is_dead

  @property
  def has_next_runner(self) -> bool:
    """Whether a runner is there that no cell was given to."""
    return bool(self.runner) and (self.cell is None or self.cell.is_ended)

  def start(
    self, cell: Cell, hidden: Sequence[tuple[bytes, bytes]]
  ) -> running.Running:
    """Hands a cell to the runner.

    Raises:
      OSError: nobody takes it.
    """
    self.n_cells += 1
    self.memory_mb = max(self.memory_mb, cell.limits.memory_mb)
    for fd in (self.stdout_fd, self.stderr_fd):
      running.discard(fd)  # what earlier cells' leftovers said
    file = FIRST_FILE if self.n_cells == 1 else f"<tool {self.n_cells}>"
    program: payload.Program = cell.message["program"]
    job_fd = program.take_job()
    fds = [job_fd, *program.take_stdin()]
    cap = cell.limits.output_bytes
    made = running.Running(
      id=cell.message["id"],
      limits=cell.limits,
      job_fd=job_fd,
      stdout=running.Stream(self.stdout_fd, -1, cap, is_borrowed=True),
      stderr=running.Stream(self.stderr_fd, -1, cap, is_borrowed=True),
      hidden=hidden,
      base_kb=self.base_kb,
      space_kb=self.space_kb,
      most_space_kb=self.space_kb + (self.memory_mb << 10) + _HEADROOM_KB,
      tag=self.tag,
      scratch=self.scratch,
      init_pid=self.init_pid,
      others=frozenset({self.guard, self.main_pid}),
    )
    try:
      data = json.dumps(
        {
          "file": file,
          "to": self.runner_name,
          "limits": cell.limits.to_json(),
        }
      ).encode()
      socket.send_fds(self.channel, [data], fds)
    except OSError:
      made.close()
      raise
    finally:
      for fd in fds[1:]:
        os.close(fd)
    made.began(self.runner)
    self.signal(signal.SIGCONT)
    self.cell = made
    return made

  def receive(self) -> tuple[bytes, int] | None:
    """Returns one message and its sender; None at the end."""
    try:
      data, ancillary, _, _ = self.channel.recvmsg(4096, _ANCILLARY)
    except OSError:
      return None  # as at the end: the loop calls only when there is something
    for level, kind, content in ancillary:
      if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
        return data, _CREDENTIALS.unpack(content)[0]
    return None

  def take_runner(self, pid: int, name: int) -> bool:
    """Notes a process that says it waits for a cell; False for a false one."""
    parent = linux.parent(pid)
    if not self.settle_by or self.runner or parent == self.init_pid:
      return False
    # An orphan's parent is the supervisor, with all calls below it.
    if linux.read_tag(parent) != self.tag:
      return False
    try:
      self.runner_fd = os.pidfd_open(pid)
    except OSError:
      return False
    self.runner, self.runner_name, self.guard = pid, name, parent
    return True

  def take_end(self, data: bytes, sender: int, patience_s: float) -> bool:
    """Notes how the cell ended; False where that is no message to be now.

    Args:
      data: the message.
      sender: who sent it.
      patience_s: in which the session must settle, beside what is left of the
        cell's time.
    """
    cell = self.cell
    if cell is None:
      return False
    now = time.monotonic()
    done = wire.numbers(data, repl.DONE, 1)
    died = wire.numbers(data, repl.DIED, 3)
    if done and sender == self.runner and cell.killed_for is not None:
      return True  # said just before it was killed
    if done and sender == self.runner and not self.settle_by:
      used = linux.cpu_seconds(sender), linux.resident_kb(sender)
      cell.ended((done[0] & 0xFF) << 8, *used)
      # It becomes the guardian; another will say hello.
      self.settle_by = cell.wall_by = max(cell.wall_by, now + patience_s)
    elif died and sender == self.guard and died[0] <= _MAX_WAIT_STATUS:
      cell.ended(died[0], died[1] / 1e3, died[2])
      self.settle_by = self.settle_by or now + patience_s
    else:
      return False
    self.drop_runner()
    return True

  def signal(self, number: int) -> None:
    """Sends a signal to guardian and runner, in this order."""
    linux.kill_marked(self.guard, number)
    if self.runner_fd >= 0:
      with contextlib.suppress(OSError):
        signal.pidfd_send_signal(self.runner_fd, number)

  @property
  def is_stopped(self) -> bool:
    """Whether guardian and runner cannot run."""
    return all(linux.is_stopped(pid) for pid in (self.guard, self.runner))

  @property
  def cpu_s(self) -> float:
    """CPU time of guardian and runner together."""
    return linux.cpu_seconds(self.guard) + linux.cpu_seconds(self.runner)

  def drop_runner(self) -> None:
    """Forgets the runner, which is dead or has become the guardian."""
    if self.runner_fd >= 0:
      os.close(self.runner_fd)
    self.runner, self.runner_fd = 0, -1

  def kill_runner(self) -> None:
    """Kills the runner; the guardian will say so."""
    if self.runner_fd >= 0:
      with contextlib.suppress(OSError):
        signal.pidfd_send_signal(self.runner_fd, signal.SIGKILL)

  def tops(self, orphans: Callable[[int], list[int]]) -> set[int]:
    """Returns processes that all of the session's are or descend from.

    Args:
      orphans: gives the supervisor's own children that carry a tag.
    """
    own = {self.main_pid, self.init_pid, self.guard, self.runner}
    return {*own, *orphans(self.tag)} - {0}

  def strays(self, orphans: Callable[[int], list[int]]) -> list[int]:
    """Returns what lives of the session but its guardian and its runner."""
    alive = watch.survey(self.tops(orphans), _MOST_STRAYS).pids
    kept = {self.guard, self.runner, self.init_pid}
    return [pid for pid in alive if pid not in kept]

  def close(self) -> None:
    """Gives back descriptors."""
    self.drop_runner()
    self.channel.close()
    os.close(self.stdout_fd)
    os.close(self.stderr_fd)


def lost() -> contract.ToolResult:
  """Returns the result of a cell whose session ended before it could run."""
  crash = layout.ToolStatus.CRASH
  return contract.ToolResult(crash, stderr=LOST, signal=signal.SIGKILL)
