"""Counters of a sandbox: how calls ended and how long they took and waited."""

import collections

from roc.host.sandbox import contract

_N_KEPT = 4096


class Figures:
  """Counts results; not thread-safe, its owner holds a lock."""

  def __init__(self):
    self._status: collections.Counter[str] = collections.Counter()
    self._wall_ms: collections.deque[float] = collections.deque(maxlen=_N_KEPT)
    self._wait_ms: collections.deque[float] = collections.deque(maxlen=_N_KEPT)

  def add(self, result: contract.ToolResult, waited_ms: float) -> None:
    """Counts one result.

    Args:
      result: as delivered; one that never ran adds to no percentile.
      waited_ms: from submission to result, less the time in the child.
    """
    self._status[result.status.name.lower()] += 1
    if result.wall_ms:
      self._wall_ms.append(result.wall_ms)
      self._wait_ms.append(max(0.0, waited_ms))

  def snapshot(self) -> dict:
    """Returns `calls`, `status` (name -> how many) and four percentiles.

    `p50_ms` and `p99_ms` of the time in the child, `wait_p50_ms` and
    `wait_p99_ms` of the time outside it, over the last 4,096 calls that ran;
    0.0 when none did.
    """
    wall, wait = sorted(self._wall_ms), sorted(self._wait_ms)
    return {
      "calls": sum(self._status.values()),
      "status": dict(self._status),
      "p50_ms": _quantile(wall, 0.5),
      "p99_ms": _quantile(wall, 0.99),
      "wait_p50_ms": _quantile(wait, 0.5),
      "wait_p99_ms": _quantile(wait, 0.99),
    }


def _quantile(ordered: list[float], q: float) -> float:
  """Returns the q-quantile of a sorted list, 0.0 for an empty one."""
  return ordered[int(q * (len(ordered) - 1))] if ordered else 0.0
