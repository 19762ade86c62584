"""Rows of problem files: JSONL, a JSON array, or parquet.

A row is a mapping of columns with the place that it was read from, so that
whatever is wrong with it can be said with file and line.
"""

import fnmatch
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from roc import jsonl

_CHECKOUT = pathlib.Path(__file__).resolve().parents[3]
_SUFFIXES = (*jsonl.SUFFIXES, ".json", ".parquet")
_EXAMPLE = "with a question and an answer"


class Row(NamedTuple):
  """Columns and where they stand, such as `train.jsonl line 3`."""

  where: str
  fields: dict[str, Any]


def find(name: str | pathlib.Path) -> list[pathlib.Path]:
  """The files of a name: from here, from the checkout, or from the hub.

  Args:
    name: a path or a pattern of paths (`train-*.jsonl.gz`); or one of
      `hf://datasets/ORG/NAME/FILE` (with `NAME@REVISION` for a revision), which
      is downloaded into the hub's cache once.

  Raises:
    ValueError: there is no such file, or it cannot be had; says why.
  """
  text = str(name)
  if text.startswith("hf://"):
    return _download(text)
  for path in (pathlib.Path(text), _CHECKOUT / text):
    found = [file for file in jsonl.find(path) if file.is_file()]
    if found:
      return found
  if pathlib.Path(text).is_dir() or (_CHECKOUT / text).is_dir():
    raise ValueError(
      f"task file {name} is a directory; give a file, or a pattern such as"
      f" {name}/*.jsonl"
    )
  raise ValueError(f"task file {name} does not exist; give the path of one")


def _download(name: str) -> list[pathlib.Path]:
  parts = name.removeprefix("hf://").split("/", 3)
  if len(parts) != 4 or parts[0] != "datasets" or not all(parts):
    raise ValueError(
      f"{name} names no file of a dataset; write"
      " hf://datasets/ORG/NAME/path/of/file.jsonl"
    )
  import huggingface_hub  # slow, and only for names of this kind

  _, org, repository, file = parts
  repository, _, revision = repository.partition("@")
  of = {"repo_type": "dataset", "revision": revision or None}
  repository = f"{org}/{repository}"
  try:
    files = [file]
    if jsonl.is_pattern(file):
      every = huggingface_hub.HfApi().list_repo_files(repository, **of)
      files = sorted(fnmatch.filter(every, file))
    found = [
      pathlib.Path(huggingface_hub.hf_hub_download(repository, one, **of))
      for one in files
    ]
  except Exception as e:  # the hub's own kinds, requests', and OSError
    first = (str(e).strip().splitlines() or [type(e).__name__])[0]
    raise ValueError(
      f"{name} cannot be downloaded ({first}); check the name and the"
      " connection, or give a file that is here"
    ) from e
  if not found:
    raise ValueError(f"{name} fits no file of that dataset; check the name")
  return found


def read(name: str | pathlib.Path) -> Iterator[Row]:
  """Reads the files of a name row by row; blank lines of JSONL are skipped.

  Raises:
    ValueError: one cannot be read, or a row is none; names file and line.
  """
  paths = find(name)
  for path in paths:
    yield from _read(path, str(name) if len(paths) == 1 else str(path))


def _read(path: pathlib.Path, shown: str) -> Iterator[Row]:
  try:
    if path.name.endswith(".parquet"):
      yield from _read_parquet(path, shown)
    elif path.name.endswith(".json"):
      yield from _read_json(path, shown)
    elif path.name.endswith((*jsonl.SUFFIXES, ".txt")):
      for where, fields in jsonl.read(path, shown, _EXAMPLE):
        yield Row(where, fields)
    else:
      raise ValueError(
        f"task file {shown} is none of {', '.join(_SUFFIXES)}; rename it, or"
        " convert it to one of these"
      )
  except OSError as e:
    reason = e.strerror or "it is damaged"
    raise ValueError(f"cannot read task file {shown}: {reason}") from e


def _read_json(path: pathlib.Path, shown: str) -> Iterator[Row]:
  try:
    found = jsonl.loads(path.read_bytes())
  except jsonl.JsonlError as e:
    raise ValueError(f"{shown}: {e}") from e
  if not isinstance(found, list):
    raise ValueError(
      f"{shown} must hold a list of rows; for a row a line name it .jsonl"
    )
  for number, fields in enumerate(found, 1):
    where = f"{shown} entry {number}"
    if not isinstance(fields, dict):
      raise ValueError(f"{where}: expected a JSON object {_EXAMPLE}")
    yield Row(where, fields)


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
