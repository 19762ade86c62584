"""Generated problems of reasoning-gym, by the name of its data set.

An optional extra: `pip install reasoning-gym`. Each of its sets has a scorer of
its own (`roc.host.gym_score`), which needs the whole entry and not the answer
alone, so the right answer of a problem is the entry as JSON.
"""

import importlib
import json
from collections.abc import Mapping
from typing import Any

from roc.host.tasks import problem as problem_lib

# Entries of training are those of the run's seed; seeds of runs are far below.
_HELDOUT_SEED = 2**32 - 1


class GymTask:
  """Problems of one set, generated when they are asked for.

  Args:
    name: of the set, such as `countdown`.
    seed: of the entries; None: those that are held out, the same in every run.
    config: other settings of the set, such as `{"min_numbers": 3}`.
    size: entries of an epoch.

  Raises:
    ValueError: reasoning-gym is not installed, or does not know the set or a
      setting.
  """

  def __init__(
    self,
    name: str,
    seed: int | None = None,
    *,
    config: Mapping[str, Any] | None = None,
    size: int = 100_000,
  ):
    try:
      library = importlib.import_module("reasoning_gym")
    except ImportError as e:
      raise ValueError(
        "GymTask needs reasoning-gym, which is not installed; run"
        " `pip install reasoning-gym`"
      ) from e
    self._name = name
    self._seed = _HELDOUT_SEED if seed is None else seed
    try:
      self._entries = library.create_dataset(
        name, seed=self._seed, size=size, **(config or {})
      )
    except Exception as e:  # whatever a set objects to
      first = (str(e).splitlines() or [type(e).__name__])[0]
      raise ValueError(f"reasoning-gym's set {name!r}: {first}") from e

  def __len__(self) -> int:
    return len(self._entries)

  def problem(self, index: int) -> problem_lib.Problem:
    """The problem at place `index` of the endless order."""
    if index < 0:
      raise ValueError(f"a problem's index must be >= 0, not {index}")
    index %= len(self)
    entry = self._entries[index]
    gold = {
      "reasoning_gym": self._name,
      "answer": entry["answer"],
      "metadata": entry["metadata"],
      "question": entry["question"],
    }
    return problem_lib.Problem(
      id=f"{self._name}-{self._seed}-{index}",
      index=index,
      question=entry["question"],
      answer=json.dumps(gold, default=str),
      kind=self._name,
    )

  def problems(self, start: int, count: int) -> list[problem_lib.Problem]:
    """Problems at places start .. start + count - 1 of the endless order."""
    return [self.problem(i) for i in range(start, start + count)]
