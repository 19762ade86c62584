"""Every setting is typed, checked and told apart from what is not a setting."""

import dataclasses
import json
import math
import re

import ml_collections
import pytest

from roc import config, config_checks, errors, records
from roc.device import step as step_lib


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
  resolved = config.resolve(cfg)
  # But for the bounds of the loss, which are numbers from then on.
  loss = step_lib.with_own_bounds(config.LossConfig())
  assert resolved == dataclasses.replace(config.Config(), loss=loss)
  assert (resolved.loss.eps_low, resolved.loss.eps_high) == (0.2, 0.28)


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
  with pytest.raises(
    errors.UserError, match=r"train.lrr .*did you mean train.lr\?"
  ):
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
    ({"sampling.temperature": 1e-30}, "temperature must be at least 0.0001"),
    ({"eval.temperature": 1e-30}, r"temperature must be 0 \(greedy\) or at"),
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
    ({"loss.correction_low": -1.0}, "correction_low must be at least 0"),
    (
      {
        "loss.correction": "icepop",
        "loss.correction_low": 6.0,
        "loss.old_logprobs": "recompute",
      },
      "correction_low must be at least 0 and below .* got 6.0 and 5.0",
    ),
    ({"loss.eps_low": 1.5}, r"eps_low must be in \(0, 1\]"),
    ({"loss.eps_high": 0.0}, "eps_high must be above 0"),
    ({"sampling.top_k": 20}, "top_k=20 .*config.loss.old_logprobs=recompute"),
    ({"sampling.top_p": 0.8}, "top_p=0.8 .*config.loss.old_logprobs=recompute"),
    ({"sampling.min_p": 0.1}, "min_p=0.1 .*config.loss.old_logprobs=recompute"),
    (
      {
        "model.vocab_size": 100,
        "sampling.top_k": 101,
        "loss.old_logprobs": "recompute",
      },
      r"sampling.top_k \(101\) exceeds the vocabulary of 100",
    ),
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


# 1e300 is finite in the file and not in float32, where it is used.
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1e300])
def test_no_number_is_infinite_or_nan(value):
  numbers = [
    key
    for key, default in config.flatten(config.Config()).items()
    if isinstance(default, float) or key in BOUNDS
  ]
  assert len(numbers) >= 30
  for key in numbers:
    with pytest.raises(
      errors.UserError, match=f"config.{key} must be a finite"
    ):
      config.resolve(changed({key: value}))
  text = config.to_json(config.Config()).replace("0.0001", "1" + 400 * "0")
  with pytest.raises(errors.UserError, match="train.lr must be float"):
    config.from_json(text)


BOUNDS = (
  *("loss.eps_low", "loss.eps_high"),
  *("loss.correction_low", "loss.correction_high"),
)


def test_bounds_that_are_none_are_the_losss_own():
  for settings, want in (
    ({"loss.kind": "gspo"}, (3e-4, 4e-4, None, None)),
    ({"loss.kind": "gspo", "loss.eps_low": 0.1}, (0.1, 4e-4, None, None)),
    (
      {"loss.correction": "icepop", "loss.old_logprobs": "recompute"},
      (0.2, 0.28, 0.5, 5.0),
    ),
  ):
    resolved = config.resolve(changed(settings))
    flat = config.flatten(resolved)
    assert tuple(flat[key] for key in BOUNDS) == want
    assert config.from_json(config.to_json(resolved)) == resolved
  with pytest.raises(TypeError, match="eps_low"):
    changed({"loss.eps_low": "wide"})


def test_runs_from_before_bounds_could_be_none_go_on():
  old = config.LossConfig(
    eps_low=0.2, eps_high=0.28, correction_low=0.5, correction_high=2.0
  )
  old = dataclasses.replace(config.Config(), loss=old)
  now = config.resolve(config.default_config())
  assert config.identity(old) == config.identity(now)
  assert config.identity(now) == config.identity(config.Config())
  assert {config.identity(now)[key] for key in BOUNDS} == {0.2, 0.28, 0.5, 2.0}
  # But icepop drops from 5 on, no longer from 2.
  settings = {"loss.correction": "icepop", "loss.old_logprobs": "recompute"}
  now = config.resolve(changed(settings))
  loss = dataclasses.replace(
    old.loss, correction="icepop", old_logprobs="recompute"
  )
  old = dataclasses.replace(old, loss=loss)
  assert config.identity(old) != config.identity(now)


