"""What a run is: frozen dataclasses, and the ConfigDict they are set through.

Experiments and the command line write into a locked `ConfigDict`; `resolve`
checks it as a whole and freezes it into `Config`, which is all that the
programs ever see. A new setting is one line in one dataclass below: its name,
its type, its default and, as the comment on it, its help text.

Everything here changes a compiled program, the optimisation, a seed, a cadence
or a path. How the host side is built (task, tools, rewards, sandbox) belongs to
gin (`roc.wiring`); `host` below only says which gin files and bindings to read.
"""

import contextlib
import dataclasses
import json
import os
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal

import ml_collections
from ml_collections import config_dict

from roc import config_checks, errors, synonyms
from roc.device import lora, sampling, selection
from roc.device import model as model_lib
from roc.device import step as step_lib

ModelConfig = model_lib.ModelConfig
SamplingConfig = sampling.SamplingConfig
FilterConfig = selection.FilterConfig
LossConfig = step_lib.LossConfig
LoraConfig = lora.LoraConfig


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """How the devices are laid out; the product is the number of devices."""

  data: int = 1  # copies of the parameters, each with its share of the rows
  fsdp: int = 1  # parameters and rows both split
  tensor: int = 1  # heads and feed-forward width split


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """Reinforcement learning: schedule, batch and optimizer."""

  steps: int = 60  # batches of rollouts, which schedules count too
  prompts: int = 16  # problems per step
  lr: float = 1e-4  # peak learning rate
  warmup: int = 5  # steps of linear warm-up
  schedule: Literal["constant", "cosine"] = "constant"  # after the warm-up
  weight_decay: float = 0.0  # AdamW's
  b1: float = 0.9  # AdamW's
  b2: float = 0.95  # AdamW's
  grad_clip: float = 1.0  # largest global norm of a gradient; 0: off
  minibatches: int = 1  # optimizer steps per batch of rollouts
  microbatch_rows: int = 0  # rows per gradient accumulation; 0: all at once
  buckets: tuple[int, ...] = (96, 128, 192, 256)  # padded lengths of a batch
  # Go on with the moments of init_from's optimizer; the learning rate follows
  # this run's own schedule, warm-up included.
  keep_optimizer: bool = False
  replay: str = ""  # directory of saved rollouts to train on; empty: draw them


@dataclasses.dataclass(frozen=True)
class SftConfig:
  """Supervised fine-tuning on conversations or demonstrations."""

  # JSONL files of conversations, from here or from the checkout; empty: the
  # task's own demonstrations.
  data: tuple[str, ...] = ()
  # What is longer than a row: an error, left out, or cut off there.
  overlong: Literal["error", "drop", "truncate"] = "error"
  heldout: float = 0.0  # share that is not learnt, to measure on
  heldout_every: int = 100  # steps between; 0: only the first and last
  heldout_calls: int = 64  # of its turns that call, drawn greedily; 0: none
  n_demos: int = 4000  # demonstrations
  steps: int = 600  # updates
  rows: int = 64  # packed rows per update
  microbatch_rows: int = 0  # rows per gradient accumulation; 0: all at once
  length: int = 192  # tokens per row
  lr: float = 1e-3  # peak learning rate
  warmup: int = 20  # steps of linear warm-up
  schedule: Literal["constant", "cosine"] = "cosine"  # after the warm-up
  weight_decay: float = 0.01  # AdamW's
  b1: float = 0.9  # AdamW's
  b2: float = 0.95  # AdamW's
  grad_clip: float = 1.0  # largest global norm of a gradient; 0: off


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """Accuracy on held-out problems."""

  every: int = 10  # steps between evaluations; 0: only the first and last
  n_problems: int = 128  # held-out problems
  samples: int = 1  # rollouts per problem
  temperature: float = 1.0  # of the softmax; 0: greedy
  head: bool = True  # also ask for the answer without the tool


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """When everything is saved."""

  every: int = 5  # steps between checkpoints; 20 times as many in sft
  keep: int = 2  # newest checkpoints that are kept
  # Where they lie, such as gs://bucket/run; empty: in the workdir.
  directory: str = ""


