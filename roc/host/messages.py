"""Chat messages as datasets write them, checked before they are used.

The shape is the one that OpenAI's API introduced and that TRL, verl and the
model hubs' datasets share: `role`, `content`, and of an assistant `tool_calls`
and `reasoning_content`. What is checked here is the shape and the order of the
turns; whether a call is one that the run's tool takes is `corpus`'s business.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from roc import errors

ROLES = ("system", "user", "assistant", "tool")
_FIELDS = {
  "system": ("role", "content", "name"),
  "user": ("role", "content", "name"),
  "assistant": ("role", "content", "name", "tool_calls", "reasoning_content"),
  "tool": ("role", "content", "name", "tool_call_id"),
}
# Who may speak after whom; None: the start.
_AFTER: Mapping[str | None, tuple[str, ...]] = {
  None: ("system", "user"),
  "system": ("user",),
  "user": ("assistant",),
  "assistant": ("user", "tool"),
  "tool": ("tool", "assistant"),
}


class MessageError(ValueError):
  """A field is not what it must be; `field` names it."""

  def __init__(self, field: str, text: str):
    super().__init__(f"field '{field}' {text}")
    self.field = field


@dataclasses.dataclass(frozen=True)
class Call:
  """A tool call of an assistant.

  Attributes:
    name: of the tool.
    arguments: by name.
    id: by which an answer names it; often empty.
  """

  name: str
  arguments: Mapping[str, Any]
  id: str = ""


@dataclasses.dataclass(frozen=True)
class Message:
  """One turn, or one tool's answer.

  Attributes:
    role: one of `ROLES`.
    content: its text.
    calls: of an assistant.
    reasoning: of an assistant, what it thought before it spoke.
    answers: of a tool, the id of the call; often empty.
  """

  role: str
  content: str
  calls: tuple[Call, ...] = ()
  reasoning: str = ""
  answers: str = ""


def read(rows: Any, field: str = "messages") -> tuple[Message, ...]:
  """Reads a conversation that ends with a turn to be learnt.

  Args:
    rows: what JSON gave for it.
    field: its name in errors.

  Returns:
    The messages; a system message if there is one, then turns of user and
    assistant, with the tools' answers in the order of the calls between.

  Raises:
    MessageError: a field that is missing, of a wrong type or unknown, a turn
      out of order, or a conversation that does not end with the assistant.
  """
  if not isinstance(rows, list) or not rows:
    raise MessageError(field, f"must be a list of messages, not {_show(rows)}")
  messages: list[Message] = []
  for i, row in enumerate(rows):
    where = f"{field}[{i}]"
    message = _read_message(row, where)
    before = messages[-1].role if messages else None
    if message.role not in _AFTER[before]:
      wanted = " or ".join(_AFTER[before])
      place = f"after {before}" if before else "at the start"
      raise MessageError(
        f"{where}.role", f"is {message.role} {place}, where {wanted} must speak"
      )
    messages.append(message)
  if messages[-1].role != "assistant":
    raise MessageError(
      f"{field}[{len(messages) - 1}].role",
      f"is {messages[-1].role}, and a conversation must end with a turn of the"
      " assistant",
    )
  return tuple(_in_order_of_calls(messages, field))


def _read_message(row: Any, where: str) -> Message:
  if not isinstance(row, dict):
    raise MessageError(where, f"must be an object, not {_show(row)}")
  role = row.get("role")
  if role not in ROLES:
    hint = errors.closest(str(role), ROLES)
    raise MessageError(
      f"{where}.role", f"must be one of {', '.join(ROLES)}, not {role!r}{hint}"
    )
  for name, value in row.items():
    if name not in _FIELDS[role] and value is not None:
      hint = errors.closest(name, _FIELDS[role])
      raise MessageError(
        f"{where}.{name}", f"is unknown in a message of {role}{hint}"
      )
  calls = _read_calls(row.get("tool_calls"), f"{where}.tool_calls")
  message = Message(
    role=role,
    content=_read_content(row, where, may_lack=bool(calls)),
    calls=calls,
    reasoning=_read_text(row, "reasoning_content", where),
    answers=_read_text(row, "tool_call_id", where),
  )
  if role in ("user", "assistant") and not (message.content.strip() or calls):
    raise MessageError(f"{where}.content", "is empty")
  return message


def _read_content(row: dict[str, Any], where: str, *, may_lack: bool) -> str:
  """Text, or a list of parts of which each is text."""
  content, where = row.get("content"), f"{where}.content"
  if content is None and may_lack:
    return ""
  if isinstance(content, str):
    return content
  if isinstance(content, list):
    parts = [part if isinstance(part, dict) else {} for part in content]
    texts = [p.get("text") for p in parts if p.get("type") == "text"]
    known = [text for text in texts if isinstance(text, str)]
    if len(known) == len(content):
      return "".join(known)
  _must_be("text or a list of text parts", content, where)


def _read_text(row: dict[str, Any], name: str, where: str) -> str:
  value = row.get(name)
  if value is None or isinstance(value, str):
    return value or ""
  _must_be("text", value, f"{where}.{name}")


def _read_calls(rows: Any, where: str) -> tuple[Call, ...]:
  if rows is None:
    return ()
  if not isinstance(rows, list):
    _must_be("a list of calls", rows, where)
  return tuple(_read_call(row, f"{where}[{i}]") for i, row in enumerate(rows))


def _read_call(row: Any, where: str) -> Call:
  """With the function apart, as APIs have it, or flat."""
  if not isinstance(row, dict):
    _must_be("an object", row, where)
  function, inner = row, where
  if "function" in row:
    function, inner = row["function"], f"{where}.function"
    if not isinstance(function, dict):
      _must_be("an object", function, inner)
  name, arguments = function.get("name"), function.get("arguments")
  if not isinstance(name, str) or not name:
    _must_be("a tool's name", name, f"{inner}.name")
  if isinstance(arguments, str):
    try:
      arguments = json.loads(arguments)
    except (ValueError, RecursionError) as error:
      raise MessageError(
        f"{inner}.arguments", f"is not JSON: {error}"
      ) from None
  if not isinstance(arguments, dict):
    _must_be(
      "an object, or text that holds one", arguments, f"{inner}.arguments"
    )
  return Call(name, arguments, _read_text(row, "id", where))


def _in_order_of_calls(
  messages: Sequence[Message], field: str
) -> list[Message]:
  """Sorts answers that name their calls; those that do not stay in order."""
  ordered: list[Message] = []
  i = 0
  while i < len(messages):
    ordered.append(messages[i])
    i += 1
    if messages[i - 1].role != "assistant":
      continue
    start, places = i, {c.id: n for n, c in enumerate(messages[i - 1].calls)}
    while i < len(messages) and messages[i].role == "tool":
      i += 1
    answers = list(messages[start:i])
    named = [answer.answers for answer in answers]
    if len(places) == len(messages[start - 1].calls) and all(
      name and name in places for name in named
    ):
      if len(set(named)) != len(named):
        raise MessageError(
          f"{field}[{start}].tool_call_id", "is there twice in one turn"
        )
      answers.sort(key=lambda answer: places[answer.answers])
    ordered += answers
  return ordered


def _must_be(what: str, value: Any, where: str) -> NoReturn:
  raise MessageError(where, f"must be {what}, not {_show(value)}")


def _show(value: Any) -> str:
  return "missing" if value is None else repr(value)[:80]
