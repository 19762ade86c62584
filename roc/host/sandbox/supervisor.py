"""The supervisor: one thread, every deadline kept here, nothing forked later.

It has zygotes fork a child per call and is itself the children's parent, so it
watches from outside: wall clock, CPU, memory, output, disk, number of
processes. A call is over when its last process is dead, not when its main
process is: in a pid namespace they all die with process 1, and elsewhere the
supervisor adopts orphans, finds them by the call's tag and kills them before it
answers.
"""

import collections
import contextlib
import os
import signal
import socket
import sys
import time

from roc.host.sandbox import (
  ascent,
  births,
  confine,
  contract,
  fleet,
  image,
  linux,
  loop,
  payload,
  plan,
  routing,
  running,
  scratch,
  scripts,
  selfcheck,
  sessions,
  wire,
  zygote,
)

_SWEEP_S = 0.25
_PATIENCE_S = 10.0  # for the last processes to be gone
_FDS_PER_CALL = 16
# The kernel lets nobody pass descriptors on while those under way of the whole
# user are more than that. Calls, at 512 each, must not come so far.
_SPARE_FDS = 1024
_REAPED_PER_TURN = 64
_MAX_FDS = 250  # what Linux sends at once


def serve(channel_fd: int, root: str) -> zygote.Next | None:
  """Serves calls until the trainer hangs up.

  Args:
    channel_fd: stream socket to the trainer; the first message configures.
    root: directory of this sandbox, see `keeper`.

  Returns:
    None when the trainer is gone and every call is dead. In each forked
    template: what that does.
  """
  supervisor = Supervisor(channel_fd, root)
  try:
    forked = supervisor.configure()
  except Exception as error:
    why = f"{type(error).__name__}: {error}"
    if isinstance(error, contract.SandboxError):
      why = str(error)
    os.write(channel_fd, wire.pack({"op": "failed", "why": why}))
    return None
  if forked is not None:
    os.close(channel_fd)
    return forked
  supervisor.loop()
  return None


