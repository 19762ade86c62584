"""Who holds which cache page, and who may have more without a deadlock.

Every rollout claims the most pages that it can ever need, and is given them
one at a time, as its tokens come. More may be claimed than there are pages, as
long as the state stays *safe* (the banker's algorithm; Dijkstra, EWD 108):
there is an order in which every rollout can get all that it claimed, each one
living off what is free and what those before it gave back. So nothing is ever
evicted and computed again; at worst a rollout waits for its next page.
"""

import dataclasses
from collections.abc import Hashable, Sequence


@dataclasses.dataclass
class _Claim:
  """Pages of one owner: those it has, and how many it may still ask for."""

  held: list[int]
  need: int


class PageBook:
  """The book of one pool of pages."""

  def __init__(self, n_pages: int):
    self.n_pages = n_pages
    self._free = list(range(n_pages))[::-1]
    self._claims: dict[Hashable, _Claim] = {}
    self._n_needed = 0  # of all claims together

  @property
  def n_free(self) -> int:
    """Pages that nobody holds."""
    return len(self._free)

  def open(self, owner: Hashable, most: int) -> bool:
    """Notes a claim of at most `most` pages, unless it makes waiting endless.

    Returns:
      whether the claim stands.

    Raises:
      ValueError: the owner has a claim already.
    """
    if owner in self._claims:
      raise ValueError(f"{owner!r} has a claim already")
    self._claims[owner] = _Claim([], most)
    self._n_needed += most
    if self._is_safe():
      return True
    self.close(owner)
    return False

  def take(self, owner: Hashable, n: int) -> list[int] | None:
    """Gives `n` more pages of a claim, or None while that is not safe.

    Raises:
      ValueError: more than the claim allows.
    """
    claim = self._claims[owner]
    if n > claim.need:
      raise ValueError(f"{owner!r} asks for {n} pages and claimed {claim.need}")
    if n > len(self._free):
      return None
    pages = [self._free.pop() for _ in range(n)]
    claim.held += pages
    claim.need -= n
    self._n_needed -= n
    if self._is_safe():
      return pages
    for page in reversed(pages):
      claim.held.remove(page)
      self._free.append(page)
    claim.need += n
    self._n_needed += n
    return None

  def keep(self, owner: Hashable, n: int) -> list[int] | None:
    """Claims and takes `n` pages whose return nobody may count on.

    For what several rollouts share: it comes back only with the last of them.

    Returns:
      the pages, or None while that is not safe.
    """
    if n > len(self._free):
      return None
    pages = [self._free.pop() for _ in range(n)]
    if not self._is_safe():
      self._free += reversed(pages)
      return None
    self._claims[owner] = _Claim(pages, -1)
    return pages

  def held(self, owner: Hashable) -> Sequence[int]:
    """Pages of an owner in the order in which it got them."""
    return self._claims[owner].held

  def close(self, owner: Hashable) -> None:
    """Ends a claim; its pages are free again."""
    claim = self._claims.pop(owner)
    self._free += reversed(claim.held)
    self._n_needed -= max(claim.need, 0)

  def _is_safe(self) -> bool:
    n_free = len(self._free)
    if self._n_needed <= n_free:
      return True
    claims = [c for c in self._claims.values() if c.need >= 0]
    for claim in sorted(claims, key=lambda c: c.need):
      if claim.need > n_free:
        return False
      n_free += len(claim.held)
    return True
