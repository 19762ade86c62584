"""Resample on correct applied to rollouts in files, and what it keeps.

    python -m roc.main filter FILE --all

The choice is the trainer's own (`roc.core.resample`, with the keys of a run's
seed and steps), so a trace that was written with the same settings is chosen
again. docs/filter.md describes the formats and the figures.
"""

import argparse
import contextlib
import gzip
import json
import math
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import IO, Any

import numpy as np
import rich.console

from roc import (
  choice,
  cli,
  errors,
  filter_plot,
  filter_report,
  jsonl,
  layout,
  plots,
)
from roc import groups as groups_lib
from roc.core import resample
from roc.host import traces


def main(argv: Sequence[str]) -> int:
  """Runs `filter ...`; returns the exit code.

  Raises:
    errors.UserError: bad flags, a file, line or group that cannot be used.
  """
  values = _parser().parse_args(argv)
  modes = _check(values)
  paths = _paths(values.files)
  _check_targets(values, paths)
  rollouts = groups_lib.read(paths, is_lenient=values.skip_bad)
  if rollouts.n_bad_lines:
    print(
      f"passed over {rollouts.n_bad_lines} bad lines, such as"
      f" {rollouts.bad_lines[0]}",
      file=sys.stderr,
    )
  if modes != ["none"]:
    rollouts = _without_small(rollouts, values)
  found = _find(rollouts, modes, values)
  if values.output:
    _write_kept(pathlib.Path(values.output), found, modes[0])
  if values.plot:
    _write_plot(pathlib.Path(values.plot), found)
  if values.group is not None:
    _show_group(found, values)
  elif values.json:
    _print_json(found)
  else:
    _print_tables(found)
  return 0


def _parser() -> argparse.ArgumentParser:
  parser = cli.Parser(
    prog="python -m roc.main filter",
    description="Applies resample on correct to groups of rollouts in files and"
    " shows what it keeps. docs/filter.md describes the formats.",
    epilog="example: python -m roc.main filter"
    " runs/quickstart/rollouts/step_000001.jsonl --all --plot=kept.png",
  )
  parser.add_argument(
    "files",
    nargs="+",
    metavar="FILE",
    help="JSONL, plain or gzip; of a directory its *.jsonl files, of a run"
    " its rollouts",
  )
  which = parser.add_mutually_exclusive_group()
  which.add_argument(
    "--mode", default="sort", choices=resample.MODES, help="sort"
  )
  which.add_argument(
    "--all", action="store_true", help="compare all modes on the same groups"
  )
  parser.add_argument(
    "--kept",
    type=int,
    metavar="G",
    help="rollouts to keep of each group; half of it, at least 2",
  )
  parser.add_argument("--seed", type=int, default=0, help="a run's seed; 0")
  parser.add_argument(
    "--eps",
    type=float,
    default=0.1,
    help="inverse: weight 1 / (penalty + eps); 0.1",
  )
  for sign in ("pos", "neg"):
    what = {"pos": "correct", "neg": "wrong"}[sign]
    parser.add_argument(
      f"--min_{sign}",
      f"--min-{sign}",
      type=int,
      default=1,
      metavar="N",
      help=f"{what} rollouts to keep, where there are as many; 1",
    )
  parser.add_argument(
    "--group", metavar="ID", help="show the rollouts of one group instead"
  )
  parser.add_argument(
    "--json", action="store_true", help="one JSON object a line"
  )
  parser.add_argument("--plot", metavar="FILE", help="draw a .png or .svg")
  parser.add_argument(
    "--output",
    metavar="FILE",
    help="write the kept rollouts in the format that they came in",
  )
  parser.add_argument(
    "--skip_bad",
    "--skip-bad",
    action="store_true",
    help="pass over bad lines and groups that are too small, and say how many",
  )
  return parser


# --------------------------------------------------------------------- checks


