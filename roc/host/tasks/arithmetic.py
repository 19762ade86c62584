"""Arithmetic beyond a small model's head, generated without end.

`problem(index)` is a pure function of (seed, split, index): nothing is stored,
any problem can be made again, and a cursor is one integer. Which split a
problem may belong to is a function of its numbers alone (a hash of kind and
operands), so train and held-out share no problem whatever the seeds are.

The words between the numbers are single tokens of the quickstart's tokenizer.
"""

import dataclasses
import hashlib
import types
from collections.abc import Callable, Mapping

import numpy as np

from roc.host.tasks import problem as problem_lib

# Buckets of the operands' hash, out of 100, that belong to each split.
SPLITS = types.MappingProxyType(
  {"train": range(0, 90), "heldout": range(90, 100)}
)

DEFAULT_MIX = types.MappingProxyType({"product": 0.4, "sum": 0.2, "word": 0.4})


@dataclasses.dataclass(frozen=True)
class Form:
  """One way to ask.

  Attributes:
    question: words with the operands as `{0}`, `{1}`, `{2}`.
    steps: Python expressions in order; operands as above, `{p}` is the value of
      the step before.
  """

  question: str
  steps: tuple[str, ...]


def _forms(steps: tuple[str, ...], *questions: str) -> tuple[Form, ...]:
  return tuple(Form(question, steps) for question in questions)


FORMS: Mapping[str, tuple[Form, ...]] = types.MappingProxyType(
  {
    "product": _forms(
      ("{0}*{1}",),
      "What is {0} * {1}?",
      "Multiply {0} by {1}.",
      "Compute {0} times {1}.",
      "Find the product of {0} and {1}.",
    ),
    "sum": _forms(
      ("{0}+{1}+{2}",),
      "What is {0} + {1} + {2}?",
      "Add {0}, {1} and {2}.",
      "Find the sum of {0}, {1} and {2}.",
      "Compute {0} plus {1} plus {2}.",
    ),
    "word": (
      *_forms(
        ("{0}*{1}", "{p}-{2}"),
        "{0} boxes hold {1} pens each. {2} pens are lost. How many are left?",
        "{0} rows have {1} seats each. {2} seats are taken. How many are free?",
      ),
      *_forms(
        ("{0}*{1}", "{p}+{2}"),
        "{0} boxes hold {1} pens each. {2} pens are added. How many now?",
      ),
      *_forms(
        ("{0}+{1}", "{p}*{2}"),
        "A shop sells {0} and {1} pens a day. How many in {2} days?",
      ),
    ),
  }
)


def _draw_product(rng: np.random.Generator, _: Form) -> tuple[int, ...]:
  return _between(rng, 100, 999), _between(rng, 12, 999)


def _draw_sum(rng: np.random.Generator, _: Form) -> tuple[int, ...]:
  return tuple(_between(rng, 1_000, 9_999) for _ in range(3))


def _draw_word(rng: np.random.Generator, form: Form) -> tuple[int, ...]:
  if form.steps[0] == "{0}+{1}":
    return (
      _between(rng, 100, 999),
      _between(rng, 100, 999),
      _between(rng, 12, 99),
    )
  return _between(rng, 100, 999), _between(rng, 12, 99), _between(rng, 100, 999)


def _between(rng: np.random.Generator, low: int, high: int) -> int:
  return int(rng.integers(low, high + 1))


_DRAW: Mapping[str, Callable[[np.random.Generator, Form], tuple[int, ...]]] = (
  types.MappingProxyType(
    {"product": _draw_product, "sum": _draw_sum, "word": _draw_word}
  )
)


class ArithmeticTask:
  """Endless arithmetic problems of one split.

  Args:
    seed: problems of different seeds are different draws of the same split.
    split: `train` or `heldout`; no problem is in both.
    mix: share of each kind, scaled to one; kinds are `product` (3 digits times
      2 or 3), `sum` (three numbers of 4 digits) and `word` (two steps).

  Raises:
    ValueError: unknown split or kind, or shares that are no shares.
  """

  def __init__(
    self,
    seed: int = 0,
    split: str = "train",
    mix: Mapping[str, float] = DEFAULT_MIX,
  ):
    if split not in SPLITS:
      raise ValueError(
        f"arithmetic split {split!r} is unknown; choose one of "
        f"{', '.join(SPLITS)}"
      )
    unknown = sorted(set(mix) - set(FORMS))
    if unknown:
      raise ValueError(
        f"arithmetic kind {unknown[0]!r} is unknown; choose from "
        f"{', '.join(FORMS)}"
      )
    if not mix or min(mix.values()) < 0 or sum(mix.values()) <= 0:
      raise ValueError(
        f"the shares of arithmetic kinds must be >= 0 and not all 0: {mix}"
      )
    self.seed = seed
    self.split = split
    # In the table's order, not the caller's: the order of a mapping's keys must
    # not change what is drawn.
    self._kinds = [kind for kind in FORMS if mix.get(kind, 0) > 0]
    shares = np.array([mix[kind] for kind in self._kinds], np.float64)
    self._shares = shares / shares.sum()

  def problem(self, index: int) -> problem_lib.Problem:
    """Problem number `index`, a pure function of (seed, split, index).

    Args:
      index: >= 0; there is no end.

    Returns:
      A problem whose `info` holds `operands` and `steps` (expressions; `{p}`
      stands for the value of the step before).
    """
    if index < 0:
      raise ValueError(f"a problem's index must be >= 0, not {index}")
    rng = np.random.default_rng(
      [self.seed, list(SPLITS).index(self.split), index]
    )
    kind = self._kinds[rng.choice(len(self._kinds), p=self._shares)]
    form = FORMS[kind][rng.integers(len(FORMS[kind]))]
    operands = _DRAW[kind](rng, form)
    while split_of(kind, operands) != self.split:
      operands = _DRAW[kind](rng, form)
    return _build(
      f"{self.split}-{self.seed}-{index}", index, kind, form, operands
    )

  def problems(self, start: int, count: int) -> list[problem_lib.Problem]:
    """Problems start .. start + count - 1."""
    return [self.problem(i) for i in range(start, start + count)]


def split_of(kind: str, operands: tuple[int, ...]) -> str:
  """The one split in which these numbers may appear.

  The order of the operands does not matter, so a*b and b*a are never on two
  sides.
  """
  name = f"{kind}:{','.join(str(x) for x in sorted(operands))}"
  digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
  bucket = int.from_bytes(digest, "big") % 100
  return next(s for s, buckets in SPLITS.items() if bucket in buckets)


def evaluate_steps(steps: tuple[str, ...]) -> int:
  """Value of a chain of steps, for gold answers; only + - * of integers.

  Each step is `a op b op c ...` with one operator throughout, and `{p}` for the
  value before.
  """
  value = 0
  for step in steps:
    text = step.replace("{p}", str(value))
    operator = next(op for op in "*+-" if op in text[1:])
    first, *rest = [int(part) for part in text.split(operator)]
    value = first
    for term in rest:
      value = {"*": value * term, "+": value + term, "-": value - term}[
        operator
      ]
  return value


def _build(
  problem_id: str,
  index: int,
  kind: str,
  form: Form,
  operands: tuple[int, ...],
) -> problem_lib.Problem:
  steps = tuple(step.format(*operands, p="{p}") for step in form.steps)
  return problem_lib.Problem(
    id=problem_id,
    index=index,
    question=form.question.format(*operands),
    answer=str(evaluate_steps(steps)),
    kind=kind,
    info=types.MappingProxyType({"operands": operands, "steps": steps}),
  )
