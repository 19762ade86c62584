r"""What can be said of two answers from their text alone, and what cannot.

The policy on units, percent signs, lists and the like (docs/rewards.md) is
here. Most answers are plain numbers or words and are decided on the spot, in
microseconds; for the rest `compare` returns the pairs of LaTeX texts that
`roc.host.verify` has checked in a process of its own.
"""

import fractions
import re
from typing import NamedTuple

from roc.host import rewards, units

# Parsing takes time that grows with the depth far faster than with the length.
MAX_DEPTH = 12
_MAX_POWER_OF_TEN = 300  # of a number that is written with one
_TOLERANCE = fractions.Fraction(1, 10**6)

_CHARACTERS = str.maketrans(
  {
    "−": "-",
    "–": "-",
    "π": r"\pi ",
    "∞": r"\infty ",
    "√": r"\sqrt ",
    "×": r"\times ",
    "·": r"\cdot ",
    "÷": r"\div ",
    "±": r"\pm ",
    "°": r"^\circ ",
    "≤": r"\le ",
    "≥": r"\ge ",
    "∪": r"\cup ",
    "\N{NO-BREAK SPACE}": " ",
    "\n": " ",
    "\t": " ",
  }
)
_DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))
_REWRITES = tuple(
  (re.compile(pattern), replacement)
  for pattern, replacement in (
    (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle)(?![A-Za-z])", ""),
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    (r"\\varnothing", r"\\emptyset"),
    (r"(?<=\d)(?:\{,\}|,\\!)(?=\d{3})", ""),  # thousands, whatever is around
    (r"\{,\}", ","),
    (r"(?<=\d)(?<!\\)\\[,!;: ]\s*(?=\d{3})", ""),
    (r"(?<!\\)\\!", ""),
    (r"(?<!\\)\\[,;: ]|~|\\q?quad(?![A-Za-z])", " "),
    (r"\s+", " "),
    (r"\\frac ?(\\pi|[A-Za-z\d]) ?(\\pi|[A-Za-z\d])", r"\\frac{\1}{\2}"),
    (r"^ ?\\approx ", ""),
    (r"(\d*)\.\\overline\{(\d+)\}", lambda m: _repeating(m[1], m[2])),
  )
)
_WRAPPER = re.compile(units.WRAPPED)

_SCIENTIFIC = re.compile(
  r"([+-]?[\d.,]+) ?(?:[eE]|(?:\\times|\\cdot) ?10 ?\^ ?)"
  r"(?:\{([+-]?\d{1,3})\}|([+-]?\d{1,3}))"
)
_MIXED = re.compile(
  r"([+-]?)(\d+) ?(?:\\frac\{(\d+)\}\{(\d+)\}|(?<= )(\d+)/(\d+))"
)
_SPACED_THOUSANDS = re.compile(r"[+-]?\d{1,3}(?: \d{3})+(?:\.\d+)?")
_IDLE_SPACE = re.compile(r"(?<!\d) | (?!\d)")  # not the one in `4 2`
_TWO_NUMBERS = re.compile(r"(?<![\d.,_^])\d+(?:[.,]\d+)* (?=\d)")

_RELATION = re.compile(
  r"[=<>]|\\(?:n?eq?|l(?:eq?|t)|g(?:eq?|t)|in)(?![A-Za-z])"
)
_EQUALS = re.compile(r"(?<![<>!:\\])=")
_LIST = re.compile(r",|;|(?<![a-z])(?:and|or)(?![a-z])")
_NUMERIC_COMMANDS = re.compile(
  r"\\(?:frac|sqrt|pi|times|cdot|div|pm|circ|text|mathrm)(?![A-Za-z])"
)
# Where one of these stands in the answer and not in the gold answer, the
# problem was restated, not solved.
_UNDONE = re.compile(
  r"\\(?:i+nt|oint|sum|prod|lim|gcd|lcm|max|min|det|[bp]?mod|operatorname"
  r"|lfloor|lceil)(?![A-Za-z])"
)

_CHOICE = re.compile(r"\(?([A-Za-z])\)?")
_WORDS = re.compile(r"[^\W\d_](?:[^\W_]|[ ,.'-])*")


# What data sets write where a problem has no answer.
_NO_ANSWER = frozenset(
  {"proof", "notfound", "not found", "no answer", "n/a", "nan", "null"}
)
_SAID = re.compile(
  r"(?:.*####|(?:^|.*[\s.,;:*])(?:final\s+|correct\s+|right\s+)?answer\**"
  r"(?:\s*[:=]|\s+(?:is|are|equals)\b))[\s:*]*(.+)",
  re.IGNORECASE | re.DOTALL,
)
_SENTENCE = re.compile(
  r"[A-Z][^$\\]*\s(?:is|are|equals|be)\s*:?\s*"
  r"(\$[^$]+\$|\\[(\[](?:(?!\\[)\]]).)+\\[)\]])\s*\.?",
  re.DOTALL,
)


