"""Data sets of written solutions into conversations that call the tool.

    python -m roc.main convert gsm8k --input train.jsonl --output calls.jsonl

Every call is run in the sandbox, and its answer in the conversation is what the
sandbox said. A row is kept only if each call gives what the solution says, and
the last one the answer; the others are counted by reason. A command that was
stopped goes on where it was when it is given again.
"""

import argparse
import collections
import dataclasses
import fcntl
import hashlib
import io
import itertools
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import rich.console

from roc import cli, errors, jsonl, layout
from roc import progress as progress_lib
from roc.host import calls, renderers, tools
from roc.host import sandbox as sandbox_lib
from roc.host.sandbox import contract
from roc.host.tasks import gsm8k_calls, gsm8k_solutions

_FORMAT = 1  # of the unfinished file
_AHEAD = 256  # rows whose calls are out at one time
_FAILED = "a call failed"
_OTHER_VALUE = "a call gave another value"


def main(argv: Sequence[str]) -> int:
  """Runs `convert ...`; returns the exit code.

  Raises:
    errors.UserError: bad flags or input, or an output that cannot be written.
  """
  values = make_parser().parse_args(argv)
  source, output = pathlib.Path(values.input), pathlib.Path(values.output)
  if output.exists():
    raise errors.UserError(
      f"{output} exists; name another file, or move it away"
    )
  start = time.monotonic()
  try:
    found = list(jsonl.lines(source))
    if not found:
      raise errors.UserError(f"convert: {source} holds no rows")
    rows = _take_apart(found, source)
    with _Unfinished(output, _identity(values, found)) as unfinished:
      with sandbox_lib.Sandbox(
        tier=values.tier, min_tier=values.min_tier
      ) as sandbox:
        _convert(values, source, rows, sandbox, unfinished)
      summary = unfinished.finish()
  except (contract.SandboxError, ValueError) as e:
    raise errors.UserError(str(e)) from e
  summary |= {"output": str(output), "style": values.style}
  summary["wall_s"] = round(time.monotonic() - start, 2)
  print(json.dumps(summary) if values.json else _as_text(summary))
  return 0


def make_parser() -> argparse.ArgumentParser:
  """The flags of the command."""
  parser = cli.Parser(
    prog="python -m roc.main convert",
    description="Writes solutions of a data set as conversations that call the"
    " tool. Every call is run in the sandbox; what comes out differently than"
    " the solution says is left out and counted.",
    epilog="example: python -m roc.main convert gsm8k"
    " --input=experiments/data/gsm8k/train.jsonl"
    " --output=runs/gsm8k/calls.jsonl",
  )
  parser.add_argument("dataset", choices=("gsm8k",), help="its format")
  parser.add_argument(
    "--input", required=True, metavar="FILE", help="lines as published"
  )
  parser.add_argument(
    "--output", required=True, metavar="FILE", help="one that is not there"
  )
  parser.add_argument(
    "--style",
    default="steps",
    choices=gsm8k_calls.STYLES,
    help="a call for each sum, or one program for all; steps",
  )
  parser.add_argument(
    "--renderer",
    default="compact",
    choices=tuple(renderers.RENDERERS),
    help="how results are worded, as Toolbox.renderer of the run; compact",
  )
  parser.add_argument(
    "--tool_name", default="python", help="as Toolbox.tool_name; python"
  )
  parser.add_argument(
    "--tier", help="the sandbox's tier: its name, or T0 to T3; the strongest"
  )
  parser.add_argument(
    "--min_tier", default="process", help="refuse to start below this tier"
  )
  parser.add_argument(
    "--json", action="store_true", help="the summary as one line of JSON"
  )
  return parser


def _identity(
  values: argparse.Namespace, found: list[tuple[int, bytes]]
) -> dict[str, Any]:
  """What makes two commands give the same file."""
  text = b"".join(b"%d %b" % line for line in found)
  digest = hashlib.sha256(text).hexdigest()[:16]
  names = ("dataset", "style", "renderer", "tool_name")
  return {"format": _FORMAT, "input": digest} | {
    name: getattr(values, name) for name in names
  }


def _as_text(summary: dict[str, Any]) -> str:
  dropped = "".join(
    f"\n  {n} left out: {why}" for why, n in summary["dropped"].items()
  )
  return (
    f"{summary['output']}: {summary['kept']} of {summary['rows']} rows,"
    f" {summary['calls']} calls run and right, {summary['wall_s']:.0f} s"
    f"{dropped}"
  )


# ----------------------------------------------------------------- conversion


@dataclasses.dataclass
class _Row:
  """A row on its way; `solution` is None where it was left out at once."""

  number: int  # line in the input, from 1
  solution: gsm8k_solutions.Solution | None = None
  dropped: str = ""
  results: list[Any] = dataclasses.field(default_factory=list)  # futures


def _take_apart(
  found: list[tuple[int, bytes]], source: pathlib.Path
) -> list[_Row]:
  """Checks every row before anything is run.

  Raises:
    ValueError: a line is no row of the data set; names line and field.
  """
  rows = []
  for number, line in found:
    where = f"{source} line {number}"
    question, answer = gsm8k_solutions.read_row(line, where)
    try:
      solution = gsm8k_solutions.parse(question, answer)
      rows.append(_Row(number, solution))
    except gsm8k_solutions.Unusable as why:
      rows.append(_Row(number, dropped=str(why)))
  return rows


