"""Runs the model's calls in a sandbox and tells it which tool there is."""

import contextlib
import dataclasses
import inspect
import json
import re
import types
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from typing import Any, Protocol

from roc import layout
from roc.host import calls, renderers
from roc.host import chat as chat_lib


@dataclasses.dataclass(frozen=True)
class ToolOutcome:
  """What became of a call: how it ended, and the words the model reads."""

  call: calls.ToolCall
  status: layout.ToolStatus
  text: str


_CANCEL_S = 2.0  # for a program that was cancelled to be dead


class Runner(Protocol):
  """The part of the sandbox that a toolbox needs.

  One that offers sessions also has `end_trajectory`, and its `submit` takes
  `tool` and `stdin`.
  """

  def submit(
    self, code: str, *, trajectory: Any = ..., call_index: int = ...
  ) -> futures.Future: ...


def python(code: str, stdin: str = "") -> str:
  """Runs Python code in a fresh interpreter.

  Args:
    code: a complete program; what it prints is the answer.
    stdin: what the program reads from its standard input.

  Returns:
    What the program printed, or its error.
  """
  raise NotImplementedError("the sandbox runs the code; this is its signature")


def session(code: str) -> str:
  """Runs a cell of Python code in a session that keeps its variables.

  Args:
    code: the next cell; a bare expression at its end is printed.

  Returns:
    What the cell printed, or its error.
  """
  raise NotImplementedError("the sandbox runs the code; this is its signature")


def python_code_with_standard_io(code: str, input: str) -> str:
  """Runs Python code that reads standard input and prints to standard output.

  Args:
    code: a complete program; what it prints is the answer.
    input: what the program reads from its standard input.

  Returns:
    What the program printed, or its error.
  """
  raise NotImplementedError("the sandbox runs the code; this is its signature")


def jupyter_code(code: str) -> str:
  """Runs a cell of Python code as a notebook does, variables kept.

  Args:
    code: the next cell; a bare expression at its end is printed.

  Returns:
    What the cell printed, or its error.
  """
  raise NotImplementedError("the sandbox runs the code; this is its signature")


# What the model may be offered; the last two are named as rStar2-Agent's
# released tools are (microsoft/rStar, rstar2_agent/tools).
TOOLS = types.MappingProxyType(
  {
    "python": (calls.ToolSpec(stdin="stdin"), python),
    "session": (calls.ToolSpec("session", "session"), session),
    "python_code_with_standard_io": (
      calls.ToolSpec(
        "python_code_with_standard_io",
        stdin="input",
        needs_stdin=True,
      ),
      python_code_with_standard_io,
    ),
    "jupyter_code": (calls.ToolSpec("jupyter_code", "session"), jupyter_code),
  }
)


