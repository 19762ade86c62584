"""Runs that start from a published model: `config.pretrained`.

A Hugging Face folder says what the network looks like, which tokenizer and chat
template belong to it, and what its parameters are. `settle` takes the shapes
over into the configuration, so that a run's record holds them; the rest is read
when the run is built.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax

from roc import config as config_lib
from roc import errors, hub, places
from roc.device import families, model, weights

# `config.init_from` for a fresh model of a folder's shapes.
RANDOM = "random"

# What a folder does not say of a model: how it is computed here.
_FREE = ("dtype", "remat", "attention")


def settle(cfg: config_lib.Config) -> config_lib.Config:
  """The configuration with the shapes of `config.pretrained`, if there is one.

  Settling again changes nothing.

  Raises:
    errors.UserError: the folder cannot be had or read, or the configuration
      says something else of the model.
  """
  if not cfg.pretrained:
    return cfg
  published = families.read(folder(cfg))
  default = model.ModelConfig()
  shapes = {}
  for field in dataclasses.fields(model.ModelConfig):
    if field.name in _FREE:
      continue
    found = getattr(published, field.name)
    said = getattr(cfg.model, field.name)
    if said not in (getattr(default, field.name), found):
      raise errors.UserError(
        f"config.model.{field.name} is {said} and {cfg.pretrained} has"
        f" {found}; leave it out, or config.pretrained"
      )
    shapes[field.name] = found
  settled = dataclasses.replace(cfg.model, **shapes)
  cfg = dataclasses.replace(cfg, model=settled)
  config_lib.check(cfg)
  return cfg


def length_note(cfg: config_lib.Config) -> str | None:
  """A line for people where texts may be longer than the model is made for."""
  if not cfg.pretrained:
    return None
  longest = families.longest(folder(cfg))
  length = cfg.sampling.cache_length
  if longest is None or length <= longest:
    return None
  return (
    f"warning: config.sampling.cache_length is {length} and {cfg.pretrained} is"
    f" made for {longest} positions (max_position_embeddings); what lies beyond"
    " is likely to be nonsense"
  )


def folder(cfg: config_lib.Config) -> pathlib.Path:
  """Where the files of `config.pretrained` are, perhaps without the weights.

  Raises:
    errors.UserError: there is no such folder, or it cannot be fetched.
  """
  return _found(cfg, functools.partial(hub.fetch, weights=False))


def weights_folder(cfg: config_lib.Config) -> places.Path:
  """Where the weights of `config.pretrained` are.

  Raises:
    errors.UserError: there is no such folder, or it cannot be fetched.
  """
  return _found(cfg, hub.weights)


def _found(cfg: config_lib.Config, find: Callable[[str], Any]) -> Any:
  try:
    return find(cfg.pretrained)
  except errors.UserError as e:
    raise errors.UserError(f"config.pretrained: {e}") from e


def is_model(source: str | places.Path) -> bool:
  """Whether a path is a folder with a published model's weights.

  Raises:
    errors.UserError: an object store cannot be reached.
  """
  path = places.as_path(source)
  with places.reaching(path, "read"):
    has_shapes = (path / families.CONFIG_FILE).exists()
    return has_shapes and any(path.glob("*.safetensors"))


def load(
  source: str | places.Path, policy: model.Policy, mesh: jax.sharding.Mesh
) -> model.Params:
  """The weights of a folder, for a policy that must have its shapes.

  Raises:
    errors.UserError: it holds none, or of other shapes.
  """
  path = places.as_path(source)
  if not is_model(path):
    raise errors.UserError(
      f"{path} holds no weights (*.safetensors); set config.init_from to a run,"
      f" or to {RANDOM} for fresh parameters"
    )
  # A base that is to be kept in bfloat16 need not be there in float32 before.
  dtype = policy.lora.base_dtype if policy.lora.rank else "float32"
  return weights.load(path, policy, mesh, dtype=dtype)