@dataclasses.dataclass(frozen=True)
class LogConfig:
  """What a run shows and writes beside its metrics."""

  traces_every: int = 1  # steps between trace files; 0: none
  tensorboard: bool = True  # write event files under logs/
  progress: bool = True  # show progress on the terminal
  # Share of a step's rollouts lost to the environment; more is warned of.
  void_warning: float = 0.1


@dataclasses.dataclass(frozen=True)
class CollectConfig:
  """Rollouts of a checkpoint, saved to be read; only `rollout` reads it."""

  task: Literal["eval", "train"] = "eval"  # the host's eval_task or train_task
  first: int = 0  # place of the first problem in the task's order
  n_problems: int = 64  # problems from there
  samples: int = 8  # rollouts per problem
  shard: int = 32  # problems per file
  # Number of the random stream: another value gives other rollouts. Training
  # has 0, evaluation 2**31 - 1.
  step: int = 2**31 - 2


@dataclasses.dataclass(frozen=True)
class CompareConfig:
  """The comparison of filters; only `compare` reads it."""

  seeds: int = 3  # runs of each arm, at seed, seed + 1, ...


@dataclasses.dataclass(frozen=True)
class HostConfig:
  """Which gin files and bindings build the host side."""

  gin_files: tuple[str, ...] = ()  # read in order
  gin_bindings: tuple[str, ...] = ()  # statements after the files; these win


@dataclasses.dataclass(frozen=True)
class Config:
  """A whole run, checked and frozen."""

  seed: int = 0  # of everything that is random
  # Hugging Face folder, or ORG/NAME on the hub: shapes, tokenizer, template and
  # first parameters; empty: the quickstart's tokenizer and fresh ones.
  pretrained: str = ""
  # Workdir, checkpoint or Hugging Face folder whose parameters to start from;
  # "random": fresh ones although there is config.pretrained.
  init_from: str = ""
  model: ModelConfig = ModelConfig()
  lora: LoraConfig = LoraConfig()
  mesh: MeshConfig = MeshConfig()
  sampling: SamplingConfig = SamplingConfig()
  loss: LossConfig = LossConfig()
  filter: FilterConfig = FilterConfig()
  train: TrainConfig = TrainConfig()
  sft: SftConfig = SftConfig()
  eval: EvalConfig = EvalConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  log: LogConfig = LogConfig()
  collect: CollectConfig = CollectConfig()
  compare: CompareConfig = CompareConfig()
  host: HostConfig = HostConfig()


# ---------------------------------------------------------- to and from text


def default_config() -> ml_collections.ConfigDict:
  """Returns every setting at its default, locked: unknown keys are errors."""
  config = ml_collections.ConfigDict(dataclasses.asdict(Config()))
  for prefix, cls in _sections(Config, ""):
    section = config[prefix.rstrip(".")] if prefix else config
    for field in dataclasses.fields(cls):
      if type(None) in typing.get_args(field.type):
        kind = _without_none(field.type)
        section[field.name] = config_dict.placeholder(kind)
  return config.lock()


def resolve(
  config: ml_collections.ConfigDict, *, is_trained: bool = True
) -> Config:
  """Checks a ConfigDict as a whole and freezes it.

  Args:
    config: made by `default_config` and overridden; other keys are errors.
    is_trained: whether the program trains with it: then sampling and loss must
      agree too, which an evaluation does not ask for.

  Returns:
    The frozen `Config` that programs take; bounds of the loss that were None
    are numbers.

  Raises:
    errors.UserError: an unknown key, a wrong type or values that do not fit
      together, in one sentence that names the keys and the remedy.
  """
  resolved = _build(Config, config.to_dict(), "")
  loss = step_lib.with_own_bounds(resolved.loss)
  resolved = dataclasses.replace(resolved, loss=loss)
  check(resolved)
  if is_trained:
    config_checks.check_training(resolved)
  return resolved


