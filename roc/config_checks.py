"""Which settings fit together, and where their help texts are read from.

One function per section, each a list of conditions with the sentence that a
user reads when one fails: the keys, what is wrong, what to do. All of it runs
before any work starts and none of it needs a device.
"""

import dataclasses
import inspect
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from roc import errors
from roc.device import lora, network, paged_tpu
from roc.device import step as step_lib

if TYPE_CHECKING:
  from roc import config as config_lib


def check(c: "config_lib.Config") -> None:
  """Raises `errors.UserError` on the first setting that cannot be."""
  for section in (
    _check_finite,
    _check_ranges,
    _check_model,
    _check_lora,
    _check_sampling,
    _check_loss,
    _check_filter,
    _check_batch,
    _check_schedules,
  ):
    section(c)


def check_training(c: "config_lib.Config") -> None:
  """Raises `errors.UserError` if what is sampled does not suit the loss."""
  s = c.sampling
  restrictions = [
    f"{name}={value}"
    for name, value, off in (
      ("top_k", s.top_k, 0),
      ("top_p", s.top_p, 1),
      ("min_p", s.min_p, 0),
    )
    if value != off
  ]
  _require(
    not restrictions or c.loss.old_logprobs == "recompute",
    f"config.sampling.{' and '.join(restrictions)} samples from another"
    " distribution than the one that is trained, so the sampler's log-probs"
    " cannot be the old ones of the ratio; set"
    " config.loss.old_logprobs=recompute",
  )


def check_vocabulary(c: "config_lib.Config", n_ids: int) -> None:
  """Raises `errors.UserError` if more tokens are kept than there are."""
  _require(
    c.sampling.top_k <= n_ids,
    f"config.sampling.top_k ({c.sampling.top_k}) exceeds the vocabulary of"
    f" {n_ids} tokens; lower it, or set it to 0 to keep all",
  )


def check_devices(c: "config_lib.Config", n_devices: int, backend: str) -> None:
  """Raises `errors.UserError` if the machine cannot run what is asked for.

  Args:
    c: the config.
    n_devices: that there are.
    backend: "cpu", "gpu" or "tpu".
  """
  product = c.mesh.data * c.mesh.fsdp * c.mesh.tensor
  _require(
    product <= n_devices and n_devices % product == 0,
    f"config.mesh is {c.mesh.data} x {c.mesh.fsdp} x {c.mesh.tensor} ="
    f" {product} devices and this machine has {n_devices}; set data, fsdp and"
    " tensor so that their product divides it",
  )
  _require(
    c.sampling.n_devices <= n_devices,
    f"config.sampling.n_devices is {c.sampling.n_devices} and this machine has"
    f" {n_devices}; set it to 0 for all of them",
  )
  _require(
    c.model.attention != "pallas" or backend == "tpu",
    f"config.model.attention is 'pallas', kernels that only a TPU runs, and"
    f" this machine's devices are of kind {backend!r}; set it to 'auto'",
  )


def _require(holds: bool, sentence: str) -> None:
  if not holds:
    raise errors.UserError(sentence)


def _at_least(c: "config_lib.Config", low: float, *keys: str) -> None:
  for key in keys:
    section, _, name = key.rpartition(".")
    value = getattr(getattr(c, section) if section else c, name)
    _require(value >= low, f"config.{key} must be at least {low}, got {value}")


_LARGEST = 3.4e38  # what float32 still holds
_COLDEST = 1e-4  # logits divided by less leave the range of float32


def _check_finite(c: "config_lib.Config") -> None:
  for key, value in _numbers(dataclasses.asdict(c), "config"):
    _require(
      abs(value) <= _LARGEST, f"{key} must be a finite number, got {value}"
    )


def _numbers(value: Any, key: str) -> Iterator[tuple[str, float]]:
  """Every float of a tree of settings, with its name."""
  if isinstance(value, dict):
    for name, part in value.items():
      yield from _numbers(part, f"{key}.{name}")
  elif isinstance(value, tuple):
    for i, part in enumerate(value):
      yield from _numbers(part, f"{key}[{i}]")
  elif isinstance(value, float):
    yield key, value