class Decision(NamedTuple):
  """What `compare` found.

  Attributes:
    is_equal: True or False where the texts decide it, else None.
    reason: why, in a few words.
    pairs: for None: conditions that must all hold; each is a list of (gold,
      answer) of which one must be equal as mathematics. Empty when the gold
      answer is at fault.
  """

  is_equal: bool | None
  reason: str
  pairs: list[list[tuple[str, str]]]


def find(text: str) -> str:
  r"""The answer in a text that says more than it: what a problem file holds.

  The content of the last `\boxed{...}`; else what stands behind `####` or
  "the answer is"; else the only formula of a sentence that ends with it ("The
  area is $5$."); else the whole text.
  """
  text = text.strip()
  boxed = rewards.extract_boxed(text)
  if boxed is not None:
    return boxed
  said = _SAID.fullmatch(text)
  if said:
    text = said[1].strip(" *.")
  elif sentence := _SENTENCE.fullmatch(text):
    text = sentence[1]
  return text


def is_no_answer(gold: str) -> bool:
  """Whether a gold answer is empty or a word such as `proof` or `notfound`."""
  text = _flat(tidy(gold)).casefold()
  return not text or text in _NO_ANSWER


def compare(answer: str, gold: str) -> Decision:
  """Compares two answers as far as their texts allow.

  Args:
    answer: the content of the model's box; any text at all.
    gold: the right answer.

  Returns:
    A decision, or what is left to be checked.
  """
  if is_no_answer(gold):
    return Decision(None, "the gold answer is none", [])
  if answer.strip() and answer.strip() == gold.strip():
    return Decision(True, "same text", [])
  if len(answer) > rewards.MAX_ANSWER_CHARS:
    return Decision(False, "too long", [])
  if not answer.translate(_CHARACTERS).isprintable():
    return Decision(False, "control characters", [])
  a, g = tidy(answer), tidy(gold)
  if not a:
    return Decision(False, "empty", [])
  if _IDLE_SPACE.sub("", a) == _IDLE_SPACE.sub("", g):
    return Decision(True, "same text", [])
  by_words = _compare_words(a, g)
  if by_words is not None:
    return Decision(by_words, "words", [])
  fault = _fault(a, g)
  if fault:
    return Decision(False, fault, [])
  return _compare_sides(a, g)


def tidy(text: str) -> str:
  """The text without typographic variants that mean nothing."""
  text = text.translate(_CHARACTERS).strip()
  text = text.removesuffix(".").strip()
  for start, end in _DELIMITERS:
    is_long = len(text) > len(start) + len(end)
    if is_long and text.startswith(start) and text.endswith(end):
      text = text[len(start) : -len(end)]
      break
  for pattern, replacement in _REWRITES:
    text = pattern.sub(replacement, text)
  text = text.strip().removesuffix(".").strip()
  whole = _WRAPPER.fullmatch(text)
  if whole and not _is_words(whole[1]):
    text = whole[1].strip()
  if _SPACED_THOUSANDS.fullmatch(text):
    text = text.replace(" ", "")
  return text


def number(text: str) -> fractions.Fraction | None:
  r"""Exact value of a number that is written out; None if it is no such.

  Beyond `rewards.parse_number`: `2.5e6`, `2.5 \times 10^{6}`, `2\frac{1}{2}`
  and `2 1/2`.
  """
  value = rewards.parse_number(text)
  if value is not None:
    return value
  if found := _MIXED.fullmatch(text):
    sign, whole, *parts = found.groups()
    part = rewards.parse_number("/".join(p for p in parts if p))
    if part is None:
      return None
    return (int(whole) + part) * (-1 if sign == "-" else 1)
  if found := _SCIENTIFIC.fullmatch(text):
    value = rewards.parse_number(found[1])
    power = int(found[2] or found[3])
    if value is None or abs(power) > _MAX_POWER_OF_TEN:
      return None
    return value * fractions.Fraction(10) ** power
  return None


def is_same_number(
  answer: fractions.Fraction, gold: fractions.Fraction, *, has_decimal: bool
) -> bool:
  """Exactly equal; with a decimal among them, to a millionth.

  A millionth of the gold answer where that is below 1, so that small numbers
  are not all alike.
  """
  if not has_decimal:
    return answer == gold
  return abs(answer - gold) <= _TOLERANCE * min(1, abs(gold))


# ------------------------------------------------------------------- sides


