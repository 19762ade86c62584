"""Rows of problem files: JSONL, a JSON array, or parquet.

A row is a mapping of columns with the place that it was read from, so that
whatever is wrong with it can be said with file and line.
"""

import gzip
import json
import pathlib
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

_CHECKOUT = pathlib.Path(__file__).resolve().parents[3]
_SUFFIXES = (".jsonl", ".json", ".parquet", ".jsonl.gz")


class Row(NamedTuple):
  """Columns and where they stand, such as `train.jsonl line 3`."""

  where: str
  fields: dict[str, Any]


def find(name: str | pathlib.Path) -> pathlib.Path:
  """The file of a name: from here, from the checkout, or from the hub.

  Args:
    name: a path, or `hf://datasets/ORG/NAME/FILE` (with `NAME@REVISION` for a
      revision), which is downloaded into the hub's cache once.

  Raises:
    ValueError: there is no such file, or it cannot be had; says why.
  """
  text = str(name)
  if text.startswith("hf://"):
    return _download(text)
  for path in (pathlib.Path(text), _CHECKOUT / text):
    if path.is_file():
      return path
  raise ValueError(f"task file {name} does not exist; give the path of one")


def _download(name: str) -> pathlib.Path:
  parts = name.removeprefix("hf://").split("/", 3)
  if len(parts) != 4 or parts[0] != "datasets" or not all(parts):
    raise ValueError(
      f"{name} names no file of a dataset; write"
      " hf://datasets/ORG/NAME/path/of/file.jsonl"
    )
  import huggingface_hub  # slow, and only for names of this kind

  _, org, repository, file = parts
  repository, _, revision = repository.partition("@")
  try:
    found = huggingface_hub.hf_hub_download(
      f"{org}/{repository}",
      file,
      repo_type="dataset",
      revision=revision or None,
    )
  except Exception as e:  # the hub's own kinds, requests', and OSError
    first = (str(e).strip().splitlines() or [type(e).__name__])[0]
    raise ValueError(
      f"{name} cannot be downloaded ({first}); check the name and the"
      " connection, or give a file that is here"
    ) from e
  return pathlib.Path(found)


def read(name: str | pathlib.Path) -> Iterator[Row]:
  """Reads a file row by row; blank lines of JSONL are skipped.

  Raises:
    ValueError: it cannot be read, or a row is none; names file and line.
  """
  path = find(name)
  shown = str(name)
  try:
    if path.name.endswith(".parquet"):
      yield from _read_parquet(path, shown)
    elif path.name.endswith(".json"):
      yield from _read_json(path, shown)
    elif path.name.endswith((".jsonl", ".jsonl.gz", ".txt")):
      yield from _read_jsonl(path, shown)
    else:
      raise ValueError(
        f"task file {shown} is none of {', '.join(_SUFFIXES)}; rename it, or"
        " convert it to one of these"
      )
  except UnicodeDecodeError as e:
    raise ValueError(f"cannot read task file {shown}: it is not UTF-8") from e
  except (OSError, EOFError, zlib.error) as e:
    reason = getattr(e, "strerror", None) or "it is damaged"
    raise ValueError(f"cannot read task file {shown}: {reason}") from e


def _read_jsonl(path: pathlib.Path, shown: str) -> Iterator[Row]:
  # Not splitlines(): JSON strings may hold U+2028 and its like unescaped.
  opened = gzip.open if path.name.endswith(".gz") else open
  with opened(path, "rt", encoding="utf-8", newline="\n") as lines:
    for number, line in enumerate(lines, 1):
      if line.strip():
        where = f"{shown} line {number}"
        yield Row(where, _object(_parse(line, where), where))


def _read_json(path: pathlib.Path, shown: str) -> Iterator[Row]:
  found = _parse(path.read_text(encoding="utf-8"), shown)
  if not isinstance(found, list):
    raise ValueError(
      f"{shown} must hold a list of rows; for a row a line name it .jsonl"
    )
  for number, fields in enumerate(found, 1):
    where = f"{shown} entry {number}"
    yield Row(where, _object(fields, where))


def _read_parquet(path: pathlib.Path, shown: str) -> Iterator[Row]:
  import pyarrow
  import pyarrow.parquet

  try:
    file = pyarrow.parquet.ParquetFile(path)
    number = 0
    for batch in file.iter_batches(batch_size=1024):
      for fields in batch.to_pylist():
        number += 1
        yield Row(f"{shown} row {number}", fields)
  except pyarrow.ArrowException as e:
    first = (str(e).splitlines() or [type(e).__name__])[0]
    raise ValueError(f"{shown} is no parquet file: {first}") from e


def _parse(text: str, where: str) -> Any:
  try:
    return json.loads(text)
  except (ValueError, RecursionError) as e:
    raise ValueError(f"{where}: not JSON: {e}") from e


def _object(found: Any, where: str) -> dict[str, Any]:
  if not isinstance(found, dict):
    raise ValueError(
      f"{where}: a row must be a JSON object, such as one with prompt and"
      " answer"
    )
  return found