def _check_ranges(c: "config_lib.Config") -> None:
  _at_least(
    c,
    1,
    *("mesh.data", "mesh.fsdp", "mesh.tensor"),
    *("sampling.n_slots", "sampling.chunk", "sampling.extend_chunk"),
    *("sampling.extend_rows", "sampling.page", "sampling.cache_length"),
    *("sampling.max_turns", "sampling.max_tokens", "sampling.max_calls"),
    *("loss.logprob_chunk", "train.steps", "train.prompts"),
    *("train.minibatches", "sft.n_demos", "sft.steps", "sft.rows"),
    *("eval.n_problems", "eval.samples", "checkpoint.every"),
    *("collect.n_problems", "collect.samples", "collect.shard"),
    *(
      "checkpoint.keep",
      "compare.seeds",
      "model.n_layers",
      "model.d_model",
      "model.d_ff",
    ),
    *("model.n_heads", "model.n_kv_heads"),
  )
  _at_least(
    c,
    0,
    *(
      "seed",
      "lora.rank",
      "model.vocab_size",
      "sampling.top_k",
      "loss.kl_coef",
    ),
    "sampling.n_devices",
    *("loss.entropy_coef", "filter.min_pos", "filter.min_neg"),
    *("train.warmup", "train.weight_decay", "train.grad_clip"),
    *("train.microbatch_rows", "sft.microbatch_rows", "sft.warmup"),
    *("sft.weight_decay", "sampling.cache_tokens"),
    *("sampling.call_deadline", "sampling.rollout_deadline"),
    *("sft.heldout_every", "sft.heldout_calls"),
    *("sft.grad_clip", "eval.every", "eval.temperature", "log.traces_every"),
    "log.void_warning",
    *("collect.first", "collect.step"),
  )
  _require(c.seed < 2**32, f"config.seed must be less than 2**32, got {c.seed}")
  _require(
    c.collect.step < 2**31,
    f"config.collect.step must be less than 2**31, got {c.collect.step}",
  )


def _check_model(c: "config_lib.Config") -> None:
  m, tensor, fsdp = c.model, c.mesh.tensor, c.mesh.fsdp
  _require(
    m.n_heads % m.n_kv_heads == 0,
    f"config.model.n_heads ({m.n_heads}) must be a multiple of"
    f" config.model.n_kv_heads ({m.n_kv_heads})",
  )
  _require(
    m.head_dim >= 2 and m.head_dim % 2 == 0,
    f"config.model.head_dim must be even, got {m.head_dim}",
  )
  objection = paged_tpu.objection(m.n_heads, m.n_kv_heads, m.head_dim, m.dtype)
  _require(
    m.attention != "pallas" or not objection,
    f"config.model.attention=pallas {objection}; set it to auto or xla",
  )
  _require(
    m.rope_theta > 0 and m.norm_eps > 0,
    "config.model.rope_theta and config.model.norm_eps must be above 0",
  )
  _require(
    m.rope_factor >= 1
    and 0 < m.rope_low_freq_factor < m.rope_high_freq_factor
    and m.rope_original_length > 0,
    "config.model.rope_factor must be at least 1, rope_low_freq_factor above 0"
    " and below rope_high_freq_factor, and rope_original_length above 0",
  )
  _require(
    m.rope_scaling in network.ROPE_SCALINGS
    and 0 < m.rope_beta_slow < m.rope_beta_fast
    and m.rope_attention_factor > 0,
    f"config.model.rope_scaling must be one of {network.ROPE_SCALINGS},"
    " rope_beta_slow above 0 and below rope_beta_fast, and"
    " rope_attention_factor above 0",
  )
  for name, axis, size in (
    ("n_kv_heads", "tensor", tensor),
    ("d_ff", "tensor", tensor),
    ("d_model", "fsdp", fsdp),
  ):
    value = getattr(m, name)
    _require(
      value % size == 0,
      f"config.model.{name} ({value}) must be a multiple of"
      f" config.mesh.{axis} ({size})",
    )


