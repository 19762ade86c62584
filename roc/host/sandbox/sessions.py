"""All sessions of a supervisor: opened by their first cell, ended by hand.

A session's cell counts among the running calls while it runs; an idle session
costs its memory and nothing else.
"""

import contextlib
import signal
import socket
import time
from collections.abc import Callable

from roc import layout
from roc.host.sandbox import births as births_lib
from roc.host.sandbox import (
  contract,
  linux,
  loop,
  repl,
  running,
  scratch,
  wire,
)
from roc.host.sandbox import session as session_lib

_PATIENCE_S = 0.9  # for a session to settle
_OPEN_S = 20.0  # for a new one to be there
_SETTLE_S = 0.002
_SOCKET = socket.AF_UNIX, socket.SOCK_SEQPACKET


class Sessions:
  """Opens, feeds, watches and ends sessions.

  Args:
    births: makes their processes.
    places: makes and discards directories on disk.
    at_most: live sessions; one more is answered INFRA.
    events: the supervisor's loop.
    orphans: gives the supervisor's own children with a tag.
    answer: delivers the result of a call.
  """

  def __init__(
    self,
    births: births_lib.Births,
    places: scratch.Places,
    at_most: int,
    events: loop.Loop,
    orphans: Callable[[int], list[int]],
    answer: Callable[[int, contract.ToolResult], None],
  ):
    self._births = births
    self._places = places
    self._at_most = at_most
    self._events = events
    self._orphans = orphans
    self._answer = answer
    self._all: dict[str, session_lib.Session] = {}
    self._dying: list[session_lib.Session] = []
    self.n_running = 0

  # ------------------------------------------------------------------ cells

  def submit(self, message: dict, limits: contract.Limits) -> None:
    """Runs a cell in its session, which it opens if there is none."""
    self.n_running += 1
    live = self._all.get(message["session"])
    if live is None:
      if len(self._all) >= self._at_most:
        self._refuse(message, f"there are {self._at_most} live sessions")
        return
      live = self._open(message)
      if live is None:
        return
    live.waiting.append(session_lib.Cell(message, limits))
    self._feed(live)

  def _refuse(self, message: dict, why: str, cause: str = "session") -> None:
    self._drop(message, contract.infra(why, cause))

  def _drop(self, message: dict, result: contract.ToolResult) -> None:
    """Answers a cell that never runs."""
    message["program"].close()
    self.n_running -= 1
    self._answer(message["id"], result)

  def _open(self, message: dict) -> session_lib.Session | None:
    uid, tag = self._births.take_uid(), self._births.new_tag()
    with contextlib.ExitStack() as undo:
      try:
        place = self._places.make(uid)
        undo.callback(self._places.discard, place)
        ours, theirs = socket.socketpair(*_SOCKET)
        undo.callback(ours.close)
        undo.callback(theirs.close)
        stdout, stderr = running.Stream.open(0), running.Stream.open(0)
      except OSError as error:
        self._births.give_uid(uid)
        self._refuse(message, f"no session: {error.strerror}", "sandbox")
        return None
      undo.pop_all()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    ours.setblocking(False)
    live = session_lib.Session(
      message["session"],
      tag,
      uid,
      place,
      ours,
      stdout.read_fd,
      stderr.read_fd,
    )
    self._all[live.key] = live
    hear = lambda: self._contain(self._hear, live)
    self._events.watch(ours.fileno(), hear)
    request = births_lib.request_for(
      "session", message["limits"], message["seed"], tag, place, uid
    )
    fds = [stdout.write_fd, stderr.write_fd, theirs.detach()]
    live.birth = self._births.begin(
      message["image"],
      request,
      fds,
      lambda why: self._lose(live, why),
      lambda born: self._opened(live, born),
    )
    return live

  def _opened(self, live: session_lib.Session, born: births_lib.Born) -> None:
    live.main_pid, live.init_pid = born.pid, born.init_pid
    live.base_kb, live.space_kb = born.base_kb, born.space_kb
    live.is_born = True
    live.settle_by = time.monotonic() + _OPEN_S
    if not born.pid:
      self._lose(live, born.why_not)
    elif live.is_dead:
      self._kill(live)
    elif live.runner:
      self._settle(live)

  def _contain(
    self, work: Callable[..., None], live: session_lib.Session, *rest
  ) -> None:
    """Does work about one session; whatever it raises costs that alone."""
    running.contain(lambda: work(live, *rest), lambda: self._give_up(live))

  def _give_up(self, live: session_lib.Session) -> None:
    """Ends a session that the supervisor cannot deal with."""
    cells = [live.cell] if live.cell is not None else []
    live.cell = None
    for cell in cells:
      self.n_running -= 1
      self._answer(cell.id, session_lib.lost())
    self._lose(live)

  def _feed(self, live: session_lib.Session) -> None:
    if not live.is_idle or not live.waiting:
      return
    cell = live.waiting.popleft()
    try:
      live.start(cell, self._places.hidden(live.scratch))
    except OSError:
      live.waiting.appendleft(cell)
      self._lose(live)

  def _hear(self, live: session_lib.Session) -> None:
    heard = live.receive()
    if heard is None:
      is_shot = live.init_pid and linux.is_exiting(live.init_pid)
      self._lose(live, births_lib.SHOT if is_shot else "")
      return
    data, sender = heard
    hello = wire.numbers(data, repl.HELLO, 1)
    if hello and live.take_runner(sender, hello[0]):
      if live.is_born:
        self._settle(live)
    elif not live.take_end(data, sender, _PATIENCE_S):
      self._lose(live)

  def _settle(self, live: session_lib.Session) -> None:
    """Stops guardian and runner, kills all else; the cell is over then.

    What is killed may have forked just before, so this goes on until a look
    finds nothing. Zombies are nothing: their parent may not care.
    """
    live.settle_at = time.monotonic() + _SETTLE_S
    if live.n_cells or not live.waiting:  # else nothing but ours runs in it
      live.signal(signal.SIGSTOP)
      if not live.is_stopped:
        return
      strays = live.strays(self._orphans)
      for pid in strays:
        linux.kill_marked(pid)
      if strays or (live.cell and not live.cell.has_settled_disk()):
        return
    live.settle_by, live.idle_cpu_s = 0.0, live.cpu_s
    if live.cell is not None:
      self._finish(live)
    self._feed(live)

  def _finish(self, live: session_lib.Session, note: str = "") -> None:
    cell = live.cell
    assert cell is not None
    live.cell = None
    cell.stop_reading(self._events)
    result = cell.result()
    cell.close()
    self.n_running -= 1
    self._answer(cell.id, result.with_note(note))

  # ----------------------------------------------------------------- watching

  def next_look(self) -> float:
    """Returns when `look` is due, on the monotonic clock."""
    all_ = self._all.values()
    due = [live.cell.next_look for live in all_ if live.cell is not None]
    due += [s.settle_at for s in all_ if s.settle_by and s.has_next_runner]
    return min(due, default=float("inf"))

  def look(self, now: float) -> None:
    """Holds cells to their limits and finishes off what is dead."""
    for live in list(self._all.values()):
      self._contain(self._look_at, live, now)
    self._clean_up()

  def _look_at(self, live: session_lib.Session, now: float) -> None:
    cell = live.cell
    if live.settle_by and live.is_born:
      if now >= live.settle_by:
        is_ours = live.n_cells == 0  # no program has run in it
        self._lose(live, "the session did not start" if is_ours else "")
        return
      if live.has_next_runner and now >= live.settle_at:
        self._settle(live)
    if cell is None or live.cell is not cell or now < cell.next_look:
      return
    excess = cell.find_excess(now, live.tops(self._orphans))
    if excess is not None:
      self._kill_cell(live, *excess)
    if live.cell is cell:
      cell.read_output(
        self._events,
        lambda why: self._contain(self._kill_cell, live, *why),
      )

  def look_at_idle(self) -> None:
    """Ends idle sessions in which something has run."""
    for live in list(self._all.values()):
      if live.is_idle and live.is_born and live.cpu_s != live.idle_cpu_s:
        self._contain(self._lose, live)

  def _kill_cell(
    self, live: session_lib.Session, why: layout.ToolStatus, cause: str
  ) -> None:
    """Ends the running cell; its session falls back to the state before it."""
    cell = live.cell
    if cell is None:
      return
    cell.book(why, cause)
    if cell.is_ended:  # the cell is done, but not what runs on
      self._lose(live)
      return
    live.kill_runner()
    live.settle_by = live.settle_by or time.monotonic() + _PATIENCE_S
    cell.next_look = live.settle_by

  def cancel(self, call_id: int) -> bool:
    """Ends the cell of that number, running or waiting."""
    for live in self._all.values():
      if live.cell is not None and live.cell.id == call_id:
        self._kill_cell(live, layout.ToolStatus.INFRA, "cancelled")
        return True
      for cell in live.waiting:
        if cell.message["id"] == call_id:
          live.waiting.remove(cell)
          self._refuse(cell.message, "cancelled", "cancelled")
          return True
    return False

  # -------------------------------------------------------------------- ends

  def end(self, key: str) -> None:
    """Ends a session; what runs or waits in it is cancelled."""
    live = self._all.get(key)
    if live is not None:
      if live.cell is not None:
        live.cell.book(layout.ToolStatus.INFRA, "cancelled")
      self._lose(live, "cancelled")

  def _lose(self, live: session_lib.Session, why: str = "") -> None:
    """Takes a session out of service and answers whoever waits for it.

    Args:
      live: the session.
      why: a fault of the sandbox's, or "" where a program ended it.
    """
    if live.is_dead:
      return
    live.is_dead = True
    self._all.pop(live.key, None)
    self._events.unwatch(live.channel.fileno())
    cell = live.cell
    if cell is not None:
      if not cell.is_ended:
        cell.ended(9, linux.cpu_seconds(live.runner), 0)
      if cell.killed_for is None:
        cell.setup_failure = why
        cell.book(layout.ToolStatus.CRASH, "")
      self._finish(live, session_lib.LOST)
    for cell in live.waiting:
      if why:
        self._refuse(cell.message, why)
      else:  # what an earlier cell left behind has ended it
        self._drop(cell.message, session_lib.lost())
    live.waiting.clear()
    self._births.forget(live.birth)
    self._kill(live)
    self._dying.append(live)

  def _kill(self, live: session_lib.Session) -> None:
    self._births.end_init(live.init_pid)
    live.kill_runner()
    for pid in (live.guard, live.main_pid):
      linux.kill_marked(pid)

  def reaped(self, pid: int) -> bool:
    """Notes a dead main process; whether it was one of a session."""
    for live in [*self._all.values(), *self._dying]:
      if live.main_pid == pid:
        live.main_pid = 0
        return True
    return False

  def _clean_up(self) -> None:
    for live in list(self._dying):
      strays = live.strays(self._orphans)
      for pid in (*strays, live.guard, live.runner):
        linux.kill_marked(pid)
      if not strays and live.init_pid not in self._births.inits:
        self._dying.remove(live)
        live.close()
        self._places.discard(live.scratch)
        self._births.give_uid(live.uid)

  def live_pids(self) -> set[int]:
    """Returns the processes that sessions may keep."""
    return {
      pid
      for live in self._all.values()
      for pid in (live.main_pid, live.guard, live.runner)
      if pid
    }

  def live_tags(self) -> set[int]:
    """Returns the tags of sessions that are not dead."""
    return {live.tag for live in self._all.values()}

  def __len__(self) -> int:
    return len(self._all)
