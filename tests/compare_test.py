import dataclasses
import json
import types

import pytest

from roc import compare, curves, errors, report
from tests import runs


def _write_all(workdir, n_seeds=3):
  for i, arm in enumerate(compare.ARMS):
    for seed in range(n_seeds):
      runs.write_metrics(
        workdir / arm.name / f"seed_{seed}",
        rate=0.05 * (i + 1),
        drawn=128 if arm.mode == "none" else 256,
        offset=0.01 * seed,
      )


def test_files_and_table(tmp_path):
  _write_all(tmp_path)
  compare.write(tmp_path)
  for ending in ("html", "svg", "png", "json", "md"):
    assert (tmp_path / f"comparison.{ending}").stat().st_size > 500
  values = json.loads((tmp_path / "comparison.json").read_text())
  assert list(values) == [arm.name for arm in compare.ARMS]
  accuracy = values["uniform"][report.ACCURACY]
  assert accuracy["step"] == [0, 10, 20]
  assert accuracy["rollouts_drawn"] == [0, 2560, 5120]
  assert accuracy["seeds"] == [3, 3, 3]
  lines = (tmp_path / "comparison.md").read_text().splitlines()
  assert [line.split("|")[1].strip() for line in lines[2:7]] == [
    "start",
    "GRPO",
    "uniform",
    "RoC sort",
    "RoC inverse",
  ]
  assert "2,560" in lines[3]  # 20 steps of 128
  assert "mean over 3 seeds" in lines[-1]


def test_arms_that_are_missing_are_left_out(tmp_path):
  runs.write_metrics(tmp_path / "uniform" / "seed_10")
  runs.write_metrics(tmp_path / "uniform" / "seed_9", n_steps=10)
  loaded = compare.load(tmp_path)
  assert list(loaded) == ["uniform"]
  assert [rows[-1]["step"] for rows in loaded["uniform"]] == [10, 20]
  compare.write(tmp_path)
  with pytest.raises(errors.UserError, match="is this the workdir"):
    compare.load(tmp_path / "absent")


@dataclasses.dataclass(frozen=True)
class _Filter:
  mode: str = "sort"
  n_drawn: int = 16
  n_kept: int = 8


@dataclasses.dataclass(frozen=True)
class _Train:
  steps: int = 20


@dataclasses.dataclass(frozen=True)
class _Compare:
  seeds: int = 3


@dataclasses.dataclass(frozen=True)
class _Checkpoint:
  directory: str = ""


@dataclasses.dataclass(frozen=True)
class _Config:
  seed: int = 5
  init_from: str = ""
  filter: _Filter = _Filter()
  train: _Train = _Train()
  compare: _Compare = _Compare()
  checkpoint: _Checkpoint = _Checkpoint()


def test_all_arms_start_from_one_policy_and_finished_runs_are_kept(
  tmp_path, monkeypatch
):
  trained = []

  def train(cfg, workdir):
    trained.append((workdir.parent.name, cfg.seed, cfg.filter, cfg.init_from))
    runs.write_metrics(workdir, n_steps=cfg.train.steps)

  programs = {
    "sft": types.SimpleNamespace(run=lambda cfg, workdir: workdir.mkdir()),
    "train": types.SimpleNamespace(run=train),
  }
  monkeypatch.setattr(compare, "_program", programs.__getitem__)
  runs.write_metrics(tmp_path / "roc_sort" / "seed_5", n_steps=20)
  runs.write_metrics(tmp_path / "uniform" / "seed_6", n_steps=10)  # half-way
  compare.run(_Config(), tmp_path)
  assert len(trained) == 11
  assert ("roc_sort", 5) not in [t[:2] for t in trained]
  assert {t[3] for t in trained} == {str(tmp_path / "sft")}
  filters = {name: row_filter for name, _, row_filter, _ in trained}
  assert (filters["grpo"].mode, filters["grpo"].n_drawn) == ("none", 8)
  assert (filters["uniform"].mode, filters["uniform"].n_drawn) == (
    "uniform",
    16,
  )
  assert {row_filter.n_kept for row_filter in filters.values()} == {8}
  assert sorted({t[1] for t in trained}) == [5, 6, 7]
  assert (tmp_path / "comparison.html").exists()
  trained.clear()
  compare.run(_Config(init_from="elsewhere"), tmp_path)
  assert trained == []


def test_every_run_has_a_place_of_its_own_in_a_store(tmp_path, monkeypatch):
  used = []

  def note(cfg, workdir):
    used.append(cfg.checkpoint.directory)
    runs.write_metrics(workdir, n_steps=cfg.train.steps)

  monkeypatch.setattr(
    compare, "_program", lambda name: types.SimpleNamespace(run=note)
  )
  store = _Checkpoint("gs://bucket/comparison/")
  compare.run(_Config(compare=_Compare(seeds=2), checkpoint=store), tmp_path)
  assert len(used) == len(set(used)) == 1 + 2 * len(compare.ARMS)
  assert used[0] == "gs://bucket/comparison/sft"
  assert "gs://bucket/comparison/uniform/seed_6" in used


def test_a_run_is_finished_when_its_last_step_is_evaluated(tmp_path):
  assert not compare.is_finished(tmp_path, 20)
  runs.write_metrics(tmp_path, n_steps=19, every=10)
  assert not compare.is_finished(tmp_path, 19)
  runs.write_metrics(tmp_path, n_steps=20, every=10)
  assert compare.is_finished(tmp_path, 20)
  rows = curves.read(tmp_path / "metrics.jsonl")
  assert rows[-1]["step"] == 20
