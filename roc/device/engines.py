"""One engine on each of this host's devices, behind the verbs of a single one.

Rollouts are handed out prompt by prompt, to the engine that has fewest, and
not before it needs them: lengths differ, and what is shared out beforehand
would end at different times. What is drawn does not depend on who draws it.
"""

import itertools
from collections.abc import Mapping, Sequence
from concurrent import futures

import jax

from roc.device import engine as engine_lib
from roc.device import engine_stats, sampling
from roc.device import model as model_lib
from roc.device import schedule as schedule_lib

_AHEAD = 2  # an engine is given rollouts for so many times its slots


class Engines:
  """Several engines; see `engine.Engine` for what the verbs do."""

  def __init__(
    self,
    policy: model_lib.Policy,
    config: sampling.SamplingConfig,
    stop_ids: Sequence[int],
    *,
    devices: Sequence[jax.Device],
    find_stop: engine_lib.FindStop | None = None,
  ):
    """Builds an engine for each of `devices`; the rest as `engine.Engine`."""
    self.policy = policy
    self.config = config
    self._engines = [
      engine_lib.Engine(
        policy, config, stop_ids, find_stop=find_stop, device=device
      )
      for device in devices
    ]
    # By prompt, in order of first submission, and not handed out yet.
    self._queue: dict[tuple[int, ...], dict[int, engine_lib.Request]] = {}
    # Which engine has it, under which handle of its own; and back.
    self._home: dict[int, tuple[int, int]] = {}
    self._handle_of: dict[tuple[int, int], int] = {}
    self._in_flight: list[int] = []
    self._handles = itertools.count()

  @property
  def n_rollouts(self) -> int:
    """Rollouts that were submitted and not released."""
    return self._n_queued + len(self._home)

  @property
  def prefilled_tokens(self) -> int:
    """Tokens of prompts and answers that were fed, over the engines' lives."""
    return sum(e.prefilled_tokens for e in self._engines)

  def stats(self) -> dict[str, float]:
    """What the engines did since this was last asked, taken together."""
    return engine_stats.together([e.stats() for e in self._engines])

  def set_params(self, params: model_lib.Params) -> None:
    """Weights for all that follows, a copy on each device.

    Raises:
      RuntimeError: a rollout is under way.
    """
    if self.n_rollouts:
      raise RuntimeError("set_params while rollouts are in flight")
    # Side by side, since the first time each compiles its programs.
    with futures.ThreadPoolExecutor(len(self._engines)) as pool:
      list(pool.map(lambda e: e.set_params(params), self._engines))

  def submit(self, requests: Sequence[engine_lib.Request]) -> list[int]:
    """Queues rollouts; returns a handle for each."""
    schedule_lib.check(requests, self.config)
    handles = [next(self._handles) for _ in requests]
    for handle, request in zip(handles, requests, strict=True):
      self._queue.setdefault(tuple(request.prompt), {})[handle] = request
    return handles

  def extend(self, observations: Mapping[int, Sequence[int]]) -> None:
    """Appends ids behind what rollouts hold and lets them draw again."""
    for handle, ids in observations.items():
      i, own = self._home[handle]
      self._engines[i].extend({own: ids})

  def release(self, handles: Sequence[int]) -> None:
    """Takes rollouts out, whatever they are doing."""
    for handle in handles:
      if handle in self._home:
        i, own = self._home.pop(handle)
        del self._handle_of[i, own]
        self._engines[i].release([own])
      else:
        ids = next(p for p, held in self._queue.items() if handle in held)
        self._leave_queue(ids, [handle])

  def budget_left(self, handle: int) -> int:
    """Tokens that a rollout may still hold."""
    if handle in self._home:
      i, own = self._home[handle]
      return self._engines[i].budget_left(own)
    return next(q[handle] for q in self._queue.values() if handle in q).budget

  def decode(self) -> dict[int, engine_lib.Drawn]:
    """`dispatch` and `collect`, for callers with nothing else to do."""
    while self.dispatch():
      if drawn := self.collect():
        return drawn
    return {}

  def dispatch(self) -> bool:
    """Starts a chunk on every device that has something to do."""
    self._hand_out()
    self._in_flight = [
      i for i, engine in enumerate(self._engines) if engine.dispatch()
    ]
    return bool(self._in_flight)

  def collect(self) -> dict[int, engine_lib.Drawn]:
    """Waits for what `dispatch` started on all devices."""
    drawn = {}
    in_flight, self._in_flight = self._in_flight, []
    for i in in_flight:
      for own, chunk in self._engines[i].collect().items():
        drawn[self._handle_of[i, own]] = chunk
    return drawn

  def _hand_out(self) -> None:
    """Gives queued rollouts, prompt by prompt, to those that have fewest."""
    most = _AHEAD * self.config.n_slots
    while self._queue:
      ids, requests = next(iter(self._queue.items()))
      # A prompt is split only if there is too little left for all, or too much
      # of it for one.
      fair = -(-self._n_queued // len(self._engines))
      n = min(len(requests), fair, most)
      i = min(range(len(self._engines)), key=self._load)
      if self._load(i) + n > most:
        return
      handles = list(requests)[:n]
      owns = self._engines[i].submit([requests[h] for h in handles])
      for handle, own in zip(handles, owns, strict=True):
        self._home[handle] = i, own
        self._handle_of[i, own] = handle
      self._leave_queue(ids, handles)

  def _load(self, i: int) -> int:
    return self._engines[i].n_rollouts

  @property
  def _n_queued(self) -> int:
    return sum(map(len, self._queue.values()))

  def _leave_queue(self, ids: tuple[int, ...], handles: Sequence[int]) -> None:
    for handle in handles:
      del self._queue[ids][handle]
    if not self._queue[ids]:
      del self._queue[ids]
