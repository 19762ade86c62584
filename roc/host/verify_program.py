r"""The trusted program that compares two answers as mathematics.

The sandbox runs this text, one process a check; nothing imports it, so that all
of it stands in one file. It reads {"conditions": [[[gold, answer], ...], ...]}
on stdin and prints one line of JSON: all conditions must hold, by one of their
pairs each. {"batch": [...]} holds many such conditions, and the verdicts come
in a list.

Answers are data here and never code. LaTeX is read by a grammar; sympy's own
parser, which evaluates Python and which the grammar reaches with the digits of
numbers, is replaced by one that takes numbers and names only. What Python and
sympy print is read from a syntax tree of which only listed names mean anything.

Two numbers are compared by their difference. A rational one is exact; any other
is evaluated to more bits than the integers and powers in it have together, so
that it shows unless it is zero. Expressions with letters are compared at a few
points: rational numbers drawn by the letters' names.
"""

import ast
import collections
import functools
import hashlib
import io
import itertools
import json
import logging
import re
import sys
import types
import typing

import latex2sympy2_extended
import latex2sympy2_extended.latex2sympy2
import latex2sympy2_extended.logic
import latex2sympy2_extended.sets
import math_verify
import math_verify.grader
import sympy
import sympy.core.evalf
import sympy.core.function
import sympy.parsing.sympy_parser
import sympy.physics.units  # sympy loads it late, through the parser below

# Objects of sympy: its own annotations are too wide to be of use here.
Any = typing.Any
_NORMALIZATION = latex2sympy2_extended.NormalizationConfig(
  basic_latex=True,
  units=False,  # would take the t off 3t
  malformed_operators=True,
  nits=True,
  boxed="none",
  equations=False,
)
_MAX_BITS = 2**21  # of a number that is computed exactly
_MAX_FRACTION_BITS = 2**18  # the time to reduce one grows with their square
_MAX_FACTORIAL = 10**5
_MAX_PIECES = 16  # of two unions that are simplified
_MAX_DEGREE = 8  # of an inequality that is solved
_MAX_PRODUCT = 10**6  # bits of the factors of a binomial coefficient
_MAX_PRECISION = 40_000  # bits of a number that is not rational
_TOLERANCE: Any = sympy.Rational(1, 10**6)
_MIN_POINTS = 2
_HARMLESS = re.compile(
  r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})? ?|[A-Za-z]+"
)


class TooLarge(Exception):
  """A number has too many digits to be computed."""


class Undefined(Exception):
  """There is no finite value."""


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
  """Keeps the grammar from evaluating what it reads.

  sympy's evaluating parser takes numbers and names only, and a gcd stays one:
  sympy makes 1 of that of two letters, as if they were indeterminates. A
  binomial coefficient and the gamma function may be too large to be evaluated.
  """
  parse = sympy.parsing.sympy_parser.parse_expr

  def parse_harmless(text, *args, **kwargs):
    if not _HARMLESS.fullmatch(text):
      raise ValueError("only numbers are read here")
    return parse(text, *args, **kwargs)

  sympy.parsing.sympy_parser.parse_expr = parse_harmless
  grammar = latex2sympy2_extended.latex2sympy2

  def keep_gcd_lcm(self, name, args):
    return sympy.Function(name)(*args)

  unevaluated: Any = types.ModuleType("sympy")
  vars(unevaluated).update(vars(sympy))
  for function in (sympy.binomial, sympy.gamma):
    kept = functools.partial(function, evaluate=False)
    setattr(unevaluated, function.__name__, kept)
  setattr(grammar, "sympy", unevaluated)  # noqa: B010
  setattr(grammar._Latex2Sympy, "handle_gcd_lcm", keep_gcd_lcm)  # noqa: B010


def answer_question(conditions: list) -> dict[str, Any]:
  """Returns the verdict on all conditions."""
  for readings in conditions:
    verdict = not_equal("another value")
    for gold_text, answer_text in readings:
      verdict = compare(gold_text, answer_text)
      if verdict["status"] != "ok" or verdict["is_equal"]:
        break
    if verdict["status"] != "ok" or not verdict["is_equal"]:
      return verdict
  return {"status": "ok", "is_equal": True, "reason": "equal"}


def compare(gold_text: str, answer_text: str) -> dict[str, Any]:
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
  is_list = isinstance(gold, sympy.FiniteSet)  # 1,1,2 and 1,2,2 are one set
  if gold == answer and not is_list:
    return {"status": "ok", "is_equal": True, "reason": "same expression"}
  try:
    is_equal = are_equal(gold, answer)
  except MemoryError:
    raise
  except TooLarge:
    return not_equal("too large to compare")
  except Exception as error:  # sympy raises many kinds
    return not_equal(f"not comparable: {type(error).__name__}")
  reason = "equal" if is_equal else "another value"
  return {"status": "ok", "is_equal": is_equal, "reason": reason}


def not_equal(reason: str) -> dict[str, Any]:
  """A verdict that the answer is wrong."""
  return {"status": "ok", "is_equal": False, "reason": reason}


