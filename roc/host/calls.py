r"""Tool calls and answers, found in one turn of the model.

A call is Hermes/Qwen text, `<tool_call>{"name", "arguments"}</tool_call>`. The
parser sees only ids that the model sampled, so neither a question nor a tool's
answer can call a tool or give an answer. Where a tag is one special token, only
that token is the tag: the same characters spelt out are text.

Policy, one row a case (`tests/host/calls_test.py` holds the same table):

  opened, never closed; opened again before closing    rejected: unclosed
  body is no JSON object                               rejected: bad JSON
  special token inside the body                        rejected: bad JSON
  no name, another name                                rejected: unknown tool
  missing, unknown or non-string argument              rejected: bad arguments
  arguments given as a string that holds JSON          accepted
  closing tag alone                                    plain text
  several calls                                        all run, in that order
  more than `max_calls` in one turn                    the last that fits is
                                                       rejected: too many calls,
                                                       the rest fall away
  answer without \boxed{...}, unclosed, tag inside     no answer
  neither a closed call nor an answer                  void turn
"""

import dataclasses
import json
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from roc.host import rewards
from roc.host import tokenizer as tokenizer_lib

# A turn asks for at most this many calls, so that the C axis has a bound.
MAX_CALLS_PER_TURN = 4

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
  """

  calls: tuple[ToolCall, ...]
  answers: tuple[str, ...]
  is_void: bool

  @property
  def n_answers(self) -> int:
    """Well-formed answers in the turn."""
    return len(self.answers)


def parse_turn(
  ids: Sequence[int],
  tokenizer: tokenizer_lib.Tokenizer,
  *,
  tool: ToolSpec = PYTHON,
  max_calls: int = MAX_CALLS_PER_TURN,
) -> ParsedTurn:
  """Reads the calls and answers of one turn of the model.

  Args:
    ids: token ids that the model sampled in this turn and nothing else; its
      end-of-turn token may be among them.
    tokenizer: gives the tags' ids; a tag that is no special token of its
      vocabulary is looked for as text.
    tool: the one tool that there is.
    max_calls: calls that may be asked for in one turn.

  Returns:
    The turn by the policy table at the module's head; an empty turn is void.
  """
  reader = _TurnReader(tool)
  for tag, text, is_special in _lex(ids, tokenizer):
    reader.feed(tag, text, is_special)
  reader.finish()
  return ParsedTurn(
    calls=tuple(limit(reader.calls, max_calls)),
    answers=tuple(reader.answers),
    is_void=not reader.n_closed_calls and not reader.answers,
  )


class _TurnReader:
  """The parser's state: which block is open and what it holds so far."""

  def __init__(self, tool: ToolSpec):
    self.calls: list[ToolCall] = []
    self.answers: list[str] = []
    self.n_closed_calls = 0
    self._tool = tool
    self._opened_by: str | None = None
    self._texts: list[str] = []
    self._is_clean = True

  def feed(self, tag: str | None, text: str, is_special: bool) -> None:
    """Takes the next tag, or a run of text (`tag` is None)."""
    in_call = self._opened_by == tokenizer_lib.CALL_OPEN
    in_answer = self._opened_by == tokenizer_lib.ANSWER_OPEN
    if tag == tokenizer_lib.CALL_OPEN:
      self.finish()
      self._open(tag)
    elif tag == tokenizer_lib.ANSWER_OPEN and not in_call:
      self._open(tag)
    elif tag == tokenizer_lib.CALL_CLOSE and in_call:
      self.n_closed_calls += 1
      self._add_call(is_closed=True)
    elif tag == tokenizer_lib.ANSWER_CLOSE and in_answer:
      answer = rewards.extract_boxed("".join(self._texts))
      if self._is_clean and answer is not None:
        self.answers.append(answer)
      self._opened_by = None
    else:
      self._texts.append(text)
      self._is_clean = self._is_clean and not is_special

  def finish(self) -> None:
    """Ends the block that is open, if any; an open call is malformed."""
    if self._opened_by == tokenizer_lib.CALL_OPEN:
      self._add_call(is_closed=False)
    self._opened_by = None

  def _open(self, tag: str) -> None:
    self._opened_by = tag
    self._texts = []
    self._is_clean = True

  def _add_call(self, is_closed: bool) -> None:
    raw = "".join(self._texts).strip()
    if not is_closed:
      call = _rejected(raw, "unclosed", "there is no closing tag")
    elif not self._is_clean:
      call = _rejected(raw, "bad JSON", "a tag stands inside the call")
    else:
      call = read_call(raw, self._tool)
    self.calls.append(call)
    self._opened_by = None


def read_call(raw: str, tool: ToolSpec = PYTHON) -> ToolCall:
  """Reads the text between a call's tags.

  Args:
    raw: JSON with `name` and `arguments`; arguments may themselves be a string
      that holds JSON.
    tool: the one tool that there is.

  Returns:
    The call; `error` says what is wrong with it, if anything is.
  """
  try:
    body = json.loads(raw)
    if not isinstance(body, dict):
      raise ValueError("the call must be a JSON object")
    arguments = body.get("arguments", {})
    if isinstance(arguments, str):
      arguments = json.loads(arguments)
  # Deep nesting exhausts the parser's stack: the model's fault too.
  except (ValueError, RecursionError) as error:
    return _rejected(raw, "bad JSON", str(error))
  name = body.get("name")
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
) -> Iterator[tuple[str | None, str, bool]]:
  """Yields (tag or None, text, is_special) for tags and runs of text."""
  spelt = [tag for tag in _TAGS if tag not in tokenizer.special_ids]
  pattern = "|".join(re.escape(tag) for tag in spelt)
  run: list[int] = []
  for index in [*ids, None]:
    special = None if index is None else tokenizer.find_special(index)
    if index is not None and special is None:
      run.append(index)
      continue
    for text in _split(pattern, tokenizer.decode(run)):
      yield (text if text in spelt else None), text, False
    run = []
    if special is not None:
      yield special, special, True


def _split(pattern: str, text: str) -> list[str]:
  pieces = re.split(f"({pattern})", text) if pattern else [text]
  return [piece for piece in pieces if piece]
