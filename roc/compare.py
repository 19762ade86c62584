"""Four ways of choosing what to train on, from one policy, seed by seed.

The arms differ in the filter alone. `grpo` draws as many rollouts as it keeps;
the other three draw more and keep the same number, so they are compared twice:
against steps (equal updates) and against rollouts drawn (equal sampling).
`uniform` is the control that tells cleaning from mere thinning: it throws away
as many rollouts as RoC does, without looking.

Every run has its own directory, `<workdir>/<arm>/seed_<k>`, and finished ones
are passed over, so the same command continues an interrupted comparison.
"""

import dataclasses
import importlib
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import numpy as np
import rich.box
import rich.console
import rich.table

from roc import curves, errors, plots, report

SEEDS = 3

# 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom.
_T_QUANTILES = (
  12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622,
  2.2281, 2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009,
  2.0930,
)  # fmt: skip


class Arm(NamedTuple):
  """One way of choosing; draws `n_kept` rollouts when not oversampled."""

  name: str
  label: str
  mode: str
  colour: str


ARMS = (
  Arm("grpo", "GRPO", "none", "grey"),
  Arm("uniform", "uniform", "uniform", "orange"),
  Arm("roc_sort", "RoC sort", "sort", "blue"),
  Arm("roc_inverse", "RoC inverse", "inverse", "magenta"),
)


class Measure(NamedTuple):
  """A metric that arms are compared by."""

  metric: str
  title: str
  column: str
  is_percent: bool


MEASURES = (
  Measure(report.ACCURACY, "Held-out accuracy", "accuracy %", True),
  Measure(report.FAILING, "Failing calls, correct rollouts", "failing %", True),
  Measure(
    "eval/heldout/call_frequency", "Tool calls per rollout", "calls", False
  ),
  Measure("eval/heldout/mean_length", "Tokens per rollout", "tokens", False),
)


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A mean over seeds at the evaluation steps of one arm.

  Attributes:
    steps: training steps.
    drawn: rollouts drawn up to then, mean over seeds.
    mean: mean over the seeds that have a number there; NaN without any.
    half: half the 95 % t-interval; NaN with fewer than two seeds.
    n: seeds that have a number.
  """

  steps: np.ndarray
  drawn: np.ndarray
  mean: np.ndarray
  half: np.ndarray
  n: np.ndarray


# ------------------------------------------------------------------- running


def run(cfg: Any, workdir: pathlib.Path) -> None:
  """Trains what is not trained yet, then prints and plots all arms.

  All arms and seeds start from one policy: `cfg.init_from`, or where that is
  empty the one that supervised training leaves in `<workdir>/sft`.

  Args:
    cfg: `roc.config.Config` of the oversampled arms; seeds count up from
      `cfg.seed`.
    workdir: holds one directory per arm and the comparison files.
  """
  workdir = pathlib.Path(workdir)
  console = rich.console.Console(highlight=False)
  n_seeds = getattr(getattr(cfg, "compare", None), "seeds", SEEDS)
  if not cfg.init_from:
    start = workdir / "sft"
    console.print("starting policy: supervised training", markup=False)
    _program("sft").run(cfg, start)
    cfg = dataclasses.replace(cfg, init_from=str(start))
  jobs = [(seed, arm) for seed in range(n_seeds) for arm in ARMS]
  for i, (seed, arm) in enumerate(jobs):
    place = workdir / arm.name / f"seed_{cfg.seed + seed}"
    if is_finished(place, cfg.train.steps):
      console.print(f"[{i + 1}/{len(jobs)}] {place}: finished", markup=False)
      continue
    console.print(f"[{i + 1}/{len(jobs)}] {place}", markup=False)
    _program("train").run(arm_config(cfg, arm, cfg.seed + seed), place)
  table = write(workdir)
  console.print(table)
  console.print(f"comparison: {workdir / 'comparison.html'}", markup=False)


def arm_config(cfg: Any, arm: Arm, seed: int) -> Any:
  """Returns the configuration of one run: the filter and the seed replaced."""
  is_oversampled = arm.mode != "none"
  row_filter = dataclasses.replace(
    cfg.filter,
    mode=arm.mode,
    n_drawn=cfg.filter.n_drawn if is_oversampled else cfg.filter.n_kept,
  )
  return dataclasses.replace(cfg, seed=seed, filter=row_filter)


def is_finished(place: pathlib.Path, n_steps: int) -> bool:
  """Says whether a run's metrics reach the last step and its evaluation."""
  path = place / "metrics.jsonl"
  if not path.is_file() or not path.stat().st_size:
    return False
  evaluated = report.evaluations(curves.read(path))
  return bool(evaluated) and evaluated[-1]["step"] >= n_steps