# ------------------------------------------------------------------- reading


def parse(text: str, is_complex: bool) -> Any:
  """A sympy object, or None for text that is no mathematics."""
  if _PRINTED.search(text) and "\\" not in text:
    try:
      return read_printed(text)
    except MemoryError:
      raise
    except Exception:  # not Python after all
      pass
  try:
    parsed = latex2sympy2_extended.latex2sympy(
      expand_signs(_OO.sub(r"\\infty ", text)),
      is_real=not is_complex,
      normalization_config=_NORMALIZATION,
    )
  except MemoryError:
    raise
  except Exception:  # the grammar raises bare Exception
    return None
  is_sympy = isinstance(parsed, sympy.Basic | sympy.MatrixBase)
  return parsed if is_sympy else None


def expand_signs(text: str) -> str:
  r"""Writes each member of a list that holds `\pm` out with either sign.

  `\mp` is the other sign; two `\pm` without it are independent.
  """
  if not re.search(r"\\[pm]m(?![A-Za-z])", text):
    return text
  members = []
  for member in split_list(text):
    parts = re.split(r"\\([pm])m(?![A-Za-z])", member)
    kinds, n = parts[1::2], len(parts) // 2
    is_free = "m" not in kinds and n <= 2
    signs = itertools.product("+-", repeat=n if is_free else min(n, 1))
    for chosen in signs:
      given = chosen if is_free else chosen * n
      flipped = [
        sign if kind == "p" else {"+": "-", "-": "+"}[sign]
        for sign, kind in zip(given, kinds, strict=True)
      ]
      pieces = zip(parts[0::2], [*flipped, ""], strict=True)
      members.append("".join(itertools.chain.from_iterable(pieces)))
  return ",".join(members)


def split_list(text: str) -> list[str]:
  """Splits at the commas that no bracket encloses."""
  members, depth = [""], 0
  for character in text:
    depth += (character in "([{") - (character in ")]}")
    if character == "," and depth == 0:
      members.append("")
    else:
      members[-1] += character
  return members


_OO = re.compile(r"(?<![A-Za-z\\])oo(?![A-Za-z])")
_GREEK = (
  "alpha|beta|delta|epsilon|zeta|eta|theta|iota|kappa|lambda|lamda|mu|nu|xi|rho"
  "|sigma|tau|upsilon|phi|chi|psi|omega"
)
_PRINTED = re.compile(
  r"\*|(?<![A-Za-z\\])(?:sqrt|cbrt|root|exp|log(?:2|10)?|ln|sinh?|cosh?|tanh?|cot|sec|csc|a(?:rc)?sin"
  r"|a(?:rc)?cos|a(?:rc)?tan|Abs|abs|factorial|binomial|comb|gcd|lcm|Max|max"
  r"|Min|min|floor|ceil|ceiling|Rational|Fraction|Interval|Union|Matrix"
  r"|array|float\d+|int\d+|FiniteSet|Intersection|Complement|Eq|Ne|gamma|zeta|erf|LambertW)\b[.(]"
  rf"|(?<![A-Za-z\\])(?:{_GREEK}|pi|oo|inf|EmptySet|Reals|Integers|Rationals"
  r"|Naturals|Complexes|I)(?![A-Za-z])|\d[jJ]\b|\[\[|(?<![A-Za-z\\])(?!(?<=\d)[eE])[A-Za-z]\d|\)\s*[&|]\s*\("
)
_TOKEN = re.compile(
  r"\s*(?:(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?j?)"
  r"|(?P<name>[^\W\d]\w*)|(?P<op>\*\*|[<>=!]=|[-+*/^(),\[\]{}<>=.&|;]))"
)
# A letter before these in brackets is a function, as the grammar has it.
_ARGUMENTS = re.compile(
  r"\s*\(\s*-?[\w.]+(?:(?:\^|\*\*)\w+)?(?:\s*,\s*-?[\w.]+)*\s*\)"
)
_LETTER = re.compile(rf"(?:{_GREEK}|[A-Za-z])(?:_?\d+|_[A-Za-z])?")
_WRITTEN = {"^": "**", ";": ",", "=": "==", "lambda": "lamda"}
_MODULES = frozenset({"math", "np", "numpy", "sympy", "sp", "S", "cmath"})
_CONSTANTS: dict[str, Any] = {
  "pi": sympy.pi,
  "E": sympy.E,
  "e": sympy.E,
  "I": sympy.I,
  "i": sympy.I,
  "oo": sympy.oo,
  "inf": sympy.oo,
  "infinity": sympy.oo,
  "EmptySet": sympy.S.EmptySet,
  "Reals": sympy.S.Reals,
  "Integers": sympy.S.Integers,
  "Rationals": sympy.S.Rationals,
  "Naturals": sympy.S.Naturals,
  "Complexes": sympy.S.Complexes,
  "EulerGamma": sympy.EulerGamma,
  "GoldenRatio": sympy.GoldenRatio,
  "Catalan": sympy.Catalan,
}
_FUNCTIONS: dict[str, Any] = {
  **{
    name: getattr(sympy, name)
    for name in re.findall(
      r"\w+",
      "exp log sin cos tan cot sec csc asin acos atan acot asec acsc sinh cosh"
      " tanh coth asinh acosh atanh Abs factorial binomial floor ceiling Max"
      " Min re im conjugate arg sign gamma zeta erf LambertW",
    )
  },
  "ln": sympy.log,
  "arcsin": sympy.asin,
  "arccos": sympy.acos,
  "arctan": sympy.atan,
  "abs": sympy.Abs,
  "comb": sympy.binomial,
  "ceil": sympy.ceiling,
  "max": sympy.Max,
  "min": sympy.Min,
  "gcd": sympy.Function("gcd"),
  "lcm": sympy.Function("lcm"),
}
_RELATIONS: dict[type, Any] = {
  ast.Lt: sympy.StrictLessThan,
  ast.LtE: sympy.LessThan,
  ast.Gt: sympy.StrictGreaterThan,
  ast.GtE: sympy.GreaterThan,
  ast.Eq: sympy.Eq,
  ast.NotEq: sympy.Ne,
}


