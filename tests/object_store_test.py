"""Runs, models and exports whose files are in an object store."""

import dataclasses
import json
import pathlib
import tempfile

import jax
import numpy as np
import pytest

from experiments import quickstart
from roc import (
  build,
  config,
  errors,
  hub,
  main,
  parameters,
  places,
  pretrained,
  sft,
  updates,
)
from roc.device import checkpoint, families, model, sharding, weights
from tests import stores

MODELS = pathlib.Path(__file__).parent / "golden" / "models"
STORE = "gs://bucket/run"


@pytest.fixture
def store(monkeypatch):
  with stores.serving(monkeypatch) as store:
    yield store


def settings(**changes):
  c = quickstart.get_config("tiny")
  values = {
    **{"sft.steps": 40, "sft.n_demos": 16, "sft.rows": 4, "sft.length": 160},
    **{"checkpoint.every": 1, "checkpoint.directory": STORE},
    **{"log.progress": False, "log.tensorboard": False, **changes},
  }
  for name, value in values.items():
    section, _, key = name.rpartition(".")
    setattr(getattr(c, section) if section else c, key, value)
  return config.resolve(c)


def copy(store, folder, place):
  """Puts the files of a folder where a URL says."""
  for path in folder.iterdir():
    store.put(f"{place.removeprefix('gs://')}/{path.name}", path.read_bytes())


def load(folder):
  policy = model.Policy(families.read(folder))
  return weights.load(folder, policy, sharding.make_mesh(1, 1, 1))


def assert_same(params, others):
  jax.tree.map(np.testing.assert_array_equal, params, others)


# ----------------------------------------------------------------------- runs


def final_state(directory, cfg):
  policy = build.make_policy(cfg, build.host_parts(cfg))
  abstract = updates.make_learner(cfg, policy).abstract_state.params
  checkpoints = checkpoint.Checkpoints(directory)
  return checkpoints.restore({"params": abstract}, is_partial=True)


class Killed(BaseException):
  pass


@pytest.mark.slow
def test_a_run_goes_on_on_another_machine(store, tmp_path, monkeypatch, capsys):
  """From the store alone: the first machine's workdir is gone."""
  local = settings(**{"checkpoint.directory": ""})
  sft.run(local, tmp_path / "local")
  cfg = settings()
  save = checkpoint.Checkpoints.save

  def killed(self, step, *args):
    save(self, step, *args)
    raise Killed

  with monkeypatch.context() as patch, pytest.raises(Killed):
    patch.setattr(checkpoint.Checkpoints, "save", killed)
    sft.run(cfg, tmp_path / "first")
  assert not (tmp_path / "first" / "checkpoints").exists()
  sft.run(cfg, tmp_path / "second")
  want = final_state(tmp_path / "local" / "checkpoints", local)
  found = final_state(STORE, cfg)
  assert want.step == found.step == 40
  assert_same(found.state, want.state)
  # Their rows are those of the steps that each took.
  rows = lambda place: [
    json.loads(line)
    for line in (tmp_path / place / "metrics.jsonl").read_text().splitlines()
  ]
  assert [row["step"] for row in rows("second")] == list(range(21, 41))
  assert rows("second") == rows("local")[20:]
  sft.run(cfg, tmp_path / "third")
  assert "all 40 steps are done" in capsys.readouterr().out


def test_a_store_belongs_to_one_run(store, tmp_path):
  host = build.host_parts(settings())
  claim = lambda cfg, name, program="train": build.claim(
    cfg, host, tmp_path / name, program
  )
  claim(settings(), "a").close()
  claim(settings(**{"checkpoint.keep": 5}), "b").close()
  other = settings(seed=8)
  with pytest.raises(errors.UserError, match="gs://.*another run: seed") as e:
    claim(other, "c")
  assert "--allow_config_change" in str(e.value)
  with pytest.raises(errors.UserError, match=r"program \(train -> sft\)"):
    claim(settings(), "d", "sft")
  # The workdir is free again.
  claim(dataclasses.replace(other, checkpoint=local()), "c").close()
  store.put("bucket/run/run.json", b"{")
  with pytest.raises(errors.UserError, match="is no record of a run"):
    claim(settings(), "a")


