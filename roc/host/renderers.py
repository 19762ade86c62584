"""What the model reads of a tool's result: short, and the same every time.

No clock, path or process id may stand in it: the same call must always read the
same. A renderer is a function of (call, result), and `RENDERERS` names them.
"""

import re
import types
from collections.abc import Callable, Mapping
from typing import Protocol

from roc import layout
from roc.host import calls


class Result(Protocol):
  """What the renderers read of a sandbox's result."""

  @property
  def status(self) -> layout.ToolStatus: ...
  @property
  def stdout(self) -> str: ...
  @property
  def stderr(self) -> str: ...
  @property
  def error_type(self) -> str: ...
  @property
  def exit_code(self) -> int | None: ...


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


def render_compact(call: calls.ToolCall, result: Result | None) -> str:
  """The fewest words: the output, or the last line of the traceback.

  What ended in another way says so, and why where stderr tells: the text of
  `sys.exit`, the loss of a session, what is to be changed in the code.

  Args:
    call: the call; its `error` speaks when there is no result.
    result: what the sandbox said; None for a call that never ran.
  """
  if result is None:
    return f"Invalid call: {call.error}"
  status = result.status
  if status == layout.ToolStatus.OK:
    return result.stdout.strip() or "(no output)"
  if status == layout.ToolStatus.ERROR:
    return _error_line(result)
  if status == layout.ToolStatus.EXIT:
    word = f"Exit code {result.exit_code}"
  else:
    word = _STATUS_WORDS[status]
  # What a program wrote on stderr before it met a limit explains nothing.
  last = result.stderr.strip().rpartition("\n")[2].strip()
  return f"{word}: {last}" if last and status in _EXPLAINED else word


def _error_line(result: Result) -> str:
  """`NameError: name 'prnt' is not defined`: the traceback's verdict."""
  lines = [line.strip() for line in result.stderr.strip().splitlines()]
  if not lines:
    return result.error_type or "Error"
  if _GROUP_BORDER.fullmatch(lines[-1]):
    return _group_line(lines)
  # A message of several lines: the first of them names the error.
  verdict = re.compile(rf"(\w+\.)*{re.escape(result.error_type)}\b")
  named = [line for line in lines if result.error_type and verdict.match(line)]
  return named[-1] if named else lines[-1]


def _group_line(lines: list[str]) -> str:
  """`ExceptionGroup: many (2 sub-exceptions); ValueError: a; KeyError: 1`.

  The traceback of a group is a tree of boxes. In each the verdict is the first
  line that is neither indented nor a header.
  """
  verdicts, is_open = [], True
  for line in lines:
    if _GROUP_BORDER.fullmatch(line):
      is_open = True
      continue
    text = line.lstrip("|+ ") if line.startswith("+ ") else line[2:]
    if is_open and text[:1].strip() and "Traceback (most" not in text:
      verdicts.append(text)
      is_open = False
  return "; ".join(verdicts)


def render_rstar(call: calls.ToolCall, result: Result | None) -> str:
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


_GROUP_BORDER = re.compile(r"(\+-)?\+-{4,}( [\d.]+ -+)?")
_EXPLAINED = frozenset(
  {
    layout.ToolStatus.EXIT,
    layout.ToolStatus.CRASH,
    layout.ToolStatus.REJECTED,
  }
)

_STATUS_WORDS = types.MappingProxyType(
  {
    layout.ToolStatus.TIMEOUT: "Timeout",
    layout.ToolStatus.MEMORY: "Memory limit",
    layout.ToolStatus.OUTPUT_LIMIT: "Output limit",
    layout.ToolStatus.CRASH: "Crash",
    layout.ToolStatus.RESOURCE: "Resource limit",
    layout.ToolStatus.REJECTED: "Invalid call",
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

Renderer = Callable[[calls.ToolCall, Result | None], str]

RENDERERS: Mapping[str, Renderer] = types.MappingProxyType(
  {"compact": render_compact, "rstar": render_rstar}
)
