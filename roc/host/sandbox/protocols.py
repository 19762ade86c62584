"""What external executors are asked and how their answers are judged; pure.

A protocol turns programs into one request and the answer into one
`contract.ToolResult` each. Nothing here opens a socket, and an answer is data
from a stranger: it is read as JSON, each field is checked, and what does not
fit is INFRA for the calls that it concerns.
"""

import dataclasses
import json
import math
import re
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from roc import layout
from roc.host.sandbox import contract, masking

TIER = contract.TIERS[-1]

# Signals whose 128 + n a shell returns for a program that they killed.
_FATAL = frozenset(
  {
    signal.SIGABRT,
    signal.SIGBUS,
    signal.SIGFPE,
    signal.SIGILL,
    signal.SIGKILL,
    signal.SIGSEGV,
  }
)
# Both servers write the program into a directory of a random name.
_RANDOM = r"tmp[a-z0-9_]{8}"
_FRAME = re.compile(
  rf'File "[^"\n]*/{_RANDOM}/(?:source|{_RANDOM})\.py"(?:, line (\d+))?'
)
_SCRATCH = re.compile(rf"/tmp/{_RANDOM}\b")
_VERDICT = re.compile(r"([^\W\d][\w.]*)(: |:?$)")


@dataclasses.dataclass(frozen=True)
class Program:
  """One call as a protocol needs it; `id` is unique within its client."""

  id: str
  code: str
  stdin: str
  limits: contract.Limits


Decoder = Callable[[Any, Sequence[Program]], list[contract.ToolResult]]


@dataclasses.dataclass(frozen=True)
class Protocol:
  """How one kind of server is spoken to.

  Attributes:
    path: of the POST, below the server's URL.
    max_batch: programs that one request can carry.
    encode: programs to the JSON-able body.
    decode: parsed answer and programs to results, in the programs' order.
  """

  path: str
  max_batch: int
  encode: Callable[[Sequence[Program]], dict]
  decode: Decoder

  def request(self, programs: Sequence[Program]) -> bytes:
    """Returns the body of the request that runs `programs`."""
    return json.dumps(self.encode(programs)).encode("ascii")

  def results(
    self, body: bytes, programs: Sequence[Program]
  ) -> list[contract.ToolResult]:
    """Reads an answer.

    Args:
      body: whatever the server sent.
      programs: that it was asked to run.

    Returns:
      One result per program. An answer that cannot be read is INFRA for all,
      an item that cannot be read or is missing for its own program only.
    """
    try:
      answer = json.loads(body)
    except (ValueError, RecursionError):
      return [fault("the executor's answer is not JSON")] * len(programs)
    return self.decode(answer, programs)


def fault(why: str) -> contract.ToolResult:
  """Returns the result of a call that the executor failed."""
  return contract.ToolResult(
    layout.ToolStatus.INFRA, stderr=why, cause="sandbox", tier=TIER
  )


def rejected(why: str) -> contract.ToolResult:
  """Returns the result of a call that must not run; `why` is for the model."""
  return contract.ToolResult(layout.ToolStatus.REJECTED, stderr=why, tier=TIER)


def tidy(
  result: contract.ToolResult, line_offset: int = 0
) -> contract.ToolResult:
  """Takes out of a result what would read differently in each run.

  Args:
    result: as judged.
    line_offset: lines that the server puts before the program.

  Returns:
    The result with `<tool>` for the program's file in tracebacks, its own line
    numbers, `/scratch` for its directory and zero for memory addresses.
  """
  if result.status == layout.ToolStatus.INFRA:
    return result

  def frame(found: re.Match[str]) -> str:
    if found[1] is None:
      return 'File "<tool>"'
    return f'File "<tool>", line {max(1, int(found[1]) - line_offset)}'

  def clean(text: str) -> str:
    text = _SCRATCH.sub("/scratch", _FRAME.sub(frame, text))
    return masking.mask_addresses(text)

  return dataclasses.replace(
    result, stdout=clean(result.stdout), stderr=clean(result.stderr)
  )


