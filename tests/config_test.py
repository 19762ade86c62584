"""Every setting is typed, checked and told apart from what is not a setting."""

import dataclasses
import json
import re

import ml_collections
import pytest

from roc import config, config_checks, errors


def changed(settings):
  """The default configuration with `{"section.name": value}` overrides."""
  cfg = config.default_config()
  for key, value in settings.items():
    section, _, name = key.rpartition(".")
    setattr(getattr(cfg, section) if section else cfg, name, value)
  return cfg


def test_defaults_resolve_to_the_dataclass_defaults():
  cfg = config.default_config()
  assert isinstance(cfg, ml_collections.ConfigDict) and cfg.is_locked
  assert config.resolve(cfg) == config.Config()


def test_resolved_config_is_frozen_and_hashable():
  resolved = config.resolve(changed({"train.lr": 1}))
  assert resolved.train.lr == 1.0 and isinstance(resolved.train.lr, float)
  with pytest.raises(dataclasses.FrozenInstanceError):
    resolved.train.lr = 2.0
  assert hash(resolved) == hash(config.resolve(changed({"train.lr": 1.0})))


def test_unknown_keys_and_wrong_types_are_refused_where_they_are_set():
  cfg = config.default_config()
  with pytest.raises(AttributeError, match='Did you mean "lr"'):
    cfg.train.lrr = 1
  with pytest.raises(TypeError, match="lr"):
    cfg.train.lr = "fast"
  with pytest.raises(TypeError, match="steps"):
    cfg.train.steps = 1.5


def test_unknown_keys_and_wrong_types_are_refused_when_resolved():
  cfg = config.default_config().unlock()
  cfg.train.lrr = 1
  with pytest.raises(errors.UserError, match=r"train.lrr .*did you mean lr\?"):
    config.resolve(cfg)
  cfg = config.default_config()
  cfg.train.buckets = (96, 256.5)
  with pytest.raises(errors.UserError, match=r"buckets\[1\] must be int"):
    config.resolve(cfg)


def test_booleans_are_no_numbers():
  text = config.to_json(config.Config()).replace('"seed": 0', '"seed": true')
  with pytest.raises(errors.UserError, match="seed must be int, got True"):
    config.from_json(text)


@pytest.mark.parametrize(
  "settings, text",
  [
    ({"filter.n_kept": 1, "filter.min_neg": 0}, "a group of one has no base"),
    ({"filter.n_kept": 17}, r"n_kept \(17\) cannot exceed .*n_drawn \(16\)"),
    ({"filter.mode": "none"}, "must equal config.filter.n_drawn"),
    ({"filter.min_pos": 5, "filter.min_neg": 4}, "add up to more than"),
    ({"filter.mode": "sorted"}, r"filter.mode .*did you mean sort\?"),
    ({"filter.eps": 0.0}, "filter.eps must be above 0"),
    ({"filter.overlong": "soft", "filter.overlong_buffer": 0}, "between 1"),
    ({"sampling.max_tokens": 256}, r"cache_length \(256\)"),
    ({"sampling.cache_tokens": 255}, r"cache_tokens \(255\) must hold"),
    ({"sampling.min_p": 1.5}, r"min_p must be in \[0, 1\]"),
    ({"sampling.n_slots": 0}, "n_slots must be at least 1"),
    ({"sampling.page": 0}, "page must be at least 1"),
    ({"sampling.temperature": 0.0}, "config.eval.temperature"),
    ({"sampling.top_p": 0.0}, "sampling.top_p"),
    ({"sampling.chunk": 0}, "sampling.chunk must be at least 1, got 0"),
    ({"sampling.cache_length": 512}, "last of config.train.buckets"),
    ({"train.buckets": ()}, "buckets must be rising"),
    ({"train.buckets": (256, 256)}, "buckets must be rising"),
    ({"train.minibatches": 3}, "128 rows, which config.train.minibatches"),
    ({"train.microbatch_rows": 48}, "config.train.microbatch_rows"),
    ({"mesh.data": 3}, "config.mesh.data x config.mesh.fsdp"),
    ({"mesh.tensor": 3}, "model.n_kv_heads"),
    ({"mesh.data": 8, "sft.rows": 4}, "config.sft.microbatch_rows"),
    ({"train.lr": 0.0}, "train.lr must be above 0"),
    ({"train.b2": 1.0}, "train.b1 and b2"),
    ({"sft.warmup": 600}, "shorter than config.sft.steps"),
    ({"loss.correction": "tis"}, "needs config.loss.old_logprobs=recompute"),
    ({"loss.dual_clip": 0.5}, "dual_clip must be 0"),
    ({"loss.correction_low": 3.0}, "correction_low"),
    ({"loss.ddof": 2}, "ddof must be 0 or 1"),
    ({"loss.kind": "ppo"}, "loss.kind must be one of clip, gspo, cispo"),
    ({"model.dtype": "bf16"}, "model.dtype must be one of"),
    ({"model.n_kv_heads": 3}, "multiple of config.model.n_kv_heads"),
    ({"model.head_dim": 7}, "head_dim must be even"),
    ({"model.attention": "flash"}, "model.attention must be one of auto, xla"),
    ({"model.rope_factor": 0.5}, "rope_factor must be at least 1"),
    ({"model.attention": "pallas"}, "pallas needs a head_dim of 128, not 32"),
    ({"seed": -1}, "seed must be at least 0"),
    ({"checkpoint.keep": 0}, "checkpoint.keep must be at least 1"),
  ],
)
def test_settings_that_cannot_be_are_one_sentence(settings, text):
  with pytest.raises(errors.UserError, match=text) as e:
    config.resolve(changed(settings))
  assert "\n" not in str(e.value)
  # It names a key as the command line takes it.
  assert re.search(r"config\.\w+", str(e.value))


