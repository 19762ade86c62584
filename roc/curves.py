"""Reads metrics.jsonl and draws the curves that a run is judged by."""

import math
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeGuard

import numpy as np

from roc import errors, jsonl, plots

Row = dict[str, Any]

ACCURACY = "eval/heldout/accuracy"
PHASES = ("generate", "tools", "score", "update")


class Panel(NamedTuple):
  """One figure of the report."""

  svg: str
  caption: str


# ------------------------------------------------------------------- reading


def read(path: pathlib.Path) -> list[Row]:
  """Reads a metrics file: one JSON object a line, one or more lines a step.

  Args:
    path: a run's metrics.jsonl. A half-written last line, as a killed run
      leaves it, is passed over.

  Returns:
    One row per step, ascending; lines of the same step are merged.

  Raises:
    errors.UserError: no such file, nothing in it, or a broken line.
  """
  if not path.is_file():
    raise errors.UserError(
      f"no {path.name} under {path.parent}: is this the workdir of a run?"
      " Train first, or point --workdir at the directory that train was given"
    )
  rows: dict[int, Row] = {}
  for number, line in jsonl.lines(path):
    try:
      row = jsonl.loads(line)
      step = int(row["step"])
    except (ValueError, KeyError, TypeError):
      if not line.endswith(b"\n"):  # the run was killed
        continue
      raise errors.UserError(
        f"{path} line {number}: not a JSON object with a step; mend that line,"
        " or restore the file"
      ) from None
    rows.setdefault(step, {}).update(row)
  if not rows:
    raise errors.UserError(
      f"{path} is empty: the run has not finished a step yet"
    )
  return [rows[step] for step in sorted(rows)]


def series(rows: Sequence[Row], name: str) -> tuple[list[int], list[float]]:
  """Returns steps and values of one metric where it was measured."""
  steps, values = [], []
  for row in rows:
    value = row.get(name)
    if is_number(value):
      steps.append(row["step"])
      values.append(float(value))
  return steps, values


def is_number(value: Any) -> TypeGuard[float]:
  """Says whether a metric holds a finite number."""
  return (
    isinstance(value, int | float)
    and not isinstance(value, bool)
    and math.isfinite(value)
  )


def evaluations(rows: Sequence[Row]) -> list[Row]:
  """Returns the rows on which held-out problems were evaluated."""
  return [row for row in rows if is_number(row.get(ACCURACY))]


# ------------------------------------------------------------------- drawing


class Line(NamedTuple):
  """One series of a panel."""

  metric: str
  label: str
  colour: str
  is_dashed: bool = False


class Sketch(NamedTuple):
  """What a panel shows, as data."""

  title: str
  lines: tuple[Line, ...]
  caption: str
  is_percent: bool = False


SKETCHES = (
  Sketch(
    "Held-out accuracy",
    (
      Line("eval/heldout/accuracy", "with the tool", "green"),
      Line("eval/head/accuracy", "in the head", "grey", True),
    ),
    "Problems that training never saw, answered with the tool and, for"
    " comparison, at once without it.",
    is_percent=True,
  ),
  Sketch(
    "Failing calls, held-out problems",
    (
      Line(
        "eval/heldout/failure_frequency_correct", "correct rollouts", "magenta"
      ),
    ),
    "Failed tool calls per call in rollouts that end right: the mess that an"
    " outcome reward cannot see.",
    is_percent=True,
  ),
  Sketch(
    "Failing calls in correct rollouts",
    (
      Line("roc/err_ratio_pos_before", "as drawn", "blue"),
      Line("roc/err_ratio_pos_after", "as kept", "orange", True),
    ),
    "Failed calls per call in the correct rollouts of each step. The gap is"
    " what the filter takes out.",
    is_percent=True,
  ),
  Sketch(
    "Failing calls in wrong rollouts",
    (
      Line("roc/err_ratio_neg_before", "as drawn", "blue"),
      Line("roc/err_ratio_neg_after", "as kept", "orange", True),
    ),
    "Wrong rollouts are kept without regard to their mess, so the two lines"
    " should agree up to chance.",
    is_percent=True,
  ),
  Sketch(
    "Reward in training",
    (
      Line("reward", "mean reward", "green"),
      Line("frac_reward_zero_std", "groups of one reward", "grey", True),
    ),
    "Groups whose rollouts all earn the same teach nothing.",
    is_percent=True,
  ),
  Sketch(
    "Turns and tool calls",
    (
      Line("num_turns/mean", "turns", "blue"),
      Line("tools/call_frequency", "tool calls", "orange"),
    ),
    "Per rollout, in training.",
  ),
  Sketch(
    "Tokens per rollout",
    (Line("completions/mean_length", "tokens", "blue"),),
    "After the prompt, tool answers included.",
  ),
  Sketch(
    "Entropy",
    (Line("entropy", "nats per token", "blue"),),
    "Of the policy over its own tokens. A fall to zero is a collapse.",
  ),
)