def _check(values: argparse.Namespace) -> list[str]:
  """The modes to apply; refuses numbers that cannot be."""
  if values.kept is not None and values.kept < 2:
    raise errors.UserError(
      f"filter: --kept is {values.kept}; a group needs at least 2 rollouts to"
      " have a baseline"
    )
  if not 0 <= values.seed < 2**31:
    raise errors.UserError(f"filter: --seed is {values.seed}; give 0 or more")
  if not (math.isfinite(values.eps) and values.eps > 0):
    raise errors.UserError(
      f"filter: --eps is {values.eps}; give a number above 0 (--mode=sort is"
      " what small ones approach)"
    )
  most = 2 if values.kept is None else values.kept
  if min(values.min_pos, values.min_neg) < 0 or (
    values.min_pos + values.min_neg > most
  ):
    raise errors.UserError(
      f"filter: --min_pos {values.min_pos} and --min_neg {values.min_neg} must"
      f" not be negative and must fit together into --kept, here {most}"
    )
  if values.all and values.output:
    raise errors.UserError("filter: --output needs one --mode, not --all")
  if values.mode == "none" and values.kept is not None and not values.all:
    raise errors.UserError(
      "filter: mode none keeps every rollout; leave --kept out"
    )
  return list(resample.MODES) if values.all else [values.mode]


def _paths(names: Sequence[str]) -> list[pathlib.Path]:
  paths = []
  for name in names:
    path = pathlib.Path(name)
    if not path.is_dir():
      paths += jsonl.find(path) or [path]
      continue
    if (path / "rollouts").is_dir():
      path /= "rollouts"
    # Nothing is filtered in an evaluation.
    found = sorted(p for p in jsonl.inside(path) if not traces.is_evaluation(p))
    if not found:
      raise errors.UserError(
        f"filter: {path} holds no *.jsonl file; give a file, or a directory"
        " such as a run's rollouts/"
      )
    paths += found
  return paths


def _check_targets(
  values: argparse.Namespace, paths: Sequence[pathlib.Path]
) -> None:
  if values.plot and pathlib.Path(values.plot).suffix not in (".png", ".svg"):
    raise errors.UserError(
      f"filter: --plot {values.plot} must end in .png or .svg"
    )
  for flag in ("plot", "output"):
    name = getattr(values, flag)
    if not name:
      continue
    target = pathlib.Path(name)
    if not target.absolute().parent.is_dir():
      raise errors.UserError(
        f"filter: --{flag} {name}: there is no directory {target.parent}"
      )
    if any(target.resolve() == path.resolve() for path in paths):
      raise errors.UserError(
        f"filter: --{flag} {name} would overwrite what is read; give another"
        " file"
      )


def _without_small(
  rollouts: groups_lib.Rollouts, values: argparse.Namespace
) -> groups_lib.Rollouts:
  """Refuses groups of fewer than G rollouts, or leaves them out."""
  size = choice.sizes(rollouts)
  is_small = size < choice.places(size, values.kept)
  if values.skip_bad:
    if is_small.any():
      print(
        f"passed over {is_small.sum()} groups that are too small",
        file=sys.stderr,
      )
    if is_small.all():
      raise errors.UserError(
        f"filter: no group of {rollouts.paths[0]} is large enough; lower --kept"
      )
    return rollouts.without(is_small)
  if is_small.any():
    n = int(np.argmax(is_small))
    first = int(np.argmax(rollouts.group == n))
    G = int(choice.places(size, values.kept)[n])
    lower = "" if values.kept in (None, 2) else "lower --kept, or "
    raise errors.UserError(
      f"{rollouts.place(first)}: group {rollouts.groups[n].name} has"
      f" {size[n]} rollout{'s' * int(size[n] > 1)}, and {G} are to be kept;"
      f" {lower}leave such groups out with --skip-bad"
    )
  return rollouts


# ------------------------------------------------------------------- choosing


def _find(
  rollouts: groups_lib.Rollouts,
  modes: Sequence[str],
  values: argparse.Namespace,
) -> filter_report.Found:
  penalties = choice.penalties(rollouts)
  keep = {
    mode: choice.choose(
      rollouts,
      penalties.p_total,
      choice.Rule(
        mode, values.kept, values.seed, values.eps, values.min_pos,
        values.min_neg,
      ),
    )
    for mode in modes
  }  # fmt: skip
  n_kept = choice.places(choice.sizes(rollouts), values.kept)
  return filter_report.Found(rollouts, penalties, keep, n_kept)


