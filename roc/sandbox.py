"""The sandbox from the command line: run programs in it, examine the machine.

    python -m roc.main sandbox run FILE.py
    python -m roc.main sandbox doctor

`run` treats a file exactly as a rollout treats a tool call and prints the typed
result; `doctor` tries every tier out and says which this machine holds.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import platform
import sys
import textwrap
import typing
from collections.abc import Sequence

from roc import cli, errors
from roc.host import sandbox as sandbox_lib
from roc.host.sandbox import contract, plan

_OWN_INPUT = "-"


def main(argv: Sequence[str]) -> int:
  """Runs `sandbox ...`; returns the exit code.

  Raises:
    errors.UserError: bad flags, a missing file, a tier that cannot be had.
  """
  parser = _parser()
  if not argv:
    parser.print_help()
    return 2
  values = parser.parse_args(argv)
  try:
    return values.program(values)
  except (contract.SandboxError, ValueError) as error:
    raise errors.UserError(str(error)) from error


def _parser() -> argparse.ArgumentParser:
  parser = cli.Parser(
    prog="python -m roc.main sandbox",
    description="Runs programs in the sandbox, or shows what it can do here.",
  )
  commands = parser.add_subparsers(required=True, metavar="COMMAND")
  run = commands.add_parser(
    "run",
    help="run files as tool calls and print the typed results",
    description="Runs each FILE as a tool call. With --tool=session they are"
    " cells of one session, in order. Exits with 0 whatever the programs do.",
    epilog="example: python -m roc.main sandbox run hello.py --json",
  )
  run.set_defaults(program=_run)
  run.add_argument("files", nargs="*", metavar="FILE", help="code; - for stdin")
  run.add_argument("--tool", default="python", help="python or session")
  run.add_argument(
    "--stdin",
    nargs="?",
    const=_OWN_INPUT,
    metavar="FILE",
    help="what the programs read; without FILE this command's own input",
  )
  run.add_argument("--seed", type=int, default=0, help="of random numbers")
  for field in dataclasses.fields(contract.Limits):
    run.add_argument(
      f"--{field.name}",
      type=typing.cast(type, field.type),
      default=field.default,
      metavar="N",
      help=f"limit; default {field.default}",
    )
  doctor = commands.add_parser(
    "doctor",
    help="try every tier and say what it protects from",
    description="Tries every tier of confinement with a program that attacks"
    " it, and prints what holds on this machine.",
  )
  doctor.set_defaults(program=_doctor)
  for command in (run, doctor):
    command.add_argument(
      "--json", action="store_true", help="one JSON object a line"
    )
    command.add_argument(
      "--tier", help="use this tier: its name, or T0 to T3; default strongest"
    )
    command.add_argument(
      "--min_tier", default="process", help="refuse to start below this tier"
    )
    command.add_argument(
      "--without",
      default="",
      metavar="PARTS",
      help=f"leave parts aside, comma-separated: {', '.join(plan.FEATURES)}",
    )
  return parser


def _sandbox(values: argparse.Namespace, **kw) -> sandbox_lib.Sandbox:
  without = tuple(filter(None, values.without.split(",")))
  given = {"tier": values.tier, "min_tier": values.min_tier} | kw
  return sandbox_lib.Sandbox(without=without, **given)


# ------------------------------------------------------------------------ run


def _run(values: argparse.Namespace) -> int:
  files = list(values.files)
  if not files and values.stdin not in (None, _OWN_INPUT):
    files, values.stdin = [values.stdin], _OWN_INPUT  # `run --stdin FILE.py`
  if not files:
    raise errors.UserError(
      "run: name a file, as in `python -m roc.main sandbox run hello.py`"
    )
  if [*files, values.stdin].count(_OWN_INPUT) > 1:
    raise errors.UserError("run: only one file can be this command's input")
  if values.tool not in contract.TOOLS:
    raise errors.UserError(
      f"run: there is no tool {values.tool!r}"
      f"{errors.closest(values.tool, contract.TOOLS)}; choose one of"
      f" {', '.join(contract.TOOLS)}"
    )
  stdin = b"" if values.stdin is None else _read(values.stdin)
  programs = [_read(name).decode("utf-8", "surrogateescape") for name in files]
  names = [field.name for field in dataclasses.fields(contract.Limits)]
  limits = contract.Limits(**{name: getattr(values, name) for name in names})
  with _sandbox(values, limits=limits, seed=values.seed, n_workers=1) as box:
    for i, (name, code) in enumerate(zip(files, programs, strict=True)):
      result = box.run(
        code, stdin=stdin, tool=values.tool, trajectory="run", call_index=i
      )
      _print_result(name, result, values.json)
  return 0


def _read(name: str) -> bytes:
  if name == _OWN_INPUT:
    return sys.stdin.buffer.read()
  try:
    return pathlib.Path(name).read_bytes()
  except OSError as error:
    raise errors.UserError(
      f"run: cannot read {name}: {error.strerror}"
    ) from error


def _print_result(
  name: str, result: contract.ToolResult, as_json: bool
) -> None:
  if as_json:
    print(json.dumps({"file": name, **result.to_fields()}), flush=True)
    return
  facts = [result.status.name.lower()]
  facts += [f"({result.cause})"] if result.cause else []
  facts += [result.error_type] if result.error_type else []
  if result.exit_code:
    facts.append(f"exit code {result.exit_code}")
  if result.signal is not None:
    facts.append(f"signal {result.signal}")
  if result.truncated_bytes:
    facts.append(f"{result.truncated_bytes} more bytes were dropped")
  if not result.clean and result.status.name == "OK":
    facts.append("left by the back door")
  print(
    f"{name}: {' '.join(facts)}; {result.wall_ms:.1f} ms, CPU"
    f" {result.cpu_ms:.1f} ms, tier {result.tier}"
  )
  for stream in ("stdout", "stderr"):
    text = getattr(result, stream)
    if text:
      print(textwrap.indent(printable(text).rstrip("\n"), f"  {stream} | "))


def printable(text: str) -> str:
  """Text that cannot steer a terminal: control characters are spelt out."""
  return "".join(
    c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode()
    for c in text
  )


# --------------------------------------------------------------------- doctor


def _doctor(values: argparse.Namespace) -> int:
  if values.tier:
    wanted = [contract.tier_name(values.tier)]
  else:
    wanted = list(contract.TIERS[:-1])[::-1]
  least = contract.tier_name(values.min_tier)
  machine = plan.Machine.look(sorted({sys.prefix, sys.base_prefix}))
  facts = {
    "machine": platform.machine(),
    "kernel": platform.release(),
    "python": platform.python_version(),
    "user": "root" if os.getuid() == 0 else f"uid {os.getuid()}",
    "seccomp": machine.has_filter,
    "landlock_abi": machine.landlock_abi,
    "own_uid": machine.first_uid is not None,
    "interpreter_is_public": machine.is_interpreter_public,
  }
  tries = [_try(values, tier) for tier in wanted]
  held = [t for t in tries if t["info"]]
  best = held[0]["info"] if held else None
  if values.json:
    print(json.dumps({"probe": "machine", **facts}))
    for t in tries:
      print(json.dumps({"probe": "tier", **t}))
    print(json.dumps({"probe": "chosen", "tier": best and best["tier"]}))
  else:
    _print_doctor(facts, tries, best)
  reached = best["tier"] if best else contract.TIERS[0]
  if not best or contract.TIERS.index(reached) < contract.TIERS.index(least):
    raise errors.UserError(f"doctor: no tier from {least!r} on holds here")
  return 0


def _try(values: argparse.Namespace, tier: str) -> dict:
  try:
    with _sandbox(values, tier=tier, min_tier="process", n_workers=1) as box:
      info = box.info()
  except contract.SandboxError as error:
    return {"tier": tier, "holds": False, "why_not": str(error), "info": None}
  return {"tier": tier, "holds": True, "why_not": "", "info": info}


def _print_doctor(facts: dict, tries: list[dict], best: dict | None) -> None:
  for name, value in facts.items():
    shown = {True: "yes", False: "no"}.get(value, value)
    print(f"{name.replace('_', ' '):<22} {shown}")
  print()
  for t in tries:
    rank = contract.TIERS.index(t["tier"])
    by = ""
    if t["info"] and t["info"]["plan"]["namespaces"]:
      by = f" ({t['info']['plan']['namespaces']} namespaces)"
    what = f"holds{by}" if t["holds"] else f"no: {_reason(t['why_not'])}"
    print(f"T{rank} {t['tier']:<10} {what}")
  if best is None:
    return
  rank = contract.TIERS.index(best["tier"])
  print(f"\nchosen: T{rank} {best['tier']}\n\nit protects from")
  print("\n".join(f"  + {line}" for line in best["protects_from"]))
  print("it does not protect from")
  print("\n".join(f"  - {line}" for line in best["does_not_protect_from"]))


def _reason(why_not: str) -> str:
  """The part of the start-up error that tells this tier from another."""
  return why_not.partition("cannot be had here (")[2].partition(");")[0] or (
    why_not
  )