LOSS = Sketch(
  "Loss",
  (Line("loss", "nats per token", "blue"),),
  "Cross-entropy of the demonstrations' own tokens.",
)


def draw(rows: Sequence[Row]) -> list[Panel]:
  """Draws every panel that the run has numbers for.

  Args:
    rows: what `read` returned.

  Returns:
    Panels in reading order; metrics that were never written are left out.
  """
  # A policy gradient's loss says nothing; that of supervised training does.
  is_supervised = not series(rows, "reward")[0]
  sketches = (LOSS, *SKETCHES) if is_supervised else SKETCHES
  panels = [_line_panel(rows, sketch) for sketch in sketches]
  panels.append(_time_panel(rows))
  return [panel for panel in panels if panel is not None]


def _line_panel(rows: Sequence[Row], sketch: Sketch) -> Panel | None:
  figure, (ax,) = plots.panels()
  is_empty = True
  for line in sketch.lines:
    steps, values = series(rows, line.metric)
    if not steps:
      continue
    is_empty = False
    is_evaluation = line.metric.startswith("eval/")
    plots.curve(
      ax,
      steps,
      values,
      label=line.label,
      colour=line.colour,
      is_dashed=line.is_dashed,
      window=1 if is_evaluation else smoothing(len(steps)),
      has_points=is_evaluation,
    )
  if is_empty:
    return None
  plots.finish(ax, sketch.title, is_percent=sketch.is_percent)
  return Panel(plots.to_svg(figure), sketch.caption)


def smoothing(n_points: int) -> int:
  """Width of the running mean for a per-step series of that many points."""
  return 1 if n_points < 15 else 2 * (n_points // 30) + 3


def _time_panel(rows: Sequence[Row]) -> Panel | None:
  timed = [
    r for r in rows if any(is_number(r.get(f"time/{p}")) for p in PHASES)
  ]
  if not timed:
    return None
  steps = [row["step"] for row in timed]
  figure, (ax,) = plots.panels()
  floor = np.zeros(len(steps))
  for phase, colour in zip(
    PHASES, ("blue", "orange", "magenta", "green"), strict=True
  ):
    raw = [row.get(f"time/{phase}") for row in timed]
    seconds = np.array([v if is_number(v) else 0.0 for v in raw], dtype=float)
    ax.fill_between(
      steps,
      floor,
      floor + seconds,
      step="mid",
      color=plots.light(colour),
      alpha=0.75,
      linewidth=0,
      label=phase,
    )
    floor = floor + seconds
  plots.finish(ax, "Seconds per step")
  return Panel(plots.to_svg(figure), time_split(rows))


def time_split(rows: Sequence[Row]) -> str:
  """Says in one sentence where the time of a median step went.

  Args:
    rows: what `read` returned.

  Returns:
    A sentence such as "Median step 1.50 s: generate 60 %, ...", or "".
  """
  medians = {p: _median(series(rows, f"time/{p}")[1]) for p in PHASES}
  total = sum(medians.values())
  if not total:
    return ""
  whole = _median(series(rows, "time/step")[1]) or total
  parts = ", ".join(f"{p} {100 * s / whole:.0f} %" for p, s in medians.items())
  return f"Median step {whole:.2f} s: {parts}."


def _median(values: Sequence[float]) -> float:
  return float(np.median(values)) if len(values) else 0.0
