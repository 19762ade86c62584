"""Training from saved rollouts: which, in which order, and what is refused."""

import dataclasses
import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from experiments import quickstart
from roc import (
  build,
  cli,
  config,
  errors,
  layout,
  main,
  progress,
  replay,
  rollout,
  runlog,
  train,
  updates,
)
from roc import sft as sft_lib
from roc.device import checkpoint
from roc.host import episode as episode_lib
from roc.host import traces

ROOT = pathlib.Path(__file__).parents[1]
NEEDS = replay.Needs(
  n_drawn=2,
  vocab_size=100,
  max_length=12,
  max_calls=2,
  temperature=1.0,
)
Role = layout.Role


def episode(step, place, rollout_id, **changes):
  """A rollout of 3 + 5 tokens with a call and an answer."""
  made = episode_lib.Episode(
    task_id=f"t{place}",
    place=place,
    question="What is 2 * 3?",
    gold="6",
    group_index=9,
    rollout_id=rollout_id,
    step=step,
    temperature=1.0,
    n_turns=2,
    answers=["6"],
    tool_records=[
      episode_lib.ToolRecord(layout.ToolStatus.OK, "python", "print(6)", "6")
    ],
    stop_reason=layout.StopReason.ANSWERED,
    outcome=layout.Outcome(rollout_id % 2),
    reward=float(rollout_id % 2),
    kept=True,
    advantage=7.0,
    p_err=0.5,
    p_format=0.5,
    p_total=1.0,
    why="kept: because",
  )
  made.token_ids = [5, 6, 7, *range(20 + rollout_id, 25 + rollout_id)]
  made.roles = [Role.PROMPT] * 3 + [Role.MODEL] * 5
  made.logprobs = [0.0] * 3 + [-0.5 - 0.25 * i for i in range(5)]
  return dataclasses.replace(made, **changes)


def write(directory, **files):
  """Writes `name=[episode, ...]` as name.jsonl."""
  directory.mkdir(exist_ok=True)
  for name, episodes in files.items():
    text = "".join(e.to_json() + "\n" for e in episodes)
    (directory / f"{name}.jsonl").write_text(text)
  return directory


def tasks(groups):
  return [g[0].task_id for g in groups]


# --------------------------------------------------------------------- order


def test_groups_come_in_the_order_of_files_and_lines(tmp_path):
  pair = lambda step, task: [episode(step, task, o) for o in (0, 1)]
  write(
    tmp_path,
    b=[*pair(1, 8), *pair(1, 2)],
    # A group may be scattered over files; it counts where it starts.
    a=[*pair(2, 5), episode(9, 4, 1)],
    c=[episode(9, 4, 0)],
  )
  (tmp_path / "a.unfinished").write_text("half a li")
  saved = replay.Replay(tmp_path, NEEDS)
  order = ["t5", "t4", "t8", "t2"]
  assert len(saved) == 4 and tasks(saved.groups(0, 4, 1)) == order
  again = saved.groups(2, 5, step=7)
  assert tasks(again) == [*order[2:], *order[:3]]
  # A group that comes twice is another one each time.
  assert [(e.step, e.place) for g in again for e in g[:1]] == [
    (7, place) for place in range(2, 7)
  ]
  (group,) = saved.groups(401, 1, 2)
  assert [e.rollout_id for e in group] == [0, 1]


def test_the_first_rollouts_are_taken_and_earlier_decisions_forgotten(tmp_path):
  write(tmp_path, a=[episode(1, 3, o) for o in (11, 4, 0, 7)])
  (_, group) = replay.Replay(tmp_path, NEEDS).groups(0, 2, 1)
  assert [e.token_ids[3] for e in group] == [20, 24]  # rollouts 0 and 4
  for place, e in enumerate(group):
    assert (e.group_index, e.rollout_id) == (1, place)
    assert e.kept is e.advantage is e.p_err is e.p_format is e.p_total is None
    assert e.why == "" and e.reward == e.outcome == 0
    assert e.logprobs == episode(1, 3, 0).logprobs