def _convert(
  values: argparse.Namespace,
  source: pathlib.Path,
  rows: list[_Row],
  sandbox: sandbox_lib.Sandbox,
  unfinished: "_Unfinished",
) -> None:
  """Runs what is left and writes each row down, in order."""
  schema = tools.Toolbox(sandbox, tool_name=values.tool_name).schema
  # stdout is for what was asked for.
  console = rich.console.Console(
    file=sys.stderr, highlight=False, soft_wrap=True
  )
  left = [row for row in rows if row.number > unfinished.n_lines]
  done = len(rows) - len(left)
  if done:
    console.print(f"going on behind line {unfinished.n_lines}", markup=False)
  n_started = 0
  with progress_lib.Progress(
    "convert", len(rows), start=done, console=console
  ) as bar:
    for i, row in enumerate(left):
      for later in left[n_started : i + _AHEAD]:
        _start(later, values.style, sandbox)
      n_started = min(i + _AHEAD, len(left))
      unfinished.add(row.number, _written(values, source, row, schema))
      row.results = []
      bar.update(done + i + 1)


def _start(row: _Row, style: str, sandbox: sandbox_lib.Sandbox) -> None:
  """Starts the calls of a row."""
  if row.solution is not None:
    row.results = [
      sandbox.submit(code, trajectory=f"gsm8k-{row.number}", call_index=i)
      for i, code in enumerate(gsm8k_calls.programs(row.solution, style))
    ]


def _written(
  values: argparse.Namespace,
  source: pathlib.Path,
  row: _Row,
  schema: dict[str, Any],
) -> dict[str, Any]:
  """A line of the unfinished file: a conversation, or why there is none."""
  if row.solution is None:
    return {"dropped": row.dropped}
  render = renderers.RENDERERS[values.renderer]
  codes = gsm8k_calls.programs(row.solution, values.style)
  wanted = gsm8k_calls.expected(row.solution, values.style)
  answers = []
  for future, code, one in zip(row.results, codes, wanted, strict=True):
    result = future.result()
    if result.status == layout.ToolStatus.INFRA:
      raise contract.SandboxError(
        f"{source} line {row.number}: the sandbox failed ({result.stderr});"
        " give the same command again to go on"
      )
    if result.status != layout.ToolStatus.OK:
      return {"dropped": _FAILED}
    if not gsm8k_calls.is_right(result.stdout, one):
      return {"dropped": _OTHER_VALUE}
    call = calls.ToolCall(values.tool_name, {"code": code}, code)
    answers.append(render(call, result))
  conversation = {
    "id": f"{source.stem}-{row.number}",
    "messages": gsm8k_calls.messages(
      row.solution, values.style, answers, values.tool_name
    ),
    "tools": [schema],
    "answer": row.solution.answer,
  }
  return {"conversation": conversation, "calls": len(answers)}


# ------------------------------------------------------------ unfinished work


class _Unfinished:
  """The rows so far, in a file beside the output until all are there.

  Its first line says what is being made; one that says something else, or that
  cannot be read, starts anew. A line that was cut off is done again.
  """

  def __init__(self, output: pathlib.Path, identity: dict[str, Any]):
    self._output = output
    self._path = output.with_name(f".{output.name}.unfinished")
    self._identity = identity
    self._file: io.BufferedRandom
    self.n_lines = 0  # of the input that are done

  def __enter__(self) -> "_Unfinished":
    try:
      self._path.parent.mkdir(parents=True, exist_ok=True)
      self._file = open(self._path, "a+b")
    except OSError as e:
      raise errors.UserError(
        f"cannot write {self._path}: {e.strerror}; name another --output"
      ) from e
    try:
      fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      self._file.close()
      raise errors.UserError(
        f"{self._output} is being made by another process; wait for it"
      ) from None
    whole = 0
    for i, (row, end) in enumerate(self._rows()):
      if i == 0 and row != self._identity:
        break
      whole, self.n_lines = end, row.get("line", 0)
    self._file.truncate(whole)
    if not whole:
      self._write(self._identity)
    return self

  def __exit__(self, *_: object) -> None:
    self._file.close()

  def add(self, line: int, row: dict[str, Any]) -> None:
    """Notes what became of a line of the input."""
    self._write({"line": line} | row)

  def finish(self) -> dict[str, Any]:
    """Writes the output, whole or not at all; returns what was counted."""
    counts = {"rows": 0, "kept": 0, "calls": 0}
    dropped: collections.Counter[str] = collections.Counter()
    partial = self._output.with_name(f".{self._output.name}.partial")
    try:
      with open(partial, "w", encoding="utf-8") as out:
        for row, _ in itertools.islice(self._rows(), 1, None):
          counts["rows"] += 1
          counts["kept"] += "conversation" in row
          counts["calls"] += row.get("calls", 0)
          if "dropped" in row:
            dropped[row["dropped"]] += 1
          else:
            out.write(json.dumps(row["conversation"]) + "\n")
        out.flush()
        os.fsync(out.fileno())
      if not counts["kept"]:
        raise errors.UserError(
          f"no row can be converted ({dict(dropped)}); is --input in the format"
          " of GSM8K?"
        )
      os.replace(partial, self._output)
    except OSError as e:
      raise errors.UserError(
        f"cannot write {self._output}: {e.strerror}; mend that and give the"
        " same command again"
      ) from e
    finally:
      partial.unlink(missing_ok=True)
    self._path.unlink()
    return counts | {"dropped": dict(dropped.most_common())}

  def _write(self, row: dict[str, Any]) -> None:
    try:
      self._file.write(json.dumps(row).encode() + b"\n")
      self._file.flush()
    except OSError as e:
      raise errors.UserError(
        f"cannot write {self._path}: {e.strerror}; mend that and give the same"
        " command again"
      ) from e

  def _rows(self) -> Iterator[tuple[dict[str, Any], int]]:
    """Whole lines and where each ends."""
    self._file.seek(0)
    end = 0
    for line in self._file:
      end += len(line)
      try:
        row = json.loads(line) if line.endswith(b"\n") else None
      except ValueError:
        row = None
      if not isinstance(row, dict):
        return
      yield row, end
