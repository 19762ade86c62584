"""Where the trainer's calls are between `submit` and their results.

They wait in a fair queue, are sent to the supervisor a few at a time, and come
back through one thread, which also starts another supervisor when one dies.
"""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from concurrent import futures

from roc import layout
from roc.host.sandbox import (
  calls,
  contract,
  figures,
  link,
  masking,
  waiting,
)

_RESTART_PAUSES_S = (0.0, 0.2, 1.0)
_LATE_LOOK_S = 0.25  # between two looks for calls that have waited too long


class Dispatcher:
  """Delivers every call that it takes exactly once. Thread-safe.

  Args:
    connect: starts a supervisor.
    n_workers: calls that a supervisor runs at a time.
    queue_size: calls that may wait.
    queue_timeout_s: after which a call that still waits is INFRA.
  """

  def __init__(
    self,
    connect: Callable[[], link.Link],
    n_workers: int,
    queue_size: int,
    queue_timeout_s: float,
  ):
    self._connect = connect
    # Twice the workers: the next call is there when a worker gets free, and a
    # dying supervisor takes few calls with it.
    self._n_sent_at_most = 2 * n_workers
    self._queue_timeout_s = queue_timeout_s
    self._lock = threading.Lock()
    self._has_room = threading.Condition(self._lock)
    self._queue = waiting.FairQueue(queue_size)
    self._sent: dict[int, calls.Call] = {}
    self._busy: set[str] = set()  # sessions with a cell at the supervisor
    self._opened: set[str] = set()  # sessions that a cell was sent to
    self._used: set[str] = set()  # of these, those that hold something
    self._lost: set[str] = set()  # sessions that the sandbox lost
    self._pump: threading.Thread | None = None
    self._is_closing = True
    self._down_reason = ""
    self._figures = figures.Figures()
    self._restarts = 0
    self._next_late_look = 0.0
    self.link: link.Link | None = None

  # ---------------------------------------------------------------- lifecycle

  @property
  def is_open(self) -> bool:
    """Whether calls are taken."""
    return self._pump is not None and not self._is_closing

  @property
  def tier(self) -> str:
    """Confinement that is enforced; "" without a supervisor."""
    return self.link.facts["plan"]["tier"] if self.link is not None else ""

  def open(self) -> None:
    """Starts a supervisor and takes calls from now on.

    Raises:
      contract.SandboxError: it cannot be started.
    """
    self._is_closing, self._down_reason = False, ""
    self.link = self._connect()
    self._pump = threading.Thread(
      target=self._pump_results, name="roc-sandbox", daemon=True
    )
    self._pump.start()

  def close(self) -> None:
    """Ends the supervisor and every call; idempotent."""
    with self._lock:
      self._is_closing = True
      pump, peer = self._pump, self.link
      open_calls = [*self._queue.take_all(), *self._sent.values()]
      self._sent.clear()
      self._forget_sessions()
      self._has_room.notify_all()
    self.fail(open_calls, "the sandbox was closed")
    if peer is not None:
      peer.close()
    if pump is not None and pump is not threading.current_thread():
      pump.join()
    self._pump = self.link = None

  # -------------------------------------------------------------------- calls

  def put(
    self, call: calls.Call, timeout_s: float | None = None, final: bool = True
  ) -> bool:
    """Queues a call, waiting for room.

    Args:
      call: new, its future not done.
      timeout_s: to wait for room; by default `queue_timeout_s`.
      final: whether a call that found no room fails, as INFRA.

    Returns:
      False when there was no room and the call is still the caller's.
    """
    wait_s = self._queue_timeout_s if timeout_s is None else timeout_s
    deadline = time.monotonic() + wait_s
    refusal, cause = "", "sandbox"
    with self._lock:
      while self._queue.is_full and not (self._is_closing or call.is_cancelled):
        left = deadline - time.monotonic()
        if left <= 0 and not final:
          return False
        if left <= 0 or not self._has_room.wait(left):
          refusal, cause = "the sandbox's queue stayed full", "queue"
          break
      if self._is_closing:
        refusal = "the sandbox was closed"
      elif call.is_cancelled:
        refusal, cause = "cancelled", "cancelled"
      elif call.session in self._lost:
        refusal, cause = "the session was lost by the sandbox", "session"
      refusal = refusal or self._down_reason
      if not refusal:
        self._queue.push(call)
        self._dispatch()
    if refusal:
      self.fail([call], refusal, cause)
    return True

  def find(self, future: calls.Future) -> calls.Call | None:
    """Returns the call behind a future, None when it is over."""
    with self._lock:
      among = [*self._queue, *self._sent.values()]
    return next((call for call in among if call.future is future), None)

  def cancel(self, call: calls.Call) -> bool:
    """Ends a call as INFRA, also one inside `put`; False when it is over."""
    with self._lock:
      if call.id in self._sent:
        self._cancel_sent(call)
        return True
      if call not in self._queue:
        call.is_cancelled = True
        self._has_room.notify_all()
        return False
      self._queue.remove(call)
      self._has_room.notify()
    self.fail([call], "cancelled", "cancelled")
    return True

  def end_trajectory(self, trajectory: contract.Trajectory) -> None:
    """Cancels what a trajectory has queued or running; ends its session."""
    name = calls.session_name(trajectory)
    with self._lock:
      queued = [c for c in self._queue if c.trajectory == trajectory]
      for call in queued:
        self._queue.remove(call)
      for call in self._sent.values():
        if call.trajectory == trajectory:
          self._cancel_sent(call)
      if name in self._opened:
        self._tell({"op": "end", "session": name})
      for sessions in (self._opened, self._used, self._lost):
        sessions.discard(name)
      self._has_room.notify_all()
    self.fail(queued, "cancelled", "cancelled")

  def _cancel_sent(self, call: calls.Call) -> None:
    call.is_cancelled = True
    self._tell({"op": "cancel", "id": call.id})

  def _tell(self, message: dict, fds: Sequence[int] = ()) -> None:
    """Sends to the supervisor; the pump sees to one that is gone."""
    with contextlib.suppress(OSError):
      if self.link is not None:
        self.link.send(message, fds)

  def _dispatch(self) -> None:
    """Sends what the supervisor may hold; the lock is held."""
    while self.link and len(self._sent) < self._n_sent_at_most:
      call = self._queue.pop(self._busy)
      if call is None:
        return
      try:
        program = call.program()
      except OSError:  # out of descriptors for the moment
        self._queue.push_first(call)
        return
      self._has_room.notify()
      is_first = call.retries == 0
      if is_first and not call.future.set_running_or_notify_cancel():
        program.close()
        continue
      self._sent[call.id] = call
      if call.session:
        self._busy.add(call.session)
        self._opened.add(call.session)
      self._tell(call.message, program.fds)
      program.close()

  # ------------------------------------------------------------------ results

  def _pump_results(self) -> None:
    """Thread: takes results; when the supervisor dies, starts another one."""
    peer = self.link
    while peer is not None:
      for message in peer.results(self._is_waiting):
        self._take(message)
      if self._is_closing:
        return
      peer.close()
      peer = self._restart()

  def _is_waiting(self) -> bool | None:
    """True while calls are out, None when the sandbox is being closed."""
    now = time.monotonic()
    if now >= self._next_late_look:
      self._next_late_look = now + _LATE_LOOK_S
      with self._lock:
        late = self._queue.take_late(self._queue_timeout_s)
        self._has_room.notify_all()
        self._dispatch()
      self.fail(late, "the call waited too long in the queue", "queue")
    return None if self._is_closing else bool(self._sent)

  def _take(self, message: dict) -> None:
    result = contract.ToolResult.from_fields(message["result"])
    with self._lock:
      call = self._sent.pop(message["id"], None)
      if call is None:
        return
      self._busy.discard(call.session)
      is_fault = result.status == layout.ToolStatus.INFRA
      if is_fault and self._may_retry(call):
        call.retries = 1
        self._queue.push_first(call)
        self._dispatch()
        return
      if call.session:
        self._note_session(call, is_fault)
      self._dispatch()
    result = dataclasses.replace(
      result,
      # Not the supervisor's work, whose time is everybody's.
      stdout=masking.mask_addresses(result.stdout),
      stderr=masking.mask_addresses(result.stderr),
      tier=self.tier,
      retries=call.retries,
    )
    waited = (time.monotonic() - call.submitted) * 1e3 - result.wall_ms
    self.resolve(call.future, result, waited)

  def _note_session(self, call: calls.Call, is_fault: bool) -> None:
    """A cancelled cell leaves its session as it was before the cell."""
    if not is_fault:
      self._used.add(call.session)
    elif not call.is_cancelled:
      self._lost.add(call.session)

  def _may_retry(self, call: calls.Call) -> bool:
    """Once, and a cell only where nothing before it can be missing."""
    is_whole = call.session not in self._used
    return call.retries == 0 and not call.is_cancelled and is_whole

  def _forget_sessions(self) -> None:
    """Notes that every session is gone with its supervisor."""
    self._lost |= self._used
    for sessions in (self._opened, self._used, self._busy):
      sessions.clear()

  def _restart(self) -> link.Link | None:
    """Starts another supervisor; what cannot be run again fails."""
    with self._lock:
      lost = list(self._sent.values())
      self._sent.clear()
      self._restarts += 1
      again = [c for c in lost if self._may_retry(c)]
      self._forget_sessions()
      for call in reversed(again):
        call.retries = 1
        self._queue.push_first(call)
      orphaned = [c for c in self._queue if c.session in self._lost]
      for call in orphaned:
        self._queue.remove(call)
      self.link = None
    gone = [c for c in lost if c not in again]
    self.fail(gone, "the sandbox's supervisor died")
    self.fail(orphaned, "the session was lost by the sandbox", "session")
    reason = ""
    for pause_s in _RESTART_PAUSES_S:
      time.sleep(pause_s)
      if self._is_closing:
        return None
      try:
        peer = self._connect()
      except contract.SandboxError as error:
        reason = str(error)
        continue
      with self._lock:
        if not self._is_closing:
          self.link = peer
          self._dispatch()
          return peer
      peer.close()
      return None
    with self._lock:
      self._down_reason = reason
      left = self._queue.take_all()
      self._has_room.notify_all()
    self.fail(left, reason)
    return None

  def fail(
    self, failed: list[calls.Call], why: str, cause: str = "sandbox"
  ) -> None:
    """Delivers INFRA to calls that are nowhere any more."""
    for call in failed:
      self.resolve(call.future, call.infra(why, self.tier, cause))

  def resolve(
    self,
    future: calls.Future,
    result: contract.ToolResult,
    waited_ms: float = 0.0,
  ) -> None:
    """Counts and delivers a result; never under the lock (callbacks run)."""
    with self._lock:
      self._figures.add(result, waited_ms)
    # A future cancelled by its holder is done already.
    with contextlib.suppress(futures.InvalidStateError):
      future.set_result(result)

  # ------------------------------------------------------------------ figures

  def reset_figures(self) -> None:
    """Counts from here."""
    with self._lock:
      self._figures = figures.Figures()

  def stats(self) -> dict:
    """Returns the counters, see `figures.Figures.snapshot`, and the load."""
    with self._lock:
      return {
        **self._figures.snapshot(),
        "restarts": self._restarts,
        "queued": len(self._queue),
        "running": len(self._sent),
        "sessions": len(self._opened),
      }
