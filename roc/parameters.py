"""What a run starts from, and what it left: parameters from everywhere.

A run starts from fresh parameters, a Hugging Face folder or another run's
checkpoint. A run of adapters saves these alone; whoever wants its policy gets
the base from where the run had it, and is told if it is another one by now.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from roc import build, errors, places, pretrained
from roc import config as config_lib
from roc.device import checkpoint, lora, manifest, model, sharding
from roc.device import learner as learner_lib
from roc.device import step as step_lib

_BEGAN_FROM = "began_from"  # in what a checkpoint says besides its arrays
_REFERENCE = "reference"  # beside the checkpoints


@dataclasses.dataclass(frozen=True)
class Beginning:
  """What a run begins with."""

  state: step_lib.TrainState
  # JSON-able and for its checkpoints: `init_from` or `pretrained`, and of a run
  # the step and checksum of the checkpoint.
  origin: dict[str, Any]


def begin(
  cfg: config_lib.Config,
  learner: learner_lib.Learner,
  *,
  keep_optimizer: bool = False,
) -> Beginning:
  """Parameters of `init_from` or `pretrained`, or fresh ones; fresh optimizer.

  Args:
    cfg: of the run.
    learner: of the run.
    keep_optimizer: take over the optimizer of the run in `init_from`.

  Raises:
    errors.UserError: they cannot be had, or are another model's.
  """
  key = jax.random.key(cfg.seed)
  opt_state = _optimizer_of(cfg.init_from, learner) if keep_optimizer else None
  if _is_fresh(cfg):
    return Beginning(learner.init(key), {_BEGAN_FROM: {}})
  loaded = _load_first(cfg, learner.policy, learner.mesh)
  origin = {"source": cfg.init_from or cfg.pretrained}
  if loaded.name:
    origin |= {"step": loaded.step, "checkpoint": loaded.name}
  state = learner.start_from(loaded.params, key, opt_state)
  return Beginning(state, {_BEGAN_FROM: origin})


def first_state(
  cfg: config_lib.Config,
  learner: learner_lib.Learner,
  *,
  keep_optimizer: bool = False,
) -> step_lib.TrainState:
  """The state of `begin`."""
  return begin(cfg, learner, keep_optimizer=keep_optimizer).state


def origin_of(restored: checkpoint.Restored) -> dict[str, Any]:
  """`Beginning.origin` of the run that left a checkpoint."""
  return {_BEGAN_FROM: restored.extra.get(_BEGAN_FROM, {})}


def keep_reference(
  checkpoints: checkpoint.Checkpoints, begun: Beginning
) -> Any:
  """Stores what a run trains as it is before the first step, for a KL term.

  The run's own copy, since `init_from` may be trained on or go away.

  Returns:
    A copy that no update donates.
  """
  trained = jax.tree.map(jnp.copy, begun.state.params)
  _references(checkpoints).save(0, {"params": trained}, begun.origin)
  return trained


def load_reference(
  checkpoints: checkpoint.Checkpoints, learner: learner_lib.Learner
) -> Any:
  """What `keep_reference` stored.

  Raises:
    errors.UserError: the run did not, or it is damaged.
  """
  kept = _references(checkpoints)
  restored = kept.restore({"params": learner.abstract_state.params})
  if restored is None:
    raise errors.UserError(
      f"config.loss.kl_coef compares with the policy that the run began from,"
      f" and {kept.directory} has none: the run was begun without a KL term, or"
      " the directory is gone; restore it, or start in another workdir"
    )
  return restored.state["params"]


def _references(
  checkpoints: checkpoint.Checkpoints,
) -> checkpoint.Checkpoints:
  return checkpoint.Checkpoints(checkpoints.directory / _REFERENCE, keep=1)


def go_on(
  cfg: config_lib.Config,
  learner: learner_lib.Learner,
  restored: checkpoint.Restored,
) -> step_lib.TrainState:
  """The state of a run's checkpoint; no other one is built beside it.

  Nothing of `init_from` is needed, but where adapters are trained: then their
  base, which no checkpoint has, is read where the run had it.

  Raises:
    errors.UserError: the base cannot be had, or is another one by now.
  """
  if learner.policy.lora.rank:
    step = _first_step(restored.extra)
    loaded = _load_first(cfg, learner.policy, learner.mesh, step)
    _, seal_2 = learner.take(loaded.params, jax.random.key(cfg.seed))
    saved_2 = restored.state.base
    _check_base(cfg, f"step {restored.step}", seal_2, saved_2)
  return restored.state


def _first_step(extra: dict[str, Any]) -> int | None:
  """Of the checkpoint that a run began from, if it was one."""
  return extra.get(_BEGAN_FROM, {}).get("step")


def _optimizer_of(source: str, learner: learner_lib.Learner) -> Any:
  """The optimizer's state of another run, for `learner`.

  Args:
    source: `config.init_from`.
    learner: of the run that starts.

  Raises:
    errors.UserError: `source` is no run, or has another optimizer or other
      adapters.
  """
  if source in ("", pretrained.RANDOM) or pretrained.is_model(source):
    raise errors.UserError(
      "config.train.keep_optimizer wants a run in config.init_from, which is"
      f" {source!r}; published and fresh parameters have no optimizer"
    )
  theirs = _config_of(source)
  if theirs is not None and theirs.lora != learner.policy.lora:
    raise errors.UserError(
      f"config.train.keep_optimizer: {source} was trained with other settings"
      " in config.lora, so its optimizer is of other parameters"
    )
  abstract = {"opt_state": learner.abstract_state.opt_state}
  found, *_ = _restore(source, abstract, None)
  build.say(f"optimizer of {source}")
  return found.state["opt_state"]


def first_params(
  cfg: config_lib.Config, policy: model.Policy, mesh: jax.sharding.Mesh
) -> model.Params:
  """Parameters that a run starts from, laid out over a mesh.

  Those of a run of adapters come with its adapters where `policy` has adapters
  of the same kind, else added up.

  Raises:
    errors.UserError: they cannot be had, or are another model's.
  """
  return _load_first(cfg, policy, mesh).params


def _load_first(
  cfg: config_lib.Config,
  policy: model.Policy,
  mesh: jax.sharding.Mesh,
  step: int | None = None,
) -> "Loaded":
  """`first_params`, of one step where they are a run's; says where from."""
  if _is_fresh(cfg):
    where = sharding.param_shardings(mesh, policy.abstract_params)
    fresh = jax.jit(policy.init, out_shardings=where)
    return Loaded(fresh(jax.random.key(cfg.seed)), 0, "", "")
  source = cfg.init_from or pretrained.weights_folder(cfg)
  if cfg.init_from and not pretrained.is_model(source):
    loaded = _load_run(source, policy, mesh, step)
  else:
    params = pretrained.load(source, policy, mesh)
    loaded = Loaded(params, 0, "", f"parameters from {source}")
  build.say(loaded.where)
  return loaded


