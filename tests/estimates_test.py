import math

import numpy as np
import pytest
from scipy import stats

from roc import curves, estimates


def test_interval_is_students():
  values = [0.7, 0.75, 0.9]
  mean, half = estimates.mean_interval(values)
  low, high = stats.t.interval(
    0.95, df=2, loc=np.mean(values), scale=stats.sem(values)
  )
  assert mean - half == pytest.approx(low, abs=1e-5)
  assert mean + half == pytest.approx(high, abs=1e-5)


@pytest.mark.parametrize("n", [2, 5, 20])
def test_quantiles(n):
  values = np.arange(n, dtype=float)
  half = stats.t.ppf(0.975, n - 1) * stats.sem(values)
  assert estimates.mean_interval(values)[1] == pytest.approx(half, rel=1e-4)


def test_one_value_has_no_interval_and_none_no_mean():
  assert estimates.mean_interval([0.5])[0] == 0.5
  assert math.isnan(estimates.mean_interval([0.5])[1])
  assert math.isnan(estimates.mean_interval([])[0])


def test_estimate_uses_common_steps_and_counts_missing_values():
  name = curves.ACCURACY
  runs_of_arm = [
    [
      {"step": 0, name: 0.5, "x": 1.0},
      {"step": 1, "rollouts_drawn": 10},
      {"step": 2, name: 0.7, "x": 2.0, "rollouts_drawn": 20},
      {"step": 4, name: 0.9},
    ],
    [
      {"step": 0, name: 0.5, "x": float("nan")},
      {"step": 2, name: 0.9, "x": 4.0, "rollouts_drawn": 40},
    ],
  ]
  got = estimates.estimate(runs_of_arm, "x")
  assert got.steps.tolist() == [0, 2]
  assert got.spent["rollouts_drawn"].tolist() == [0.0, 30.0]
  assert got.spent["step"].tolist() == [0.0, 2.0]
  assert got.mean.tolist() == [1.0, 3.0]
  assert got.n.tolist() == [1, 2]


def test_value_at_an_amount_between_two_evaluations():
  name = curves.ACCURACY
  rows = [
    {"step": 0, name: 0.5},
    {"step": 1, "tokens_sampled": 100, "rollouts_drawn": 8},
    {"step": 2, name: 0.7, "tokens_sampled": 300, "rollouts_drawn": 16},
    {"step": 4, name: 0.8, "tokens_sampled": 500, "rollouts_drawn": 32},
  ]
  at = lambda metric, amount: estimates.value_at(
    rows, metric, "tokens_sampled", amount
  )
  assert at(name, 300) == 0.7
  assert at(name, 150) == pytest.approx(0.6)
  assert at(name, 400) == pytest.approx(0.75)
  assert at("rollouts_drawn", 400) == 24
  assert at("step", 150) == 1
  assert math.isnan(at(name, 501))
  assert math.isnan(at("absent", 150))
