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
from roc.estimates import Estimate, estimate


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
  if not cfg.init_from:
    start = workdir / "sft"
    console.print("starting policy: supervised training", markup=False)
    _program("sft").run(_with_store(cfg, "sft"), start)
    cfg = dataclasses.replace(cfg, init_from=str(start))
  jobs = [(seed, arm) for seed in range(cfg.compare.seeds) for arm in ARMS]
  for i, (seed, arm) in enumerate(jobs):
    place = workdir / arm.name / f"seed_{cfg.seed + seed}"
    if is_finished(place, cfg.train.steps):
      console.print(f"[{i + 1}/{len(jobs)}] {place}: finished", markup=False)
      continue
    console.print(f"[{i + 1}/{len(jobs)}] {place}", markup=False)
    run_cfg = arm_config(cfg, arm, cfg.seed + seed)
    run_cfg = _with_store(run_cfg, *place.relative_to(workdir).parts)
    _program("train").run(run_cfg, place)
  table = write(workdir)
  console.print(table)
  console.print(f"comparison: {workdir / 'comparison.html'}", markup=False)


def _with_store(cfg: Any, *parts: str) -> Any:
  """A place below `config.checkpoint.directory` for each run, if it is set."""
  directory = cfg.checkpoint.directory
  if not directory:
    return cfg
  store = dataclasses.replace(
    cfg.checkpoint, directory="/".join([directory.rstrip("/"), *parts])
  )
  return dataclasses.replace(cfg, checkpoint=store)


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
  evaluated = curves.evaluations(curves.read(path))
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
    "json": json.dumps(_as_json(estimates), indent=1, allow_nan=False) + "\n",
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
    " drawn: rollouts. failing: failed calls per call in correct rollouts."
    " calls and tokens: per rollout."
  )


def _figure(
  estimates: Mapping[str, Mapping[str, Estimate]],
) -> Any:
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


def _as_json(
  estimates: Mapping[str, Mapping[str, Estimate]],
) -> Any:
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
