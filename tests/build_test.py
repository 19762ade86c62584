"""Before any work starts: problems, whose a run is, and going back a step."""

import json

import pytest

from roc import build, config, errors, runlog
from roc.device import checkpoint
from roc.host import traces

LONG = "What is " + "1 + " * 60 + "1?"


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


def host_of(tmp_path, *questions, bindings=(), **changes):
  """The host side of a run whose problems, all of them, are in one file."""
  path = tmp_path / "problems.jsonl"
  rows = [{"prompt": q, "answer": i} for i, q in enumerate(questions)]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  c = config.default_config()
  c.host.gin_bindings = (
    "host.train_task = @train/FileTask",
    f"train/FileTask.path = '{path}'",
    *bindings,
  )
  c.update_from_flattened_dict(changes)
  cfg = config.resolve(c)
  return cfg, build.host_parts(cfg)


def test_every_prompt_is_looked_at_before_the_first_step(tmp_path, capsys):
  asked = ["What is 2 * 3?", LONG, "What is 4 * 5?", LONG + " "]
  cfg, host = host_of(tmp_path, *asked)
  with pytest.raises(errors.UserError) as e:
    build.check_lengths(cfg, host, [host.train_task, host.eval_task])
  n = len(host.chat.prompt_ids(LONG))
  room = cfg.sampling.cache_length - cfg.sampling.max_tokens
  text = str(e.value)
  assert f"2 of 4 prompts are too long: line 2 ({n} tokens); line 4 (" in text
  assert f"a prompt has room for {room} of" in text and "\n" not in text
  drop = ("train/FileTask.on_overlong = 'drop'",)
  cfg, host = host_of(tmp_path, *asked, bindings=drop)
  build.check_lengths(cfg, host, [host.train_task, host.eval_task])
  assert "2 of 4 prompts are too long" in capsys.readouterr().out
  drawn = {p.question for p in host.train_task.problems(0, 8)}
  assert drawn == {asked[0], asked[2]}
  # A longer cache has room for all.
  cfg, host = host_of(tmp_path, *asked, **{
    "sampling.cache_length": 2048, "train.buckets": (2048,),
  })  # fmt: skip
  build.check_lengths(cfg, host, [host.train_task])
  assert len(host.train_task) == 4


def test_other_problems_are_another_run(tmp_path):
  def claim(*questions):
    cfg, host = host_of(tmp_path, *questions)
    data = build.contents(host)
    build.claim(cfg, host, tmp_path / "run", "train", data).close()

  claim("What is 1 + 1?")
  claim("What is 1 + 2?")  # nothing was done yet
  (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
  claim("What is 1 + 2?")
  with pytest.raises(errors.UserError, match="contents of train_task"):
    claim("What is 1 + 3?")