def read_printed(text: str) -> Any:
  """Reads what Python or sympy prints, or a person types so: `2*sqrt(3)/3`.

  Raises:
    Exception: of any kind, for text that is nothing of that.
  """
  body = ast.parse(with_products(text), mode="eval").body
  if isinstance(body, ast.Tuple) and body.elts:
    has_brackets = body.elts[0].col_offset > body.col_offset
    if not has_brackets:
      return latex2sympy2_extended.sets.FiniteSet(*map(build, body.elts))
  return build(body)


def with_products(text: str) -> str:
  """Writes `2sqrt(3)` with `*` and `^` as `**`."""
  written: list[str] = []
  before, divided = "", False
  position = 0
  text = text.strip()
  while position < len(text):
    found = _TOKEN.match(text, position)
    if not found:
      raise ValueError("not Python")
    position = found.end()
    kind, token = str(found.lastgroup), str(found[found.lastgroup or 0])
    is_called = kind == "name" and _ARGUMENTS.match(text, position)
    ends = before in ("number", ")") or (
      before == "name" and written[-1] not in _CALLED
    )
    starts = kind == "name" or token == "("
    if ends and starts and token not in ("and", "or"):
      if divided:
        raise ValueError("1/2x can be read in two ways")
      written.append("*")
    divided = (written or [""])[-1] == "/" and kind == "number"
    written.append(_WRITTEN.get(token, token))
    before = token if token == ")" else kind
    if is_called and _LETTER.fullmatch(token):
      before = "function"
  return " ".join(written)


_SETS: dict[str, Any] = {
  "Interval": lambda start, end: sympy.Interval(start, end),
  "Interval.open": sympy.Interval.open,
  "Interval.Lopen": sympy.Interval.Lopen,
  "Interval.Ropen": sympy.Interval.Ropen,
  "Union": lambda *sets: sympy.Union(*sets, evaluate=False),
  "Intersection": lambda *sets: sympy.Intersection(*sets, evaluate=False),
  "Complement": lambda *sets: sympy.Complement(*sets, evaluate=False),
  "FiniteSet": latex2sympy2_extended.sets.FiniteSet,
  "Matrix": lambda rows: matrix(rows),
  "array": lambda members: members,
  "log2": lambda x: sympy.log(x, 2, evaluate=False),
  "log10": lambda x: sympy.log(x, 10, evaluate=False),
  **{
    # numpy's repr of a number
    name: lambda number: number
    for name in ("float32", "float64", "int32", "int64")
  },
  "Eq": lambda *sides: sympy.Eq(*sides, evaluate=False),
  "Ne": lambda *sides: sympy.Ne(*sides, evaluate=False),
  "sqrt": lambda x: sympy.Pow(x, sympy.S.Half, evaluate=False),
  "cbrt": lambda x: sympy.Pow(x, sympy.Rational(1, 3), evaluate=False),
  "root": lambda x, n: sympy.Pow(x, quotient(sympy.S.One, n), evaluate=False),
  "Rational": lambda p, q=sympy.S.One: quotient(p, q),
  "Fraction": lambda p, q=sympy.S.One: quotient(p, q),
}
_CALLED = (
  _FUNCTIONS.keys()
  | {name.partition(".")[0] for name in _SETS}
  | {
    "open",
    "Lopen",
    "Ropen",
    "and",
    "or",
  }
)


def quotient(p: Any, q: Any) -> Any:
  """p / q, not evaluated unless both are integers."""
  if p.is_Integer and q.is_Integer:
    return sympy.Rational(p, q)
  return sympy.Mul(p, sympy.Pow(q, -1, evaluate=False), evaluate=False)


def matrix(rows: Any) -> Any:
  """A matrix of a list of rows, or a column of a list of entries."""
  return sympy.Matrix(
    [list(row) if isinstance(row, sympy.Tuple) else [row] for row in rows]
  )