def local():
  return config.CheckpointConfig()


@pytest.mark.slow
def test_going_on_with_another_configuration(store, tmp_path, capsys):
  flags = [
    *("sft", "--config=experiments/quickstart.py:tiny"),
    *(f"--config.checkpoint.directory={STORE}", "--config.sft.n_demos=16"),
    *("--config.sft.steps=2", "--config.log.progress=False"),
    *("--config.log.tensorboard=False", f"--workdir={tmp_path}/run"),
  ]
  assert main.main(flags) == 0
  flags.append("--config.sft.lr=1e-3")
  assert main.main(flags) == 2
  assert "belongs to another configuration" in capsys.readouterr().err
  assert main.main([*flags, "--allow_config_change"]) == 0
  assert main.main([*flags, "--workdir=gs://bucket/work"]) == 2
  assert "must be a directory of this machine" in capsys.readouterr().err


def test_a_store_that_cannot_be_written_is_noticed_first(store, tmp_path):
  store.fail_after = 0
  with pytest.raises(errors.UserError, match="gs://bucket/run cannot be wr"):
    sft.run(settings(), tmp_path / "run")
  assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_another_run_starts_from_the_store(store, tmp_path):
  cfg = settings(**{"sft.steps": 2})
  sft.run(cfg, tmp_path / "run")
  want = final_state(STORE, cfg).state["params"]
  policy = build.make_policy(cfg, build.host_parts(cfg))
  mesh = build.make_mesh(cfg)
  for source in (STORE, str(tmp_path / "run")):
    new = settings(**{"checkpoint.directory": "", "init_from": source})
    assert_same(parameters.first_params(new, policy, mesh), want)
  loaded = parameters.load_policy(cfg, tmp_path / "run", policy, mesh)
  assert_same(loaded.params, want)
  assert "gs://bucket/run/step_00000002" in loaded.where


# --------------------------------------------------------------------- models


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_weights_are_read_from_a_store(store, tmp_path, monkeypatch, name):
  """With a copy of one file at a time on this machine."""
  want = load(MODELS / name)
  policy = model.Policy(families.read(MODELS / name))
  folder = tmp_path / "model"
  weights.export(
    want, policy.config, folder, dtype="float32", shard_bytes=40_000
  )
  n_files = len(list(folder.glob("*.safetensors")))
  copy(store, folder, "gs://bucket/models/x")
  monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
  (tmp_path / "scratch").mkdir()
  copy_file, most = places.copy_file, []

  def counted(source, target):
    copy_file(source, target)
    held = [p for p in (tmp_path / "scratch").rglob("*") if p.is_file()]
    most.append(len(held))

  monkeypatch.setattr(places, "copy_file", counted)
  assert_same(load("gs://bucket/models/x"), want)
  assert n_files > 2 and most == [1] * n_files
  assert list((tmp_path / "scratch").iterdir()) == []


def test_bad_folders_of_a_store(store):
  place = "gs://bucket/models/x"
  with pytest.raises(errors.UserError, match="x/config.json cannot be read"):
    load(place)
  copy(store, MODELS / "qwen3", place)
  key = "bucket/models/x/model.safetensors"
  whole = store.objects[key]
  store.put(key, whole[:-1])
  with pytest.raises(errors.UserError, match="gs://.*is no whole safetensors"):
    load(place)
  store.delete(key)
  with pytest.raises(errors.UserError, match="x holds neither model.safe"):
    load(place)


def order_of(store, prefix):
  keys = [key for key in store.objects if key.startswith(prefix)]
  names = sorted(keys, key=lambda key: store.generations[key])
  return [name.rpartition("/")[2] for name in names]


