"""The agent loop: the one place where the engine and the tools meet.

Rollouts are queued with the engine and decode in chunks; when a turn ends with
tool calls a rollout waits for the sandbox while others decode, and the answers
are appended behind what it already holds. While the device draws a chunk, the
host reads the one before: detokenises, parses, starts calls, judges. Nothing
depends on what comes first: every rollout draws from its own random stream and
is judged by its own tokens.
"""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent import futures
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

from roc import layout
from roc.device import engine as engine_lib
from roc.device import sampling
from roc.host import calls as calls_lib
from roc.host import chat as chat_lib
from roc.host import episode as episode_lib
from roc.host import rewards, tools
from roc.host.tasks import problem as problem_lib

_WAIT_S = 0.05  # how long to sleep on tools when no rollout can decode

# Verdict of a rollout whose logits were not finite.
BROKEN = "broken_logits"


class Sampler(Protocol):
  """What the loop needs of `engine.Engine`; `scripted` has one without weights.

  Handles name rollouts from `submit` to `release`.
  """

  @property
  def n_rollouts(self) -> int: ...
  def set_params(self, params: Any) -> None: ...
  def submit(self, requests: Sequence[engine_lib.Request]) -> list[int]: ...
  def dispatch(self) -> bool: ...
  def collect(self) -> dict[int, engine_lib.Drawn]: ...
  def decode(self) -> dict[int, engine_lib.Drawn]: ...
  def extend(self, observations: Mapping[int, Sequence[int]]) -> None: ...
  def release(self, handles: Sequence[int]) -> None: ...
  def stats(self) -> dict[str, float]: ...


@dataclasses.dataclass
class Timing:
  """Seconds of wall time by what they were spent on."""

  generate: float = 0.0  # the device draws or reads tokens
  # Nothing could be drawn: waiting for the sandbox, for tools or for verdicts.
  tools: float = 0.0
  # The host makes tokens of words and words of tokens: prompts, answers of
  # tools, parsed turns. Part of it lies behind what the device does.
  text: float = 0.0


@dataclasses.dataclass(frozen=True)
class Limits:
  """Bounds of one rollout, from `sampling.SamplingConfig`."""

  max_turns: int
  max_tokens: int
  max_calls: int
  # Seconds; 0: none. They guard against an environment that hangs: what meets
  # one is VOID, as it depends on the machine's speed; but a call whose program
  # was running is a TIMEOUT like any other.
  call_deadline: float = 0.0
  rollout_deadline: float = 0.0


@dataclasses.dataclass
class _Live:
  """A rollout on its way."""

  episode: episode_lib.Episode
  # In the sandbox, the same in every run: stream, place and rollout id.
  trajectory: tuple[int, int, int]
  key: np.ndarray
  budget: int
  turn: list[int] = dataclasses.field(default_factory=list)
  calls: list[futures.Future] = dataclasses.field(default_factory=list)
  calls_since: float = 0.0
  since: float | None = None  # when its first token was read


