"""Units, currency, percent and degree signs, taken off the end of an answer."""

import dataclasses
import re

# Words in LaTeX, such as `\text{cm}`; the group is what stands inside.
WRAPPED = r"\\(?:text(?:bf|it|normal|rm)?|math(?:rm|bf)|mbox)\s*\{([^{}\\]*)\}"

# Canonical name, then every other spelling; plurals in -s are understood.
_SPELLINGS = (
  "mm millimeter millimetre",
  "cm centimeter centimetre",
  "m meter metre",
  "km kilometer kilometre",
  "in inch inches",
  "ft foot feet",
  "yd yard",
  "mi mile",
  "g gram",
  "kg kilogram",
  "lb pound",
  "s sec second",
  "min minute",
  "h hr hour",
  "day",
  "week",
  "month",
  "yr year",
  "$ dollar usd",
  "cent ¢",
  "€ euro",
  "£",
  "% percent pct",
  "deg degree",
  "rad radian",
  "mi/h mph",
  "newton",
  "joule",
  "watt",
  "hertz",
  "liter litre",
  "milliliter millilitre",
  "milligram",
  "ton tonne",
  "ounce",
  "gallon",
  "quart",
  "pint",
  "cup",
)
# Symbols that without a \text around them are products of letters: 2mg.
_SYMBOLS = {
  "n": "newton",
  "j": "joule",
  "w": "watt",
  "hz": "hertz",
  "l": "liter",
  "ml": "milliliter",
  "mg": "milligram",
  "oz": "ounce",
  "gal": "gallon",
}
_UNITS = {
  name + plural: spellings.split()[0]
  for spellings in _SPELLINGS
  for name in spellings.split()
  for plural in ("", "s" * (len(name) > 1))  # 7ms is no length
} | {"unit": "", "units": ""}
_CURRENCY = re.compile(r"([+-]?) ?(?:\\?\$|(?<!\\)([€£])) ?(?=[\d.\\(])")
_SIGN_UNITS = (
  (re.compile(r" ?\\?%$"), "%"),
  (re.compile(r" ?(?:\^ ?(?:\{ ?\\circ ?\}|\\circ)|\\degree)$"), "deg"),
  (re.compile(r" ?\\?\$$"), "$"),
)
_BASE = re.compile(r"^(\d+)(_(?:\d|\{\d+\}))$")
_LAST_WRAPPED = re.compile(
  r"^(?P<bare>.*[\d})\].%A-Za-z]) ?"
  + WRAPPED
  + r"(?P<power> ?\^ ?\{?[23]\}?)?$"
)
# Words that change the value, and a choice in brackets.
_NO_UNIT = re.compile(
  r"\d|\([a-z]\)|^(?:and|or|if|when|for|squared|cubed|times\s+\w)\b|^times$"
  r"|\b(?:hundred|thousand|[mbt]r?illion|dozen)s?\b"
  r"|\b(?:half|halves|thirds?|fourths?|fifths?|sixths?|sevenths?|eighths?"
  r"|ninths?|tenths?|hundredths?|thousandths?)\b"
  r"|\b(?:plus|minus|to|mod|modulo|over|divided|choose|factorial|negative|not"
  r"|wrong|incorrect)\b"
  r"|\b(?:one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve)\b"
)
_LAST_WORDS = re.compile(
  r"^(?P<bare>.*(?:[\d})\].]|(?:\\pi|(?<![A-Za-z\\])[A-Za-z])(?= )))"
  r" ?(?P<unit>[a-z¢][a-z. /]*)(?P<power>\^\{?[23]\}?)?$"
)


@dataclasses.dataclass(frozen=True)
class Quantity:
  """A text without its unit.

  Attributes:
    bare: the text.
    unit: its canonical name; empty for none and for one that is not known.
  """

  bare: str
  unit: str


def split(text: str) -> Quantity:
  r"""Takes a unit off: currency, `\%`, `^\circ`, a base, `\text{cm}^2`, `cm`.

  In `\text{}` any words after a value are a unit; bare ones only if they are
  known, and a bare single letter is a variable.
  """
  if found := _CURRENCY.match(text):
    rest = split(found[1] + text[found.end() :])
    return Quantity(rest.bare, found[2] or "$")
  for pattern, unit in _SIGN_UNITS:
    if (found := pattern.search(text)) and found.start():
      return Quantity(text[: found.start()], unit)
  if found := _BASE.match(text):
    return Quantity(found[1], found[2].replace("{", "").replace("}", ""))
  if found := _LAST_WRAPPED.match(text):
    words = found[2].strip().lower()
    if not words or _NO_UNIT.search(words):
      return Quantity(text, "")
    unit = _unit(words, found["power"])
    is_word = found["bare"][-1].isalpha() or re.search(
      WRAPPED + r" ?$", found["bare"]
    )
    if is_word and unit is None:
      return Quantity(text, "")  # words behind a letter may be anything
    # `50\% \text{ of them}`: the sign before unknown words is the unit.
    bare = found["bare"].strip()
    return Quantity(bare, unit) if unit else split(bare)
  if found := _LAST_WORDS.match(text):
    words = found["unit"].strip()
    unit = _unit(words, found["power"])
    first = words.partition("/")[0].strip()
    if unit is not None and len(first) > 1 and words not in _SYMBOLS:
      return Quantity(found["bare"].strip(), unit)
  return Quantity(text, "")


def _unit(words: str, power: str | None) -> str | None:
  """Canonical name of a unit, of a quotient too; None if it is not known."""
  over = re.fullmatch(r"(.+?)(?: ?/ ?| per )(.+)", words)
  if over:
    parts = _unit(over[1], None), _unit(over[2], power)
    return "/".join(filter(None, parts)) if all(parts) else None
  square = re.match(r"(sq(?:uare)?\.?|cu(?:bic)?\.?) (.*)", words)
  if square:
    words = square[2]
    power = "2" if square[1].startswith("sq") else "3"
  name = _UNITS.get(words, _SYMBOLS.get(words))
  if name is None:
    return None
  exponent = re.sub(r"\D", "", power or "")
  return f"{name}^{exponent}" if name and exponent else name
