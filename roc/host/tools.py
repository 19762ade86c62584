"""Runs the model's calls in a sandbox and tells it which tool there is."""

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
from roc.host import tokenizer as tokenizer_lib


@dataclasses.dataclass(frozen=True)
class ToolOutcome:
  """What became of a call: how it ended, and the words the model reads."""

  call: calls.ToolCall
  status: layout.ToolStatus
  text: str


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


class Toolbox:
  """Runs calls in a sandbox and words their results.

  Args:
    sandbox: runs the code; its `submit` returns a future.
    renderer: name in `renderers.RENDERERS`, or a function of (call, result).
    tool_name: name by which the model calls the tool.
    max_chars: longest text the model reads; more is cut from the middle.
  """

  def __init__(
    self,
    sandbox: Runner,
    *,
    renderer: str | renderers.Renderer = "compact",
    tool_name: str = "python",
    max_chars: int = 256,
  ):
    if isinstance(renderer, str) and renderer not in renderers.RENDERERS:
      raise ValueError(
        f"tool renderer {renderer!r} is unknown; choose one of "
        f"{', '.join(renderers.RENDERERS)}"
      )
    if max_chars < 1:
      raise ValueError(f"max_chars must be at least 1, not {max_chars}")
    self.tool_name = tool_name
    self.sandbox = sandbox
    self._render = (
      renderers.RENDERERS[renderer] if isinstance(renderer, str) else renderer
    )
    self._max_chars = max_chars

  def parse_turn(
    self, ids: Sequence[int], tokenizer: tokenizer_lib.Tokenizer
  ) -> calls.ParsedTurn:
    """`calls.parse_turn` with this box's tool name."""
    return calls.parse_turn(ids, tokenizer, tool_name=self.tool_name)

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
    running = self.sandbox.submit(
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