def test_rollouts_of_evaluations_are_passed_over(tmp_path):
  held_out = [episode(1, i, 0, drawn_by="evaluate") for i in range(3)]
  write(tmp_path, a=held_out, b=[episode(1, 1, o) for o in (0, 1)])
  saved = replay.Replay(tmp_path, NEEDS)
  assert tasks(saved.groups(0, 1, 1)) == ["t1"] and len(saved) == 1
  assert "3 rollouts of evaluations passed over" in saved.about(1, 1)
  (tmp_path / "b.jsonl").unlink()
  with pytest.raises(errors.UserError, match="no rollout to train on .3 of ev"):
    replay.Replay(tmp_path, NEEDS)


def test_it_says_when_it_starts_over(tmp_path):
  write(tmp_path, a=[episode(1, i, o) for i in range(5) for o in (0, 1)])
  saved = replay.Replay(tmp_path, NEEDS)
  assert "start over" not in saved.about(n_steps=1, n_prompts=5)
  assert "start over from the first in step 3" in saved.about(3, 2)
  assert "start over from the first in step 1" in saved.about(1, 6)


def test_identity_is_the_contents(tmp_path):
  pair = [episode(1, 1, o) for o in (0, 1)]
  one = replay.Replay(write(tmp_path / "a", x=pair), NEEDS)
  same = replay.Replay(write(tmp_path / "b", x=pair), NEEDS)
  more = write(tmp_path / "c", x=pair, y=[episode(2, 1, o) for o in (0, 1)])
  assert one.identity == same.identity
  assert one.identity != replay.Replay(more, NEEDS).identity


# ------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
  "changes, text",
  [
    (
      {"stop_reason": None},
      "not ended .stop_reason is null.; give a copy without its group",
    ),
    ({"token_ids": [5, 6, 7, 8, 9, 100, 1, 2]}, "id 100 is outside .* of 100;"),
    ({"token_ids": [5, 6, 7, 8, 9, -1, 1, 2]}, "token id -1 is outside"),
    (
      {"token_ids": [1] * 13, "roles": [1] * 13, "logprobs": [0.0] * 13},
      "has 13 tokens and .*buckets is 12; add a longer",
    ),
    ({"token_ids": [], "roles": [], "logprobs": []}, "holds no token; mend"),
    ({"roles": [0] * 8}, "a role is not one of"),
    ({"logprobs": [math.nan] * 8}, "not a finite number; mend that line"),
    ({"reward": math.inf}, "not a finite number"),
    (
      {"logprobs": [0.0] * 3 + [-1.0, 0.25, -1.0, -1.0, -1.0]},
      "0.25 is not the log of a probability; mend",
    ),
    (
      {"logprobs": [0.0, -0.5, 0.0] + [-1.0] * 5},
      "the model did not draw has a log-prob; mend",
    ),
    ({"logprobs": [0.0] * 8}, "all log-probs are 0, so they were not recorded"),
    (
      {"temperature": 0.7},
      "drawn at temperature 0.7 and config.sampling.temperature is 1,",
    ),
    ({"temperature": None}, "does not say at which temperature it was drawn"),
    ({"place": 2**31}, "place 2147483648 is out of range"),
    (
      {"tool_records": episode(1, 1, 0).tool_records * 3},
      "has 3 tool calls and config.sampling.max_calls is 2; raise",
    ),
    ({"rollout_id": 0}, r"place 1, rollout 0 is also .*a.jsonl line 1; give"),
    (
      {"place": 2},
      "step 1, place 1 has 1 of the 2 rollouts that .*n_drawn asks for; low",
    ),
  ],
)
def test_rollouts_that_cannot_be_trained_on(tmp_path, changes, text):
  write(
    tmp_path,
    a=[episode(1, 1, 0), dataclasses.replace(episode(1, 1, 1), **changes)],
  )
  with pytest.raises(errors.UserError, match=text) as e:
    replay.Replay(tmp_path, NEEDS)
  assert "\n" not in str(e.value)
  is_of_a_group = "asks for" in str(e.value)
  assert ("a.jsonl:" if is_of_a_group else "a.jsonl line 2:") in str(e.value)


