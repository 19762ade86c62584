"""The supervisor's side of a session: who guards, who runs, who is a stray.

See `repl` for the other side. What a session's processes say decides nothing
but the course of that session: the sender of each message is known by the
kernel's word, and whatever does not fit ends the session.
"""

import collections
import dataclasses
import json
import os
import signal
import socket
import struct
import typing
from collections.abc import Callable, Sequence

from roc import layout
from roc.host.sandbox import contract, linux, payload, repl, running

_CREDENTIALS = struct.Struct("3i")
_ANCILLARY = socket.CMSG_SPACE(_CREDENTIALS.size)
LOST = "The session ended; its variables are gone.\n"
FIRST_FILE = "<tool>"


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
    cell: what runs.
    waiting: cells to come.
    n_cells: cells that were started.
    birth: number of its birth.
    killed_at: when the running cell was first killed; 0.0 before.
    settle_at: when strays are to be looked for again; 0.0 for never.
    hello_by: when a runner must be there.
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
  cell: running.Running | None = None
  waiting: collections.deque[Cell] = dataclasses.field(
    default_factory=collections.deque
  )
  n_cells: int = 0
  birth: int = 0
  killed_at: float = 0.0
  settle_at: float = 0.0
  hello_by: float = 0.0
  is_born: bool = False
  is_dead: bool = False

  @property
  def is_idle(self) -> bool:
    """Whether a runner waits for a cell."""
    is_free = self.cell is None and not self.settle_at and not self.is_dead
    return self.is_born and bool(self.runner) and is_free

  def start(
    self, cell: Cell, hidden: Sequence[tuple[bytes, bytes]]
  ) -> running.Running:
    """Hands a cell to the runner.

    Raises:
      OSError: nobody takes it.
    """
    self.n_cells += 1
    for fd in (self.stdout_fd, self.stderr_fd):
      running.discard(fd)  # what earlier cells' leftovers said
    file = FIRST_FILE if self.n_cells == 1 else f"<tool {self.n_cells}>"
    job_fd = payload.job_file(cell.message["code"])
    fds = [job_fd]
    if cell.message["stdin"]:
      fds.append(payload.stdin_file(cell.message["stdin"]))
    cap = cell.limits.output_bytes
    made = running.Running(
      id=cell.message["id"],
      limits=cell.limits,
      job_fd=job_fd,
      stdout=running.Stream(self.stdout_fd, -1, cap, is_borrowed=True),
      stderr=running.Stream(self.stderr_fd, -1, cap, is_borrowed=True),
      hidden=hidden,
      base_kb=self.base_kb,
      tag=self.tag,
      scratch=self.scratch,
      init_pid=self.init_pid,
      others=frozenset({self.guard, self.main_pid}),
    )
    try:
      data = json.dumps({"file": file, "to": self.runner_name}).encode()
      socket.send_fds(self.channel, [data], fds)
    except OSError:
      made.close()
      raise
    finally:
      for fd in fds[1:]:
        os.close(fd)
    made.began(self.runner)
    self.cell = made
    return made

  def receive(self) -> tuple[list[bytes], int] | None:
    """Returns the words of one message and its sender; None at the end."""
    try:
      data, ancillary, _, _ = self.channel.recvmsg(4096, _ANCILLARY)
    except BlockingIOError:
      return [], 0
    except OSError:
      return None
    if not data:
      return None
    sender = 0
    for level, kind, content in ancillary:
      if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
        sender = _CREDENTIALS.unpack(content)[0]
    return data.split(), sender

  def take_runner(self, pid: int, name: int) -> bool:
    """Notes a process that says it waits for a cell; False for a false one."""
    parent = linux.parent(pid)
    is_busy = self.cell is not None and not self.cell.is_ended
    if is_busy or not parent or self.is_dead:
      return False
    self.drop_runner()
    try:
      self.runner_fd = os.pidfd_open(pid)
    except OSError:
      return False
    self.runner, self.runner_name, self.guard = pid, name, parent
    return True

  def drop_runner(self) -> None:
    """Forgets the runner, which is dead or has become the guardian."""
    if self.runner_fd >= 0:
      os.close(self.runner_fd)
    self.runner, self.runner_fd = 0, -1

  def kill_runner(self) -> None:
    """Kills the runner and its group; the guardian will say so."""
    if self.runner_fd >= 0:
      try:
        signal.pidfd_send_signal(self.runner_fd, signal.SIGKILL)
      except OSError:
        return

  def strays(self, orphans: Callable[[int], list[int]]) -> list[int]:
    """Returns the session's processes but its guardian and its runner.

    Args:
      orphans: gives the supervisor's own children that carry a tag; what a
        session without a pid namespace leaves behind is among them.
    """
    tops = {self.main_pid, self.init_pid}
    if not self.init_pid:  # there it adopts whatever is orphaned
      tops |= {self.guard, self.runner, *orphans(self.tag)}
    found = set(tops)
    for top in tops - {0}:
      found.update(linux.descendants(top, 1000))
    return [*(found - {0, self.guard, self.runner, self.init_pid})]

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


def is_word(words: list[bytes], word: bytes, n_numbers: int) -> bool:
  """Whether a message is `word` with that many numbers."""
  if len(words) != n_numbers + 1 or words[0] != word:
    return False
  try:
    return all(float(number) >= 0 for number in words[1:])
  except ValueError:
    return False


HELLO, DONE, DIED = repl.HELLO, repl.DONE, repl.DIED
