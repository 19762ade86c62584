r"""Tool calls: found in the model's turn, run in the sandbox, put into words.

A call is Hermes/Qwen text, `<tool_call>{"name", "arguments"}</tool_call>`. The
parser sees only ids that the model sampled, so neither a question nor a tool's
answer can call a tool or give an answer. Where a tag is one special token, only
that token is the tag: the same characters spelt out are text.

Policy, one row a case (`tests/host/tools_test.py` holds the same table):

  opened, never closed; opened again before closing    rejected: unclosed
  body is no JSON object                               rejected: bad JSON
  special token inside the body                        rejected: bad JSON
  no name, another name                                rejected: unknown tool
  missing, extra or non-string argument                rejected: bad arguments
  arguments given as a string that holds JSON          accepted
  closing tag alone                                    plain text
  several calls                                        all run, answered in order
  more than `max_calls` in one turn                    the last that fits is
                                                       rejected: too many calls,
                                                       the rest fall away
  answer without \boxed{...}, unclosed, tag inside     no answer
  neither a closed call nor an answer                  void turn
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
import dataclasses
import inspect
import json
import re
import types
from typing import Any, Protocol

from roc import layout
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


@dataclasses.dataclass(frozen=True)
class ToolOutcome:
  """What became of a call: how it ended, and the words the model reads."""

  call: ToolCall
  status: layout.ToolStatus
  text: str


class Result(Protocol):
  """What the renderers read of a sandbox's result."""

  @property
  def status(self) -> layout.ToolStatus: ...
  @property
  def stdout(self) -> str: ...
  @property
  def stderr(self) -> str: ...
  @property
  def exit_code(self) -> int | None: ...


class Runner(Protocol):
  """The part of the sandbox that a toolbox needs."""

  def submit(
    self, code: str, *, trajectory: Any = ..., call_index: int = ...
  ) -> futures.Future: ...


def python(code: str) -> str:
  """Runs Python code in a fresh interpreter.

  Args:
    code: a complete program; what it prints is the answer.

  Returns:
    What the program printed, or its error.
  """
  raise NotImplementedError("the sandbox runs the code; this is its signature")


# ---------------------------------------------------------------- parsing


def parse_turn(
  ids: Sequence[int],
  tokenizer: tokenizer_lib.Tokenizer,
  *,
  tool_name: str = "python",
  max_calls: int = MAX_CALLS_PER_TURN,
) -> ParsedTurn:
  """Reads the calls and answers of one turn of the model.

  Args:
    ids: token ids that the model sampled in this turn and nothing else; its
      end-of-turn token may be among them.
    tokenizer: gives the tags' ids; a tag that is no special token of its
      vocabulary is looked for as text.
    tool_name: the one tool that there is.
    max_calls: calls that may be asked for in one turn.

  Returns:
    The turn by the policy table at the module's head; an empty turn is void.
  """
  reader = _TurnReader(tool_name)
  for tag, text, is_special in _lex(ids, tokenizer):
    reader.feed(tag, text, is_special)
  reader.finish()
  return ParsedTurn(
    calls=tuple(_limit(reader.calls, max_calls)),
    answers=tuple(reader.answers),
    is_void=not reader.n_closed_calls and not reader.answers,
  )


class _TurnReader:
  """The parser's state: which block is open and what it holds so far."""

  def __init__(self, tool_name: str):
    self.calls: list[ToolCall] = []
    self.answers: list[str] = []
    self.n_closed_calls = 0
    self._tool_name = tool_name
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
      call = read_call(raw, self._tool_name)
    self.calls.append(call)
    self._opened_by = None


