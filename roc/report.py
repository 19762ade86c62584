"""Turns a workdir into a table on the terminal and one self-contained page.

Reads metrics.jsonl, config.json and rollouts/step_*.jsonl and nothing else, so
a report can be made while a run is going on, after it was killed, or on another
machine. The page needs no network: styles and figures are inside it, and all
text that a model or a tool wrote is escaped.
"""

import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import rich.console
import rich.table

from roc import curves, errors, gallery, plots

TEMPLATES = pathlib.Path(__file__).parent / "templates"

ACCURACY = curves.ACCURACY
HEAD = "eval/head/accuracy"
FAILING = "eval/heldout/failure_frequency_correct"
N_PROBLEMS = "eval/heldout/n_problems"
STDERR = "eval/heldout/accuracy_stderr"

# Metric, its name in the table, and how a value is written.
HEADLINES = (
  (ACCURACY, "accuracy with the tool", "percent"),
  (HEAD, "accuracy in the head", "percent"),
  (FAILING, "failing calls per call, correct rollouts", "percent"),
  ("eval/heldout/call_frequency", "tool calls per rollout", "number"),
  ("eval/heldout/num_turns", "turns per rollout", "number"),
  ("eval/heldout/mean_length", "tokens per rollout", "number"),
)

# What a run on the quickstart's problems is asked to reach.
QUICKSTART_GIN = "experiments/host/arithmetic.gin"
MAX_HEAD = 0.05
MIN_GAIN = 0.15
ENOUGH_ACCURACY = 0.95
MIN_CLEANUP = 3.0


class Table(NamedTuple):
  """The headline table as text."""

  columns: list[str]
  rows: list[list[str]]
  note: str


class Target(NamedTuple):
  """One goal, what was measured, and whether it was reached."""

  name: str
  figure: str
  goal: str
  is_met: bool

  @property
  def verdict(self) -> str:
    """In words."""
    return "met" if self.is_met else "not met"

  @property
  def css(self) -> str:
    """Class of the badge."""
    return "good" if self.is_met else "bad"


def run(cfg: object, workdir: pathlib.Path) -> None:
  """Writes `<workdir>/report.html` and prints the headline table.

  Args:
    cfg: not used; a report speaks of what the workdir holds.
    workdir: a run's directory.

  Raises:
    errors.UserError: the workdir holds no metrics, or cannot be written.
  """
  del cfg
  path, table, targets, timing = write(pathlib.Path(workdir))
  console = rich.console.Console(highlight=False)
  if table.rows:
    console.print(_rich_table(table))
  for target in targets:
    console.print(
      f"{target.verdict:>8}  {target.name}: {target.figure}"
      f" (goal: {target.goal})",
      markup=False,
      soft_wrap=True,
    )
  if timing:
    console.print(timing, markup=False, soft_wrap=True)
  console.print(f"report: {path}", markup=False, soft_wrap=True)


def write(
  workdir: pathlib.Path,
) -> tuple[pathlib.Path, Table, list[Target], str]:
  """Writes the page.

  Args:
    workdir: a run's directory.

  Returns:
    Path of the page, the headline table, the targets and the time split.

  Raises:
    errors.UserError: no metrics, or the page cannot be written.
  """
  rows = curves.read(workdir / "metrics.jsonl")
  config = read_config(workdir)
  table = headline_table(rows)
  targets = headline_targets(rows) if has_targets(config) else []
  page = (
    _environment()
    .get_template("report.html")
    .render(
      title=f"roc: {workdir.resolve().name}",
      subtitle=describe(rows, config),
      colours=plots.style_sheet(":root"),
      targets=targets,
      table=table,
      panels=curves.draw(rows),
      is_supervised=_is_supervised(rows),
      exhibits=gallery.exhibits(workdir / "rollouts"),
    )
  )
  path = workdir / "report.html"
  scratch = workdir / "report.html.part"
  try:
    scratch.write_text(page, encoding="utf-8")
    os.replace(scratch, path)
  except OSError as e:
    raise errors.UserError(
      f"cannot write {path}: {e.strerror}; free space or give the workdir"
      " write permission"
    ) from None
  return path, table, targets, curves.time_split(rows)


def read_config(workdir: pathlib.Path) -> dict[str, Any]:
  """Returns the run's config.json, or nothing where there is none."""
  try:
    values = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
  except (OSError, ValueError):
    return {}
  return values if isinstance(values, dict) else {}


# ------------------------------------------------------------------ headline


def headline_table(rows: Sequence[curves.Row]) -> Table:
  """Compares the policy before, early in and at the end of training.

  Args:
    rows: metrics, one row per step.

  Returns:
    Up to three columns of figures; no rows if nothing was evaluated yet.
  """
  evaluated = curves.evaluations(rows)
  if not evaluated:
    return Table([], [], "")
  end = len(evaluated) - 1
  picked = [evaluated[i] for i in sorted({0, min(1, end), end})]
  names = [_moment(row["step"], row is picked[-1]) for row in picked]
  body = []
  for metric, name, kind in HEADLINES:
    values = [row.get(metric) for row in picked]
    if not any(curves.is_number(v) for v in values):
      continue
    cells = [
      _cell(value, kind, _interval(row, metric))
      for value, row in zip(values, picked, strict=True)
    ]
    body.append([name, *cells])
  note = ""
  if curves.is_number(picked[-1].get(N_PROBLEMS)):
    note = (
      f"{picked[-1][N_PROBLEMS]:.0f} held-out problems; in brackets the 95 %"
      " interval of a share measured on so many."
    )
  return Table(["held-out problems", *names], body, note)