@pytest.mark.parametrize(
  "line, text",
  [
    ('{"step": 3}', "line 2 is no rollout .field 'task_id' is missing.; mend"),
    ('{"step":', "line 2 is no rollout .not JSON"),
    ("[]", "line 2 is no rollout .expected a JSON object"),
    (b"\xff", "line 2 is no rollout .it is not UTF-8"),
  ],
)
def test_lines_that_are_no_rollouts(tmp_path, line, text):
  path = write(tmp_path, a=[episode(1, 1, 0)]) / "a.jsonl"
  line = line if isinstance(line, bytes) else line.encode()
  path.write_bytes(path.read_bytes() + line + b"\n")
  with pytest.raises(errors.UserError, match=text) as e:
    replay.Replay(tmp_path, NEEDS)
  assert "\n" not in str(e.value)


def test_a_file_of_something_else_is_not_to_be_mended(tmp_path):
  folder = write(tmp_path / "run", a=[episode(1, 1, o) for o in (0, 1)])
  (folder / "metrics.jsonl").write_text('{"step": 0, "reward": 1.0}\n')
  with pytest.raises(errors.UserError, match="metrics.jsonl is no file of ro"):
    replay.Replay(folder, NEEDS)
  (folder / "run.json").write_text("{}")
  with pytest.raises(errors.UserError) as e:
    replay.Replay(folder, NEEDS)
  assert "delete" not in str(e.value)
  assert f"is the directory of a run; give that of its rollouts, {folder}" in (
    str(e.value)
  )


def test_directories_without_rollouts(tmp_path):
  for path in (tmp_path / "nowhere", tmp_path):
    with pytest.raises(errors.UserError, match="is no dir|holds no .*jsonl fi"):
      replay.Replay(path, NEEDS)


def test_a_file_that_changes_meanwhile(tmp_path):
  write(tmp_path, a=[episode(1, 1, o) for o in (0, 1)])
  saved = replay.Replay(tmp_path, NEEDS)
  path = tmp_path / "a.jsonl"
  path.write_text(path.read_text()[10:])
  with pytest.raises(errors.UserError, match="line 1 has changed since"):
    saved.groups(0, 1, 1)


# ----------------------------------------------------------------- the flag


def replay_of(*argv, command="train"):
  spec = main.COMMANDS[command]
  argv = ["--config=experiments/quickstart.py:tiny", *argv]
  cfg = cli.parse(command, argv, spec.config, spec.aliases)[1]
  return cfg.train.replay


def test_the_flag_stands_for_the_setting(capsys):
  assert replay_of() == ""
  for argv in (["--replay=a b"], ["--replay", "a b"], ["-replay=a b"]):
    assert replay_of(*argv) == "a b"
  assert replay_of("--replay=x", "--config.train.replay=y") == "y"
  for argv in (["--replay"], ["--replay", "--dry_run"]):
    with pytest.raises(errors.UserError, match="--replay=DIRECTORY"):
      replay_of(*argv)
  for command in ("sft", "evaluate"):
    with pytest.raises(errors.UserError, match="no flag --replay"):
      replay_of("--replay=x", command=command)
  argv = ["--config=experiments/quickstart.py:tiny", "--dry_run", "--replay=x"]
  assert main.main(["train", *argv]) == 0
  assert re.search("^config.train.replay = 'x' +# ", capsys.readouterr().out, 8)
  assert main.main(["train", "--help"]) == 0
  assert "--replay=DIRECTORY" in capsys.readouterr().out


def test_a_run_without_it_is_the_run_that_it_was():
  cfg = config.Config()
  assert config.identity(cfg)["train.replay"] == ""
  there = dataclasses.replace(cfg.train, replay="a/b/")
  cfg = dataclasses.replace(cfg, train=there)
  assert config.identity(cfg)["train.replay"] == "a/b"


# ------------------------------------------------------------------ training


