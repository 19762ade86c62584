"""`rollout`: what is written, what is drawn again, what is refused."""

import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import quickstart
from roc import (
  build,
  collect,
  config,
  errors,
  layout,
  main,
  records,
  rollout,
  runlog,
)
from roc import sft as sft_lib
from roc.device import checkpoint
from roc.host import episode as episode_lib

ROOT = pathlib.Path(__file__).parents[1]
NAMES = [f"eval_{s}.jsonl" for s in ("000001-000002", "000003-000003")]
COLLECT = {
  "collect.first": 1,
  "collect.n_problems": 3,
  "collect.samples": 2,
  "collect.shard": 2,
}


def settings(**changes):
  """A model and a budget so small that a second is a lot."""
  c = quickstart.get_config("tiny")
  values = {
    "model.n_layers": 1,
    "sampling.max_tokens": 16,
    "log.progress": False,
    **COLLECT,
    **changes,
  }
  for name, value in values.items():
    section, _, key = name.rpartition(".")
    setattr(getattr(c, section) if section else c, key, value)
  return config.resolve(c)


def save_policy(cfg, workdir, step=3, seed=0):
  """What a run leaves for `rollout`: a record and a checkpoint."""
  policy = build.make_policy(cfg, build.host_parts(cfg))
  rng = np.random.default_rng(seed)
  draw = lambda x: jnp.asarray(0.1 * rng.standard_normal(x.shape), x.dtype)
  state = {"params": jax.tree.map(draw, policy.abstract_params)}
  checkpoint.Checkpoints(workdir / "checkpoints").save(step, state, {})
  (workdir / "config.json").write_text(config.to_json(cfg))


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
  path = tmp_path_factory.mktemp("policy")
  save_policy(settings(), path)
  return path


@pytest.fixture(scope="module")
def drawn(tmp_path_factory, policy):
  """A whole collection, drawn while a training run holds the workdir."""
  path = tmp_path_factory.mktemp("drawn") / "run"
  shutil.copytree(policy, path)
  training = runlog.claim(
    path.parent, "train", config_json="", gin_text="", identity={}
  )
  with training:
    collect.run(settings(), path)
  return path / "rollouts" / "collect_eval"


@pytest.fixture
def workdir(tmp_path, policy):
  """A workdir with a checkpoint and nothing collected."""
  shutil.copytree(policy, tmp_path / "run")
  return tmp_path / "run"


@pytest.fixture
def finished(tmp_path, drawn):
  """A workdir of its own with everything collected."""
  shutil.copytree(drawn.parents[1], tmp_path / "run")
  return tmp_path / "run"


@pytest.fixture
def nothing_starts(monkeypatch):
  def refuse(*_):
    raise AssertionError("a sandbox was started")

  monkeypatch.setattr(build, "started_sandbox", refuse)


def files_of(folder):
  return {p.name: p.read_bytes() for p in folder.glob("*.jsonl")}


# -------------------------------------------------------------------- files


def test_each_file_holds_the_rollouts_of_its_problems(drawn):
  assert sorted(files_of(drawn)) == NAMES
  seen = []
  for name in NAMES:
    for e in episode_lib.read_episodes(drawn / name):
      assert e.stop_reason is not None and e.n_model_tokens > 0
      assert e.step == settings().collect.step and e.kept is None
      seen.append((e.place, e.rollout_id))
  assert seen == [(i, o) for i in (1, 2, 3) for o in (0, 1)]
  line = json.loads((drawn / NAMES[0]).read_text().splitlines()[0])
  roles = [message["role"] for message in line["messages"]]
  assert roles[:2] == ["prompt", "model"]
  # Nothing is left of the way there.
  assert {p.name for p in drawn.iterdir()} == {
    *NAMES,
    ".lock",
    "collect.json",
  }


def test_killed_and_started_again(drawn, workdir, monkeypatch):
  real, calls = rollout.AgentLoop.run, []

  def dies(*args, **kwargs):
    calls.append(1)
    if len(calls) > 1:
      raise KeyboardInterrupt
    return real(*args, **kwargs)

  folder = workdir / "rollouts" / "collect_eval"
  with monkeypatch.context() as patch:
    patch.setattr(rollout.AgentLoop, "run", dies)
    with pytest.raises(KeyboardInterrupt):
      collect.run(settings(), workdir)
  assert sorted(files_of(folder)) == NAMES[:1]
  before = (folder / NAMES[0]).stat()
  # The file that was being written.
  (folder / "eval_000003-000003.unfinished").write_text('{"task_id": "ev')
  collect.run(settings(), workdir)
  assert files_of(folder) == files_of(drawn)
  assert list(folder.glob("*.unfinished")) == []
  # What was whole is not written again.
  assert (folder / NAMES[0]).stat().st_mtime_ns == before.st_mtime_ns


def test_nothing_is_left_to_draw(finished, nothing_starts, capsys):
  collect.run(settings(), finished)
  out = capsys.readouterr().out
  assert "2 of 2 files are there already" in out
  assert "accuracy" in out and "tokens/s" not in out


