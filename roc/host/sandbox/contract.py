"""What a caller hands to the sandbox and what comes back; nothing else.

Both sides of the process border import this file: the trainer's client and the
exec'd supervisor. So it holds plain frozen records over JSON-able values.
"""

import dataclasses
import json
import math
from typing import Any

from roc import layout

# Weakest first; a machine's tier is the strongest one that its probes allow.
TIERS = ("process", "filtered", "confined", "isolated", "external")
TOOLS = ("python", "session")
MAX_STDIN_BYTES = 16 << 20
_MAX_CODE_BYTES = 2 << 20
_MAX_OUTPUT_BYTES = 1 << 15  # more would hold up the supervisor

Trajectory = str | int | tuple  # stable id of a rollout


class SandboxError(RuntimeError):
  """The sandbox cannot start or cannot be used; says what and the remedy."""


def tier_name(text: str) -> str:
  """Returns the tier that a user means by its name or by `T0` to `T4`.

  Raises:
    ValueError: there is no such tier.
  """
  word = text.strip().lower()
  if word in TIERS:
    return word
  if len(word) == 2 and word[0] == "t" and word[1] in "01234":
    return TIERS[int(word[1])]
  raise ValueError(
    f"there is no tier {text!r}: choose one of "
    + ", ".join(f"{name} (T{i})" for i, name in enumerate(TIERS))
  )


@dataclasses.dataclass(frozen=True)
class Limits:
  """What one call may use. Every field is a hard bound, never a hint.

  Attributes:
    wall_s: seconds from the start of the child; waiting in the queue is free.
    cpu_s: CPU seconds of the call's main process, all its threads together.
    memory_mb: address space that a process may add to the bare interpreter's.
    total_memory_mb: memory that all processes of the call may use together,
      beyond what they share with the interpreter that they were forked from.
    output_bytes: bytes kept of stdout and of stderr, each; one more ends the
      call.
    n_processes: live processes of the call, the main one included.
    file_mb: size of any one file that the call writes.
    disk_mb: size of all that lies in its directory.
    n_entries: files and directories in its directory.
    n_files: open descriptors of a process, the three standard ones included.
    code_bytes: UTF-8 length of the code; longer code is rejected unrun.
  """

  wall_s: float = 5.0
  cpu_s: float = 5.0
  memory_mb: int = 512
  total_memory_mb: int = 1024
  output_bytes: int = 4096
  n_processes: int = 16
  file_mb: int = 16
  disk_mb: int = 64
  n_entries: int = 4096
  n_files: int = 64
  code_bytes: int = 65536

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      kinds = (int, float) if field.type is float else (int,)
      if isinstance(value, bool) or not isinstance(value, kinds):
        raise ValueError(
          f"Limits.{field.name} must be a number, found {value!r}"
        )
      if not (math.isfinite(value) and value > 0):
        raise ValueError(
          f"Limits.{field.name} must be positive and finite, found {value!r}"
        )
    for name, most in (
      ("output_bytes", _MAX_OUTPUT_BYTES),
      ("code_bytes", _MAX_CODE_BYTES),
    ):
      if getattr(self, name) > most:
        raise ValueError(
          f"Limits.{name} must be at most {most}, found {getattr(self, name)}"
        )
    if self.n_files < 8:
      raise ValueError(
        f"Limits.n_files must be at least 8, found {self.n_files}: Python"
        " itself needs a few descriptors"
      )

  def to_json(self) -> dict:
    """Returns the fields as a JSON-able dict, inverse of `from_json`."""
    return dict(vars(self))

  @classmethod
  def from_json(cls, fields: dict) -> "Limits":
    """Returns the limits written by `to_json`; unknown fields raise."""
    return cls(**fields)


