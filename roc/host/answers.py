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
    **{chr(0xFF01 + i): chr(0x21 + i) for i in range(94)},  # full width
    "−": "-",
    "–": "-",
    "π": r"\pi ",
    "∞": r"\infty ",
    "√": r"\sqrt ",
    "∛": r"\sqrt[3] ",
    "×": r"\times ",
    "·": r"\cdot ",
    "÷": r"\div ",
    "±": r"\pm ",
    "°": r"^\circ ",
    "≤": r"\le ",
    "≥": r"\ge ",
    "≠": r"\ne ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∅": r"\emptyset ",
    "½": r"\frac{1}{2}",
    "⅓": r"\frac{1}{3}",
    "⅔": r"\frac{2}{3}",
    "¼": r"\frac{1}{4}",
    "¾": r"\frac{3}{4}",
    "⅕": r"\frac{1}{5}",
    "⅖": r"\frac{2}{5}",
    "⅗": r"\frac{3}{5}",
    "⅘": r"\frac{4}{5}",
    "⅙": r"\frac{1}{6}",
    "⅚": r"\frac{5}{6}",
    "⅛": r"\frac{1}{8}",
    "⅜": r"\frac{3}{8}",
    "⅝": r"\frac{5}{8}",
    "⅞": r"\frac{7}{8}",
    "′": "'",
    "’": "'",
    "\N{NO-BREAK SPACE}": " ",
    "\N{IDEOGRAPHIC SPACE}": " ",
    "\n": " ",
    "\t": " ",
  }
)
# Runs of them become one exponent, one index, one radicand.
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ", "0123456789+-()n")
_LOWERED = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋", "0123456789+-")
_RUNS = (
  (re.compile("[⁰¹²³⁴-⁹⁺⁻⁽⁾ⁿ]+"), lambda m: f"^{{{m[0].translate(_RAISED)}}}"),
  (re.compile("[₀-₉₊₋]+"), lambda m: f"_{{{m[0].translate(_LOWERED)}}}"),
  (
    re.compile(r"([√∛]) *(?:(\d+(?:\.\d+)?|[A-Za-z])|\(([^()]*)\))"),
    lambda m: f"{m[1]}{{{m[2] or m[3]}}}",
  ),
)
_DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))
_MAGNITUDE = {
  "hundred": 2,
  "thousand": 3,
  "million": 6,
  "billion": 9,
  "trillion": 12,
}
_MAGNITUDES = "|".join(_MAGNITUDE)


def _primes(found: re.Match) -> str:
  return "'" * found[0].count("prime")


def _primed(found: re.Match) -> str:
  return f"{found[1]}_{10 - len(found[2])}"


