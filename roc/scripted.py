"""A sampler without weights: it says what it is told to, as the engine would.

For trying out an agent loop, a tool or a reward: give it the turns that each
rollout is to take and it plays them in chunks, with the engine's budgets, slots
and stops, and checks that it is driven as an engine may be driven.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from roc.device import engine

# From a request to the turns that its rollout takes, as ids; a turn that is cut
# by the budget ends there, and after the last one nothing more may be asked.
Script = Callable[[engine.Request], Iterable[Sequence[int]]]

# Stands in a turn for a token whose logits are not finite; there it breaks off.
BREAK = -1


@dataclasses.dataclass
class _Rollout:
  turns: list[list[int]]
  budget: int
  is_parked: bool
  is_broken: bool = False


class ScriptedSampler:
  """Plays turns; has the verbs of `engine.Engine`."""

  def __init__(self, script: Script, *, n_slots: int = 4, chunk: int = 3):
    """Builds a sampler.

    Args:
      script: the turns of each rollout.
      n_slots: rollouts that speak at once.
      chunk: most tokens of a rollout in one go.

    Raises:
      ValueError: nobody could ever say anything.
    """
    if n_slots < 1 or chunk < 1:
      raise ValueError(f"n_slots={n_slots} and chunk={chunk} must be 1 or more")
    self._script = script
    self._n_slots = n_slots
    self._chunk = chunk
    self._queue: dict[int, engine.Request] = {}
    self._live: dict[int, _Rollout] = {}
    self._n_submitted = 0
    self._speaking: list[int] | None = None  # between dispatch and collect
    self.fed: dict[int, list[int]] = {}  # all that a rollout was given or said

  @property
  def n_rollouts(self) -> int:
    """Rollouts that were submitted and not released."""
    return len(self._queue) + len(self._live)

  def stats(self) -> dict[str, float]:
    """Nothing is measured."""
    return {}

  def set_params(self, params: Any) -> None:
    """Weights change nothing.

    Raises:
      RuntimeError: a rollout is under way.
    """
    if self.n_rollouts:
      raise RuntimeError("set_params while rollouts are in flight")

  def submit(self, requests: Sequence[engine.Request]) -> list[int]:
    """Queues rollouts; returns their handles.

    Raises:
      ValueError: an empty prompt.
    """
    if not all(request.prompt for request in requests):
      raise ValueError("a prompt holds at least one token")
    handles = list(range(self._n_submitted, self._n_submitted + len(requests)))
    self._n_submitted += len(requests)
    for handle, request in zip(handles, requests, strict=True):
      self._queue[handle] = request
      self.fed[handle] = list(request.prompt)
    return handles

  def budget_left(self, handle: int) -> int:
    """Tokens that a rollout may still hold."""
    return (self._queue.get(handle) or self._live[handle]).budget

  def extend(self, observations: Mapping[int, Sequence[int]]) -> None:
    """Lets parked rollouts take their next turn.

    Raises:
      ValueError: the ids do not fit or are none, the rollout's turn goes on, or
        it is broken.
    """
    for handle, ids in observations.items():
      r = self._live[handle]
      if not r.is_parked:
        raise ValueError(
          f"rollout {handle} is extended in the middle of a turn"
        )
      if r.is_broken:
        raise ValueError(f"rollout {handle} is broken: it can only be released")
      if not ids:
        raise ValueError(f"rollout {handle} is extended by nothing")
      if len(ids) > r.budget:
        raise ValueError(
          f"{len(ids)} tokens exceed rollout {handle}'s budget {r.budget}"
        )
      del r.turns[0]
      r.budget -= len(ids)
      r.is_parked = r.budget == 0
      self.fed[handle] += ids

  def release(self, handles: Sequence[int]) -> None:
    """Takes rollouts out."""
    for handle in handles:
      if self._queue.pop(handle, None) is None:
        del self._live[handle]

  def dispatch(self) -> bool:
    """Gives the word to the oldest rollouts whose turn it is.

    Raises:
      RuntimeError: the last chunk was not collected.
      ValueError: a script has no turn left.
    """
    if self._speaking is not None:
      raise RuntimeError("collect comes before the next dispatch")
    self._admit()
    speaking = [h for h, r in self._live.items() if not r.is_parked]
    speaking = speaking[: self._n_slots]
    for handle in speaking:
      if not any(self._live[handle].turns[:1]):
        raise ValueError(f"the script of rollout {handle} has no turn left")
    self._speaking = speaking or None
    return bool(speaking)

  def collect(self) -> dict[int, engine.Drawn]:
    """What they said, without those that were released in the meantime.

    Raises:
      RuntimeError: nothing was dispatched.
    """
    if self._speaking is None:
      raise RuntimeError("dispatch comes before collect")
    speaking, self._speaking = self._speaking, None
    return {h: self._say(h) for h in speaking if h in self._live}

  def decode(self) -> dict[int, engine.Drawn]:
    """`dispatch` and `collect`."""
    return self.collect() if self.dispatch() else {}

  def _admit(self) -> None:
    n_active = sum(not r.is_parked for r in self._live.values())
    for handle in list(self._queue)[: max(self._n_slots - n_active, 0)]:
      request = self._queue.pop(handle)
      turns = [list(turn) for turn in self._script(request)]
      self._live[handle] = _Rollout(turns, request.budget, request.budget == 0)

  def _say(self, handle: int) -> engine.Drawn:
    r = self._live[handle]
    n = min(self._chunk, r.budget)
    tokens, r.turns[0] = r.turns[0][:n], r.turns[0][n:]
    if BREAK in tokens:
      tokens = tokens[: tokens.index(BREAK)]
      r.is_broken = True
    r.budget -= len(tokens)
    r.is_parked = r.is_broken or not r.turns[0] or r.budget == 0
    self.fed[handle] += tokens
    logps = [-0.5 - 0.25 * (t % 3) for t in tokens]
    return engine.Drawn(tokens, logps, logps, r.is_parked, r.is_broken)
