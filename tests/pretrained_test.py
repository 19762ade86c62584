"""Runs that start from a Hugging Face folder."""

import dataclasses
import json
import pathlib
import re

import jax
import numpy as np
import pytest

from roc import build, config, errors, main, parameters, pretrained, updates
from roc.device import model, sharding, weights
from roc.host import template_chat
from roc.host import tokenizer as tokenizer_lib

TINY_QWEN3 = "experiments/tiny_qwen3"
TEMPLATE = (
  "{%- for t in tools or [] -%}{{ t | tojson ~ '\n' }}{%- endfor -%}"
  "{%- for m in messages -%}"
  "{{ '<|im_start|>' + m.role + '\n' + m.content }}"
  "{%- for c in m.tool_calls or [] -%}"
  "{{ '<tool_call>' ~ (c.function | tojson) ~ '</tool_call>' }}"
  "{%- endfor -%}{{ '<|im_end|>\n' }}{%- endfor -%}"
  "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
SHAPES = model.ModelConfig(
  vocab_size=512,  # padded: the tokenizer has fewer
  d_model=32,
  n_layers=2,
  n_heads=2,
  n_kv_heads=1,
  head_dim=16,
  d_ff=64,
  rope_theta=1e6,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A published model: weights, tokenizer, template."""
  path = tmp_path_factory.mktemp("published") / "model"
  policy = model.Policy(SHAPES)
  params = jax.jit(policy.init)(jax.random.key(5))
  weights.export(params, SHAPES, path, dtype="float32")
  tokenizer_lib.quickstart_tokenizer().save(path / "tokenizer.json")
  side = {"chat_template": TEMPLATE, "eos_token": "<|im_end|>"}
  (path / "tokenizer_config.json").write_text(json.dumps(side))
  return path


def resolved(**changes):
  c = config.default_config()
  c.sampling.cache_length = 256
  for name, value in changes.items():
    section, _, key = name.rpartition("__")
    setattr(getattr(c, section) if section else c, key, value)
  return config.resolve(c)


def test_shapes_are_taken_over(folder):
  cfg = pretrained.settle(resolved(pretrained=str(folder), model__remat="full"))
  assert cfg.model.d_model == 32 and cfg.model.rope_theta == 1e6
  assert cfg.model.remat == "full"
  assert pretrained.settle(cfg) == cfg
  plain = resolved()
  assert pretrained.settle(plain) is plain


def test_a_dry_run_shows_them(folder, capsys):
  argv = ["train", "--config=experiments/qwen3_0p6b_gsm8k.py:tiny"]
  argv += ["--dry_run", f"--config.pretrained={folder}"]
  assert main.main(argv) == 0
  shown = capsys.readouterr().out
  assert re.search(r"^config.model.d_model = 32$", shown, re.M)
  assert main.main([*argv, "--config.model.d_model=48"]) == 2
  assert "config.model.d_model is 48" in capsys.readouterr().err
  argv[-1] = "--config.pretrained=org/elsewhere"
  assert main.main(argv) == 0
  assert "see org/elsewhere" in capsys.readouterr().out


def test_what_does_not_fit_the_folder_is_said(folder):
  for changes, said in (
    ({"model__d_model": 96}, "config.model.d_model is 96 and .* has 32"),
    ({"model__qkv_bias": True}, "config.model.qkv_bias is True"),
  ):
    with pytest.raises(errors.UserError, match=said):
      pretrained.settle(resolved(pretrained=str(folder), **changes))
  mesh = config.MeshConfig(fsdp=64)  # which the default width suits
  cfg = dataclasses.replace(resolved(pretrained=str(folder)), mesh=mesh)
  with pytest.raises(errors.UserError, match=r"d_model .32. must be a multip"):
    pretrained.settle(cfg)


def test_a_folder_that_is_none(tmp_path):
  with pytest.raises(errors.UserError, match="nowhere does not exist"):
    pretrained.settle(resolved(pretrained=str(tmp_path / "nowhere")))
  with pytest.raises(errors.UserError, match="config.json cannot be read"):
    pretrained.settle(resolved(pretrained=str(tmp_path)))


def test_tokenizer_and_template_are_the_folder_s(folder):
  cfg = pretrained.settle(resolved(pretrained=str(folder)))
  host = build.host_parts(cfg)
  assert isinstance(host.chat, template_chat.TemplateChat)
  ids = host.chat.prompt_ids("1 + 1?")
  text = "<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n"
  assert host.tokenizer.decode(ids).endswith(text)
  policy = build.make_policy(cfg, host)
  assert policy.n_ids == host.tokenizer.vocab_size < policy.config.vocab_size


def test_the_real_qwen3_tokenizer_offers_the_tool():
  cfg = pretrained.settle(resolved(pretrained=TINY_QWEN3))
  host = build.host_parts(cfg)
  policy = build.make_policy(cfg, host)
  assert (policy.n_ids, policy.config.vocab_size) == (151_669, 151_936)
  text = host.tokenizer.decode(host.chat.prompt_ids("1 + 1?"))
  assert '"name": "python"' in text and "<tools>" in text


def test_another_tokenizer_than_the_model_s(folder, tmp_path):
  copy = tmp_path / "small"
  copy.mkdir()
  for path in folder.iterdir():
    (copy / path.name).write_bytes(path.read_bytes())
  fields = json.loads((copy / "config.json").read_text())
  (copy / "config.json").write_text(json.dumps(fields | {"vocab_size": 100}))
  cfg = pretrained.settle(resolved(pretrained=str(copy)))
  with pytest.raises(errors.UserError, match="do not belong together"):
    build.make_policy(cfg, build.host_parts(cfg))


def first_params(**changes):
  cfg = pretrained.settle(resolved(**changes))
  policy = build.make_policy(cfg, build.host_parts(cfg))
  learner = updates.make_learner(cfg, policy)
  return parameters.first_state(cfg, learner).params


def test_the_first_parameters(folder):
  """The folder's; fresh ones if asked for; another folder's by init_from."""
  want = weights.load(folder, model.Policy(SHAPES), sharding.make_mesh(1, 1, 1))
  same = lambda a, b: all(
    map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b))
  )
  source = str(folder)
  assert same(first_params(pretrained=source), want)
  assert same(first_params(pretrained=source, init_from=source), want)
  fresh = first_params(pretrained=source, init_from=pretrained.RANDOM)
  assert not same(fresh, want)


def test_a_folder_without_weights():
  with pytest.raises(errors.UserError, match="holds no weights.*random"):
    first_params(pretrained=TINY_QWEN3)


def test_relative_paths_are_found_from_elsewhere(monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  found = pretrained.folder(resolved(pretrained=TINY_QWEN3))
  assert found == pathlib.Path(__file__).parents[1] / TINY_QWEN3


def test_a_cache_longer_than_the_model_is_made_for(folder, tmp_path):
  copy = tmp_path / "short"
  copy.mkdir()
  for path in folder.iterdir():
    (copy / path.name).write_bytes(path.read_bytes())
  fields = json.loads((copy / "config.json").read_text())
  fields["max_position_embeddings"] = 128
  (copy / "config.json").write_text(json.dumps(fields))
  note = pretrained.length_note(resolved(pretrained=str(copy)))
  assert note is not None and "cache_length is 256" in note and "128" in note
  fields["max_position_embeddings"] = 256
  (copy / "config.json").write_text(json.dumps(fields))
  assert pretrained.length_note(resolved(pretrained=str(copy))) is None
  assert pretrained.length_note(resolved(pretrained=str(folder))) is None
  assert pretrained.length_note(resolved()) is None
