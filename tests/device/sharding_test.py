"""The two tables: every parameter has one place, and no axis is used twice."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from roc.device import lora, model, sharding


def paths_of(params):
  return [
    sharding.path_name(path)
    for path, _ in jax.tree_util.tree_leaves_with_path(params)
  ]


def specs_of(shardings):
  return {
    sharding.path_name(path): leaf.spec
    for path, leaf in jax.tree_util.tree_leaves_with_path(shardings)
  }


def shapes(policy):
  """Of all parameters, those of adapters included."""
  config = lora.LoraConfig(rank=4)
  init = lambda key: lora.init(key, policy.abstract_params, config)
  adapters = jax.eval_shape(init, jax.random.key(0))
  return lora.join(policy.abstract_params, adapters)


@pytest.fixture(scope="module")
def mesh():
  return sharding.make_mesh(2, 2, 2)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def abstract_params(request, make_policy):
  is_tied = request.param
  return shapes(make_policy(tie_embeddings=is_tied, qkv_bias=not is_tied))


def test_one_rule_for_each_parameter(abstract_params):
  for path in paths_of(abstract_params):
    matching = [p for p, _ in sharding.PARAM_RULES if re.fullmatch(p, path)]
    assert len(matching) == 1, f"{path} matches {matching}"


def test_every_rule_is_used(make_policy):
  policy = make_policy(tie_embeddings=False, qkv_bias=True)
  paths = paths_of(shapes(policy))
  for pattern, logical_axes in sharding.PARAM_RULES:
    assert any(re.fullmatch(pattern, path) for path in paths), pattern
    assert set(logical_axes) <= set(sharding.MESH_AXIS_OF)


def test_rules_name_every_axis(abstract_params):
  for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params):
    name = sharding.path_name(path)
    axes = next(
      axes for p, axes in sharding.PARAM_RULES if re.fullmatch(p, name)
    )
    assert len(axes) == len(leaf.shape), name


def test_table_by_hand(mesh, make_policy):
  specs = specs_of(
    sharding.param_shardings(
      mesh, make_policy(tie_embeddings=False).abstract_params
    )
  )
  assert specs["embed/embedding"] == P("tensor", "fsdp")
  assert specs["head/kernel"] == P("fsdp", "tensor")
  assert specs["layers/q_proj/kernel"] == P(None, "fsdp", "tensor")
  assert specs["layers/o_proj/kernel"] == P(None, "tensor", "fsdp")
  assert specs["layers/down_proj/kernel"] == P(None, "tensor", "fsdp")
  assert specs["layers/q_norm/scale"] == P(None, None)
  assert specs["final_norm/scale"] == P(None)
  assert sharding.batch_sharding(mesh).spec == P(("data", "fsdp"))
  assert sharding.replicated(mesh).spec == P()


def test_no_parameter_without_a_rule(mesh):
  leaf = jax.ShapeDtypeStruct((4,), jnp.float32)
  with pytest.raises(ValueError, match="no sharding rule.*'layers/new/bias'"):
    sharding.param_shardings(mesh, {"layers": {"new": {"bias": leaf}}})


@pytest.mark.parametrize(
  "axes", [("heads", "ffn"), ("embed", "embed"), ("batch", "embed")]
)
def test_colliding_axes_are_refused(axes):
  with pytest.raises(ValueError, match="one mesh axis twice"):
    sharding.spec_of(axes)


def test_moments_lie_as_their_parameter(mesh, abstract_params):
  opt_state = jax.eval_shape(optax.adam(1e-3).init, abstract_params)
  specs = specs_of(sharding.state_shardings(mesh, opt_state))
  n_moments = 0
  for name, spec in specs_of(
    sharding.param_shardings(mesh, abstract_params)
  ).items():
    moments = [s for k, s in specs.items() if k.endswith("/" + name)]
    assert moments == [spec, spec], name
    n_moments += 2
  counters = [s for k, s in specs.items() if k.endswith("count")]
  assert counters and set(counters) == {P()}
  assert len(specs) == n_moments + len(counters)


def test_an_axis_that_does_not_divide_stays_whole(mesh):
  policy = model.Policy(
    model.ModelConfig(vocab_size=41, d_model=8, n_layers=1, d_ff=6)
  )
  specs = specs_of(sharding.param_shardings(mesh, policy.abstract_params))
  assert specs["embed/embedding"] == P(None, "fsdp")
  assert specs["layers/up_proj/kernel"] == P(None, "fsdp", "tensor")


def test_meshes():
  mesh = sharding.make_mesh(1, 2, 2)
  assert mesh.shape == {"data": 1, "fsdp": 2, "tensor": 2}
  assert {a.name for a in mesh.axis_types} == {"Auto"}
  assert np.ravel(mesh.devices).tolist() == jax.devices()[:4]
  with pytest.raises(ValueError, match="needs 16 devices.*has 8"):
    sharding.make_mesh(4, 2, 2)
