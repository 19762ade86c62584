"""`roc.main export`: a policy as a folder that loads elsewhere."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import quickstart
from roc import build, config, export, main, pretrained
from roc.device import checkpoint, families, model, sharding, weights
from roc.host import pretrained as tokenizers_lib
from roc.host import tokenizer as tokenizer_lib


def save_run(workdir, cfg, steps=(3,)):
  """What a run leaves: a record and checkpoints, each with other numbers."""
  policy = build.make_policy(cfg, build.host_parts(cfg))
  workdir.mkdir()
  (workdir / "config.json").write_text(config.to_json(cfg))
  for step in steps:
    rng = np.random.default_rng(step)
    draw = lambda x, rng=rng: jnp.asarray(rng.standard_normal(x.shape), x.dtype)
    state = {"params": jax.tree.map(draw, policy.abstract_params)}
    checkpoint.Checkpoints(workdir / "checkpoints").save(step, state, {})
  return state["params"]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
  path = tmp_path_factory.mktemp("quick") / "run"
  cfg = config.resolve(quickstart.get_config("tiny"))
  return path, save_run(path, cfg, steps=(3, 5))


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
  path = tmp_path_factory.mktemp("qwen3") / "run"
  c = config.default_config()
  c.pretrained = "experiments/tiny_qwen3"
  cfg = pretrained.settle(config.resolve(c))
  return path, save_run(path, cfg)


def run(capsys, *flags):
  code = main.main(["export", *map(str, flags)])
  out, err = capsys.readouterr()
  return code, out, err


def load(folder):
  policy = model.Policy(families.read(folder))
  return weights.load(folder, policy, sharding.make_mesh(1, 1, 1))


def assert_same(params, others):
  for a, b in zip(
    jax.tree.leaves(params), jax.tree.leaves(others), strict=True
  ):
    np.testing.assert_array_equal(a, b)


def test_a_run_of_our_own_tokenizer(quick, tmp_path, capsys):
  workdir, params = quick
  out = tmp_path / "deep" / "model"
  code, text, _ = run(
    capsys, f"--workdir={workdir}", f"--output={out}", "--dtype=float32"
  )
  assert code == 0 and "step 5" in text and "float32" in text
  assert_same(load(out), params)
  tokenizer = tokenizers_lib.load_tokenizer(out)
  host = build.host_parts(config.resolve(quickstart.get_config("tiny")))
  assert tokenizer.fingerprint == host.tokenizer.fingerprint
  assert tokenizer.published.eos_ids == host.chat.stop_ids
  assert [p.name for p in out.parent.iterdir()] == ["model"]


def test_an_older_checkpoint_as_json(quick, tmp_path, capsys):
  workdir, newest = quick
  out = tmp_path / "model"
  code, text, err = run(
    capsys, f"--workdir={workdir}", f"--output={out}", "--step=3", "--json"
  )
  found = json.loads(text)
  assert (code, err, found["dtype"]) == (0, "", "bfloat16")
  assert found["checkpoint"].startswith("step 3, ")
  assert found["bytes"] == sum(p.stat().st_size for p in out.iterdir())
  exported = load(out)
  assert not np.array_equal(
    exported["embed"]["embedding"], newest["embed"]["embedding"]
  )


def test_checkpoints_may_lie_elsewhere(tmp_path, capsys):
  """Whoever has the workdir finds them."""
  c = quickstart.get_config("tiny")
  c.checkpoint.directory = str(tmp_path / "store")
  cfg = config.resolve(c)
  params = save_run(tmp_path / "run", cfg)
  (tmp_path / "run" / "checkpoints").rename(tmp_path / "store")
  assert build.checkpoints(cfg, tmp_path / "run").steps() == [3]
  out = tmp_path / "model"
  flags = f"--workdir={tmp_path}/run", f"--output={out}", "--dtype=float32"
  assert run(capsys, *flags)[0] == 0
  assert_same(load(out), params)


@pytest.mark.slow
def test_a_published_model_keeps_its_files(qwen3, tmp_path, capsys):
  """And starts the next run: shapes, tokenizer, template, weights."""
  workdir, params = qwen3
  out = tmp_path / "model"
  flags = f"--workdir={workdir}", f"--output={out}", "--dtype=float32"
  assert run(capsys, *flags)[0] == 0
  fields = json.loads((out / "config.json").read_text())
  assert fields["max_position_embeddings"] == 32768
  assert fields["torch_dtype"] == "float32"
  c = config.default_config()
  c.pretrained = str(out)
  again = pretrained.settle(config.resolve(c))
  host = build.host_parts(again)
  prompt = host.chat.prompt_ids("1 + 1?")
  c.pretrained = "experiments/tiny_qwen3"
  first = build.host_parts(config.resolve(c))
  assert prompt == first.chat.prompt_ids("1 + 1?")
  assert host.chat.stop_ids == first.chat.stop_ids
  assert_same(load(out), params)


def test_mistakes(quick, tmp_path, capsys):
  workdir, _ = quick
  there = tmp_path / "there"
  there.mkdir()
  (tmp_path / "file").write_text("")
  moved = tmp_path / "moved"
  shutil.copytree(workdir, moved)
  shutil.rmtree(moved / "checkpoints")
  out = tmp_path / "new"
  for flags, said in (
    ((f"--workdir={workdir}",), "required: --output"),
    ((f"--workdir={tmp_path}/no", f"--output={out}"), "no/config.json"),
    ((f"--workdir={workdir}", f"--output={there}"), "there exists"),
    ((f"--workdir={workdir}", f"--output={tmp_path}/file/x"), "file/x cannot"),
    (
      (f"--workdir={workdir}", f"--output={out}", "--step=9"),
      "no checkpoint of step 9",
    ),
    ((f"--workdir={moved}", f"--output={out}"), "no checkpoint under"),
    ((f"--workdir={workdir}", f"--output={out}", "--step=x"), "invalid int"),
  ):
    code, text, err = run(capsys, *flags)
    assert (code, text) == (2, "") and err.count("\n") == 1
    assert said in err, err
  assert not out.exists() and not list(tmp_path.glob(".*"))


def test_the_ids_that_a_run_was_taught_to_end_by(tmp_path):
  """A base model ends texts only; the run's chat format ends turns."""
  source, side = tmp_path / "base", tmp_path / "side"
  source.mkdir()
  side.mkdir()
  tokenizer = tokenizer_lib.quickstart_tokenizer()
  tokenizer.save(source / "tokenizer.json")
  text = tokenizer.special_id("<|endoftext|>")
  generation = {"eos_token_id": text, "max_new_tokens": 7}
  (source / "generation_config.json").write_text(json.dumps(generation))
  cfg = config.resolve(quickstart.get_config("tiny"))
  bindings = ("host.chat = @TemplateChat", "TemplateChat.template = 'rstar2'")
  host = dataclasses.replace(cfg.host, gin_files=(), gin_bindings=bindings)
  cfg = dataclasses.replace(cfg, host=host)
  export.copy_side_files(cfg, source, side)
  found = json.loads((side / "generation_config.json").read_text())
  assert found["eos_token_id"] == [text, tokenizer.special_id("<|im_end|>")]
  assert found["max_new_tokens"] == 7
  # What ends turns already is left as it is.
  generation["eos_token_id"] = found["eos_token_id"]
  (source / "generation_config.json").write_text(json.dumps(generation))
  export.copy_side_files(cfg, source, side)
  assert json.loads((side / "generation_config.json").read_text()) == generation
