"""One problem with a checkable answer, whatever task set it came from."""

import dataclasses
import types
from collections.abc import Mapping
from typing import Any, Protocol


@dataclasses.dataclass(frozen=True)
class Problem:
  """A question and its gold answer.

  Attributes:
    id: stable name, unique in its task set; resuming and pass@k rely on it.
    index: stable number in its task set, the `task_index` of trajectories.
    question: text of the user's turn.
    answer: gold answer as text.
    kind: group for per-kind metrics; empty when the set has no kinds.
    info: what else the task set knows; never shown to the model.
  """

  id: str
  index: int
  question: str
  answer: str
  kind: str = ""
  info: Mapping[str, Any] = dataclasses.field(
    default_factory=lambda: types.MappingProxyType({})
  )


def distinct(task: "Task", count: int) -> list[Problem]:
  """The first problems of a task's order, each once.

  Args:
    task: with a length, if it has an end: all its problems come again later.
    count: how many, or all where there are fewer.
  """
  size = getattr(task, "__len__", None)
  count = min(count, size()) if size else count
  found: dict[str, Problem] = {}
  place = 0
  while len(found) < count:
    p = task.problem(place)
    found.setdefault(p.id, p)
    place += 1
  return list(found.values())


class Task(Protocol):
  """A task set: an endless, repeatable order of problems."""

  def problem(self, index: int) -> Problem:
    """The problem at place `index` >= 0, always the same one."""
    ...

  def problems(self, start: int, count: int) -> list[Problem]:
    """Problems at places start .. start + count - 1."""
    ...
