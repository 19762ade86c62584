"""The calls that wait: fair over trajectories, in order within a session.

Trajectories take turns, so a rollout with one call does not wait behind another
one's hundred. A session's cells share a namespace and so run one at a time.
"""

import collections
import time
from collections.abc import Iterator

from roc.host.sandbox import calls, contract


class FairQueue:
  """A bounded queue; not thread-safe, its owner holds a lock."""

  def __init__(self, capacity: int):
    self._capacity = capacity
    # One queue a trajectory, those whose turn is nearer first.
    self._lanes: collections.OrderedDict[
      contract.Trajectory, collections.deque[calls.Call]
    ] = collections.OrderedDict()
    self._size = 0

  def __len__(self) -> int:
    return self._size

  def __iter__(self) -> Iterator[calls.Call]:
    return (call for lane in self._lanes.values() for call in lane)

  @property
  def is_full(self) -> bool:
    """Whether one more would exceed the capacity."""
    return self._size >= self._capacity

  def push(self, call: calls.Call) -> None:
    """Adds a call behind those of its trajectory."""
    self._lanes.setdefault(call.trajectory, collections.deque()).append(call)
    self._size += 1

  def push_first(self, call: calls.Call) -> None:
    """Puts a call that is to be run again before all others."""
    lane = self._lanes.setdefault(call.trajectory, collections.deque())
    lane.appendleft(call)
    self._lanes.move_to_end(call.trajectory, last=False)
    self._size += 1

  def pop(self, busy_sessions: set[str]) -> calls.Call | None:
    """Takes the next call of the trajectory whose turn it is.

    Args:
      busy_sessions: whose cells must wait.

    Returns:
      The call; None when there is none that may run now.
    """
    for trajectory, lane in self._lanes.items():
      if lane[0].session and lane[0].session in busy_sessions:
        continue
      call = lane.popleft()
      self._size -= 1
      if lane:
        self._lanes.move_to_end(trajectory)
      else:
        del self._lanes[trajectory]
      return call
    return None

  def remove(self, call: calls.Call) -> None:
    """Takes a call out, wherever it waits."""
    lane = self._lanes[call.trajectory]
    lane.remove(call)
    self._size -= 1
    if not lane:
      del self._lanes[call.trajectory]

  def take_late(self, timeout_s: float) -> list[calls.Call]:
    """Takes out the calls that have waited for longer than that."""
    before = time.monotonic() - timeout_s
    late = [call for call in self if call.submitted < before]
    for call in late:
      self.remove(call)
    return late

  def take_all(self) -> list[calls.Call]:
    """Takes everything out."""
    taken = list(self)
    self._lanes.clear()
    self._size = 0
    return taken