@dataclasses.dataclass(frozen=True)
class ToolResult:
  """How one call ended.

  `status`, `stdout`, `stderr`, `error_type`, `exit_code` and `signal` are a
  function of the code alone; `cause` and the measurements below vary from run
  to run and must never reach the model.

  Attributes:
    status: exactly one `layout.ToolStatus`.
    stdout: decoded UTF-8, bad bytes replaced, cut to `Limits.output_bytes`.
    stderr: likewise; an uncaught exception's traceback stands here.
    error_type: class name of the uncaught exception, or "".
    exit_code: of the main process; None where a signal ended it or it never
      ran.
    signal: that ended the main process, or None.
    cause: which bound or fault, in a word, where a status has several: `wall`
      or `cpu` (TIMEOUT), `process` or `total` (MEMORY), `processes`, `disk` or
      `refused` (RESOURCE), `stdout` or `stderr` (OUTPUT_LIMIT), `queue`,
      `cancelled`, `sandbox` or `session` (INFRA).
    clean: the program reached its end or an exception or `sys.exit` ended it;
      False after `os._exit`, a kill, or when nothing ran.
    truncated_bytes: output bytes seen beyond the cap and dropped.
    wall_ms: from the start of the child to its last process' death.
    cpu_ms: of the main process and of the children it waited for.
    max_rss_kb: largest resident size of the main process.
    tier: confinement under which the call ran.
    retries: how often the call was run again after a fault of the sandbox.
  """

  status: layout.ToolStatus
  stdout: str = ""
  stderr: str = ""
  error_type: str = ""
  exit_code: int | None = None
  signal: int | None = None
  cause: str = ""
  clean: bool = False
  truncated_bytes: int = 0
  wall_ms: float = 0.0
  cpu_ms: float = 0.0
  max_rss_kb: int = 0
  tier: str = "process"
  retries: int = 0

  def with_note(self, note: str) -> "ToolResult":
    """Returns the result with a line of the sandbox's at the end of stderr."""
    if not note:
      return self
    gap = "" if not self.stderr or self.stderr.endswith("\n") else "\n"
    return dataclasses.replace(self, stderr=self.stderr + gap + note)

  def to_fields(self) -> dict:
    """Returns the fields as a JSON-able dict, the status by lower-case name."""
    return {**vars(self), "status": self.status.name.lower()}

  @classmethod
  def from_fields(cls, fields: dict[str, Any]) -> "ToolResult":
    """Returns the result written by `to_fields`."""
    status = layout.ToolStatus[fields["status"].upper()]
    values: dict[str, Any] = {**fields, "status": status}
    return cls(**values)

  def to_json(self) -> str:
    """Returns one JSON object, see `to_fields`."""
    return json.dumps(self.to_fields())

  @classmethod
  def from_json(cls, text: str) -> "ToolResult":
    """Returns the result written by `to_json`."""
    return cls.from_fields(json.loads(text))


def rejection(
  code: object, stdin: object, limits: Limits, tool: object = TOOLS[0]
) -> str | None:
  """Says why a call must not run, in a sentence the model can act on.

  Args:
    code: what the model sent as the program.
    stdin: what the program is to read.
    limits: of this call.
    tool: that was asked for.

  Returns:
    The sentence, or None when the call may run.
  """
  if tool not in TOOLS:
    return (
      f"The call was not run: there is no tool {str(tool)[:80]!r}; use one of"
      f" {', '.join(TOOLS)}."
    )
  if not isinstance(code, str):
    return (
      "The call was not run: the code must be a string, found"
      f" {type(code).__name__}."
    )
  if "\0" in code:
    line = code.count("\n", 0, code.index("\0")) + 1
    return (
      f"The code was not run: it contains a NUL character in line {line};"
      " remove it."
    )
  try:
    n_bytes = len(code.encode("utf-8"))
  except UnicodeEncodeError as error:
    line = code.count("\n", 0, error.start) + 1
    return (
      "The code was not run: it is not valid UTF-8 (lone surrogate in line"
      f" {line}); write the character as an escape."
    )
  if n_bytes > limits.code_bytes:
    return (
      f"The code was not run: it is {n_bytes} bytes long and at most"
      f" {limits.code_bytes} are allowed; send a shorter program."
    )
  if not isinstance(stdin, str | bytes):
    return (
      "The call was not run: stdin must be a string, found"
      f" {type(stdin).__name__}."
    )
  if len(stdin_bytes(stdin)) > MAX_STDIN_BYTES:
    return (
      f"The call was not run: stdin is longer than {MAX_STDIN_BYTES} bytes;"
      " send less."
    )
  return None


def stdin_bytes(stdin: str | bytes) -> bytes:
  """Returns stdin as the bytes the child reads; lone surrogates survive."""
  if isinstance(stdin, str):
    return stdin.encode("utf-8", "surrogatepass")
  return stdin


def infra(why: str, cause: str = "sandbox") -> ToolResult:
  """Returns the result of a call that the sandbox failed, or that was ended."""
  return ToolResult(layout.ToolStatus.INFRA, stderr=why, cause=cause)
