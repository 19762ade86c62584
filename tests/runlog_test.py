"""Whose workdir it is, and which rows are left after a restart."""

import errno
import json
import os
import platform
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

import roc
from roc import errors, runlog

IDENTITY = {"seed": 0, "train.lr": 1e-4, "train.buckets": (96, 128)}
GIN = "# comment\nLimits.wall_s = 5.0\nnames = \\\n  'a'\n"


def claim(workdir, program="train", gin_text=GIN, **identity):
  return runlog.claim(
    workdir,
    program,
    config_json='{"seed": 0}\n',
    gin_text=gin_text,
    identity=IDENTITY | identity,
  )


def begin(workdir):
  """Leaves what a first step leaves."""
  (workdir / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n')


def test_claim_records_the_run(tmp_path):
  with claim(tmp_path / "a" / "b") as run:
    run.note(sandbox_tier="process")
  assert (run.workdir / "config.json").read_text() == '{"seed": 0}\n'
  assert (run.workdir / "config.gin").read_text() == GIN
  record = json.loads((run.workdir / "run.json").read_text())
  assert record["program"] == "train"
  assert record["identity"]["train.buckets"] == [96, 128]
  assert record["identity"]["gin Limits.wall_s"] == "5.0"
  assert record["identity"]["gin names"] == "'a'"
  (attempt,) = record["attempts"]
  assert attempt["sandbox_tier"] == "process"
  assert attempt["versions"]["numpy"] == np.__version__
  assert attempt["host"]["name"] == platform.node()
  assert attempt["host"]["cpus"] == os.cpu_count()
  assert attempt["roc"]["version"] == roc.__version__


def git(folder, *words):
  who = ("-c", "user.name=x", "-c", "user.email=x@example.com")
  return subprocess.run(
    ["git", "-C", str(folder), *who, *words],
    check=True, capture_output=True, text=True,
  ).stdout.strip()  # fmt: skip


def test_the_record_names_the_commit(tmp_path, monkeypatch):
  (tmp_path / "roc").mkdir()
  (tmp_path / "roc" / "__init__.py").write_text("")
  monkeypatch.setattr(roc, "__file__", str(tmp_path / "roc" / "__init__.py"))
  recorded = lambda: json.loads((tmp_path / "w" / "run.json").read_text())
  claim(tmp_path / "w").close()
  assert recorded()["attempts"][-1]["roc"] == {"version": roc.__version__}
  git(tmp_path, "init", "-q")
  git(tmp_path, "add", "roc")
  git(tmp_path, "commit", "-q", "-m", "one")
  commit = git(tmp_path, "rev-parse", "HEAD")
  for is_changed in (False, True):
    claim(tmp_path / "w").close()
    assert recorded()["attempts"][-1]["roc"] == {
      "version": roc.__version__,
      "commit": commit,
      "is_changed": is_changed,
    }
    (tmp_path / "roc" / "__init__.py").write_text("x = 1")


@pytest.mark.parametrize(
  "left",
  ["metrics.jsonl", "checkpoints/step_00000001", "rollouts/step_1.jsonl"],
)
def test_a_workdir_without_a_step_is_nobody_s(tmp_path, left):
  """A command that stopped early may be corrected and given again."""
  claim(tmp_path).close()
  # What comes before the first step, and a save that was interrupted.
  (tmp_path / "metrics.jsonl").write_text('{"step": 0, "eval/a": 1}\n')
  (tmp_path / "rollouts").mkdir()
  (tmp_path / "rollouts" / "eval_000000.jsonl").write_text("")
  (tmp_path / "checkpoints" / "unfinished_step_00000001").mkdir(parents=True)
  claim(tmp_path, seed=1, gin_text="Limits.wall_s = 9").close()
  claim(tmp_path, program="sft", seed=2).close()
  record = json.loads((tmp_path / "run.json").read_text())
  assert (record["program"], record["identity"]["seed"]) == ("sft", 2)
  path = tmp_path / left
  if left == "metrics.jsonl":
    begin(tmp_path)
  elif path.suffix:
    path.write_text("")
  else:
    path.mkdir()
  with pytest.raises(errors.UserError, match="a run of `sft`, not of `train`"):
    claim(tmp_path)
  with pytest.raises(errors.UserError, match=r"seed \(2 -> 0\)"):
    claim(tmp_path, program="sft")


def test_a_store_without_a_checkpoint_is_that_of_its_workdir(tmp_path):
  def claim_store(workdir, seed):
    runlog.claim_store(
      tmp_path / "store",
      "train",
      config_json="{}",
      gin_text="",
      identity={"seed": seed},
      workdir=tmp_path / workdir,
    )

  claim_store("a", seed=0)
  claim_store("a", seed=1)  # corrected
  with pytest.raises(errors.UserError, match=r"seed \(1 -> 2\)"):
    claim_store("b", seed=2)  # the first may still be at work
  claim_store("b", seed=1)
  (tmp_path / "store" / "step_00000001").mkdir()
  with pytest.raises(errors.UserError, match=r"seed \(1 -> 2\)"):
    claim_store("b", seed=2)


def test_the_same_run_goes_on_and_each_attempt_is_noted(tmp_path):
  claim(tmp_path).close()
  claim(tmp_path, gin_text="Limits.wall_s = 5.0\n# other\nnames = 'a'").close()
  record = json.loads((tmp_path / "run.json").read_text())
  assert len(record["attempts"]) == 2


def test_another_config_is_refused_until_allowed(tmp_path):
  claim(tmp_path).close()
  begin(tmp_path)
  with pytest.raises(errors.UserError) as e:
    claim(tmp_path, **{"train.lr": 1e-6, "new": 1})
  assert "train.lr (0.0001 -> 1e-06), new (unset -> 1) differ" in str(e.value)
  assert "--workdir" in str(e.value)
  assert "--allow_config_change" in str(e.value)
  runlog.forget_config(tmp_path)
  claim(tmp_path, **{"train.lr": 1e-6}).close()
  with pytest.raises(errors.UserError, match="1e-06 -> 0.0001"):
    claim(tmp_path)
  record = json.loads((tmp_path / "run.json").read_text())
  assert record["identity"]["train.lr"] == 1e-6


def test_another_host_side_or_program_is_refused(tmp_path):
  claim(tmp_path).close()
  begin(tmp_path)
  with pytest.raises(errors.UserError, match=r"gin Limits.wall_s \(5.0 -> 9\)"):
    claim(tmp_path, gin_text="Limits.wall_s = 9\nnames = 'a'")
  with pytest.raises(errors.UserError, match="run of `train`, not of `sft`"):
    claim(tmp_path, program="sft")
  claim(tmp_path / "sft", program="sft").close()


def test_refused_claims_leave_the_record_alone(tmp_path):
  claim(tmp_path).close()
  begin(tmp_path)
  before = (tmp_path / "run.json").read_bytes()
  with pytest.raises(errors.UserError):
    claim(tmp_path, seed=1)
  assert (tmp_path / "run.json").read_bytes() == before
  claim(tmp_path).close()


def test_workdir_that_is_a_file(tmp_path):
  (tmp_path / "x").write_text("")
  with pytest.raises(errors.UserError, match="cannot write to workdir .*x"):
    claim(tmp_path / "x")
  with pytest.raises(errors.UserError, match="cannot write to workdir .*x/y"):
    claim(tmp_path / "x" / "y")


def test_lost_or_broken_record_is_refused(tmp_path):
  claim(tmp_path).close()
  (tmp_path / "run.json").write_text('{"program"')
  with pytest.raises(errors.UserError, match="run.json is unreadable"):
    claim(tmp_path)
  (tmp_path / "run.json").unlink()
  claim(tmp_path).close()
  (tmp_path / "run.json").unlink()
  (tmp_path / "metrics.jsonl").write_text("")
  with pytest.raises(errors.UserError, match="missing, yet there is a metrics"):
    claim(tmp_path)


_HOLDER = textwrap.dedent("""
  import sys, time
  from roc import runlog
  run = runlog.claim(sys.argv[1], "train", config_json="", gin_text="",
                     identity={})
  print("held", flush=True)
  time.sleep(60)
""")


def test_two_runs_at_once_are_refused_and_kill_9_lets_go(tmp_path):
  def again():
    return runlog.claim(
      tmp_path, "train", config_json="", gin_text="", identity={}
    )

  process = subprocess.Popen(
    [sys.executable, "-c", _HOLDER, str(tmp_path)],
    stdout=subprocess.PIPE,
    env={**os.environ, "PYTHONPATH": os.getcwd()},
  )
  try:
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(errors.UserError, match=f"process {process.pid};"):
      again()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    again().close()
  finally:
    process.kill()
    process.wait()
    process.stdout.close()


def write_rows(workdir, *steps, restored_step=None):
  log = runlog.MetricsLog(
    workdir, restored_step=restored_step, tensorboard=False
  )
  with log:
    for step in steps:
      log.write(step, {"reward": step / 3})


def steps_in(workdir):
  return [r["step"] for r in runlog.read_metrics(workdir / "metrics.jsonl")]


def test_rows_hold_exact_numbers(tmp_path):
  row = {"a": np.float32(0.1), "b": 1 / 3, "c": np.int64(2), "d": float("nan")}
  with runlog.MetricsLog(tmp_path, tensorboard=False) as log:
    log.write(7, row)
    # On disk before `write` returns, not when the file is closed.
    assert len(log.path.read_bytes().splitlines()) == 1
  (read,) = runlog.read_metrics(log.path)
  assert read == {
    "step": 7,
    "a": float(np.float32(0.1)),
    "b": 1 / 3,
    "c": 2,
    "d": None,
  }


def test_restart_keeps_the_rows_of_the_checkpoint(tmp_path):
  write_rows(tmp_path, 0, 1, 2, 2, 3)
  before = (tmp_path / "metrics.jsonl").read_bytes()
  write_rows(tmp_path, 3, restored_step=2)
  assert (tmp_path / "metrics.jsonl").read_bytes() == before
  write_rows(tmp_path, 0, restored_step=None)
  assert steps_in(tmp_path) == [0]


@pytest.mark.parametrize("tail", ['{"step": 4, "rew', '{"step": 2}', "\0\0"])
def test_half_written_last_line_goes(tmp_path, tail):
  write_rows(tmp_path, 1, 2)
  with open(tmp_path / "metrics.jsonl", "a") as f:
    f.write(tail)
  assert steps_in(tmp_path) == [1, 2]
  write_rows(tmp_path, 3, restored_step=2)
  assert steps_in(tmp_path) == [1, 2, 3]


def test_broken_line_in_the_middle_is_named(tmp_path):
  write_rows(tmp_path, 1)
  with open(tmp_path / "metrics.jsonl", "a") as f:
    f.write('oops\n{"step": 3}\n')
  with pytest.raises(errors.UserError, match="jsonl line 2: not a JSON"):
    runlog.MetricsLog(tmp_path, restored_step=3, tensorboard=False)


def test_missing_metrics_file(tmp_path):
  with pytest.raises(errors.UserError, match="is its directory a workdir"):
    runlog.read_metrics(tmp_path / "metrics.jsonl")


def test_full_disk_is_one_sentence_and_no_half_row(tmp_path, monkeypatch):
  with runlog.MetricsLog(tmp_path, tensorboard=False) as log:
    log.write(1, {"a": 1})
    real_write = os.write

    def half_then_full(fd, data):
      if len(data) < 8:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
      return real_write(fd, data[: len(data) - 4])

    monkeypatch.setattr(os, "write", half_then_full)
    with pytest.raises(errors.UserError, match="No space left on device"):
      log.write(2, {"a": 2})
  assert log.path.read_text() == '{"step": 1, "a": 1}\n'


def test_tensorboard_files_hold_the_scalars(tmp_path):
  with runlog.MetricsLog(tmp_path, tensorboard=True) as log:
    log.write(1, {"eval/heldout/accuracy": 0.5, "not/finite": float("nan")})
  (events,) = (tmp_path / "logs").iterdir()
  data = events.read_bytes()
  assert b"eval/heldout/accuracy" in data
  assert b"not/finite" not in data
