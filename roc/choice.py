"""The trainer's filter on groups of any size, without a trainer.

`roc.core.resample` wants equal groups and one G; files have what they have.
Groups that keep the same number go through it together, padded with rollouts
that are VOID and so out of everybody's way.
"""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np

from roc import groups as groups_lib
from roc import layout
from roc.core import resample

_PAIRS = 1 << 22  # of rollouts that are compared in one call


class Penalties(typing.NamedTuple):
  """How unclean each rollout is; float32 [n] each."""

  p_err: np.ndarray
  p_format: np.ndarray
  p_total: np.ndarray


@dataclasses.dataclass(frozen=True)
class Rule:
  """A way of choosing.

  Attributes:
    mode: one of `resample.MODES`.
    n_kept: G; None keeps half of each group, but at least 2. Mode "none" keeps
      everything whatever it says.
    seed: of the random modes.
    eps: of mode "inverse".
    min_pos: correct rollouts kept, where there are as many.
    min_neg: wrong ones.
  """

  mode: str
  n_kept: int | None = None
  seed: int = 0
  eps: float = 0.1
  min_pos: int = 1
  min_neg: int = 1


def sizes(rollouts: groups_lib.Rollouts) -> np.ndarray:
  """Rollouts of each group; int64 by group."""
  return np.bincount(rollouts.group, minlength=len(rollouts.groups))


def places(size: np.ndarray, n_kept: int | None) -> np.ndarray:
  """G of groups of these sizes."""
  return np.maximum(size // 2, 2) if n_kept is None else 0 * size + n_kept


def penalties(rollouts: groups_lib.Rollouts) -> Penalties:
  """The penalties of all rollouts, as the trainer works them out."""
  one_group = lambda x: jnp.asarray(x)[None]  # a penalty knows no group
  found = resample.count_penalties(
    resample.CallCounts(
      one_group(rollouts.n_judged), one_group(rollouts.n_failed)
    ),
    one_group(rollouts.n_answers),
    one_group(rollouts.n_turns),
  )
  return Penalties(*(np.asarray(x)[0] for x in found))


def choose(
  rollouts: groups_lib.Rollouts, p_total: np.ndarray, rule: Rule
) -> np.ndarray:
  """Chooses as a run with this rule and seed would.

  Args:
    rollouts: in groups of at least G.
    p_total: float32 [n], from `penalties`.
    rule: how.

  Returns:
    bool [n], what is kept. A function of ids and steps, not of the order of the
    lines. Groups that have fewer than G rollouts that are not VOID keep none.
  """
  size = sizes(rollouts)
  order = np.lexsort((rollouts.rollout_id, rollouts.group))
  start = np.cumsum(size) - size
  keep = np.zeros(len(rollouts), bool)
  # A power of two, so that few shapes are compiled.
  width = 1 << np.ceil(np.log2(np.maximum(size, 2))).astype(int)
  kept_of = width if rule.mode == "none" else places(size, rule.n_kept)
  for G, wide in sorted(
    set(zip(kept_of.tolist(), width.tolist(), strict=True))
  ):
    members = np.flatnonzero((kept_of == G) & (width == wide))
    n_rows = min(max(1, _PAIRS // wide**2), _power_of_two(len(members)))
    for first in range(0, len(members), n_rows):
      part = members[first : first + n_rows]
      row = np.repeat(np.arange(len(part)), size[part])
      column = np.arange(len(row)) - np.repeat(
        np.cumsum(size[part]) - size[part], size[part]
      )
      at = order[start[part][row] + column]
      keep[at] = _choose_part(
        rollouts, p_total, rule, G, part, at, (row, column), (n_rows, wide)
      )
  return keep


def _power_of_two(n: int) -> int:
  return 1 << max(0, n - 1).bit_length()


def _choose_part(
  rollouts, p_total, rule, n_keep, part, at, where, shape
) -> np.ndarray:
  """Chooses among the rollouts `at`, laid out at `where` of [N, O]."""
  n_rows = shape[0]
  outcome_NO = np.full(shape, layout.Outcome.VOID, np.int8)
  p_total_NO = np.zeros(shape, np.float32)
  # Padding is VOID: its ids meet nobody's.
  rollout_id_NO = np.zeros(shape, np.int32)
  outcome_NO[where] = rollouts.outcome[at]
  p_total_NO[where] = p_total[at]
  rollout_id_NO[where] = rollouts.rollout_id[at]
  stream_N = np.zeros(n_rows, np.int32)
  step_N = np.zeros(n_rows, np.int32)
  stream_N[: len(part)] = [rollouts.groups[n].stream_id for n in part]
  step_N[: len(part)] = [rollouts.groups[n].step for n in part]
  keep_NO = _resample(
    outcome_NO, p_total_NO, rollout_id_NO, stream_N, step_N, rule.seed,
    mode=rule.mode, n_keep=n_keep, eps=rule.eps,
    min_pos=rule.min_pos, min_neg=rule.min_neg,
  )  # fmt: skip
  return np.asarray(keep_NO)[where]


@functools.partial(
  jax.jit, static_argnames=("mode", "n_keep", "eps", "min_pos", "min_neg")
)
def _resample(
  outcome_NO, p_total_NO, rollout_id_NO, stream_N, step_N, seed, **settings
) -> jax.Array:
  mode = settings.pop("mode")

  def of_group(outcome_O, p_total_O, rollout_id_O, stream, step):
    # Groups of different steps have different keys.
    return resample.resample(
      mode,
      resample.step_key(seed, step),
      outcome_O[None],
      p_total_O[None],
      rollout_id_NO=rollout_id_O[None],
      group_id_N=stream[None],
      **settings,
    )[0]

  return jax.vmap(of_group)(
    outcome_NO, p_total_NO, rollout_id_NO, stream_N, step_N
  )
