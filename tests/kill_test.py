"""kill -9 at any moment, the same command again: the run is the same run.

The program is killed from outside, by an observer that hears which phase it has
just entered and strikes a random moment later. Restarts are the plain command.
"""

import contextlib
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from roc import build, config, runlog, updates
from roc.device import checkpoint

ROOT = pathlib.Path(__file__).parents[1]
TRACES = "rollouts"

# Runs the program with its own arguments and says where it is.
OBSERVED = """
import os, sys
from roc import main, progress
from roc.host import tools

def say(word):
  os.write(1, b"PHASE " + word.encode() + b"\\n")

phase, submit = progress.Progress.phase, tools.Toolbox.submit

def told_phase(self, text):
  say(text)
  return phase(self, text)

def told_submit(self, call, **where):
  # Rejected calls never reach the sandbox.
  if call.error is None:
    say("tools")
  return submit(self, call, **where)

progress.Progress.phase, tools.Toolbox.submit = told_phase, told_submit
sys.exit(main.main(sys.argv[1:]))
"""

# At this size nothing is right; rewards of a group differ by their length.
SETTINGS = {
  "filter.n_drawn": 8,
  "filter.n_kept": 4,
  "filter.drop_equal_reward": False,
  "filter.overlong": "soft",
  "filter.overlong_buffer": 60,
  "eval.head": False,
  "log.tensorboard": False,
}


def command(program, workdir, **settings):
  return [
    program,
    "--config=experiments/quickstart.py:tiny",
    f"--workdir={workdir}",
    *(f"--config.{k}={v}" for k, v in settings.items()),
  ]


@pytest.fixture(scope="module")
def env():
  return os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


