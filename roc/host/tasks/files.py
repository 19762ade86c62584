"""Problems from files, checked whole before any work starts."""

import hashlib
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from roc.host import rewards
from roc.host.tasks import (
  formats,
  instructions,
  order,
  overlap,
  pass_rates,
)
from roc.host.tasks import problem as problem_lib
from roc.host.tasks import rows as rows_lib

_ON_BAD = ("error", "drop")
_ON_UNREADABLE = ("keep", "drop", "error")
_SHOWN = 5  # places named in a note

Paths = str | pathlib.Path | Sequence[str]


class FileTask:
  """Problems of files, without end: epoch after epoch.

  A problem's `index` is its place among all rows, whatever is left out. `notes`
  says in lines for people what was left out and why.

  Args:
    path: a file or several: JSONL, a JSON array, parquet, or
      `hf://datasets/ORG/NAME/FILE`; also patterns (`train-*.jsonl.gz`).
    seed: shuffles each epoch; None keeps the order of the rows.
    format: name in `formats.FORMATS`; by default found out from the first row
      of each file.
    where: columns and what they must be: a value, a list of values, or a pair
      (lowest, highest) of numbers. `kind`, `answer` and what `info` holds.
    integers: keep only problems with an integer answer.
    split: "train" or "heldout" of a division that every seed shares; "" is all.
    heldout_share: of the problems, for `split`.
    limit: keep the first so many rows; 0 is all.
    duplicates: what to do with a row whose id is there already: "error" or
      "drop".
    bad_rows: and with one that cannot be understood, such as a row without an
      answer: "error" or "drop".
    unreadable: and with an answer that the verifier cannot read, see
      `check_answers`: "keep" (its rollouts will be void), "drop" or "error".
    on_overlong: and with a prompt that leaves no room for a rollout, see
      `check_lengths`: "error" or "drop".
    not_in: files of evaluation problems; a row that shares a run of `ngram`
      words with one of them is left out.
    ngram: words of such a run.
    rollouts: a file or directory of rollouts that were drawn of these problems.
    min_pass_rate: of those rollouts, to be kept; only with `rollouts`.
    max_pass_rate: likewise.

  Raises:
    ValueError: a missing, unreadable or empty file, a bad row (the message
      names file, line and field), or nothing is left.
  """

  def __init__(
    self,
    path: Paths,
    seed: int | None = None,
    *,
    format: str = "",
    where: Mapping[str, Any] | None = None,
    integers: bool = False,
    split: str = "",
    heldout_share: float = 0.05,
    limit: int = 0,
    duplicates: str = "error",
    bad_rows: str = "error",
    unreadable: str = "keep",
    on_overlong: str = "error",
    not_in: Paths = (),
    ngram: int = 8,
    rollouts: str = "",
    min_pass_rate: float = 0.0,
    max_pass_rate: float = 1.0,
  ):
    for name, value, known in (
      ("split", split, ("", "train", "heldout")),
      ("duplicates", duplicates, _ON_BAD),
      ("bad_rows", bad_rows, _ON_BAD),
      ("unreadable", unreadable, _ON_UNREADABLE),
      ("on_overlong", on_overlong, _ON_BAD),
    ):
      if value not in known:
        raise ValueError(f"{name} must be one of {known}, not {value!r}")
    self.name = ", ".join(_paths(path))
    self.notes: list[str] = []
    self._seed = seed
    self._unreadable = unreadable
    self._on_overlong = on_overlong
    self._places: dict[str, str] = {}  # of each problem, by its id
    found = _Reader(format, duplicates, bad_rows).read(_paths(path))
    self._places, self.notes = found.places, found.notes
    kept = found.problems[: limit or None]
    kept = self._keep(kept, "are not as `where` says", _matches(where or {}))
    if integers:
      kept = self._keep(kept, "have no integer answer", _is_integer)
    if split:
      part = lambda p: _is_heldout(p, heldout_share) == (split == "heldout")
      kept = self._keep(kept, f"are not in the {split} split", part)
    if not_in:
      seen = overlap.Overlap(_questions(_paths(not_in)), ngram)
      is_new = lambda p: p.question not in seen
      kept = self._keep(
        kept,
        f"share {ngram} words in a row with {', '.join(_paths(not_in))}",
        is_new,
      )
    if rollouts:
      rates = pass_rates.PassRates(rollouts)
      self.notes += rates.notes(self.name, kept)
      is_between = lambda p: min_pass_rate <= rates[p] <= max_pass_rate
      kept = self._keep(
        kept,
        f"are not solved in {min_pass_rate:g} to {max_pass_rate:g} of the"
        f" rollouts in {rollouts}",
        is_between,
      )
    self._set(kept)
    self.notes += instructions.notes(self.name, self._problems)
    self.digest = _digest(kept)

  def __len__(self) -> int:
    return len(self._problems)

  @property
  def all_problems(self) -> Sequence[problem_lib.Problem]:
    """Every problem once, in order of rows."""
    return self._problems

  def problem(self, index: int) -> problem_lib.Problem:
    """The problem at place `index` of the endless order."""
    return self._problems[self._order[index]]

  def problems(self, start: int, count: int) -> list[problem_lib.Problem]:
    """Problems at places start .. start + count - 1 of the endless order."""
    return [self.problem(i) for i in range(start, start + count)]

  def check_answers(
    self, find_unreadable: Callable[[Sequence[str]], Sequence[int]]
  ) -> list[str]:
    """Finds gold answers that the verifier cannot read.

    Args:
      find_unreadable: of a list of answers, the places of those.

    Returns:
      Lines for people: how many, and the first of them with their rows.

    Raises:
      ValueError: there are some, and `unreadable` is "error"; or none is left.
    """
    bad = find_unreadable([p.answer for p in self._problems])
    if not bad:
      return []
    places = []
    for problem in (self._problems[i] for i in bad):
      places.append(f"{self._places[problem.id]} ({problem.answer[:60]!r})")
    text = (
      f"{self.name}: the verifier cannot read {len(bad)} of {len(self)}"
      f" answers: {_listed(places, self.name)}"
    )
    if self._unreadable == "error":
      raise ValueError(f"{text}; mend them, or set unreadable to drop or keep")
    if self._unreadable == "keep":
      return [f"{text}; their rollouts will be void (set unreadable to drop)"]
    self._leave_out(bad)
    return [f"{text}; they are left out"]

  def check_lengths(
    self, find_overlong: Callable[[Sequence[str]], Mapping[int, str]]
  ) -> list[str]:
    """Finds questions whose prompts leave no room for a rollout.

    Args:
      find_overlong: of a list of questions, the places of those, and how long
        each is.

    Returns:
      Lines for people: how many are left out, and the first with their rows.

    Raises:
      ValueError: there are some, and `on_overlong` is "error"; or none is left.
    """
    long = find_overlong([p.question for p in self._problems])
    if not long:
      return []
    places = [
      f"{self._places[self._problems[i].id]} ({said})"
      for i, said in long.items()
    ]
    text = (
      f"{self.name}: {len(long)} of {len(self)} prompts are too long:"
      f" {_listed(places, self.name)}"
    )
    if self._on_overlong == "error":
      raise ValueError(text)
    self._leave_out(long)
    return [f"{text}; they are left out"]

  def _leave_out(self, places: Iterable[int]) -> None:
    left_out = set(places)
    self._set([p for i, p in enumerate(self._problems) if i not in left_out])

  def _keep(
    self,
    problems: Sequence[problem_lib.Problem],
    why: str,
    is_kept: Callable[[problem_lib.Problem], bool],
  ) -> list[problem_lib.Problem]:
    kept = [p for p in problems if is_kept(p)]
    if len(kept) < len(problems):
      n_out = len(problems) - len(kept)
      self.notes.append(
        f"{self.name}: {n_out} of {len(problems)} problems {why}"
      )
    return kept

  def _set(self, problems: Sequence[problem_lib.Problem]) -> None:
    if not problems:
      said = "; ".join(self.notes)
      raise ValueError(
        f"task file {self.name} holds no problem" + (f" ({said})" * bool(said))
      )
    self._problems = list(problems)
    self._order = order.Epochs(len(problems), self._seed)