_REWRITES = tuple(
  (re.compile(pattern), replacement)
  for pattern, replacement in (
    (r"\\log\{\\left\(", r"\\ln{\\left("),  # sympy's natural logarithm
    (
      r"\\operatorname\{(gcd|lcm|a?(?:sin|cos|tan)h?)\}",
      lambda m: _named(m[1]),
    ),
    (r"\\text\{ ?, ?(?:and|or) ?\}", ", "),
    (r"\^ ?e(?![A-Za-z])", "^{e}"),
    (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle)(?![A-Za-z])", ""),
    (r"\\(gcd|lcm)\{(\([^{}]*\))\}", r"\\\1\2"),
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    (r"\\varnothing", r"\\emptyset"),
    (r"\\dots(?![A-Za-z])|(?<=,) ?\.\.\.", r"\\ldots "),
    (r"(?<=\d)(?:\{,\}|,\\!)(?=\d{3})", ""),  # thousands, whatever is around
    (r"\{,\}", ","),
    (r"(?<=\d)(?<!\\)\\[,!;: ]\s*(?=\d{3})", ""),
    (r"(?<!\\)\\!", ""),
    (r"(?<!\\)\\[,;: ]|~|\\q?quad(?![A-Za-z])", " "),
    (r"\s+", " "),
    (
      rf"(?<=\d) ?({_MAGNITUDES})(?![A-Za-z])",
      lambda m: f"\\times 10^{{{_MAGNITUDE[m[1]]}}}",
    ),
    (
      rf"(?<=\d) ?\\text ?\{{ ?({_MAGNITUDES})(?![A-Za-z])([^{{}}]*)\}}",
      lambda m: (
        f"\\times 10^{{{_MAGNITUDE[m[1]]}}}"
        + (f"\\text{{{m[2]}}}" if m[2].strip() else "")
      ),
    ),
    (r"(?<=[\])]) ?U ?(?=[\[(])", r"\\cup "),
    # The grammar drops primes: an index keeps the letter apart.
    (r"\^ ?\{((?:\\prime ?)+)\}|\^ ?(\\prime)", _primes),
    (r"(?<![A-Za-z_\\\d])([A-Za-z])('{1,3})(?![A-Za-z'])", _primed),
    (r"(\d+|(?<![\\A-Za-z])[A-Za-z])!(?= ?\^)", r"(\1!)"),
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

_MANY_SIGNS = re.compile(
  r"!{5}|(?:[-+] ?){6}|(?:(?:\^|\*\*) ?(?:\d+|[A-Za-z]) ?){8}"
)

_RELATION = re.compile(
  r"[=<>]|\\(?:n?eq?|l(?:eq?|t)|g(?:eq?|t)|in)(?![A-Za-z])"
)
_EQUALS = re.compile(r"(?<![<>!:\\])=")
_LIST = re.compile(r",|;|(?<![a-z])(?:and|or)(?![a-z])")
_NUMERIC_COMMANDS = re.compile(
  r"\\(?:frac|sqrt|pi|times|cdot|div|pm|circ|text|mathrm)(?![A-Za-z])"
)
_CLOCK = re.compile(r"\d{1,2}:0\d")
_DOTS = re.compile(r"\\[lcd]?dots|\.\.\.")
# Where one of these stands in the answer and not in the gold answer, the
# problem was restated, not solved. Of calls as Python writes them, too.
_UNDONE = re.compile(
  r"\\(?:(i+nt|oint)|(sum|prod|lim|gcd|lcm|max|min|det|operatorname)"
  r"|[bp]?(mod)|l(floor|ceil))(?![A-Za-z])|\\begin\{(vmatrix)"
  r"|\\frac ?\{ ?(?:d|\\partial)[^{}]*\} ?\{ ?(?:d|\\partial) ?\\?[a-z]"
  r"|(?<![A-Za-z\\])(gcd|lcm|max|min|det|floor|ceil|sum|prod|mod|lim|int)"
  r"(?:ing|uct|it|egral|egrate|mation)?\(",
  re.IGNORECASE,
)

_CHOICE = re.compile(r"\(?([A-Za-z])\)?")
_CHOICE_WITH_TEXT = re.compile(
  r"(?:\(([A-J])\)|([A-J]) ?[).:])\s*(?!or\b|and\b|[,;])(\S.*)"
)
_CHOICES = re.compile(r"(?<![A-Za-z])[A-J][).:]|\bor\b")
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
  if not _in_latex(answer).isprintable():
    return Decision(False, "control characters", [])
  a, g = tidy(answer), tidy(gold)
  if not a:
    return Decision(False, "empty", [])
  if _IDLE_SPACE.sub("", a) == _IDLE_SPACE.sub("", g):
    return Decision(True, "same text", [])
  if choices := _compare_choices(a, g):
    return choices
  by_words = _compare_words(a, g)
  if by_words is not None:
    return Decision(by_words, "words", [])
  a = _without_list_brackets(a, g)
  fault = _fault(a, g)
  if fault:
    return Decision(False, fault, [])
  return _compare_sides(a, g)


def tidy(text: str) -> str:
  """The text without typographic variants that mean nothing."""
  text = _in_latex(text).strip()
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


def _in_latex(text: str) -> str:
  """The text with LaTeX for the signs that have no place in ASCII."""
  for pattern, replacement in _RUNS:
    text = pattern.sub(replacement, text)
  return text.translate(_CHARACTERS)


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


def _without_list_brackets(a: str, g: str) -> str:
  """`1, 2` for Python's `[1, 2]`, unless the gold answer is no list either.

  A pair in square brackets is an interval where the gold answer is one, and so
  it is where that is a relation or a tuple.
  """
  is_list = a[0] == "[" and a[-1] == "]" and _encloses(a)
  return (a[1:-1].strip() or a) if is_list and not _is_region(g) else a


def _is_region(gold: str) -> bool:
  """Whether a gold answer is an interval, a tuple, a matrix or a relation."""
  return (
    gold[0] in "(["
    or _RELATION.search(gold) is not None
    or re.search(r"\\(?:begin|cup|cap|mathbb|setminus)", gold) is not None
  )


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
  kinds = {a.unit, g.unit}
  if len(kinds) == 2 and "" not in kinds and kinds != {"deg", "rad"}:
    return False, []
  readings = [] if kinds == {"deg", "rad"} else [(g.bare, a.bare)]
  if a.unit != g.unit:
    if a.unit == "%":
      readings.append((g.bare, _hundredth(a.bare)))
    if g.unit == "%":
      readings.append((_hundredth(g.bare), a.bare))
    # A number of degrees is never a rational number of radians.
    if a.unit == "deg" and (r"\pi" in g.bare or g.unit == "rad"):
      readings.append((g.bare, _radians(a.bare)))
    if g.unit == "deg" and (r"\pi" in a.bare or a.unit == "rad"):
      readings.append((_radians(g.bare), a.bare))
  left = []
  for gold, answer in readings:
    x, y = number(answer), number(gold)
    if x is None or y is None:
      left.append((_plain(gold), _plain(answer)))
    elif is_same_number(x, y, has_decimal=_has_decimal(answer, gold)):
      return True, []
  return (None, left) if left else (False, [])


def _has_decimal(answer: str, gold: str) -> bool:
  """Whether one of two numbers is rounded: 1.0 is an integer if the gold is."""
  if "." not in answer or "." in gold:
    return "." in gold
  value = number(answer)
  return value is None or value.denominator != 1


def _plain(text: str) -> str:
  r"""`3 \times 10^{8}` for `3e8`, which is a product in LaTeX."""
  found = _SCIENTIFIC.fullmatch(text)
  if not found:
    return text
  return f"{found[1]} \\times 10^{{{found[2] or found[3]}}}"


def _hundredth(text: str) -> str:
  return f"\\frac{{{text}}}{{100}}"


def _radians(text: str) -> str:
  return f"\\frac{{({text})\\pi}}{{180}}"


def _named(name: str) -> str:
  return f"\\arc{name[1:]}" if name[0] == "a" else f"\\{name}"


def _repeating(whole: str, digits: str) -> str:
  nines = "9" * len(digits)
  return f"\\frac{{{int(whole or '0') * int(nines) + int(digits)}}}{{{nines}}}"


# ------------------------------------------------------------------- words


def _compare_choices(a: str, g: str) -> Decision | None:
  """Decides `C. 42` for `C` and the reverse; None where there is no choice.

  Where the gold answer has the text too, the text alone is an answer.
  """
  chosen, gold = _choice(a), _choice(g)
  if gold is None or (chosen is None and not gold[1]):
    return None
  if chosen is not None:
    return (
      Decision(chosen[0] == gold[0], "choice", [])
      if (chosen[1] or gold[1])
      else None
    )
  return compare(a, gold[1])


def _choice(text: str) -> tuple[str, str] | None:
  """Letter and text of `C`, `(C)`, `C. 42` and `\\textbf{(C)} 42`."""
  flat = _flat(text)
  if found := _CHOICE.fullmatch(flat):
    return found[1].upper(), ""
  found = _CHOICE_WITH_TEXT.fullmatch(flat)
  if found is None or _CHOICES.search(found[3]):
    return None
  return found[1] or found[2], found[3].strip()


def _compare_words(a: str, g: str) -> bool | None:
  """Decides choices such as (B) and answers in words; None for mathematics."""
  gold_choice, choice = _CHOICE.fullmatch(_flat(g)), _CHOICE.fullmatch(_flat(a))
  if gold_choice and choice:
    return gold_choice[1].casefold() == choice[1].casefold()
  if _CLOCK.fullmatch(units.split(g).bare):  # a time of day, and no ratio
    return units.split(a).bare == units.split(g).bare
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
  if _MANY_SIGNS.search(a):
    return "nested too deeply"
  if _TWO_NUMBERS.search(a) and number(units.split(a).bare) is None:
    return "two numbers side by side"
  if _goes_on(a) != _goes_on(g):
    return "a list that goes on"
  undone = _operations(a) - _operations(g)
  if undone:
    return f"left undone: {min(undone)}"
  brackets = {_outer(a), _outer(g)}
  if len(brackets) == 2 and "{" in brackets and "" not in brackets:
    return "a set is no tuple"
  return ""


def _goes_on(text: str) -> bool:
  """Whether it is a list with dots."""
  return "," in text and _DOTS.search(text) is not None


def _operations(text: str) -> set[str]:
  """Names of what is left to be carried out in a text."""
  return {
    next(filter(None, found.groups()), found[0]).lower()
    for found in _UNDONE.finditer(text)
  }


def _depth(text: str) -> int:
  depth = deepest = 0
  for character in text:
    depth += (character in "([{") - (character in ")]}")
    deepest = max(deepest, depth)
  return max(deepest, text.count("|") // 2)


def is_tuple(text: str) -> bool:
  """Whether one pair of round brackets holds a whole list."""
  return _outer(text) == "("


def _outer(text: str) -> str:
  """`(` or `[` or `{` of the brackets around a whole list, else nothing."""
  text = text.replace("\\{", "{").replace("\\}", "}")
  is_list = "," in text and text[0] in "([{"
  return text[0] if is_list and _encloses(text) else ""


def _encloses(text: str) -> bool:
  """Whether the bracket at the start is closed at the very end."""
  depth = 0
  for i, character in enumerate(text):
    depth += (character in "([{") - (character in ")]}")
    if depth == 0:
      return i == len(text) - 1
  return False