def run_to_its_end(env, argv):
  done = subprocess.run(
    [sys.executable, "-m", "roc.main", *argv],
    cwd=ROOT,
    env=env,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout


def descendants(pid):
  """All processes under a process, by the kernel's own account."""
  found = []
  # Programs end while this looks.
  with contextlib.suppress(OSError):
    for task in pathlib.Path(f"/proc/{pid}/task").iterdir():
      for child in (task / "children").read_text().split():
        found += [int(child), *descendants(child)]
  return found


def started_at(pid):
  """Start time of a process, None if it is gone or a zombie."""
  try:
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text()
  except OSError:
    return None
  state, *rest = fields.rpartition(")")[2].split()
  return None if state == "Z" else rest[18]


def run_and_kill(env, argv, phase, n, delay):
  """Kills the program `delay` seconds after it enters `phase` the n-th time.

  Returns:
    The phases that it went through, or None if it ended before.
  """
  process = subprocess.Popen(
    [sys.executable, "-c", OBSERVED, *argv],
    cwd=ROOT,
    env=env,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  seen, lines = [], []
  try:
    for line in process.stdout:
      lines.append(line)
      if line.startswith("PHASE "):
        seen.append(line.split()[1])
        if seen.count(phase) == n:
          break
    else:
      assert process.wait() == 0, "".join(lines)
      return None
    time.sleep(delay)
    below = {pid: started_at(pid) for pid in descendants(process.pid)}
    below = {pid: start for pid, start in below.items() if start is not None}
    assert below, "no sandbox was running"
  finally:
    process.kill()
    process.wait()
    process.stdout.close()
  assert process.returncode == -signal.SIGKILL
  assert_gone(below)
  return seen


def assert_gone(below):
  """Nothing of the sandbox survives its trainer by two seconds."""
  deadline = time.monotonic() + 2.0
  while left := [p for p, start in below.items() if started_at(p) == start]:
    assert time.monotonic() < deadline, f"still alive: {left}"
    time.sleep(0.02)


def state_of(workdir):
  """Arrays and cursor of the newest checkpoint."""
  cfg = config.from_json((workdir / "config.json").read_text())
  policy = build.make_policy(cfg, build.host_parts(cfg))
  abstract = updates.make_learner(cfg, policy).abstract_state
  restored = checkpoint.Checkpoints(workdir / "checkpoints").restore(abstract)
  assert restored is not None and restored.notes == []
  return restored


def assert_same_run(workdir, other):
  rows, rows_other = (
    [
      {k: v for k, v in row.items() if not k.startswith("time/")}
      for row in runlog.read_metrics(path / runlog.METRICS)
    ]
    for path in (workdir, other)
  )
  assert rows == rows_other
  a, b = state_of(workdir), state_of(other)
  assert a.step == b.step and a.extra == b.extra
  for x, y in zip(
    jax.tree.leaves(a.state), jax.tree.leaves(b.state), strict=True
  ):
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
  names = {p.name for p in (workdir / TRACES).iterdir()}
  assert names == {p.name for p in (other / TRACES).iterdir()}
  for name in names:
    assert (workdir / TRACES / name).read_bytes() == (
      other / TRACES / name
    ).read_bytes()
  # Half-written checkpoints are cleared away.
  assert list((workdir / "checkpoints").glob("unfinished_*")) == []


@pytest.mark.bits
@pytest.mark.slow
def test_killed_once(env, tmp_path):
  """From fresh weights; killed while the first checkpoint is written."""
  argv = lambda name: command(
    "train", tmp_path / name, **SETTINGS, **{"train.steps": 2}
  )
  run_to_its_end(env, argv("whole"))
  rows = runlog.read_metrics(tmp_path / "whole" / runlog.METRICS)
  assert all(row["grad_norm"] > 0 for row in rows[1:])
  seen = run_and_kill(env, argv("killed"), "checkpoint", 1, 0.02)
  assert seen is not None and seen[-1] == "checkpoint"
  run_to_its_end(env, argv("killed"))
  assert_same_run(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.slow
def test_adapters_killed(env, supervised, tmp_path):
  """Adapters alone are saved; the base is found again."""
  settings = long_run(supervised) | {"train.steps": 4, "lora.rank": 2}
  argv = lambda name: command("train", tmp_path / name, **settings)
  run_to_its_end(env, argv("whole"))
  rows = runlog.read_metrics(tmp_path / "whole" / runlog.METRICS)
  assert all(row["grad_norm"] > 0 for row in rows[1:])
  for phase, n in (("checkpoint", 1), ("update", 1), ("sampling", 1)):
    assert run_and_kill(env, argv("killed"), phase, n, 0.01) is not None
  run_to_its_end(env, argv("killed"))
  assert_same_run(tmp_path / "killed", tmp_path / "whole")


PHASES = ("evaluation", "sampling", "tools", "scoring", "update", "checkpoint")


@pytest.fixture(scope="module")
def supervised(env, tmp_path_factory):
  """A policy that calls the tool, well and badly."""
  path = tmp_path_factory.mktemp("supervised")
  settings = {"sft.steps": 120, "sft.n_demos": 64, "sft.lr": 5e-3}
  run_to_its_end(env, command("sft", path / "sft", **settings))
  return path


@pytest.fixture(scope="module")
def whole(env, supervised):
  path = supervised / "whole"
  run_to_its_end(env, command("train", path, **long_run(supervised)))
  rows = runlog.read_metrics(path / runlog.METRICS)[1:]
  assert all(row["tools/call_frequency"] > 0 for row in rows)
  assert all(row["grad_norm"] > 0 for row in rows)
  return path


def long_run(supervised):
  return {
    **SETTINGS,
    "train.steps": 8,
    "checkpoint.every": 2,
    "init_from": supervised / "sft",
  }


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_killed_in_every_phase(env, supervised, whole, tmp_path, seed):
  """One kill in each phase, in random order and at random moments of it."""
  draw = random.Random(seed)
  phases = list(PHASES)
  draw.shuffle(phases)
  argv = command("train", tmp_path, **long_run(supervised))
  struck = []
  for phase in phases:
    n = draw.choice((1, 2)) if phase in ("sampling", "update") else 1
    delay = draw.choice((0.0, 0.005, 0.03, 0.1)) * draw.random()
    if run_and_kill(env, argv, phase, n, delay) is not None:
      struck.append(phase)
  # A late start may find the run at its end before the phase comes again.
  assert len(struck) >= 4, struck
  run_to_its_end(env, argv)
  assert_same_run(tmp_path, whole)


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_killed_at_once_and_again(env, supervised, whole, tmp_path, phase):
  """Two kills in the same phase of the same step."""
  argv = command("train", tmp_path, **long_run(supervised))
  for delay in (0.0, 0.01):
    assert run_and_kill(env, argv, phase, 1, delay) is not None
  run_to_its_end(env, argv)
  assert_same_run(tmp_path, whole)


@pytest.mark.slow
def test_supervised_run_is_killed(env, supervised, tmp_path):
  """While demonstrations run in the sandbox, and while the policy learns."""
  settings = {"sft.steps": 120, "sft.n_demos": 64, "sft.lr": 5e-3}
  argv = command("sft", tmp_path, **settings)
  assert run_and_kill(env, argv, "tools", 20, 0.01) is not None
  assert not (tmp_path / "demonstrations.jsonl").exists()
  process = subprocess.Popen(
    [sys.executable, "-m", "roc.main", *argv],
    cwd=ROOT,
    env=env,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  try:
    metrics = tmp_path / runlog.METRICS
    deadline = time.monotonic() + 120
    while not metrics.exists() or len(metrics.read_bytes()) < 5000:
      assert process.poll() is None and time.monotonic() < deadline
      time.sleep(0.01)
  finally:
    process.kill()
    process.wait()
  run_to_its_end(env, argv)
  rows, rows_whole = (
    runlog.read_metrics(p / runlog.METRICS)
    for p in (tmp_path, supervised / "sft")
  )
  assert rows == rows_whole
