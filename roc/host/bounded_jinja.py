"""Jinja that comes to an end: templates of strangers under a budget.

Jinja's sandbox keeps a template away from Python's insides and stops a `range`
of more than 100,000. It does not stop loops within loops, macros that call
themselves, or `'x' * 10 ** 10`. Here every turn of a loop and every call of a
macro counts, and what is computed and written is bounded in size. What draws
random numbers is not there: a prompt must be the same every time.

What stays open: a template that was written to fill memory can still do that,
with filters such as `center`.
"""

import contextvars
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes, visitor

# A conversation of hundreds of turns with dozens of tools takes thousands.
MAX_STEPS = 200_000
MAX_CPU_S = 5.0
MAX_CHARS = 50_000_000
# Of what `*` and `**` make: characters of text, bits of a number.
_MAX_PRODUCT = 100_000
# Steps between looks at the clock.
_LOOK = 256


class BudgetError(jinja2.TemplateError):
  """The template does more than a chat template has to do."""


class _Spent:
  """What one rendering has used up."""

  def __init__(self) -> None:
    self.steps = 0
    self.start = time.thread_time()


_spent: contextvars.ContextVar[_Spent] = contextvars.ContextVar("spent")


class Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
  """The sandbox of `jinja2`, with a budget."""

  intercepted_binops = frozenset({"*", "**", "+"})

  def __init__(self, **options: Any):
    # Constants that are folded when a template is read escape the budget.
    super().__init__(optimized=False, **options)
    del self.globals["lipsum"], self.filters["random"]

  def template(self, text: str) -> jinja2.Template:
    """Reads a template.

    Raises:
      jinja2.TemplateSyntaxError: it is none.
      RecursionError, SyntaxError: it is nested too deeply.
    """
    tree = _Counted().visit(self.parse(text))
    code = self.compile(tree)
    return jinja2.Template.from_code(self, code, self.make_globals(None))

  def count(self) -> bool:
    """Takes one step.

    Returns:
      True, so that it can stand in front of a condition.

    Raises:
      BudgetError: there are none left, or no time.
    """
    spent = _spent.get()
    spent.steps += 1
    if spent.steps > MAX_STEPS:
      raise BudgetError(f"it loops more than {MAX_STEPS:,} times")
    is_late = (
      spent.steps % _LOOK == 0 and time.thread_time() - spent.start > MAX_CPU_S
    )
    if is_late:
      raise BudgetError(f"it takes more than {MAX_CPU_S:.0f} seconds")
    return True

  def call_binop(
    self, context: Any, operator: str, left: Any, right: Any
  ) -> Any:
    """Computes what is of a size that a chat template may want.

    Raises:
      BudgetError: it is larger.
    """
    size, most = 0, _MAX_PRODUCT
    if operator == "+":
      most = MAX_CHARS
      if isinstance(left, str | list) and isinstance(right, str | list):
        size = len(left) + len(right)
    elif operator == "**":
      if isinstance(left, int) and isinstance(right, int):
        size = left.bit_length() * right
    elif isinstance(right, int) and isinstance(left, str | list | tuple):
      size = len(left) * right
    elif isinstance(left, int) and isinstance(right, str | list | tuple):
      size = left * len(right)
    _check_size(size, most)
    return super().call_binop(context, operator, left, right)

  def join(self, values: Sequence[Any]) -> str:
    """The operator `~`.

    Raises:
      BudgetError: the text is too long.
    """
    texts = [str(value) for value in values]
    _check_size(sum(map(len, texts)), MAX_CHARS)
    return "".join(texts)


def _check_size(size: int, most: int) -> None:
  if size > most:
    raise BudgetError(f"it makes something of size {size:,}")


def render(template: jinja2.Template, variables: Mapping[str, Any]) -> str:
  """Writes a template of `Environment.template`.

  Raises:
    BudgetError: it does too much.
    Exception: whatever its expressions raise.
  """
  token = _spent.set(_Spent())
  pieces = []
  n_chars = 0
  try:
    for piece in template.generate(variables):
      n_chars += len(piece)
      if n_chars > MAX_CHARS:
        raise BudgetError(f"it writes more than {MAX_CHARS:,} characters")
      pieces.append(piece)
  finally:
    _spent.reset(token)
  return "".join(pieces)


class _Counted(visitor.NodeTransformer):
  """Puts a step into each turn of a loop and each call of a macro."""

  def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
    self.generic_visit(node)
    parts = nodes.Tuple(node.nodes, "load").set_lineno(node.lineno)
    return _call("join", [parts], node)

  def visit_For(self, node: nodes.For) -> nodes.Node:
    self._enter(node)
    if node.test is not None:
      # Turns that the condition skips are turns.
      node.test = nodes.And(_call("count", [], node), node.test)
    return node

  def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
    return self._enter(node)

  def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
    return self._enter(node)

  def _enter(
    self, node: nodes.For | nodes.Macro | nodes.CallBlock
  ) -> nodes.Node:
    self.generic_visit(node)
    step = nodes.ExprStmt(_call("count", [], node)).set_lineno(node.lineno)
    node.body.insert(0, step)
    return node


def _call(name: str, arguments: list[Any], node: nodes.Node) -> nodes.Call:
  """Calls a method of `Environment`, whatever variables the template has."""
  method = nodes.EnvironmentAttribute(name)
  call = nodes.Call(method, arguments, [], None, None)
  call.set_lineno(node.lineno)
  return call
