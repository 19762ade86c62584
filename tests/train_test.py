"""The road end to end at tiny size: supervised, RL, resumed, evaluated."""

import dataclasses
import json
import math
import pathlib
import shutil
import types

import jax
import jax.monitoring
import numpy as np
import pytest

from experiments import quickstart
from roc import (
  build,
  config,
  errors,
  evaluate,
  layout,
  main,
  runlog,
  sft,
  train,
  updates,
)
from roc.device import checkpoint
from roc.host import episode as episode_lib
from roc.host import traces
from roc.host.tasks import problem

STEPS = 3
SFT_STEPS = 120  # enough for calls of the tool, right and wrong ones
Status, Outcome = layout.ToolStatus, layout.Outcome


def settings(**changes):
  """The tiny quickstart, with a gradient in every group.

  At this size hardly any answer is right, so the rewards of a group differ by
  the length penalty.
  """
  c = quickstart.get_config("tiny")
  values = {
    "sft.steps": SFT_STEPS,
    "sft.n_demos": 64,
    "sft.lr": 5e-3,
    "sft.warmup": 10,
    "train.steps": STEPS,
    "filter.n_drawn": 8,
    "filter.n_kept": 4,
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


class Killed(BaseException):
  """Ends a run where a kill would."""


def stop_after(monkeypatch, cls, name, n):
  """Lets a method be called n times and then ends the run instead."""
  real, calls = getattr(cls, name), []

  def limited(*args, **kwargs):
    calls.append(1)
    if len(calls) > n:
      raise Killed
    return real(*args, **kwargs)

  monkeypatch.setattr(cls, name, limited)


@dataclasses.dataclass
class Ran:
  """A finished run and what was seen of it."""

  cfg: config.Config
  sft: pathlib.Path
  train: pathlib.Path
  compilations: list[int]  # by step, what lies before the first one included


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
  """Supervised training, then RL without interruption."""
  path = tmp_path_factory.mktemp("plain")
  cfg = settings()
  sft.run(cfg, path / "sft")
  cfg = settings(init_from=str(path / "sft"))
  counts = [0]

  def count(event, _, **kwargs):
    del kwargs
    counts[-1] += event == "/jax/core/compile/backend_compile_duration"

  real = train.Trainer.step

  def step(*args):
    out = real(*args)
    counts.append(0)
    return out

  jax.monitoring.register_event_duration_secs_listener(count)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(train.Trainer, "step", step)
    train.run(cfg, path / "train")
  jax.monitoring.unregister_event_duration_listener(count)
  return Ran(cfg, path / "sft", path / "train", counts)


def rows_of(workdir):
  """Metrics without what the clock says."""
  return [
    {k: v for k, v in row.items() if not k.startswith("time/")}
    for row in runlog.read_metrics(workdir / runlog.METRICS)
  ]


def final_state(cfg, workdir, program="train"):
  """The arrays of the newest checkpoint, and its cursor."""
  host = build.host_parts(cfg)
  policy = build.make_policy(cfg, host)
  learner = updates.make_learner(cfg, policy)
  abstract = learner.abstract_state
  if program == "sft":
    abstract = {"params": abstract.params}
  checkpoints = checkpoint.Checkpoints(workdir / "checkpoints")
  restored = checkpoints.restore(abstract, is_partial=program == "sft")
  assert restored is not None and restored.notes == []
  return restored


def assert_same_bits(a, b):
  assert a.step == b.step and a.extra == b.extra
  for x, y in zip(
    jax.tree.leaves(a.state), jax.tree.leaves(b.state), strict=True
  ):
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def read_traces(workdir, step):
  return list(episode_lib.read_episodes(traces.path_of(workdir, step)))


# ------------------------------------------------------------------ whole run


def test_supervised_loss_falls(ran):
  losses = [row["loss"] for row in rows_of(ran.sft)]
  assert len(losses) == SFT_STEPS
  assert losses[0] > 5.0 and np.mean(losses[-10:]) < 2.0


def test_rows_are_complete(ran):
  rows = rows_of(ran.train)
  assert [row["step"] for row in rows] == [0, 1, 2, 3]
  assert "eval/heldout/accuracy" in rows[0] and "eval/head/accuracy" in rows[0]
  assert "eval/heldout/accuracy" in rows[-1]
  n = ran.cfg.train.prompts * ran.cfg.filter.n_drawn
  assert [row["rollouts_drawn"] for row in rows[1:]] == [n, 2 * n, 3 * n]
  for row in rows[1:]:
    assert row["mismatch_kl"] < 1e-6
    assert row["grad_norm"] > 0
    assert row["tools/call_frequency"] > 0
    assert all(v is not None and math.isfinite(v) for v in row.values())
  seconds = runlog.read_metrics(ran.train / runlog.METRICS)[2]
  parts = ("time/generate", "time/tools", "time/score", "time/update")
  assert sum(seconds[name] for name in parts) <= seconds["time/step"]


def test_the_rate_of_every_step_is_logged(ran):
  rates = [row["lr"] for row in rows_of(ran.sft)]
  assert rates[:10] == pytest.approx([5e-4 * (i + 1) for i in range(10)])
  assert rates[-1] < 1e-3 * max(rates)
  rows = rows_of(ran.train)[1:]
  assert [row["updates"] for row in rows] == [1, 2, 3]
  assert all(row["lr"] > 0 == row["updates_skipped"] for row in rows)


def test_the_policy_has_moved(ran):
  start = final_state(ran.cfg, ran.sft, "sft").state["params"]
  end = final_state(ran.cfg, ran.train).state.params
  change = jax.tree.map(lambda a, b: np.abs(a - b).max(), start, end)
  assert min(jax.tree.leaves(change)) > 0


def test_nothing_is_compiled_after_the_first_steps(ran):
  """There is one bucket, so every later step finds its programs."""
  before_and_first, second, third, after = ran.compilations
  assert before_and_first > 10
  assert second + third == 0
  assert after <= 3  # the last evaluation and the checkpoint


def test_traces_agree_with_metrics(ran):
  rows = {row["step"]: row for row in rows_of(ran.train)}
  cfg = ran.cfg
  for step in range(1, STEPS + 1):
    episodes, row = read_traces(ran.train, step), rows[step]
    assert len(episodes) == cfg.train.prompts * cfg.filter.n_drawn
    n_kept = sum(e.kept for e in episodes)
    assert n_kept == cfg.train.prompts * cfg.filter.n_kept
    assert n_kept == pytest.approx(
      (row["roc/pos_kept"] + row["roc/neg_kept"]) * cfg.train.prompts
    )
    calls = sum(e.n_judged_calls for e in episodes)
    failed = sum(e.n_failed_calls for e in episodes)
    assert row["tools/call_frequency"] == pytest.approx(calls / len(episodes))
    assert row["tools/failure_frequency"] == pytest.approx(failed / calls)
    assert row["num_turns/mean"] == pytest.approx(
      np.mean([e.n_turns for e in episodes])
    )
    assert {e.step for e in episodes} == {step}


def test_traces_say_why(ran):
  for e in read_traces(ran.train, 2):
    calls = e.n_judged_calls
    p_err = e.n_failed_calls / calls if calls else 0.5
    surplus = min(1.0, (e.n_answers - 1) / e.n_turns)
    assert e.p_err == pytest.approx(p_err)
    assert e.p_format == pytest.approx(surplus if e.n_answers else 1.0)
    assert e.p_total == pytest.approx(e.p_err + e.p_format)
    assert e.why.startswith("kept" if e.kept else "dropped")
    assert e.kept or e.advantage == 0.0
    assert e.stop_reason is not None
    for role, logp in zip(e.roles, e.logprobs, strict=True):
      assert (logp != 0) <= (role == layout.Role.MODEL)
  line = traces.path_of(ran.train, 2).read_text().splitlines()[0]
  messages = json.loads(line)["messages"]
  assert messages[0]["role"] == "prompt" and messages[1]["role"] == "model"


def test_groups_start_alike_and_go_apart(ran):
  by_task = {}
  for e in read_traces(ran.train, 1):
    by_task.setdefault(e.place, []).append(e)
  assert len(by_task) == ran.cfg.train.prompts
  for group in by_task.values():
    n = group[0].roles.count(layout.Role.PROMPT)
    assert len({tuple(e.token_ids[:n]) for e in group}) == 1
    assert len({tuple(e.token_ids) for e in group}) == len(group)
  # The next step goes on with other problems.
  later = {e.place for e in read_traces(ran.train, 2)}
  assert not later & set(by_task)


@pytest.mark.slow
def test_a_set_smaller_than_a_step(tmp_path):
  """A row that comes twice is drawn twice, and its traces are read back."""
  asked = [f'{{"question": "What is {i} * 12?", "answer": "{12 * i}"}}\n'
           for i in (101, 102, 103)]  # fmt: skip
  (tmp_path / "three.jsonl").write_text("".join(asked))
  bindings = (
    "host.train_task = @FileTask",
    f"FileTask.path = '{tmp_path / 'three.jsonl'}'",
    "Toolbox.tool = 'session'",
  )
  changes = {
    "host.gin_bindings": bindings,
    "train.prompts": 4,
    "train.steps": 2,
    "filter.mode": "uniform",
  }
  cfg = settings(**changes)
  train.run(cfg, tmp_path / "run")
  for step in (1, 2):
    groups = {}
    for e in read_traces(tmp_path / "run", step):
      groups.setdefault(e.place, []).append(e)
    assert list(groups) == list(range(4 * step - 4, 4 * step))
    ids = [tuple(tuple(e.token_ids) for e in g) for g in groups.values()]
    assert len(set(ids)) == 4
    assert len({g[0].task_id for g in groups.values()}) == 3
  folder = tmp_path / "run" / "rollouts"
  train.run(
    settings(**changes, **{"train.replay": str(folder)}), tmp_path / "b"
  )
  assert rows_of(tmp_path / "b")[1:] == rows_of(tmp_path / "run")[1:]
  # The command chooses as the run did.
  argv = [str(folder), "--mode=uniform", f"--output={tmp_path / 'kept.jsonl'}"]
  assert main.main(["filter", *argv]) == 0
  lines = (tmp_path / "kept.jsonl").read_text().splitlines()
  chosen = [json.loads(line) for line in lines]
  assert {(c["place"], c["rollout_id"]) for c in chosen} == {
    (e.place, e.rollout_id)
    for step in (1, 2)
    for e in read_traces(tmp_path / "run", step)
    if e.kept
  }


# -------------------------------------------------------------------- resume


@pytest.mark.bits
@pytest.mark.slow
def test_resumed_run_is_the_same_run(ran, tmp_path, monkeypatch, capsys):
  with monkeypatch.context() as patch:
    stop_after(patch, train.Trainer, "step", 2)
    with pytest.raises(Killed):
      train.run(ran.cfg, tmp_path)
  # A row of a step whose checkpoint was never written.
  with (tmp_path / runlog.METRICS).open("a") as log:
    log.write('{"step": 3, "reward": 99.0}\n{"step": 4, "rew')
  capsys.readouterr()
  train.run(ran.cfg, tmp_path)
  assert "going on after step 2" in capsys.readouterr().out
  assert rows_of(tmp_path) == rows_of(ran.train)
  assert_same_bits(
    final_state(ran.cfg, tmp_path), final_state(ran.cfg, ran.train)
  )
  for step in range(1, STEPS + 1):
    assert (
      traces.path_of(tmp_path, step).read_text()
      == traces.path_of(ran.train, step).read_text()
    )


@pytest.mark.bits
@pytest.mark.slow
def test_killed_before_the_first_checkpoint(ran, tmp_path, monkeypatch):
  """Nothing is saved yet: the run starts over, in the same directory."""
  with monkeypatch.context() as patch:
    stop_after(patch, checkpoint.Checkpoints, "save", 0)
    with pytest.raises(Killed):
      train.run(ran.cfg, tmp_path)
  assert [row["step"] for row in rows_of(tmp_path)] == [0, 1]
  with monkeypatch.context() as patch:
    stop_after(patch, train.Trainer, "step", 1)
    with pytest.raises(Killed):
      train.run(ran.cfg, tmp_path)
  assert rows_of(tmp_path) == rows_of(ran.train)[:2]


@pytest.mark.bits
@pytest.mark.slow
def test_resumed_supervised_run_is_the_same_run(ran, tmp_path, monkeypatch):
  cfg = settings()
  with monkeypatch.context() as patch:
    stop_after(patch, checkpoint.Checkpoints, "save", 4)
    with pytest.raises(Killed):
      sft.run(cfg, tmp_path)
  assert len(rows_of(tmp_path)) == 100
  sft.run(cfg, tmp_path)
  assert rows_of(tmp_path) == rows_of(ran.sft)
  assert_same_bits(
    final_state(cfg, tmp_path, "sft"), final_state(cfg, ran.sft, "sft")
  )


def test_a_finished_run_says_so(ran, capsys):
  before = (ran.train / runlog.METRICS).read_bytes()
  train.run(ran.cfg, ran.train)
  assert f"all {STEPS} steps are done" in capsys.readouterr().out
  assert (ran.train / runlog.METRICS).read_bytes() == before
  sft.run(settings(), ran.sft)
  assert f"all {SFT_STEPS} steps are done" in capsys.readouterr().out


# --------------------------------------------------------------- going back


@pytest.mark.slow
def test_going_back_repeats_what_came_after(ran, tmp_path, capsys):
  """To the bit, as nothing has changed; what there was is set aside."""
  shutil.copytree(ran.train, tmp_path / "run")
  workdir, aside = tmp_path / "run", tmp_path / "run" / "set_aside_0"
  train.run(ran.cfg, workdir, restore_step=2)
  assert f"later steps are in {aside}" in capsys.readouterr().out
  assert rows_of(workdir) == rows_of(ran.train) == rows_of(aside)
  assert_same_bits(
    final_state(ran.cfg, workdir), final_state(ran.cfg, ran.train)
  )
  assert checkpoint.Checkpoints(aside / "checkpoints").steps() == [3]
  names = {path.name for path in (aside / "rollouts").iterdir()}
  assert names == {"step_000003.jsonl", "eval_000003.jsonl"}
  with pytest.raises(errors.UserError, match=r"of step 1 .*there is 2, 3"):
    train.run(ran.cfg, workdir, restore_step=1)
  assert not (workdir / "set_aside_1").exists()


@pytest.mark.slow
def test_going_back_in_a_supervised_run(ran, tmp_path):
  shutil.copytree(ran.sft, tmp_path / "sft")
  sft.run(settings(), tmp_path / "sft", restore_step=100)
  assert rows_of(tmp_path / "sft") == rows_of(ran.sft)
  assert_same_bits(
    final_state(settings(), tmp_path / "sft", "sft"),
    final_state(settings(), ran.sft, "sft"),
  )


@pytest.mark.slow
def test_what_is_not_finite_is_never_saved(ran, tmp_path):
  broken = {"lr": 3e38, "weight_decay": 1e3, "warmup": 0}
  for program, name in ((train, "train"), (sft, "sft")):
    changes = {f"{name}.{key}": value for key, value in broken.items()}
    cfg = settings(init_from=str(ran.sft), **changes)
    with pytest.raises(errors.UserError, match="step 1: the update is not"):
      program.run(cfg, tmp_path / name)
    assert not (tmp_path / name / "checkpoints").exists()
    assert len(rows_of(tmp_path / name)) == (name == "train")


@pytest.mark.slow
def test_the_reference_is_what_the_run_began_from(ran, tmp_path, monkeypatch):
  """Also where init_from was trained on since, or is gone."""
  source = tmp_path / "sft"
  shutil.copytree(ran.sft, source)
  changes = {
    "init_from": str(source),
    "loss.kl_coef": 0.1,
    "train.steps": 3,
    "train.lr": 1e-3,
  }
  cfg = settings(**changes)
  train.run(cfg, tmp_path / "whole")
  rows = rows_of(tmp_path / "whole")
  assert rows[1]["kl"] < 1e-12 < rows[2]["kl"] < rows[3]["kl"]
  with monkeypatch.context() as patch:
    stop_after(patch, train.Trainer, "step", 1)
    with pytest.raises(Killed):
      train.run(cfg, tmp_path / "killed")
  shutil.rmtree(source)
  train.run(cfg, tmp_path / "killed")
  assert rows_of(tmp_path / "killed") == rows
  one, other = (
    final_state(cfg, tmp_path / name) for name in ("whole", "killed")
  )
  assert_same_bits(one, other)
  began = one.extra["began_from"]
  assert began["source"] == str(source) and began["step"] == SFT_STEPS
  assert began["checkpoint"].startswith(f"step {SFT_STEPS}, ")
  record = json.loads((tmp_path / "killed" / "run.json").read_text())
  assert record["attempts"][0]["began_from"] == began
  # Without its copy there is nothing that it could be compared with.
  shutil.rmtree(tmp_path / "killed" / "checkpoints" / "reference")
  with pytest.raises(errors.UserError, match="the run was begun without a KL"):
    train.run(settings(**{**changes, "train.steps": 4}), tmp_path / "killed")


# ---------------------------------------------------------------- evaluation


def test_evaluation_of_the_checkpoint_is_that_of_the_run(ran):
  evaluate.run(ran.cfg, ran.train)
  row = json.loads((ran.train / "eval.json").read_text())
  last = rows_of(ran.train)[-1]
  assert row == {k: v for k, v in last.items() if k.startswith("eval/")}
  rollouts = list(episode_lib.read_episodes(ran.train / "eval_rollouts.jsonl"))
  assert len(rollouts) == ran.cfg.eval.n_problems


# ------------------------------------------------------------------ adapters


@pytest.mark.bits
@pytest.mark.slow
def test_adapters_on_a_frozen_base(ran, tmp_path, monkeypatch):
  """Sampled with, resumed, and evaluated as the run itself does."""
  cfg = settings(
    **{
      "init_from": str(ran.sft),
      "lora.rank": 2,
      "train.steps": 2,
      "train.lr": 1e-3,
      "train.microbatch_rows": 2,
      "loss.kl_coef": 0.1,
      "loss.old_logprobs": "recompute",
    }
  )
  train.run(cfg, tmp_path / "whole")
  with monkeypatch.context() as patch:
    stop_after(patch, train.Trainer, "step", 1)
    with pytest.raises(Killed):
      train.run(cfg, tmp_path / "killed")
  train.run(cfg, tmp_path / "killed")
  rows = rows_of(tmp_path / "whole")
  assert rows == rows_of(tmp_path / "killed")
  one, other = (
    final_state(cfg, tmp_path / name) for name in ("whole", "killed")
  )
  assert_same_bits(one, other)
  # The first policy is the base, and what is sampled from has moved with it.
  # (Two compiled programs may round the same log-probs otherwise.)
  assert rows[1]["kl"] < 1e-12 < rows[2]["kl"]
  assert all(row["mismatch_kl"] < 1e-6 for row in rows[1:])
  assert min(np.abs(x).max() for x in jax.tree.leaves(one.state.params)) > 0
  evaluate.run(cfg, tmp_path / "killed")
  row = json.loads((tmp_path / "killed" / "eval.json").read_text())
  assert row == {k: v for k, v in rows[-1].items() if k.startswith("eval/")}


def episode(outcome, statuses=(), *, n_tokens=5, n_answers=1, n_turns=1):
  made = episode_lib.Episode(n_turns=n_turns, answers=["1"] * n_answers)
  made.roles = [layout.Role.PROMPT] * 3 + [layout.Role.MODEL] * n_tokens
  made.token_ids = [7] * len(made.roles)
  made.tool_records = [
    episode_lib.ToolRecord(s, "python", "", "") for s in statuses
  ]
  made.stop_reason = layout.StopReason.ANSWERED
  made.outcome = outcome
  return made


GROUPS = [
  [
    episode(Outcome.CORRECT, [Status.OK, Status.ERROR], n_tokens=9, n_turns=3),
    episode(Outcome.CORRECT, [Status.OK]),
  ],
  [
    episode(Outcome.CORRECT),
    episode(Outcome.WRONG, [Status.TIMEOUT, Status.INFRA], n_answers=0),
  ],
  [
    episode(Outcome.WRONG, [Status.OK]),
    episode(Outcome.WRONG, [Status.OK], n_answers=2),
  ],
]


def test_summary_by_hand():
  row = evaluate.summarise(GROUPS)
  want = {
    "accuracy": 3 / 6,
    "accuracy_stderr": np.std([1.0, 0.5, 0.0]) / 3**0.5,
    "n_problems": 3.0,
    "void": 0.0,
    "failure_frequency_correct": 1 / 3,
    "failure_frequency_wrong": 1 / 3,
    "call_frequency": (2 + 1 + 0 + 1 + 1 + 1) / 6,
    "num_turns": 8 / 6,
    "mean_length": (9 + 5 * 5) / 6,
    "one_answer": 4 / 6,
    "truncated": 0.0,
    "avg@2": 3 / 6,
    "pass@1": (1 + 0.5 + 0) / 3,
    "pass@2": (1 + 1 + 0) / 3,
  }
  assert row == pytest.approx(want)


def test_summary_without_void_ones():
  groups = [[episode(Outcome.VOID)], [episode(Outcome.CORRECT)]]
  row = evaluate.summarise(groups)
  assert row["accuracy"] == 1.0 and row["void"] == 1.0
  # No call was made, so there is no share of failing ones.
  assert "failure_frequency_correct" not in row


def test_void_rollouts_are_outside_of_every_estimate():
  right, wrong, void = (
    [episode(o)] for o in (Outcome.CORRECT, Outcome.WRONG, Outcome.VOID)
  )
  row = evaluate.summarise([right] * 10 + [wrong] * 20 + [void] * 98)
  assert row["accuracy"] == pytest.approx(1 / 3)
  assert row["accuracy_stderr"] == pytest.approx(0.0861, abs=1e-4)
  assert (row["n_problems"], row["void"]) == (128, 98)
  # By problem: 1 of 2, 1 of 3, 0 of 1, and one of which nothing is known.
  groups = [
    right + wrong + void + void,
    right + wrong + wrong + void,
    wrong + void * 3,
    void * 4,
  ]
  row = evaluate.summarise(groups)
  share = (1 / 2 + 1 / 3 + 0) / 3
  assert row["accuracy"] == row["avg@4"] == pytest.approx(share)
  assert row["pass@1"] == pytest.approx(share)
  assert row["pass@2"] == pytest.approx((1 + 2 / 3) / 2)
  assert row["pass@4"] is None
  assert row["accuracy_stderr"] == pytest.approx(
    np.std([1 / 2, 1 / 3, 0]) / 3**0.5
  )


def test_nothing_but_void_rollouts_is_null_and_no_nan():
  void = [episode(Outcome.VOID)] * 2
  row = evaluate.summarise([void, void])
  names = ("accuracy", "accuracy_stderr", "avg@2", "pass@1", "pass@2")
  assert [row[name] for name in names] == [None] * 5
  assert row["void"] == 4 and json.dumps(row, allow_nan=False)


class Problems:
  """A task of so many problems, some more often than others."""

  def __init__(self, ids, size=None):
    self.ids = ids
    if size is not None:
      self.__class__ = type("Finite", (Problems,), {"__len__": lambda _: size})

  def problem(self, index):
    name = self.ids[index % len(self.ids)]
    return problem.Problem(f"p{name}", name, f"{name}?", "1")


def test_each_held_out_problem_is_asked_once():
  ids = lambda found: [p.index for p in found]
  small = Problems([4, 1, 4, 4, 2], size=3)
  assert ids(problem.distinct(small, 128)) == [4, 1, 2]
  assert ids(problem.distinct(small, 2)) == [4, 1]
  endless = Problems(list(range(1000)))
  assert ids(problem.distinct(endless, 128)) == list(range(128))


def void(reason):
  made = episode(Outcome.VOID)
  made.void_reason = reason
  return made


def test_rollouts_lost_to_the_environment_are_counted(tmp_path, capsys):
  """By reason; a step of many warns, the third of nothing else ends it."""
  Reason = layout.VoidReason
  cfg = config.Config(log=config.LogConfig(void_warning=0.25))
  trainer = types.SimpleNamespace(cfg=cfg, cursor=train.Cursor())
  saved = checkpoint.Checkpoints(tmp_path)
  saved.save(2, {}, {})

  def step(number, *groups):
    row = train.Trainer._count(trainer, groups)
    train.Trainer.check_void(trainer, row, number, saved)
    return {k: v for k, v in row.items() if k.startswith("errors/") and v}

  fine = [episode(Outcome.WRONG)] * 2
  assert step(1, fine, fine) == {}
  row = step(2, [*fine, void(Reason.SANDBOX)], fine[:1])
  assert row == {"errors/void_frac": 0.25, "errors/void_sandbox": 0.25}
  assert not capsys.readouterr().out
  row = step(3, [void(Reason.GOLD), void(Reason.DEADLINE)], fine)
  assert row == {
    "errors/void_frac": 0.5,
    "errors/void_gold": 0.25,
    "errors/void_deadline": 0.25,
  }
  said = capsys.readouterr().out
  assert said.startswith("step 3: 50% of the rollouts were lost")
  assert "(deadline 25%, gold 25%)" in said

  lost = [void(Reason.VERIFIER), void(Reason.LOGITS)]
  for number in (4, 5):
    row = step(number, lost, lost)
    assert row["errors/void_verifier"] == row["errors/void_logits"] == 0.5
  step(6, fine)
  assert trainer.cursor.void_steps == 0  # in a row
  for number in (7, 8):
    step(number, lost)
  with pytest.raises(errors.UserError, match="^step 9: .*every rollout") as e:
    step(9, lost)
  assert "verifier 50%, logits 50%" in str(e.value)
  assert "the newest checkpoint is that of step 2" in str(e.value)


def test_pass_at_is_unbiased():
  """Of 4 samples with 1 right: 1 - C(3, k) / C(4, k) = k / 4."""
  group = [episode(Outcome.CORRECT)] + [episode(Outcome.WRONG)] * 3
  for k in (1, 2, 3, 4):
    assert evaluate.pass_at([group], k) == pytest.approx(k / 4)
  assert evaluate.pass_at([group, group[1:] + group[1:2]], 2) == 0.25


# ------------------------------------------------------------------- mistakes


def test_init_from_nothing(ran, tmp_path):
  cfg = settings(init_from=str(tmp_path / "nowhere"))
  with pytest.raises(errors.UserError, match="no checkpoint under.*nowhere"):
    train.run(cfg, tmp_path / "run")


def test_init_from_another_model(ran, tmp_path):
  cfg = settings(**{"init_from": str(ran.sft), "model.d_ff": 96})
  with pytest.raises(errors.UserError, match="another configuration"):
    train.run(cfg, tmp_path / "run")


def test_workdir_of_another_run(ran):
  cfg = settings(**{"init_from": str(ran.sft), "train.lr": 0.5})
  with pytest.raises(errors.UserError, match="train.lr"):
    train.run(cfg, ran.train)
  with pytest.raises(errors.UserError, match="run of `sft`"):
    train.run(cfg, ran.sft)


def test_prompts_must_fit(ran, tmp_path):
  cfg = settings(**{"sampling.cache_length": 66})
  with pytest.raises(errors.UserError, match="cache_length"):
    train.run(cfg, tmp_path)


# ------------------------------------------------------------------ variants


@pytest.mark.slow
@pytest.mark.parametrize(
  "changes",
  [
    {
      "loss.kl_coef": 0.1,
      "loss.entropy_coef": 0.01,
      "loss.old_logprobs": "recompute",
      "loss.correction": "tis",
      "train.minibatches": 2,
      "train.microbatch_rows": 2,
    },
    {
      "loss.kind": "gspo",
      "loss.normaliser": "dr_grpo",
      "filter.mode": "inverse",
      "filter.drop_void_turns": True,
      "model.remat": "full",
      "model.dtype": "bfloat16",
      "sampling.top_k": 20,
      "loss.old_logprobs": "recompute",
      "eval.temperature": 0.0,
      "eval.samples": 2,
    },
  ],
  ids=["all terms", "all else"],
)
def test_settings_run(ran, tmp_path, changes):
  cfg = settings(**{"init_from": str(ran.sft), "train.steps": 2, **changes})
  train.run(cfg, tmp_path)
  for row in rows_of(tmp_path):
    assert all(v is not None and math.isfinite(v) for v in row.values())


@pytest.mark.slow
@pytest.mark.parametrize(
  "how", [{"sampling.top_p": 0.8}, {"sampling.top_k": 5}], ids=["p", "k"]
)
def test_the_first_ratio_is_one_however_tokens_were_drawn(ran, tmp_path, how):
  cfg = settings(
    **{
      "init_from": str(ran.sft),
      "train.steps": 1,
      "sampling.temperature": 0.6,
      "loss.old_logprobs": "recompute",
      **how,
    }
  )
  train.run(cfg, tmp_path)
  row = rows_of(tmp_path)[1]
  assert row["ratio"] == pytest.approx(1.0, abs=1e-5)
  assert row["clip_ratio/region"] == 0.0


@pytest.mark.slow
def test_eight_devices_train_alike(ran, tmp_path):
  """The first step of a mesh is that of one device, to rounding."""
  cfg = settings(
    **{
      "init_from": str(ran.sft),
      "mesh.data": 2,
      "mesh.fsdp": 2,
      "mesh.tensor": 1,
    }
  )
  train.run(cfg, tmp_path)
  got, want = rows_of(tmp_path), rows_of(ran.train)
  assert got[0] == want[0]
  assert got[1] == pytest.approx(want[1], rel=1e-4, abs=1e-6)


@pytest.mark.slow
def test_all_terms_on_eight_devices(tmp_path):
  """The same rollouts teach a mesh what they teach one device."""
  changes = {
    "train.steps": 2,
    "train.minibatches": 2,
    "train.microbatch_rows": 4,
    "loss.old_logprobs": "recompute",
    "loss.kl_coef": 0.1,
    "lora.rank": 2,
    "model.n_layers": 1,
    "model.n_kv_heads": 2,
    "eval.head": False,
  }
  train.run(settings(**changes), tmp_path / "one")
  changes |= {"train.replay": str(tmp_path / "one" / "rollouts")}
  changes |= {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
  train.run(settings(**changes), tmp_path / "eight")
  got, want = rows_of(tmp_path / "eight"), rows_of(tmp_path / "one")
  for row, other in zip(got[1:], want[1:], strict=True):
    assert row["grad_norm"] > 0 and row["updates_skipped"] == 0
    same = {k: v for k, v in other.items() if "sandbox/" not in k}
    row = {k: v for k, v in row.items() if k in same}
    assert row == pytest.approx(same, rel=1e-4, abs=1e-6)
  one, eight = (leaves_of(tmp_path / name) for name in ("one", "eight"))
  for name, x in eight.items():
    np.testing.assert_allclose(x, one[name], rtol=0, atol=1e-6, err_msg=name)


def leaves_of(workdir):
  """Adapters of the newest checkpoint, by name, from their record."""
  cfg = config.from_json((workdir / "config.json").read_text())
  params = final_state(cfg, workdir).state.params
  paths = jax.tree_util.tree_leaves_with_path(params)
  return {jax.tree_util.keystr(path): np.asarray(x) for path, x in paths}


@pytest.mark.slow
def test_longer_buckets_change_nothing_but_last_bits(ran, tmp_path):
  cfg = settings(
    **{"init_from": str(ran.sft), "train.buckets": (256,), "train.steps": 1}
  )
  train.run(cfg, tmp_path)
  got, want = rows_of(tmp_path)[1], rows_of(ran.train)[1]
  got = {k: v for k, v in got.items() if not k.startswith("eval/")}
  assert got == pytest.approx(want, rel=1e-4, abs=1e-6)