def probe(run: Callable[[str], contract.ToolResult], where: str) -> int:
  """Checks a server with a program that works and one that fails.

  Args:
    run: runs a program there.
    where: the server's address.

  Returns:
    How many lines the server puts before a program; 0 where it does not show.

  Raises:
    contract.SandboxError: it gives no answer, or a wrong one.
  """
  result = run("print(6 * 7)")
  if result.status == layout.ToolStatus.INFRA:
    raise contract.SandboxError(
      f"the executor at {where} cannot be used: {result.stderr}; check that it"
      " runs and speaks the protocol"
    )
  is_right = (result.status, result.stdout) == (layout.ToolStatus.OK, "42\n")
  code, wanted = "print(6 * 7)", "ok and 42"
  if is_right:
    code, wanted = "raise ValueError(6 * 7)", "error"
    result = run(code)
    is_right = result.status == layout.ToolStatus.ERROR
  if not is_right:
    raise contract.SandboxError(
      f"the executor at {where} answers {code!r} with"
      f" {result.status.name.lower()} instead of {wanted}:"
      f" {(result.stdout + result.stderr)[-200:].strip()!r}"
    )
  lines = re.findall(r'File "<tool>", line (\d+)', result.stderr)
  return int(lines[-1]) - 1 if lines else 0


def exception_name(stderr: str) -> str | None:
  """Finds the uncaught exception whose traceback ends `stderr`.

  Args:
    stderr: of a program that failed, cut or whole.

  Returns:
    Its class name without the module, "" when there is a traceback but no
    name that is whole, None when there is no traceback.
  """
  lines = stderr.split("\n")
  starts = ("Traceback (most recent call last):", '  File "')
  at = [i for i, line in enumerate(lines) if line.startswith(starts)]
  if not at:
    return None
  for i in range(at[-1] + 1, len(lines)):
    line = lines[i].rstrip("\r")
    if not line or line[0] == " ":
      continue
    found = _VERDICT.match(line)
    # The last line of a text that was cut may be half a name.
    is_whole = i < len(lines) - 1 or ":" in line
    return found[1].rpartition(".")[2] if found and is_whole else ""
  return ""


def _ended(
  status: layout.ToolStatus,
  program: Program,
  streams: tuple[str | None, str | None],
  seconds: object,
  **fields: Any,
) -> contract.ToolResult:
  """Returns the result of a program that ran, its output cut to its limit."""
  cap = program.limits.output_bytes
  kept, dropped = [], []
  for text in streams:
    data = (text or "").encode("utf-8", "replace")
    # All of it is UTF-8, so what "ignore" drops is the character cut in two.
    kept.append(data[:cap].decode("utf-8", "ignore"))
    dropped.append(max(0, len(data) - cap))
  if any(dropped):
    status = layout.ToolStatus.OUTPUT_LIMIT
    fields = {"cause": "stdout" if dropped[0] else "stderr"}
  return contract.ToolResult(
    status=status,
    stdout=kept[0],
    stderr=kept[1],
    truncated_bytes=sum(dropped),
    wall_ms=round(_seconds(seconds) * 1e3, 3),
    tier=TIER,
    **fields,
  )


def _seconds(value: object) -> float:
  """Returns a measurement, 0.0 where the server sent none that can be."""
  if isinstance(value, bool) or not isinstance(value, int | float):
    return 0.0
  # Compared before it is converted: JSON's integers have no end.
  return float(value) if 0 <= value < 1e9 and math.isfinite(value) else 0.0


def _raised(name: str) -> tuple[layout.ToolStatus, dict]:
  """Returns the status of an uncaught exception, and the fields beside it."""
  if name == "MemoryError":
    return layout.ToolStatus.MEMORY, {"error_type": name, "cause": "process"}
  return layout.ToolStatus.ERROR, {"error_type": name}


def _are_texts(*values: object) -> bool:
  return all(value is None or isinstance(value, str) for value in values)


# ----------------------------------------------------------------- code-judge
# 0xWJ/code-judge at fbc5293: app/main.py, app/model.py, app/judge.py.


def _encode_judge(programs: Sequence[Program]) -> dict:
  return {
    "type": "batch",
    "submissions": [
      {
        "sub_id": program.id,
        "type": "python",
        "solution": program.code,
        "input": program.stdin or None,
      }
      for program in programs
    ],
  }


def _decode_judge(
  answer: Any, programs: Sequence[Program]
) -> list[contract.ToolResult]:
  rows = answer.get("results") if isinstance(answer, dict) else None
  if not isinstance(rows, list):
    why = "the executor's answer has no list of results"
    return [fault(why)] * len(programs)
  by_id = {
    row["sub_id"]: row
    for row in rows
    if isinstance(row, dict) and isinstance(row.get("sub_id"), str)
  }
  if not by_id and len(rows) == len(programs):
    # A server that gives no ids back answers in order.
    return [_judge_row(r, p) for r, p in zip(rows, programs, strict=True)]
  return [_judge_row(by_id.get(p.id), p) for p in programs]