def test_settings_that_change_no_rollout_may_change(finished, nothing_starts):
  folder = finished / "rollouts" / "collect_eval"
  before = files_of(folder)
  changes = {"train.lr": 0.5, "eval.samples": 3, "log.tensorboard": False}
  collect.run(settings(**changes), finished)
  assert files_of(folder) == before


@pytest.mark.slow
def test_a_collection_grows(finished, drawn):
  cfg = settings(**{"collect.first": 4, "collect.n_problems": 1})
  collect.run(cfg, finished)
  files = files_of(finished / "rollouts" / "collect_eval")
  assert sorted(files) == [*NAMES, "eval_000004-000004.jsonl"]
  assert {name: files[name] for name in NAMES} == files_of(drawn)


def test_the_run_itself_is_only_read(finished, nothing_starts):
  record = finished / "run.json"
  record.write_text('{"identity": {"seed": 0}}')
  assert main.main(["rollout", f"--workdir={finished}"]) == 0
  assert record.read_text() == '{"identity": {"seed": 0}}'


@pytest.mark.slow
def test_another_step_gives_other_rollouts(workdir, drawn):
  collect.run(settings(**{"collect.step": 5}), workdir)
  other = workdir / "rollouts" / "collect_eval"
  for name in NAMES:
    pairs = zip(
      episode_lib.read_episodes(drawn / name),
      episode_lib.read_episodes(other / name),
      strict=True,
    )
    for a, b in pairs:
      assert a.question == b.question and a.token_ids != b.token_ids


@pytest.mark.slow
def test_training_problems_and_a_file_of_problems(workdir, tmp_path):
  collect.run(settings(**{"collect.task": "train"}), workdir)
  (first, *_) = episode_lib.read_episodes(
    workdir / "rollouts" / "collect_train" / "train_000001-000002.jsonl"
  )
  assert first.task_id == "train-0-1"
  tasks = tmp_path / "tasks.jsonl"
  rows = [{"prompt": f"What is 2 + {i}?", "answer": 2 + i} for i in range(4)]
  tasks.write_text("".join(json.dumps(row) + "\n" for row in rows))
  argv = [
    *("rollout", f"--workdir={workdir}"),
    "--config.host.gin_bindings=host.eval_task = @eval/FileTask",
    f"--config.host.gin_bindings=eval/FileTask.path = '{tasks}'",
  ]
  assert main.main(argv) == 0
  folder = workdir / "rollouts" / "collect_eval"
  (first, *_) = episode_lib.read_episodes(folder / NAMES[0])
  assert (first.question, first.gold) == ("What is 2 + 1?", "3")


# ------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
  "changes, text",
  [
    (
      {"collect.samples": 3},
      r"collect.samples \(2 -> 3\) differ; give the old",
    ),
    ({"seed": 4}, r"seed \(0 -> 4\) differ"),
    ({"sampling.max_turns": 2}, r"sampling.max_turns \(6 -> 2\) differ"),
    ({"collect.step": 9}, "collect.step .* move .*collect_eval away"),
    (
      {"host.gin_bindings": ("wall_s = 9.0",)},
      r"gin wall_s \(4.0 -> 9.0\) differ",
    ),
    ({"collect.shard": 1}, "000001-000002.jsonl holds some .* 1 to 1 already"),
    ({"collect.first": 0}, "000001-000002.jsonl holds some .* 0 to 1 already"),
  ],
)
def test_files_of_other_settings(finished, changes, text):
  with pytest.raises(errors.UserError, match=text) as e:
    collect.run(settings(**changes), finished)
  assert "\n" not in str(e.value)


def test_files_of_another_checkpoint(finished):
  save_policy(settings(), finished, step=4, seed=1)
  text = r"checkpoint \(step 3, \w{8} -> step 4, \w{8}\) differ"
  with pytest.raises(errors.UserError, match=text):
    collect.run(settings(), finished)


def test_files_without_their_record(finished):
  record = finished / "rollouts" / "collect_eval" / "collect.json"
  for damage in (lambda: record.write_text("[1"), record.unlink):
    damage()
    with pytest.raises(errors.UserError, match="cannot tell what drew .*move"):
      collect.run(settings(), finished)


def test_damaged_and_foreign_files(finished):
  path = finished / "rollouts" / "collect_eval" / NAMES[0]
  whole = path.read_text()
  path.write_text(whole[:-40])
  with pytest.raises(errors.UserError, match="line 4: .*move that file away"):
    collect.run(settings(), finished)
  path.write_text(whole.replace("heldout-", "other-"))
  with pytest.raises(errors.UserError, match="does not hold .* move"):
    collect.run(settings(), finished)


def test_two_at_once(workdir):
  folder = workdir / "rollouts" / "collect_eval"
  lock = records.lock(folder)
  try:
    with pytest.raises(
      errors.UserError, match=f"in use by process {os.getpid()}; wait for it"
    ):
      collect.run(settings(), workdir)
  finally:
    os.close(lock)


