"""One call while it runs, seen from outside: pipes, clocks, evidence."""

import contextlib
import dataclasses
import math
import os
import time
import traceback
from collections.abc import Callable, Iterable, Sequence

from roc import layout
from roc.host.sandbox import (
  contract,
  linux,
  loop,
  payload,
  verdict,
  watch,
)

_SPARE_THREADS = 64  # beside one for each process
_SPARE_ZOMBIES = 64
_FIRST_LOOK_S = 0.01  # most calls are over before it: no pipe is ever polled
_LOOK_S = 0.025
_DISK_LOOK_S = 0.1
_CHUNK = 1 << 16
# Kept past the cap only to count them; a pipe holds no more after a kill.
_DRAIN_BYTES = 4 << 20


def contain(work: Callable[[], None], give_up: Callable[[], None]) -> None:
  """Does work about one call, which alone pays for whatever is raised.

  No program may end the supervisor, with which all calls would end as INFRA.

  Args:
    work: about the call; what is wrong is for the supervisor's log.
    give_up: books the call as a crash and forgets it.
  """
  try:
    work()
  except Exception:
    traceback.print_exc()
    give_up()


@dataclasses.dataclass
class Stream:
  """The reading end of a call's stdout or stderr, with its cap."""

  read_fd: int
  write_fd: int
  cap: int
  kept: bytearray = dataclasses.field(default_factory=bytearray)
  n_dropped: int = 0
  is_watched: bool = False
  is_closed: bool = False
  is_borrowed: bool = False  # a session's: closed with the session

  @classmethod
  def open(cls, cap: int) -> "Stream":
    """Returns a stream over a new pipe; nobody writes to it yet."""
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(read_fd, False)
    return cls(read_fd, write_fd, cap)

  @property
  def is_over(self) -> bool:
    """True when the program wrote more than the cap."""
    return self.n_dropped > 0

  def read(self) -> bool:
    """Takes one chunk; returns False at the end of the stream."""
    try:
      data = os.read(self.read_fd, _CHUNK)
    except BlockingIOError:
      return True
    room = self.cap - len(self.kept)
    self.kept += data[:room]
    self.n_dropped += max(0, len(data) - room)
    return bool(data)

  def drain(self) -> None:
    """Takes what is in the pipe now that no writer is left."""
    seen = 0
    while seen < _DRAIN_BYTES:
      before = len(self.kept) + self.n_dropped
      if not self.read():
        return
      n = len(self.kept) + self.n_dropped - before
      if n == 0:
        return
      seen += n

  def text(self, hidden: Sequence[tuple[bytes, bytes]] = ()) -> str:
    """Returns what was kept as text; a character the cap cut is left out.

    Args:
      hidden: paths of the host, and what is shown in place of each.
    """
    data = cut_utf8(bytes(self.kept)) if self.is_over else bytes(self.kept)
    if b"/" in data:
      for path, shown in hidden:
        data = data.replace(path, shown)
    return data.decode("utf-8", "replace")

  def hand_over(self) -> int:
    """Returns the writing end, which is the caller's to close from now on."""
    fd, self.write_fd = self.write_fd, -1
    return fd

  def close(self) -> None:
    """Drops both ends."""
    if self.write_fd >= 0:
      os.close(self.hand_over())
    if not self.is_closed and not self.is_borrowed:
      os.close(self.read_fd)
    self.is_closed = True


def discard(fd: int) -> None:
  """Reads a pipe empty and forgets what was in it."""
  seen = 0
  try:
    while seen < _DRAIN_BYTES and (data := os.read(fd, _CHUNK)):
      seen += len(data)
  except BlockingIOError:
    pass


def cut_utf8(data: bytes) -> bytes:
  """Returns `data` without an incomplete character at its end.

  Args:
    data: bytes of which a valid UTF-8 text may have been cut anywhere.

  Returns:
    The longest prefix that does not end inside a character. Bytes that are no
    UTF-8 at all stay: they are replaced on decoding, not hidden.
  """
  for n_back in range(1, min(4, len(data)) + 1):
    byte = data[-n_back]
    if byte & 0xC0 == 0x80:
      continue
    width = 2 if byte >> 5 == 6 else 3 if byte >> 4 == 14 else 4
    is_cut = byte >= 0xC2 and byte < 0xF5 and n_back < width
    return data[:-n_back] if is_cut else data
  return data


