"""The rollout engine: continuous batching over a paged key/value cache.

The agent loop hands over rollouts (`submit`), asks for tokens (`dispatch`
starts a chunk on the device, `collect` waits for it), appends tools' answers
behind what a rollout already holds (`extend`) and takes rollouts out
(`release`). Between `dispatch` and `collect` the host is free for other work.

All that the device keeps is the pool of pages. A rollout's table, length, last
token and budget live on the host (`schedule`) and travel with each chunk; so
any rollout can take any of the S slots, one that waits for a tool occupies
pages and no slot, and giving up sampled tokens is a matter of counting back.
Each rollout keeps one token *pending*: known, but not in the cache yet. A
prompt is prefilled once and its pages are shared by all rollouts that start
with it; only a last page that is part full is copied. Nothing is ever fed
twice, and sampling never looks at other rollouts, so the schedule does not
change what is drawn.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from roc.device import decoding, engine_stats, paged, sampling
from roc.device import model as model_lib
from roc.device import schedule as schedule_lib

Request = schedule_lib.Request

# Given the ids of a turn so far: how many of them the turn has, or None while
# it goes on. For turns whose end no single id marks.
FindStop = Callable[[Sequence[int]], int | None]


@dataclasses.dataclass(frozen=True)
class Drawn:
  """What one chunk gave one rollout.

  Attributes:
    tokens: ids in order, a stop id last if one was drawn.
    logps: log-probs of the sampling distribution, one a token.
    raw_logps: log-probs of the model's own distribution, one a token.
    is_stopped: it draws no more (a stop, the budget, or broken) and waits for
      `extend` or `release`.
    is_broken: its logits were not finite; it can only be released.
  """

  tokens: list[int]
  logps: list[float]
  raw_logps: list[float]
  is_stopped: bool
  is_broken: bool = False


@dataclasses.dataclass
class _Flight:
  """What is under way on the device, in the order in which it runs."""

  start: float
  fed: Any = None  # a number that is there when all is fed
  handles: list[int] = dataclasses.field(default_factory=list)  # slot by slot
  chunk: decoding.Chunk | None = None


class Engine:
  """Batched sampler; the module's head says who calls what."""

  def __init__(
    self,
    policy: model_lib.Policy,
    config: sampling.SamplingConfig,
    stop_ids: Sequence[int],
    *,
    find_stop: FindStop | None = None,
    device: jax.Device | None = None,
  ):
    """Builds an engine, without weights as yet.

    Args:
      policy: the model.
      config: shapes, cache and sampling.
      stop_ids: ids that end a turn, seen on the device.
      find_stop: asked on the host after each chunk; what was drawn behind the
        end that it finds is taken back.
      device: that it runs on; None: the first of this host.

    Raises:
      ValueError: no slots, or a cache that cannot hold one rollout.
    """
    self.policy = policy
    self.config = config
    self._find_stop = find_stop
    self._schedule = schedule_lib.Schedule(config)
    self._programs = decoding.Programs(policy, config, stop_ids)
    self._params: model_lib.Params | None = None
    # Committed, like the weights: jit compiles once more for every other
    # placement of its arguments.
    self._device = device or jax.local_devices()[0]
    n_pages = self._schedule.book.n_pages
    self._pool = jax.device_put(
      policy.empty_pool(n_pages, config.page), self._device
    )
    self._flight: _Flight | None = None
    self._stats = engine_stats.Stats(config.n_slots, n_pages)

  @property
  def n_rollouts(self) -> int:
    """Rollouts that were submitted and not released."""
    return self._schedule.n_rollouts

  @property
  def prefilled_tokens(self) -> int:
    """Tokens of prompts and answers that were fed, over the engine's life."""
    return self._stats.prefilled_tokens

  def stats(self) -> dict[str, float]:
    """What the engine did since it was last asked (`engine_stats.Stats`)."""
    return self._stats.take(self._programs.n_compiled)

  def set_params(self, params: model_lib.Params) -> None:
    """Weights for all that follows, brought to the engine's device.

    The first time all programs are compiled.

    Raises:
      RuntimeError: a rollout is under way; its cache belongs to the weights
        that filled it.
    """
    if self.n_rollouts:
      raise RuntimeError("set_params while rollouts are in flight")
    is_first, self._params = self._params is None, None  # room for the new
    self._params = self.policy.hold(jax.device_put(params, self._device))
    if is_first:
      self._warm_up()

  def submit(self, requests: Sequence[Request]) -> list[int]:
    """Queues rollouts, which enter as slots and cache allow.

    Returns:
      a handle for each.

    Raises:
      RuntimeError: no parameters yet.
      ValueError: an empty prompt, or a prompt and budget that exceed the cache.
    """
    if self._params is None:
      raise RuntimeError("set_params comes before submit")
    return self._schedule.submit(requests)

  def extend(self, observations: Mapping[int, Sequence[int]]) -> None:
    """Appends ids behind what rollouts hold and lets them draw again.

    The ids count against the budget; the caller checks that they fit
    (`budget_left`).

    Raises:
      ValueError: they do not fit, or the rollout's turn goes on.
    """
    for handle, ids in observations.items():
      self._schedule.extend(handle, ids)

  def release(self, handles: Sequence[int]) -> None:
    """Takes rollouts out, whatever they are doing; frees their pages."""
    for handle in handles:
      self._schedule.release(handle)

  def budget_left(self, handle: int) -> int:
    """Tokens that a rollout may still hold."""
    return self._schedule.budget_left(handle)

  def decode(self) -> dict[int, Drawn]:
    """`dispatch` and `collect`, for callers with nothing else to do.

    Returns:
      what was drawn; nothing once every rollout waits for its caller.
    """
    while self.dispatch():
      if drawn := self.collect():
        return drawn
    return {}

  def dispatch(self) -> bool:
    """Admits, feeds and starts to draw, without waiting for the device.

    Returns:
      whether anything was started, so that there is something to collect.

    Raises:
      RuntimeError: no parameters yet, or the last chunk was not collected.
    """
    if self._params is None:
      raise RuntimeError("set_params comes before dispatch")
    if self._flight is not None:
      raise RuntimeError("collect comes before the next dispatch")
    flight = _Flight(time.perf_counter())
    self._clear()
    self._schedule.admit()
    self._feed(flight)
    self._draw(flight)
    if flight.fed is None and flight.chunk is None:
      return False
    self._flight = flight
    return True

  def collect(self) -> dict[int, Drawn]:
    """Waits for what `dispatch` started.

    Returns:
      a `Drawn` for each rollout that drew something or broke.

    Raises:
      RuntimeError: nothing was dispatched.
    """
    if self._flight is None:
      raise RuntimeError("dispatch comes before collect")
    flight, self._flight = self._flight, None
    if flight.fed is not None:
      jax.block_until_ready(flight.fed)
      now = time.perf_counter()
      self._stats.count_feeding(now - flight.start)
      flight.start = now
    if flight.chunk is None:
      return {}
    chunk: decoding.Chunk = jax.device_get(flight.chunk)
    self._stats.count_chunk(
      time.perf_counter() - flight.start,
      n_tokens=int(chunk.n_S.sum()),
      n_steps=int(chunk.n_steps),
      n_free_pages=self._schedule.book.n_free,
    )
    # Those that were released in the meantime drew for nobody.
    return {
      handle: self._take_in(self._schedule.rollouts[handle], chunk, slot)
      for slot, handle in enumerate(flight.handles)
      if handle in self._schedule.rollouts
    }

  # ------------------------------------------------------------------ inside

  def _feed(self, flight: _Flight) -> None:
    """Feeds prompts and answers: all of them while nobody draws, else a bit.

    At most one call stands between two chunks of those that draw already, so a
    long prompt goes in by pieces; with nobody to hold up, slots are filled
    first, since a chunk costs as much for one rollout as for all.
    """
    is_drawing = self._schedule.can_any_draw
    while pieces := self._schedule.feed():
      self._feed_pieces(flight, pieces)
      self._fork()
      if is_drawing:
        return
    self._fork()

  def _feed_pieces(
    self, flight: _Flight, pieces: Sequence[schedule_lib.Piece]
  ) -> None:
    table_RJ, start_R, n_R, tokens_RT = self._no_rows()
    for i, piece in enumerate(pieces):
      n = len(piece.ids)
      table_RJ[i], start_R[i], n_R[i] = piece.row.table_J, piece.start, n
      tokens_RT[i, :n] = piece.ids
      self._stats.count_fed(n, is_answer=piece.is_answer)
    self._pool, flight.fed = self._programs.feed(
      self._params, self._pool, table_RJ, start_R, n_R, tokens_RT
    )

  def _no_rows(self) -> tuple[np.ndarray, ...]:
    R, T = self.config.extend_rows, self.config.extend_chunk
    J = self._schedule.n_columns
    return (
      np.full((R, J), paged.NO_PAGE, np.int32),
      np.zeros(R, np.int32),
      np.zeros(R, np.int32),
      np.zeros((R, T), np.int32),
    )

  def _fork(self) -> None:
    for pairs in self._in_rows(self._schedule.fork()):
      source_R, target_R = pairs.T
      self._pool = self._programs.copy(self._pool, source_R, target_R)

  def _clear(self) -> None:
    """Zeros pages whose numbers are broken, before somebody gets them."""
    for page_R1 in self._in_rows(
      [(page,) for page in self._schedule.take_broken_pages()]
    ):
      self._pool = self._programs.clear(self._pool, page_R1[:, 0])

  def _in_rows(self, items: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
    """Tuples as arrays of R each, filled up with NO_PAGE."""
    R = self.config.extend_rows
    parts = [items[i : i + R] for i in range(0, len(items), R)]
    return [
      np.array(
        [*part, *[(paged.NO_PAGE,) * len(part[0])] * (R - len(part))], np.int32
      )
      for part in parts
    ]

  def _draw(self, flight: _Flight) -> None:
    """Starts a chunk for the oldest rollouts that can draw."""
    flight.handles = self._schedule.draw()
    if not flight.handles:
      return
    S = self.config.n_slots
    rows = self._no_slots()
    for slot, handle in enumerate(flight.handles):
      r = self._schedule.rollouts[handle]
      rows.table_SJ[slot] = r.table_J
      rows.length_S[slot] = r.length
      rows.pending_S[slot] = r.pending
      rows.budget_S[slot] = r.budget
      rows.key_S2[slot] = r.key
    # A slot may stand idle until the chunk ends, unless somebody wants it.
    is_wanted = self._schedule.is_anyone_waiting(len(flight.handles))
    most_idle = np.int32(max(1, S // 8) if is_wanted else S + 1)
    self._pool, flight.chunk = self._programs.draw(
      self._params, self._pool, rows, most_idle
    )

  def _no_slots(self) -> decoding.Rows:
    S, J = self.config.n_slots, self._schedule.n_columns
    return decoding.Rows(
      np.full((S, J), paged.NO_PAGE, np.int32),
      np.zeros(S, np.int32),
      np.zeros(S, np.int32),
      np.zeros(S, np.int32),
      np.zeros((S, 2), np.uint32),
    )

  def _take_in(
    self, r: schedule_lib.Rollout, chunk: decoding.Chunk, slot: int
  ) -> Drawn:
    """Books what a rollout drew; takes back what lies behind a late stop."""
    n = int(chunk.n_S[slot])
    tokens = chunk.token_ST[slot, :n].tolist()
    is_stopped = bool(chunk.is_stopped_S[slot])
    is_broken = bool(chunk.is_broken_S[slot])
    if self._find_stop is not None and tokens:
      n_turn = self._find_stop([*r.turn, *tokens])
      if n_turn is not None:
        n, is_stopped, is_broken = max(n_turn - len(r.turn), 1), True, False
        tokens = tokens[:n]
    r.turn += tokens
    r.pending = tokens[-1] if tokens else r.pending
    r.n_drawn += n
    r.length += n
    r.budget -= n
    r.is_parked = is_stopped
    r.is_broken |= bool(chunk.is_broken_S[slot])
    return Drawn(
      tokens,
      chunk.logp_ST[slot, :n].tolist(),
      chunk.raw_logp_ST[slot, :n].tolist(),
      is_stopped,
      is_broken,
    )

  def _warm_up(self) -> None:
    """Compiles every program by running it on nothing."""
    self._pool, _ = self._programs.feed(
      self._params, self._pool, *self._no_rows()
    )
    none_R = np.full(self.config.extend_rows, paged.NO_PAGE, np.int32)
    self._pool = self._programs.copy(self._pool, none_R, none_R)
    self._pool, chunk = self._programs.draw(
      self._params, self._pool, self._no_slots(), np.int32(1)
    )
    jax.block_until_ready(chunk)