def build(node: ast.expr) -> Any:
  """The sympy object of a syntax tree; nothing in it is evaluated.

  Raises:
    ValueError: of anything else than listed names and plain operators.
  """
  if isinstance(node, ast.Constant):
    return build_number(node.value)
  if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
    operand = build(node.operand)
    if isinstance(node.op, ast.UAdd):
      return operand
    return -operand if operand.is_Number else negative(operand)
  if isinstance(node, ast.BinOp):
    return build_operation(node.op, build(node.left), build(node.right))
  if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.And):
    return latex2sympy2_extended.logic.And(*map(build, node.values))
  if isinstance(node, ast.Tuple | ast.List):
    return sympy.Tuple(*map(build, node.elts))
  if isinstance(node, ast.Set):
    return latex2sympy2_extended.sets.FiniteSet(*map(build, node.elts))
  if isinstance(node, ast.Compare):
    sides = [build(side) for side in (node.left, *node.comparators)]
    relations = [
      _RELATIONS[type(op)](left, right, evaluate=False)
      for op, left, right in zip(node.ops, sides[:-1], sides[1:], strict=True)
    ]
    if len(relations) == 1:
      return relations[0]
    return latex2sympy2_extended.logic.And(*relations)
  if isinstance(node, ast.Call) and not node.keywords:
    name = called(node.func)
    args = list(map(build, node.args))
    if name in _SETS:
      return _SETS[name](*args)
    if name not in _FUNCTIONS and _LETTER.fullmatch(name):
      return sympy.Function(name)(*args)
    if name in ("gcd", "lcm"):
      return _FUNCTIONS[name](*args)
    return _FUNCTIONS[name](*args, evaluate=False)
  return build_name(called(node))


def called(node: ast.expr) -> str:
  """The name of a node without that of its module: `sqrt`, `Interval.open`."""
  if isinstance(node, ast.Name):
    return node.id
  if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
    module = node.value.id
    return node.attr if module in _MODULES else f"{module}.{node.attr}"
  raise ValueError("no name")


def build_number(number: object) -> Any:
  """An exact integer, a decimal, or an imaginary number."""
  if isinstance(number, bool):
    raise ValueError("no number")
  if isinstance(number, int):
    return sympy.Integer(number)
  if isinstance(number, float):
    return sympy.Float(repr(number))
  if isinstance(number, complex):
    return sympy.Mul(build_number(number.imag), sympy.I, evaluate=False)
  raise ValueError("no number")


def build_name(name: str) -> Any:
  """A constant, or a letter with or without an index."""
  if name in _CONSTANTS:
    return _CONSTANTS[name]
  name = name.lower()
  if _LETTER.fullmatch(name):
    return sympy.Symbol(name, real=True)
  if name.isalpha() and name.isascii() and len(name) <= 3:
    return sympy.Mul(*map(build_name, name), evaluate=False)
  raise ValueError("an unknown name")


def negative(value: Any) -> Any:
  return sympy.Mul(-1, value, evaluate=False)


def build_operation(op: ast.operator, left: Any, right: Any) -> Any:
  """The object of a binary operator, not evaluated."""
  match op:
    case ast.Add():
      return sympy.Add(left, right, evaluate=False)
    case ast.Sub():
      return sympy.Add(left, negative(right), evaluate=False)
    case ast.Mult():
      return sympy.Mul(left, right, evaluate=False)
    case ast.Div():
      return quotient(left, right)
    case ast.Pow():
      return sympy.Pow(left, right, evaluate=False)
    case ast.BitAnd():
      return latex2sympy2_extended.logic.And(left, right)
    case ast.BitOr() if isinstance(left, sympy.Set):
      return sympy.Union(left, right, evaluate=False)
    case ast.BitOr():
      return sympy.Or(left, right, evaluate=False)
  raise ValueError("an unknown operator")


# -------------------------------------------------------------------- values


def value(node: Any, at: dict[str, Any]) -> Any:
  """The exact value of an expression, evaluated from the inside outwards.

  Args:
    node: an expression; decimals count as the fractions that they write.
    at: values of letters, by their keys; others are kept.

  Raises:
    TooLarge: a number in it has more than _MAX_BITS.
    Undefined: it has no finite value.
  """
  if node.is_Float:
    return sympy.Rational(str(node))
  if node.is_Symbol:
    return letter(node, at)
  if node in (sympy.nan, sympy.zoo):
    raise Undefined
  if not node.args:
    return node
  if isinstance(node, sympy.UnevaluatedExpr):
    return value(node.args[0], at)
  if isinstance(node, _BINDING):
    return bound_value(node, at)
  args = [value(arg, at) for arg in node.args]
  if isinstance(node, sympy.core.function.AppliedUndef):
    return function_value(str(node.func).strip("\\"), args)
  check_size(node, args)
  found = node.func(*args)
  if found.has(sympy.nan, sympy.zoo):
    raise Undefined
  is_limit = isinstance(node, sympy.Expr) and any(a.is_infinite for a in args)
  if is_limit and found not in (sympy.oo, -sympy.oo):
    raise Undefined  # 1/oo is no number
  return found


