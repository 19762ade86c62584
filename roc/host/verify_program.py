"""The trusted program that compares two answers as mathematics.

The sandbox runs this text, one process a check; nothing imports it. It reads
{"conditions": [[[gold, answer], ...], ...]} on stdin and prints one line of
JSON: all conditions must hold, by one of their pairs each. {"batch": [...]}
holds many such conditions, and the verdicts come in a list.

Answers are data here and never code. They are parsed as LaTeX by a grammar;
sympy's own parser, which evaluates Python and which the grammar reaches with
the digits of numbers, is replaced by one that takes numbers and names only.
"""

import io
import json
import logging
import re
import sys
import typing

import latex2sympy2_extended
import math_verify
import math_verify.grader
import sympy
import sympy.parsing.sympy_parser
import sympy.physics.units  # sympy loads it late, through the parser below

_NORMALIZATION = latex2sympy2_extended.NormalizationConfig(
  basic_latex=True,
  units=False,  # would take the t off 3t
  malformed_operators=True,
  nits=True,
  boxed="none",
  equations=False,
)
_MAX_EXPONENT = 10**5
_MAX_FACTORIAL = 10**4
_DIGITS = 50
_SAME_DIGITS = sympy.Rational(1, 10**30)
_TOLERANCE: typing.Any = sympy.Rational(1, 10**6)
_HARMLESS = re.compile(
  r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})? ?|[A-Za-z]+"
)


def main() -> None:
  """Reads the question, keeps stdout for the verdict alone, prints it."""
  logging.disable(logging.CRITICAL)
  out, sys.stdout = sys.stdout, io.StringIO()
  guard_parser()
  question = json.loads(sys.stdin.read())
  if "batch" in question:
    verdicts = [answer_question(one) for one in question["batch"]]
    out.write(json.dumps({"verdicts": verdicts}) + "\n")
  else:
    out.write(json.dumps(answer_question(question["conditions"])) + "\n")
  out.flush()


def guard_parser() -> None:
  """Replaces sympy's evaluating parser by one for numbers and names."""
  parse = sympy.parsing.sympy_parser.parse_expr

  def parse_harmless(text, *args, **kwargs):
    if not _HARMLESS.fullmatch(text):
      raise ValueError("only numbers are read here")
    return parse(text, *args, **kwargs)

  sympy.parsing.sympy_parser.parse_expr = parse_harmless


def answer_question(conditions: list) -> dict[str, typing.Any]:
  """Returns the verdict on all conditions."""
  for readings in conditions:
    verdict = {"status": "ok", "is_equal": False, "reason": "another value"}
    for gold_text, answer_text in readings:
      verdict = compare(gold_text, answer_text)
      if verdict["status"] != "ok" or verdict["is_equal"]:
        break
    if verdict["status"] != "ok" or not verdict["is_equal"]:
      return verdict
  return {"status": "ok", "is_equal": True, "reason": "equal"}


def compare(gold_text: str, answer_text: str) -> dict[str, typing.Any]:
  """Compares one pair; an answer that is no mathematics is not equal."""
  is_complex = math_verify.grader.should_treat_as_complex(
    gold_text
  ) or math_verify.grader.should_treat_as_complex(answer_text)
  gold = parse(gold_text, is_complex)
  if gold is None or gold.has(sympy.nan, sympy.zoo):
    return {
      "status": "bad_gold",
      "is_equal": None,
      "reason": "the gold answer is no mathematics",
    }
  answer = parse(answer_text, is_complex)
  if answer is None:
    return not_equal("no mathematics")
  if gold == answer:
    return {"status": "ok", "is_equal": True, "reason": "same expression"}
  if is_too_large(answer) or is_too_large(gold):
    return not_equal("too large to compare")
  is_equal = compare_values(gold, answer)
  if is_equal is None:
    try:
      is_equal = math_verify.verify(
        gold,
        answer,
        allow_set_relation_comp=True,
        timeout_seconds=None,  # the whole process is killed instead
        raise_on_error=True,
      )
    except MemoryError:
      raise
    except Exception as error:
      return not_equal(f"not comparable: {type(error).__name__}")
  return {
    "status": "ok",
    "is_equal": bool(is_equal),
    "reason": "equal" if is_equal else "another value",
  }


def not_equal(reason: str) -> dict[str, typing.Any]:
  """A verdict that the answer is wrong."""
  return {"status": "ok", "is_equal": False, "reason": reason}


def parse(text: str, is_complex: bool) -> typing.Any:
  """A sympy object, or None for text that is no mathematics."""
  try:
    parsed = latex2sympy2_extended.latex2sympy(
      text, is_real=not is_complex, normalization_config=_NORMALIZATION
    )
  except MemoryError:
    raise
  except Exception:  # the grammar raises bare Exception
    return None
  is_sympy = isinstance(parsed, sympy.Basic | sympy.MatrixBase)
  return parsed if is_sympy else None


def is_too_large(value: typing.Any) -> bool:
  """Whether evaluating a power or a factorial in it would take too long."""
  if not isinstance(value, sympy.Basic):
    return False
  node: typing.Any
  for node in sympy.postorder_traversal(value):
    if isinstance(node, sympy.Pow):
      limit, size = _MAX_EXPONENT, node.exp
    elif isinstance(node, sympy.factorial | sympy.binomial):
      limit, size = _MAX_FACTORIAL, node.args[0]
    else:
      continue
    # Inner nodes come first, so that this value is small or found too large.
    if size.is_number:
      size = sympy.N(size, 15)
      if size.is_Float and abs(size) > limit:
        return True
  return False


def compare_values(gold: typing.Any, answer: typing.Any) -> bool | None:
  """Compares two real numbers by value; None where they are not both such."""
  values: list[typing.Any] = []
  for value in (gold, answer):
    if not isinstance(value, sympy.Expr) or not value.is_number:
      return None
    number: typing.Any = value.doit().evalf(_DIGITS)
    if not number.is_Float and not number.is_Rational:
      return None
    values.append(number)
  difference = abs(values[0] - values[1])
  if gold.has(sympy.Float) or answer.has(sympy.Float):
    return bool(difference <= _TOLERANCE * min(1, abs(values[0])))
  scale = max(abs(values[0]), abs(values[1]))
  # What is left of zero by rounding has no digits to compare.
  is_zero = scale < sympy.Rational(1, 10 ** (_DIGITS - 10))
  return bool(is_zero or difference <= _SAME_DIGITS * scale)


if __name__ == "__main__":
  main()
