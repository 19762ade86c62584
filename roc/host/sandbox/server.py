"""The fork server: one thread, one child per call, every deadline kept here.

It loads the common modules once, then forks a child per call and watches it
from outside: wall clock, CPU, output, number of processes. A call is over when
its last process is dead, not when its main process is: the server adopts
orphans, finds them by the call's tag and kills them before it answers.
"""

import base64
import collections
import os
import select
import signal
import sys
import time

from roc import layout
from roc.host.sandbox import (
  child,
  contract,
  image,
  keeper,
  linux,
  running,
  wire,
)

_SWEEP_S = 0.25
_PATIENCE_S = 2.0  # for a killed call's last process to be gone


def serve(channel_fd: int, root: str) -> child.Job | None:
  """Serves calls until the trainer hangs up.

  Args:
    channel_fd: stream socket to the trainer; the first message configures.
    root: scratch directory of this server, see `keeper`.

  Returns:
    None when the trainer is gone and every call is dead. In each forked child:
    that child's job; every object of the server is released by then.
  """
  server = Server(channel_fd, root)
  try:
    server.configure()
  except Exception as error:
    os.write(
      channel_fd,
      wire.pack({"op": "failed", "why": f"{type(error).__name__}: {error}"}),
    )
    return None
  return server.loop()