class Toolbox:
  """Runs calls in a sandbox and words their results.

  Args:
    sandbox: runs the code; its `submit` returns a future.
    tool: name in `TOOLS` of the one tool that the model has.
    renderer: name in `renderers.RENDERERS`, or a function of (call, result).
    tool_name: name by which the model calls the tool; by default the tool's.
    max_chars: longest text the model reads; more is cut from the middle.
  """

  def __init__(
    self,
    sandbox: Runner,
    *,
    tool: str = "python",
    renderer: str | renderers.Renderer = "compact",
    tool_name: str = "",
    max_chars: int = 256,
  ):
    if tool not in TOOLS:
      raise ValueError(
        f"tool {tool!r} is unknown; choose one of {', '.join(TOOLS)}"
      )
    if isinstance(renderer, str) and renderer not in renderers.RENDERERS:
      raise ValueError(
        f"tool renderer {renderer!r} is unknown; choose one of "
        f"{', '.join(renderers.RENDERERS)}"
      )
    if max_chars < 1:
      raise ValueError(f"max_chars must be at least 1, not {max_chars}")
    spec, self._function = TOOLS[tool]
    self.spec = dataclasses.replace(spec, name=tool_name or spec.name)
    self.sandbox = sandbox
    self._render = (
      renderers.RENDERERS[renderer] if isinstance(renderer, str) else renderer
    )
    self._max_chars = max_chars
    self._running: dict[
      futures.Future, tuple[futures.Future, calls.ToolCall]
    ] = {}

  @property
  def tool_name(self) -> str:
    """Name by which the model calls the tool."""
    return self.spec.name

  @property
  def schema(self) -> dict[str, Any]:
    """OpenAI-style schema of the tool, for the prompt.

    A sandbox that knows what programs find in it (`surroundings`) adds that to
    the description.
    """
    note = getattr(self.sandbox, "surroundings", "")
    return tool_schema(self._function, self.tool_name, note)

  def parse_turn(
    self, ids: Sequence[int], chat: chat_lib.Chat
  ) -> calls.ParsedTurn:
    """`calls.parse_turn` with this box's tool and the chat's dialect."""
    return calls.parse_turn(
      ids, chat.tokenizer, tool=self.spec, dialect=chat.dialect
    )

  def submit(
    self, call: calls.ToolCall, *, trajectory: Any = "", call_index: int = 0
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
    others: dict[str, Any] = {}
    if self.spec.runs_as != calls.PYTHON.runs_as:
      others["tool"] = self.spec.runs_as
    if call.arguments.get(self.spec.stdin):
      others["stdin"] = call.arguments[self.spec.stdin]
    running = self.sandbox.submit(
      call.arguments["code"],
      trajectory=trajectory,
      call_index=call_index,
      **others,
    )

    def finish(future: futures.Future) -> None:
      self._running.pop(done, None)
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

    self._running[done] = running, call
    running.add_done_callback(finish)
    return done

  def cancel(self, call: futures.Future[ToolOutcome]) -> None:
    """Gives up a call whose outcome nobody will read, and kills its program."""
    if call not in self._running:
      return
    running, _ = self._running[call]
    if hasattr(self.sandbox, "cancel"):
      self.sandbox.cancel(running)  # pyrefly: ignore  # a test's may have none
    else:
      running.cancel()

  def give_up(
    self, submitted: Sequence[futures.Future[ToolOutcome]]
  ) -> list[ToolOutcome] | None:
    """Ends the calls of a turn that take too long, and says whose fault it is.

    Args:
      submitted: futures that `submit` returned, of one turn.

    Returns:
      Their outcomes, TIMEOUT for those that were not over; or None when the
      sandbox was running the program of none of them: then it is not the
      model's fault.
    """
    late = {f: self._running[f] for f in submitted if f in self._running}
    for future in late:
      self.cancel(future)
    ended = {}
    for future, (running, call) in late.items():
      with contextlib.suppress(
        TimeoutError, futures.CancelledError, futures.TimeoutError
      ):
        ended[future] = call, running.result(_CANCEL_S)
    void = layout.ToolStatus.INFRA
    ran = [
      r
      for _, r in ended.values()
      if r.status != void or getattr(r, "wall_ms", 0.0)
    ]
    if late and not ran:
      return None
    outcomes = []
    for future in submitted:
      if future in late:
        call, result = ended.get(future, (late[future][1], ran[0]))
        if result.status == void:
          result = dataclasses.replace(
            result, status=layout.ToolStatus.TIMEOUT, stderr="", cause="wall"
          )
        outcomes.append(self._outcome(call, result.status, result))
      else:
        outcomes.append(future.result())
    return outcomes

  def stats(self) -> dict[str, Any]:
    """The sandbox's counters, see `sandbox.Sandbox.stats`."""
    return self.sandbox.stats()  # pyrefly: ignore  # a test's may have none

  def end_trajectory(self, trajectory: Any) -> None:
    """Frees what the sandbox keeps for a rollout that is over."""
    if self.spec.runs_as == "session":
      self.sandbox.end_trajectory(trajectory)  # pyrefly: ignore

  def _outcome(
    self,
    call: calls.ToolCall,
    status: layout.ToolStatus,
    result: renderers.Result | None,
  ) -> ToolOutcome:
    text = renderers.cut_middle(self._render(call, result), self._max_chars)
    return ToolOutcome(call, layout.ToolStatus(status), text)


_JSON_TYPES = types.MappingProxyType(
  {str: "string", int: "integer", float: "number", bool: "boolean"}
)


def tool_schema(
  function: Callable[..., Any] = python,
  name: str | None = None,
  note: str = "",
) -> dict[str, Any]:
  """OpenAI-style schema of a tool from its type hints and docstring.

  Args:
    function: every parameter needs a type among str, int, float and bool, and a
      line under `Args:` in a Google-style docstring.
    name: shown instead of the function's name.
    note: sentences that follow the description.

  Raises:
    ValueError: a parameter has no known type or no description.
  """
  shown = name or function.__name__
  doc = inspect.getdoc(function) or ""
  description = doc.split("\n\n")[0].replace("\n", " ")
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
      "description": f"{description} {note}".rstrip(),
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