def _program(name: str) -> Any:
  # Not imported above: reading results needs no jax.
  return importlib.import_module(f"roc.{name}")


# --------------------------------------------------------------- aggregating


def load(workdir: pathlib.Path) -> dict[str, list[list[curves.Row]]]:
  """Reads every run of every arm.

  Args:
    workdir: what `run` was given.

  Returns:
    Arm name to its runs in the order of their seeds; only arms that have any.

  Raises:
    errors.UserError: no run at all.
  """
  runs = {}
  for arm in ARMS:
    paths = sorted(
      workdir.glob(f"{arm.name}/seed_*/metrics.jsonl"),
      key=lambda path: int(path.parent.name.removeprefix("seed_")),
    )
    if paths:
      runs[arm.name] = [curves.read(path) for path in paths]
  if not runs:
    raise errors.UserError(
      f"no <arm>/seed_<k>/metrics.jsonl under {workdir}: is this the workdir of"
      " a comparison?"
    )
  return runs


def estimate(runs: Sequence[Sequence[curves.Row]], metric: str) -> Estimate:
  """Averages one metric over the seeds of one arm.

  Args:
    runs: metrics of each seed.
    metric: name of an evaluation metric.

  Returns:
    An entry for each step that every seed has evaluated. A seed whose metric
    is undefined there (no correct rollout, so no share of failing calls in
    correct ones) counts for that step as missing, which `n` shows.
  """
  evaluated = [
    {row["step"]: row for row in report.evaluations(rows)} for rows in runs
  ]
  steps = sorted(set.intersection(*(set(rows) for rows in evaluated)))
  drawn = [[_drawn(rows, s) for rows in runs] for s in steps]
  samples = [
    [
      float(rows[s][metric])
      for rows in evaluated
      if curves.is_number(rows[s].get(metric))
    ]
    for s in steps
  ]
  summary = [mean_interval(values) for values in samples]
  return Estimate(
    steps=np.array(steps, int),
    drawn=np.array([np.mean(values) for values in drawn]),
    mean=np.array([mean for mean, _ in summary]),
    half=np.array([half for _, half in summary]),
    n=np.array([len(values) for values in samples], int),
  )


def _drawn(rows: Sequence[curves.Row], step: int) -> float:
  """Rollouts drawn up to a step: the count is written with every step."""
  steps, counts = curves.series(rows, "rollouts_drawn")
  known = [c for s, c in zip(steps, counts, strict=True) if s <= step]
  return known[-1] if known else 0.0


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
  """Mean and half width of its 95 % t-interval.

  Args:
    values: one number per seed.

  Returns:
    (mean, half width); the half width is NaN for one value, both for none.
  """
  n = len(values)
  if n == 0:
    return math.nan, math.nan
  mean = float(np.mean(values))
  if n == 1:
    return mean, math.nan
  quantile = _T_QUANTILES[min(n - 1, len(_T_QUANTILES)) - 1]
  return mean, quantile * float(np.std(values, ddof=1)) / math.sqrt(n)


# ------------------------------------------------------------------- writing


def write(workdir: pathlib.Path) -> rich.table.Table:
  """Writes comparison.{json,md,svg,png,html} from the runs in a workdir.

  Args:
    workdir: what `run` was given.

  Returns:
    The table of the last common step, for the terminal.
  """
  runs = load(workdir)
  estimates = {
    name: {m.metric: estimate(arm_runs, m.metric) for m in MEASURES}
    for name, arm_runs in runs.items()
  }
  columns, body = final_table(estimates)
  note = _note(runs)
  figure = _figure(estimates)
  outputs = {
    "json": json.dumps(_as_json(estimates), indent=1) + "\n",
    "md": _markdown(columns, body, note),
    "svg": plots.to_svg(figure, is_standalone=True),
    "html": _page(
      title=f"roc: {workdir.resolve().name}",
      note=note,
      svg=plots.to_svg(figure),
      columns=columns,
      rows=body,
    ),
  }
  for ending, text in outputs.items():
    (workdir / f"comparison.{ending}").write_text(text, encoding="utf-8")
  (workdir / "comparison.png").write_bytes(plots.to_png(figure))
  table = rich.table.Table(
    caption=note,
    box=rich.box.SIMPLE_HEAD,
    caption_justify="left",
    pad_edge=False,
    collapse_padding=True,
  )
  for i, name in enumerate(columns):
    table.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
  for row in body:
    table.add_row(*row)
  return table