class AgentLoop:
  """Draws whole trajectories with a sampler and a toolbox."""

  def __init__(
    self,
    sampler: Sampler,
    chat: chat_lib.Chat,
    toolbox: tools.Toolbox,
    limits: Limits,
    *,
    score: rewards.Score = rewards.score,
    system: str = "",
    temperature: float = 1.0,
  ):
    """Builds the loop.

    Args:
      sampler: draws tokens.
      chat: format of prompts and tool answers.
      toolbox: runs the calls.
      limits: of one rollout.
      score: judges answers, called as `rewards.score` is; it must not block,
        and may return the future of its verdict.
      system: system text of every prompt.
      temperature: of the sampler, which episodes record.
    """
    self.sampler = sampler
    self.score = score
    self.chat = chat
    self.toolbox = toolbox
    self.limits = limits
    self.system = system
    self.temperature = temperature
    self._is_cancelled = threading.Event()
    self._text_s = 0.0

  def cancel(self) -> None:
    """Ends the `run` under way, from any thread.

    Rollouts that have not ended are CANCELLED and VOID.
    """
    self._is_cancelled.set()

  def run(
    self,
    problems: Sequence[problem_lib.Problem],
    n_rollouts: int,
    *,
    seed: int,
    step: int,
    first: int = 0,
    drawn_by: str = "train",
    stream: int = 0,
    on_finished: Callable[[int, int], None] | None = None,
  ) -> tuple[list[list[episode_lib.Episode]], Timing]:
    """Draws `n_rollouts` trajectories for each problem.

    Args:
      problems: N of them.
      n_rollouts: O.
      seed: with `stream`, the problem's place and the rollout's id it decides
        every token.
      step: number of the training step; only recorded.
      first: place of the first problem in the run's order. Another epoch, or
        another row with the same text, is another place.
      drawn_by: `Episode.drawn_by`.
      stream: of random numbers; training's is 0.
      on_finished: called with (finished, all) as rollouts end.

    Returns:
      N lists of O finished episodes in order of rollout id, and the timing.
    """
    self._is_cancelled.clear()
    self._text_s = 0.0
    start = time.perf_counter()
    lives = list(self._new(problems, n_rollouts, seed, stream, first))
    groups = [[] for _ in problems]
    for live in lives:
      live.episode.step, live.episode.drawn_by = step, drawn_by
      groups[live.episode.group_index].append(live.episode)
    handles = self.sampler.submit(
      [engine_lib.Request(r.episode.token_ids, r.key, r.budget) for r in lives]
    )
    batch = _Batch(dict(zip(handles, lives, strict=True)), len(lives))
    try:
      self._drive(batch, on_finished)
    finally:
      self._abandon(batch)
    waited = time.perf_counter()
    for episode, verdict in batch.judging:
      episode.judge(verdict.result())
    batch.timing.tools += time.perf_counter() - waited
    whole = time.perf_counter() - start
    batch.timing.generate = whole - batch.timing.tools
    batch.timing.text = self._text_s
    return groups, batch.timing

  def _drive(
    self, batch: "_Batch", on_finished: Callable[[int, int], None] | None
  ) -> None:
    """Keeps the device busy until every rollout has ended."""
    drawn: dict[int, engine_lib.Drawn] = {}
    while batch.running and not self._is_cancelled.is_set():
      self._answer(batch.running)
      is_in_flight = self.sampler.dispatch()
      was_idle = not drawn
      # The device works on the next chunk while the host reads the last one.
      for handle, chunk in drawn.items():
        self._read(batch, batch.running[handle], chunk)
      n_done = self._retire(batch)
      if n_done and on_finished is not None:
        on_finished(batch.n_all - len(batch.running), batch.n_all)
      drawn = self.sampler.collect() if is_in_flight else {}
      if was_idle and not is_in_flight and not n_done:
        batch.timing.tools += self._wait_for_any(batch.running.values())

  def _new(self, problems, n_rollouts, seed, stream, first) -> Iterable[_Live]:
    place_B = np.repeat(first + np.arange(len(problems)), n_rollouts)
    rollout_B = np.tile(np.arange(n_rollouts), len(problems))
    key_B2 = np.asarray(
      sampling.rollout_keys(
        seed, stream, jnp.asarray(place_B), jnp.asarray(rollout_B)
      )
    )
    prompts = [
      self._on_text(self.chat.prompt_ids, p.question, self.system)
      for p in problems
    ]
    for i, key in enumerate(key_B2):
      group, rollout = divmod(i, n_rollouts)
      problem = problems[group]
      episode = episode_lib.Episode(
        task_id=problem.id,
        task_index=problem.index,
        place=first + group,
        question=problem.question,
        gold=problem.answer,
        kind=problem.kind,
        group_index=group,
        rollout_id=rollout,
        temperature=self.temperature,
      )
      episode.append_prompt(prompts[group])
      name = (stream, first + group, rollout)
      yield _Live(episode, name, key, self.limits.max_tokens)

  def _on_text(self, work: Callable[..., Any], *args: Any) -> Any:
    """Does work on text, its time counted."""
    start = time.perf_counter()
    try:
      return work(*args)
    finally:
      self._text_s += time.perf_counter() - start

  def _answer(self, running: dict[int, _Live]) -> None:
    """Appends what the tools said to every rollout whose calls are all back."""
    observations = {}
    for handle, live in running.items():
      if not live.calls or live.episode.stop_reason is not None:
        continue
      if not all(call.done() for call in live.calls):
        outcomes = self._give_up_late_calls(live)
      else:
        outcomes = [call.result() for call in live.calls]
      if outcomes is None:
        continue
      live.calls = []
      for outcome in outcomes:
        live.episode.record_call(outcome)
      if any(o.status == layout.ToolStatus.INFRA for o in outcomes):
        live.episode.stop(layout.StopReason.INFRA)
        continue
      ids, roles = self._on_text(
        self.chat.tool_suffix, [o.text for o in outcomes]
      )
      # One more than the answer: the model must be able to say something.
      if len(ids) >= live.budget:
        live.episode.stop(layout.StopReason.TOOL_OVERFLOW)
        continue
      live.episode.append_environment(ids, roles)
      live.budget -= len(ids)
      observations[handle] = ids
    if observations:
      self.sampler.extend(observations)

  def _give_up_late_calls(self, live: _Live) -> list[tools.ToolOutcome] | None:
    """Ends calls that took longer than they may, or else the rollout.

    Returns:
      Outcomes of calls whose programs ran all the time, which is the model's
      fault; None where there is more to wait for, or the rollout has ended.
    """
    now = time.monotonic()
    if 0 < self.limits.call_deadline < now - live.calls_since:
      outcomes = self.toolbox.give_up(live.calls)
      if outcomes is None:
        live.episode.stop(layout.StopReason.DEADLINE, verdict="call_deadline")
      return outcomes
    self._give_up_if_late(live, now)
    return None

  def _give_up_if_late(self, live: _Live, now: float) -> None:
    since = now if live.since is None else live.since
    if 0 < self.limits.rollout_deadline < now - since:
      live.episode.stop(layout.StopReason.DEADLINE, verdict="rollout_deadline")

  def _read(
    self, batch: "_Batch", live: _Live, chunk: engine_lib.Drawn
  ) -> None:
    """Takes in drawn tokens; at the end of a turn, decides what comes next."""
    now = time.monotonic()
    live.since = now if live.since is None else live.since
    live.episode.append_model(chunk.tokens, chunk.logps)
    live.turn += chunk.tokens
    live.budget -= len(chunk.tokens)
    if chunk.is_broken:
      live.episode.stop(layout.StopReason.LOGITS, verdict=BROKEN)
    elif chunk.is_stopped:
      self._end_turn(live)
    else:
      self._give_up_if_late(live, now)

  def _end_turn(self, live: _Live) -> None:
    turn = self._on_text(self.toolbox.parse_turn, live.turn, self.chat)
    live.episode.record_turn(turn)
    is_whole = self._on_text(self.chat.is_whole, live.turn)
    live.turn = []
    if not is_whole:
      live.episode.stop(layout.StopReason.MAX_TOKENS)
    elif not turn.calls:
      live.episode.stop(layout.StopReason.ANSWERED)
    elif live.episode.n_turns >= self.limits.max_turns:
      live.episode.stop(layout.StopReason.MAX_TURNS)
    else:
      self._call(live, turn.calls)

  def _retire(self, batch: "_Batch") -> int:
    """Takes out rollouts that have ended and starts to judge them."""
    done = {
      h: r
      for h, r in batch.running.items()
      if r.episode.stop_reason is not None
    }
    for handle, live in done.items():
      self.sampler.release([handle])
      del batch.running[handle]
      self._forget_calls(live)
      batch.judging += self._judge(live.episode)
    return len(done)

  def _forget_calls(self, live: _Live) -> None:
    for call in live.calls:
      self.toolbox.cancel(call)
    live.calls = []
    self.toolbox.end_trajectory(live.trajectory)

  def _abandon(self, batch: "_Batch") -> None:
    """Leaves sampler and sandbox as they were, whatever interrupted the run."""
    left = list(batch.running.values())
    self.sampler.release(list(batch.running))
    batch.running.clear()
    # An interrupt may have come just before or behind the loop's own collect.
    with contextlib.suppress(RuntimeError):
      self.sampler.collect()
    for live in left:
      live.episode.stop(layout.StopReason.CANCELLED)
      self._forget_calls(live)

  def _judge(
    self, episode: episode_lib.Episode
  ) -> list[tuple[episode_lib.Episode, futures.Future]]:
    """Judges an episode that ended, or returns what there is to wait for."""
    if episode.outcome == layout.Outcome.VOID:
      return []
    verdict = self.score(
      episode.answers, episode.gold, is_truncated=episode.is_truncated
    )
    if isinstance(verdict, futures.Future):
      return [(episode, verdict)]
    episode.judge(verdict)
    return []

  def _call(self, live: _Live, calls: Sequence[calls_lib.ToolCall]) -> None:
    """Starts a turn's calls, within what the rollout may still make.

    Of a turn that asks for more, the last that fits is rejected in words.
    """
    e = live.episode
    n_before = len(e.tool_records)
    room = self.limits.max_calls - n_before
    if room <= 0:
      e.stop(layout.StopReason.MAX_TURNS)
      return
    live.calls_since = time.monotonic()
    live.calls = [
      self.toolbox.submit(
        call, trajectory=live.trajectory, call_index=n_before + i
      )
      for i, call in enumerate(calls_lib.limit(calls, room))
    ]

  def _wait_for_any(self, running: Iterable[_Live]) -> float:
    """Sleeps until some tool call is back; returns the seconds it took."""
    start = time.perf_counter()
    calls = [call for r in running for call in r.calls]
    if not calls:
      raise RuntimeError("the sampler draws nothing and no tool call is out")
    pending = [call for call in calls if not call.done()]
    if pending:
      futures.wait(pending, _WAIT_S, return_when=futures.FIRST_COMPLETED)
    return time.perf_counter() - start


@dataclasses.dataclass
class _Batch:
  """The rollouts of one `run`."""

  running: dict[int, _Live]  # by the sampler's handle
  n_all: int
  timing: Timing = dataclasses.field(default_factory=Timing)
  judging: list[tuple[episode_lib.Episode, futures.Future]] = dataclasses.field(
    default_factory=list
  )
