"""config.json of published models, and what is not supported."""

import json
import pathlib

import jax
import numpy as np
import pytest

from roc import errors
from roc.device import families, model

MODELS = pathlib.Path(__file__).parents[1] / "golden" / "models"
# Parameters as the model cards and `safetensors` totals have them.
N_PARAMS = {
  "Qwen/Qwen3-0.6B": 596_049_920,
  "Qwen/Qwen3-1.7B": 1_720_574_976,
  "Qwen/Qwen3-4B": 4_022_468_096,
  "Qwen/Qwen3-8B": 8_190_735_360,
  "Qwen/Qwen3-14B": 14_768_307_200,
  "Qwen/Qwen2.5-0.5B": 494_032_768,
  "Qwen/Qwen2.5-1.5B": 1_543_714_304,
  "Qwen/Qwen2.5-3B": 3_085_938_688,
  "Qwen/Qwen2.5-7B": 7_615_616_512,
  "Qwen/Qwen2.5-14B": 14_770_033_664,
  "meta-llama/Llama-3.2-1B": 1_235_814_400,
  "meta-llama/Llama-3.2-3B": 3_212_749_824,
  "meta-llama/Llama-3.1-8B": 8_030_261_248,
}


@pytest.mark.parametrize("name", families.PUBLISHED)
def test_published_models_have_as_many_parameters(name):
  params = model.Policy(families.PUBLISHED[name]).abstract_params
  n = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(params))
  assert n == N_PARAMS[name]


def fields_of(name, **changes):
  return json.loads((MODELS / name / "config.json").read_text()) | changes


def read(tmp_path, fields):
  (tmp_path / "config.json").write_text(json.dumps(fields))
  return families.read(tmp_path)


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama"])
def test_written_configs_read_the_same(tmp_path, name):
  config = families.read(MODELS / name)
  fields = families.to_fields(config, "bfloat16")
  assert read(tmp_path, fields) == config


def test_switches_of_the_families():
  qwen2, qwen3, llama = (
    families.read(MODELS / name) for name in ("qwen2", "qwen3", "llama")
  )
  assert (qwen2.qk_norm, qwen2.qkv_bias) == (False, True)
  assert (qwen3.qk_norm, qwen3.qkv_bias) == (True, False)
  assert (llama.qk_norm, llama.qkv_bias) == (False, False)
  assert qwen3.head_dim == 16 and llama.head_dim == 8
  assert (qwen3.rope_theta, llama.rope_theta) == (1e6, 1e4)
  assert (llama.rope_factor, llama.rope_original_length) == (8.0, 32)


def test_what_is_left_out_has_its_usual_value(tmp_path):
  fields = fields_of("llama", rope_parameters=None, rope_theta=5e5)
  for name in ("head_dim", "num_key_value_heads", "rms_norm_eps"):
    del fields[name]
  config = read(tmp_path, fields)
  assert (config.n_kv_heads, config.head_dim) == (4, 8)
  assert (config.norm_eps, config.rope_theta) == (1e-6, 5e5)


@pytest.mark.parametrize(
  ("name", "changes", "sentence"),
  [
    ("qwen3", {"model_type": "gemma3"}, "model_type is 'gemma3'; known are"),
    ("qwen3", {"architectures": ["Qwen3Moe"]}, r"architectures is \['Qwen3Moe"),
    ("qwen3", {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
    ("qwen3", {"use_sliding_window": True}, "use_sliding_window=True"),
    ("qwen3", {"layer_types": ["linear_attention"]}, "layer_types="),
    ("qwen3", {"attention_bias": True}, "attention_bias=True"),
    ("qwen3", {"quantization_config": {"bits": 4}}, "quantization_config="),
    ("llama", {"mlp_bias": True}, "mlp_bias=True"),
    ("llama", {"vocab_size": 0}, "vocab_size must be a positive number, got 0"),
    ("llama", {"hidden_size": "32"}, "hidden_size must be a positive number"),
    ("llama", {"hidden_size": None}, "hidden_size must be a positive number"),
    ("qwen3", {"rope_parameters": {"rope_type": "yarn"}}, "scaling 'yarn'"),
    (
      "llama",
      {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
      "rope scaling 'llama3' lacks low_freq_factor",
    ),
  ],
)
def test_unsupported_fields_are_named(tmp_path, name, changes, sentence):
  with pytest.raises(errors.UserError, match=sentence) as caught:
    read(tmp_path, fields_of(name, **changes))
  assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize(
  ("text", "sentence"),
  [("{", "is not JSON"), ("[]", "no JSON object"), (None, "cannot be read")],
)
def test_files_that_are_no_config(tmp_path, text, sentence):
  if text is not None:
    (tmp_path / "config.json").write_text(text)
  with pytest.raises(errors.UserError, match=sentence):
    families.read(tmp_path)