def final_table(
  estimates: Mapping[str, Mapping[str, Estimate]],
) -> tuple[list[str], list[list[str]]]:
  """The comparison at the start and at the last step that all runs share.

  Args:
    estimates: arm name to metric to estimate.

  Returns:
    Column names, and a row of text for the common start and for each arm.
  """
  columns = ["arm", "step", "drawn", *(m.column for m in MEASURES)]
  shared = [e[report.ACCURACY].steps for e in estimates.values()]
  common = set.intersection(*(set(steps.tolist()) for steps in shared))
  if not common:
    return columns, []
  labels = {arm.name: arm.label for arm in ARMS}
  body = []
  for name, measures in estimates.items():
    steps = measures[report.ACCURACY].steps.tolist()
    if not body and 0 in steps:
      body.append(_row("start", measures, steps.index(0)))
    body.append(_row(labels[name], measures, steps.index(max(common))))
  return columns, body


def _row(label: str, measures: Mapping[str, Estimate], where: int) -> list[str]:
  first = measures[report.ACCURACY]
  cells = [
    _cell(measures[m.metric], where, m.is_percent, first.n[where])
    for m in MEASURES
  ]
  return [label, str(first.steps[where]), f"{first.drawn[where]:,.0f}", *cells]


def _cell(values: Estimate, where: int, is_percent: bool, n_seeds: int) -> str:
  mean, half, n = values.mean[where], values.half[where], values.n[where]
  if not n:
    return "–"
  scale = 100 if is_percent else 1
  digits = 2 if not is_percent and mean < 20 else 1
  text = f"{scale * mean:.{digits}f}"
  if n > 1:
    text += f" ± {scale * half:.{digits}f}"
  return text if n == n_seeds else f"{text} (n={n})"


def _note(runs: Mapping[str, Sequence[Any]]) -> str:
  counts = sorted({len(arm_runs) for arm_runs in runs.values()})
  seeds = " to ".join(str(n) for n in {counts[0]: 0, counts[-1]: 0})
  return (
    f"Held-out problems; mean over {seeds} seeds ± half the 95 % t-interval."
    " drawn: rollouts. failing: failed calls per call in correct rollouts. calls and"
    " tokens: per rollout."
  )


def _figure(estimates: Mapping[str, Mapping[str, Estimate]]) -> Any:
  figure, axes = plots.panels(2, len(MEASURES), size=(3.9, 2.9))
  by_name = {arm.name: arm for arm in ARMS}
  for i, ax in enumerate(axes):
    measure = MEASURES[i % len(MEASURES)]
    is_by_steps = i < len(MEASURES)
    for name, measures in estimates.items():
      values, arm = measures[measure.metric], by_name[name]
      xs = values.steps if is_by_steps else values.drawn
      half = np.nan_to_num(values.half)
      plots.band(
        ax, xs, values.mean - half, values.mean + half, colour=arm.colour
      )
      plots.curve(
        ax, xs, values.mean, label=arm.label, colour=arm.colour,
        has_points=len(xs) < 15,
      )  # fmt: skip
    plots.finish(
      ax,
      measure.title,
      xlabel="step" if is_by_steps else "rollouts drawn",
      is_percent=measure.is_percent,
      floor=None,
      has_legend=False,
    )
  plots.shared_legend(figure, axes[0])
  return figure


def _as_json(estimates: Mapping[str, Mapping[str, Estimate]]) -> Any:
  def numbers(values: np.ndarray) -> list[float | None]:
    return [v if math.isfinite(v) else None for v in values.tolist()]

  return {
    name: {
      metric: {
        "step": values.steps.tolist(),
        "rollouts_drawn": numbers(values.drawn),
        "mean": numbers(values.mean),
        "half_width_95": numbers(values.half),
        "seeds": values.n.tolist(),
      }
      for metric, values in measures.items()
    }
    for name, measures in estimates.items()
  }


def _markdown(
  columns: Sequence[str], body: Sequence[Sequence[str]], note: str
) -> str:
  rule = ["---", *["---:"] * (len(columns) - 1)]
  lines = [columns, rule, *body]
  table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
  return f"{table}\n{note}\n"


def _page(**values: Any) -> str:
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(report.TEMPLATES), autoescape=True
  )
  return environment.get_template("comparison.html").render(
    colours=plots.style_sheet(":root"), **values
  )