class Server:
  """State of the loop; see the module's docstring."""

  def __init__(self, channel_fd: int, root: str):
    self._channel = channel_fd
    self._root = root
    self._unpacker = wire.Unpacker()
    self._outbox = bytearray()
    self._waiting: collections.deque[dict] = collections.deque()
    self._active: dict[int, running.Running] = {}  # by pid of the main process
    self._ordinal = 0
    self._keeper_pid = os.getppid()
    self._is_stopping = False
    self._is_clogged = False  # the outbox waits for room in the socket
    self._next_sweep = 0.0
    self._last_limits: tuple[dict, contract.Limits] = ({}, contract.Limits())

  # ----------------------------------------------------------------- start-up

  def configure(self) -> None:
    """Reads the configuration, loads modules, arms signals, says `ready`."""
    config = self._first_message()
    self._n_workers = int(config["n_workers"])
    linux.offer_to_oom_killer()
    linux.lower_descriptor_limit(256 + 16 * self._n_workers)
    linux.adopt_orphans()
    linux.forbid_new_privileges()
    linux.drop_capabilities()
    os.umask(0o077)
    image.load(config["site_dirs"], config["preload"])
    self._library_dirs = image.library_dirs()
    self._base_bytes = linux.address_space_bytes()
    self._n_tasks = linux.tasks_of_user()
    self._next_tag = linux.first_tag()
    self._arm()
    self._send(
      {
        "op": "ready",
        "pid": os.getpid(),
        "python": sys.version.split()[0],
        "base_mb": self._base_bytes >> 20,
      }
    )
    image.freeze()

  def _first_message(self) -> dict:
    while True:
      data = os.read(self._channel, 1 << 16)
      if not data:
        raise EOFError("the trainer hung up before the configuration")
      messages = self._unpacker.feed(data)
      if messages:
        return messages[0]

  def _arm(self) -> None:
    wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    self._wake = wake_read
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGTERM, self._stop)
    os.set_blocking(self._channel, False)
    self._children = linux.own_children()
    self._epoll = select.epoll()
    self._epoll.register(self._channel, select.EPOLLIN)
    self._epoll.register(self._wake, select.EPOLLIN)

  def _stop(self, *_) -> None:
    self._is_stopping = True

  # --------------------------------------------------------------------- loop

  def loop(self) -> child.Job | None:
    """Serves until told to stop; returns a job in each forked child."""
    while not self._is_stopping:
      for fd, _ in self._epoll.poll(self._timeout_s()):
        if fd == self._channel:
          self._receive()
        elif fd == self._wake:
          _drain(self._wake)
        else:
          self._read_output(fd)
      self._reap()
      self._look_at_calls()
      job = self._start_calls()
      if job is not None:
        return job
      self._flush()
    self._kill_everything()
    return None

  def _timeout_s(self) -> float:
    now = time.monotonic()
    due = [call.next_look for call in self._active.values()]
    due.append(self._next_sweep if self._active else now + _SWEEP_S)
    return max(0.0, min(due) - now)

  def _receive(self) -> None:
    try:
      data = os.read(self._channel, 1 << 20)
    except BlockingIOError:
      return
    except OSError:
      data = b""
    if not data:  # the trainer is gone: nobody waits for any answer
      self._is_stopping = True
      return
    for message in self._unpacker.feed(data):
      if message["op"] == "call":
        self._waiting.append(message)
      elif message["op"] == "cancel":
        self._cancel(message["id"])
      elif message["op"] == "ping":
        self._send({"op": "pong"})

  def _send(self, message: dict) -> None:
    self._outbox += wire.pack(message)
    self._flush()

  def _flush(self) -> None:
    """Writes what the socket takes; never blocks the loop."""
    if not self._outbox:
      return
    try:
      n = os.write(self._channel, self._outbox)
    except BlockingIOError:
      n = 0
    except OSError:
      self._is_stopping = True
      return
    del self._outbox[:n]
    if bool(self._outbox) != self._is_clogged:
      self._is_clogged = bool(self._outbox)
      wanted = select.EPOLLIN | (select.EPOLLOUT if self._is_clogged else 0)
      self._epoll.modify(self._channel, wanted)

  # -------------------------------------------------------------------- calls

  def _start_calls(self) -> child.Job | None:
    while self._waiting and len(self._active) < self._n_workers:
      message = self._waiting.popleft()
      try:
        job = self._fork(message)
      except OSError as error:
        why = f"the sandbox could not start a process: {error.strerror}"
        self._answer_infra(message["id"], why)
        continue
      if job is not None:
        return job
    return None

  def _fork(self, message: dict) -> child.Job | None:
    """Starts one call; returns its job in the child, None in the server."""
    self._ordinal += 1
    self._next_tag -= 1
    limits = self._limits_of(message["limits"])
    scratch = os.path.join(self._root, keeper.WORK, str(self._ordinal))
    call = running.Running.open(message["id"], limits, scratch, self._next_tag)
    try:
      stdin_fd = _stdin_fd(message["stdin"], scratch)
      server_pid = os.getpid()
      call.started = time.monotonic()
      pid = os.fork()
    except BaseException:
      call.close()
      _discard(scratch, os.path.join(self._root, keeper.TRASH))
      raise
    if pid == 0:
      self._epoll.close()
      return child.Job(
        code=message["code"],
        limits=limits,
        seed=message["seed"],
        tag=call.tag,
        scratch=scratch,
        stdin_fd=stdin_fd,
        stdout_fd=call.stdout.write_fd,
        stderr_fd=call.stderr.write_fd,
        setup_fd=call.setup_write_fd,
        record=call.record,
        server_pid=server_pid,
        base_bytes=self._base_bytes,
        n_tasks=self._n_tasks,
        library_dirs=self._library_dirs,
      )
    if stdin_fd != 0:
      os.close(stdin_fd)
    call.forked(pid)
    self._active[pid] = call
    return None

  def _limits_of(self, fields: dict) -> contract.Limits:
    """Parses limits; nearly always those of the call before."""
    if fields != self._last_limits[0]:
      self._last_limits = (fields, contract.Limits.from_json(fields))
    return self._last_limits[1]

  def _read_output(self, fd: int) -> None:
    for call in self._active.values():
      stream = call.stream_of(fd)
      if stream is None:
        continue
      if not stream.read():
        self._epoll.unregister(fd)
        stream.is_watched = False
      if stream.is_over and not call.is_ended:
        call.kill(layout.ToolStatus.OUTPUT_LIMIT)
      return

  def _reap(self) -> None:
    """Collects every dead child: main processes and adopted orphans."""
    while True:
      try:
        peek = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
      except ChildProcessError:
        return
      if peek is None:
        return
      call = self._active.get(peek.si_pid)
      if call is not None:
        # Before the pid is free to be used again.
        linux.kill_group_quietly(peek.si_pid)
      _, status, usage = os.wait4(peek.si_pid, 0)
      if call is not None:
        call.main_ended(status, usage)

  def _look_at_calls(self) -> None:
    now = time.monotonic()
    for pid, call in list(self._active.items()):
      if call.is_ended:
        if self._is_drained(call) or now > call.ended_at + _PATIENCE_S:
          del self._active[pid]
          self._finish(call)
        else:
          call.next_look = now + 0.002
      elif now >= call.next_look:
        call.look(now)
        if call.wants_watching:
          for stream in (call.stdout, call.stderr):
            if not stream.is_watched and not stream.is_closed:
              stream.is_watched = True
              self._epoll.register(stream.read_fd, select.EPOLLIN)
    if self._active and now >= self._next_sweep:
      self._next_sweep = now + _SWEEP_S
      self._sweep()
      if os.getppid() != self._keeper_pid:
        self._is_stopping = True

  def _is_drained(self, call: running.Running) -> bool:
    """Kills what the call left behind; True when nothing is left."""
    left = [pid for pid in self._orphans() if linux.read_tag(pid) == call.tag]
    for pid in left:
      linux.kill_quietly(pid)
    return not left

  def _orphans(self) -> list[int]:
    return [pid for pid in self._children() if pid not in self._active]

  def _sweep(self) -> None:
    """Kills orphans that belong to no running call."""
    tags = {call.tag for call in self._active.values()}
    for pid in self._orphans():
      if linux.read_tag(pid) not in tags:
        linux.kill_quietly(pid)

  def _finish(self, call: running.Running) -> None:
    for stream in (call.stdout, call.stderr):
      if stream.is_watched:
        self._epoll.unregister(stream.read_fd)
    result = call.result()
    call.close()
    _discard(call.scratch, os.path.join(self._root, keeper.TRASH))
    self._send({"op": "result", "id": call.id, "result": result.to_fields()})

  def _cancel(self, call_id: int) -> None:
    for message in self._waiting:
      if message["id"] == call_id:
        self._waiting.remove(message)
        self._answer_infra(call_id, "cancelled")
        return
    for call in self._active.values():
      if call.id == call_id and not call.is_ended:
        call.kill(layout.ToolStatus.INFRA)

  def _answer_infra(self, call_id: int, why: str) -> None:
    result = contract.ToolResult(layout.ToolStatus.INFRA, stderr=why)
    self._send({"op": "result", "id": call_id, "result": result.to_fields()})

  def _kill_everything(self) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    for pid in self._active:
      linux.kill_group_quietly(pid)
    while not linux.kill_children() and time.monotonic() < deadline:
      time.sleep(0.002)


# ------------------------------------------------------------------- helpers


def _drain(fd: int) -> None:
  try:
    while os.read(fd, 4096):
      pass
  except BlockingIOError:
    pass


def _stdin_fd(text: str, scratch: str) -> int:
  """A descriptor to read base64 `text` from; 0, which is /dev/null, for none.

  A file in memory: unlike a pipe it holds megabytes that nobody may ever read.
  """
  if not text:
    return 0
  data = base64.b64decode(text)
  if hasattr(os, "memfd_create"):
    fd = os.memfd_create("stdin")
  else:  # Python built against an old C library
    path = os.path.join(scratch, "stdin")
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.unlink(path)
  view = memoryview(data)
  while view:
    view = view[os.write(fd, view) :]
  os.lseek(fd, 0, os.SEEK_SET)
  return fd


def _discard(scratch: str, trash: str) -> None:
  """Empties the call's place at once; the keeper deletes what was in it."""
  try:
    os.rmdir(scratch)  # most programs leave it empty
  except OSError:
    os.chmod(scratch, 0o700)
    os.rename(scratch, os.path.join(trash, os.path.basename(scratch)))
