"""config.json of published models, and what is not supported."""

import json
import math
import pathlib

import jax
import numpy as np
import pytest

from roc import errors
from roc.device import families, model, rotary

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


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama", "yarn"])
def test_written_configs_read_the_same(tmp_path, name):
  config = families.read(MODELS / name)
  fields = families.to_fields(config, "bfloat16")
  assert read(tmp_path, fields) == config


QWEN3 = families.read(MODELS / "qwen3")
YARN = {
  "rope_type": "yarn",
  "rope_theta": 1e6,
  "factor": 4.0,
  "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize(
  "fields",
  [
    {"rope_theta": 1e6},
    {"rope_theta": 1e6, "rope_scaling": None},
    {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
    {"rope_scaling": {"rope_theta": 1e6, "rope_type": "default"}},
    {"rope_scaling": {"rope_theta": 1e6, "type": "default"}, "rope_theta": 1e4},
    {"rope_parameters": {"rope_theta": 1e6}, "rope_theta": None},
    # Where both are there, the older one counts.
    {"rope_scaling": {"rope_theta": 1e6}, "rope_parameters": {"rope_theta": 9}},
    {"rope_scaling": {}, "rope_parameters": {"rope_theta": 1e6}},
  ],
)
def test_theta_wherever_it_stands(tmp_path, fields):
  """As transformers 5 finds it."""
  of = fields_of("qwen3", rope_parameters=None) | fields
  assert read(tmp_path, of) == QWEN3


@pytest.mark.parametrize(
  ("changes", "factor", "attention", "original"),
  [
    ({}, 4.0, 0.1 * math.log(4) + 1, 16),
    ({"attention_factor": 0.7}, 4.0, 0.7, 16),
    ({"factor": None}, 16.0, 0.1 * math.log(16) + 1, 16),
    ({"factor": 1.0}, 1.0, 1.0, 16),
    ({"original_max_position_embeddings": None}, 4.0, 1.1386294361, 256),
    (
      {"mscale": 2.0, "mscale_all_dim": 1.0},
      4.0,
      (0.2 * math.log(4) + 1) / (0.1 * math.log(4) + 1),
      16,
    ),
  ],
)
def test_yarn_as_a_config_says_it(
  tmp_path, changes, factor, attention, original
):
  config = read(tmp_path, fields_of("yarn", rope_parameters=YARN | changes))
  assert (config.rope_scaling, config.rope_theta) == ("yarn", 1e6)
  assert config.rope_factor == factor
  assert config.rope_attention_factor == pytest.approx(attention, rel=1e-9)
  assert config.rope_original_length == original
  # The same, as version 4 writes it.
  scaling = {k: v for k, v in (YARN | changes).items() if k != "rope_theta"}
  old = {"rope_parameters": None, "rope_scaling": scaling, "rope_theta": 1e6}
  assert read(tmp_path, fields_of("yarn", **old)) == config


def test_the_frequencies_of_yarn():
  """Against the formulas of the paper, written out for each half pair."""
  theta, factor, length, half = 1e6, 4.0, 4096, 64
  plain = [theta ** (-i / half) for i in range(half)]
  turns = [length * f / (2 * math.pi) for f in plain]
  last = max(i for i in range(half) if turns[i] >= 32)
  first = min(i for i in range(half) if turns[i] <= 1)
  found = np.asarray(
    rotary.yarn(
      rotary.frequencies(2 * half, theta), theta, factor, length, 32.0, 1.0
    )
  )
  for i in range(half):
    share = min(max((i - last) / (first - last), 0.0), 1.0)
    wanted = plain[i] * (1 - share) + plain[i] / factor * share
    assert found[i] == pytest.approx(wanted, rel=1e-5)


def test_positions_that_a_model_is_made_for(tmp_path):
  (tmp_path / "config.json").write_text(json.dumps(fields_of("qwen3")))
  assert families.longest(tmp_path) == 256
  longer = fields_of("yarn", max_position_embeddings=16)
  (tmp_path / "config.json").write_text(json.dumps(longer))
  assert families.longest(tmp_path) == 64
  unsaid = fields_of("qwen3", max_position_embeddings=None)
  (tmp_path / "config.json").write_text(json.dumps(unsaid))
  assert families.longest(tmp_path) is None


def test_a_base_model_is_one_of_the_family(tmp_path):
  fields = fields_of("qwen3", architectures=["Qwen3Model"])
  assert read(tmp_path, fields) == QWEN3


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
    ("qwen3", {"rope_parameters": {"rope_type": "linear"}}, "'linear' is not"),
    ("qwen3", {"rope_parameters": {"rope_type": "yarn"}}, "yarn' lacks factor"),
    ("yarn", {"rope_parameters": YARN | {"factor": 0.5}}, "at least 1"),
    (
      "yarn",
      {"rope_parameters": YARN | {"factor": "4"}},
      r"rope_parameters\.fac",
    ),
    ("yarn", {"rope_parameters": YARN | {"truncate": False}}, "truncate=false"),
    (
      "yarn",
      {"rope_parameters": YARN | {"beta_fast": 0.5}},
      "beta_slow must be",
    ),
    (
      "yarn",
      {"rope_parameters": YARN | {"partial_rotary_factor": 0.5}},
      "parti",
    ),
    ("qwen3", {"rope_parameters": [1e6]}, "rope_parameters must be an object"),
    # Nonsense.
    (
      "qwen3",
      {"rope_parameters": None, "rope_theta": None},
      "rope_theta must be a positive number, got None",
    ),
    ("qwen3", {"rope_parameters": {"rope_theta": "1e6"}}, "got '1e6'"),
    ("qwen3", {"num_key_value_heads": 3}, "num_attention_heads=4 is no multip"),
    ("qwen3", {"num_attention_heads": 5}, "num_attention_heads=5 is no multip"),
    (
      "qwen3",
      {"hidden_size": 34, "head_dim": None},
      "hidden_size=34 is no multiple",
    ),
    ("qwen3", {"head_dim": 15}, "head_dim is 15, and rotary positions"),
    ("qwen3", {"num_hidden_layers": 2.5}, "must be a whole number, got 2.5"),
    (
      "qwen3",
      {"tie_word_embeddings": "false"},
      "must be true or false, not 'f",
    ),
    (
      "qwen2",
      {"attention_bias": "false"},
      "must be true or false, not 'false'",
    ),
    (
      "qwen3",
      {"max_position_embeddings": "long"},
      "max_position_embeddings must",
    ),
    ("qwen3", {"model_type": ["qwen3"]}, r"model_type is \['qwen3'\]"),
    ("qwen3", {"layer_types": [{}]}, "layer_types="),
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
