"""Episodes into arrays: groups for the update, rows for supervised training.

`pack` fills exactly the fields of `layout.TRAJECTORY_FIELDS`. An episode sits
at its rollout id, so the order in which rollouts finished cannot be seen, and a
missing one is a row of padding that is outside its group (outcome VOID).
"""

from collections.abc import Sequence

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
  task_indices: Sequence[int] | None = None,
) -> dict[str, np.ndarray]:
  """Packs groups of rollouts into the arrays of `Trajectories`.

  Args:
    groups: N groups of episodes of one problem each, in any order within the
      group; an episode's row is its `rollout_id`. Missing ones become padding.
    n_rollouts: O; by default one more than the largest rollout id.
    n_calls: C.
    length: T.
    task_indices: index of each group's problem; needed only for a group without
      any episode.

  Returns:
    Arrays named and typed by `layout.TRAJECTORY_FIELDS`, axes [N, O, T],
    [N, O, C], [N, O] and [N].

  Raises:
    ValueError: an episode is too long, has too many calls or a rollout id that
      is taken or out of range, or a group mixes problems.
  """
  if n_rollouts is None:
    ids = [episode.rollout_id for group in groups for episode in group]
    n_rollouts = max(ids, default=-1) + 1
  arrays = _empty(len(groups), n_rollouts, n_calls, length)
  for row, group in enumerate(groups):
    arrays["task_index"][row] = _task_index(group, row, task_indices)
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


def _task_index(
  group: Sequence[episode_lib.Episode],
  row: int,
  task_indices: Sequence[int] | None,
) -> int:
  found = {episode.task_index for episode in group}
  if task_indices is not None:
    found.add(task_indices[row])
  if len(found) != 1:
    raise ValueError(
      f"group {row} must hold rollouts of one problem; its task indices are "
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


def sft_rows(
  episodes: Sequence[episode_lib.Episode], length: int
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
  episodes: Sequence[episode_lib.Episode],
  length: int,
  *,
  max_per_row: int | None = None,
) -> dict[str, np.ndarray]:
  """Several short episodes a row, so that little of a batch is padding.

  First fit in the given order: each episode goes to the first row with room, so
  the same list always packs the same way. Attention must stay within equal
  segment numbers and positions restart in each segment.

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
  rows: list[list[episode_lib.Episode]] = []
  used: list[int] = []
  first_open = 0
  for episode in episodes:
    if len(episode) > length:
      raise ValueError(
        f"episode {episode.task_id!r} has {len(episode)} tokens; a row holds "
        f"{length}"
      )
    row = _first_fit(rows, used, first_open, length - len(episode), max_per_row)
    if row == len(rows):
      rows.append([])
      used.append(0)
    rows[row].append(episode)
    used[row] += len(episode)
    while first_open < len(rows) and _is_full(
      rows[first_open], used[first_open], length, max_per_row
    ):
      first_open += 1
  return _fill_rows(rows, length)


def _first_fit(
  rows: Sequence[Sequence[episode_lib.Episode]],
  used: Sequence[int],
  start: int,
  most_used: int,
  max_per_row: int | None,
) -> int:
  """First row from `start` with room; the number of rows if there is none."""
  for row in range(start, len(rows)):
    if used[row] <= most_used and (
      max_per_row is None or len(rows[row]) < max_per_row
    ):
      return row
  return len(rows)


def _is_full(
  row: Sequence[episode_lib.Episode],
  n_used: int,
  length: int,
  max_per_row: int | None,
) -> bool:
  """Whether no episode can be added, however short."""
  return n_used >= length or (
    max_per_row is not None and len(row) >= max_per_row
  )


def _fill_rows(
  rows: Sequence[Sequence[episode_lib.Episode]], length: int
) -> dict[str, np.ndarray]:
  shape = (len(rows), length)
  arrays = {
    "tokens_BT": np.zeros(shape, np.int32),
    "roles_BT": np.zeros(shape, np.int8),
    "segment_BT": np.zeros(shape, np.int32),
    "position_BT": np.zeros(shape, np.int32),
  }
  for row, members in enumerate(rows):
    start = 0
    for number, episode in enumerate(members, start=1):
      where = (row, slice(start, start + len(episode)))
      arrays["tokens_BT"][where] = episode.token_ids
      arrays["roles_BT"][where] = episode.roles
      arrays["segment_BT"][where] = number
      arrays["position_BT"][where] = np.arange(len(episode))
      start += len(episode)
  return arrays