_BINDING = (
  sympy.Sum,
  sympy.Product,
  sympy.Integral,
  sympy.Limit,
  sympy.Derivative,
)


def key(name: str) -> str:
  """A letter's name in either notation: `x_{1}` is `x1`, and `R` is `r`."""
  return re.sub(r"[^\w]|_", "", name).lower().replace("lamda", "lambda")


def letter(node: Any, at: dict[str, Any]) -> Any:
  name = key(node.name)
  constants = {"e": sympy.E, "i": sympy.I}
  return at.get(name, constants.get(name, node))


def bound_value(node: Any, at: dict[str, Any]) -> Any:
  """The value of a sum, product, integral, limit or derivative."""
  found = node.doit()
  if not isinstance(found, _BINDING):
    return value(found, at)
  letters: Any = found.free_symbols
  return found.subs({s: at[key(s.name)] for s in letters if key(s.name) in at})


def function_value(name: str, args: list) -> Any:
  """The value of a function that the grammar does not know.

  Of integers gcd and lcm are known, and so is zeta. Any other has a value drawn
  by its name and arguments, so that it equals nothing but itself.
  """
  if name in ("gcd", "lcm") and args:
    if all(arg.is_Integer for arg in args):
      return getattr(sympy, "i" + name)(*args) if len(args) > 1 else args[0]
    args = sorted(args, key=sympy.default_sort_key)
  if name == "zeta" and len(args) == 1:
    return sympy.zeta(args[0])
  return draw(
    f"{name.lower()}({', '.join(map(sympy.srepr, args))})", 0, n_bytes=2
  )


def check_size(node: Any, args: list) -> None:
  """Refuses what would take too long to evaluate.

  Raises:
    TooLarge: for a power, exponential, factorial or binomial.
  """
  size = 0.0
  if isinstance(node, sympy.Pow | sympy.exp):
    base, exponent = args if isinstance(node, sympy.Pow) else (sympy.E, args[0])
    if base in (0, 1, -1):
      return
    power = magnitude(exponent)
    if exponent.is_Rational:
      size = bits(base) * power
    size = max(size, abs(log2(base)) * power)
    if base.is_Rational and not base.is_Integer:
      size *= _MAX_BITS / _MAX_FRACTION_BITS
  elif isinstance(node, sympy.Add | sympy.Mul):
    numbers = [arg for arg in args if arg.is_Rational]
    if not all(number.is_Integer for number in numbers):
      size = sum(map(bits, numbers)) * _MAX_BITS / _MAX_FRACTION_BITS
  elif isinstance(node, sympy.factorial | sympy.gamma | sympy.binomial):
    top = magnitude(args[0])
    if isinstance(node, sympy.binomial) and args[1].is_number:
      below = magnitude(args[1])
      if args[0].is_Integer:
        below = min(below, magnitude(args[0] - args[1]))
      # sympy multiplies so many factors, of at least so many bits, one by one
      if below * max(17, bits(args[0])) > _MAX_PRODUCT:
        raise TooLarge
    elif top > _MAX_FACTORIAL:
      raise TooLarge
  if size > _MAX_BITS:
    raise TooLarge


def magnitude(number: Any) -> float:
  """The absolute value, roughly; 0 for what is no number."""
  return 2.0 ** min(log2(number), 1000.0) if number.is_number else 0.0


def log2(number: Any) -> float:
  """The logarithm of the absolute value, roughly; 0 for what has none."""
  if number.is_Rational:
    return float(
      number.p and abs(number.p).bit_length() - number.q.bit_length()
    )
  if not number.is_number:
    return 0.0
  found = abs(number.evalf(15))
  if not found.is_Float or not found:
    return 0.0
  _, _, exponent, n_bits = found._mpf_
  return float(exponent + n_bits)


def bits(number: Any) -> int:
  """Bits of all integers in a number and of its powers that are none."""
  n_bits = 0
  for node in sympy.preorder_traversal(number):
    if node.is_Rational:
      n_bits += abs(node.p).bit_length() + node.q.bit_length()
    elif isinstance(node, _POWERS):
      n_bits += int(abs(log2(node)))
    elif isinstance(node, _SATURATED):  # 1 - tanh(x) is about exp(-2x)
      n_bits += int(3 * min(magnitude(node.args[0]), 1e3) ** 2)
  return n_bits


_NO_NUMBERS = (
  sympy.nan,
  sympy.zoo,
  sympy.oo,
  -sympy.oo,
  sympy.AccumBounds,
)
_POWERS = (sympy.Pow, sympy.exp, sympy.gamma, sympy.factorial)
_SATURATED = (sympy.sinh, sympy.cosh, sympy.tanh, sympy.coth, sympy.erf)