@dataclasses.dataclass
class Running:
  """A call, or a session's cell, from its start until its result.

  `kill` is booked once: the first reason stands.

  Attributes:
    id: the trainer's number of the call.
    limits: what it may use.
    job_fd: its `payload.job_file`.
    stdout: its standard output.
    stderr: its standard error.
    hidden: paths of the host, and what the model reads in place of each.
    base_kb: resident size of what it was forked from.
    space_kb: address space of what it was forked from.
    most_space_kb: address space that each process may have, where that is not
      for the kernel to hold.
    tag: see `linux.set_tag`.
    uid: that it runs under; None for the trainer's.
    scratch: its directory on disk; "" where that is in memory.
    init_pid: process 1 of its pid namespace; 0 without one.
    pid: its main process; 0 before it is forked.
    birth: number of its birth.
    others: processes near it whose number does not count as the program's.
    started: on the monotonic clock; 0.0 before.
    wall_by: when its time is up.
    setup_failure: why the child could not be prepared.
  """

  id: int
  limits: contract.Limits
  job_fd: int
  stdout: Stream
  stderr: Stream
  hidden: Sequence[tuple[bytes, bytes]] = ()
  base_kb: int = 0
  space_kb: int = 0
  most_space_kb: float = math.inf
  tag: int = 0
  uid: int | None = None
  scratch: str = ""
  init_pid: int = 0
  pid: int = 0
  birth: int = 0
  others: frozenset[int] = frozenset()
  started: float = 0.0
  wall_by: float = 0.0
  memory: watch.Memory = dataclasses.field(default_factory=watch.Memory)
  disk: watch.Disk = dataclasses.field(init=False)
  next_look: float = 0.0
  next_disk_look: float = 0.0
  is_last_look: bool = False
  setup_failure: str = ""
  killed_for: layout.ToolStatus | None = None
  killed_cause: str = ""
  is_ended: bool = False
  ended_at: float = 0.0
  wait_status: int = 0
  cpu_s: float = 0.0
  max_rss_kb: int = 0

  def __post_init__(self):
    self.live_in(self.scratch)

  def live_in(self, scratch: str) -> None:
    """Notes its directory on disk; "" where that is in memory."""
    self.scratch = scratch
    n_bytes = self.limits.disk_mb << 20
    self.disk = watch.Disk(scratch, n_bytes, self.limits.n_entries)

  @classmethod
  def open(
    cls, call_id: int, limits: contract.Limits, program: payload.Program
  ) -> "Running":
    """Makes the pipes of a call to be forked and takes its job file.

    Raises:
      OSError: the machine is out of descriptors or memory.
    """
    with contextlib.ExitStack() as undo:
      stdout = Stream.open(limits.output_bytes)
      undo.callback(stdout.close)
      stderr = Stream.open(limits.output_bytes)
      undo.callback(stderr.close)
      undo.pop_all()
    return cls(call_id, limits, program.take_job(), stdout, stderr)

  def fds_for_child(self, program: payload.Program) -> list[int]:
    """Returns what `child.Job` wants; the caller closes them.

    Raises:
      OSError: the machine is out of descriptors or memory.
    """
    fds = [os.dup(self.job_fd), *program.take_stdin()]
    return [self.stdout.hand_over(), self.stderr.hand_over(), *fds]

  def began(self, pid: int) -> None:
    """Notes the main process; the clock starts."""
    self.pid = pid
    self.started = time.monotonic()
    self.wall_by = self.started + self.limits.wall_s
    self.next_look = self.started + min(_FIRST_LOOK_S, self.limits.wall_s)

  def find_excess(
    self, now: float, tops: Iterable[int]
  ) -> tuple[layout.ToolStatus, str] | None:
    """Returns the bound that the call has broken and its cause, or None.

    Args:
      now: on the monotonic clock.
      tops: processes that all of the call's are or descend from, beside its
        main one.
    """
    limits = self.limits
    self.next_look = now + _LOOK_S
    if now >= self.wall_by:
      return layout.ToolStatus.TIMEOUT, "wall"
    self.next_look = min(self.next_look, self.wall_by)
    if linux.cpu_seconds(self.pid) >= limits.cpu_s:
      return layout.ToolStatus.TIMEOUT, "cpu"
    n_known = len(self.others) + 2
    n_most = limits.n_processes + _SPARE_ZOMBIES + n_known
    seen = watch.survey({self.pid, *tops}, n_most)
    pids = [pid for pid in seen.pids if pid != self.init_pid]
    if (
      len(set(pids) - self.others) > limits.n_processes
      or len(pids) + seen.n_zombies > n_most
      or seen.n_threads > limits.n_processes + _SPARE_THREADS + n_known
    ):
      return layout.ToolStatus.RESOURCE, "processes"
    total_kb = limits.total_memory_mb << 10
    if self.memory.is_over(pids, self.space_kb, self.base_kb, total_kb):
      return layout.ToolStatus.MEMORY, "total"
    if self.memory.largest_kb > self.most_space_kb:
      return layout.ToolStatus.MEMORY, "process"
    if now >= self.next_disk_look:
      is_over = self.disk.look()
      if is_over:
        return layout.ToolStatus.RESOURCE, "disk"
      if is_over is not None:
        self.next_disk_look = now + _DISK_LOOK_S
    return None

  def read_output(
    self,
    events: loop.Loop,
    kill: Callable[[tuple[layout.ToolStatus, str]], None],
  ) -> None:
    """Has the loop read the output of a call that runs on.

    A pipe holds what most calls say; those that say more, or wait, are read
    while they run. `kill` is called when more comes than the cap keeps.
    """
    crash = layout.ToolStatus.CRASH, ""
    for name, stream in (("stdout", self.stdout), ("stderr", self.stderr)):
      if stream.is_watched or stream.is_closed:
        continue
      stream.is_watched = True

      def read(stream: Stream = stream, name: str = name) -> None:
        if not stream.read():
          events.unwatch(stream.read_fd)
        if stream.is_over and not self.is_ended:
          kill((layout.ToolStatus.OUTPUT_LIMIT, name))

      events.watch(
        stream.read_fd,
        lambda read=read: contain(read, lambda: kill(crash)),
      )

  def stop_reading(self, events: loop.Loop) -> None:
    """Takes `read_output` back."""
    for stream in (self.stdout, self.stderr):
      if stream.is_watched:
        events.unwatch(stream.read_fd)

  def has_settled_disk(self) -> bool:
    """Looks at its directory on disk once more; True when that is done.

    To be asked again until then, when the call's last process is dead.
    """
    if self.killed_for is not None or not self.is_ended:
      return True
    if not self.is_last_look:
      self.is_last_look = True
      self.disk.restart()
    is_over = self.disk.look()
    if is_over:
      self.book(layout.ToolStatus.RESOURCE, "disk")
    return is_over is not None

  def book(self, why: layout.ToolStatus, cause: str) -> None:
    """Notes why the supervisor kills the call; the first reason stands."""
    if self.killed_for is None:
      self.killed_for, self.killed_cause = why, cause

  def ended(self, wait_status: int, cpu_s: float, max_rss_kb: int) -> None:
    """Notes how the main process ended; others of the call may still live."""
    self.is_ended = True
    self.ended_at = time.monotonic()
    self.wait_status = wait_status
    self.cpu_s = cpu_s
    self.max_rss_kb = max_rss_kb

  def result(self) -> contract.ToolResult:
    """Returns the call's result, now that nothing of it runs any more."""
    self.stdout.drain()
    self.stderr.drain()
    flooded = "stdout" if self.stdout.is_over else ""
    found = verdict.judge(
      verdict.Evidence(
        wait_status=self.wait_status,
        killed_for=self.killed_for,
        killed_cause=self.killed_cause,
        flooded=flooded or ("stderr" if self.stderr.is_over else ""),
        setup_failure=self.setup_failure,
        record=payload.read_record(self.job_fd),
        max_rss_kb=self.max_rss_kb,
        memory_kb=self.limits.memory_mb << 10,
        cpu_s=self.cpu_s,
        cpu_limit_s=self.limits.cpu_s,
      )
    )
    stderr = self.stderr.text(self.hidden)
    if found.status == layout.ToolStatus.INFRA:
      stderr = self.setup_failure or "cancelled"
    wall_s = time.monotonic() - self.started if self.started else 0.0
    return contract.ToolResult(
      status=found.status,
      stdout=self.stdout.text(self.hidden),
      stderr=stderr,
      error_type=found.error_type,
      exit_code=found.exit_code,
      signal=found.signal,
      cause=found.cause,
      clean=found.clean,
      truncated_bytes=self.stdout.n_dropped + self.stderr.n_dropped,
      wall_ms=round(wall_s * 1e3, 3),
      cpu_ms=round(self.cpu_s * 1e3, 3),
      max_rss_kb=self.max_rss_kb,
    )

  def close(self) -> None:
    """Gives back descriptors and memory; the scratch directory stays."""
    self.stdout.close()
    self.stderr.close()
    os.close(self.job_fd)
