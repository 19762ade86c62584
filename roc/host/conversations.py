"""Conversations from JSONL files, checked line by line.

One JSON object a line: `messages` (`roc.host.messages`), and if wanted `tools`,
the schemas of the tools that are offered, and `id`. Datasets carry other
columns beside them, so those are not looked at.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

from roc import jsonl
from roc.host import messages as messages_lib


@dataclasses.dataclass(frozen=True)
class Conversation:
  """What a model is to learn, turn by turn.

  Attributes:
    messages: in order, the last one an assistant's.
    tools: names of the tools that it is offered; None where it does not say.
    id: the row's own; else empty.
    where: file and line, for errors.
    n_read: bytes read so far, in all files together.
  """

  messages: tuple[messages_lib.Message, ...]
  tools: tuple[str, ...] | None = None
  id: str = ""
  where: str = "conversation"
  n_read: int = 0


def read(paths: Iterable[str | pathlib.Path]) -> Iterator[Conversation]:
  """Reads files one after the other; blank lines are skipped.

  Raises:
    ValueError: a file that cannot be read, or holds no conversation, or a line
      that is none; the message names file, line and field.
  """
  n_read = 0
  for path in paths:
    n_found = 0
    for number, line in jsonl.lines(path):
      n_read += len(line)
      n_found += 1
      found = parse(line, f"{path} line {number}")
      yield dataclasses.replace(found, n_read=n_read)
    if not n_found:
      raise ValueError(f"{path} holds no conversation")


def parse(line: bytes | str, where: str = "conversation") -> Conversation:
  """Reads one line.

  Raises:
    ValueError: it is no conversation; the message names line and field.
  """
  row = jsonl.parse(line, where, "with messages").fields
  try:
    found = Conversation(
      messages=messages_lib.read(row.get("messages")),
      tools=_tool_names(row.get("tools")),
      id=str(row.get("id", "")),
      where=where,
    )
  except messages_lib.MessageError as error:
    raise ValueError(f"{where}: {error}") from error
  return found


def _tool_names(schemas: Any) -> tuple[str, ...] | None:
  """Names in schemas, with the function apart or flat; also as text of JSON."""
  if schemas is None:
    return None
  if isinstance(schemas, str):
    try:
      schemas = json.loads(schemas)
    except (ValueError, RecursionError) as error:
      raise messages_lib.MessageError("tools", f"is not JSON: {error}") from (
        None
      )
  names = []
  for i, schema in enumerate(schemas if isinstance(schemas, list) else [None]):
    function = schema.get("function", schema) if isinstance(schema, dict) else 0
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name:
      raise messages_lib.MessageError(
        f"tools[{i}]" if isinstance(schemas, list) else "tools",
        "must be a tool's schema with a name",
      )
    names.append(name)
  return tuple(names)


def digest(paths: Iterable[str | pathlib.Path]) -> str:
  """16 hex digits that change with any byte of the files.

  Raises:
    ValueError: a file cannot be read.
  """
  found = hashlib.sha256()
  for path in paths:
    try:
      with open(path, "rb") as file:
        found.update(hashlib.file_digest(file, "sha256").digest())
    except OSError as error:
      raise ValueError(
        f"cannot read conversations from {path}: {error.strerror}"
      ) from error
  return found.hexdigest()[:16]