@dataclasses.dataclass(frozen=True)
class Loaded:
  """Parameters and the checkpoint that they came from."""

  params: Any
  step: int
  name: str  # its step and checksum, as a record keeps them; "" if it is none
  where: str  # a line for people


def load_policy(
  cfg: config_lib.Config,
  source: str | places.Path,
  policy: model.Policy,
  mesh: jax.sharding.Mesh,
  step: int | None = None,
) -> Loaded:
  """All parameters of the newest whole checkpoint of a run, or of one `step`.

  Args:
    cfg: of the run.
    source: a workdir, or the `checkpoints` directory in it.
    policy: of `cfg`.
    mesh: that the parameters are for.
    step: of the checkpoint.

  Raises:
    errors.UserError: there is no whole checkpoint, or one of another model, or
      its base is another one by now.
  """
  abstract = {"params": _abstract(policy.abstract_params, mesh)}
  if not policy.lora.rank:
    found, name, where = _restore(source, abstract, step)
    return Loaded(found.state["params"], found.step, name, where)
  adapters = jax.eval_shape(policy.init_adapters, jax.random.key(0))
  abstract = {
    "params": _abstract(adapters, mesh),
    "base": jax.ShapeDtypeStruct((2,), jnp.uint32),
  }
  found, name, where = _restore(source, abstract, step)
  first = _load_first(cfg, policy, mesh, _first_step(found.extra))
  params, _ = lora.split(first.params)
  base, seal_2 = jax.jit(lambda x: lora.sealed(x, policy.lora))(params)
  _check_base(cfg, name, seal_2, found.state["base"])
  params = lora.join(base, found.state["params"])
  return Loaded(params, found.step, name, where)