def test_weights_are_written_to_a_store(store, tmp_path):
  """config.json, without which it is no model, last."""
  policy = model.Policy(families.read(MODELS / "qwen3"))
  want = load(MODELS / "qwen3")
  place = "gs://bucket/models/x"
  options = {"dtype": "float32", "shard_bytes": 40_000}
  weights.export(want, policy.config, place, **options)
  names = order_of(store, "bucket/models/x/")
  n = len(names) - 2
  assert names == [
    *(f"model-{i:05}-of-{n:05}.safetensors" for i in range(1, n + 1)),
    *("model.safetensors.index.json", "config.json"),
  ]
  assert_same(load(place), want)
  with pytest.raises(errors.UserError, match="gs://bucket/models/x exists"):
    weights.export(want, policy.config, place)
  store.fail_after = n
  with pytest.raises(errors.UserError, match="models/y cannot be written"):
    weights.export(want, policy.config, "gs://bucket/models/y", **options)
  assert order_of(store, "bucket/models/y/") == []


@pytest.fixture
def run_of_qwen3(store, tmp_path):
  """A run of a published model, its checkpoint in the store."""
  c = config.default_config()
  c.pretrained = "experiments/tiny_qwen3"
  c.checkpoint.directory = STORE
  cfg = pretrained.settle(config.resolve(c))
  policy = build.make_policy(cfg, build.host_parts(cfg))
  draw = lambda x: np.random.default_rng(x.size).normal(size=x.shape)
  params = jax.tree.map(
    lambda x: jax.numpy.asarray(draw(x), x.dtype), policy.abstract_params
  )
  (tmp_path / "run").mkdir()
  (tmp_path / "run" / "config.json").write_text(config.to_json(cfg))
  build.checkpoints(cfg, tmp_path / "run").save(3, {"params": params}, {})
  return tmp_path / "run", params


@pytest.mark.slow
def test_from_a_store_to_a_store(store, run_of_qwen3, capsys):
  """Exported, then the model of a run, of `score` and of `parse`."""
  workdir, params = run_of_qwen3
  place = "gs://bucket/models/mine"
  flags = f"--workdir={workdir}", f"--output={place}", "--dtype=float32"
  assert main.main(["export", *flags, "--json"]) == 0
  found = json.loads(capsys.readouterr().out)
  assert found["output"] == place and found["checkpoint"].startswith("step 3")
  prefix = "bucket/models/mine/"
  sizes = [len(v) for k, v in store.objects.items() if k.startswith(prefix)]
  assert found["bytes"] == sum(sizes)
  assert order_of(store, prefix)[-1] == "config.json"

  c = config.default_config()
  c.pretrained = place
  cfg = pretrained.settle(config.resolve(c))
  host = build.host_parts(cfg)
  policy = build.make_policy(cfg, host)
  mesh = build.make_mesh(cfg)
  assert_same(parameters.first_params(cfg, policy, mesh), params)
  c.pretrained, c.init_from = "experiments/tiny_qwen3", place
  cfg = pretrained.settle(config.resolve(c))
  assert_same(parameters.first_params(cfg, policy, mesh), params)

  ids = workdir.parent / "ids.jsonl"
  ids.write_text('{"ids": [1, 5, 9, 2]}\n')
  capsys.readouterr()
  both = []
  for folder in (place, "gs://bucket/models/none"):
    flags = ["score", f"--model={folder}", f"--input={ids}", "--json"]
    both.append((main.main(flags), capsys.readouterr()))
  assert [code for code, _ in both] == [0, 2]
  assert len(json.loads(both[0][1].out)["logprobs"]) == 4
  assert "models/none/config.json cannot be read" in both[1][1].err
  flags = ["generate", f"--model={place}", "--ids=1,5", "--max_tokens=3"]
  assert main.main([*flags, "--json"]) == 0
  assert json.loads(capsys.readouterr().out)["ids"]
  with pytest.raises(errors.UserError, match="models/none does not exist"):
    hub.fetch("gs://bucket/models/none")
