"""The pytree follows the layout table and refuses what does not."""

import dataclasses

import jax
import numpy as np
import pytest

from roc import layout
from roc.core import trajectories

SIZES = {"N": 2, "O": 4, "T": 6, "C": 3}


def make(**changes) -> trajectories.Trajectories:
  """Two well-formed groups of four rollouts, as the host packs them."""
  spec = trajectories.Trajectories.spec(SIZES)
  fields = {
    name: np.zeros(getattr(spec, name).shape, field.dtype)
    for name, field in layout.TRAJECTORY_FIELDS.items()
  }
  fields["roles"][:] = [1, 1, 2, 3, 2, 0]
  fields["logp_sampler"][:, :, [2, 4]] = -0.5
  fields["tool_status"][:] = layout.ToolStatus.NONE
  fields["rollout_id"][:] = np.arange(4)
  fields["tokens"][:] = np.arange(8).reshape(2, 4, 1)
  fields["place"][:] = [7, 9]
  return trajectories.Trajectories(**(fields | changes))


def test_fields_mirror_the_layout_table():
  names = [f.name for f in dataclasses.fields(trajectories.Trajectories)]
  assert names == list(layout.TRAJECTORY_FIELDS)


def test_spec_has_the_dtypes_and_shapes_of_the_table():
  spec = trajectories.Trajectories.spec(SIZES)
  assert spec.tokens.shape == (2, 4, 6)
  assert spec.tool_status.shape == (2, 4, 3)
  assert spec.place.shape == (2,)
  assert spec.has_void_turn.dtype == np.bool_
  assert len(jax.tree.leaves(spec)) == len(layout.TRAJECTORY_FIELDS)
  spec.validate()
  assert spec.sizes() == SIZES


def test_spec_names_the_missing_axis():
  with pytest.raises(ValueError, match="size for axis C"):
    trajectories.Trajectories.spec({"N": 1, "O": 2, "T": 3})


def test_crosses_jit_as_a_pytree():
  doubled = jax.jit(lambda t: jax.tree.map(lambda x: x + x, t))(make())
  np.testing.assert_array_equal(doubled.place, [14, 18])


def test_frozen():
  with pytest.raises(dataclasses.FrozenInstanceError):
    make().reward = 1.0


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("tokens", np.zeros((2, 4, 6), np.int64), "tokens has dtype int64"),
    ("roles", np.zeros((2, 4, 5), np.int8), r"roles has shape \(2, 4, 5\)"),
    ("reward", np.zeros((2, 3), np.float32), "reward has shape"),
    ("place", np.zeros((), np.int32), "place has shape"),
  ],
)
def test_validate_names_the_field(field, value, message):
  with pytest.raises(ValueError, match=message):
    make(**{field: value}).validate()


def test_validate_works_while_tracing():
  total = jax.jit(lambda t: t.validate().reward.sum())(make())
  assert float(total) == 0.0


def _with(array, index, value):
  array = array.copy()
  array[index] = value
  return array


@pytest.mark.parametrize(
  ("field", "index", "value", "message"),
  [
    ("roles", (0, 0, 5), 9, "roles is malformed at index .0, 0, 5."),
    ("tool_status", (1, 2, 0), 10, "tool_status is malformed"),
    ("outcome", (0, 1), 3, "outcome is malformed at index .0, 1."),
    ("logp_sampler", (0, 0, 2), 0.1, "logp_sampler is malformed"),
    ("logp_sampler", (0, 0, 3), -1.0, "0 elsewhere"),
    ("logp_sampler", (0, 0, 2), np.nan, "must be finite"),
    ("reward", (1, 3), np.inf, "unless the outcome is VOID"),
    ("rollout_id", (1, 3), 0, "ids must be distinct"),
  ],
)
def test_validate_values_names_field_and_place(field, index, value, message):
  good = make()
  good.validate_values()
  bad = _with(getattr(good, field), index, value)
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(good, **{field: bad}).validate_values()


def test_void_rollouts_may_hold_any_reward():
  outcome = np.zeros((2, 4), np.int8)
  outcome[0, 0] = layout.Outcome.VOID
  reward = np.zeros((2, 4), np.float32)
  reward[0, 0] = np.nan
  batch = make(outcome=outcome, reward=reward)
  assert batch.validate_values() is batch


def test_take_picks_rollouts_and_leaves_group_fields():
  index = np.array([[0, 3], [1, 2]], np.int32)
  taken = make().take(index)
  np.testing.assert_array_equal(taken.tokens[:, :, 0], [[0, 3], [5, 6]])
  np.testing.assert_array_equal(taken.rollout_id, index)
  np.testing.assert_array_equal(taken.place, [7, 9])
  assert taken.tool_status.shape == (2, 2, 3)