def _check_lora(c: "config_lib.Config") -> None:
  x = c.lora
  _require(x.alpha > 0, f"config.lora.alpha must be above 0, got {x.alpha}")
  _require(
    bool(x.targets) and len(set(x.targets)) == len(x.targets),
    "config.lora.targets must name at least one projection, each once; set"
    " config.lora.rank to 0 to train all parameters",
  )
  for name in x.targets:
    _require(
      name in lora.TARGETS,
      f"config.lora.targets must be some of {', '.join(lora.TARGETS)}, got"
      f" {name!r}{errors.closest(name, lora.TARGETS)}",
    )


def _check_sampling(c: "config_lib.Config") -> None:
  s = c.sampling
  _require(
    s.temperature >= _COLDEST,
    f"config.sampling.temperature must be at least {_COLDEST}, got"
    f" {s.temperature}; for greedy evaluation set config.eval.temperature to 0",
  )
  _require(
    c.eval.temperature == 0 or c.eval.temperature >= _COLDEST,
    f"config.eval.temperature must be 0 (greedy) or at least {_COLDEST}, got"
    f" {c.eval.temperature}",
  )
  _require(
    0 < s.top_p <= 1, f"config.sampling.top_p must be in (0, 1], got {s.top_p}"
  )
  if c.model.vocab_size:
    check_vocabulary(c, c.model.vocab_size)
  _require(
    0 <= s.min_p <= 1, f"config.sampling.min_p must be in [0, 1], got {s.min_p}"
  )
  _require(
    s.cache_tokens == 0 or s.cache_tokens >= s.cache_length,
    f"config.sampling.cache_tokens ({s.cache_tokens}) must hold at least one"
    f" rollout of config.sampling.cache_length ({s.cache_length}); raise the"
    " first, or set it to 0 for the cache of n_slots rollouts",
  )
  _require(
    s.max_tokens < s.cache_length,
    f"config.sampling.max_tokens ({s.max_tokens}) and a prompt must fit into"
    f" config.sampling.cache_length ({s.cache_length}); lower the first or"
    " raise the second",
  )


def _check_loss(c: "config_lib.Config") -> None:
  x = step_lib.with_own_bounds(c.loss)
  _require(
    x.eps_low is None or 0 < x.eps_low <= 1,
    f"config.loss.eps_low must be in (0, 1], got {x.eps_low}",
  )
  _require(
    x.eps_high is None or x.eps_high > 0,
    f"config.loss.eps_high must be above 0, got {x.eps_high}",
  )
  _require(
    x.dual_clip == 0 or x.dual_clip > 1,
    f"config.loss.dual_clip must be 0 (off) or above 1, got {x.dual_clip}",
  )
  _require(x.ddof in (0, 1), f"config.loss.ddof must be 0 or 1, got {x.ddof}")
  low, high = x.correction_low, x.correction_high
  low = 0.0 if low is None else low
  _require(
    low >= 0 and (high is None or low < high),
    "config.loss.correction_low must be at least 0 and below"
    f" config.loss.correction_high, got {low} and {high}",
  )
  _require(
    x.correction == "none" or x.old_logprobs == "recompute",
    f"config.loss.correction={x.correction} compares the trainer's log-probs"
    " with the sampler's, so it needs config.loss.old_logprobs=recompute",
  )


def _check_filter(c: "config_lib.Config") -> None:
  f = c.filter
  _require(
    f.n_kept >= 2,
    f"config.filter.n_kept is {f.n_kept}, and a group of one has no baseline;"
    " set it to 2 or more",
  )
  _require(
    f.n_kept <= f.n_drawn,
    f"config.filter.n_kept ({f.n_kept}) cannot exceed config.filter.n_drawn"
    f" ({f.n_drawn}); lower the first or raise the second",
  )
  _require(
    f.mode != "none" or f.n_kept == f.n_drawn,
    f"config.filter.mode=none keeps every rollout, so config.filter.n_kept"
    f" ({f.n_kept}) must equal config.filter.n_drawn ({f.n_drawn})",
  )
  _require(
    f.min_pos + f.min_neg <= f.n_kept,
    f"config.filter.min_pos ({f.min_pos}) and config.filter.min_neg"
    f" ({f.min_neg}) add up to more than config.filter.n_kept ({f.n_kept})",
  )
  _require(f.eps > 0, f"config.filter.eps must be above 0, got {f.eps}")
  _require(
    f.overlong != "soft" or 0 < f.overlong_buffer <= c.sampling.max_tokens,
    f"config.filter.overlong_buffer ({f.overlong_buffer}) must be between 1"
    f" and config.sampling.max_tokens ({c.sampling.max_tokens})",
  )