def read_call(raw: str, tool_name: str = "python") -> ToolCall:
  """Reads the text between a call's tags.

  Args:
    raw: JSON with `name` and `arguments`; arguments may themselves be a string
      that holds JSON.
    tool_name: the one tool that there is.

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
  if name != tool_name:
    return _rejected(raw, "unknown tool", f"use {tool_name!r}", str(name))
  if not isinstance(arguments, dict) or set(arguments) != {"code"}:
    return _rejected(raw, "bad arguments", "give `code` alone", name)
  if not isinstance(arguments["code"], str):
    return _rejected(raw, "bad arguments", "`code` must be a string", name)
  return ToolCall(name=name, arguments=arguments, raw=raw)


def _rejected(raw: str, error: str, detail: str, name: str = "") -> ToolCall:
  return ToolCall(name, types.MappingProxyType({}), raw, error, detail)


def _limit(calls: list[ToolCall], max_calls: int) -> list[ToolCall]:
  """At most `max_calls`; the last one that fits says that more were asked."""
  if len(calls) <= max_calls:
    return calls
  last = calls[max_calls - 1]
  detail = f"at most {max_calls} in one turn"
  return [
    *calls[: max_calls - 1],
    _rejected(last.raw, "too many calls", detail, last.name),
  ]


def _lex(ids: Sequence[int], tokenizer: tokenizer_lib.Tokenizer):
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


# -------------------------------------------------------------- rendering


def cut_middle(text: str, max_chars: int) -> str:
  """Text of at most `max_chars`, what is too much cut out of the middle.

  Head and tail are what a reader needs: the first lines of output, and the last
  line of a traceback.
  """
  if len(text) <= max_chars:
    return text
  marker = "...(cut)..."
  room = max_chars - len(marker)
  if room <= 0:
    return text[:max_chars]
  tail = room // 2
  return text[: room - tail] + marker + (text[-tail:] if tail else "")


def render_compact(call: ToolCall, result: Result | None) -> str:
  """The fewest words: the output, or the last line of the traceback.

  Args:
    call: the call; its `error` speaks when there is no result.
    result: what the sandbox said; None for a call that never ran.
  """
  if result is None:
    return f"Invalid call: {call.error}"
  status = result.status
  if status == layout.ToolStatus.OK:
    return result.stdout.strip() or "(no output)"
  if status == layout.ToolStatus.EXIT:
    return f"Exit code {result.exit_code}"
  if status == layout.ToolStatus.ERROR:
    lines = result.stderr.strip().splitlines()
    return lines[-1].strip() if lines else "Error"
  return _STATUS_WORDS[status]


def render_rstar(call: ToolCall, result: Result | None) -> str:
  """The wording of rStar2-Agent's released tools, without the time taken.

  The time is left out because it differs from run to run, and what the model
  reads must not.

  Args:
    call: the call; its `error` speaks when there is no result.
    result: what the sandbox said; None for a call that never ran.
  """
  if result is None:
    return f"Failed to decode tool call: {call.error}: {call.detail}"
  lines = ["Tool call success"]
  if result.status != layout.ToolStatus.OK:
    reason = _RSTAR_REASONS.get(result.status, "")
    lines = ["Tool call failure", f"reason: {reason}"]
  if result.stdout.strip():
    lines.append(f"stdout: {result.stdout.strip()}")
  if result.stderr.strip():
    lines.append(f"stderr: {result.stderr.strip()}")
  return "\n".join(lines)


_STATUS_WORDS = types.MappingProxyType(
  {
    layout.ToolStatus.TIMEOUT: "Timeout",
    layout.ToolStatus.MEMORY: "Memory limit",
    layout.ToolStatus.OUTPUT_LIMIT: "Output limit",
    layout.ToolStatus.CRASH: "Crash",
    layout.ToolStatus.RESOURCE: "Resource limit",
    layout.ToolStatus.REJECTED: "Invalid call: bad arguments",
    layout.ToolStatus.INFRA: "Tool unavailable",
  }
)

_RSTAR_REASONS = types.MappingProxyType(
  {
    layout.ToolStatus.TIMEOUT: "worker_timeout",
    layout.ToolStatus.REJECTED: "invalid_input",
    layout.ToolStatus.INFRA: "internal_error",
  }
)

Renderer = Callable[[ToolCall, Result | None], str]

RENDERERS: Mapping[str, Renderer] = types.MappingProxyType(
  {"compact": render_compact, "rstar": render_rstar}
)


# ---------------------------------------------------------------- running


class Toolbox:
  """Runs calls in a sandbox and words their results.

  Args:
    sandbox: runs the code; its `submit` returns a future.
    renderer: name in `RENDERERS`, or a function of (call, result or None).
    tool_name: name by which the model calls the tool.
    max_chars: longest text the model reads; more is cut from the middle.
  """

  def __init__(
    self,
    sandbox: Runner,
    *,
    renderer: str | Renderer = "compact",
    tool_name: str = "python",
    max_chars: int = 256,
  ):
    if isinstance(renderer, str) and renderer not in RENDERERS:
      raise ValueError(
        f"tool renderer {renderer!r} is unknown; choose one of "
        f"{', '.join(RENDERERS)}"
      )
    if max_chars < 1:
      raise ValueError(f"max_chars must be at least 1, not {max_chars}")
    self.tool_name = tool_name
    self._sandbox = sandbox
    self._render = (
      RENDERERS[renderer] if isinstance(renderer, str) else renderer
    )
    self._max_chars = max_chars

  def parse_turn(
    self, ids: Sequence[int], tokenizer: tokenizer_lib.Tokenizer
  ) -> ParsedTurn:
    """`parse_turn` with this box's tool name."""
    return parse_turn(ids, tokenizer, tool_name=self.tool_name)

  def submit(
    self, call: ToolCall, *, trajectory: Any = "", call_index: int = 0
  ) -> futures.Future[ToolOutcome]:
    """Starts a call; the future never waits for one that cannot run.

    Args:
      call: as parsed; one with an `error` is REJECTED at once.
      trajectory: names the rollout; with `call_index` it seeds the tool's
        random numbers.
      call_index: number of the call in its rollout.

    Returns:
      Future of the outcome. It fails only if the sandbox's own future does.
    """
    done: futures.Future[ToolOutcome] = futures.Future()
    # Running from the start: only the sandbox's own future can be cancelled.
    done.set_running_or_notify_cancel()
    if call.error is not None:
      done.set_result(self._outcome(call, layout.ToolStatus.REJECTED, None))
      return done
    running = self._sandbox.submit(
      call.arguments["code"], trajectory=trajectory, call_index=call_index
    )

    def finish(future: futures.Future) -> None:
      if future.cancelled():
        done.set_exception(futures.CancelledError())
      elif future.exception() is not None:
        done.set_exception(future.exception())
      else:
        try:
          result = future.result()
          done.set_result(self._outcome(call, result.status, result))
        except Exception as error:  # a renderer's bug must reach the waiter
          done.set_exception(error)

    running.add_done_callback(finish)
    return done

  def _outcome(
    self, call: ToolCall, status: layout.ToolStatus, result: Result | None
  ) -> ToolOutcome:
    text = cut_middle(self._render(call, result), self._max_chars)
    return ToolOutcome(call, layout.ToolStatus(status), text)