class _Reader:
  """Reads the rows of several files into one set."""

  def __init__(self, format: str, duplicates: str, bad_rows: str):
    self._format = format
    self._duplicates = duplicates
    self._bad_rows = bad_rows
    self.problems: list[problem_lib.Problem] = []
    self.places: dict[str, str] = {}
    self.notes: list[str] = []
    self._n_rows = 0
    self._dropped: dict[str, list[str]] = {}

  def read(self, paths: Sequence[str]) -> "_Reader":
    for path in paths:
      name = self._format
      for row in rows_lib.read(path):
        name = name or formats.detect(row)
        self._add(row, name)
    for what, places in self._dropped.items():
      name = ", ".join(paths)
      listed = _listed(places, name)
      self.notes.append(f"{name}: {len(places)} rows {what}: {listed}")
    return self

  def _add(self, row: rows_lib.Row, name: str) -> None:
    index = self._n_rows
    self._n_rows += 1
    try:
      draft = formats.read(row, name)
    except ValueError:
      if self._bad_rows == "error" or name not in formats.FORMATS:
        raise
      self._dropped.setdefault("cannot be understood", []).append(row.where)
      return
    if draft.id in self.places:
      if self._duplicates == "error":
        raise ValueError(
          f"{row.where}: field 'id': {draft.id!r} is also on"
          f" {self.places[draft.id]}; give each row its own id, or set"
          " duplicates to drop"
        )
      self._dropped.setdefault("are there already", []).append(row.where)
      return
    self.places[draft.id] = row.where
    self.problems.append(
      problem_lib.Problem(
        id=draft.id,
        index=index,
        question=draft.question,
        answer=draft.answer,
        kind=draft.kind,
        info=draft.info,
      )
    )


