"""Problems from a JSONL file, checked whole before any work starts.

One JSON object a line: `prompt` (text, or a list with one user message),
`answer` (text or an integer), and if wanted `id`, `kind` and `info`. The field
names are those that verifiers and prime-rl use.
"""

import hashlib
import json
import pathlib
import types
from typing import Any

import numpy as np

from roc.host.tasks import problem as problem_lib

_KNOWN_FIELDS = ("id", "prompt", "answer", "kind", "info")


class JsonlTask:
  """Problems of a file, without end: epoch after epoch.

  Args:
    path: the file; blank lines are skipped.
    seed: shuffles each epoch by (seed, epoch); None keeps the file's order.

  Raises:
    ValueError: a missing, unreadable or empty file, or a bad row; the message
      names file, line and field.
  """

  def __init__(self, path: str | pathlib.Path, seed: int | None = None):
    self._problems = read_problems(path)
    self._seed = seed

  def __len__(self) -> int:
    return len(self._problems)

  def problem(self, index: int) -> problem_lib.Problem:
    """The problem at place `index` of the endless order.

    Its own `index` is its place in the file, the same in every epoch.
    """
    if index < 0:
      raise ValueError(f"a problem's index must be >= 0, not {index}")
    epoch, place = divmod(index, len(self))
    if self._seed is not None:
      rng = np.random.default_rng([self._seed, epoch])
      place = int(rng.permutation(len(self))[place])
    return self._problems[place]

  def problems(self, start: int, count: int) -> list[problem_lib.Problem]:
    """Problems at places start .. start + count - 1 of the endless order."""
    return [self.problem(i) for i in range(start, start + count)]


def read_problems(path: str | pathlib.Path) -> list[problem_lib.Problem]:
  """Reads a whole file of problems, in its order.

  Raises:
    ValueError: as `JsonlTask`.
  """
  try:
    text = pathlib.Path(path).read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError) as error:
    raise ValueError(f"cannot read task file {path}: {error}") from error
  problems: list[problem_lib.Problem] = []
  lines_by_id: dict[str, int] = {}
  # Not splitlines(): JSON strings may hold U+2028 and its like unescaped.
  for number, line in enumerate(text.split("\n"), start=1):
    if not line.strip():
      continue
    where = f"{path} line {number}"
    problem = _read_row(line, len(problems), where)
    if problem.id in lines_by_id:
      raise ValueError(
        f"{where}: field 'id': {problem.id!r} is also on line "
        f"{lines_by_id[problem.id]}; give each row its own id"
      )
    lines_by_id[problem.id] = number
    problems.append(problem)
  if not problems:
    raise ValueError(f"task file {path} holds no problem")
  return problems


def _read_row(line: str, index: int, where: str) -> problem_lib.Problem:
  try:
    row = json.loads(line)
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{where}: not a line of JSON: {error}") from error
  if not isinstance(row, dict):
    raise ValueError(f"{where}: expected a JSON object with prompt and answer")
  unknown = sorted(set(row) - set(_KNOWN_FIELDS))
  if unknown:
    raise ValueError(
      f"{where}: field {unknown[0]!r} is unknown; put extra data into 'info'"
    )
  question = _read_prompt(row, where)
  answer = _read_answer(row, where)
  default_id = hashlib.sha256(
    json.dumps([question, answer]).encode()
  ).hexdigest()[:16]
  return problem_lib.Problem(
    id=_read_typed(row, "id", str, default_id, where),
    index=index,
    question=question,
    answer=answer,
    kind=_read_typed(row, "kind", str, "", where),
    info=types.MappingProxyType(_read_typed(row, "info", dict, {}, where)),
  )


def _read_prompt(row: dict[str, Any], where: str) -> str:
  prompt = row.get("prompt")
  if isinstance(prompt, list) and len(prompt) == 1:
    message = prompt[0] if isinstance(prompt[0], dict) else {}
    if message.get("role") == "user":
      prompt = message.get("content")
  if not isinstance(prompt, str) or not prompt.strip():
    raise ValueError(
      f"{where}: field 'prompt' must be text or a list with one user message, "
      f"not {_show(row, 'prompt')}"
    )
  return prompt


def _read_answer(row: dict[str, Any], where: str) -> str:
  answer = row.get("answer")
  if isinstance(answer, int) and not isinstance(answer, bool):
    return str(answer)
  if not isinstance(answer, str) or not answer.strip():
    raise ValueError(
      f"{where}: field 'answer' must be text or an integer, not "
      f"{_show(row, 'answer')}"
    )
  return answer


def _read_typed(
  row: dict[str, Any], name: str, expected: type, default: Any, where: str
) -> Any:
  if name not in row:
    return default
  if not isinstance(row[name], expected):
    raise ValueError(
      f"{where}: field {name!r} must be a JSON "
      f"{'object' if expected is dict else 'string'}, not {_show(row, name)}"
    )
  return row[name]


def _show(row: dict[str, Any], name: str) -> str:
  return repr(row[name])[:80] if name in row else "missing"