def _judge_row(row: Any, program: Program) -> contract.ToolResult:
  if not isinstance(row, dict):
    return fault("the executor's answer leaves this call out")
  did_run, reason = row.get("run_success"), row.get("reason", "")
  streams = row.get("stdout"), row.get("stderr")
  is_typed = isinstance(did_run, bool) and isinstance(reason, str)
  if not (is_typed and _are_texts(*streams)):
    return fault("the executor's answer has fields of the wrong type")
  if reason in ("queue_timeout", "internal_error"):
    return fault(f"the executor reports {reason}")
  if reason == "invalid_input":
    return rejected("The call was not run: the executor refused its input.")
  if reason == "worker_timeout":
    status, fields = layout.ToolStatus.TIMEOUT, {"cause": "wall"}
  elif reason:
    return fault(f"the executor gives an unknown reason, {reason[:40]!r}")
  elif did_run:
    status, fields = layout.ToolStatus.OK, {"exit_code": 0, "clean": True}
  else:
    # The exit code is not told: an exit without a traceback is an ERROR too.
    status, fields = _raised(exception_name(streams[1] or "") or "")
    fields["clean"] = True
  return _ended(status, program, streams, row.get("cost"), **fields)


# -------------------------------------------------------------- SandboxFusion
# bytedance/SandboxFusion at 469de08: sandbox/server/sandbox_api.py,
# sandbox/runners/types.py, sandbox/runners/base.py.


def _encode_fusion(programs: Sequence[Program]) -> dict:
  (program,) = programs
  return {
    "language": "python",
    "code": program.code,
    "stdin": program.stdin or None,
    "compile_timeout": program.limits.wall_s,
    "run_timeout": program.limits.wall_s,
    # The server sets RLIMIT_STACK to the same number as RLIMIT_AS, and a
    # thread's stack is as large as RLIMIT_STACK: with any bound, no program
    # could start a thread and numpy could not be imported.
    "memory_limit_MB": -1,
  }


def _decode_fusion(
  answer: Any, programs: Sequence[Program]
) -> list[contract.ToolResult]:
  (program,) = programs
  if not isinstance(answer, dict):
    return [fault("the executor's answer is not an object")]
  status, run = answer.get("status"), answer.get("run_result")
  if status == "SandboxError":
    said = " ".join(str(answer.get("message") or "").split())[-200:]
    return [fault(f"the executor reports SandboxError {said}".rstrip())]
  if status not in ("Success", "Failed") or not isinstance(run, dict):
    return [fault("the executor's answer has no status or no run_result")]
  return [_fusion_run(run, program)]


def _fusion_run(run: dict, program: Program) -> contract.ToolResult:
  state, code = run.get("status"), run.get("return_code")
  streams = run.get("stdout"), run.get("stderr")
  is_code = isinstance(code, int) and not isinstance(code, bool)
  if not _are_texts(*streams) or not (is_code or state != "Finished"):
    return fault("the executor's answer has fields of the wrong type")
  if state == "TimeLimitExceeded":
    status, fields = layout.ToolStatus.TIMEOUT, {"cause": "wall"}
  elif state == "Finished" and isinstance(code, int):
    status, fields = _of_exit(code, streams[1] or "")
  else:
    return fault(f"the executor gives the status {str(state)[:40]!r}")
  return _ended(status, program, streams, run.get("execution_time"), **fields)


def _of_exit(code: int, stderr: str) -> tuple[layout.ToolStatus, dict]:
  """Returns the status of a program that came to an end, and its fields."""
  if code == 0:
    return layout.ToolStatus.OK, {"exit_code": 0, "clean": True}
  if code < 0:
    return layout.ToolStatus.CRASH, {"signal": -code}
  name = exception_name(stderr)
  if name is not None:
    status, fields = _raised(name)
    return status, {**fields, "exit_code": code, "clean": True}
  if code - 128 in _FATAL:
    return layout.ToolStatus.CRASH, {"signal": code - 128}
  return layout.ToolStatus.EXIT, {"exit_code": code, "clean": True}


PROTOCOLS: Mapping[str, Protocol] = {
  "code-judge": Protocol("/run/long-batch", 1024, _encode_judge, _decode_judge),
  "sandbox-fusion": Protocol("/run_code", 1, _encode_fusion, _decode_fusion),
}
