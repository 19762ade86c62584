"""The supervisor's one-shot calls: each a program, a process, a directory."""

import contextlib
import signal
from collections.abc import Callable

from roc import layout
from roc.host.sandbox import births as births_lib
from roc.host.sandbox import (
  contract,
  linux,
  loop,
  running,
  scratch,
)

_PATIENCE_S = 2.0  # for a killed call's last process to be gone
_DRAIN_S = 0.002


class Scripts:
  """Starts, watches and ends one-shot calls.

  Args:
    births: makes their processes.
    places: makes and discards directories on disk.
    events: the supervisor's loop.
    orphans: gives the supervisor's own children with a tag.
    answer: delivers the result of a call.
  """

  def __init__(
    self,
    births: births_lib.Births,
    places: scratch.Places,
    events: loop.Loop,
    orphans: Callable[[int], list[int]],
    answer: Callable[[int, contract.ToolResult], None],
  ):
    self._births = births
    self._places = places
    self._events = events
    self._orphans = orphans
    self._answer = answer
    self._calls: dict[int, running.Running] = {}  # by the trainer's number
    self._mains: dict[int, running.Running] = {}  # by pid of the main process
    self._unborn: list[running.Running] = []  # that no process was found for
    self._early: dict[int, tuple] = {}  # ends of processes not yet announced

  def __len__(self) -> int:
    return len(self._calls)

  def start(self, message: dict, limits: contract.Limits) -> None:
    """Runs a program; its result is delivered when all of it is over."""
    uid, tag = self._births.take_uid(), self._births.new_tag()
    with contextlib.ExitStack() as undo:
      try:
        place = self._places.make(uid)
        undo.callback(self._places.discard, place)
        undo.callback(message["program"].close)
        call = running.Running.open(message["id"], limits, message["program"])
        undo.callback(call.close)
        fds = call.fds_for_child(message["program"])
      except OSError as error:
        self._births.give_uid(uid)
        why = f"the sandbox could not start a process: {error.strerror}"
        self._answer(message["id"], contract.infra(why))
        return
      undo.pop_all()
    call.tag, call.uid = tag, uid
    call.live_in(place)
    call.hidden = self._places.hidden(place)
    self._calls[call.id] = call
    request = births_lib.request_for(
      "python", message["limits"], message["seed"], tag, place, uid
    )
    call.birth = self._births.begin(
      message["image"],
      request,
      fds,
      lambda why: setattr(call, "setup_failure", why),
      lambda born: self._born(call, born),
    )

  def _born(self, call: running.Running, born: births_lib.Born) -> None:
    call.init_pid = born.init_pid
    call.base_kb, call.space_kb = born.base_kb, born.space_kb
    if not born.pid:
      call.setup_failure = born.why_not
      call.ended(0, 0.0, 0)
      self._unborn.append(call)
      return
    call.began(born.pid)
    self._mains[born.pid] = call
    if born.pid in self._early:
      self._main_ended(call, *self._early.pop(born.pid))
    elif call.killed_for is not None:  # cancelled before it was there
      self._kill(call, call.killed_for, call.killed_cause)

  # ----------------------------------------------------------------- watching

  def before_reaping(self, pid: int) -> None:
    """Kills the process group of a dead main process.

    Before its pid is free to be used again.
    """
    if pid in self._mains:
      linux.kill_group_quietly(pid)

  def reaped(self, pid: int, status: int, usage) -> bool:
    """Notes a dead process; whether it was, or may be, a main process."""
    if pid in self._mains:
      self._main_ended(self._mains[pid], status, usage)
    elif self._births.n_open:
      self._early[pid] = (status, usage)
    else:
      return False
    return True

  def _main_ended(self, call: running.Running, status: int, usage) -> None:
    call.ended(status, usage.ru_utime + usage.ru_stime, usage.ru_maxrss)
    is_shot = status == signal.SIGKILL and call.killed_for is None
    if is_shot and call.init_pid and linux.is_exiting(call.init_pid):
      call.setup_failure = births_lib.SHOT
    self._births.end_init(call.init_pid)

  def next_look(self) -> float:
    """Returns when `look` is due, on the monotonic clock."""
    due = [call.next_look for call in self._mains.values()]
    return min(due, default=float("inf"))

  def look(self, now: float) -> None:
    """Holds calls to their limits and finishes those that are over."""
    if not self._births.n_open:
      self._early.clear()
    for call in list(self._mains.values()):
      running.contain(
        lambda c=call: self._look_at(c, now), lambda c=call: self._give_up(c)
      )
    while self._unborn:
      self._finish(self._unborn.pop())

  def _look_at(self, call: running.Running, now: float) -> None:
    if call.is_ended:
      is_over = self._is_drained(call) or now > call.ended_at + _PATIENCE_S
      if is_over and call.has_settled_disk():
        del self._mains[call.pid]
        self._finish(call)
      else:
        call.next_look = now + _DRAIN_S
    elif now >= call.next_look:
      kill = lambda why: self._kill(call, *why)
      tops = {call.init_pid, *self._orphans(call.tag)}
      excess = call.find_excess(now, tops)
      if excess is not None:
        kill(excess)
      call.read_output(self._events, kill)

  def _give_up(self, call: running.Running) -> None:
    """Ends a call that the supervisor cannot deal with."""
    self._kill(call, layout.ToolStatus.CRASH, "")
    if call.is_ended and self._calls.pop(call.id, None) is not None:
      self._mains.pop(call.pid, None)
      self._answer(call.id, contract.ToolResult(layout.ToolStatus.CRASH))

  def _kill(
    self, call: running.Running, why: layout.ToolStatus, cause: str
  ) -> None:
    call.book(why, cause)
    self._births.end_init(call.init_pid)
    if call.pid and not call.is_ended:
      linux.kill_quietly(call.pid)
      linux.kill_group_quietly(call.pid)

  def _is_drained(self, call: running.Running) -> bool:
    """Kills what the call left behind; True when nothing is left."""
    if call.init_pid:
      return call.init_pid not in self._births.inits
    left = self._orphans(call.tag)
    for pid in left:
      linux.kill_quietly(pid)
    return not left

  def _finish(self, call: running.Running) -> None:
    call.stop_reading(self._events)
    result = call.result()
    call.close()
    self._births.forget(call.birth)
    self._births.give_uid(call.uid)
    self._places.discard(call.scratch)
    del self._calls[call.id]
    self._answer(call.id, result)

  def cancel(self, call_id: int) -> bool:
    """Ends the call of that number, if it is one of these."""
    if call_id not in self._calls:
      return False
    self._kill(self._calls[call_id], layout.ToolStatus.INFRA, "cancelled")
    return True

  def main_pids(self) -> set[int]:
    """Returns the pids of main processes that live."""
    return set(self._mains)

  def live_tags(self) -> set[int]:
    """Returns the tags of calls that are not over."""
    return {call.tag for call in self._calls.values()}

  def kill_all(self) -> None:
    """Kills every main process with its group, at the end of it all."""
    for pid in self._mains:
      linux.kill_group_quietly(pid)
    for pid in self._births.inits:
      linux.kill_quietly(pid)