def test_unusual_settings_that_can_be():
  for settings in (
    {"filter.mode": "none", "filter.n_kept": 16},
    {"loss.correction": "tis", "loss.old_logprobs": "recompute"},
    {"mesh.data": 4, "mesh.fsdp": 2},
    {"train.microbatch_rows": 32, "train.minibatches": 2},
    {"train.steps": 2},
    {"eval.temperature": 0.0, "eval.every": 0},
  ):
    flat = config.flatten(config.resolve(changed(settings)))
    assert {key: flat[key] for key in settings} == settings


def test_mesh_must_fit_the_machine():
  cfg = config.resolve(changed({"mesh.data": 4}))
  config_checks.check_devices(cfg, 8, "cpu")
  with pytest.raises(
    errors.UserError, match="4 devices and this machine has 1"
  ):
    config_checks.check_devices(cfg, 1, "cpu")


def test_kernels_must_suit_the_machine():
  cfg = config.resolve(
    changed({"model.attention": "pallas", "model.head_dim": 128})
  )
  config_checks.check_devices(cfg, 1, "tpu")
  with pytest.raises(errors.UserError, match="only a TPU runs.*'gpu'"):
    config_checks.check_devices(cfg, 1, "gpu")


def test_json_round_trip():
  cfg = config.resolve(
    changed({"train.lr": 1 / 3, "train.buckets": (256, 512), "init_from": "é"})
  )
  assert config.from_json(config.to_json(cfg)) == cfg
  assert json.loads(config.to_json(cfg))["train"]["buckets"] == [256, 512]


def test_damaged_json_names_file_and_line():
  with pytest.raises(errors.UserError, match="runs/a/config.json line 2"):
    config.from_json('{\n"seed": ', "runs/a/config.json")
  with pytest.raises(errors.UserError, match="train must be a section"):
    config.from_json('{"train": 3}')


def test_fingerprint_is_of_what_a_run_computes():
  base = config.Config()
  same = config.resolve(
    changed(
      {
        "checkpoint.every": 1,
        "log.progress": False,
        "eval.every": 3,
        "train.steps": 99,
      }
    )
  )
  assert config.fingerprint(base) == config.fingerprint(same)
  for settings in (
    {"seed": 1},
    {"train.lr": 1e-3},
    {"eval.n_problems": 64},
    {"init_from": "runs/other"},
    {"model.d_model": 64},
  ):
    other = config.resolve(changed(settings))
    assert config.fingerprint(base) != config.fingerprint(other), settings


def test_steps_count_where_the_schedule_depends_on_them():
  a = config.resolve(changed({"train.schedule": "cosine"}))
  b = config.resolve(changed({"train.schedule": "cosine", "train.steps": 61}))
  assert config.fingerprint(a) != config.fingerprint(b)


def test_a_program_is_not_changed_by_what_it_never_reads():
  a = config.Config()
  b = config.resolve(changed({"sft.lr": 1e-2}))
  assert config.fingerprint(a, "train") == config.fingerprint(b, "train")
  assert config.fingerprint(a, "sft") != config.fingerprint(b, "sft")
  b = config.resolve(changed({"train.lr": 1e-2, "filter.eps": 0.3}))
  assert config.fingerprint(a, "sft") == config.fingerprint(b, "sft")


def test_the_same_place_written_otherwise_is_the_same():
  a = config.resolve(changed({"init_from": "runs/sft"}))
  b = config.resolve(changed({"init_from": "runs//sft/"}))
  assert config.fingerprint(a) == config.fingerprint(b)


def test_diff_says_what_changed():
  a = config.Config()
  b = config.resolve(changed({"train.lr": 1e-6, "seed": 4}))
  assert config.diff(a, a) == []
  assert config.diff(a, b) == ["seed: 0 -> 4", "train.lr: 0.0001 -> 1e-06"]


def test_every_setting_of_ours_has_a_help_text():
  texts = config.help_texts()
  assert list(texts) == list(config.flatten(config.Config()))
  bare = [k for k, v in texts.items() if not v and not k.startswith("model.")]
  assert bare == []
  assert texts["train.lr"] == "peak learning rate"
  assert texts["loss.correction"].startswith("Weight by trainer")
