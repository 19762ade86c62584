r"""Tool calls and answers, found in one turn of the model.

How a call is written depends on the model (`dialects`). The parser sees only
ids that the model sampled, so neither a question nor a tool's answer can call a
tool or give an answer. Where a tag is one special token, only that token is the
tag: the same characters spelt out are text.

Policy, one row a case (`tests/host/calls_test.py` holds the same table):

  tag inside a string of the call's body               text: the call ends at
                                                       the closing tag at which
                                                       its body is whole
  opened, never closed; opened again before closing    rejected: unclosed
  body is no JSON object, or holds NaN or Infinity     rejected: bad JSON
  body is not the dialect's XML                        rejected: bad XML
  no name, another name                                rejected: unknown tool
  missing, unknown or non-string argument              rejected: bad arguments
  arguments given as a string that holds JSON          accepted
  no line break behind the opening tag                 accepted
  closing tag alone                                    plain text
  several calls                                        all run, in that order
  a malformed call beside good ones                    it is rejected, they run
  a call inside the reasoning                          runs like any other
  more than `max_calls` in one turn                    the last that fits is
                                                       rejected: too many calls,
                                                       the rest fall away
  llama3: an object inside a line, or without name     text
  and parameters
  llama3: code behind <|python_tag|>                   a call of the tool that
                                                       there is
  answer without \boxed{...}, unclosed, tag inside     no answer
  neither a closed call nor an answer                  void turn
"""

import dataclasses
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from roc.host import dialects, rewards
from roc.host import tokenizer as tokenizer_lib

# A turn asks for at most this many calls, so that the C axis has a bound.
MAX_CALLS_PER_TURN = 4

_ANSWER_TAGS = (tokenizer_lib.ANSWER_OPEN, tokenizer_lib.ANSWER_CLOSE)


@dataclasses.dataclass(frozen=True)
class ToolCall:
  """One call as the model wrote it.

  Attributes:
    name: tool that was asked for; empty when that could not be read.
    arguments: parsed arguments; empty when they could not be read.
    raw: text between the tags.
    error: why the call is not to be run, in a few words; None for a good one.
    detail: more about the error, for renderers that have the room.
  """

  name: str
  arguments: Mapping[str, Any]
  raw: str
  error: str | None = None
  detail: str = ""


@dataclasses.dataclass(frozen=True)
class ToolSpec:
  """How the model calls a tool, and which of the sandbox's it is.

  Attributes:
    name: by which the model calls it.
    runs_as: `python` for a program of its own, `session` for a cell in the
      rollout's namespace.
    stdin: name of the argument that holds the program's input; "" for none.
    needs_stdin: whether that argument must be given.
  """

  name: str = "python"
  runs_as: str = "python"
  stdin: str = ""
  needs_stdin: bool = False

  @property
  def wanted(self) -> str:
    """What arguments the tool wants, in words."""
    if not self.stdin:
      return "give `code` alone"
    if self.needs_stdin:
      return f"give `code` and `{self.stdin}`"
    return f"give `code`, and `{self.stdin}` for its input"

  def accepts(self, names: set[str]) -> bool:
    """Whether a call may have these arguments."""
    needed = {"code", self.stdin} if self.needs_stdin else {"code"}
    return needed <= names <= {"code", self.stdin}


PYTHON = ToolSpec()


@dataclasses.dataclass(frozen=True)
class ParsedTurn:
  r"""What one turn of the model asks for.

  Attributes:
    calls: calls in the order written, malformed ones included.
    answers: content of `\boxed{}` of each well-formed answer, in order.
    is_void: the turn holds neither a closed call nor an answer.
    content: its text without the calls and without what ends the turn.
  """

  calls: tuple[ToolCall, ...]
  answers: tuple[str, ...]
  is_void: bool
  content: str = ""

  @property
  def n_answers(self) -> int:
    """Well-formed answers in the turn."""
    return len(self.answers)


def parse_turn(
  ids: Sequence[int],
  tokenizer: tokenizer_lib.Tokenizer,
  *,
  tool: ToolSpec | None = PYTHON,
  max_calls: int | None = MAX_CALLS_PER_TURN,
  dialect: dialects.Dialect = dialects.HERMES,
) -> ParsedTurn:
  """Reads the calls and answers of one turn of the model.

  Args:
    ids: token ids that the model sampled in this turn and nothing else; its
      end-of-turn token may be among them.
    tokenizer: gives the tags' ids; a tag that is no special token of its
      vocabulary is looked for as text.
    tool: the one tool that there is; None: any name and any arguments.
    max_calls: calls that may be asked for in one turn; None: no limit.
    dialect: in which the model writes calls.

  Returns:
    The turn by the policy table at the module's head; an empty turn is void.
  """
  pieces = list(_lex(ids, tokenizer, _tags(dialect)))
  return _parse(pieces, tool, max_calls, dialect)


def parse_text(
  text: str,
  *,
  tool: ToolSpec | None = None,
  max_calls: int | None = None,
  dialect: dialects.Dialect = dialects.HERMES,
) -> ParsedTurn:
  """Reads the calls and answers of a whole turn that is only known as text.

  Args:
    text: of the turn; every tag in it counts, as nothing says which were
      tokens.
    tool: the one tool that there is; None: any name and any arguments.
    max_calls: calls that may be asked for in one turn; None: no limit.
    dialect: in which the model writes calls.
  """
  tags = (*_tags(dialect), *_ends(dialect))
  pieces = [
    dialects.Piece(part if part in tags else None, part, part in _ends(dialect))
    for part in dialects.split_at(tags, text)
  ]
  end = dialects.Piece(tokenizer_lib.TURN_END, "", True)
  return _parse([*pieces, end], tool, max_calls, dialect)