def fails(capsys, *argv):
  """Returns the one sentence that a command line is refused with."""
  assert main.main(["rollout", *argv]) == 2
  err = capsys.readouterr().err
  assert err.startswith("error: ") and err.count("\n") == 1
  return err


def test_mistaken_command_lines(workdir, tmp_path, capsys):
  here = f"--workdir={workdir}"
  err = fails(capsys, here, "--config.collect.task=trian")
  assert (
    "collect.task must be one of eval, train" in err and "mean train" in err
  )
  assert "at least 1" in fails(capsys, here, "--config.collect.samples=0")
  assert "less than 2**31" in fails(
    capsys, here, f"--config.collect.step={2**31}"
  )
  assert "give the --workdir of a run" in fails(capsys)
  assert "no flag --replay" in fails(capsys, here, "--replay=x")

  tasks = tmp_path / "tasks.jsonl"
  tasks.write_text('{"prompt": "What is 2 + 2?", "answer": 4}\n')
  err = fails(
    capsys,
    here,
    "--config.host.gin_bindings=host.eval_task = @eval/FileTask",
    f"--config.host.gin_bindings=eval/FileTask.path = '{tasks}'",
  )
  assert "is 4, and the eval task ends after 1; lower" in err

  (workdir / "rollouts").write_text("in the way")
  assert "cannot write to directory" in fails(capsys, here)
  shutil.rmtree(workdir / "checkpoints")
  assert "no checkpoint under" in fails(capsys, here)


# --------------------------------------------------------------------- table


def episode(outcome, statuses=(), n_tokens=4):
  made = episode_lib.Episode(outcome=outcome)
  made.roles = [layout.Role.PROMPT] + [layout.Role.MODEL] * n_tokens
  made.tool_records = [
    episode_lib.ToolRecord(s, "python", "", "") for s in statuses
  ]
  return made


def test_table_by_hand():
  status, outcome = layout.ToolStatus, layout.Outcome
  tally = collect.Tally()
  assert collect.quality(tally) == {}
  tally.add(
    [
      episode(outcome.CORRECT, [status.OK, status.ERROR], n_tokens=9),
      episode(outcome.WRONG, [status.TIMEOUT, status.OK, status.INFRA]),
      episode(outcome.WRONG, n_tokens=2),
      episode(outcome.VOID, [status.INFRA]),
    ]
  )
  assert collect.quality(tally) == {
    "accuracy": "33.3%",
    "failing calls": "50.0% of 4",
    "mean tokens": "5.0",
    "void (the environment's fault)": "1",
  }
  spent = collect.Spent(wall=2.0, tools=0.5, tokens=3000)
  engine = {"slot_occupancy": 0.75, "compilations": 3.0, "new": 1.0}
  assert collect.speed(spent, engine) == {
    "tokens/s": "1,500",
    "slot use": "75.0%",
    "compilations": "3",
    "waiting for tools": "25.0% of the time",
  }


# ------------------------------------------------------------------- kill -9


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path):
  """Random kills of the real command; the tools are used for real."""
  env = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "xla"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }
  c = quickstart.get_config("tiny")
  c.sft.steps, c.sft.n_demos, c.sft.lr = 120, 64, 5e-3
  sft_lib.run(config.resolve(c), tmp_path / "whole")
  shutil.copytree(tmp_path / "whole", tmp_path / "killed")

  def start(name):
    return subprocess.Popen(
      [
        *(sys.executable, "-m", "roc.main", "rollout"),
        f"--workdir={tmp_path / name}",
        "--config.collect.n_problems=48",
        "--config.collect.shard=2",
      ],
      cwd=ROOT,
      env=env,
      stdout=subprocess.DEVNULL,
    )

  assert start("whole").wait(300) == 0
  draw, n_kills = random.Random(0), 0
  folder = tmp_path / "killed" / "rollouts" / "collect_eval"
  for _ in range(20):
    n_before = len(list(folder.glob("*.jsonl")))
    process = start("killed")
    # Mostly while it draws, at times while it starts.
    n_wanted = n_before + draw.choice((0, 1, 4))
    while len(list(folder.glob("*.jsonl"))) < n_wanted:
      if process.poll() is not None:
        break
      time.sleep(0.002)
    time.sleep(draw.random() * 0.2)
    process.kill()
    n_kills += process.wait() == -signal.SIGKILL
    if len(list(folder.glob("*.jsonl"))) == 24:
      break
  assert n_kills >= 5
  assert start("killed").wait(300) == 0
  whole = files_of(tmp_path / "whole" / "rollouts" / "collect_eval")
  assert len(whole) == 24 and files_of(folder) == whole
  calls = [
    e.n_judged_calls
    for path in sorted(folder.glob("*.jsonl"))
    for e in episode_lib.read_episodes(path)
  ]
  assert sum(calls) > len(calls) / 2
