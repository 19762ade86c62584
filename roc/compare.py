"""Seven ways of choosing what to train on, seed by seed.

The arms differ in the filter alone. They are compared at equal updates, at
equal numbers of rollouts drawn and at equal numbers of tokens sampled, because
they do not cost the same: `grpo` draws as many rollouts as it keeps, the others
draw more, and `grpo_2g` trains on all of those. `stratified` is the control
that tells cleaning from thinning: RoC's quotas, blind to penalties.

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

from roc import (
  build,
  curves,
  errors,
  estimates,
  lessons,
  plots,
  pretrained,
  report,
  runlog,
)
from roc import config as config_lib
from roc.device import selection
from roc.estimates import Estimate


class Arm(NamedTuple):
  """One way of choosing: a filter, and how many rollouts it sees and keeps."""

  name: str
  label: str
  mode: selection.Mode
  colour: str
  is_dashed: bool = False
  draws_more: bool = True  # config.filter.n_drawn; else only n_kept
  keeps_all: bool = False  # what it draws


ARMS = (
  Arm("grpo", "GRPO", "none", "grey", draws_more=False),
  Arm("grpo_2g", "GRPO 2G", "none", "ink", keeps_all=True),
  Arm("uniform", "uniform", "uniform", "orange"),
  Arm("stratified", "stratified", "stratified", "green"),
  Arm("balanced", "balanced", "balanced", "violet"),
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


class Budget(NamedTuple):
  """What the arms are given equal amounts of."""

  metric: str
  name: str
  column: str


BUDGETS = (
  Budget(estimates.STEP, "updates", "updates"),
  Budget(estimates.DRAWN, "rollouts drawn", "drawn"),
  Budget(estimates.TOKENS, "tokens sampled", "sampled"),
)

Runs = Mapping[str, Sequence[Sequence[curves.Row]]]


# ------------------------------------------------------------------- running


class Job(NamedTuple):
  """One run: its program, configuration and workdir."""

  program: str
  cfg: config_lib.Config
  workdir: pathlib.Path


def run(cfg: config_lib.Config, workdir: pathlib.Path) -> None:
  """Trains what is not trained yet, then prints and plots all arms.

  All arms of a seed start from one policy: `cfg.init_from`, or where that is
  empty the one that supervised training with this seed leaves in
  `<workdir>/sft/seed_<k>`.

  Args:
    cfg: of the arms that draw more than they keep; seeds count up from
      `cfg.seed`.
    workdir: holds one directory per arm and the comparison files.

  Raises:
    errors.UserError: there are runs of another configuration.
  """
  cfg, workdir = pretrained.settle(cfg), pathlib.Path(workdir)
  if cfg.train.replay:
    raise errors.UserError(
      "compare draws the rollouts of each arm itself; leave config.train.replay"
      " empty"
    )
  jobs = {seed: _jobs(cfg, workdir, seed) for seed in seeds(cfg)}
  _refuse_other_runs(cfg, [job for of_seed in jobs.values() for job in of_seed])
  console = rich.console.Console(highlight=False)
  n_done, n_all = 0, sum(map(len, jobs.values()))
  for of_seed in jobs.values():
    is_all_trained = all(_is_trained(j) for j in of_seed if j.program != "sft")
    for job in of_seed:
      n_done += 1
      is_finished = is_all_trained or _is_trained(job)
      text = f"[{n_done}/{n_all}] {job.workdir}"
      console.print(text + ": finished" * is_finished, markup=False)
      if not is_finished:
        _program(job.program).run(job.cfg, job.workdir)
  for table in write(workdir, seeds(cfg)):
    console.print(table)
  console.print(f"comparison: {workdir / 'comparison.html'}", markup=False)


def seeds(cfg: config_lib.Config) -> range:
  """The seeds that are compared."""
  return range(cfg.seed, cfg.seed + cfg.compare.seeds)


def _jobs(
  cfg: config_lib.Config, workdir: pathlib.Path, seed: int
) -> list[Job]:
  """The runs of one seed, in the order in which they are made."""
  cfg = dataclasses.replace(cfg, seed=seed)
  jobs = []

  def add(program: str, cfg: config_lib.Config, *parts: str) -> pathlib.Path:
    place = workdir.joinpath(*parts)
    jobs.append(Job(program, _with_store(cfg, *parts), place))
    return place

  if not cfg.init_from:
    start = add("sft", cfg, "sft", f"seed_{seed}")
    cfg = dataclasses.replace(cfg, init_from=str(start))
  for arm in ARMS:
    add("train", arm_config(cfg, arm), arm.name, f"seed_{seed}")
  return jobs


def arm_config(cfg: config_lib.Config, arm: Arm) -> config_lib.Config:
  """Returns the configuration of one arm: the filter replaced."""
  f = cfg.filter
  n_drawn = f.n_drawn if arm.draws_more else f.n_kept
  row_filter = dataclasses.replace(
    f,
    mode=arm.mode,
    n_drawn=n_drawn,
    n_kept=n_drawn if arm.keeps_all else f.n_kept,
  )
  return dataclasses.replace(cfg, filter=row_filter)


def _with_store(cfg: config_lib.Config, *parts: str) -> config_lib.Config:
  """A place below `config.checkpoint.directory` for each run, if it is set."""
  directory = cfg.checkpoint.directory
  if not directory:
    return cfg
  store = dataclasses.replace(
    cfg.checkpoint, directory="/".join([directory.rstrip("/"), *parts])
  )
  return dataclasses.replace(cfg, checkpoint=store)


def _refuse_other_runs(cfg: config_lib.Config, jobs: Sequence[Job]) -> None:
  """Raises `errors.UserError` if a workdir holds another configuration's run.

  Finished runs are not started again, so nobody else would notice.
  """
  there = [job for job in jobs if (job.workdir / runlog.RECORD).exists()]
  if not there:
    return
  host = build.host_parts(cfg)
  for job in there:
    is_sft = job.program == "sft"
    data = lessons.identity(job.cfg) if is_sft else build.contents(host)
    runlog.require_same(
      job.workdir,
      job.program,
      gin_text=host.gin_text,
      identity=build.identity(job.cfg, job.program, data),
      defaults=config_lib.defaults(job.cfg),
      remedy="give compare another --workdir, or move that directory away to"
      " train this run anew",
    )


def _is_trained(job: Job) -> bool:
  """Whether metrics reach the last step of RL and the evaluation behind it.

  False for supervised training, which says itself that all steps are done.
  """
  path = job.workdir / runlog.METRICS
  if not path.is_file() or not path.stat().st_size:
    return False
  evaluated = curves.evaluations(curves.read(path))
  return bool(evaluated) and evaluated[-1]["step"] >= job.cfg.train.steps


def _program(name: str) -> Any:
  # Imported where it runs, so that tests can put something in its place.
  return importlib.import_module(f"roc.{name}")


# --------------------------------------------------------------- aggregating


def load(
  workdir: pathlib.Path, of_seeds: Sequence[int]
) -> dict[str, list[list[curves.Row]]]:
  """Reads the runs of every arm.

  Args:
    workdir: what `run` was given.
    of_seeds: the seeds to read; runs of others may lie beside them.

  Returns:
    Arm name to its runs in the order of their seeds; only arms that have any.

  Raises:
    errors.UserError: no run at all.
  """
  runs = {}
  for arm in ARMS:
    paths = [
      workdir / arm.name / f"seed_{k}" / runlog.METRICS for k in of_seeds
    ]
    paths = [path for path in paths if path.is_file()]
    if paths:
      runs[arm.name] = [curves.read(path) for path in paths]
  if not runs:
    raise errors.UserError(
      f"no <arm>/seed_<k>/metrics.jsonl under {workdir}: is this the workdir of"
      " a comparison?"
    )
  return runs


def common_amount(runs: Runs, budget: str) -> float:
  """The most of a budget that every run had spent at an evaluation.

  Args:
    runs: arm name to its runs.
    budget: metric that counts it.
  """
  return min(
    estimates.spent(rows, budget, curves.evaluations(rows)[-1]["step"])
    for arm_runs in runs.values()
    for rows in arm_runs
  )


# ------------------------------------------------------------------- writing


class Table(NamedTuple):
  """All arms at an equal amount of one budget, as text."""

  title: str
  columns: list[str]
  body: list[list[str]]


def write(
  workdir: pathlib.Path, of_seeds: Sequence[int]
) -> list[rich.table.Table]:
  """Writes comparison.{json,md,svg,png,html} from the runs in a workdir.

  Args:
    workdir: what `run` was given.
    of_seeds: the seeds that are compared.

  Returns:
    A table for each of `BUDGETS`, for the terminal.
  """
  runs = load(workdir, of_seeds)
  over_steps = {
    name: {m.metric: estimates.estimate(arm_runs, m.metric) for m in MEASURES}
    for name, arm_runs in runs.items()
  }
  tables = [equal_table(runs, budget) for budget in BUDGETS]
  note = _note(runs)
  figure = _figure(over_steps)
  outputs = {
    "json": json.dumps(_as_json(over_steps), indent=1, allow_nan=False) + "\n",
    "md": "\n".join([*map(_markdown, tables), note, ""]),
    "svg": plots.to_svg(figure, is_standalone=True),
    "html": _page(
      title=f"roc: {workdir.resolve().name}",
      arms=len(runs),
      note=note,
      svg=plots.to_svg(figure),
      tables=tables,
    ),
  }
  for ending, text in outputs.items():
    (workdir / f"comparison.{ending}").write_text(text, encoding="utf-8")
  (workdir / "comparison.png").write_bytes(plots.to_png(figure))
  return [
    _terminal(table, note if table is tables[-1] else None) for table in tables
  ]


def equal_table(runs: Runs, budget: Budget) -> Table:
  """All arms when they had spent the same.

  Args:
    runs: arm name to its runs.
    budget: of what.

  Returns:
    A line for what all started from and one for each arm.
  """
  amount = common_amount(runs, budget.metric)
  labels = {arm.name: arm.label for arm in ARMS}
  others = [b for b in BUDGETS if b != budget]
  columns = ["arm", *(b.column for b in others), *(m.column for m in MEASURES)]
  first = next(iter(runs.values()))
  body = [_line("start", first, budget, 0.0)] if amount else []
  body += [
    _line(labels[name], arm_runs, budget, amount)
    for name, arm_runs in runs.items()
  ]
  return Table(f"At {amount:,.0f} {budget.name}", columns, body)


def _line(
  label: str,
  arm_runs: Sequence[Sequence[curves.Row]],
  budget: Budget,
  amount: float,
) -> list[str]:
  at = lambda metric: [
    estimates.value_at(rows, metric, budget.metric, amount) for rows in arm_runs
  ]
  costs = [f"{np.mean(at(b.metric)):,.0f}" for b in BUDGETS if b != budget]
  return [label, *costs, *(_cell(at(m.metric), m.is_percent) for m in MEASURES)]


def _cell(values: Sequence[float], is_percent: bool) -> str:
  known = [v for v in values if math.isfinite(v)]
  if not known:
    return "–"
  mean, half = estimates.mean_interval(known)
  scale = 100 if is_percent else 1
  digits = 2 if not is_percent and mean < 20 else 1
  text = f"{scale * mean:.{digits}f}"
  if len(known) > 1:
    text += f" ± {scale * half:.{digits}f}"
  return text if len(known) == len(values) else f"{text} (n={len(known)})"


def _note(runs: Runs) -> str:
  counts = sorted({len(arm_runs) for arm_runs in runs.values()})
  n_seeds = " to ".join(str(n) for n in {counts[0]: 0, counts[-1]: 0})
  return (
    f"Held-out problems; mean over {n_seeds} seeds ± half the 95 % t-interval,"
    " on the straight line between two evaluations where the amount falls"
    " between them. drawn: rollouts. sampled: tokens of the model. failing:"
    " failed calls per call in correct rollouts. calls and tokens: per rollout."
  )


def _figure(
  over_steps: Mapping[str, Mapping[str, Estimate]],
) -> Any:
  figure, axes = plots.panels(len(BUDGETS), len(MEASURES), size=(3.9, 2.9))
  by_name = {arm.name: arm for arm in ARMS}
  for i, ax in enumerate(axes):
    budget, measure = BUDGETS[i // len(MEASURES)], MEASURES[i % len(MEASURES)]
    for name, measures in over_steps.items():
      values, arm = measures[measure.metric], by_name[name]
      xs = values.spent[budget.metric]
      half = np.nan_to_num(values.half)
      plots.band(
        ax, xs, values.mean - half, values.mean + half, colour=arm.colour,
        alpha=0.07,
      )  # fmt: skip
      plots.curve(
        ax, xs, values.mean, label=arm.label, colour=arm.colour,
        has_points=len(xs) < 15,
      )  # fmt: skip
    plots.finish(
      ax,
      measure.title,
      xlabel=budget.name,
      is_percent=measure.is_percent,
      floor=None,
      has_legend=False,
    )
  plots.shared_legend(figure, axes[0])
  return figure


def _as_json(
  over_steps: Mapping[str, Mapping[str, Estimate]],
) -> Any:
  def numbers(values: np.ndarray) -> list[float | None]:
    return [v if math.isfinite(v) else None for v in values.tolist()]

  return {
    name: {
      metric: {
        **{k: numbers(v) for k, v in values.spent.items()},
        "mean": numbers(values.mean),
        "half_width_95": numbers(values.half),
        "seeds": values.n.tolist(),
      }
      for metric, values in measures.items()
    }
    for name, measures in over_steps.items()
  }


def _markdown(table: Table) -> str:
  rule = ["---", *["---:"] * (len(table.columns) - 1)]
  lines = [table.columns, rule, *table.body]
  text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
  return f"{table.title}:\n\n{text}"


def _terminal(table: Table, note: str | None) -> rich.table.Table:
  shown = rich.table.Table(
    title=table.title,
    title_justify="left",
    title_style="",
    caption=note,
    box=rich.box.SIMPLE_HEAD,
    caption_justify="left",
    pad_edge=False,
    collapse_padding=True,
  )
  for i, name in enumerate(table.columns):
    shown.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
  for row in table.body:
    shown.add_row(*row)
  return shown


def _page(**values: Any) -> str:
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(report.TEMPLATES), autoescape=True
  )
  return environment.get_template("comparison.html").render(
    colours=plots.style_sheet(":root"), **values
  )
