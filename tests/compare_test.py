import dataclasses
import json
import types

import pytest

from experiments import roc_vs_grpo
from roc import build, compare, config, curves, errors, lessons, report
from tests import runs

SEEDS = range(5, 8)


@pytest.fixture(scope="module")
def cfg():
  values = roc_vs_grpo.get_config("tiny")
  values.seed, values.compare.seeds, values.train.steps = 5, 3, 20
  return config.resolve(values)


@pytest.fixture(scope="module")
def host(cfg):
  return build.host_parts(cfg)


def _write_all(workdir, n_seeds=3):
  for i, arm in enumerate(compare.ARMS):
    for seed in range(5, 5 + n_seeds):
      runs.write_metrics(
        workdir / arm.name / f"seed_{seed}",
        rate=0.05 * (i + 1),
        drawn=256 if arm.draws_more else 128,
        offset=0.01 * seed,
      )


def test_files_and_tables(tmp_path):
  _write_all(tmp_path)
  compare.write(tmp_path, SEEDS)
  for ending in ("html", "svg", "png", "json", "md"):
    assert (tmp_path / f"comparison.{ending}").stat().st_size > 500
  values = json.loads((tmp_path / "comparison.json").read_text())
  assert list(values) == [arm.name for arm in compare.ARMS]
  accuracy = values["uniform"][report.ACCURACY]
  assert accuracy["step"] == [0, 10, 20]
  assert accuracy["rollouts_drawn"] == [0, 2560, 5120]
  assert accuracy["tokens_sampled"] == [0, 50 * 2560, 50 * 5120]
  assert accuracy["seeds"] == [3, 3, 3]
  text = (tmp_path / "comparison.md").read_text()
  assert [line for line in text.splitlines() if line.startswith("At ")] == [
    "At 20 updates:",
    "At 2,560 rollouts drawn:",
    "At 128,000 tokens sampled:",
  ]
  assert "mean over 3 seeds" in text.splitlines()[-1]


def test_arms_are_compared_at_equal_amounts(tmp_path):
  _write_all(tmp_path)
  loaded = compare.load(tmp_path, SEEDS)
  tables = [compare.equal_table(loaded, b) for b in compare.BUDGETS]
  for table in tables:
    assert [line[0] for line in table.body] == [
      "start",
      *(arm.label for arm in compare.ARMS),
    ]
  costs = [{line[0]: line[1:3] for line in table.body[1:]} for table in tables]
  assert costs[0]["GRPO"] == ["2,560", "128,000"]
  assert costs[0]["RoC sort"] == ["5,120", "256,000"]
  # At what GRPO spends in 20 updates the others have made half as many.
  for equal, spent in zip(costs[1:], ("128,000", "2,560"), strict=True):
    assert equal["GRPO"] == ["20", spent]
    assert equal["RoC sort"] == ["10", spent]
  # By hand: accuracy at step 10 of the arm at place 5, offsets 0.05 to 0.07.
  accuracy = 0.97 - 0.4 * 2.718281828 ** (-0.3 * 10) + 0.06
  line = next(line for line in tables[1].body if line[0] == "RoC sort")
  assert line[3].split(" ± ")[0] == f"{100 * accuracy:.1f}"


def test_arms_that_are_missing_are_left_out(tmp_path):
  runs.write_metrics(tmp_path / "uniform" / "seed_10")
  runs.write_metrics(tmp_path / "uniform" / "seed_9", n_steps=10)
  loaded = compare.load(tmp_path, range(9, 11))
  assert list(loaded) == ["uniform"]
  assert [rows[-1]["step"] for rows in loaded["uniform"]] == [10, 20]
  compare.write(tmp_path, range(9, 11))
  with pytest.raises(errors.UserError, match="is this the workdir"):
    compare.load(tmp_path / "absent", SEEDS)


def test_runs_of_other_seeds_are_not_reported(tmp_path):
  _write_all(tmp_path, n_seeds=4)
  assert {len(r) for r in compare.load(tmp_path, SEEDS).values()} == {3}


def _stand_ins(monkeypatch, host):
  """Programs that claim their workdir and invent metrics; what they ran."""
  started = []

  def start(program, cfg, workdir):
    data = lessons.identity(cfg) if program == "sft" else {}
    with build.claim(cfg, host, workdir, program, data):
      started.append((program, workdir, cfg))
      if program == "train":
        runs.write_metrics(workdir, n_steps=cfg.train.steps)

  monkeypatch.setattr(
    compare,
    "_program",
    lambda name: types.SimpleNamespace(
      run=lambda cfg, workdir: start(name, cfg, workdir)
    ),
  )
  return started