# ----------------------------------------------------------------- schema

_JSON_TYPES = types.MappingProxyType(
  {str: "string", int: "integer", float: "number", bool: "boolean"}
)


def tool_schema(
  function: Callable[..., Any] = python, name: str | None = None
) -> dict[str, Any]:
  """OpenAI-style schema of a tool from its type hints and docstring.

  Args:
    function: every parameter needs a type among str, int, float and bool, and a
      line under `Args:` in a Google-style docstring.
    name: shown instead of the function's name.

  Raises:
    ValueError: a parameter has no known type or no description.
  """
  shown = name or function.__name__
  doc = inspect.getdoc(function) or ""
  properties = {}
  required = []
  for parameter in inspect.signature(function).parameters.values():
    found = re.search(rf"(?m)^\s+{parameter.name}: (.+)$", doc)
    if parameter.annotation not in _JSON_TYPES or not found:
      raise ValueError(
        f"tool {shown!r}: parameter {parameter.name!r} needs a type (str, int, "
        "float or bool) and a line under `Args:` in the docstring"
      )
    properties[parameter.name] = {
      "type": _JSON_TYPES[parameter.annotation],
      "description": found[1],
    }
    if parameter.default is inspect.Parameter.empty:
      required.append(parameter.name)
  return {
    "type": "function",
    "function": {
      "name": shown,
      "description": doc.split("\n\n")[0].replace("\n", " "),
      "parameters": {
        "type": "object",
        "properties": properties,
        "required": required,
      },
    },
  }


def system_text(schemas: Sequence[Mapping[str, Any]]) -> str:
  """System text that offers tools as Qwen's templates do: one schema a line."""
  lines = "\n".join(json.dumps(schema) for schema in schemas)
  return (
    "# Tools\n\nYou may call one or more functions to assist with the user "
    "query.\n\nYou are provided with function signatures within "
    f"<tools></tools> XML tags:\n<tools>\n{lines}\n</tools>\n\nFor each "
    "function call, return a json object with function name and arguments "
    "within <tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
  )
