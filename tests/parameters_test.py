"""Parameters from everywhere, and runs of adapters with the base they need."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import quickstart
from roc import build, config, errors, export, parameters, updates
from roc.device import checkpoint, families, lora, model, sharding, weights

pytestmark = pytest.mark.slow

QWEN3 = pathlib.Path(__file__).parent / "golden" / "models" / "qwen3"

ADAPTERS = {
  "lora.rank": 3,
  "lora.alpha": 6.0,
  "lora.targets": ("q_proj", "up_proj"),
}
OTHER_KIND = "belongs to another configuration"


def settings(**changes):
  c = quickstart.get_config("tiny")
  for name, value in changes.items():
    section, _, key = name.rpartition(".")
    setattr(getattr(c, section) if section else c, key, value)
  return config.resolve(c)


def parts(cfg):
  policy = build.make_policy(cfg, build.host_parts(cfg))
  return policy, updates.make_learner(cfg, policy)


def write_run(workdir, cfg, seed, step=3):
  """What a run leaves: a record, and a checkpoint of what it trains.

  Returns:
    what it trained.
  """
  _, learner = parts(cfg)
  state = parameters.first_state(cfg, learner)
  rng = np.random.default_rng(seed)
  draw = lambda x: x + jnp.asarray(0.1 * rng.standard_normal(x.shape), x.dtype)
  state = dataclasses.replace(
    state,
    params=jax.tree.map(draw, state.params),
    opt_state=jax.tree.map(
      lambda x: draw(x) if x.ndim else x + step, state.opt_state
    ),
  )
  workdir.mkdir(parents=True)
  (workdir / "config.json").write_text(config.to_json(cfg))
  checkpoint.Checkpoints(workdir / "checkpoints").save(step, state, {})
  return state.params


def assert_same(params, others):
  jax.tree.map(np.testing.assert_array_equal, params, others)


def load(cfg, workdir):
  policy, learner = parts(cfg)
  return parameters.load_policy(cfg, workdir, policy, learner.mesh)


@dataclasses.dataclass
class Runs:
  """A run of all parameters, and one of adapters on it."""

  whole: object
  params: model.Params
  adapted: object
  cfg: config.Config
  adapters: model.Params

  @property
  def base(self):
    return lora.frozen(self.params, self.cfg.lora)

  @property
  def merged(self):
    """What the run of adapters has learnt, in float32."""
    return lora.merged(lora.join(self.base, self.adapters), self.cfg.lora)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  path = tmp_path_factory.mktemp("runs")
  params = write_run(path / "whole", settings(), seed=1)
  cfg = settings(init_from=str(path / "whole"), **ADAPTERS)
  adapters = write_run(path / "adapted", cfg, seed=2)
  return Runs(path / "whole", params, path / "adapted", cfg, adapters)


def test_all_parameters_of_a_run(runs):
  loaded = load(settings(), runs.whole)
  assert_same(loaded.params, runs.params)
  assert loaded.name.startswith("step 3, ")
  assert str(runs.whole) in loaded.where


def test_adapters_come_with_their_base(runs):
  loaded = load(runs.cfg, runs.adapted)
  assert_same(loaded.params, lora.join(runs.base, runs.adapters))
  assert loaded.params["embed"]["embedding"].dtype == jnp.bfloat16
  assert str(runs.adapted) in loaded.where


def test_a_checkpoint_holds_adapters_only(runs):
  path = next((runs.adapted / "checkpoints").glob("step_*"))
  leaves = json.loads((path / "manifest.json").read_text())["body"]["leaves"]
  names = {name.split(".")[0] for name in leaves}
  assert names == {"params", "opt_state", "step", "base"}
  for name in leaves:
    if name.startswith("params.") or ".mu." in name:
      assert "lora_" in name and ("q_proj" in name or "up_proj" in name)
  size = lambda run: sum(
    f.stat().st_size for f in (run / "checkpoints").rglob("*") if f.is_file()
  )
  assert size(runs.adapted) < size(runs.whole) / 3


def test_another_base_is_noticed(runs, tmp_path):
  """Whether the policy is asked for, or the run goes on."""
  write_run(tmp_path / "other", settings(), seed=7)
  cfg = dataclasses.replace(runs.cfg, init_from=str(tmp_path / "other"))
  with pytest.raises(errors.UserError, match="another base.*other") as caught:
    load(cfg, runs.adapted)
  assert "\n" not in str(caught.value)
  _, learner = parts(cfg)
  saved = checkpoint.Checkpoints(runs.adapted / "checkpoints")
  restored = saved.restore(learner.abstract_state)
  with pytest.raises(errors.UserError, match="step 3.*config.init_from"):
    parameters.go_on(cfg, learner, restored)
  # The right one is no matter.
  _, learner = parts(runs.cfg)
  assert parameters.go_on(runs.cfg, learner, restored) is restored.state
  assert_same(
    learner.params(restored.state.params), lora.join(runs.base, runs.adapters)
  )


def test_a_run_of_another_kind_is_noticed(runs):
  plain = dataclasses.replace(runs.cfg, lora=lora.LoraConfig())
  with pytest.raises(errors.UserError, match=OTHER_KIND):
    load(plain, runs.adapted)
  with pytest.raises(errors.UserError, match=OTHER_KIND):
    load(runs.cfg, runs.whole)


# ------------------------------------------------------- starting from adapters


def first(cfg):
  _, learner = parts(cfg)
  return parameters.first_state(cfg, learner), learner


def test_going_on_with_the_same_adapters(runs):
  cfg = settings(init_from=str(runs.adapted), **ADAPTERS)
  state, learner = first(cfg)
  assert_same(state.params, runs.adapters)
  before, _ = first(runs.cfg)
  assert_same(state.base, before.base)
  assert int(state.step) == 0
  assert_same(learner.params(state.params), lora.join(runs.base, runs.adapters))
  # And a run on it finds all of it again, by way of two records.
  directory = runs.adapted / "checkpoints"
  assert_same(
    first(dataclasses.replace(cfg, init_from=str(directory)))[0], state
  )


@pytest.mark.parametrize("is_adapted", [False, True])
def test_going_on_with_the_optimizer(runs, is_adapted):
  directory = runs.adapted if is_adapted else runs.whole
  adapters = ADAPTERS if is_adapted else {}
  cfg = settings(init_from=str(directory), **adapters)
  fresh, learner = first(cfg)
  kept = parameters.first_state(cfg, learner, keep_optimizer=True)
  checkpoints = checkpoint.Checkpoints(directory / "checkpoints")
  saved = checkpoints.restore(learner.abstract_state).state
  assert_same(kept, dataclasses.replace(saved, step=fresh.step))
  moments = lambda state: jax.tree.leaves(state.opt_state)
  assert any(np.any(np.asarray(x)) for x in moments(kept))
  assert not any(np.any(np.asarray(x)) for x in moments(fresh))


def test_optimizers_that_cannot_be_had(runs):
  for source, said in (
    ("", "wants a run .* which is ''"),
    ("random", "wants a run"),
    (str(QWEN3), "have no optimizer"),
    (str(runs.adapted), "other settings in config.lora"),
  ):
    cfg = settings(init_from=source)
    with pytest.raises(errors.UserError, match=said):
      parameters.first_state(cfg, parts(cfg)[1], keep_optimizer=True)


def test_starting_all_parameters_from_adapters(runs):
  state, _ = first(settings(init_from=str(runs.adapted)))
  assert_same(state.params, runs.merged)


def test_other_adapters_on_top_of_adapters(runs):
  cfg = settings(init_from=str(runs.adapted), **{**ADAPTERS, "lora.rank": 2})
  state, learner = first(cfg)
  base, _ = lora.split(learner.params(state.params))
  assert_same(base, lora.frozen(runs.merged, cfg.lora))
  assert state.params["layers"]["q_proj"]["lora_a"].shape[-1] == 2
  assert not np.any(state.params["layers"]["q_proj"]["lora_b"])


def test_fresh_base_and_seeds():
  one, learner = first(settings(**ADAPTERS))
  again, _ = first(settings(**ADAPTERS))
  assert_same(one, again)
  other, _ = first(settings(seed=1, **ADAPTERS))
  assert np.any(np.asarray(one.base) != np.asarray(other.base))
  a = lambda state: np.asarray(state.params["layers"]["q_proj"]["lora_a"])
  assert np.any(a(one) != a(other))
  plain, _ = first(settings())
  base, _ = lora.split(learner.params(one.params))
  assert_same(base, lora.frozen(plain.params, lora.LoraConfig()))


# ---------------------------------------------------------------- and elsewhere


def test_export_is_merged(runs, tmp_path):
  out = tmp_path / "model"
  export.export(runs.cfg, runs.adapted, out, dtype="float32")
  policy = model.Policy(families.read(out))
  assert_same(
    weights.load(out, policy, sharding.make_mesh(1, 1, 1)), runs.merged
  )
  # Which starts a run like any other model.
  cfg = settings(init_from=str(out))
  assert_same(first(cfg)[0].params, runs.merged)
  cfg = settings(init_from=str(out), **ADAPTERS)
  state, learner = first(cfg)
  base, _ = lora.split(learner.params(state.params))
  assert_same(base, lora.frozen(runs.merged, cfg.lora))


def test_settings_of_adapters():
  for changes, said in (
    ({"lora.rank": -1}, "config.lora.rank must be at least 0"),
    ({"lora.alpha": 0.0}, "config.lora.alpha must be above 0"),
    ({"lora.targets": ("q_proj", "q_pro")}, "did you mean|q_proj"),
    ({"lora.targets": ()}, "at least one projection"),
    ({"lora.targets": ("q_proj", "q_proj")}, "each once"),
    ({"lora.base_dtype": "int8"}, "config.lora.base_dtype must be one of"),
  ):
    with pytest.raises(errors.UserError, match=said):
      settings(**changes)


def test_a_run_without_adapters_is_what_it_was():
  plain, other = settings(), settings(**{"lora.alpha": 3.0})
  assert config.identity(plain) == config.identity(other)
  named = [key for key in config.identity(plain) if "lora" in key]
  assert named == ["lora.rank"]
  adapted = config.identity(settings(**ADAPTERS))
  assert adapted["lora.targets"] == ["q_proj", "up_proj"]
  assert adapted["lora.base_dtype"] == "bfloat16"