def test_each_seed_has_its_own_policy_and_finished_runs_are_kept(
  cfg, host, tmp_path, monkeypatch
):
  started = _stand_ins(monkeypatch, host)
  compare.run(cfg, tmp_path)
  assert len(started) == 3 * (1 + len(compare.ARMS))
  trained = {
    (path.parent.name, cfg.seed): cfg
    for program, path, cfg in started
    if program == "train"
  }
  for (_, seed), run_cfg in trained.items():
    assert run_cfg.init_from == str(tmp_path / "sft" / f"seed_{seed}")
  supervised = [cfg.seed for program, _, cfg in started if program == "sft"]
  assert supervised == [5, 6, 7]
  n = {
    name: (run_cfg.filter.mode, run_cfg.filter.n_drawn, run_cfg.filter.n_kept)
    for (name, _), run_cfg in trained.items()
  }
  assert n == {
    "grpo": ("none", 2, 2),
    "grpo_2g": ("none", 4, 4),
    "uniform": ("uniform", 4, 2),
    "stratified": ("stratified", 4, 2),
    "balanced": ("balanced", 4, 2),
    "roc_sort": ("sort", 4, 2),
    "roc_inverse": ("inverse", 4, 2),
  }
  assert (tmp_path / "comparison.html").exists()
  started.clear()
  compare.run(cfg, tmp_path)
  assert started == []
  # Half-way, or not there: trained again, from the policy of its seed.
  runs.write_metrics(tmp_path / "uniform" / "seed_6", n_steps=10)
  compare.run(cfg, tmp_path)
  assert [path.parent.name for _, path, _ in started] == ["sft", "uniform"]


def test_a_policy_that_is_given_is_where_all_seeds_start(
  cfg, host, tmp_path, monkeypatch
):
  started = _stand_ins(monkeypatch, host)
  compare.run(dataclasses.replace(cfg, init_from="elsewhere"), tmp_path)
  assert {program for program, _, _ in started} == {"train"}
  assert {cfg.init_from for _, _, cfg in started} == {"elsewhere"}


def test_runs_of_another_configuration_are_an_error(
  cfg, host, tmp_path, monkeypatch
):
  started = _stand_ins(monkeypatch, host)
  compare.run(cfg, tmp_path)
  started.clear()
  warmer = dataclasses.replace(
    cfg, sampling=dataclasses.replace(cfg.sampling, temperature=0.7)
  )
  with pytest.raises(errors.UserError) as e:
    compare.run(warmer, tmp_path)
  assert "sampling.temperature (1.0 -> 0.7) differ" in str(e.value)
  assert "give compare another --workdir" in str(e.value)
  assert started == []


def test_replays_are_refused(cfg, tmp_path):
  train = dataclasses.replace(cfg.train, replay=str(tmp_path))
  with pytest.raises(errors.UserError, match="leave config.train.replay"):
    compare.run(dataclasses.replace(cfg, train=train), tmp_path)


def test_every_run_has_a_place_of_its_own_in_a_store(
  cfg, host, tmp_path, monkeypatch
):
  started = _stand_ins(monkeypatch, host)
  store = dataclasses.replace(
    cfg.checkpoint, directory=str(tmp_path / "store") + "/"
  )
  compare.run(dataclasses.replace(cfg, checkpoint=store), tmp_path / "here")
  used = [cfg.checkpoint.directory for _, _, cfg in started]
  assert len(used) == len(set(used)) == 3 * (1 + len(compare.ARMS))
  assert used[0] == f"{tmp_path}/store/sft/seed_5"
  assert f"{tmp_path}/store/uniform/seed_6" in used


def test_a_run_is_trained_when_its_last_step_is_evaluated(cfg, tmp_path):
  job = compare.Job("train", cfg, tmp_path)
  assert not compare._is_trained(job)
  runs.write_metrics(tmp_path, n_steps=19, every=10)
  assert not compare._is_trained(job)
  runs.write_metrics(tmp_path, n_steps=20, every=10)
  assert compare._is_trained(job)
  rows = curves.read(tmp_path / "metrics.jsonl")
  assert rows[-1]["step"] == 20
