"""What is set aside when a run goes back to an older step."""

import json

from roc import build, runlog
from roc.device import checkpoint
from roc.host import traces


def test_going_back_loses_nothing(tmp_path, capsys):
  checkpoints = checkpoint.Checkpoints(tmp_path / "checkpoints")
  for step in (2, 4):
    checkpoints.save(step, {}, {})
  rows = "".join(json.dumps({"step": i}) + "\n" for i in range(5))
  (tmp_path / runlog.METRICS).write_text(rows)
  for step in range(1, 5):
    path = traces.path_of(tmp_path, step)
    path.parent.mkdir(exist_ok=True)
    path.write_text(str(step))
  traces.evaluation_path(tmp_path, 4).write_text("evaluation")
  other = tmp_path / "rollouts" / "mine_000009.jsonl"
  other.write_text("")

  build.go_back(checkpoints, tmp_path, 4)  # nothing came after it
  assert not capsys.readouterr().out and not list(tmp_path.glob("set_aside*"))
  build.go_back(checkpoints, tmp_path, 2)
  aside = tmp_path / "set_aside_0"
  assert f"{aside}; later checkpoints (of steps: 4)" in capsys.readouterr().out
  assert checkpoints.steps() == [2]
  assert checkpoint.Checkpoints(aside / "checkpoints").steps() == [4]
  assert (aside / runlog.METRICS).read_text() == rows
  left = {path.name for path in (tmp_path / "rollouts").iterdir()}
  assert left == {"step_000001.jsonl", "step_000002.jsonl", other.name}
  moved = {path.name for path in (aside / "rollouts").iterdir()}
  assert moved == {
    "step_000003.jsonl",
    "step_000004.jsonl",
    "eval_000004.jsonl",
  }
  # The log keeps the rows up to the step, as on any restart.
  with runlog.MetricsLog(tmp_path, restored_step=2, tensorboard=False):
    pass
  assert [
    r["step"] for r in runlog.read_metrics(tmp_path / runlog.METRICS)
  ] == [
    0,
    1,
    2,
  ]
  build.go_back(checkpoints, tmp_path, 1)
  assert (tmp_path / "set_aside_1" / "checkpoints" / "step_00000002").is_dir()