def is_zero(number: Any) -> bool:
  """Whether an exact number is 0.

  Raises:
    TooLarge: its integers have more than _MAX_PRECISION bits.
    Undefined: it is no number.
  """
  if number.is_Rational:
    return number.p == 0
  if number.is_infinite:
    return False
  if not number.is_number or number.has(*_NO_NUMBERS):
    raise Undefined
  # Twice all bits, and the same again for what cancels: sums of k roots of
  # integers below n come as close to each other as n^(1/2 - k), no closer.
  precision = 128 + 2 * bits(number)
  if precision > _MAX_PRECISION:
    raise TooLarge
  evaluation: Any = sympy.core.evalf
  parts = evaluation.evalf(number, 10, {"maxprec": 2 * precision})
  if parts is sympy.zoo:
    raise Undefined
  found = [part for part in parts[:2] if part is not None]
  if any(not part[1] and part[2] for part in found):  # infinite, or no number
    raise Undefined
  return not any(part[1] and part[2] + part[3] > -precision for part in found)


def draw(name: str, index: int, *, n_bytes: int = 3) -> Any:
  """A rational number for a letter, of either sign and of several sizes."""
  digest = hashlib.sha256(f"{name} {index}".encode()).digest()
  part = int.from_bytes(digest[:n_bytes], "big")
  size = (3, 1, 40, 1, 3000, 7)[index]
  number = sympy.Rational(size * (4 * part + 1), 2 ** (8 * n_bytes + 1) - 3)
  return -number if index in (1, 2, 5) else number


def points(*expressions: Any) -> list[dict[str, Any]]:
  """Values of the letters at which expressions are compared.

  Of many digits for quotients of polynomials, which are computed exactly and
  could be equal at few of all rational numbers; of few for others.
  """
  names = {
    key(symbol.name) for one in expressions for symbol in one.free_symbols
  } - {"e", "i"}
  if not names:
    return [{}]
  n_bytes = 3 if all(map(is_quotient, expressions)) else 1
  return [
    {name: draw(name, index, n_bytes=n_bytes) for name in names}
    for index in range(6)
  ]


def is_quotient(expression: Any) -> bool:
  """Whether it is one of two polynomials."""
  return all(
    node.is_Add
    or node.is_Mul
    or node.is_Symbol
    or node.is_Number
    or (node.is_Pow and node.exp.is_Integer)
    for node in sympy.preorder_traversal(expression)
  )


# ---------------------------------------------------------------- comparisons


def are_equal(gold: Any, answer: Any) -> bool:
  """Whether two objects are the same: numbers, expressions, sets, relations."""
  gold, answer = map(with_or, without_names(gold, answer))
  if is_condition(gold) or is_condition(answer):
    return are_equal_conditions(gold, answer)
  if is_matrix(gold) or is_matrix(answer):
    return are_equal_matrices(gold, answer)
  if is_collection(gold) or is_collection(answer):
    return are_equal_collections(gold, answer)
  if isinstance(gold, sympy.Expr) and isinstance(answer, sympy.Expr):
    return is_same_word(gold, answer) or are_equal_expressions(gold, answer)
  return bool(gold == answer)


def without_names(gold: Any, answer: Any) -> tuple[Any, Any]:
  """Takes the name off the one of two that alone has one: `x=5` and `5`."""
  gold_side, answer_side = named(gold), named(answer)
  if answer_side is not None and not is_equation(gold):
    return gold, answer_side[1]
  if gold_side is not None and not is_equation(answer):
    return gold_side[1], answer
  if gold_side is not None:
    gold = sympy.Eq(*gold_side, evaluate=False)
  if answer_side is not None:
    answer = sympy.Eq(*answer_side, evaluate=False)
  return gold, answer


def with_or(node: Any) -> Any:
  """A condition of the list `x > 2, x < -2`."""
  if not isinstance(node, sympy.FiniteSet) or not all(
    is_condition(part) and not is_equation(part) for part in node.args
  ):
    return node
  return sympy.Or(*node.args, evaluate=False)


def is_equation(node: Any) -> bool:
  return all(isinstance(part, sympy.Eq) for part in conjuncts(node))


def conjuncts(node: Any) -> list:
  """The conditions that all must hold."""
  return (
    list(getattr(node, "_unsorted_args", node.args))
    if isinstance(node, sympy.And)
    else [node]
  )


def named(node: Any) -> tuple[Any, Any] | None:
  """Name and value of `x = 5` and of the chain `x = 2+3 = 5`."""
  parts = conjuncts(node)
  is_name = latex2sympy2_extended.is_expr_of_only_symbols
  if not is_equation(node) or not is_name(parts[0].lhs):
    return None
  return parts[0].lhs, parts[-1].rhs


def is_condition(node: Any) -> bool:
  return isinstance(
    node, sympy.core.relational.Relational | sympy.logic.boolalg.BooleanFunction
  )


def is_matrix(node: Any) -> bool:
  return isinstance(node, sympy.MatrixBase | sympy.MatrixExpr)


def is_collection(node: Any) -> bool:
  return isinstance(node, sympy.Set | sympy.Tuple)


def is_same_word(gold: Any, answer: Any) -> bool:
  """Whether a name of several letters is the other's product of letters."""
  names = []
  for node in (gold, answer):
    factors: Any = node.args if isinstance(node, sympy.Mul) else [node]
    if not all(f.is_Symbol or f == sympy.E for f in factors):
      return False
    names.append("".join("e" if f == sympy.E else f.name for f in factors))
  is_word = any(
    node.is_Symbol and len(node.name) > 1 for node in (gold, answer)
  )
  return is_word and names[0].lower() == names[1].lower()


