r"""Whether an answer is right: exact, and only for what the model itself wrote.

An answer counts only inside `<answer>...\boxed{X}...</answer>` among the
model's own tokens, and the last one counts. A number that a tool printed, or
that stands in the reasoning, earns nothing: rewarding it teaches a policy to
leave the answer out.
"""

import dataclasses
import fractions
import re
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any

from roc import layout

# Longer text is no answer to an arithmetic problem, and parsing a huge integer
# takes time that grows with its square.
MAX_ANSWER_CHARS = 400

_NUMBER = re.compile(
  r"""
  (?P<sign>[+-]?)
  (?P<whole>[0-9]{1,3}(?:,[0-9]{3})+ | [0-9]+ | (?=\.[0-9]))
  (?P<part>\.[0-9]*)?
  """,
  re.VERBOSE,
)
# Not the model's fault: the rollout is left out of its group.
VOID_REASONS = {
  "verifier_timeout": layout.VoidReason.VERIFIER,
  "verifier_error": layout.VoidReason.VERIFIER,
  "infra": layout.VoidReason.SANDBOX,
  "bad_gold": layout.VoidReason.GOLD,
}
_BOX = re.compile(r"\\boxed(?:\s*\{|\s+(?=[^\s{])|(?=[\\\d]))")
_LATEX_FRACTION = re.compile(r"([+-]?)\\d?frac\{([^{}]+)\}\{([^{}]+)\}")


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What the checker says of one rollout.

  Attributes:
    is_correct: raw correctness, the key of rewards and of the filter.
    reason: `correct`, `wrong`, `no_answer` or `truncated`; or why there is no
      saying, one of `VOID_REASONS`.
    answer: the answer that was judged; None when there was none.
    n_answers: well-formed answers in the whole rollout.
  """

  is_correct: bool
  reason: str
  answer: str | None
  n_answers: int

  @property
  def reward(self) -> float:
    """1 for a correct answer, 0 for anything else."""
    return float(self.is_correct)

  @property
  def void_reason(self) -> layout.VoidReason | None:
    """What failed, where there is no saying."""
    return VOID_REASONS.get(self.reason)

  @property
  def outcome(self) -> layout.Outcome:
    """Right, wrong, or not to be judged by the checker's own fault."""
    if self.void_reason is not None:
      return layout.Outcome.VOID
    return layout.Outcome(int(self.is_correct))


# Judges answers; a verdict that takes a while comes as a future.
Score = Callable[..., Verdict | futures.Future[Verdict]]


def exact_score(sandbox: Any) -> Score:
  """Makes the scorer of exact numbers; it needs no sandbox."""
  del sandbox
  return score


def score(
  answers: Sequence[str], gold: str, *, is_truncated: bool = False
) -> Verdict:
  """Judges a rollout by the last of its answers.

  A truncated rollout is wrong whatever it wrote before: it is the model's fault
  (reward 0) and stays in the group as a negative (arXiv 2508.20722).

  Args:
    answers: contents of the model's well-formed answers, in order, as
      `tools.parse_turn` finds them turn by turn.
    gold: the right answer.
    is_truncated: the rollout ran into a turn or token limit.
  """
  verdict = unanswered(answers, is_truncated=is_truncated)
  if verdict is not None:
    return verdict
  is_correct = is_equal(answers[-1], gold)
  reason = "correct" if is_correct else "wrong"
  return Verdict(is_correct, reason, answers[-1], len(answers))


def unanswered(answers: Sequence[str], *, is_truncated: bool) -> Verdict | None:
  """The verdict on a rollout without an answer that counts, else None."""
  answer = answers[-1] if answers else None
  if is_truncated:
    return Verdict(False, "truncated", answer, len(answers))
  if answer is None:
    return Verdict(False, "no_answer", None, 0)
  return None


def is_equal(answer: str, gold: str) -> bool:
  """Whether two answers are the same number, or else the same text.

  Numbers are compared exactly as fractions: `1,234`, `+1234`, `1234.0` and
  `2468/2` are equal. Text is compared after trimming spaces at both ends.
  """
  value = parse_number(answer)
  gold_value = parse_number(gold)
  if gold_value is None:
    return answer.strip() == gold.strip()
  return value is not None and value == gold_value


def parse_number(text: str) -> fractions.Fraction | None:
  r"""Exact value of an integer, decimal or fraction; None if it is no such.

  Accepted around the number: spaces, `$...$`, a full stop at the end, LaTeX
  thin spaces and `\frac{a}{b}`. Commas must stand where thousands do. Powers of
  ten (`1e9`), percentages and units are no numbers here.
  """
  if len(text) > MAX_ANSWER_CHARS:
    return None
  text = text.strip().strip("$").replace("\\,", "").replace("\\!", "").strip()
  latex = _LATEX_FRACTION.fullmatch(text)
  if latex:
    text = f"{latex[1]}{latex[2]}/{latex[3]}"
  if "/" in text:
    parts = [_parse_decimal(part.strip()) for part in text.split("/")]
    if len(parts) != 2 or parts[0] is None or not parts[1]:
      return None
    return parts[0] / parts[1]
  return _parse_decimal(text)


def extract_boxed(text: str) -> str | None:
  r"""Content of the last `\boxed{...}` of a text, braces balanced.

  Without braces (`\boxed 5`, `\boxed\frac12`) the box ends at the next space
  that no brace encloses, or at the end of the formula.

  Returns:
    The content without outer spaces; None when there is no box, it is empty, or
    it is never closed.
  """
  boxes = list(_BOX.finditer(text))
  if not boxes:
    return None
  start = boxes[-1].end()
  if text[start - 1] != "{":
    content = _before_space(text[start:]).rstrip(".,;:")
    return content or None
  depth = 1
  for index in range(start, len(text)):
    depth += {"{": 1, "}": -1}.get(text[index], 0)
    if depth == 0:
      return text[start:index].strip() or None
  return None


def _before_space(text: str) -> str:
  """The text up to a space, `$`, `\\)` or `}` that no brace encloses."""
  depth = 0
  for index, character in enumerate(text):
    is_end = character.isspace() or character in "$}"
    if depth == 0 and (is_end or text.startswith(("\\)", "\\]"), index)):
      return text[:index]
    depth += {"{": 1, "}": -1}.get(character, 0)
  return text if depth == 0 else ""


def _parse_decimal(text: str) -> fractions.Fraction | None:
  found = _NUMBER.fullmatch(text)
  if not found:
    return None
  part = (found["part"] or "").lstrip(".")
  digits = found["whole"].replace(",", "") + part
  value = fractions.Fraction(int(digits), 10 ** len(part))
  return -value if found["sign"] == "-" else value
