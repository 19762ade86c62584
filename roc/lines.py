"""Input of the small commands: JSON objects, one a line, with their places."""

import pathlib
import sys
from collections.abc import Iterator

from roc import errors, jsonl

STDIN = "-"


def show(text: str) -> None:
  """Prints text for people; half a surrogate pair shows as an escape."""
  print(text.encode("utf-8", "backslashreplace").decode("utf-8"), flush=True)


def shown(name: str) -> str:
  """The name of an input, for people."""
  return "standard input" if name == STDIN else name


def read_text(name: str) -> str:
  """A whole input as text.

  Args:
    name: a file; `-` is this process's own input.

  Raises:
    errors.UserError: it cannot be read, or is not UTF-8.
  """
  try:
    # The locale says nothing about what a file or a pipe holds.
    if name == STDIN:
      return sys.stdin.buffer.read().decode("utf-8-sig")
    return pathlib.Path(name).read_bytes().decode("utf-8-sig")
  except (OSError, UnicodeDecodeError) as e:
    reason = e.strerror if isinstance(e, OSError) else "it is not UTF-8"
    raise errors.UserError(f"{shown(name)} cannot be read: {reason}") from e


def read_objects(name: str, example: str) -> Iterator[jsonl.Object]:
  """The objects of an input; blank lines are skipped.

  Args:
    name: a file; `-` is this process's own input.
    example: of a line, for the message where there is none.

  Raises:
    errors.UserError: it cannot be read, a line holds no object, or there is no
      line.
  """
  is_empty = True
  found = jsonl.split(sys.stdin.buffer) if name == STDIN else jsonl.lines(name)
  for number, line in found:
    is_empty = False
    where = f"{shown(name)} line {number}"
    yield jsonl.parse(line, where, f"such as {example}")
  if is_empty:
    raise errors.UserError(f"{shown(name)} holds no line such as {example}")
