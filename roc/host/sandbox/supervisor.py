"""The supervisor: one thread, every deadline kept here, nothing forked later.

It has zygotes fork a child per call and is itself the children's parent, so it
watches from outside: wall clock, CPU, memory, output, disk, number of
processes. A call is over when its last process is dead, not when its main
process is: in a pid namespace they all die with process 1, and elsewhere the
supervisor adopts orphans, finds them by the call's tag and kills them before it
answers.
"""

import base64
import collections
import contextlib
import os
import select
import signal

import sys
import time
from collections.abc import Callable

from roc import layout
from roc.host.sandbox import (
  births,
  confine,
  contract,
  fleet,
  image,
  linux,
  plan,
  routing,
  running,
  scratch,
  selfcheck,
  sessions,
  wire,
  zygote,
)

_SWEEP_S = 0.25
_PATIENCE_S = 2.0  # for a killed call's last process to be gone
_FDS_PER_CALL = 16
_CHECK_ID = -1  # of the call that checks a plan


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
    self._outbox = bytearray()
    self._waiting: collections.deque[dict] = collections.deque()
    self._calls: dict[int, running.Running] = {}  # by the trainer's number
    self._mains: dict[int, running.Running] = {}  # by pid of the main process
    self._early: dict[int, tuple] = {}  # ends of processes not yet announced
    self._keeper_pid = os.getppid()
    self._is_stopping = False
    self._is_clogged = False  # the outbox waits for room in the socket
    self._next_sweep = 0.0
    self._last_limits: tuple[dict, contract.Limits] = ({}, contract.Limits())
    self._checked: contract.ToolResult | None = None
    self._handlers: dict[int, Callable[[], None]] = {}
    self._births_of: dict[int, int] = {}

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
    n_sessions = int(config["n_sessions"])
    linux.offer_to_oom_killer()
    linux.lower_descriptor_limit(
      256 + _FDS_PER_CALL * (self._n_workers + n_sessions)
    )
    linux.adopt_orphans()
    linux.forbid_new_privileges()
    os.umask(0o077)
    sys.path.extend(config["site_dirs"])
    self._epoll = select.epoll()
    self._fleet = fleet.Fleet(
      self._root,
      min(self._n_workers, len(os.sched_getaffinity(0))),
      self._watch,
      self._unwatch,
      lambda number, why: self._births.fail(number, why),
    )
    forked = self._fleet.fork_templates(config["images"], config["site_dirs"])
    if forked is not None:
      self._epoll.close()
      return forked
    linux.hide_memory()
    self._births = births.Births(self._fleet)
    self._places = scratch.Places(self._root)
    self._fleet.library_dirs = image.library_dirs()
    self._arm()
    tried = self._find_plan(config)
    self._births.open_uids()
    in_memory = bool(self._births.plan.namespaces)
    box = os.path.join(self._root, confine.BOX) if in_memory else ""
    self._places = scratch.Places(self._root, box)
    self._sessions = self._new_sessions(n_sessions)
    self._send_ready(tried)
    for name in config["images"]:
      if name not in routing.LAZY:
        self._fleet.load(name)
    return None

  def _new_sessions(self, n_sessions: int) -> sessions.Sessions:
    return sessions.Sessions(
      self._births,
      self._places,
      n_sessions,
      self._watch,
      self._unwatch,
      self._orphans_of,
      self._answer,
    )

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
    os.set_blocking(self._channel, False)
    self._children = linux.own_children()
    self._watch(self._channel, self._receive)
    self._watch(wake_read, lambda: running.discard(wake_read))

  def _stop(self, *_) -> None:
    self._is_stopping = True

  def _find_plan(self, config: dict) -> list[dict]:
    """Takes the first plan of the ladder that holds.

    Returns:
      What was tried: tier, namespaces, and why it does not hold ("" if so).
    """
    self._sessions = self._new_sessions(1)
    bare = self._fleet.images[routing.BARE]
    self._fleet.load(routing.BARE)
    self._turn_until(lambda: bare.is_loaded or bool(bare.failure))
    if bare.failure:
      raise contract.SandboxError(bare.failure)
    dirs = [d for d in self._fleet.library_dirs if os.path.isdir(d)]
    plans = plan.ladder(
      plan.Machine.look(dirs),
      tier=config["tier"],
      without=tuple(config["without"]),
      read_paths=tuple(config["read_paths"]),
    )
    tried = []
    for wish in plans:
      why_not = self._try(bare, wish)
      tried.append(
        {
          "tier": wish.tier,
          "namespaces": wish.namespaces or None,
          "why_not": why_not,
        }
      )
      if not why_not:
        return tried
    reasons = "; ".join(f"{t['tier']}: {t['why_not']}" for t in tried)
    wanted = config["tier"] or "any tier"
    raise contract.SandboxError(
      f"{wanted} cannot be had here ({reasons or 'a part of it is missing'})"
    )

  def _try(self, bare: fleet.Image, wish: plan.Plan) -> str:
    """Puts a plan in force and attacks it; returns why it does not hold."""
    made = self._fleet.add_zygote(bare, wish)
    self._turn_until(lambda: made.is_ready or made not in bare.zygotes)
    if not made.is_ready:
      return made.failure
    self._fleet.plan = wish
    in_memory = bool(wish.namespaces)
    box = os.path.join(self._root, confine.BOX) if in_memory else ""
    self._places = scratch.Places(self._root, box)
    self._births.open_uids()
    self._checked = None
    with selfcheck.targets(self._root) as targets:
      self._waiting.append(selfcheck.message(_CHECK_ID, targets))
      self._turn_until(lambda: self._checked is not None)
    assert self._checked is not None
    why_not = selfcheck.why_not(wish, self._checked, targets)
    if why_not:
      self._fleet.plan = None
      self._fleet.drop(made)
    return why_not

  def _turn_until(self, is_done: Callable[[], bool]) -> None:
    while not is_done():
      if self._is_stopping:
        raise EOFError("the trainer hung up")
      self._turn()

  # --------------------------------------------------------------------- loop

  def loop(self) -> None:
    """Serves until told to stop."""
    while not self._is_stopping:
      self._turn()
    self._kill_everything()

  def _turn(self) -> None:
    for fd, _ in self._epoll.poll(self._timeout_s()):
      handler = self._handlers.get(fd)
      if handler is not None:  # else an earlier one of this turn removed it
        handler()
    self._reap()
    self._look_at_calls()
    self._start_calls()
    self._flush()

  def _watch(self, fd: int, handler: Callable[[], None]) -> None:
    self._handlers[fd] = handler
    self._epoll.register(fd, select.EPOLLIN)

  def _unwatch(self, fd: int) -> None:
    if self._handlers.pop(fd, None) is not None:
      self._epoll.unregister(fd)

  def _timeout_s(self) -> float:
    now = time.monotonic()
    due = [now + _SWEEP_S]
    due += [call.next_look for call in self._mains.values()]
    due += [cell.next_look for _, cell in self._sessions.running_cells()]
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
        message["stdin"] = base64.b64decode(message["stdin"])
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
      wanted = select.EPOLLIN | (select.EPOLLOUT if self._is_clogged else 0)
      self._epoll.modify(self._channel, wanted)

  # -------------------------------------------------------------------- calls

  def _start_calls(self) -> None:
    while (
      self._waiting
      and len(self._calls) + self._sessions.n_running < self._n_workers
    ):
      message = self._waiting.popleft()
      limits = self._limits_of(message["limits"])
      if message["tool"] == "session":
        self._sessions.submit(message, limits)
      else:
        self._start(message, limits)

  def _start(self, message: dict, limits: contract.Limits) -> None:
    uid, tag = self._births.take_uid(), self._births.new_tag()
    with contextlib.ExitStack() as undo:
      try:
        place = self._places.make(uid)
        undo.callback(self._places.discard, place)
        call = running.Running.open(message["id"], limits, message["code"])
        undo.callback(call.close)
        stdin = message["stdin"]
        fds = call.fds_for_child(stdin)
      except OSError as error:
        self._births.give_uid(uid)
        why = f"the sandbox could not start a process: {error.strerror}"
        self._answer_infra(message["id"], why)
        return
      undo.pop_all()
    call.tag, call.uid, call.scratch = tag, uid, place
    call.hidden = self._places.hidden(place)
    self._calls[call.id] = call
    request = births.request_for(
      "python", message["limits"], message["seed"], tag, place, uid
    )
    call.birth = self._births.begin(
      routing.image_for(message["code"]),
      request,
      fds,
      lambda why: setattr(call, "setup_failure", why),
      lambda born: self._born(call, born),
    )

  def _born(self, call: running.Running, born: births.Born) -> None:
    call.init_pid, call.base_kb = born.init_pid, born.base_kb
    if not born.pid:
      call.setup_failure = born.why_not
      call.ended(0, 0.0, 0)
      self._mains[-call.id - 2] = call  # no pid; finished by the next look
      return
    call.began(born.pid)
    self._mains[born.pid] = call
    if born.pid in self._early:
      self._main_ended(call, *self._early.pop(born.pid))
    if call.killed_for is not None:
      self._kill(call, call.killed_for, call.killed_cause)

  def _limits_of(self, fields: dict) -> contract.Limits:
    """Parses limits; nearly always those of the call before."""
    if fields != self._last_limits[0]:
      self._last_limits = (fields, contract.Limits.from_json(fields))
    return self._last_limits[1]

  def _kill(
    self, call: running.Running, why: layout.ToolStatus, cause: str
  ) -> None:
    call.book(why, cause)
    self._births.end_init(call.init_pid)
    if call.pid and not call.is_ended:
      linux.kill_quietly(call.pid)
      linux.kill_group_quietly(call.pid)

  def _reap(self) -> None:
    """Collects every dead child."""
    while True:
      try:
        peek = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
      except ChildProcessError:
        return
      if peek is None:
        return
      pid = peek.si_pid
      if pid in self._mains:
        # Before the pid is free to be used again.
        linux.kill_group_quietly(pid)
      _, status, usage = os.wait4(pid, 0)
      if pid in self._mains:
        self._main_ended(self._mains[pid], status, usage)
      elif pid in self._births.inits:
        self._births.inits.discard(pid)
      elif self._sessions.reaped(pid):
        continue
      elif self._fleet.has_lost_template(pid):
        self._is_stopping = True
      elif self._births.n_open:
        self._early[pid] = (status, usage)
    if not self._births.n_open:
      self._early.clear()

  def _main_ended(self, call: running.Running, status: int, usage) -> None:
    call.ended(status, usage.ru_utime + usage.ru_stime, usage.ru_maxrss)
    self._births.end_init(call.init_pid)

  def _look_at_calls(self) -> None:
    now = time.monotonic()
    for pid, call in list(self._mains.items()):
      if call.is_ended:
        if self._is_drained(call) or now > call.ended_at + _PATIENCE_S:
          del self._mains[pid]
          self._finish(call)
        else:
          call.next_look = now + 0.002
      elif now >= call.next_look:
        excess = call.find_excess(now)
        if excess is not None:
          self._kill(call, *excess)
        self._watch_streams(call, lambda why, c=call: self._kill(c, *why))
    for live, cell in self._sessions.running_cells():
      if now >= cell.next_look:
        excess = cell.find_excess(now)
        kill = lambda why, s=live: self._sessions.kill_cell(s, *why)
        if excess is not None:
          kill(excess)
        self._watch_streams(cell, kill)
    self._sessions.clean_up()
    if now >= self._next_sweep:
      self._next_sweep = now + _SWEEP_S
      self._sweep()
      if os.getppid() != self._keeper_pid:
        self._is_stopping = True

  def _watch_streams(
    self, call: running.Running, kill: Callable[[tuple], None]
  ) -> None:
    """Reads the output of a call that is not over at the first look."""
    for name, stream in (("stdout", call.stdout), ("stderr", call.stderr)):
      if not stream.is_watched and not stream.is_closed:
        stream.is_watched = True

        def read(stream=stream, name=name) -> None:
          if not stream.read():
            self._unwatch(stream.read_fd)
          if stream.is_over and not call.is_ended:
            kill((layout.ToolStatus.OUTPUT_LIMIT, name))

        self._watch(stream.read_fd, read)

  def _is_drained(self, call: running.Running) -> bool:
    """Kills what the call left behind; True when nothing is left."""
    if call.init_pid:
      return call.init_pid not in self._births.inits
    left = self._orphans_of(call.tag)
    for pid in left:
      linux.kill_quietly(pid)
    return not left

  def _orphans(self) -> list[int]:
    """Own children that nobody answers for, children of programs among them."""
    known = self._fleet.pids() | self._sessions.live_pids()
    return [
      pid
      for pid in self._children()
      if pid not in self._mains
      and pid not in known
      and pid not in self._births.inits
    ]

  def _orphans_of(self, tag: int) -> list[int]:
    return [pid for pid in self._orphans() if linux.read_tag(pid) == tag]

  def _sweep(self) -> None:
    """Kills marked orphans that belong to no running call."""
    tags = {call.tag for call in self._calls.values()}
    tags |= self._sessions.live_tags()
    for pid in self._orphans():
      if linux.is_marked(pid) and linux.read_tag(pid) not in tags:
        linux.kill_quietly(pid)

  def _finish(self, call: running.Running) -> None:
    for stream in (call.stdout, call.stderr):
      self._unwatch(stream.read_fd)
    if call.killed_for is None and call.is_over_disk():
      call.book(layout.ToolStatus.RESOURCE, "disk")
    result = call.result()
    call.close()
    self._births.forget(call.birth)
    self._births.give_uid(call.uid)
    self._places.discard(call.scratch)
    del self._calls[call.id]
    self._answer(call.id, result)

  def _cancel(self, call_id: int) -> None:
    for message in self._waiting:
      if message["id"] == call_id:
        self._waiting.remove(message)
        self._answer_infra(call_id, "cancelled", "cancelled")
        return
    if call_id in self._calls:
      self._kill(self._calls[call_id], layout.ToolStatus.INFRA, "cancelled")
    else:
      self._sessions.cancel(call_id)

  def _answer_infra(
    self, call_id: int, why: str, cause: str = "sandbox"
  ) -> None:
    self._answer(
      call_id,
      contract.ToolResult(layout.ToolStatus.INFRA, stderr=why, cause=cause),
    )

  def _answer(self, call_id: int, result: contract.ToolResult) -> None:
    if call_id == _CHECK_ID:
      self._checked = result
      return
    self._send({"op": "result", "id": call_id, "result": result.to_fields()})

  def _kill_everything(self) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    for pid in self._mains:
      if pid > 0:
        linux.kill_group_quietly(pid)
    while not linux.kill_children() and time.monotonic() < deadline:
      time.sleep(0.002)
