import json

import pytest

from roc import curves, errors, report
from tests import runs


def _rows(*evaluations):
  names = (report.ACCURACY, report.FAILING, report.HEAD)
  return [
    {"step": 10 * i} | dict(zip(names, values, strict=True))
    for i, values in enumerate(evaluations)
  ]


def test_report_is_written_and_printed(tmp_path, capsys):
  runs.write_metrics(tmp_path)
  (tmp_path / "config.json").write_text(
    json.dumps(
      {
        "seed": 3,
        "filter": {"mode": "sort", "n_drawn": 16, "n_kept": 8},
        "host": {"gin_files": [report.QUICKSTART_GIN]},
      }
    )
  )
  runs.write_traces(tmp_path, 1, [runs.trace(0)])
  report.run(None, tmp_path)
  printed = capsys.readouterr().out
  assert "accuracy with the tool" in printed
  assert "met  failing calls in correct rollouts: 30.0 %" in printed
  assert printed.rstrip().endswith("report.html")
  page = (tmp_path / "report.html").read_text()
  assert "filter sort, 16 drawn, 8 kept · 20 steps" in page
  assert "5,120 rollouts drawn · 256,000 tokens sampled · seed 3" in page
  assert "Held-out accuracy" in page
  assert "57.0 % (47–66)" in page
  assert page.count("<details") == 1
  assert "://" not in page.replace("http://www.w3.org/", "")
  assert not (tmp_path / "report.html.part").exists()


def test_the_report_of_supervised_training_speaks_of_no_filter(tmp_path):
  rows = [{"step": s, "loss": 1 / s, "tokens_trained": 99 * s} for s in (1, 2)]
  text = "".join(json.dumps(row) + "\n" for row in rows)
  (tmp_path / "metrics.jsonl").write_text(text)
  config = {"seed": 3, "filter": {"mode": "sort", "n_drawn": 16, "n_kept": 8}}
  (tmp_path / "config.json").write_text(json.dumps(config))
  report.run(None, tmp_path)
  page = (tmp_path / "report.html").read_text()
  subtitle = "supervised training · 2 steps · 198 tokens, padding included"
  assert f"{subtitle} · seed 3" in page
  for word in ("filter", "sampled", "rollout", "advantage"):
    assert word not in page.split("</style>")[1], word


def test_what_a_model_or_tool_wrote_is_escaped(tmp_path):
  runs.write_metrics(tmp_path)
  evil = "<script>alert(1)</script>"
  line = runs.trace(0, question=evil, gold=evil, why=evil, answer=evil)
  line["messages"] = [
    {"role": role, "text": evil} for role in ("prompt", "model", "tool", evil)
  ]
  line["tool_records"] = [{"status": evil}]
  runs.write_traces(tmp_path, 1, [line])
  report.write(tmp_path)
  page = (tmp_path / "report.html").read_text()
  assert evil not in page
  assert page.count("&lt;script&gt;") >= 8


def test_missing_pieces_are_left_out(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n')
  _, table, targets, timing = report.write(tmp_path)
  assert (table.rows, targets, timing) == ([], [], "")
  page = (tmp_path / "report.html").read_text()
  assert "holds no trajectories" in page
  assert "Reward in training" in page


@pytest.mark.parametrize(
  "host", [None, "", {}, {"gin_files": None}, {"gin_files": ["other.gin"]}]
)
def test_goals_are_the_quickstart_s(tmp_path, host):
  runs.write_metrics(tmp_path, n_steps=20, every=10)
  (tmp_path / "config.json").write_text(json.dumps({"host": host}))
  _, table, targets, _ = report.write(tmp_path)
  assert table.rows and targets == []


def test_no_workdir_is_one_sentence(tmp_path):
  with pytest.raises(errors.UserError, match=r"no metrics.jsonl .*absent"):
    report.run(None, tmp_path / "absent")


def test_table_shows_before_early_and_last():
  rows = _rows((0.6, 0.3, 0.0), (0.7, 0.2, 0.0), (0.8, 0.1, 0.0), (0.9, 0, 1))
  table = report.headline_table(rows)
  assert table.columns == [
    "held-out problems",
    "before RL",
    "step 10",
    "last, step 30",
  ]
  assert table.rows[0] == [
    "accuracy with the tool",
    "60.0 %",
    "70.0 %",
    "90.0 %",
  ]
  for n in (1, 2):
    assert len(report.headline_table(rows[:n]).columns) == n + 1


@pytest.mark.parametrize(
  ("before", "after", "verdicts"),
  [
    ((0.60, 0.30, 0.0), (0.80, 0.10, 0.049), (True, True, True)),
    ((0.60, 0.30, 0.0), (0.70, 0.11, 0.05), (False, False, False)),
    ((0.90, 0.30, 0.0), (0.96, 0.0, 0.0), (True, True, True)),
    ((0.90, 0.0, 0.0), (0.96, 0.0, 0.0), (True, False, True)),
  ],
)
def test_targets(before, after, verdicts):
  targets = report.headline_targets(_rows(before, after))
  assert tuple(target.is_met for target in targets) == verdicts


def test_targets_need_two_evaluations_and_numbers():
  assert report.headline_targets(_rows((0.6, 0.3, 0.0))) == []
  nan = float("nan")
  targets = report.headline_targets(_rows((0.6, nan, nan), (0.9, 0.1, nan)))
  assert [t.name for t in targets] == ["accuracy with the tool"]


def test_interval_is_wilsons():
  assert report.wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
  assert report.wilson(0.0, 100) == pytest.approx((0.0, 0.0370), abs=1e-4)
  assert report.wilson(1.0, 100) == pytest.approx((0.9630, 1.0), abs=1e-4)


def test_evaluation_rows_are_those_with_an_accuracy(tmp_path):
  runs.write_metrics(tmp_path, n_steps=20, every=10)
  rows = curves.read(tmp_path / "metrics.jsonl")
  assert [row["step"] for row in curves.evaluations(rows)] == [0, 10, 20]


def test_interval_of_several_rollouts_a_problem_is_that_of_problems():
  row = {
    "step": 0,
    report.ACCURACY: 0.5,
    report.STDERR: 0.02,
    report.N_PROBLEMS: 100.0,
  }
  assert report.headline_table([row]).rows[0][1] == "50.0 % (40–60)"
  row["eval/heldout/avg@4"] = 0.5
  assert report.headline_table([row]).rows[0][1] == "50.0 % (46–54)"
