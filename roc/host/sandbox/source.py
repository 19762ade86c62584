"""From the text that a model sent to code that can run.

Models write what they saw in notebooks and chats. What is around the code and
means nothing to Python is taken off, lines keeping their numbers; what Python
refuses and notebooks know is refused in a sentence that names it.
"""

import ast
import os
import re
import types

from roc.host.sandbox import scratch

_FENCE = re.compile(r"\s*(?:```|~~~)[\w+-]*[ \t]*\n")
_FENCE_LINE = re.compile(r"(?m)^[ \t]*(?:```|~~~)")
_MAGIC = re.compile(r"\s*(?:[\w, ]+=\s*)?(%%?[A-Za-z]\w*)")
_SHELL = re.compile(r"\s*(?:[\w, ]+=\s*)?(!!?\s*[\w./-]+)")
_HELP = re.compile(r"\s*(?:\?\??\s*[\w.]+|[\w.]+\s*\?\??)\s*\Z")
_SCRATCH = scratch.SCRATCH.decode()
_IN_SCRATCH = re.compile(rf"(?<![\w./-]){_SCRATCH}(?![\w.-])")


def clean(code: str) -> str:
  """Returns code without a byte order mark and without a fence around it all.

  Line ends become what Python makes of them anyway. A fence's opening line
  stays, empty, so that tracebacks number the lines as they were sent.
  """
  code = code.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
  opening = _FENCE.match(code)
  if opening is None:
    return code
  body, _, last = code[opening.end() :].rstrip().rpartition("\n")
  if last.strip() not in ("```", "~~~"):  # cut off before its end
    body = f"{body}\n{last}"
  if _FENCE_LINE.search(body):
    return code  # text follows, or another block
  return "\n" * opening[0].count("\n") + body + "\n"


def compile_script(code: str, file: str, home: str) -> types.CodeType:
  """Compiles a whole program.

  Args:
    code: as `clean` returns it.
    file: its name in tracebacks.
    home: the call's directory, which the model reads as `/scratch`: that name
      in a literal is turned back.

  Raises:
    SyntaxError: it is none; the message names what notebooks know.
  """
  try:
    what = _parse(code, file, home) if _SCRATCH in code else code
    return compile(what, file, "exec", dont_inherit=True)
  except SyntaxError as error:
    _explain(error, code)
    raise


def compile_cell(code: str, file: str, home: str) -> list[types.CodeType]:
  """Compiles a cell: its statements, then a bare expression at its end.

  A part that awaits at its top level is a coroutine's code. Arguments and
  errors as for `compile_script`.
  """
  try:
    tree = _parse(code, file, home)
    parts: list[tuple[ast.AST, str]] = [(tree, "exec")]
    if tree.body and isinstance(tree.body[-1], ast.Expr):
      parts.append((ast.Interactive([tree.body.pop()]), "single"))
    return [
      compile(part, file, mode, ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, True)  # pyrefly: ignore
      for part, mode in parts
    ]
  except SyntaxError as error:
    _explain(error, code)
    raise


def _parse(code: str, file: str, home: str) -> ast.Module:
  tree = ast.parse(code, file)
  if _SCRATCH in code:
    for node in ast.walk(tree):
      if isinstance(node, ast.Constant):
        if isinstance(node.value, str):
          node.value = _IN_SCRATCH.sub(lambda _: home, node.value)
        elif isinstance(node.value, bytes):
          text = os.fsdecode(node.value)
          node.value = os.fsencode(_IN_SCRATCH.sub(lambda _: home, text))
  return tree


def _explain(error: SyntaxError, code: str) -> None:
  """Says what a line means elsewhere, in place of "invalid syntax"."""
  lines = code.split("\n")
  number = error.lineno or 0
  line = lines[number - 1] if 0 < number <= len(lines) else ""
  if "outside" in error.msg and re.search(r"await|async", error.msg):
    error.msg += "; put it in `async def main()` and call `asyncio.run(main())`"
  elif _FENCE_LINE.search(code):
    error.msg = "there is Markdown (```) in the code: send Python alone"
  elif found := _MAGIC.match(line):
    error.msg = f"`{found[1]}` is a notebook's magic, not Python: leave it out"
  elif found := _SHELL.match(line):
    error.msg = (
      f"`{found[1]}` is a notebook's shell command, not Python, and there is no"
      " network to install from: leave it out"
    )
  elif _HELP.match(line):
    error.msg = "`?` is a notebook's help, not Python: use help()"
