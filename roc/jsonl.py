"""JSON lines: the one reader of files with one JSON value a line.

Files may be gzip (told by their first bytes, whatever they are called), begin
with a byte order mark and have blank lines; a file may be a pattern that names
several. Every mistake is one sentence with file and line.
"""

import contextlib
import glob
import gzip
import io
import json
import os
import pathlib
import zlib
from collections.abc import Iterable, Iterator
from typing import IO, Any, NamedTuple

from roc import errors

SUFFIXES = (".jsonl", ".jsonl.gz")
_GZIP = b"\x1f\x8b"


class JsonlError(errors.UserError, ValueError):
  """A file or line that cannot be read; one sentence."""


class Object(NamedTuple):
  """An object and where it stands, such as `rows.jsonl line 3`."""

  where: str
  fields: dict[str, Any]


def is_pattern(name: str) -> bool:
  """Whether a name stands for several files (`*`, `?`, `[...]`)."""
  return glob.has_magic(name)


def find(name: str | os.PathLike[str]) -> list[pathlib.Path]:
  """The files that a name stands for, in order of their names.

  Args:
    name: a file, or a pattern of files.

  Returns:
    One path, which need not exist; or all that fit the pattern, perhaps none.
  """
  text = os.fspath(name)
  if not is_pattern(text) or os.path.exists(text):
    return [pathlib.Path(text)]
  found = sorted(glob.glob(text, recursive=True))
  return [pathlib.Path(path) for path in found if os.path.isfile(path)]


def inside(folder: pathlib.Path) -> list[pathlib.Path]:
  """Files of a directory with JSON lines, gzip or not, by name."""
  return sorted(p for p in folder.iterdir() if p.name.endswith(SUFFIXES))


def lines(
  path: str | os.PathLike[str], name: str = ""
) -> Iterator[tuple[int, bytes]]:
  """Lines that are not blank, with their numbers from 1.

  Args:
    path: of the file.
    name: of it in messages; by default the path.

  Raises:
    JsonlError: it cannot be read, or is damaged.
  """
  shown = name or os.fspath(path)
  try:
    with open(path, "rb") as f:
      yield from split(f)
  except (OSError, EOFError, zlib.error) as e:
    reason = getattr(e, "strerror", None) or f"it is damaged ({e})"
    raise JsonlError(f"cannot read {shown}: {reason}") from e


def split(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
  """`lines` of a file that is open.

  Only a line feed ends a line: JSON may hold U+2028 and its like unescaped.
  """
  with contextlib.ExitStack() as stack:
    first = file.read(2)
    opened: Iterable[bytes] = _behind(first, file)
    if first == _GZIP:
      whole = io.BufferedReader(_Joined(first, file))
      opened = stack.enter_context(gzip.GzipFile(fileobj=whole))
    for number, line in enumerate(opened, 1):
      if number == 1:
        line = line.removeprefix(b"\xef\xbb\xbf")
      if line.strip():
        yield number, line


def _behind(first: bytes, file: IO[bytes]) -> Iterator[bytes]:
  """Lines of a file of which some bytes were read before."""
  head = first if first.endswith(b"\n") else first + file.readline()
  yield from io.BytesIO(head)
  yield from file


class _Joined(io.RawIOBase):
  """A file of which some bytes were read before; it need not be seekable."""

  def __init__(self, first: bytes, file: IO[bytes]):
    self._first, self._file = first, file

  def readable(self) -> bool:
    return True

  def readinto(self, buffer: Any) -> int:
    found = self._first or self._file.read(len(buffer))
    found, self._first = found[: len(buffer)], found[len(buffer) :]
    buffer[: len(found)] = found
    return len(found)


def loads(line: bytes | str) -> Any:
  """The value of a line.

  Half a surrogate pair, which is no text and could be neither encoded nor
  hashed, becomes U+FFFD.

  Raises:
    JsonlError: it is no JSON; without the place.
  """
  try:
    text = line.decode("utf-8-sig") if isinstance(line, bytes) else line
  except UnicodeDecodeError:
    raise JsonlError("it is not UTF-8") from None
  try:
    value = json.loads(text)
  except (ValueError, RecursionError) as e:
    raise JsonlError(f"not JSON: {e}") from None
  return _whole_text(value) if "\\u" in text else value


def _whole_text(value: Any) -> Any:
  if isinstance(value, str):
    if value.isascii():
      return value
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
  if isinstance(value, list):
    return [_whole_text(v) for v in value]
  if isinstance(value, dict):
    return {_whole_text(k): _whole_text(v) for k, v in value.items()}
  return value


def read(
  path: str | os.PathLike[str], name: str = "", wanted: str = ""
) -> Iterator[Object]:
  """The objects of a file, each with its place.

  Args:
    path: of the file.
    name: of it in messages; by default the path.
    wanted: what an object has, for the message where a line is none.

  Raises:
    JsonlError: the file cannot be read, or a line holds no object.
  """
  shown = name or os.fspath(path)
  for number, line in lines(path, shown):
    yield parse(line, f"{shown} line {number}", wanted)


def parse(line: bytes | str, where: str, wanted: str = "") -> Object:
  """The object of a line.

  Raises:
    JsonlError: it holds none.
  """
  try:
    fields = loads(line)
  except JsonlError as e:
    raise JsonlError(f"{where}: {e}") from None
  if not isinstance(fields, dict):
    raise JsonlError(
      f"{where}: expected a JSON object{wanted and f' {wanted}'}"
    )
  return Object(where, fields)
