"""Several sets of problems in one, each with its share."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from roc.host.tasks import files, order
from roc.host.tasks import problem as problem_lib


class MixedTask:
  """Problems of several sets, mixed by weight.

  Args:
    tasks: what makes the sets; each is called with `seed`.
    weights: of the sets, in the same order; without them each set has as many
      places as it has problems.
    seed: of the sets' own order and of the mixture.

  Raises:
    ValueError: there are not as many weights as sets, or a problem is in two.
  """

  def __init__(
    self,
    tasks: Sequence[Callable[..., files.FileTask]],
    seed: int | None = None,
    *,
    weights: Sequence[float] = (),
  ):
    self._sets = [make(seed=seed) for make in tasks]
    if not self._sets:
      raise ValueError("a mixture needs tasks, such as [@a/FileTask]")
    if weights and len(weights) != len(self._sets):
      raise ValueError(
        f"there are {len(self._sets)} tasks and {len(weights)} weights"
      )
    self._mixture = order.Mixture(
      weights or [len(s) for s in self._sets], seed or 0
    )
    # Numbers of problems must be their own: what is drawn depends on them.
    sizes = [1 + max(p.index for p in s.all_problems) for s in self._sets]
    self._first = [sum(sizes[:i]) for i in range(len(sizes))]
    owner: dict[str, str] = {}
    for one in self._sets:
      for p in one.all_problems:
        if p.id in owner:
          raise ValueError(
            f"problem {p.id!r} is in {owner[p.id]} and in {one.name}; leave it"
            " out of one, or give it another id"
          )
        owner[p.id] = one.name

  @property
  def notes(self) -> list[str]:
    """Lines for people about what the sets leave out."""
    return [note for one in self._sets for note in one.notes]

  def __len__(self) -> int:
    return sum(map(len, self._sets))

  @property
  def all_problems(self) -> list[problem_lib.Problem]:
    """Every problem once, set after set."""
    return [
      self._numbered(i, p)
      for i, one in enumerate(self._sets)
      for p in one.all_problems
    ]

  def problem(self, index: int) -> problem_lib.Problem:
    """The problem at place `index` of the endless order."""
    one, place = self._mixture[index]
    return self._numbered(one, self._sets[one].problem(place))

  def problems(self, start: int, count: int) -> list[problem_lib.Problem]:
    """Problems at places start .. start + count - 1 of the endless order."""
    return [self.problem(i) for i in range(start, start + count)]

  def check_answers(
    self, find_unreadable: Callable[[Sequence[str]], Sequence[int]]
  ) -> list[str]:
    """See `FileTask.check_answers`."""
    return [n for s in self._sets for n in s.check_answers(find_unreadable)]

  def check_lengths(
    self, find_overlong: Callable[[Sequence[str]], Mapping[int, str]]
  ) -> list[str]:
    """See `FileTask.check_lengths`."""
    return [n for s in self._sets for n in s.check_lengths(find_overlong)]

  @property
  def digest(self) -> str:
    """Tells the sets apart, as they were read."""
    return " ".join(one.digest for one in self._sets)

  def _numbered(
    self, one: int, problem: problem_lib.Problem
  ) -> problem_lib.Problem:
    return dataclasses.replace(problem, index=self._first[one] + problem.index)