def _tags(dialect: dialects.Dialect) -> tuple[str, ...]:
  return (*dialect.tags, *_ANSWER_TAGS)


def _ends(dialect: dialects.Dialect) -> tuple[str, ...]:
  """Tags that may end a turn."""
  return (tokenizer_lib.TURN_END, tokenizer_lib.END_OF_TEXT, *dialect.ends)


def _parse(
  pieces: Sequence[dialects.Piece],
  tool: ToolSpec | None,
  max_calls: int | None,
  dialect: dialects.Dialect,
) -> ParsedTurn:
  found: list[ToolCall] = []
  answers: list[str] = []
  content: list[str] = []
  n_closed = 0
  parts = dialect.split(pieces)
  for at, part in enumerate(parts):
    if isinstance(part, dialects.Found):
      n_closed += part.is_closed
      found.append(_checked(part, tool))
      continue
    if part.tag == tokenizer_lib.ANSWER_OPEN:
      answers += _answer_from(parts, at)
    content.append(part.text)
  if max_calls is not None:
    found = limit(found, max_calls)
  return ParsedTurn(
    calls=tuple(found),
    answers=tuple(answers),
    is_void=not n_closed and not answers,
    content=_before_end("".join(content), _ends(dialect)).strip(),
  )


def _before_end(text: str, ends: tuple[str, ...]) -> str:
  """Text without the tags that end a turn."""
  while (short := text.rstrip()).endswith(ends):
    text = short[: short.rindex("<|")]
  return text


def _answer_from(
  parts: Sequence[dialects.Piece | dialects.Found], start: int
) -> list[str]:
  """The answer opened at `start`, if it is well-formed, else nothing."""
  text: list[str] = []
  for at in range(start + 1, len(parts)):
    part = parts[at]
    if isinstance(part, dialects.Found):
      return []
    if part.tag == tokenizer_lib.ANSWER_CLOSE:
      answer = rewards.extract_boxed("".join(text))
      return [] if answer is None else [answer]
    if part.tag == tokenizer_lib.ANSWER_OPEN or part.is_special:
      return []
    text.append(part.text)
  return []


def read_call(raw: str, tool: ToolSpec | None = PYTHON) -> ToolCall:
  """Reads the text between the tags of a Hermes call.

  Args:
    raw: JSON with `name` and `arguments`; arguments may themselves be a string
      that holds JSON.
    tool: the one tool that there is; None: any, with any arguments.

  Returns:
    The call; `error` says what is wrong with it, if anything is.
  """
  try:
    return _checked(dialects.Found(raw, dialects.read_hermes(raw)), tool)
  except dialects.BadCallError as e:
    return _rejected(raw, e.error, str(e))


def _checked(found: dialects.Found, tool: ToolSpec | None) -> ToolCall:
  """The call, or why it is not to be run."""
  raw, body = found.raw, found.body
  if body is None:
    return _rejected(raw, found.error, found.detail)
  name, arguments = body.name, body.arguments
  if body.is_code:
    name = tool.name if tool else name
    arguments = {"code": arguments}
  if tool is None:
    if not isinstance(name, str) or not name:
      return _rejected(raw, "unknown tool", "the call needs a name")
    if not isinstance(arguments, dict):
      detail = "`arguments` must be an object"
      return _rejected(raw, "bad arguments", detail, name)
    return ToolCall(name=name, arguments=arguments, raw=raw)
  if name != tool.name:
    return _rejected(raw, "unknown tool", f"use {tool.name!r}", str(name))
  if not isinstance(arguments, dict) or not tool.accepts(set(arguments)):
    return _rejected(raw, "bad arguments", tool.wanted, tool.name)
  for key, value in arguments.items():
    if not isinstance(value, str):
      detail = f"`{key}` must be a string"
      return _rejected(raw, "bad arguments", detail, tool.name)
  return ToolCall(name=tool.name, arguments=arguments, raw=raw)


def _rejected(raw: str, error: str, detail: str, name: str = "") -> ToolCall:
  return ToolCall(name, types.MappingProxyType({}), raw, error, detail)


def limit(calls: Sequence[ToolCall], max_calls: int) -> list[ToolCall]:
  """At most `max_calls`; the last one that fits says that more were asked."""
  if len(calls) <= max_calls:
    return list(calls)
  last = calls[max_calls - 1]
  detail = f"at most {max_calls} in one turn"
  return [
    *calls[: max_calls - 1],
    _rejected(last.raw, "too many calls", detail, last.name),
  ]


def _lex(
  ids: Sequence[int], tokenizer: tokenizer_lib.Tokenizer, tags: Sequence[str]
) -> Iterator[dialects.Piece]:
  """Cuts ids at tags and at special tokens."""
  spelt = [tag for tag in tags if tag not in tokenizer.special_ids]
  run: list[int] = []
  for index in [*ids, None]:
    special = None if index is None else tokenizer.find_special(index)
    if index is not None and special is None:
      run.append(index)
      continue
    for text in dialects.split_at(spelt, tokenizer.decode(run)):
      yield dialects.Piece(text if text in spelt else None, text, False)
    run = []
    if special is not None:
      yield dialects.Piece(special, special, True)
