"""Calls of an external sandbox from `submit` to their last try; no sockets.

A call waits in a fair queue, is sent in a batch, and after a fault waits again,
longer each time. One lock guards it all; every method is thread-safe.
"""

import dataclasses
import heapq
import itertools
import math
import random
import threading
import time
from collections.abc import Callable

from roc import layout
from roc.host.sandbox import calls, contract, waiting

FULL = "the sandbox's queue stayed full"
CLOSED = "the sandbox was closed"
_BATCH_BYTES = 8 << 20  # of programs in one request, if it is more than one


class Backlog:
  """What waits, what is sent, and what is to be sent again.

  Args:
    capacity: calls that may wait.
    max_wait_s: after which a call that waits is late.
    max_batch: calls in one batch.
    max_retries: further tries of a call after faults.
    backoff_s: before the first of them.
  """

  def __init__(
    self,
    *,
    capacity: int,
    max_wait_s: float,
    max_batch: int,
    max_retries: int,
    backoff_s: float,
  ):
    self._capacity = capacity
    self._max_wait_s = max_wait_s
    self._max_batch = max_batch
    self._max_retries = max_retries
    self._backoff_s = backoff_s
    self._jitter = random.Random()
    self._lock = threading.Lock()
    self._has_room = threading.Condition(self._lock)
    self._has_work = threading.Condition(self._lock)
    self._queue = waiting.FairQueue(capacity)
    self._later: list[tuple[float, int, calls.Call]] = []  # a heap of retries
    self._sent: dict[int, calls.Call] = {}
    self._n_takers = 0  # threads inside `next_batch`
    self._is_closed = True

  def open(self) -> None:
    """Accepts calls from now on."""
    with self._lock:
      self._is_closed = False

  def close(self) -> list[calls.Call]:
    """Accepts no more and returns all that have no result; wakes everybody."""
    with self._lock:
      self._is_closed = True
      left = self._queue.take_all()
      left += [call for _, _, call in self._later]
      left += self._sent.values()
      self._later.clear()
      self._sent.clear()
      self._has_room.notify_all()
      self._has_work.notify_all()
    return left

  def put(self, call: calls.Call, wait_s: float) -> str:
    """Queues a call.

    Args:
      call: a new one.
      wait_s: for room, at most.

    Returns:
      "" when it is queued, otherwise why not: `FULL` or `CLOSED`.
    """
    deadline = time.monotonic() + wait_s
    with self._lock:
      while not self._is_closed:
        if len(self._queue) + len(self._later) < self._capacity:
          self._queue.push(call)
          self._has_work.notify()
          return ""
        left_s = deadline - time.monotonic()
        if left_s <= 0:
          return FULL
        self._has_room.wait(left_s)
    return CLOSED

  def next_batch(self) -> list[calls.Call] | None:
    """Waits for calls and takes a share of them; None when it is closed."""
    with self._lock:
      self._n_takers += 1
      try:
        while not self._is_closed:
          if not len(self._queue):
            self._has_work.wait()
            continue
          if batch := self._take_share():
            return batch
        return None
      finally:
        self._n_takers -= 1

  def _take_share(self) -> list[calls.Call]:
    """Takes calls for one request; the lock is held.

    What waits is spread over those that could take it: a batch is answered
    only when its slowest call is.
    """
    size = min(self._max_batch, math.ceil(len(self._queue) / self._n_takers))
    batch: list[calls.Call] = []
    n_bytes = 0
    while len(batch) < size and (call := self._queue.pop(set())) is not None:
      # 32, 8, 2, 1: what broke its batch takes fewer with it the next time.
      room = max(1, self._max_batch >> 2 * call.retries)
      program = call.message["program"]
      n_bytes += len(program.code) + len(program.stdin)
      if batch and (len(batch) >= room or n_bytes > _BATCH_BYTES):
        self._queue.push_first(call)
        break
      size = min(size, room)
      is_first = call.retries == 0
      if is_first and not call.future.set_running_or_notify_cancel():
        continue
      self._sent[call.id] = call
      batch.append(call)
    self._has_room.notify_all()
    if len(self._queue):
      self._has_work.notify()
    return batch

  def settle(
    self, batch: list[calls.Call], results: list[contract.ToolResult]
  ) -> list[tuple[calls.Call, contract.ToolResult]]:
    """Takes the results of a batch.

    Args:
      batch: as taken.
      results: one each.

    Returns:
      The calls that are over, with their results. Those whose result is INFRA
      and that have tries left wait for the next; cancelled ones are dropped.
    """
    over = []
    with self._lock:
      for call, result in zip(batch, results, strict=True):
        if self._sent.pop(call.id, None) is None:
          continue
        is_fault = result.status == layout.ToolStatus.INFRA
        if is_fault and call.retries < self._max_retries:
          pause_s = self._backoff_s * 2**call.retries
          due = time.monotonic() + pause_s * self._jitter.uniform(0.75, 1.25)
          call.retries += 1
          heapq.heappush(self._later, (due, call.id, call))
        else:
          final = dataclasses.replace(result, retries=call.retries)
          over.append((call, final))
    return over

  def tick(self) -> list[calls.Call]:
    """Queues the retries that are due; takes out and returns the late calls."""
    now = time.monotonic()
    with self._lock:
      while self._later and self._later[0][0] <= now:
        self._queue.push_first(heapq.heappop(self._later)[2])
        self._has_work.notify()
      late = self._queue.take_late(self._max_wait_s)
      if late:
        self._has_room.notify_all()
    return late

  def remove(self, is_meant: Callable[[calls.Call], bool]) -> list[calls.Call]:
    """Takes out and returns the calls that are meant, sent ones included."""
    with self._lock:
      later = (call for _, _, call in self._later)
      known = itertools.chain(self._queue, later, self._sent.values())
      found = [call for call in known if is_meant(call)]
      ids = {call.id for call in found}
      for call in [call for call in self._queue if call.id in ids]:
        self._queue.remove(call)
      self._later = [entry for entry in self._later if entry[1] not in ids]
      heapq.heapify(self._later)
      for number in ids:
        self._sent.pop(number, None)
      self._has_room.notify_all()
    return found

  def counts(self) -> dict[str, int]:
    """Returns how many calls are `queued` (retries too) and `running`."""
    with self._lock:
      return {
        "queued": len(self._queue) + len(self._later),
        "running": len(self._sent),
      }