def check(config: Config) -> None:
  """Raises `errors.UserError` if its values do not fit together."""
  config_checks.check(config)


def to_json(config: Config) -> str:
  """Returns the configuration as indented JSON, the text of config.json."""
  return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str, where: str = "config.json") -> Config:
  """Reads back what `to_json` wrote; `where` names the file in errors."""
  try:
    values = json.loads(text)
  except json.JSONDecodeError as e:
    raise errors.UserError(
      f"{where} line {e.lineno}: not JSON ({e.msg}); restore the file or start"
      " in another workdir"
    ) from None
  if isinstance(values, dict) and "model_type" in values:
    raise errors.UserError(
      f"{where} is that of a published model and not of a run; a run starts"
      " from such a folder with config.pretrained, and `generate --model` draws"
      " from it"
    )
  return _build(Config, values, "")


def flatten(config: Config) -> dict[str, Any]:
  """Returns `{"train.lr": 1e-4, ...}`, one entry per setting."""
  return dict(_leaves(dataclasses.asdict(config), ""))


def choices() -> dict[str, tuple[str, ...]]:
  """Returns `{"train.schedule": ("constant", "cosine"), ...}`."""
  return {
    f"{prefix}{field.name}": typing.get_args(field.type)
    for prefix, cls in _sections(Config, "")
    for field in dataclasses.fields(cls)
    if typing.get_origin(field.type) is Literal
  } | {"lora.targets": lora.TARGETS}


def help_texts() -> dict[str, str]:
  """Returns `{"train.lr": "peak learning rate", ...}` from the comments."""
  return {
    f"{prefix}{field.name}": text
    for prefix, cls in _sections(Config, "")
    for field, text in zip(
      (f for f in dataclasses.fields(cls) if not _is_section(f.type)),
      config_checks.comments(cls),
      strict=True,
    )
  }


# ------------------------------------------------------------ what a run is

# These change how often something is saved or shown, or where, and nothing
# that a run computes.
_NOT_IDENTITY = (
  *("checkpoint.", "log.", "eval.every", "collect.", "compare.", "host."),
  *("sft.heldout_every", "sft.heldout_calls"),
  "sft.data",  # what the files hold counts, not where they lie
)
# Bounds that a run's correction does not read say nothing; runs from before
# they could be None recorded these.
_UNREAD = {"loss.correction_low": 0.5, "loss.correction_high": 2.0}
# A program's run is not changed by the settings of another program.
_NOT_READ_BY = {
  "sft": ("train.", "loss.", "filter."),
  "train": ("sft.",),
}


def identity(config: Config, program: str = "train") -> dict[str, Any]:
  """Returns the settings that make a run of `program` that run.

  Cadence, display and the host's file names are left out (what the gin files
  bind is compared as gin text). So is the number of steps where it only says
  when to stop: under a constant schedule a finished run may be prolonged.

  Args:
    config: the resolved configuration.
    program: `train`, `sft` or another; settings it never reads are left out.

  Returns:
    Flat `{"section.name": value}`, JSON-able.
  """
  left_out = (*_NOT_IDENTITY, *_NOT_READ_BY.get(program, ()))
  flat = {
    key: list(value) if isinstance(value, tuple) else value
    for key, value in _with_bounds(config).items()
    if not key.startswith(left_out)
  }
  for key in ("init_from", "train.replay", "pretrained"):
    if flat.get(key):
      flat[key] = os.path.normpath(str(flat[key]))
  if not flat.get("lora.rank"):  # of a run without adapters it says nothing
    flat = {
      k: v
      for k, v in flat.items()
      if k == "lora.rank" or not k.startswith("lora.")
    }
  for section in ("train", "sft"):
    if flat.get(f"{section}.schedule") == "constant":
      del flat[f"{section}.steps"]
  return flat