class Supervisor:
  """State of the loop; see the module's docstring."""

  def __init__(self, channel_fd: int, root: str):
    self._channel = channel_fd
    self._root = root
    self._unpacker = wire.Unpacker()
    self._fds: collections.deque[int] = collections.deque()
    self._outbox = bytearray()
    self._waiting: collections.deque[dict] = collections.deque()
    self._keeper_pid = os.getppid()
    self._is_stopping = False
    self._is_clogged = False  # the outbox waits for room in the socket
    self._next_sweep = 0.0
    self._unannounced: set[int] = set()  # children that nobody has named yet
    self._last_limits: tuple[dict, contract.Limits] = ({}, contract.Limits())
    self._checked: contract.ToolResult | None = None

  # ----------------------------------------------------------------- start-up

  def configure(self) -> zygote.Next | None:
    """Reads the configuration, finds a plan that holds, says `ready`.

    Returns:
      None; in each template that it forks, what that does.

    Raises:
      contract.SandboxError: no plan that is wanted holds here.
    """
    config = self._first_message()
    self._n_workers = int(config["n_workers"])
    self._n_sessions = int(config["n_sessions"])
    linux.offer_to_oom_killer()
    linux.lower_descriptor_limit(
      _SPARE_FDS + _FDS_PER_CALL * (self._n_workers + self._n_sessions)
    )
    linux.adopt_orphans()
    linux.forbid_new_privileges()
    os.umask(0o077)
    sys.path.extend(config["site_dirs"])
    self._events = loop.Loop()
    self._fleet = fleet.Fleet(
      self._root,
      min(self._n_workers, len(os.sched_getaffinity(0))),
      self._events,
      lambda number, why: self._births.fail(number, why),
    )
    linux.hide_memory()  # templates and zygotes inherit that
    forked = self._fleet.fork_templates(config["images"], config["site_dirs"])
    if forked is not None:
      self._events.close()
      return forked
    self._births = births.Births(self._fleet)
    self._fleet.library_dirs = image.library_dirs()
    self._furnish("")
    self._arm()
    climb = ascent.Ascent(self._fleet, self._root, self._turn, self._check)
    tried = climb.climb(config)
    self._send_ready(tried)
    for name in config["images"]:
      if name not in routing.LAZY:
        self._fleet.load(name)
    return None

  def _furnish(self, box: str) -> None:
    """Makes what runs calls, under the plan in force."""
    places = scratch.Places(self._root, box, self._fleet.library_dirs)
    self._scripts = scripts.Scripts(
      self._births, places, self._events, self._orphans_of, self._answer
    )
    self._sessions = sessions.Sessions(
      self._births,
      places,
      self._n_sessions,
      self._events,
      self._orphans_of,
      self._answer,
    )

  def _check(self, message: dict) -> contract.ToolResult:
    """Runs one call under a plan that was just put in force."""
    in_memory = bool(self._births.plan.namespaces)
    self._furnish(os.path.join(self._root, confine.BOX) if in_memory else "")
    self._births.open_uids()
    self._checked = None
    self._waiting.append(message)
    while self._checked is None:
      self._turn()
    return self._checked

  def _send_ready(self, tried: list[dict]) -> None:
    self._send(
      {
        "op": "ready",
        "pid": os.getpid(),
        "python": sys.version.split()[0],
        "plan": plan.describe(self._births.plan),
        "protection": selfcheck.protection(self._births.plan),
        "tried": tried,
      }
    )

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
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGTERM, self._stop)
    self._socket = socket.socket(fileno=self._channel)
    self._socket.setblocking(False)
    self._children = linux.own_children()
    self._events.watch(self._channel, self._receive)
    self._events.watch(wake_read, lambda: running.discard(wake_read))

  def _stop(self, *_) -> None:
    self._is_stopping = True

  # --------------------------------------------------------------------- loop

  def loop(self) -> None:
    """Serves until told to stop, then kills everything."""
    with contextlib.suppress(EOFError):
      while True:
        self._turn()
    self._kill_everything()

  def _turn(self) -> None:
    """Waits for something to happen and deals with it.

    Raises:
      EOFError: it is over.
    """
    self._events.turn(self._timeout_s())
    self._reap()
    now = time.monotonic()
    self._scripts.look(now)
    self._sessions.look(now)
    if now >= self._next_sweep:
      self._next_sweep = now + _SWEEP_S
      self._sweep()
      self._sessions.look_at_idle()
      self._is_stopping |= os.getppid() != self._keeper_pid
    self._start_calls()
    self._flush()
    if self._is_stopping:
      raise EOFError("the trainer hung up")

  def _timeout_s(self) -> float:
    now = time.monotonic()
    due = min(self._scripts.next_look(), self._sessions.next_look())
    return max(0.0, min(due - now, _SWEEP_S))

  def _receive(self) -> None:
    try:
      data, fds, flags, _ = socket.recv_fds(self._socket, 1 << 16, _MAX_FDS)
    except BlockingIOError:
      return
    except OSError:
      data, fds, flags = b"", [], 0
    self._fds += fds
    if flags & socket.MSG_CTRUNC:
      raise EOFError("files of a call were lost: whose is unknown")
    if not data:  # the trainer is gone: nobody waits for any answer
      self._is_stopping = True
      return
    messages = self._unpacker.feed(data)
    for message in messages:
      if message["op"] == "call":
        fds = [self._fds.popleft() for _ in range(message["n_fds"])]
        message["program"] = payload.Program(*fds)
        self._waiting.append(message)
      elif message["op"] == "cancel":
        self._cancel(message["id"])
      elif message["op"] == "end":
        self._sessions.end(message["session"])
      elif message["op"] == "ping":
        self._send({"op": "pong"})

  def _send(self, message: dict) -> None:
    self._outbox += wire.pack(message)

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
      self._events.also_writable(self._channel, self._is_clogged)

  # -------------------------------------------------------------------- calls

  def _start_calls(self) -> None:
    while (
      self._waiting
      and len(self._scripts) + self._sessions.n_running < self._n_workers
    ):
      message = self._waiting.popleft()
      limits = self._limits_of(message["limits"])
      if message["tool"] == "session":
        self._sessions.submit(message, limits)
      else:
        self._scripts.start(message, limits)

  def _limits_of(self, fields: dict) -> contract.Limits:
    """Parses limits; nearly always those of the call before."""
    if fields != self._last_limits[0]:
      self._last_limits = (fields, contract.Limits.from_json(fields))
    return self._last_limits[1]

  def _cancel(self, call_id: int) -> None:
    for message in self._waiting:
      if message["id"] == call_id:
        self._waiting.remove(message)
        message["program"].close()
        self._answer(call_id, contract.infra("cancelled", "cancelled"))
        return
    if not self._scripts.cancel(call_id):
      self._sessions.cancel(call_id)

  def _answer(self, call_id: int, result: contract.ToolResult) -> None:
    if call_id == selfcheck.CALL_ID:
      self._checked = result
      return
    self._send({"op": "result", "id": call_id, "result": result.to_fields()})
    self._flush()

  # ---------------------------------------------------------------- processes

  def _reap(self) -> None:
    """Collects dead children; programs can make many, so not all at a turn."""
    for _ in range(_REAPED_PER_TURN):
      try:
        peek = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
      except ChildProcessError:
        return
      if peek is None:
        return
      pid = peek.si_pid
      self._scripts.before_reaping(pid)
      _, status, usage = os.wait4(pid, 0)
      if pid in self._births.inits:
        self._births.inits.discard(pid)
      elif not self._fleet.reaped(pid) and not self._sessions.reaped(pid):
        self._scripts.reaped(pid, status, usage)

  def _orphans(self) -> list[int]:
    """Own children that nobody answers for, children of programs among them."""
    known = (
      self._fleet.pids()
      | self._sessions.live_pids()
      | self._scripts.main_pids()
      | self._births.inits
    )
    return [pid for pid in self._children() if pid not in known]

  def _orphans_of(self, tag: int) -> list[int]:
    return [pid for pid in self._orphans() if linux.read_tag(pid) == tag]

  def _sweep(self) -> None:
    """Kills what belongs to no call that is still there.

    What carries no mark has just been forked and will be announced; or the
    zygote that was to announce it is dead, and it is still there next time.
    """
    tags = self._scripts.live_tags() | self._sessions.live_tags()
    unmarked = set()
    for pid in self._orphans():
      if not linux.is_marked(pid):
        unmarked.add(pid)
      elif linux.read_tag(pid) not in tags:
        linux.kill_quietly(pid)
    for pid in unmarked & self._unannounced:
      linux.kill_quietly(pid)
    self._unannounced = unmarked

  def _kill_everything(self) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    self._scripts.kill_all()
    while not linux.kill_children() and time.monotonic() < deadline:
      time.sleep(0.002)
