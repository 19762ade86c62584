"""Model families: a Hugging Face folder's config.json as a `ModelConfig`.

Qwen2.5, Qwen3 and Llama 3, dense, are the same block with three switches. What
a config asks for beyond them is an error that names the field: a model that is
almost right would train and be wrong.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

from roc import errors, places
from roc.device import model as model_lib

CONFIG_FILE = "config.json"
# Fields of rope scaling: theirs -> ours.
_LLAMA_SCALING = {
  "factor": "rope_factor",
  "low_freq_factor": "rope_low_freq_factor",
  "high_freq_factor": "rope_high_freq_factor",
  "original_max_position_embeddings": "rope_original_length",
}
_YARN_SCALING = {
  "factor": "rope_factor",
  "beta_fast": "rope_beta_fast",
  "beta_slow": "rope_beta_slow",
  "attention_factor": "rope_attention_factor",
  "original_max_position_embeddings": "rope_original_length",
}


@dataclasses.dataclass(frozen=True)
class Family:
  """What a `model_type` means.

  Attributes:
    architecture: class name in `architectures`.
    qk_norm: as in `ModelConfig`.
    qkv_bias: likewise.
  """

  architecture: str
  qk_norm: bool
  qkv_bias: bool

  @property
  def base(self) -> str:
    """Class name of the model without its head."""
    return self.architecture.replace("ForCausalLM", "Model")


FAMILIES = {
  "qwen2": Family("Qwen2ForCausalLM", qk_norm=False, qkv_bias=True),
  "qwen3": Family("Qwen3ForCausalLM", qk_norm=True, qkv_bias=False),
  "llama": Family("LlamaForCausalLM", qk_norm=False, qkv_bias=False),
}


def _qwen3(d_model, n_layers, n_heads, d_ff, *, tie=False):
  return model_lib.ModelConfig(
    vocab_size=151_936,
    d_model=d_model,
    n_layers=n_layers,
    n_heads=n_heads,
    n_kv_heads=8,
    head_dim=128,
    d_ff=d_ff,
    rope_theta=1e6,
    tie_embeddings=tie,
  )


def _qwen25(d_model, n_layers, n_heads, n_kv_heads, d_ff, vocab, *, tie=False):
  return model_lib.ModelConfig(
    vocab_size=vocab,
    d_model=d_model,
    n_layers=n_layers,
    n_heads=n_heads,
    n_kv_heads=n_kv_heads,
    head_dim=d_model // n_heads,
    d_ff=d_ff,
    rope_theta=1e6,
    tie_embeddings=tie,
    qk_norm=False,
    qkv_bias=True,
  )


def _llama3(d_model, n_layers, n_heads, head_dim, d_ff, factor, *, tie=False):
  return model_lib.ModelConfig(
    vocab_size=128_256,
    d_model=d_model,
    n_layers=n_layers,
    n_heads=n_heads,
    n_kv_heads=8,
    head_dim=head_dim,
    d_ff=d_ff,
    rope_theta=5e5,
    rope_factor=factor,
    norm_eps=1e-5,
    tie_embeddings=tie,
    qk_norm=False,
  )


# As published, for planning without weights.
PUBLISHED: dict[str, model_lib.ModelConfig] = {
  "Qwen/Qwen3-0.6B": _qwen3(1024, 28, 16, 3072, tie=True),
  "Qwen/Qwen3-1.7B": _qwen3(2048, 28, 16, 6144, tie=True),
  "Qwen/Qwen3-4B": _qwen3(2560, 36, 32, 9728, tie=True),
  "Qwen/Qwen3-8B": _qwen3(4096, 36, 32, 12_288),
  "Qwen/Qwen3-14B": _qwen3(5120, 40, 40, 17_408),
  "Qwen/Qwen2.5-0.5B": _qwen25(896, 24, 14, 2, 4864, 151_936, tie=True),
  "Qwen/Qwen2.5-1.5B": _qwen25(1536, 28, 12, 2, 8960, 151_936, tie=True),
  "Qwen/Qwen2.5-3B": _qwen25(2048, 36, 16, 2, 11_008, 151_936, tie=True),
  "Qwen/Qwen2.5-7B": _qwen25(3584, 28, 28, 4, 18_944, 152_064),
  "Qwen/Qwen2.5-14B": _qwen25(5120, 48, 40, 8, 13_824, 152_064),
  "meta-llama/Llama-3.2-1B": _llama3(2048, 16, 32, 64, 8192, 32.0, tie=True),
  "meta-llama/Llama-3.2-3B": _llama3(3072, 28, 24, 128, 8192, 32.0, tie=True),
  "meta-llama/Llama-3.1-8B": _llama3(4096, 32, 32, 128, 14_336, 8.0),
}

# Fields that change the function computed, and the values that we compute.
_NEUTRAL: dict[str, Callable[[Any], bool]] = {
  "hidden_act": lambda x: x == "silu",
  "mlp_bias": lambda x: not x,
  "use_sliding_window": lambda x: not x,
  "layer_types": lambda x: (
    not x or isinstance(x, list) and all(y == "full_attention" for y in x)
  ),
  "pretraining_tp": lambda x: x in (None, 1),
  "quantization_config": lambda x: not x,
  "partial_rotary_factor": lambda x: x in (None, 1, 1.0),
}


def read(folder: str | places.Path) -> model_lib.ModelConfig:
  """The shapes of the model in a Hugging Face folder.

  Raises:
    errors.UserError: no readable config.json, another architecture, a field
      that asks for what the block does not do, or one that makes no sense;
      names it.
  """
  return _Reader(*_fields(folder)).config()


def longest(folder: str | places.Path) -> int | None:
  """Positions that the model in a folder is made for, if it says so.

  Raises:
    errors.UserError: as `read`.
  """
  path, fields = _fields(folder)
  shapes = _Reader(path, fields).config()
  length = fields.get("max_position_embeddings")
  if length is None or shapes.rope_factor == 1.0:
    return length
  return max(length, round(shapes.rope_original_length * shapes.rope_factor))


def _fields(folder: str | places.Path) -> tuple[places.Path, dict[str, Any]]:
  path = places.as_path(folder) / CONFIG_FILE
  try:
    with places.reaching(path, "read"):
      fields = json.loads(path.read_bytes())
  except OSError as e:
    raise errors.UserError(
      f"{path} cannot be read ({e.strerror}); every model folder has one"
    ) from e
  except (ValueError, RecursionError) as e:
    raise errors.UserError(f"{path} is not JSON: {e}") from e
  if not isinstance(fields, dict):
    raise errors.UserError(f"{path} holds no JSON object")
  return path, fields


class _Reader:
  def __init__(self, path: places.Path, fields: dict[str, Any]):
    self._path = path
    self._fields = fields

  def config(self) -> model_lib.ModelConfig:
    kind = self._fields.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
      raise self._error(
        f"model_type is {kind!r}; known are {', '.join(FAMILIES)}"
      )
    # A base model, which has no head of its own, is saved under another name.
    known = [family.architecture], [family.base]
    architectures = self._fields.get("architectures") or known[0]
    if architectures not in known:
      raise self._error(
        f"architectures is {architectures}, not {' or '.join(map(str, known))}"
      )
    flags = ("tie_word_embeddings", "attention_bias", "mlp_bias")
    for name in (*flags, "use_sliding_window"):
      if not isinstance(self._fields.get(name), bool | None):
        raise self._error(
          f"{name} must be true or false, not {self._fields[name]!r}"
        )
    for name, is_neutral in _NEUTRAL.items():
      if name in self._fields and not is_neutral(self._fields[name]):
        raise self._error(f"{name}={self._fields[name]!r} is not supported")
    # Qwen2 has biases without saying so, and none of the output product.
    if self._fields.get("attention_bias") and not family.qkv_bias:
      raise self._error("attention_bias=True is not supported")
    d_model = self._number("hidden_size")
    n_heads = self._number("num_attention_heads")
    n_kv_heads = self._number("num_key_value_heads", n_heads)
    if n_heads % n_kv_heads:
      raise self._error(
        f"num_attention_heads={n_heads} is no multiple of"
        f" num_key_value_heads={n_kv_heads}"
      )
    if self._fields.get("head_dim") is None and d_model % n_heads:
      raise self._error(
        f"hidden_size={d_model} is no multiple of"
        f" num_attention_heads={n_heads}, and there is no head_dim"
      )
    head_dim = self._number("head_dim", d_model // n_heads)
    if head_dim % 2:
      raise self._error(
        f"head_dim is {head_dim}, and rotary positions need an even one"
      )
    self._number("max_position_embeddings", 1)  # said only if it is nonsense
    return model_lib.ModelConfig(
      vocab_size=self._number("vocab_size"),
      d_model=d_model,
      n_layers=self._number("num_hidden_layers"),
      n_heads=n_heads,
      n_kv_heads=n_kv_heads,
      head_dim=head_dim,
      d_ff=self._number("intermediate_size"),
      norm_eps=self._number("rms_norm_eps", 1e-6, float),
      tie_embeddings=bool(self._fields.get("tie_word_embeddings", False)),
      qk_norm=family.qk_norm,
      qkv_bias=family.qkv_bias,
      **self._rope(),
    )

  def _rope(self) -> dict[str, Any]:
    """Theta and scaling, as transformers finds them.

    `rope_scaling` (version 4) goes before `rope_parameters` (version 5); a
    theta in either goes before the field of the config.
    """
    name = "rope_scaling" if self._fields.get("rope_scaling") else ""
    name = name or "rope_parameters"
    rope = self._fields.get(name) or {}
    if not isinstance(rope, dict):
      raise self._error(f"{name} must be an object, not {rope!r}")
    names = set(rope)
    rope = {k: v for k, v in rope.items() if v is not None}
    if "rope_theta" not in rope:
      rope["rope_theta"] = self._fields.get("rope_theta", 1e4)
    if not _NEUTRAL["partial_rotary_factor"](rope.get("partial_rotary_factor")):
      raise self._error(
        f"partial_rotary_factor={rope['partial_rotary_factor']!r} is not"
        " supported"
      )
    length = self._fields.get("max_position_embeddings")
    rope.setdefault("original_max_position_embeddings", length)
    if self._fields.get("original_max_position_embeddings") is not None:
      rope["original_max_position_embeddings"] = self._fields[
        "original_max_position_embeddings"
      ]

    def number(key: str, default: Any = None, kind: type = float) -> Any:
      where = key if key in self._fields else f"{name}.{key}"
      return self._checked(where, rope.get(key, default), kind)

    kind = rope.get("rope_type", rope.get("type", "default"))
    found: dict[str, Any] = {"rope_theta": number("rope_theta")}
    if kind == "default":
      return found
    if kind not in model_lib.ROPE_SCALINGS:
      raise self._error(f"rope scaling {kind!r} is not supported")
    found["rope_scaling"] = kind
    original = number("original_max_position_embeddings", None, int)
    found["rope_original_length"] = original
    needed = ("factor", "low_freq_factor", "high_freq_factor")
    for key in needed if kind == "llama3" else needed[:1]:
      if key not in names:
        raise self._error(f"rope scaling {kind!r} lacks {key}")
      if kind == "llama3":
        found[_LLAMA_SCALING[key]] = number(key)
    if kind == "yarn":
      if rope.get("truncate") is False:
        raise self._error("rope scaling 'yarn' with truncate=false is unknown")
      ratio = length / original if isinstance(length, int) else None
      found["rope_factor"] = factor = number("factor", ratio)
      found["rope_beta_fast"] = number("beta_fast", 32.0)
      found["rope_beta_slow"] = number("beta_slow", 1.0)
      grow = lambda by: 0.1 * by * math.log(factor) + 1.0 if factor > 1 else 1.0
      default = grow(1.0)
      if rope.get("mscale") and rope.get("mscale_all_dim"):
        default = grow(number("mscale")) / grow(number("mscale_all_dim"))
      found["rope_attention_factor"] = number("attention_factor", default)
    if found["rope_factor"] < 1:
      raise self._error(
        f"{name}.factor is {found['rope_factor']}; it must be at least 1"
      )
    for low, high in (
      ("low_freq_factor", "high_freq_factor"),
      ("beta_slow", "beta_fast"),
    ):
      if found.get(f"rope_{low}", 0) >= found.get(f"rope_{high}", 1):
        raise self._error(f"{name}.{low} must be below {name}.{high}")
    return found

  def _number(self, name: str, default: Any = None, kind: type = int) -> Any:
    value = self._fields.get(name)
    return self._checked(name, default if value is None else value, kind)

  def _checked(self, name: str, value: Any, kind: type) -> Any:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value <= 0:
      raise self._error(f"{name} must be a positive number, got {value!r}")
    if kind(value) != value:
      raise self._error(f"{name} must be a whole number, got {value!r}")
    return kind(value)

  def _error(self, what: str) -> errors.UserError:
    return errors.UserError(f"{self._path}: {what}")


def to_fields(c: model_lib.ModelConfig, dtype: str) -> dict[str, Any]:
  """A config.json for this model, as transformers reads it.

  Raises:
    ValueError: no family has this combination of switches.
  """
  switches = c.qk_norm, c.qkv_bias
  names = {(f.qk_norm, f.qkv_bias): name for name, f in FAMILIES.items()}
  if switches not in names:
    raise ValueError("no family has both a query/key norm and biases")
  model_type = names[switches]
  fields: dict[str, Any] = {
    "architectures": [FAMILIES[model_type].architecture],
    "model_type": model_type,
    "vocab_size": c.vocab_size,
    "hidden_size": c.d_model,
    "intermediate_size": c.d_ff,
    "num_hidden_layers": c.n_layers,
    "num_attention_heads": c.n_heads,
    "num_key_value_heads": c.n_kv_heads,
    "head_dim": c.head_dim,
    "hidden_act": "silu",
    "rms_norm_eps": c.norm_eps,
    "rope_theta": c.rope_theta,
    "tie_word_embeddings": c.tie_embeddings,
    "attention_bias": False,
    "torch_dtype": dtype,
  }
  if c.rope_factor != 1.0 or c.rope_scaling == "yarn":
    of = _YARN_SCALING if c.rope_scaling == "yarn" else _LLAMA_SCALING
    fields["rope_scaling"] = {"rope_type": c.rope_scaling} | {
      theirs: getattr(c, ours) for theirs, ours in of.items()
    }
  return fields