def defaults(config: Config) -> dict[str, Any]:
  """What every setting is that the record of a run does not name.

  Args:
    config: of the run, as far as defaults depend on it.
  """
  loss = LossConfig(kind=config.loss.kind, correction=config.loss.correction)
  return _with_bounds(Config(loss=loss))


def _with_bounds(config: Config) -> dict[str, Any]:
  """`flatten`, with the bounds of the loss that None stands for."""
  loss = step_lib.with_own_bounds(config.loss)
  flat = flatten(dataclasses.replace(config, loss=loss))
  return flat | {k: v for k, v in _UNREAD.items() if flat[k] is None}


def diff(a: Config, b: Config) -> list[str]:
  """Returns `["train.lr: 0.0001 -> 1e-06", ...]`, empty when equal."""
  flat_a, flat_b = flatten(a), flatten(b)
  return [
    f"{key}: {flat_a[key]!r} -> {flat_b[key]!r}"
    for key in flat_a
    if flat_a[key] != flat_b[key]
  ]


# ------------------------------------------------------------------ plumbing


def _is_section(kind: Any) -> bool:
  return dataclasses.is_dataclass(kind)


def _without_none(kind: Any) -> Any:
  """`float | None` -> `float`; other types as they are."""
  some = [k for k in typing.get_args(kind) if k is not type(None)]
  return some[0] if type(None) in typing.get_args(kind) else kind


def _sections(cls: type, prefix: str) -> Iterator[tuple[str, type]]:
  yield prefix, cls
  for field in dataclasses.fields(cls):
    if _is_section(field.type):
      yield from _sections(typing.cast(type, field.type), f"{field.name}.")


def _leaves(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
  for key, value in values.items():
    if isinstance(value, dict):
      yield from _leaves(value, f"{prefix}{key}.")
    else:
      yield prefix + key, value


def _build(cls: type, values: Any, prefix: str) -> Any:
  """Builds a dataclass from nested dicts, every key and type checked."""
  if not isinstance(values, dict):
    raise errors.UserError(
      f"config.{prefix.rstrip('.')} must be a section of settings, got"
      f" {values!r}"
    )
  fields = {f.name: f for f in dataclasses.fields(cls)}
  for key in values:
    if key not in fields:
      raise errors.UserError(
        f"config.{prefix}{key} does not exist"
        f"{synonyms.closest(prefix + key, flatten(Config()))}"
      )
  built = {}
  for name, value in values.items():
    kind = fields[name].type
    if _is_section(kind):
      built[name] = _build(typing.cast(type, kind), value, f"{name}.")
    else:
      built[name] = _typed(f"config.{prefix}{name}", value, kind)
  return cls(**built)


def _typed(name: str, value: Any, kind: Any) -> Any:
  """Returns `value` as `kind`, or says in one sentence why it is not one."""
  if _without_none(kind) is not kind:
    if value is None:
      return None
    kind = _without_none(kind)
  origin = typing.get_origin(kind)
  if origin is Literal:
    choices = typing.get_args(kind)
    if value in choices:
      return value
    hint = errors.closest(str(value), choices)
    raise errors.UserError(
      f"{name} must be one of {', '.join(choices)}, got {value!r}{hint}"
    )
  if origin is tuple:
    if isinstance(value, list | tuple):
      element = typing.get_args(kind)[0]
      return tuple(
        _typed(f"{name}[{i}]", v, element) for i, v in enumerate(value)
      )
  elif kind is float and isinstance(value, int) and not isinstance(value, bool):
    with contextlib.suppress(OverflowError):
      return float(value)
  elif isinstance(value, kind) and (
    kind is bool or not isinstance(value, bool)
  ):
    return value
  wanted = kind if isinstance(kind, types.GenericAlias) else kind.__name__
  raise errors.UserError(f"{name} must be {wanted}, got {value!r}")