def _load_run(
  source: str | places.Path,
  policy: model.Policy,
  mesh: jax.sharding.Mesh,
  step: int | None = None,
) -> Loaded:
  """Parameters of another run, whatever it trained."""
  theirs = _config_of(source)
  if theirs is None or not theirs.lora.rank:
    plain = model.Policy(policy.config, mesh, policy.n_ids)
    return load_policy(theirs or config_lib.Config(), source, plain, mesh, step)
  adapted = model.Policy(policy.config, mesh, policy.n_ids, theirs.lora)
  loaded = load_policy(theirs, source, adapted, mesh, step)
  if theirs.lora == policy.lora:
    return loaded
  return dataclasses.replace(loaded, params=adapted.merged(loaded.params))


def _config_of(source: str | places.Path) -> config_lib.Config | None:
  """The configuration of a run, where its checkpoint lies beside it."""
  source = places.as_path(source)
  for path in (source / "config.json", source.parent / "config.json"):
    with places.reaching(path, "read"):
      text = path.read_text() if path.exists() else ""
    if text:
      return pretrained.settle(config_lib.from_json(text, str(path)))
  return None


def _restore(
  source: str | places.Path, abstract: dict[str, Any], step: int | None
) -> tuple[checkpoint.Restored, str, str]:
  """The parts of a state that were asked for; `Loaded.name` and `where`."""
  checkpoints = checkpoint.Checkpoints(_directory(source))
  restored = checkpoints.restore(abstract, step, is_partial=True)
  if restored is None:
    raise errors.UserError(
      f"no checkpoint under {source}; train one first, or point "
      "config.init_from (for evaluate and rollout: --workdir) at a run's"
      " directory"
    )
  notes = "; ".join(restored.notes)
  found = checkpoints.path(restored.step)
  return (
    restored,
    f"step {restored.step}, {manifest.fingerprint(found)}",
    f"parameters from {found}" + (f" ({notes})" if notes else ""),
  )


def _directory(source: str | places.Path) -> str | places.Path:
  """Where the checkpoints of a workdir lie, or `source` if it is none."""
  if places.is_url(source):
    return source
  source = places.as_path(source)
  theirs = source / "config.json"
  if theirs.exists():
    text = theirs.read_text()
    named = config_lib.from_json(text, str(theirs)).checkpoint.directory
    if named:
      return named
  inner = source / "checkpoints"
  return inner if inner.is_dir() else source


def _abstract(params: Any, mesh: jax.sharding.Mesh) -> Any:
  """Shapes, dtypes and shardings of parameters on a mesh."""
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    params,
    sharding.param_shardings(mesh, params),
  )


def _is_fresh(cfg: config_lib.Config) -> bool:
  return (cfg.init_from or cfg.pretrained) in ("", pretrained.RANDOM)


def _check_base(
  cfg: config_lib.Config, name: str, seal_2: Any, saved_2: Any
) -> None:
  if seal_2 is None or np.array_equal(np.asarray(seal_2), np.asarray(saved_2)):
    return
  key = "init_from" if cfg.init_from or not cfg.pretrained else "pretrained"
  source = getattr(cfg, key) or "fresh parameters"
  raise errors.UserError(
    f"the checkpoint ({name}) holds adapters for another base than"
    f" config.{key} gives now ({source}); give back the model that they were"
    " trained on"
  )
