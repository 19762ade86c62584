"""How often a policy solved each problem: the measure of a curriculum.

The last stage of rStar2-Agent (arXiv 2508.20722) trains on what its policy does
not always solve: 8 rollouts a problem, and out with those solved 8 times of 8.
"""

import json
import pathlib
from collections.abc import Sequence

from roc import jsonl
from roc.host.tasks import problem as problem_lib
from roc.host.tasks import rows as rows_lib

_JUDGED = {"correct": True, "wrong": False}


class PassRates:
  """Shares of correct rollouts, by problem.

  Args:
    path: a JSONL file of rollouts as the command `rollout` and training write
      them (`task_id`, `outcome`), or with `task_id` and `correct`; or a
      directory of such files.

  Raises:
    ValueError: there are none, or a line is none; names it.
  """

  def __init__(self, path: str | pathlib.Path):
    self._path = path
    self._n_all: dict[str, int] = {}
    self._n_right: dict[str, int] = {}
    for file in _files(path):
      for row in rows_lib.read(file):
        self._add(row)
    if not self._n_all:
      raise ValueError(f"{path} holds no rollout that was judged")

  def _add(self, row: rows_lib.Row) -> None:
    task = row.fields.get("task_id")
    verdict = row.fields.get("correct")
    if verdict is None:
      outcome = row.fields.get("outcome")
      if outcome == "void":  # not the policy's doing
        return
      verdict = _JUDGED.get(outcome) if isinstance(outcome, str) else None
    if not isinstance(task, str) or not isinstance(verdict, bool):
      raise ValueError(
        f"{row.where} is no rollout: it needs task_id, and outcome (correct,"
        f" wrong or void) or correct; it has {json.dumps(sorted(row.fields))}"
      )
    self._n_all[task] = self._n_all.get(task, 0) + 1
    self._n_right[task] = self._n_right.get(task, 0) + verdict

  def __getitem__(self, problem: problem_lib.Problem) -> float:
    """The share; 0 of a problem without rollouts, which so counts as hard."""
    n_all = self._n_all.get(problem.id, 0)
    return self._n_right[problem.id] / n_all if n_all else 0.0

  def notes(
    self, name: str, problems: Sequence[problem_lib.Problem]
  ) -> list[str]:
    """Lines for people; nothing where every problem was measured.

    Raises:
      ValueError: none was.
    """
    n_without = sum(p.id not in self._n_all for p in problems)
    if problems and n_without == len(problems):
      raise ValueError(
        f"{self._path} holds no rollout of any problem in {name}; draw some"
        " with `python -m roc.main rollout --config.collect.task=train`"
      )
    if not n_without:
      return []
    return [
      f"{name}: {n_without} of {len(problems)} problems have no rollout in"
      f" {self._path} and count as never solved"
    ]


def _files(path: str | pathlib.Path) -> list[pathlib.Path]:
  found = pathlib.Path(path)
  if found.is_dir():
    files = jsonl.inside(found)
    if not files:
      raise ValueError(f"{path} holds no *.jsonl of rollouts")
    return files
  return jsonl.find(found) or [found]
