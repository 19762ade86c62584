"""Groups of rollouts in files, in columns of numbers.

A rollout becomes some 40 bytes, so that files of millions of lines fit: the
text of a line is dropped as soon as it is read.
"""

import array
import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np

from roc import errors, jsonl
from roc import group_formats as formats

MAX_GROUP = 4096  # ranks are counted by comparing all pairs
_COLUMNS = {"outcome": "b"} | dict.fromkeys(
  ("rollout_id", "n_judged", "n_failed", "n_answers", "n_turns"), "i"
)


@dataclasses.dataclass(frozen=True)
class Rollouts:
  """All rollouts of some files, in the order of their lines.

  Attributes:
    groups: in the order of their first line.
    group: int32 [n], index into `groups`.
    rollout_id: int32 [n], distinct in each group.
    outcome: int8 [n], `layout.Outcome`.
    n_judged: int32 [n], calls, those of INFRA left out.
    n_failed: int32 [n], of them the model's fault.
    n_answers: int32 [n].
    n_turns: int32 [n].
    file: int32 [n], index into `paths`.
    line: int32 [n], from 1.
    paths: files, in the order of reading.
    bad_lines: what was passed over, a sentence each; the first few.
    n_bad_lines: how many were.
  """

  groups: list[formats.Group]
  group: np.ndarray
  rollout_id: np.ndarray
  outcome: np.ndarray
  n_judged: np.ndarray
  n_failed: np.ndarray
  n_answers: np.ndarray
  n_turns: np.ndarray
  file: np.ndarray
  line: np.ndarray
  paths: list[pathlib.Path]
  bad_lines: list[str]
  n_bad_lines: int

  def __len__(self) -> int:
    return len(self.group)

  def place(self, i: int) -> str:
    """`FILE line N` of a rollout."""
    return f"{self.paths[self.file[i]]} line {self.line[i]}"

  def without(self, is_out: np.ndarray) -> "Rollouts":
    """The rollouts whose groups are not `is_out`, bool by group."""
    names = [f.name for f in dataclasses.fields(self)]
    is_in = ~is_out[self.group]
    values = {n: getattr(self, n) for n in names}
    for n in names:
      if isinstance(values[n], np.ndarray):
        values[n] = values[n][is_in]
    renumbered = np.cumsum(~is_out, dtype=np.int32) - 1
    values["group"] = renumbered[values["group"]]
    values["groups"] = [
      g for g, out in zip(self.groups, is_out, strict=True) if not out
    ]
    return Rollouts(**values)


def read(
  paths: Sequence[pathlib.Path], *, is_lenient: bool = False
) -> Rollouts:
  """Reads every rollout of some files.

  Args:
    paths: JSONL files, plain or gzip.
    is_lenient: pass over bad lines instead of raising.

  Returns:
    `Rollouts`; groups may lie scattered over the files.

  Raises:
    errors.UserError: a file that cannot be read or holds no rollout, or a bad
      line; names it.
  """
  reader = _Reader(list(paths), is_lenient)
  for file in range(len(paths)):
    reader.read(file)
  return reader.finish()


class _Reader:
  """Columns that grow by a line at a time."""

  def __init__(self, paths: list[pathlib.Path], is_lenient: bool):
    self.paths, self.is_lenient = paths, is_lenient
    self.index: dict[formats.Group, int] = {}
    self.columns = {n: array.array(t) for n, t in _COLUMNS.items()}
    self.columns |= {n: array.array("i") for n in ("group", "line", "file")}
    self.sizes = array.array("i")  # of each group so far
    self.bad_lines: list[str] = []
    self.n_bad_lines = 0

  def read(self, file: int) -> None:
    path, parse = self.paths[file], None
    n_before = len(self.columns["group"])
    for number, line in jsonl.lines(path):
      try:
        row = formats.loads(line)
        parse = parse or formats.format_of(row)
        self._add(file, number, *parse(row))
      except formats.BadLineError as e:
        self._refuse(f"{path} line {number}: {e}")
    if len(self.columns["group"]) == n_before and not self.n_bad_lines:
      raise errors.UserError(
        f"{path} holds no rollout; docs/filter.md describes the lines that it"
        " may hold"
      )

  def _refuse(self, sentence: str) -> None:
    if not self.is_lenient:
      raise errors.UserError(
        f"{sentence}; mend that line, or pass over such lines with --skip-bad"
      )
    self.n_bad_lines += 1
    if len(self.bad_lines) < 3:
      self.bad_lines.append(sentence)

  def _add(
    self,
    file: int,
    number: int,
    group: formats.Group,
    rollouts: list[formats.Rollout],
  ) -> None:
    at = self.index.get(group, len(self.index))
    size = self.sizes[at] if at < len(self.sizes) else 0
    if size + len(rollouts) > MAX_GROUP:
      raise formats.BadLineError(
        f"group {group.name} has more than {MAX_GROUP} rollouts; are the names"
        " of the groups right?"
      )
    if not size:
      self.index[group] = at
      self.sizes.append(0)
    for i, rollout in enumerate(rollouts):
      values = rollout._asdict() | {"group": at, "line": number, "file": file}
      if rollout.rollout_id < 0:
        values["rollout_id"] = size + i
      for name, value in values.items():
        self.columns[name].append(value)
    self.sizes[at] += len(rollouts)

  def finish(self) -> Rollouts:
    arrays = {n: np.array(c) for n, c in self.columns.items()}
    all_of_it = Rollouts(
      groups=list(self.index),
      paths=self.paths,
      bad_lines=self.bad_lines,
      n_bad_lines=self.n_bad_lines,
      **arrays,
    )
    if not len(all_of_it):
      raise errors.UserError(f"no line is left: {self.bad_lines[0]}")
    _check_ids(all_of_it)
    return all_of_it


def _check_ids(rollouts: Rollouts) -> None:
  """Refuses a rollout that is there twice."""
  order = np.lexsort((rollouts.rollout_id, rollouts.group))
  group, ids = rollouts.group[order], rollouts.rollout_id[order]
  is_twice = (group[1:] == group[:-1]) & (ids[1:] == ids[:-1])
  if not is_twice.any():
    return
  first = int(np.argmax(is_twice))
  before, after = sorted(order[first : first + 2])
  raise errors.UserError(
    f"{rollouts.place(after)}: rollout {ids[first]} of group"
    f" {rollouts.groups[group[first]].name} is also {rollouts.place(before)};"
    " give a copy without one of the two, and filter different runs one by one"
  )
