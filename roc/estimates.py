"""Means over seeds with the interval that so few seeds allow."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from roc import curves

# What arms may be given equal amounts of: metrics that count up.
STEP, DRAWN, TOKENS = "step", "rollouts_drawn", "tokens_sampled"
# 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom.
_T_QUANTILES = (
  12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622,
  2.2281, 2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009,
  2.0930,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A mean over seeds at the evaluation steps of one arm.

  Attributes:
    steps: training steps.
    spent: `STEP`, `DRAWN` and `TOKENS` to what was spent up to then, mean over
      seeds.
    mean: mean over the seeds that have a number there; NaN without any.
    half: half the 95 % t-interval; NaN with fewer than two seeds.
    n: seeds that have a number.
  """

  steps: np.ndarray
  spent: dict[str, np.ndarray]
  mean: np.ndarray
  half: np.ndarray
  n: np.ndarray


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
    {row["step"]: row for row in curves.evaluations(rows)} for rows in runs
  ]
  steps = sorted(set.intersection(*(set(rows) for rows in evaluated)))
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
    spent={
      budget: np.array(
        [np.mean([spent(rows, budget, s) for rows in runs]) for s in steps]
      )
      for budget in (STEP, DRAWN, TOKENS)
    },
    mean=np.array([mean for mean, _ in summary]),
    half=np.array([half for _, half in summary]),
    n=np.array([len(values) for values in samples], int),
  )


def spent(rows: Sequence[curves.Row], budget: str, step: int) -> float:
  """What a run had spent by a step.

  Args:
    rows: its metrics.
    budget: `STEP`, `DRAWN` or `TOKENS`.
    step: of training.

  Returns:
    The count; it is written with every step, and 0 before the first.
  """
  steps, counts = curves.series(rows, budget)
  known = [c for s, c in zip(steps, counts, strict=True) if s <= step]
  return known[-1] if known else 0.0


def value_at(
  rows: Sequence[curves.Row], metric: str, budget: str, amount: float
) -> float:
  """A metric of one run when it had spent so much.

  Args:
    rows: its metrics.
    metric: name of an evaluation metric, or another budget.
    budget: `STEP`, `DRAWN` or `TOKENS`.
    amount: spent, in units of the budget.

  Returns:
    The value, on the straight line between the evaluations before and after;
    NaN outside of them and where one of the two is undefined.
  """
  steps = [row["step"] for row in curves.evaluations(rows)]
  xs = [spent(rows, budget, step) for step in steps]
  if metric in (STEP, DRAWN, TOKENS):
    ys = [spent(rows, metric, step) for step in steps]
  else:
    ys = [
      float(row[metric]) if curves.is_number(row.get(metric)) else math.nan
      for row in curves.evaluations(rows)
    ]
  if amount in xs:
    return ys[xs.index(amount)]
  return float(np.interp(amount, xs, ys, left=math.nan, right=math.nan))


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