def has_targets(config: Mapping[str, Any]) -> bool:
  """Whether a run's problems are those of the quickstart."""
  host = config.get("host")
  files = host.get("gin_files") if isinstance(host, Mapping) else None
  return isinstance(files, Sequence) and QUICKSTART_GIN in files


def headline_targets(rows: Sequence[curves.Row]) -> list[Target]:
  """Holds the last evaluation against the quickstart's goals.

  Args:
    rows: metrics, one row per step.

  Returns:
    A target for each figure that was measured before and after training.
  """
  evaluated = curves.evaluations(rows)
  if len(evaluated) < 2:
    return []
  first, last = evaluated[0], evaluated[-1]
  targets = []
  gain = last[ACCURACY] - first[ACCURACY]
  targets.append(
    Target(
      "accuracy with the tool",
      f"{_percent(first[ACCURACY])} → {_percent(last[ACCURACY])}",
      f"{100 * MIN_GAIN:.0f} points more, or over {_percent(ENOUGH_ACCURACY)}",
      gain >= MIN_GAIN or last[ACCURACY] > ENOUGH_ACCURACY,
    )
  )
  if curves.is_number(first.get(FAILING)) and curves.is_number(
    last.get(FAILING)
  ):
    targets.append(_cleanup(first[FAILING], last[FAILING]))
  if curves.is_number(last.get(HEAD)):
    targets.append(
      Target(
        "accuracy in the head",
        _percent(last[HEAD]),
        f"under {_percent(MAX_HEAD)}: the tool does the work",
        last[HEAD] < MAX_HEAD,
      )
    )
  return targets


def _cleanup(before: float, after: float) -> Target:
  figure = f"{_percent(before)} → {_percent(after)}"
  if after > 0 and before > 0:
    figure += f" ({before / after:.1f}-fold down)"
  return Target(
    "failing calls in correct rollouts",
    figure,
    f"down at least {MIN_CLEANUP:.0f}-fold",
    0 < before >= MIN_CLEANUP * after - 1e-9,
  )


def describe(rows: Sequence[curves.Row], config: Mapping[str, Any]) -> str:
  """Says in one line what the run was, as far as the workdir tells."""
  parts = []
  section = config.get("filter")
  if _is_supervised(rows):
    parts.append("supervised training")
  elif isinstance(section, Mapping) and "mode" in section:
    drawn, kept = section.get("n_drawn"), section.get("n_kept")
    parts.append(f"filter {section['mode']}, {drawn} drawn, {kept} kept")
  last = rows[-1]
  parts.append(f"{last['step']} steps")
  for name, words in (
    ("rollouts_drawn", "rollouts drawn"),
    ("tokens_sampled", "tokens sampled"),
    ("tokens_trained", "tokens, padding included"),
  ):
    _, values = curves.series(rows, name)
    if values:
      parts.append(f"{values[-1]:,.0f} {words}")
  if "seed" in config:
    parts.append(f"seed {config['seed']}")
  return " · ".join(parts)


def _is_supervised(rows: Sequence[curves.Row]) -> bool:
  """Whether metrics are those of `sft`: nothing was drawn, nothing filtered."""
  return any("tokens_trained" in row for row in rows)


def _moment(step: int, is_last: bool) -> str:
  if step == 0:
    return "before RL"
  return f"{'last, ' if is_last else ''}step {step}"


def _percent(share: float) -> str:
  digits = 0 if share in (0.0, 1.0) else 1
  return f"{100 * share:.{digits}f} %"


def _cell(value: Any, kind: str, interval: tuple[float, float] | None) -> str:
  if not curves.is_number(value):
    return "–"
  if kind != "percent":
    return f"{value:.2f}" if value < 20 else f"{value:.1f}"
  if interval is None:
    return _percent(value)
  low, high = interval
  return f"{_percent(value)} ({100 * low:.0f}–{100 * high:.0f})"


def _interval(row: curves.Row, metric: str) -> tuple[float, float] | None:
  """95 % interval of an accuracy; None for what has none.

  One rollout a problem is a share of trials. Several of one problem are not
  independent, which the standard error over problems allows for.
  """
  n, share = row.get(N_PROBLEMS), row.get(metric)
  if metric not in (ACCURACY, HEAD) or not curves.is_number(share):
    return None
  if not curves.is_number(n) or n < 1:
    return None
  stderr = row.get(STDERR)
  has_samples = any(name.startswith("eval/heldout/avg@") for name in row)
  if metric == ACCURACY and has_samples and curves.is_number(stderr):
    return max(0.0, share - 1.96 * stderr), min(1.0, share + 1.96 * stderr)
  return wilson(share, int(n))


def wilson(share: float, n: int) -> tuple[float, float]:
  """Wilson's 95 % interval of a share of n independent trials.

  Unlike the normal one, it does not shrink to a point at shares of 0 and 1.

  Args:
    share: in [0, 1].
    n: number of trials, at least 1.

  Returns:
    (low, high), within [0, 1].
  """
  z = 1.96
  middle = share + z * z / (2 * n)
  inner = share * (1 - share) / n + z * z / (4 * n * n)
  half = z * math.sqrt(max(inner, 0.0))
  scale = 1 + z * z / n
  return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


# ----------------------------------------------------------------- rendering


def _environment() -> jinja2.Environment:
  return jinja2.Environment(
    loader=jinja2.FileSystemLoader(TEMPLATES),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )


def _rich_table(table: Table) -> rich.table.Table:
  drawn = rich.table.Table(title_justify="left")
  for i, name in enumerate(table.columns):
    drawn.add_column(name, justify="left" if i == 0 else "right")
  for row in table.rows:
    drawn.add_row(*row)
  return drawn
