"""Who is in the cache, who is fed and who draws: the engine's host half.

Plain Python over page tables; nothing here knows a device. Rollouts wait in a
queue, are admitted in order while slots and cache last, have their prompt fed
(once, where several rollouts share it), draw, and park when their turn has
ended, until the caller extends or releases them. All choices go by age, so the
oldest rollouts never starve; none of them changes what is drawn.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from roc.device import paged, pages, sampling


@dataclasses.dataclass(frozen=True)
class Request:
  """One rollout to start.

  Attributes:
    prompt: token ids.
    key: uint32 [2], see `sampling.rollout_keys`.
    budget: tokens it may hold beyond the prompt, tool tokens included.
  """

  prompt: Sequence[int]
  key: np.ndarray
  budget: int


def check(requests: Sequence[Request], config: sampling.SamplingConfig) -> None:
  """Raises ValueError: an empty prompt, or one too long for the cache."""
  for r in requests:
    if not r.prompt:
      raise ValueError("a prompt holds at least one token")
    if len(r.prompt) + r.budget > config.cache_length:
      raise ValueError(
        f"prompt of {len(r.prompt)} tokens plus budget {r.budget} exceeds "
        f"sampling.cache_length={config.cache_length}"
      )


@dataclasses.dataclass
class Row:
  """Something that fills pages: a rollout, or a prompt that several share."""

  table_J: np.ndarray  # int32
  feed: list[int]  # ids that are known, but not in the cache
  length: int = 0  # tokens in the cache
  n_pages: int = 0
  is_broken: bool = False  # its keys and values may not be finite


@dataclasses.dataclass
class Prompt(Row):
  """A prompt in the cache, for the rollouts that start with it."""

  ids: tuple[int, ...] = ()
  n_rollouts: int = 0  # admitted and not released


@dataclasses.dataclass
class Rollout(Row):
  """A rollout that has been admitted."""

  key: np.ndarray | None = None
  budget: int = 0  # tokens it may still hold
  pending: int = 0  # next input token: known, but neither cached nor in `feed`
  turn: list[int] = dataclasses.field(default_factory=list)  # ids drawn in it
  n_drawn: int = 0
  is_parked: bool = False  # waits for `extend` or `release`
  prompt: Prompt | None = None  # shared with others
  is_forked: bool = True  # False: waits until its shared prompt is cached

  @property
  def can_draw(self) -> bool:
    """Whether all that it holds is in the cache and its turn goes on."""
    return not self.is_parked and not self.feed


@dataclasses.dataclass(frozen=True)
class Piece:
  """Ids of a row that are fed in one call, behind the `start` that it held."""

  row: Row
  start: int
  ids: list[int]

  @property
  def is_answer(self) -> bool:
    """Whether they follow something that was drawn."""
    return isinstance(self.row, Rollout) and self.row.n_drawn > 0


class Schedule:
  """The book-keeping of one engine."""

  def __init__(self, config: sampling.SamplingConfig):
    """Sizes the cache.

    Raises:
      ValueError: no slots, or a cache that cannot hold one rollout.
    """
    c = config
    if c.n_slots < 1:
      raise ValueError(f"sampling.n_slots is {c.n_slots}; it must be 1 or more")
    self.n_columns = -(-c.cache_length // c.page)
    n_tokens = c.cache_tokens or c.n_slots * c.cache_length
    n_pages = -(-n_tokens // c.page)
    if n_pages < self.n_columns:
      raise ValueError(
        f"sampling.cache_tokens={c.cache_tokens} cannot hold one rollout of "
        f"sampling.cache_length={c.cache_length}"
      )
    self.config = config
    self.book = pages.PageBook(n_pages)
    self.rollouts: dict[int, Rollout] = {}  # admitted ones, oldest first
    # By prompt, in order of first submission: all rollouts of a prompt enter
    # before the next one's do. So one shared prompt at most waits for rollouts
    # that the cache has no room for, and others' pages come back.
    self._queue: dict[tuple[int, ...], dict[int, Request]] = {}
    self._queued: dict[int, Request] = {}
    self._prompts: dict[tuple[int, ...], Prompt] = {}
    self._handles = itertools.count()
    self._broken_pages: list[int] = []

  @property
  def n_rollouts(self) -> int:
    """Rollouts that were submitted and not released."""
    return len(self._queued) + len(self.rollouts)

  # --------------------------------------------------------- the caller's side

  def submit(self, requests: Sequence[Request]) -> list[int]:
    """Queues rollouts; returns a handle for each.

    Raises:
      ValueError: an empty prompt, or a prompt and budget that exceed the cache.
    """
    check(requests, self.config)
    handles = [next(self._handles) for _ in requests]
    for handle, r in zip(handles, requests, strict=True):
      self._queue.setdefault(tuple(r.prompt), {})[handle] = r
      self._queued[handle] = r
    return handles

  def extend(self, handle: int, ids: Sequence[int]) -> None:
    """Appends ids behind what a parked rollout holds, and lets it draw.

    Raises:
      ValueError: they exceed its budget, are none, or its turn goes on.
    """
    r = self.rollouts[handle]
    if not r.is_parked:
      raise ValueError(f"rollout {handle} is extended in the middle of a turn")
    if not ids:
      raise ValueError(f"rollout {handle} is extended by nothing")
    if len(ids) > r.budget:
      raise ValueError(
        f"{len(ids)} tokens exceed rollout {handle}'s budget {r.budget}"
      )
    r.feed = [r.pending, *ids[:-1]]
    r.pending = ids[-1]
    r.budget -= len(ids)
    r.turn = []
    r.is_parked = r.budget == 0

  def budget_left(self, handle: int) -> int:
    """Tokens that the rollout may still hold."""
    if handle in self._queued:
      return self._queued[handle].budget
    return self.rollouts[handle].budget

  def release(self, handle: int) -> None:
    """Takes a rollout out, whatever it is doing; its pages are free again."""
    if handle in self._queued:
      self._leave_queue(handle)
      return
    r = self.rollouts.pop(handle)
    if r.is_broken:
      self._broken_pages += self.book.held(handle)
    self.book.close(handle)
    if r.prompt is not None:
      r.prompt.n_rollouts -= 1
      r.prompt.is_broken |= r.is_broken
      self._drop_if_unused(r.prompt)

  # --------------------------------------------------------- the engine's side

  def admit(self) -> None:
    """Takes rollouts from the queue, in order, while slots and cache last."""
    n_active = sum(not r.is_parked for r in self.rollouts.values())
    while self._queue and n_active < self.config.n_slots:
      handle, request = next(iter(next(iter(self._queue.values())).items()))
      if not self._enter(handle, request):
        return
      self._leave_queue(handle)
      n_active += 1

  def feed(self) -> list[Piece]:
    """Takes the next pieces to feed, as many as one call has rows for.

    Shared prompts and then rollouts by age get one each; rows that are left go
    to further pieces of the same. Pieces in one call see each other: a layer
    writes all keys and values before it reads any.
    """
    hungry: list[tuple[int | None, Row]] = [
      *((None, p) for p in self._prompts.values() if p.feed),
      *((h, r) for h, r in self.rollouts.items() if r.feed and r.is_forked),
    ]
    pieces: list[Piece] = []
    while hungry:
      still_hungry = []
      for handle, row in hungry:
        if len(pieces) == self.config.extend_rows:
          return pieces
        n = min(len(row.feed), self.config.extend_chunk)
        # A shared prompt has all its pages from the start.
        if handle is not None and not self._reach(handle, row, row.length + n):
          continue
        pieces.append(Piece(row, row.length, row.feed[:n]))
        row.length += n
        row.feed = row.feed[n:]
        if row.feed:
          still_hungry.append((handle, row))
      hungry = still_hungry
    return pieces

  def fork(self) -> list[tuple[int, int]]:
    """Lets rollouts go on from a shared prompt that is in the cache whole.

    Full pages are shared; of the last one each rollout needs a copy, as it will
    write into it.

    Returns:
      (page, copy) of those to copy.
    """
    copies = []
    for handle, r in self.rollouts.items():
      shared = r.prompt
      if r.is_forked or shared is None or shared.feed:
        continue
      n_full, n_rest = divmod(shared.length, self.config.page)
      r.table_J[:n_full] = shared.table_J[:n_full]
      r.n_pages = n_full
      if not self._reach(handle, r, shared.length):
        continue
      if n_rest:
        copies.append((int(shared.table_J[n_full]), int(r.table_J[n_full])))
      r.feed, r.length, r.is_forked = [], shared.length, True
    return copies

  def draw(self) -> list[int]:
    """The oldest rollouts that can draw and have pages for a whole chunk."""
    handles = []
    for handle, r in self.rollouts.items():
      if len(handles) == self.config.n_slots:
        break
      n = min(self.config.chunk, r.budget)
      if r.can_draw and self._reach(handle, r, r.length + n):
        handles.append(handle)
    return handles

  @property
  def can_any_draw(self) -> bool:
    """Whether some rollout waits for nothing but a slot."""
    return any(r.can_draw for r in self.rollouts.values())

  def is_anyone_waiting(self, n_drawing: int) -> bool:
    """Whether a slot that falls idle would be taken by somebody else."""
    n_active = sum(not r.is_parked for r in self.rollouts.values())
    return bool(self._queue) or n_active > n_drawing

  def take_broken_pages(self) -> list[int]:
    """Free pages that may hold numbers that are not finite, told once."""
    broken, self._broken_pages = self._broken_pages, []
    return broken

  # ------------------------------------------------------------------- inside

  def _enter(self, handle: int, request: Request) -> bool:
    """Admits a rollout, if the cache is sure to last for it."""
    ids, Z = tuple(request.prompt), self.config.page
    n_pages = -(-(len(ids) + request.budget) // Z)
    shared = self._prompts.get(ids)
    if shared is None and self._is_worth_sharing(ids, n_pages):
      shared = self._open_prompt(ids)
      if shared is None:
        return False
    n_shared = (len(ids) - 1) // Z if shared else 0
    if not self.book.open(handle, n_pages - n_shared):
      if shared is not None and not shared.n_rollouts:
        self._close_prompt(shared)
      return False
    if shared is not None:
      shared.n_rollouts += 1
    self.rollouts[handle] = Rollout(
      self._empty_table(),
      list(ids[:-1]),
      key=request.key,
      budget=request.budget,
      pending=ids[-1],
      is_parked=request.budget == 0,
      prompt=shared,
      is_forked=shared is None,
    )
    return True

  def _is_worth_sharing(self, ids: tuple[int, ...], n_pages: int) -> bool:
    n_copied = (len(ids) - 1) % self.config.page > 0
    return (
      self.config.share_prompts
      and len(ids) > 1
      and len(self._queue[ids]) > 1
      and n_pages + n_copied <= self.book.n_pages
    )

  def _open_prompt(self, ids: tuple[int, ...]) -> Prompt | None:
    n_pages = -(-(len(ids) - 1) // self.config.page)
    held = self.book.keep(ids, n_pages)
    if held is None:
      return None
    prompt = Prompt(self._empty_table(), list(ids[:-1]), ids=ids)
    prompt.table_J[:n_pages] = held
    self._prompts[ids] = prompt
    return prompt

  def _close_prompt(self, prompt: Prompt) -> None:
    if prompt.is_broken:
      self._broken_pages += self.book.held(prompt.ids)
    self.book.close(prompt.ids)
    del self._prompts[prompt.ids]

  def _drop_if_unused(self, prompt: Prompt) -> None:
    if not prompt.n_rollouts and prompt.ids not in self._queue:
      self._close_prompt(prompt)

  def _leave_queue(self, handle: int) -> None:
    ids = tuple(self._queued.pop(handle).prompt)
    del self._queue[ids][handle]
    if not self._queue[ids]:
      del self._queue[ids]
      if ids in self._prompts:
        self._drop_if_unused(self._prompts[ids])

  def _reach(self, handle: int, r: Row, n_tokens: int) -> bool:
    """Sees to it that a rollout's pages reach so many tokens."""
    n_more = -(-n_tokens // self.config.page) - r.n_pages
    if n_more <= 0:
      return True
    taken = self.book.take(handle, n_more)
    if taken is None:
      return False
    r.table_J[r.n_pages : r.n_pages + n_more] = taken
    r.n_pages += n_more
    return True

  def _empty_table(self) -> np.ndarray:
    return np.full(self.n_columns, paged.NO_PAGE, np.int32)
