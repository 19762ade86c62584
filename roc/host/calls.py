r"""Tool calls and answers, found in one turn of the model.

A call is Hermes/Qwen text, `<tool_call>{"name", "arguments"}</tool_call>`. The
parser sees only ids that the model sampled, so neither a question nor a tool's
answer can call a tool or give an answer. Where a tag is one special token, only
that token is the tag: the same characters spelt out are text.

Policy, one row a case (`tests/host/calls_test.py` holds the same table):

  tag inside a string of the call's JSON               text: the call ends at
                                                       the closing tag at which
                                                       it is JSON
  opened, never closed; opened again before closing    rejected: unclosed
  body is no JSON object, or holds NaN or Infinity     rejected: bad JSON
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
  answer without \boxed{...}, unclosed, tag inside     no answer
  neither a closed call nor an answer                  void turn
"""

import dataclasses
import itertools
import json
import math
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from roc.host import rewards
from roc.host import tokenizer as tokenizer_lib

# A turn asks for at most this many calls, so that the C axis has a bound.
MAX_CALLS_PER_TURN = 4
# Tags behind a call's first one among which its end is looked for, so that a
# turn of nothing but tags is read in time.
_NEAR = 16

_TAGS = (
  tokenizer_lib.CALL_OPEN,
  tokenizer_lib.CALL_CLOSE,
  tokenizer_lib.ANSWER_OPEN,
  tokenizer_lib.ANSWER_CLOSE,
)


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
) -> ParsedTurn:
  """Reads the calls and answers of one turn of the model.

  Args:
    ids: token ids that the model sampled in this turn and nothing else; its
      end-of-turn token may be among them.
    tokenizer: gives the tags' ids; a tag that is no special token of its
      vocabulary is looked for as text.
    tool: the one tool that there is; None: any name and any arguments.
    max_calls: calls that may be asked for in one turn; None: no limit.

  Returns:
    The turn by the policy table at the module's head; an empty turn is void.
  """
  return _parse(list(_lex(ids, tokenizer)), tool, max_calls)


def parse_text(
  text: str, *, tool: ToolSpec | None = None, max_calls: int | None = None
) -> ParsedTurn:
  """Reads the calls and answers of a turn that is only known as text.

  Args:
    text: of the turn; every tag in it counts, as nothing says which were
      tokens.
    tool: the one tool that there is; None: any name and any arguments.
    max_calls: calls that may be asked for in one turn; None: no limit.
  """
  pattern = "|".join(map(re.escape, _TAGS))
  pieces = [
    _Piece(piece if piece in _TAGS else None, piece, False)
    for piece in _split(pattern, text)
  ]
  return _parse(pieces, tool, max_calls)


class _Piece(NamedTuple):
  """A tag, or a run of text (`tag` is None)."""

  tag: str | None
  text: str
  is_special: bool


def _parse(
  pieces: Sequence[_Piece], tool: ToolSpec | None, max_calls: int | None
) -> ParsedTurn:
  found: list[ToolCall] = []
  answers: list[str] = []
  content: list[str] = []
  n_closed = at = 0
  while at < len(pieces):
    piece = pieces[at]
    if piece.tag == tokenizer_lib.CALL_OPEN:
      end = _call_end(pieces, at)
      raw = _text(pieces[at + 1 : end.at]).strip()
      if end.is_closed:
        n_closed += 1
        found.append(read_call(raw, tool))
      else:
        found.append(_rejected(raw, "unclosed", "there is no closing tag"))
      at = end.at + end.is_closed
      continue
    if piece.tag == tokenizer_lib.ANSWER_OPEN:
      answers += _answer_from(pieces, at)
    content.append(piece.text)
    at += 1
  if max_calls is not None:
    found = limit(found, max_calls)
  return ParsedTurn(
    calls=tuple(found),
    answers=tuple(answers),
    is_void=not n_closed and not answers,
    content=_before_end("".join(content)).strip(),
  )


def _before_end(text: str) -> str:
  """Text without the tags that end a turn."""
  ends = (tokenizer_lib.TURN_END, tokenizer_lib.END_OF_TEXT)
  while (short := text.rstrip()).endswith(ends):
    text = short[: short.rindex("<|")]
  return text


