import numpy as np
import pytest

from roc import curves, errors
from tests import runs


def test_lines_of_one_step_are_merged_and_sorted(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 2, "a": 1}\n\n{"step": 1}\n{"step": 2, "b": 3}\n')
  assert curves.read(path) == [{"step": 1}, {"step": 2, "a": 1, "b": 3}]


def test_half_written_last_line_is_passed_over(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1, "reward": 0.5}\n{"step": 2, "rew')
  assert curves.read(path) == [{"step": 1, "reward": 0.5}]


@pytest.mark.parametrize("line", ['{"step": 2, "rew', '{"reward": 1}', "[1]"])
def test_broken_line_is_named(tmp_path, line):
  path = tmp_path / "metrics.jsonl"
  path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
  with pytest.raises(errors.UserError, match="metrics.jsonl line 2"):
    curves.read(path)


def test_missing_and_empty_files_are_named(tmp_path):
  with pytest.raises(errors.UserError, match="is this the workdir"):
    curves.read(tmp_path / "metrics.jsonl")
  (tmp_path / "metrics.jsonl").write_text("")
  with pytest.raises(errors.UserError, match="has not finished a step"):
    curves.read(tmp_path / "metrics.jsonl")


def test_series_skips_what_is_no_finite_number():
  values = [0.5, None, float("nan"), True, "x", float("inf"), 2]
  rows = [{"step": s, "a": v} for s, v in enumerate(values)]
  assert curves.series(rows, "a") == ([0, 6], [0.5, 2.0])
  assert curves.series(rows, "absent") == ([], [])


def test_only_panels_with_numbers_are_drawn(tmp_path):
  runs.write_metrics(tmp_path)
  panels = curves.draw(curves.read(tmp_path / "metrics.jsonl"))
  text = "".join(panel.svg for panel in panels)
  assert "Held-out accuracy" in text
  assert "Failing calls in correct rollouts" in text
  assert "Entropy" not in text
  assert "Failing calls in wrong rollouts" not in text


def test_no_panels_for_a_run_that_measured_nothing():
  assert curves.draw([{"step": 1}]) == []


def test_time_split_says_where_the_median_step_goes():
  rows = [
    {
      "step": s,
      "time/generate": 2.0,
      "time/tools": 1.0,
      "time/score": 0.0,
      "time/update": 1.0 + s,
    }
    for s in range(3)
  ]
  assert curves.time_split(rows) == (
    "Median step 5.00 s: generate 40 %, tools 20 %, score 0 %, update 40 %."
  )
  assert curves.time_split([{"step": 0}]) == ""


def test_smoothing_leaves_short_series_alone():
  assert curves.smoothing(10) == 1
  widths = [curves.smoothing(n) for n in (15, 60, 600)]
  assert all(w % 2 for w in widths)
  assert np.all(np.diff(widths) > 0)