def are_equal_expressions(gold: Any, answer: Any) -> bool:
  """Whether two expressions have the same value wherever both have one."""
  has_decimal = gold.has(sympy.Float) or has_fraction_digits(answer)
  n_compared = 0
  for at in points(gold, answer):
    try:
      pair = value(gold, at), value(answer, at)
      is_same = is_same_value(*pair, has_decimal=has_decimal and not at)
    except (TooLarge, Undefined):
      if not at:
        return is_same_form(gold, answer)
      continue
    if not is_same:
      return False
    n_compared += 1
    if not at:
      return True
  return n_compared >= _MIN_POINTS


def has_fraction_digits(node: Any) -> bool:
  """Whether there is a decimal in it that is no integer."""
  return any(sympy.Rational(str(f)).q != 1 for f in node.atoms(sympy.Float))


def is_same_value(gold: Any, answer: Any, *, has_decimal: bool) -> bool:
  """Whether two exact numbers are equal; of decimals, to a millionth."""
  if gold.is_infinite or answer.is_infinite:
    return bool(gold == answer)
  difference = gold - answer
  if not has_decimal or is_zero(difference):
    return is_zero(difference)
  bound = _TOLERANCE * min(1, abs(gold.evalf(30)))
  return bool(abs(difference.evalf(30)) <= bound)


def is_same_form(gold: Any, answer: Any) -> bool:
  """Whether numbers that are too large are written alike.

  The order of sums and products does not count, and parts that are small
  enough are evaluated: 10^(10^10) is 10^10000000000.
  """
  return form(gold) == form(answer)


def form(node: Any) -> Any:
  """How a number is written: its value if that is small, else a tuple."""
  parts = list(map(form, node.args))
  if not any(isinstance(part, tuple) for part in parts):
    try:
      return value(node, {})
    except TooLarge:
      pass
  if node.is_Add or node.is_Mul:
    return node.func, frozenset(collections.Counter(parts).items())
  return node.func, *parts


def are_equal_matrices(gold: Any, answer: Any) -> bool:
  """Whether all entries are equal."""
  pair = []
  for node in (gold, answer):
    if isinstance(node, sympy.Tuple) and is_matrix(gold):
      node = matrix(node)  # [[1, 2], [3, 4]]
    pair.append(node.doit() if is_matrix(node) else node)
  gold, answer = pair
  if not isinstance(gold, sympy.MatrixBase) or gold.shape != answer.shape:
    return False
  return all(map(are_equal, gold.flat(), answer.flat()))


# Sets, lists and tuples


def are_equal_collections(gold: Any, answer: Any) -> bool:
  """Whether sets have the same members, and tuples in the same order."""
  if isinstance(gold, sympy.Interval) and isinstance(answer, sympy.Interval):
    return (
      gold.left_open == answer.left_open
      and gold.right_open == answer.right_open
      and are_equal(gold.start, answer.start)
      and are_equal(gold.end, answer.end)
    )
  tuples = as_tuple(gold), as_tuple(answer)
  lists = tuples[0] or listed(gold), tuples[1] or listed(answer)
  if all(lists):
    names = {pair[0] for pair in map(named, lists[0]) if pair}
    if len(names) > 1 and not any(map(named, lists[1])):
      return are_equal_lists(*lists)  # x=1, y=2 is no set of solutions
    if not tuples[0] and len(set(lists[0])) < len(lists[0]):
      return is_permutation(*lists, are_equal)  # nor is what repeats a member
  if any(tuples) and all(lists):  # (1,2) is read as an interval
    if tuples[0]:
      return are_equal_lists(*lists)
    return is_permutation(*lists, are_equal)
  parts, others = split_union(gold), split_union(answer)
  if is_permutation(parts, others, are_equal_pieces):
    return True
  if not any(isinstance(one, sympy.Set) for one in (*parts, *others)):
    return False
  if len(parts) + len(others) > _MAX_PIECES:
    raise TooLarge
  parts, others = map(split_union, (canonical(gold), canonical(answer)))
  return is_permutation(parts, others, are_equal_pieces)


def as_tuple(node: Any) -> list | None:
  """The members of a tuple, which of two may have been read as an interval."""
  if isinstance(node, sympy.Tuple):
    return list(node)
  if isinstance(node, sympy.Interval) and node.left_open and node.right_open:
    return [node.start, node.end]
  return None


def listed(node: Any) -> list:
  """The members of a bare list as they are written; of one for a number."""
  if isinstance(node, sympy.FiniteSet):
    return list(getattr(node, "_unsorted_args", node.args))
  return [] if isinstance(node, sympy.Set) else [node]


def are_equal_lists(gold: list, answer: list) -> bool:
  return len(gold) == len(answer) and all(map(are_equal, gold, answer))