def test_an_evaluation_may_restrict_what_it_samples():
  """It has no loss, so the run's setting of old log-probs says nothing."""
  cfg = changed({"sampling.top_p": 0.95})
  assert config.resolve(cfg, is_trained=False).sampling.top_p == 0.95
  cfg.loss.old_logprobs = "recompute"
  assert config.resolve(cfg).sampling.top_p == 0.95


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


def test_a_published_model_is_no_run():
  text = '{"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}'
  with pytest.raises(errors.UserError) as e:
    config.from_json(text, "models/qwen/config.json")
  assert "models/qwen/config.json is that of a published" in str(e.value)
  assert "config.pretrained" in str(e.value)
  assert "architectures" not in str(e.value)


def test_identity_is_of_what_a_run_computes():
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
  assert config.identity(base) == config.identity(same)
  for settings in (
    {"seed": 1},
    {"train.lr": 1e-3},
    {"eval.n_problems": 64},
    {"init_from": "runs/other"},
    {"model.d_model": 64},
  ):
    other = config.resolve(changed(settings))
    assert config.identity(base) != config.identity(other), settings


def test_steps_count_where_the_schedule_depends_on_them():
  a = config.resolve(changed({"train.schedule": "cosine"}))
  b = config.resolve(changed({"train.schedule": "cosine", "train.steps": 61}))
  assert config.identity(a) != config.identity(b)


def test_a_program_is_not_changed_by_what_it_never_reads():
  a = config.Config()
  b = config.resolve(changed({"sft.lr": 1e-2}))
  assert config.identity(a, "train") == config.identity(b, "train")
  assert config.identity(a, "sft") != config.identity(b, "sft")
  b = config.resolve(changed({"train.lr": 1e-2, "filter.eps": 0.3}))
  assert config.identity(a, "sft") == config.identity(b, "sft")


def test_the_same_place_written_otherwise_is_the_same():
  a = config.resolve(changed({"init_from": "runs/sft"}))
  b = config.resolve(changed({"init_from": "runs//sft/"}))
  assert config.identity(a) == config.identity(b)


def test_a_setting_that_came_later_locks_no_older_run_out():
  """Its default stands for it in a record that was written before."""
  for kind in ("clip", "gspo"):
    cfg = config.resolve(changed({"loss.kind": kind}))
    now = config.identity(cfg)
    for key in set(now) - {"loss.kind"}:
      older = {k: v for k, v in now.items() if k != key}
      assert records.differences(older, now, config.defaults(cfg)) == "", key
  now = config.identity(config.Config())
  older = {k: v for k, v in now.items() if k != "train.buckets"}
  changed_now = config.identity(
    config.resolve(changed({"train.buckets": (64, 256)}))
  )
  found = records.differences(
    older, changed_now, config.defaults(config.Config())
  )
  assert found == "train.buckets ([96, 128, 192, 256] -> [64, 256])"
  # Adapters that an older record says nothing of.
  adapted = config.identity(config.resolve(changed({"lora.rank": 4})))
  assert records.differences(
    now, adapted, config.defaults(config.Config())
  ) == ("lora.rank (0 -> 4)")
  found = records.differences(adapted, now, config.defaults(config.Config()))
  assert found == "lora.rank (4 -> 0)"


def test_a_digest_that_was_not_taken_says_nothing():
  digest = {"contents of train_task": "ab"}
  assert records.differences({"seed": 0}, {"seed": 0} | digest) == ""
  found = records.differences(digest, {"contents of train_task": "cd"})
  assert found == "contents of train_task (ab -> cd)"


def test_choices_of_settings():
  found = config.choices()
  assert found["train.schedule"] == ("constant", "cosine")
  assert found["model.dtype"] == ("float32", "bfloat16")
  assert "down_proj" in found["lora.targets"]


def test_diff_says_what_changed():
  a = config.resolve(config.default_config())
  b = config.resolve(changed({"train.lr": 1e-6, "seed": 4}))
  assert config.diff(a, a) == []
  assert config.diff(a, b) == ["seed: 0 -> 4", "train.lr: 0.0001 -> 1e-06"]


def test_every_setting_of_ours_has_a_help_text():
  texts = config.help_texts()
  assert list(texts) == list(config.flatten(config.Config()))
  bare = [k for k, v in texts.items() if not v and not k.startswith("model.")]
  assert bare == []
  assert texts["train.lr"] == "peak learning rate"
  assert texts["loss.correction"].startswith("Weight of the surrogate")
