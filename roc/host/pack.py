"""Episodes into arrays: groups for the update, rows for supervised training.

`pack` fills exactly the fields of `layout.TRAJECTORY_FIELDS`. An episode sits
at its rollout id, so the order in which rollouts finished cannot be seen, and a
missing one is a row of padding that is outside its group (outcome VOID).
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from roc import layout
from roc.host import episode as episode_lib


def bucket_length(n_tokens: int, buckets: Sequence[int]) -> int:
  """The smallest bucket that holds `n_tokens`, so that few shapes compile.

  Raises:
    ValueError: no bucket is that long.
  """
  fitting = [bucket for bucket in buckets if bucket >= n_tokens]
  if not fitting:
    raise ValueError(
      f"{n_tokens} tokens do not fit the longest bucket of {sorted(buckets)}"
    )
  return min(fitting)


def pack(
  groups: Sequence[Sequence[episode_lib.Episode]],
  *,
  n_rollouts: int | None = None,
  n_calls: int,
  length: int,
  places: Sequence[int] | None = None,
) -> dict[str, np.ndarray]:
  """Packs groups of rollouts into the arrays of `Trajectories`.

  Args:
    groups: N groups of episodes of one place each, in any order within the
      group; an episode's row is its `rollout_id`. Missing ones become padding.
    n_rollouts: O; by default one more than the largest rollout id.
    n_calls: C.
    length: T.
    places: of each group's problem; needed only for a group without any
      episode.

  Returns:
    Arrays named and typed by `layout.TRAJECTORY_FIELDS`, axes [N, O, T],
    [N, O, C], [N, O] and [N].

  Raises:
    ValueError: an episode is too long, has too many calls or a rollout id that
      is taken or out of range, or a group mixes places.
  """
  if n_rollouts is None:
    ids = [episode.rollout_id for group in groups for episode in group]
    n_rollouts = max(ids, default=-1) + 1
  arrays = _empty(len(groups), n_rollouts, n_calls, length)
  for row, group in enumerate(groups):
    arrays["place"][row] = _place(group, row, places)
    seen = set()
    for episode in group:
      column = episode.rollout_id
      if column in seen or not 0 <= column < n_rollouts:
        raise ValueError(
          f"group {row}: rollout id {column} is taken or not in "
          f"0..{n_rollouts - 1}"
        )
      seen.add(column)
      _fill(arrays, (row, column), episode)
  return arrays


def _empty(
  n_groups: int, n_rollouts: int, n_calls: int, length: int
) -> dict[str, np.ndarray]:
  sizes = {"N": n_groups, "O": n_rollouts, "C": n_calls, "T": length}
  arrays = {
    name: np.zeros([sizes[axis] for axis in field.axes], field.dtype)
    for name, field in layout.TRAJECTORY_FIELDS.items()
  }
  arrays["tool_status"][:] = layout.ToolStatus.NONE
  arrays["outcome"][:] = layout.Outcome.VOID
  arrays["rollout_id"][:] = np.arange(n_rollouts)
  return arrays


def _place(
  group: Sequence[episode_lib.Episode],
  row: int,
  places: Sequence[int] | None,
) -> int:
  found = {episode.place for episode in group}
  if places is not None:
    found.add(places[row])
  if len(found) != 1:
    raise ValueError(
      f"group {row} must hold rollouts of one problem; their places are "
      f"{sorted(found)}"
    )
  return found.pop()


def _fill(
  arrays: dict[str, np.ndarray],
  at: tuple[int, int],
  episode: episode_lib.Episode,
) -> None:
  n_tokens = len(episode)
  statuses = [record.status for record in episode.tool_records]
  limits = (
    ("tokens", n_tokens, arrays["tokens"].shape[-1]),
    ("tool calls", len(statuses), arrays["tool_status"].shape[-1]),
  )
  for what, count, limit in limits:
    if count > limit:
      raise ValueError(
        f"episode {episode.task_id!r} rollout {episode.rollout_id} has {count} "
        f"{what}; there is room for {limit}"
      )
  arrays["tokens"][at][:n_tokens] = episode.token_ids
  arrays["roles"][at][:n_tokens] = episode.roles
  arrays["logp_sampler"][at][:n_tokens] = episode.logprobs
  arrays["tool_status"][at][: len(statuses)] = statuses
  for name in ("n_turns", "n_answers", "has_void_turn", "is_truncated"):
    arrays[name][at] = getattr(episode, name)
  arrays["outcome"][at] = episode.outcome
  arrays["reward"][at] = episode.reward


class Lesson(Protocol):
  """What supervised training needs of an episode."""

  @property
  def task_id(self) -> str: ...
  @property
  def token_ids(self) -> Sequence[int] | np.ndarray: ...
  @property
  def roles(self) -> Sequence[int] | np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Compact:
  """A `Lesson` as arrays, for when there are a hundred thousand.

  Attributes:
    task_id: names it in errors.
    token_ids: int32 [T].
    roles: int8 [T], `Role` of each token.
  """

  task_id: str
  token_ids: np.ndarray
  roles: np.ndarray

  @classmethod
  def of(cls, lesson: Lesson, length: int | None = None) -> "Compact":
    """The first `length` tokens of a lesson; by default all."""
    return cls(
      lesson.task_id,
      np.array(lesson.token_ids[:length], np.int32),
      np.array(lesson.roles[:length], np.int8),
    )


def sft_rows(
  episodes: Sequence[Lesson], length: int
) -> tuple[np.ndarray, np.ndarray]:
  """One episode a row, padded: the plain form of supervised training data.

  Args:
    episodes: B demonstrations.
    length: T.

  Returns:
    tokens_BT: int32, 0 where there is no token.
    is_model_BT: bool, True at the tokens to be learnt.

  Raises:
    ValueError: an episode is longer than a row.
  """
  rows = pack_sft(episodes, length, max_per_row=1)
  return rows["tokens_BT"], rows["roles_BT"] == layout.Role.MODEL


def pack_sft(
  episodes: Sequence[Lesson],
  length: int,
  *,
  max_per_row: int | None = None,
) -> dict[str, np.ndarray]:
  """Several short episodes a row, so that little of a batch is padding.

  First fit in the given order: each episode goes to the first row with room, so
  the same list always packs the same way, in O(n log n). Attention must stay
  within equal segment numbers and positions restart in each segment.

  Args:
    episodes: demonstrations.
    length: T.
    max_per_row: most episodes in a row; no limit by default.

  Returns:
    tokens_BT: int32, 0 where there is no token.
    roles_BT: int8, `Role` of each token.
    segment_BT: int32, 1, 2, ... in each row, 0 where there is no token.
    position_BT: int32, from 0 in each segment.

  Raises:
    ValueError: an episode is longer than a row.
  """
  sizes = np.array([len(e.token_ids) for e in episodes], np.int64)
  for episode, size in zip(episodes, sizes, strict=True):
    if size > length:
      raise ValueError(
        f"episode {episode.task_id!r} has {size} tokens; a row holds {length}"
      )
  row_of = np.array(_first_fit(sizes, length, max_per_row), np.int64)
  return _fill_rows(episodes, sizes, row_of, length)


def _first_fit(
  sizes: np.ndarray, length: int, max_per_row: int | None
) -> list[int]:
  """Row of each size: the first with room, in rows that come one by one.

  The room of every row that could be needed stands in the leaves of a tree
  whose nodes know the most room below them.
  """
  n_leaves = 1 << max(len(sizes) - 1, 0).bit_length()
  room = [length] * (2 * n_leaves)
  left = [max_per_row] * n_leaves if max_per_row is not None else None
  rows = []
  for size in sizes.tolist():
    node = 1
    while node < n_leaves:
      node *= 2
      node += room[node] < size
    row = node - n_leaves
    rows.append(row)
    room[node] -= size
    if left is not None:
      left[row] -= 1
      room[node] = room[node] if left[row] else -1
    while node > 1:
      node //= 2
      room[node] = max(room[2 * node], room[2 * node + 1])
  return rows


def _fill_rows(
  episodes: Sequence[Lesson],
  sizes: np.ndarray,
  row_of: np.ndarray,
  length: int,
) -> dict[str, np.ndarray]:
  """Copies episodes to their rows, one behind the other."""
  by_row = np.argsort(row_of, kind="stable")
  sizes, row_of = sizes[by_row], row_of[by_row]
  n_rows = int(row_of[-1]) + 1 if len(row_of) else 0
  first = np.searchsorted(row_of, np.arange(n_rows))  # of each row's episodes
  before = np.cumsum(sizes) - sizes
  start = before - before[first][row_of]
  number = np.arange(len(sizes)) - first[row_of] + 1
  n_tokens = int(sizes.sum())
  position = np.arange(n_tokens) - np.repeat(before, sizes)
  at = np.repeat(row_of * length + start, sizes) + position
  arrays = {}
  for name, values, dtype in (
    ("tokens_BT", [episodes[i].token_ids for i in by_row], np.int32),
    ("roles_BT", [episodes[i].roles for i in by_row], np.int8),
    ("segment_BT", np.repeat(number, sizes), np.int32),
    ("position_BT", position, np.int32),
  ):
    if isinstance(values, list):
      empty = np.zeros(0, dtype)
      values = np.concatenate([empty, *(np.asarray(v, dtype) for v in values)])
    flat = np.zeros(n_rows * length, dtype)
    flat[at] = values
    arrays[name] = flat.reshape(n_rows, length)
  return arrays