def _digest(problems: Iterable[problem_lib.Problem]) -> str:
  """Tells sets of problems apart, wherever their files lie."""
  digest = hashlib.sha256()
  for p in problems:
    row = [p.id, p.index, p.question, p.answer]
    digest.update(json.dumps(row).encode() + b"\n")
  return digest.hexdigest()[:16]


def _listed(places: Sequence[str], name: str) -> str:
  """The first of some places, without the name of the only file."""
  shown = [place.removeprefix(f"{name} ") for place in places[:_SHOWN]]
  more = f" and {len(places) - _SHOWN} more" if len(places) > _SHOWN else ""
  return "; ".join(shown) + more


def _paths(path: Paths) -> list[str]:
  return [str(path)] if isinstance(path, str | pathlib.Path) else list(path)


def _questions(paths: Iterable[str]) -> Iterable[str]:
  for path in paths:
    name = ""
    for row in rows_lib.read(path):
      name = name or formats.detect(row)
      yield formats.read(row, name).question


def _matches(
  where: Mapping[str, Any],
) -> Callable[[problem_lib.Problem], bool]:
  def is_kept(problem: problem_lib.Problem) -> bool:
    own = {"kind": problem.kind, "answer": problem.answer, "id": problem.id}
    columns = {**problem.info, **own}
    return all(_holds(columns.get(k), wanted) for k, wanted in where.items())

  return is_kept


def _holds(value: Any, wanted: Any) -> bool:
  if isinstance(wanted, tuple) and len(wanted) == 2:
    try:
      return wanted[0] <= float(value) <= wanted[1]
    except (TypeError, ValueError):
      return False
  if isinstance(wanted, list):
    return value in wanted
  return value == wanted


def _is_integer(problem: problem_lib.Problem) -> bool:
  value = rewards.parse_number(problem.answer)
  return value is not None and value.denominator == 1


def _is_heldout(problem: problem_lib.Problem, share: float) -> bool:
  digest = hashlib.sha256(problem.id.encode()).digest()
  return int.from_bytes(digest[:8], "big") / 2**64 < share