# ------------------------------------------------------------------- printing


def _print_json(found: filter_report.Found) -> None:
  for mode in found.keep:
    for scope in filter_report.SCOPES:
      row = filter_report.mode_row(found, mode, scope)
      print(json.dumps(row, allow_nan=False))
  for mode in found.keep:
    for row in filter_report.quota_rows(found, mode):
      print(json.dumps(row, allow_nan=False))


def _print_tables(found: filter_report.Found) -> None:
  console = rich.console.Console(highlight=False)
  r = found.rollouts
  n_void = int(found.has_sign(layout.Outcome.VOID).sum())
  void = f", {n_void:,} outside: the environment failed" if n_void else ""
  console.print(
    f"{len(r.groups):,} groups, {len(r):,} rollouts, {int(r.n_judged.sum()):,}"
    f" tool calls{void}"
  )
  for scope in filter_report.SCOPES:
    if found.in_scope(scope).any():
      console.print(filter_report.mode_table(found, scope))
    else:
      console.print("no group has correct and wrong rollouts")
  quotas = filter_report.quota_table(found)
  if quotas is not None:
    console.print(quotas)


def _show_group(found: filter_report.Found, values: argparse.Namespace) -> None:
  names = [g.name for g in found.rollouts.groups]
  if values.group not in names:
    raise errors.UserError(
      f"filter: there is no group {values.group}"
      f"{errors.closest(values.group, names)}; the first are"
      f" {', '.join(names[:3])}"
    )
  rows = filter_report.group_rows(found, names.index(values.group))
  if values.json:
    for row in rows:
      print(json.dumps(row, allow_nan=False))
  else:
    print(filter_report.group_text(rows))


# -------------------------------------------------------------------- writing


@contextlib.contextmanager
def _whole_file(path: pathlib.Path) -> Iterator[IO[bytes]]:
  """A file that is there when it is whole, or not at all."""
  partial = path.with_name(f".{path.name}.partial")
  try:
    with contextlib.ExitStack() as stack:
      f: Any = stack.enter_context(partial.open("wb"))
      if path.suffix == ".gz":
        f = stack.enter_context(gzip.GzipFile(fileobj=f, mode="wb", mtime=0))
      yield f
    os.replace(partial, path)
  except OSError as e:
    raise errors.UserError(f"cannot write {path}: {e.strerror}") from e
  finally:
    with contextlib.suppress(OSError):  # a read-only file system
      partial.unlink(missing_ok=True)


def _write_plot(path: pathlib.Path, found: filter_report.Found) -> None:
  drawn = filter_plot.figure(found)
  if path.suffix == ".svg":
    data = plots.to_svg(drawn, is_standalone=True).encode()
  else:
    data = plots.to_png(drawn)
  with _whole_file(path) as f:
    f.write(data)


def _write_kept(
  path: pathlib.Path, found: filter_report.Found, mode: str
) -> None:
  """Reads the files once more and writes the lines of what is kept."""
  r = found.rollouts
  at = 0  # rollouts lie in the order of their lines
  with _whole_file(path) as f:
    for file, source in enumerate(r.paths):
      for number, line in jsonl.lines(source):
        first = at
        while at < len(r) and (r.file[at], r.line[at]) == (file, number):
          at += 1
        kept = [i for i in range(first, at) if found.keep[mode][i]]
        if kept:
          fates = [filter_report.fate(found, mode, i) for i in kept]
          f.write(_kept_line(line, [i - first for i in kept], fates))


def _kept_line(
  line: bytes, members: Sequence[int], fates: Sequence[dict[str, Any]]
) -> bytes:
  """A line with this choice in it; of a group, the members that are kept."""
  row = json.loads(line)
  if "tool_records" not in row and "rollouts" in row:
    row["rollouts"] = [
      row["rollouts"][m] | fate for m, fate in zip(members, fates, strict=True)
    ]
  else:
    row |= fates[0]
    if "advantage" in row:
      row["advantage"] = None  # it was of another choice
  return json.dumps(row).encode() + b"\n"
