"""In which order problems come: epochs, shuffles and mixtures.

Every order is endless and a pure function of the seed and the place, so that a
run that is resumed needs nothing but the number of its step.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

_BLOCK = 1000  # places within which a mixture keeps to its weights


class Epochs:
  """Epoch after epoch of n things, each in another order.

  The shuffle is grain's (`MapDataset.shuffle`): an order is never stored, so a
  million problems take no memory, and any place is found at once.

  Args:
    n: how many there are.
    seed: of the shuffles; None keeps the order as it is.
  """

  def __init__(self, n: int, seed: int | None):
    self._n = n
    self._order: Any = None
    if seed is not None:
      import grain  # brings jax and takes a second; not every task needs it

      self._order = grain.MapDataset.range(n).seed(seed).shuffle().repeat()

  def __getitem__(self, place: int) -> int:
    """Which of the n stands at a place >= 0.

    Raises:
      ValueError: the place is negative.
    """
    if place < 0:
      raise ValueError(f"a problem's index must be >= 0, not {place}")
    return place % self._n if self._order is None else self._order[place]


class Mixture:
  """Which of several sets each place takes its problem from.

  In every block of 1,000 places each set has its share, rounded, in an order
  that is shuffled anew. (grain's own `mix` takes 11 ms to find a place.)

  Args:
    weights: of the sets; need not add up to one.
    seed: of the shuffles.

  Raises:
    ValueError: there is no weight, or one is not positive.
  """

  def __init__(self, weights: Sequence[float], seed: int):
    if not weights or not all(w > 0 for w in weights):
      raise ValueError(f"weights must be positive numbers, not {list(weights)}")
    shares = np.array(weights, float) / sum(weights) * _BLOCK
    counts = np.floor(shares).astype(int)
    # What rounding left over goes to the largest remainders.
    left = np.argsort(counts - shares, kind="stable")[: _BLOCK - counts.sum()]
    counts[left] += 1
    if not counts.all():
      raise ValueError(
        f"of weights {list(weights)} one is less than a thousandth of all"
      )
    self._counts = counts
    self._seed = seed

  def __getitem__(self, place: int) -> tuple[int, int]:
    """The set at a place >= 0, and the place within that set's own order.

    Raises:
      ValueError: the place is negative.
    """
    if place < 0:
      raise ValueError(f"a problem's index must be >= 0, not {place}")
    block, at = divmod(place, _BLOCK)
    sets, ranks = self._block(block)
    one = int(sets[at])
    return one, int(block * self._counts[one] + ranks[at])

  @functools.lru_cache(maxsize=64)  # noqa: B019 (a task lives as long as a run)
  def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
    sets = np.repeat(np.arange(len(self._counts)), self._counts)
    sets = np.random.default_rng([self._seed, block]).permutation(sets)
    ranks = np.zeros(_BLOCK, int)
    for one in range(len(self._counts)):
      is_one = sets == one
      ranks[is_one] = np.arange(is_one.sum())
    return sets, ranks