def settings(**changes):
  """The tiny quickstart, with a gradient in every group."""
  c = quickstart.get_config("tiny")
  values = {
    "sft.steps": 120,
    "sft.n_demos": 64,
    "sft.lr": 5e-3,
    "sft.warmup": 10,
    "train.steps": 3,
    "filter.n_drawn": 4,
    "filter.n_kept": 2,
    "filter.drop_equal_reward": False,
    "filter.overlong": "soft",
    "filter.overlong_buffer": 60,
    "eval.every": 0,
    "log.progress": False,
    "log.tensorboard": False,
    **changes,
  }
  for name, value in values.items():
    section, _, key = name.rpartition(".")
    setattr(getattr(c, section) if section else c, key, value)
  return config.resolve(c)


class NoTools:
  """Stands for a toolbox that nothing is asked of."""

  sandbox = None

  def stats(self):
    names = ("p50_ms", "p99_ms", "wait_p50_ms", "wait_p99_ms", "restarts")
    return dict.fromkeys(names, 0)


@pytest.mark.slow
def test_a_step_needs_neither_engine_nor_sandbox(tmp_path, monkeypatch):
  saved = [episode(7, i, o) for i in range(3) for o in range(6)]
  write(tmp_path, a=saved)
  cfg = settings(**{"train.replay": str(tmp_path), "model.n_layers": 1})
  host = build.host_parts(cfg)
  policy = build.make_policy(cfg, host)
  learner = updates.make_learner(cfg, policy)
  trainer = train.Trainer(
    cfg, host, NoTools(), policy, learner, train.read_replay(cfg, policy)
  )
  monkeypatch.delattr(rollout.AgentLoop, "run")
  bar = progress.Progress("train", 3, is_shown=False)
  state = learner.init(jax.random.key(0))
  for step in (1, 2):
    state, row, groups = trainer.step(state, step, bar)
    assert all(math.isfinite(v) for v in row.values())
    assert row["time/generate"] == row["time/tools"] == 0
    assert row["accuracy"] == 0.5 and row["grad_norm"] > 0
    assert row["mismatch_kl"] > 0.01  # nobody drew these tokens
    assert row["rollouts_drawn"] == 8 * step
    assert row["tokens_sampled"] == 5 * 8 * step
    assert [len(g) for g in groups] == [4, 4]
    assert {e.why for g in groups for e in g} & {"kept: because"} == set()
  # Groups 2 and, from the start again, 0.
  assert tasks(groups) == ["t2", "t0"]
  assert [(g[0].step, g[0].place) for g in groups] == [(2, 2), (2, 3)]
  assert trainer.cursor.next_problem == 4


def rows_of(workdir):
  """Metrics without what the clock and the sandbox's counters say."""
  return [
    {k: v for k, v in row.items() if not k.startswith(("time/", "sandbox/"))}
    for row in runlog.read_metrics(workdir / runlog.METRICS)
  ]


def final_state(cfg, workdir):
  policy = build.make_policy(cfg, build.host_parts(cfg))
  abstract = updates.make_learner(cfg, policy).abstract_state
  return checkpoint.Checkpoints(workdir / "checkpoints").restore(abstract)


def assert_same_run(cfg, workdir, other):
  assert rows_of(workdir) == rows_of(other)
  a, b = final_state(cfg, workdir), final_state(cfg, other)
  assert a.step == b.step and a.extra == b.extra
  for x, y in zip(
    jax.tree.leaves(a.state), jax.tree.leaves(b.state), strict=True
  ):
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
  for step in range(1, a.step + 1):
    assert (
      traces.path_of(workdir, step).read_bytes()
      == traces.path_of(other, step).read_bytes()
    )


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
  """A run that draws its rollouts, from a policy that calls the tool."""
  path = tmp_path_factory.mktemp("drawn")
  sft_lib.run(settings(), path / "sft")
  train.run(settings(init_from=str(path / "sft")), path / "train")
  return path


