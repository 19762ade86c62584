"""All sessions of a supervisor: opened by their first cell, ended by hand.

A session's cell counts among the running calls while it runs; an idle session
costs its memory and nothing else.
"""

import contextlib
import socket
import time
from collections.abc import Callable

from roc import layout
from roc.host.sandbox import births as births_lib
from roc.host.sandbox import contract, linux, loop, routing, running, scratch
from roc.host.sandbox import session as session_lib

_PATIENCE_S = 0.9  # for a guardian to say what it must
_HELLO_S = 5.0  # for the next runner to be there
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
        self._refuse(message["id"], f"there are {self._at_most} live sessions")
        return
      live = self._open(message)
      if live is None:
        return
    live.waiting.append(session_lib.Cell(message, limits))
    self._feed(live)

  def _refuse(self, call_id: int, why: str, cause: str = "session") -> None:
    self.n_running -= 1
    self._answer(call_id, contract.infra(why, cause))

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
        self._refuse(message["id"], f"no session: {error.strerror}", "sandbox")
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
    self._events.watch(ours.fileno(), lambda: self._hear(live))
    request = births_lib.request_for(
      "session", message["limits"], message["seed"], tag, place, uid
    )
    fds = [stdout.write_fd, stderr.write_fd, theirs.detach()]
    live.birth = self._births.begin(
      routing.image_for(message["code"]),
      request,
      fds,
      lambda why: self._lose(live, why),
      lambda born: self._opened(live, born),
    )
    return live

  def _opened(self, live: session_lib.Session, born: births_lib.Born) -> None:
    live.main_pid, live.init_pid = born.pid, born.init_pid
    live.base_kb, live.is_born = born.base_kb, True
    live.hello_by = time.monotonic() + _HELLO_S
    if not born.pid:
      self._lose(live, born.why_not)
    elif live.is_dead:
      self._kill(live)
    else:
      self._feed(live)

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
    words, sender = heard
    cell = live.cell
    if session_lib.is_word(words, session_lib.HELLO, 1):
      if live.take_runner(sender, int(words[1])) and live.is_born:
        self._settle(live)
    elif cell is None or cell.is_ended:
      return
    elif (
      session_lib.is_word(words, session_lib.DONE, 1) and sender == live.runner
    ):
      cell.ended(
        (int(words[1]) & 0xFF) << 8,
        linux.cpu_seconds(sender),
        linux.resident_kb(sender),
      )
      live.drop_runner()  # it becomes the guardian; another will say hello
      live.hello_by = cell.ended_at + _HELLO_S
      self._finish(live)
    elif (
      session_lib.is_word(words, session_lib.DIED, 3) and sender == live.guard
    ):
      cell.ended(int(words[1]), float(words[2]), int(words[3]))
      cell.next_look = cell.ended_at + _PATIENCE_S
      live.hello_by = cell.ended_at + _HELLO_S
      live.drop_runner()  # the result waits for hello: see `_settle`

  def _settle(self, live: session_lib.Session) -> None:
    """Kills what is neither guardian nor runner, then feeds the runner.

    Only now is it known which processes these are. What is killed may have
    forked just before, so this goes on until a look finds nothing. Where a
    runner died, the cell is over only then.
    """
    strays = live.strays(self._orphans)
    for pid in strays:
      linux.kill_marked(pid)
    live.settle_at = time.monotonic() + _SETTLE_S if strays else 0.0
    if strays:
      return
    if live.cell is not None:
      self._finish(live)
    self._feed(live)

  def _finish(self, live: session_lib.Session, note: str = "") -> None:
    cell = live.cell
    assert cell is not None
    live.cell, live.killed_at = None, 0.0
    cell.stop_reading(self._events)
    if cell.killed_for is None and cell.is_over_disk():
      cell.book(layout.ToolStatus.RESOURCE, "disk")
    result = cell.result()
    cell.close()
    self.n_running -= 1
    self._answer(cell.id, result.with_note(note))

  # ----------------------------------------------------------------- watching

  def next_look(self) -> float:
    """Returns when `look` is due, on the monotonic clock."""
    all_ = self._all.values()
    due = [live.cell.next_look for live in all_ if live.cell is not None]
    due += [live.settle_at for live in all_ if live.settle_at]
    return min(due, default=float("inf"))

  def look(self, now: float) -> None:
    """Holds cells to their limits and finishes off what is dead."""
    for live in list(self._all.values()):
      if live.settle_at and now >= live.settle_at:
        self._settle(live)
      if live.is_born and not live.runner and now >= live.hello_by:
        self._lose(live)  # held up by something that a cell left behind
        continue
      cell = live.cell
      if cell is None or now < cell.next_look:
        continue
      if cell.is_ended:  # and no runner has said hello since
        self._lose(live)
        continue
      kill = lambda why, s=live: self._kill_cell(s, *why)
      excess = cell.find_excess(now)
      if excess is not None:
        kill(excess)
      if live.cell is cell:
        cell.read_output(self._events, kill)
    self._clean_up()

  def _kill_cell(
    self, live: session_lib.Session, why: layout.ToolStatus, cause: str
  ) -> None:
    """Ends the running cell; its session falls back to the state before it."""
    cell = live.cell
    if cell is None:
      return
    cell.book(why, cause)
    live.kill_runner()
    if not live.killed_at:
      live.killed_at = time.monotonic()
    elif time.monotonic() > live.killed_at + _PATIENCE_S:
      self._lose(live)  # nobody is there to say that it is dead

  def cancel(self, call_id: int) -> bool:
    """Ends the cell of that number, running or waiting."""
    for live in self._all.values():
      if live.cell is not None and live.cell.id == call_id:
        self._kill_cell(live, layout.ToolStatus.INFRA, "cancelled")
        return True
      for cell in live.waiting:
        if cell.message["id"] == call_id:
          live.waiting.remove(cell)
          self._refuse(call_id, "cancelled", "cancelled")
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
    if live.cell is not None:
      if not live.cell.is_ended:
        live.cell.ended(9, linux.cpu_seconds(live.runner), 0)
      if live.cell.killed_for is None:
        live.cell.setup_failure = why
      self._finish(live, session_lib.LOST)
    for cell in live.waiting:
      if why:
        self._refuse(cell.message["id"], why)
      else:  # what an earlier cell left behind has ended it
        self.n_running -= 1
        self._answer(cell.message["id"], session_lib.lost())
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
