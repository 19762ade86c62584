"""Which slots read pages of their prompt together.

Rollouts of one prompt share its full pages. Those that draw at the same time
are put into groups, N of up to G rows, so that attention reads a shared page
once a group and multiplies all its queries at once (`paged.Groups`).
"""

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np

from roc.device import paged

_MOST_ROWS = 8
# On XLA's CPU backend a product of 2 to 48 queries gives each the same bits; a
# single one, or more of them, are computed otherwise (measured, jax 0.10). A
# rollout that is alone at times must not be drawn differently for it.
_FEWEST_QUERIES, _MOST_QUERIES = 2, 48


@dataclasses.dataclass(frozen=True)
class Shape:
  """N and G; none of a config where grouping is of no use."""

  n_groups: int
  n_rows: int

  @classmethod
  def of(cls, n_slots: int, n_queries: int) -> "Shape | None":
    """Sizes the groups.

    Args:
      n_slots: S. All fit into groups that are half full.
      n_queries: of a row, those that share a key/value head.
    """
    n_groups = n_slots // 4
    n_rows = min(_MOST_ROWS, _MOST_QUERIES // n_queries)
    if n_queries < _FEWEST_QUERIES or n_rows < 2 or not n_groups:
      return None
    return cls(n_groups, n_rows)


def group(
  shape: Shape,
  n_slots: int,
  prefix_of_slot: Sequence[np.ndarray],
  n_columns: int,
) -> paged.Groups | None:
  """Puts slots that begin with the same pages together.

  Those that save most come first; what finds no group reads for itself.

  Args:
    shape: N and G.
    n_slots: S.
    prefix_of_slot: for each slot in use, the full pages that it shares with
      other rollouts.
    n_columns: J.

  Returns:
    None if no two slots share a page.
  """
  N, G = shape.n_groups, shape.n_rows
  slots = collections.defaultdict(list)
  for slot, prefix_J in enumerate(prefix_of_slot):
    if len(prefix_J):
      slots[prefix_J[0]].append(slot)
  parts = [
    members[i : i + G]
    for members in slots.values()
    for i in range(0, len(members), G)
  ]
  saved = lambda part: (len(part) - 1) * len(prefix_of_slot[part[0]])
  parts = sorted((p for p in parts if len(p) > 1), key=saved, reverse=True)
  if not parts:
    return None
  groups = no_groups(shape, n_slots, n_columns)
  for n, part in enumerate(parts[:N]):
    prefix_J = prefix_of_slot[part[0]]
    groups.table_NJ[n, : len(prefix_J)] = prefix_J
    groups.n_columns_N[n] = len(prefix_J)
    groups.row_NG[n, : len(part)] = part
    groups.place_B[part] = n * G + np.arange(len(part))
  return groups


def no_groups(shape: Shape, n_slots: int, n_columns: int) -> paged.Groups:
  """Groups of which none is in use."""
  N, G = shape.n_groups, shape.n_rows
  return paged.Groups(
    np.full((N, n_columns), paged.NO_PAGE, np.int32),
    np.zeros(N, np.int32),
    np.zeros((N, G), np.int32),
    np.full(n_slots, paged.ALONE, np.int32),
  )