class _End(NamedTuple):
  """The piece that ends a call; where nothing closes it, what follows it."""

  at: int
  is_closed: bool


def _call_end(pieces: Sequence[_Piece], start: int) -> _End:
  """Where the call opened at `start` ends, by the policy above."""
  tags = itertools.islice(
    (
      i
      for i in range(start + 1, len(pieces))
      if pieces[i].tag in (tokenizer_lib.CALL_OPEN, tokenizer_lib.CALL_CLOSE)
    ),
    _NEAR,
  )
  first = None
  for i in tags:
    first = i if first is None else first
    is_close = pieces[i].tag == tokenizer_lib.CALL_CLOSE
    if is_close and _is_json(_text(pieces[start + 1 : i])):
      return _End(i, True)
  if first is None:
    return _End(len(pieces), False)
  return _End(first, pieces[first].tag == tokenizer_lib.CALL_CLOSE)


def _answer_from(pieces: Sequence[_Piece], start: int) -> list[str]:
  """The answer opened at `start`, if it is well-formed, else nothing."""
  for i in range(start + 1, len(pieces)):
    tag = pieces[i].tag
    if tag in (tokenizer_lib.CALL_OPEN, tokenizer_lib.ANSWER_OPEN):
      return []
    if tag == tokenizer_lib.ANSWER_CLOSE:
      answer = rewards.extract_boxed(_text(pieces[start + 1 : i]))
      return [] if answer is None else [answer]
    if pieces[i].is_special:
      return []
  return []


def _text(pieces: Sequence[_Piece]) -> str:
  return "".join(piece.text for piece in pieces)


def _read_json(text: str) -> Any:
  """Reads JSON, which has no NaN and no infinite numbers.

  Raises:
    ValueError, RecursionError: it is none.
  """
  return json.loads(text, parse_constant=_no_number, parse_float=_finite)


def _no_number(text: str) -> float:
  raise ValueError(f"{text} is no number of JSON")


def _finite(text: str) -> float:
  return float(text) if math.isfinite(float(text)) else _no_number(text)


def _is_json(text: str) -> bool:
  try:
    _read_json(text)
  except (ValueError, RecursionError):
    return False
  return True


def read_call(raw: str, tool: ToolSpec | None = PYTHON) -> ToolCall:
  """Reads the text between a call's tags.

  Args:
    raw: JSON with `name` and `arguments`; arguments may themselves be a string
      that holds JSON.
    tool: the one tool that there is; None: any, with any arguments.

  Returns:
    The call; `error` says what is wrong with it, if anything is.
  """
  try:
    body = _read_json(raw)
    if not isinstance(body, dict):
      raise ValueError("the call must be a JSON object")
    arguments = body.get("arguments", {})
    if isinstance(arguments, str):
      arguments = _read_json(arguments)
  # Deep nesting exhausts the parser's stack: the model's fault too.
  except (ValueError, RecursionError) as error:
    return _rejected(raw, "bad JSON", str(error))
  name = body.get("name")
  if tool is None:
    if not isinstance(name, str) or not name:
      return _rejected(raw, "unknown tool", "the call needs a name")
    if not isinstance(arguments, dict) or "arguments" not in body:
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
  ids: Sequence[int], tokenizer: tokenizer_lib.Tokenizer
) -> Iterator[_Piece]:
  """Cuts ids at tags and at special tokens."""
  spelt = [tag for tag in _TAGS if tag not in tokenizer.special_ids]
  pattern = "|".join(re.escape(tag) for tag in spelt)
  run: list[int] = []
  for index in [*ids, None]:
    special = None if index is None else tokenizer.find_special(index)
    if index is not None and special is None:
      run.append(index)
      continue
    for text in _split(pattern, tokenizer.decode(run)):
      yield _Piece(text if text in spelt else None, text, False)
    run = []
    if special is not None:
      yield _Piece(special, special, True)


def _split(pattern: str, text: str) -> list[str]:
  pieces = re.split(f"({pattern})", text) if pattern else [text]
  return [piece for piece in pieces if piece]
