"""GSM8K's written solutions, with the sums that a calculator did in them.

A row is `question` and `answer`; the answer is prose in which `<<48/2=24>>`
says what was computed and what came out, and its last line is `#### 72`
(arXiv 2110.14168).
"""

import dataclasses
import fractions
import re

from roc import jsonl
from roc.host import rewards

_SUM = re.compile(r"<<([^<>]*)>>")
_END = "####"
# Plain arithmetic, so that running it does nothing else.
_EXPRESSION = re.compile(r"[0-9.+\-*/() ]+")

NO_SUMS = "no sums"
NOT_THE_ANSWER = "the last sum is not the answer"


class Unusable(ValueError):
  """A solution that holds no trace; the text says why, the same for all."""


@dataclasses.dataclass(frozen=True)
class Sum:
  """One sum of a solution.

  Attributes:
    before: prose between it and the sum before, or the start.
    expression: what was computed, as Python.
    value: what came out, as written.
  """

  before: str
  expression: str
  value: str

  @property
  def number(self) -> fractions.Fraction:
    """The value, exactly."""
    found = rewards.parse_number(self.value)
    assert found is not None  # `parse` lets no other through
    return found


@dataclasses.dataclass(frozen=True)
class Solution:
  """A question and how it was solved.

  Attributes:
    question: as asked.
    sums: in order, at least one; the value of the last is the answer.
    after: prose behind the last sum.
    answer: as written behind `####`.
  """

  question: str
  sums: tuple[Sum, ...]
  after: str
  answer: str


def read_row(line: bytes | str, where: str) -> tuple[str, str]:
  """Question and answer of one line of the data set.

  Raises:
    ValueError: it is no such line; names line and field.
  """
  row = jsonl.parse(line, where, "with question and answer").fields
  for name in ("question", "answer"):
    if not isinstance(row.get(name), str) or not row[name].strip():
      shown = repr(row[name])[:80] if name in row else "missing"
      raise ValueError(f"{where}: field '{name}' must be text, not {shown}")
  if _END not in row["answer"]:
    raise ValueError(f"{where}: field 'answer' has no line '#### ANSWER'")
  return row["question"], row["answer"]


def parse(question: str, answer: str) -> Solution:
  """Takes a solution apart.

  Raises:
    Unusable: it has no sums, one that is no plain arithmetic, or a last sum
      that is not the answer.
  """
  prose, _, final = answer.rpartition(_END)
  pieces = _SUM.split(prose)
  sums = []
  for before, text in zip(pieces[::2], pieces[1::2], strict=False):
    expression, _, value = text.rpartition("=")
    if (
      not _EXPRESSION.fullmatch(expression)
      or rewards.parse_number(value) is None
    ):
      raise Unusable("a sum is no plain arithmetic")
    sums.append(Sum(before, expression.strip(), value.strip()))
  if not sums:
    raise Unusable(NO_SUMS)
  if sums[-1].number != rewards.parse_number(final):
    raise Unusable(NOT_THE_ANSWER)
  return Solution(question, tuple(sums), pieces[-1], final.strip())