@pytest.mark.slow
def test_replay_of_a_run_is_that_run(ran, tmp_path):
  """What was drawn is all that sampling gives to an update."""
  cfg = settings(
    **{
      "init_from": str(ran / "sft"),
      "train.replay": str(ran / "train" / "rollouts"),
    }
  )
  train.run(cfg, tmp_path / "again")
  assert_same_run(cfg, tmp_path / "again", ran / "train")
  rows = runlog.read_metrics(tmp_path / "again" / runlog.METRICS)
  assert [row["time/generate"] for row in rows[1:]] == [0, 0, 0]


@pytest.mark.slow
def test_a_collection_is_replayed(ran, tmp_path, capsys):
  argv = ["rollout", f"--workdir={ran / 'sft'}", "--config.collect.task=train"]
  argv += ["--config.collect.n_problems=3", "--config.collect.samples=6"]
  assert main.main(argv) == 0
  capsys.readouterr()
  folder = ran / "sft" / "rollouts" / "collect_train"
  cfg = settings(**{"init_from": str(ran / "sft"), "train.replay": str(folder)})
  train.run(cfg, tmp_path / "run")
  out = capsys.readouterr().out
  assert "replay: 3 groups of 4 rollouts from 1 file in" in out
  assert out.count("start over from the first in step 2") == 1
  rows = rows_of(tmp_path / "run")
  # The first step's policy is the one that drew; the third has moved.
  assert rows[1]["mismatch_kl"] < 1e-6 < rows[3]["mismatch_kl"]
  drawn = [
    [e.task_index for e in episode_lib.read_episodes(path)][::4]
    for path in (traces.path_of(tmp_path / "run", s) for s in (1, 2, 3))
  ]
  assert drawn == [[0, 1], [2, 0], [1, 2]]


@pytest.mark.slow
def test_other_contents_are_another_run(ran, tmp_path):
  folder = write(tmp_path / "saved", a=[episode(1, 1, o) for o in range(4)])
  cfg = settings(**{"train.replay": str(folder), "train.steps": 1})
  train.run(cfg, tmp_path / "run")
  write(folder, b=[episode(2, 1, o) for o in range(4)])
  with pytest.raises(errors.UserError, match="contents of train.replay"):
    train.run(cfg, tmp_path / "run")


@pytest.mark.slow
def test_killed_and_started_again(ran, tmp_path):
  env = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "xla"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }
  cfg = settings(
    **{
      "init_from": str(ran / "sft"),
      "train.replay": str(ran / "train" / "rollouts"),
      "train.steps": 8,
      "checkpoint.every": 2,
      "eval.head": False,
    }
  )
  # The command line that makes this configuration.
  defaults = quickstart.get_config("tiny")
  changed = [
    f"--config.{key}={value}"
    for key, value in config.flatten(cfg).items()
    if value != config.flatten(config.resolve(defaults))[key]
  ]

  def start(name):
    return subprocess.Popen(
      [
        *(sys.executable, "-m", "roc.main", "train", *changed),
        "--config=experiments/quickstart.py:tiny",
        f"--workdir={tmp_path / name}",
      ],
      cwd=ROOT,
      env=env,
      stdout=subprocess.DEVNULL,
    )

  assert start("whole").wait(300) == 0
  metrics, n_kills = tmp_path / "killed" / runlog.METRICS, 0
  for n_rows in (3, 6):
    process = start("killed")
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < n_rows:
      assert process.poll() is None
      time.sleep(0.002)
    process.kill()
    n_kills += process.wait() == -signal.SIGKILL
  assert n_kills == 2
  assert start("killed").wait(300) == 0
  assert_same_run(cfg, tmp_path / "killed", tmp_path / "whole")
  lines = traces.path_of(tmp_path / "whole", 4).read_text().splitlines()
  # After 6 groups the order starts over: step 4 has the groups of step 1.
  first = traces.path_of(tmp_path / "whole", 1).read_text().splitlines()
  for line, again in zip(first, lines, strict=True):
    was, now = json.loads(line), json.loads(again)
    assert was["token_ids"] == now["token_ids"]
    assert (now["step"], now["place"]) == (4, was["place"] + 6)