def _check_batch(c: "config_lib.Config") -> None:
  t, shards = c.train, c.mesh.data * c.mesh.fsdp
  rows = t.prompts * c.filter.n_kept
  _require(
    rows % t.minibatches == 0,
    f"a step has config.train.prompts x config.filter.n_kept = {rows} rows,"
    f" which config.train.minibatches ({t.minibatches}) must divide",
  )
  rows //= t.minibatches
  if t.microbatch_rows:
    _require(
      rows % t.microbatch_rows == 0,
      f"a minibatch has {rows} rows (config.train.prompts x"
      " config.filter.n_kept / config.train.minibatches), which"
      f" config.train.microbatch_rows ({t.microbatch_rows}) must divide",
    )
    rows = t.microbatch_rows
  sft_rows = c.sft.microbatch_rows or c.sft.rows
  _require(
    c.sft.rows % sft_rows == 0,
    f"config.sft.microbatch_rows ({sft_rows}) must divide config.sft.rows"
    f" ({c.sft.rows})",
  )
  for what, n in (
    ("rows of one gradient (config.train.microbatch_rows or all)", rows),
    ("rows of one gradient (config.sft.microbatch_rows or all)", sft_rows),
  ):
    _require(
      n % shards == 0,
      f"{what}: {n} must be a multiple of config.mesh.data x"
      f" config.mesh.fsdp ({shards})",
    )
  buckets = t.buckets
  _require(
    bool(buckets)
    and buckets[0] >= 1
    and all(a < b for a, b in zip(buckets, buckets[1:], strict=False)),
    f"config.train.buckets must be rising lengths, got {buckets}",
  )
  _require(
    buckets[-1] >= c.sampling.cache_length,
    f"the last of config.train.buckets ({buckets[-1]}) must hold the longest"
    f" rollout, config.sampling.cache_length ({c.sampling.cache_length})",
  )


def _check_schedules(c: "config_lib.Config") -> None:
  for name, x in (("train", c.train), ("sft", c.sft)):
    _require(x.lr > 0, f"config.{name}.lr must be above 0, got {x.lr}")
    _require(
      0 <= x.b1 < 1 and 0 <= x.b2 < 1,
      f"config.{name}.b1 and b2 must be in [0, 1), got {x.b1} and {x.b2}",
    )
    _require(
      x.schedule == "constant" or x.warmup < x.steps,
      f"config.{name}.warmup ({x.warmup}) must be shorter than"
      f" config.{name}.steps ({x.steps}) under a cosine schedule",
    )
  _require(
    0 <= c.sft.heldout < 1,
    f"config.sft.heldout must be in [0, 1), got {c.sft.heldout}",
  )
  _require(
    c.sft.length >= 16, f"config.sft.length must be 16 up, got {c.sft.length}"
  )


def comments(cls: type) -> list[str]:
  """Returns the comment of each setting of a dataclass, in order.

  The comment stands on the line of the field or on the lines above it.
  """
  found, above = [], []
  for line in inspect.getsource(cls).splitlines():
    line = line.strip()
    field = re.match(r"(\w+): ([^#]*?)(?:  # (.*))?$", line)
    if line.startswith("# "):
      above.append(line[2:])
    elif field and not re.match(r"(\w+\.)?\w+Config = ", field[2]):
      found.append(" ".join([*above, field[3] or ""]).strip())
    if not line.startswith("#"):
      above = []
  return found
