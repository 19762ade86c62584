"""The house rules that no linter knows: sizes, floors and private paths."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SOURCES = sorted(
  path
  for folder in ("roc", "experiments", "benchmarks", "colab")
  for path in (ROOT / folder).rglob("*.py")
)
MAX_FUNCTION = 70  # lines of code
# Longer ones, each with its reason.
LONG_FUNCTIONS: dict[str, int] = {}


def _name(path):
  return path.relative_to(ROOT).as_posix()


def _functions(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
      yield node


def _n_code_lines(node):
  """Length of a function; the docstring is free, so that nobody saves on it."""
  n_lines = node.end_lineno - node.lineno + 1
  first = node.body[0]
  if ast.get_docstring(node) is not None:
    n_lines -= first.end_lineno - first.lineno + 1
  return n_lines


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_functions_are_short(path):
  for node in _functions(path):
    name = f"{_name(path)}:{node.name}"
    n_lines = _n_code_lines(node)
    limit = LONG_FUNCTIONS.get(name, MAX_FUNCTION)
    assert n_lines <= limit, f"{name} has {n_lines} lines: split it"


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_modules_say_what_they_are(path):
  tree = ast.parse(path.read_text())
  is_package_marker = path.name == "__init__.py" and not tree.body
  assert (
    is_package_marker
    or path.parent.name == "colab"
    or (ast.get_docstring(tree))
  )


@pytest.mark.parametrize(
  "path", [p for p in SOURCES if "roc/core" in _name(p)], ids=_name
)
def test_public_functions_of_core_are_documented(path):
  tree = ast.parse(path.read_text())
  for node in tree.body:
    if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
      continue
    decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
    if not decorators & {"overload", "typing.overload"}:
      assert ast.get_docstring(node), f"{_name(path)}:{node.name}"


def test_only_wiring_imports_gin():
  importers = [
    _name(path)
    for path in SOURCES
    if re.search(r"^\s*(import|from) gin\b", path.read_text(), re.MULTILINE)
  ]
  assert set(importers) <= {"roc/wiring.py"}


def test_no_file_names_a_machine():
  private = re.compile(r"/(home|root|work|Users)/[a-z]|/opt/(pypi|wheels)")
  listed = [
    path
    for path in ROOT.rglob("*")
    if path.suffix in {".py", ".md", ".toml", ".txt", ".lock", ".gin", ".ipynb"}
    and not {".venv", ".cache", "runs", ".git"}
    & set(path.relative_to(ROOT).parts)
  ]
  found = [
    f"{_name(path)}: {match.group()}"
    for path in listed
    if path != pathlib.Path(__file__)
    for match in private.finditer(path.read_text())
  ]
  assert found == []
