"""One batch of rollouts as a frozen pytree, described by `roc.layout`.

The field table lives in `layout.TRAJECTORY_FIELDS`, which the host side fills
and this class mirrors; importing this module fails if the two ever differ.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from roc import layout


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Trajectories:
  """Everything that the update knows about N groups of O rollouts.

  Attributes are arrays (numpy, jax, or `jax.ShapeDtypeStruct` in a spec) with
  the dtype, axes and meaning given in `layout.TRAJECTORY_FIELDS`. A log-prob at
  position t belongs to the token at position t, given all tokens before it.
  Groups and rollouts that pad a batch have outcome VOID and role PAD only.
  """

  tokens: Any  # int32   [N, O, T]
  roles: Any  # int8    [N, O, T]
  logp_sampler: Any  # float32 [N, O, T]
  tool_status: Any  # int8    [N, O, C]
  n_turns: Any  # int32   [N, O]
  n_answers: Any  # int32   [N, O]
  has_void_turn: Any  # bool    [N, O]
  is_truncated: Any  # bool    [N, O]
  outcome: Any  # int8    [N, O]
  reward: Any  # float32 [N, O]
  rollout_id: Any  # int32   [N, O]
  place: Any  # int32   [N]

  @classmethod
  def spec(cls, sizes: Mapping[str, int]) -> Self:
    """Shapes and dtypes without data, for `jax.eval_shape` and lowering.

    Args:
      sizes: length of each axis letter in use: N, O, T and C.

    Returns:
      `Trajectories` of `jax.ShapeDtypeStruct`.

    Raises:
      ValueError: an axis letter has no size.
    """
    needed = {
      axis for f in layout.TRAJECTORY_FIELDS.values() for axis in f.axes
    }
    if missing := sorted(needed - set(sizes)):
      raise ValueError(
        f"Trajectories.spec needs a size for axis {', '.join(missing)}: pass"
        f" sizes for {', '.join(sorted(needed))}."
      )
    return cls(
      **{
        name: jax.ShapeDtypeStruct(
          tuple(sizes[axis] for axis in field.axes), np.dtype(field.dtype)
        )
        for name, field in layout.TRAJECTORY_FIELDS.items()
      }
    )

  def sizes(self) -> dict[str, int]:
    """Length of each axis letter, read off the first field that has it."""
    found: dict[str, int] = {}
    for name, field in layout.TRAJECTORY_FIELDS.items():
      shape = getattr(self, name).shape
      for axis, size in zip(field.axes, shape, strict=False):
        found.setdefault(axis, size)
    return found

  def validate(self) -> Self:
    """Checks dtypes and shapes; safe under `jax.jit`, reads no values.

    Returns:
      self, so that calls chain.

    Raises:
      ValueError: a field has another dtype or rank than the layout's, or two
        fields disagree about the length of an axis.
    """
    sizes = self.sizes()
    for name, field in layout.TRAJECTORY_FIELDS.items():
      value = getattr(self, name)
      if np.dtype(value.dtype) != np.dtype(field.dtype):
        raise ValueError(
          f"Trajectories.{name} has dtype {value.dtype}; convert it to"
          f" {field.dtype}."
        )
      expected = tuple(sizes.get(axis) for axis in field.axes)
      if tuple(value.shape) != expected:
        raise ValueError(
          f"Trajectories.{name} has shape {tuple(value.shape)}; its axes"
          f" [{', '.join(field.axes)}] must have lengths {expected}."
        )
    return self

  def validate_values(self) -> Self:
    """Checks what the numbers mean; eager only, for the border with the host.

    Returns:
      self, so that calls chain.

    Raises:
      ValueError: naming the field, its first bad position and the remedy.
    """
    self.validate()
    roles = np.asarray(self.roles)
    logp = np.asarray(self.logp_sampler)
    outcome = np.asarray(self.outcome)
    is_void = outcome == layout.Outcome.VOID
    is_model = roles == layout.Role.MODEL
    sorted_ids = np.sort(np.asarray(self.rollout_id), axis=-1)
    repeats = np.diff(sorted_ids, axis=-1) == 0
    checks = {
      "roles": (~np.isin(roles, list(layout.Role)), "use layout.Role"),
      "tool_status": (
        ~np.isin(np.asarray(self.tool_status), list(layout.ToolStatus)),
        "use layout.ToolStatus",
      ),
      "outcome": (
        ~np.isin(outcome, list(layout.Outcome)),
        "use layout.Outcome",
      ),
      "logp_sampler": (
        ~np.where(is_model, np.isfinite(logp) & (logp <= 0), logp == 0),
        "it must be finite and <= 0 at MODEL tokens and 0 elsewhere",
      ),
      "reward": (
        ~np.isfinite(np.asarray(self.reward)) & ~is_void,
        "it must be finite unless the outcome is VOID",
      ),
      "rollout_id": (repeats, "ids must be distinct within a group"),
    }
    for name, (is_bad, remedy) in checks.items():
      if is_bad.any():
        where = tuple(int(i) for i in np.argwhere(is_bad)[0])
        raise ValueError(
          f"Trajectories.{name} is malformed at index {where}: {remedy}."
        )
    return self

  def take(self, index_NG) -> Self:
    """Picks rollouts in every group, so that O becomes G.

    Args:
      index_NG: int32 [N, G], positions along O, e.g. from
        `resample.take_kept`.

    Returns:
      `Trajectories` with G rollouts a group; fields without an O axis stay.
    """

    def pick(name):
      value = getattr(self, name)
      axes = layout.TRAJECTORY_FIELDS[name].axes
      if "O" not in axes:
        return value
      index = index_NG.reshape(index_NG.shape + (1,) * (len(axes) - 2))
      return jnp.take_along_axis(value, index, axis=1)

    return dataclasses.replace(
      self, **{name: pick(name) for name in layout.TRAJECTORY_FIELDS}
    )


if [f.name for f in dataclasses.fields(Trajectories)] != list(
  layout.TRAJECTORY_FIELDS
):
  raise TypeError(
    "Trajectories and layout.TRAJECTORY_FIELDS name different fields: edit both"
    " together."
  )
