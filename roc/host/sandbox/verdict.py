"""Whose fault was it? One status from what was seen and what the child said.

What the supervisor itself saw (its own kill, the wait status, bytes past the
cap) always wins. What the child wrote about itself decides only between the
ways in which a program can end by itself, and can never yield INFRA, the one
status that would spare the model: a program that forges its record gains
nothing over one that catches its own exception.
"""

import dataclasses
import os
import signal

from roc import layout
from roc.host.sandbox import payload

RECORD_BYTES = payload.RECORD_BYTES

_ENDINGS = {
  b"ok": layout.ToolStatus.OK,
  b"error": layout.ToolStatus.ERROR,
  b"memory": layout.ToolStatus.MEMORY,
  b"resource": layout.ToolStatus.RESOURCE,
  b"exit": layout.ToolStatus.EXIT,
}
_CAUSES = {
  layout.ToolStatus.MEMORY: "process",
  layout.ToolStatus.RESOURCE: "refused",
}


@dataclasses.dataclass(frozen=True)
class Evidence:
  """What is known of a call when its last process is dead.

  Attributes:
    wait_status: of the main process, as `os.wait4` gives it.
    killed_for: why the supervisor killed it, or None when it did not.
    killed_cause: which bound that was, in a word.
    flooded: the stream of which more came than the cap keeps, or "".
    setup_failure: why the child could not be prepared; sent before the model's
      code ran, on a socket that was closed before it ran; "" if it could.
    record: what the child wrote about its end, `RECORD_BYTES` at most.
    max_rss_kb: of the main process.
    memory_kb: what it was allowed.
    cpu_s: of the main process.
    cpu_limit_s: what it was allowed.
  """

  wait_status: int
  killed_for: layout.ToolStatus | None = None
  killed_cause: str = ""
  flooded: str = ""
  setup_failure: str = ""
  record: bytes = b""
  max_rss_kb: int = 0
  memory_kb: int = 1
  cpu_s: float = 0.0
  cpu_limit_s: float = 1.0


@dataclasses.dataclass(frozen=True)
class Verdict:
  """The judged part of a `contract.ToolResult`."""

  status: layout.ToolStatus
  error_type: str = ""
  exit_code: int | None = None
  signal: int | None = None
  clean: bool = False
  cause: str = ""


def pack_record(ending: bytes, error_type: str = "") -> bytes:
  """Returns the child's note on its end: a word and an exception's name."""
  name = error_type.encode("utf-8", "replace")[:200]
  return (ending + b"\0" + name + b"\0")[:RECORD_BYTES]


def _read_record(record: bytes) -> tuple[layout.ToolStatus | None, str]:
  parts = bytes(record[:RECORD_BYTES]).split(b"\0")
  if len(parts) < 3 or parts[0] not in _ENDINGS:
    return None, ""
  name = parts[1].decode("utf-8", "replace")
  return _ENDINGS[parts[0]], name if name.isidentifier() else ""


def judge(evidence: Evidence) -> Verdict:
  """Turns evidence into the call's verdict.

  Args:
    evidence: what the supervisor gathered.

  Returns:
    The verdict. INFRA only for a failed setup or a kill that was booked so (a
    cancelled call); never by anything the program did.
  """
  status = evidence.wait_status
  number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
  code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else None
  told, error_type = _read_record(evidence.record)
  # How fast a kill is decides whether a program still comes to its end, so
  # where one was called for, neither code nor signal is told.
  if evidence.setup_failure:
    return Verdict(layout.ToolStatus.INFRA, cause="sandbox")
  if evidence.killed_for is not None:
    return Verdict(evidence.killed_for, cause=evidence.killed_cause)
  if evidence.flooded:
    return Verdict(layout.ToolStatus.OUTPUT_LIMIT, cause=evidence.flooded)
  if number is not None:
    ended, cause = _of_signal(number, evidence)
    return Verdict(ended, "", None, number, cause=cause)
  if code is None:  # a status that only a forger can think of
    return Verdict(layout.ToolStatus.CRASH)
  if told is not None:
    # `exit` and `ok` are told apart by the code the kernel saw.
    if told in (layout.ToolStatus.OK, layout.ToolStatus.EXIT):
      told = layout.ToolStatus.EXIT if code else layout.ToolStatus.OK
    cause = _CAUSES.get(told, "")
    return Verdict(told, error_type, code, None, clean=True, cause=cause)
  # No record: `os._exit`, `exec`, or a program that broke the runner.
  ended = layout.ToolStatus.EXIT if code else layout.ToolStatus.OK
  return Verdict(ended, "", code, None)


def _of_signal(
  number: int, evidence: Evidence
) -> tuple[layout.ToolStatus, str]:
  if number == signal.SIGXCPU:
    return layout.ToolStatus.TIMEOUT, "cpu"
  if number == signal.SIGXFSZ:
    return layout.ToolStatus.RESOURCE, "disk"
  if number == signal.SIGKILL:
    # RLIMIT_CPU's hard bound and the kernel's OOM killer both end so; a
    # program that shoots itself while small and young is a crash.
    if evidence.cpu_s >= evidence.cpu_limit_s:
      return layout.ToolStatus.TIMEOUT, "cpu"
    if 2 * evidence.max_rss_kb >= evidence.memory_kb:
      return layout.ToolStatus.MEMORY, "process"
  return layout.ToolStatus.CRASH, ""