def _compare_sides(a: str, g: str) -> Decision:
  """Takes an answer like `x = 5` apart where the gold is no relation."""
  sides = [a]
  if not _RELATION.search(g):
    parts = [part.strip() for part in _EQUALS.split(a)]
    is_list = _LIST.search(a)
    is_named = all(not part or _is_name(part) for part in parts[:-1])
    if not is_list and len(parts) > 1:
      sides = [parts[-1], *(p for p in parts[:-1] if not _is_name(p))]
    elif len(parts) > 1 and not is_named:
      return Decision(False, "no list of solutions", [])
  left = []
  for side in sides:
    decided, pairs = _compare_quantities(units.split(side), units.split(g))
    if decided is False:
      return Decision(False, "another value", [])
    if decided is None:
      left.append(pairs)
  return Decision(None if left else True, "same value" * (not left), left)


def _is_name(side: str) -> bool:
  """Whether the left side of `x = 5` names something: it holds a letter."""
  return re.search(r"[A-Za-z]", _NUMERIC_COMMANDS.sub("", side)) is not None


def _compare_quantities(
  a: units.Quantity, g: units.Quantity
) -> tuple[bool | None, list[tuple[str, str]]]:
  """Returns a decision, or None and the readings that are left to check."""
  if a.unit and g.unit and a.unit != g.unit:
    return False, []
  readings = [(g.bare, a.bare)]
  if a.unit != g.unit:
    if a.unit == "%":
      readings.append((g.bare, _hundredth(a.bare)))
    if g.unit == "%":
      readings.append((_hundredth(g.bare), a.bare))
    # A number of degrees is never a rational number of radians.
    if a.unit == "deg" and r"\pi" in g.bare:
      readings.append((g.bare, _radians(a.bare)))
    if g.unit == "deg" and r"\pi" in a.bare:
      readings.append((_radians(g.bare), a.bare))
  left = []
  for gold, answer in readings:
    x, y = number(answer), number(gold)
    if x is None or y is None:
      left.append((gold, answer))
    elif is_same_number(x, y, has_decimal=_is_decimal(gold + answer)):
      return True, []
  return (None, left) if left else (False, [])


def _is_decimal(text: str) -> bool:
  return "." in text


def _hundredth(text: str) -> str:
  return f"\\frac{{{text}}}{{100}}"


def _radians(text: str) -> str:
  return f"\\frac{{({text})\\pi}}{{180}}"


def _repeating(whole: str, digits: str) -> str:
  nines = "9" * len(digits)
  return f"\\frac{{{int(whole or '0') * int(nines) + int(digits)}}}{{{nines}}}"


# ------------------------------------------------------------------- words


def _compare_words(a: str, g: str) -> bool | None:
  """Decides choices such as (B) and answers in words; None for mathematics."""
  gold_choice, choice = _CHOICE.fullmatch(_flat(g)), _CHOICE.fullmatch(_flat(a))
  if gold_choice and choice:
    return gold_choice[1].casefold() == choice[1].casefold()
  flat_a, flat_g = _flat(a).casefold(), _flat(g).casefold()
  if flat_a == flat_g:
    return True
  if _is_text(g) or (_is_text(a) and number(units.split(g).bare) is not None):
    return False
  return None


def _flat(text: str) -> str:
  text = _WRAPPER.sub(r"\1", text)
  return re.sub(r"\s+", " ", re.sub(r"\s*,\s*", ", ", text)).strip(" .")


def _is_text(text: str) -> bool:
  """Words, wrapped or so long that they cannot be a product of letters."""
  flat = _flat(text)
  is_wrapped = _WRAPPER.fullmatch(text) is not None
  return _is_words(flat) and (is_wrapped or len(flat) > 3)


def _is_words(text: str) -> bool:
  text = text.strip()
  is_words = _WORDS.fullmatch(text) is not None
  return is_words and re.search(r"[^\W\d_]{2}", text) is not None


# ------------------------------------------------------------------- faults


def _fault(a: str, g: str) -> str:
  """Why the answer is wrong whatever its value; empty if it may be right."""
  if _depth(a) > MAX_DEPTH:
    return "nested too deeply"
  if _TWO_NUMBERS.search(a) and number(units.split(a).bare) is None:
    return "two numbers side by side"
  undone = set(_UNDONE.findall(a)) - set(_UNDONE.findall(g))
  if undone:
    return f"left undone: {min(undone)}"
  brackets = {_outer(a), _outer(g)}
  if len(brackets) == 2 and "{" in brackets and "" not in brackets:
    return "a set is no tuple"
  return ""


def _depth(text: str) -> int:
  depth = deepest = 0
  for character in text:
    depth += (character in "([{") - (character in ")]}")
    deepest = max(deepest, depth)
  return max(deepest, text.count("|") // 2)


def _outer(text: str) -> str:
  """`(` or `[` or `{` of the brackets around a whole list, else nothing."""
  text = text.replace("\\{", "{").replace("\\}", "}")
  if "," not in text or text[0] not in "([{":
    return ""
  depth = 0
  for i, character in enumerate(text):
    depth += (character in "([{") - (character in ")]}")
    if depth == 0:
      return text[0] if i == len(text) - 1 else ""
  return ""