def is_permutation(gold: list, answer: list, is_same: Any) -> bool:
  """Whether each of the one has a partner in the other and none is left."""
  left = list(answer)
  if len(gold) != len(left):
    return False
  for one in gold:
    partner = next(
      (i for i, other in enumerate(left) if is_same(one, other)), None
    )
    if partner is None:
      return False
    del left[partner]
  return True


def split_union(node: Any) -> list:
  """The points and the other parts that a set is the union of."""
  if isinstance(node, sympy.Union):
    return [piece for part in node.args for piece in split_union(part)]
  if isinstance(node, sympy.FiniteSet):
    return list(node.args)
  if node == sympy.S.EmptySet:
    return []
  return [node]


def are_equal_pieces(gold: Any, answer: Any) -> bool:
  if as_tuple(gold) and as_tuple(answer):
    return are_equal(gold, answer)
  if isinstance(gold, sympy.Set) != isinstance(answer, sympy.Set):
    return False
  is_pair = isinstance(gold, sympy.Interval) or not isinstance(gold, sympy.Set)
  return are_equal(gold, answer) if is_pair else bool(gold == answer)


def canonical(node: Any) -> Any:
  """A set with its operations carried out."""
  if isinstance(node, sympy.Union | sympy.Intersection | sympy.Complement):
    return node.func(*map(canonical, node.args))
  if isinstance(node, sympy.Interval):
    start, end = value(node.start, {}), value(node.end, {})
    return sympy.Interval(start, end, node.left_open, node.right_open)
  if isinstance(node, sympy.FiniteSet):
    members = (value(m, {}) if m.is_number else m for m in node.args)
    return sympy.FiniteSet(*members)
  return node


# Relations


def are_equal_conditions(gold: Any, answer: Any) -> bool:
  """Whether conditions are the same, or describe the same set of numbers."""
  if isinstance(gold, sympy.Or) and isinstance(answer, sympy.Or):
    if is_permutation(list(gold.args), list(answer.args), are_equal):
      return True
  elif is_condition(gold) and is_condition(answer):
    if is_permutation(conjuncts(gold), conjuncts(answer), is_same_relation):
      return True
    if is_equation(gold) or gold.free_symbols != answer.free_symbols:
      return False
  elif is_equation(gold) or is_equation(answer):
    return False
  return are_equal_collections(as_set(gold), as_set(answer))


def as_set(node: Any) -> Any:
  """The numbers for which inequalities hold."""
  if not is_condition(node):
    return node
  if isinstance(node, sympy.And | sympy.Or):
    operation = (
      sympy.Union if isinstance(node, sympy.Or) else sympy.Intersection
    )
    return canonical(operation(*map(as_set, node.args), evaluate=False))
  if any(isinstance(side, sympy.Set) for side in node.args):
    return node.args[-1]
  if any(
    power.exp.is_Number and abs(power.exp) > _MAX_DEGREE
    for power in node.atoms(sympy.Pow)
  ):
    raise TooLarge
  functions = node.atoms(sympy.core.function.AppliedUndef)
  node = node.subs({f: sympy.Symbol(str(f.func), real=True) for f in functions})
  return node.as_set()


def is_same_relation(gold: Any, answer: Any) -> bool:
  """Whether one relation is the other, multiplied or turned around."""
  if type(gold) is type(answer) and gold.args == answer.args:
    return True
  (kind, left), (other_kind, right) = normal_form(gold), normal_form(answer)
  if kind is not other_kind or left is None or right is None:
    return False
  first, n_compared = None, 0
  for at in points(left, right):
    try:
      pair = value(left, at), value(right, at)
      if first is None and not is_zero(pair[0]) and not is_zero(pair[1]):
        first = pair
        ratio = (pair[0] / pair[1]).evalf(15)
        if kind in (sympy.Lt, sympy.Le) and not ratio.is_positive:
          return False
      elif first and not is_zero(pair[0] * first[1] - pair[1] * first[0]):
        return False
    except (TooLarge, Undefined):
      continue
    n_compared += 1
  return first is not None and n_compared >= _MIN_POINTS


def normal_form(node: Any) -> tuple[Any, Any]:
  """`f < 0`, `f <= 0`, `f = 0` or `f != 0` as its kind and f."""
  if not isinstance(node, sympy.core.relational.Relational):
    return None, None
  left, right = node.args
  if not isinstance(left, sympy.Expr) or not isinstance(right, sympy.Expr):
    return None, None
  kind = type(node)
  if kind in (sympy.Gt, sympy.Ge):
    kind = {sympy.Gt: sympy.Lt, sympy.Ge: sympy.Le}[kind]
    left, right = right, left
  difference = sympy.Add(left, negative(right), evaluate=False)
  if kind in (sympy.Eq, sympy.Ne):  # y/x = 2 is y = 2x
    powers: Any = difference.atoms(sympy.Pow)
    if any(not power.exp.is_Number or abs(power.exp) > 99 for power in powers):
      return kind, difference
    difference = sympy.fraction(sympy.together(difference))[0]
  return kind, difference


if __name__ == "__main__":
  main()
