"""One call while it runs, as the server sees it: pipes, clocks, evidence."""

import contextlib
import dataclasses
import mmap
import os
import time

from roc import layout
from roc.host.sandbox import contract, linux, verdict

_FIRST_LOOK_S = 0.01  # most calls are over before it: no pipe is ever polled
_LOOK_S = 0.025
_CHUNK = 1 << 16
# Kept past the cap only to count them; a pipe holds no more after a kill.
_DRAIN_BYTES = 4 << 20


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

  def text(self) -> str:
    """Returns what was kept as text; a character the cap cut is left out."""
    if not self.is_over:
      return self.kept.decode("utf-8", "replace")
    return cut_utf8(bytes(self.kept)).decode("utf-8", "replace")

  def close_write(self) -> None:
    """Drops the writing end, which now is the child's alone."""
    if self.write_fd >= 0:
      os.close(self.write_fd)
      self.write_fd = -1

  def close(self) -> None:
    """Drops both ends."""
    self.close_write()
    if not self.is_closed:
      os.close(self.read_fd)
      self.is_closed = True


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
  """A forked call. `kill` is booked once: the first reason stands."""

  id: int
  limits: contract.Limits
  scratch: str
  tag: int
  stdout: Stream
  stderr: Stream
  setup_read_fd: int
  setup_write_fd: int
  record: mmap.mmap
  started: float = 0.0
  pid: int = 0
  next_look: float = 0.0
  killed_for: layout.ToolStatus | None = None
  wants_watching: bool = False
  is_ended: bool = False
  ended_at: float = 0.0
  wait_status: int = 0
  cpu_s: float = 0.0
  max_rss_kb: int = 0

  @classmethod
  def open(
    cls, call_id: int, limits: contract.Limits, scratch: str, tag: int
  ) -> "Running":
    """Makes the scratch directory, pipes and record of a call to be forked.

    Raises:
      OSError: the machine is out of descriptors, memory or disk.
    """
    with contextlib.ExitStack() as undo:
      os.mkdir(scratch, 0o700)
      undo.callback(os.rmdir, scratch)
      stdout = Stream.open(limits.output_bytes)
      undo.callback(stdout.close)
      stderr = Stream.open(limits.output_bytes)
      undo.callback(stderr.close)
      record = mmap.mmap(-1, mmap.PAGESIZE)
      undo.callback(record.close)
      setup_read_fd, setup_write_fd = os.pipe2(os.O_CLOEXEC)
      os.set_blocking(setup_read_fd, False)
      undo.pop_all()
    return cls(
      call_id,
      limits,
      scratch,
      tag,
      stdout,
      stderr,
      setup_read_fd,
      setup_write_fd,
      record,
    )

  def forked(self, pid: int) -> None:
    """Notes the child and leaves the writing ends to it."""
    self.pid = pid
    self.next_look = self.started + min(_FIRST_LOOK_S, self.limits.wall_s)
    self.stdout.close_write()
    self.stderr.close_write()
    os.close(self.setup_write_fd)
    self.setup_write_fd = -1

  def stream_of(self, fd: int) -> Stream | None:
    """Returns the stream that reads from `fd`, if it is one of this call's."""
    for stream in (self.stdout, self.stderr):
      if stream.read_fd == fd and not stream.is_closed:
        return stream
    return None

  def look(self, now: float) -> None:
    """Holds the call to its clocks and its number of processes."""
    deadline = self.started + self.limits.wall_s
    n_allowed = self.limits.n_processes - 1
    if now >= deadline or linux.cpu_seconds(self.pid) >= self.limits.cpu_s:
      self.kill(layout.ToolStatus.TIMEOUT)
    elif len(linux.descendants(self.pid, n_allowed)) > n_allowed:
      self.kill(layout.ToolStatus.RESOURCE)
    self.wants_watching = True
    self.next_look = min(deadline, now + _LOOK_S)
    if self.killed_for is not None:
      self.next_look = now + _LOOK_S

  def kill(self, why: layout.ToolStatus) -> None:
    """Kills the main process and its group, and books the reason."""
    if self.killed_for is None:
      self.killed_for = why
    linux.kill_quietly(self.pid)
    linux.kill_group_quietly(self.pid)

  def main_ended(self, wait_status: int, usage) -> None:
    """Notes how the main process ended; others of the call may still live."""
    self.is_ended = True
    self.ended_at = time.monotonic()
    self.wait_status = wait_status
    self.cpu_s = usage.ru_utime + usage.ru_stime
    self.max_rss_kb = usage.ru_maxrss

  def result(self) -> contract.ToolResult:
    """Returns the call's result, now that its last process is dead."""
    self.stdout.drain()
    self.stderr.drain()
    try:
      setup_failure = os.read(self.setup_read_fd, 4096).decode(
        "utf-8", "replace"
      )
    except BlockingIOError:
      setup_failure = ""
    found = verdict.judge(
      verdict.Evidence(
        wait_status=self.wait_status,
        killed_for=self.killed_for,
        is_flooded=self.stdout.is_over or self.stderr.is_over,
        setup_failure=setup_failure,
        record=self.record[: verdict.RECORD_BYTES],
        max_rss_kb=self.max_rss_kb,
        memory_kb=self.limits.memory_mb << 10,
        cpu_s=self.cpu_s,
        cpu_limit_s=self.limits.cpu_s,
      )
    )
    stderr = self.stderr.text()
    if found.status == layout.ToolStatus.INFRA:
      stderr = setup_failure or "cancelled"
    return contract.ToolResult(
      status=found.status,
      stdout=self.stdout.text(),
      stderr=stderr,
      error_type=found.error_type,
      exit_code=found.exit_code,
      signal=found.signal,
      clean=found.clean,
      truncated_bytes=self.stdout.n_dropped + self.stderr.n_dropped,
      wall_ms=round((time.monotonic() - self.started) * 1e3, 3),
      cpu_ms=round(self.cpu_s * 1e3, 3),
      max_rss_kb=self.max_rss_kb,
    )

  def close(self) -> None:
    """Gives back descriptors and memory; the scratch directory stays."""
    self.stdout.close()
    self.stderr.close()
    os.close(self.setup_read_fd)
    if self.setup_write_fd >= 0:
      os.close(self.setup_write_fd)
      self.setup_write_fd = -1
    self.record.close()
