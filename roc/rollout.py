"""The agent loop: the one place where the engine and the tools meet.

Rollouts enter free slots, decode in chunks, and when a turn ends with tool
calls wait for the sandbox while the others go on; the answers are appended
behind what the slot already holds. Nothing here depends on which of them comes
first: every rollout draws from its own random stream and is judged by its own
tokens.
"""

import collections
import dataclasses
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

_WAIT_S = 0.05  # how long to sleep on tools when no slot can decode


class Sampler(Protocol):
  """What the loop needs of `engine.Engine`; tests script it."""

  @property
  def n_free(self) -> int: ...
  def set_params(self, params: Any) -> None: ...
  def submit(self, requests: Sequence[engine_lib.Request]) -> list[int]: ...
  def decode(self) -> dict[int, engine_lib.Drawn]: ...
  def extend(self, observations: Mapping[int, Sequence[int]]) -> None: ...
  def release(self, slots: Sequence[int]) -> None: ...


@dataclasses.dataclass
class Timing:
  """Seconds of wall time by what they were spent on."""

  generate: float = 0.0  # the device draws or reads tokens
  # Nothing could be drawn: waiting for the sandbox, for tools or for verdicts.
  tools: float = 0.0


@dataclasses.dataclass(frozen=True)
class Limits:
  """Bounds of one rollout, from `sampling.SamplingConfig`."""

  max_turns: int
  max_tokens: int
  max_calls: int


@dataclasses.dataclass
class _Live:
  """A rollout on its way."""

  episode: episode_lib.Episode
  key: np.ndarray
  budget: int
  turn: list[int] = dataclasses.field(default_factory=list)
  calls: list[futures.Future] = dataclasses.field(default_factory=list)


class AgentLoop:
  """Draws whole trajectories with a sampler and a toolbox."""

  def __init__(
    self,
    sampler: Sampler,
    chat: chat_lib.ChatFormat,
    toolbox: tools.Toolbox,
    limits: Limits,
    *,
    score: rewards.Score = rewards.score,
    system: str = "",
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
    """
    self.sampler = sampler
    self.score = score
    self.chat = chat
    self.toolbox = toolbox
    self.limits = limits
    self.system = system

  def run(
    self,
    problems: Sequence[problem_lib.Problem],
    n_rollouts: int,
    *,
    seed: int,
    step: int,
    on_finished: Callable[[int, int], None] | None = None,
  ) -> tuple[list[list[episode_lib.Episode]], Timing]:
    """Draws `n_rollouts` trajectories for each problem.

    Args:
      problems: N of them.
      n_rollouts: O.
      seed: with `step`, the problem's index and the rollout's id it decides
        every token.
      step: number of the training step.
      on_finished: called with (finished, all) as rollouts end.

    Returns:
      N lists of O finished episodes in order of rollout id, and the timing.
    """
    waiting = collections.deque(self._new(problems, n_rollouts, seed, step))
    groups = [[] for _ in problems]
    for live in waiting:
      groups[live.episode.group_index].append(live.episode)
    n_all, n_done = len(waiting), 0
    timing = Timing()
    judging: list[tuple[episode_lib.Episode, futures.Future]] = []
    running: dict[int, _Live] = {}
    while waiting or running:
      start = time.perf_counter()
      self._admit(waiting, running)
      self._answer(running)
      drawn = self.sampler.decode()
      timing.generate += time.perf_counter() - start
      for slot, chunk in drawn.items():
        self._read(running[slot], chunk)
      done = [
        s for s, r in running.items() if r.episode.stop_reason is not None
      ]
      if done:
        self.sampler.release(done)
        for slot in done:
          episode = running.pop(slot).episode
          self.toolbox.end_trajectory(_trajectory(episode))
          judging += self._judge(episode)
        n_done += len(done)
        if on_finished is not None:
          on_finished(n_done, n_all)
      if not drawn and not done and running:
        timing.tools += _wait_for_any(running.values())
    start = time.perf_counter()
    for episode, verdict in judging:
      episode.judge(verdict.result())
    timing.tools += time.perf_counter() - start
    return groups, timing

  def _new(self, problems, n_rollouts, seed, step) -> Iterable[_Live]:
    task_B = np.repeat([p.index for p in problems], n_rollouts)
    rollout_B = np.tile(np.arange(n_rollouts), len(problems))
    key_B2 = np.asarray(
      sampling.rollout_keys(
        seed, step, jnp.asarray(task_B), jnp.asarray(rollout_B)
      )
    )
    for i, key in enumerate(key_B2):
      group, rollout = divmod(i, n_rollouts)
      problem = problems[group]
      episode = episode_lib.Episode(
        task_id=problem.id,
        task_index=problem.index,
        question=problem.question,
        gold=problem.answer,
        kind=problem.kind,
        group_index=group,
        rollout_id=rollout,
        step=step,
      )
      episode.append_prompt(self.chat.prompt_ids(problem.question, self.system))
      yield _Live(episode, key, self.limits.max_tokens)

  def _admit(self, waiting, running) -> None:
    """Fills free slots in the order of the batch."""
    n = min(self.sampler.n_free, len(waiting))
    if not n:
      return
    entering = [waiting.popleft() for _ in range(n)]
    slots = self.sampler.submit(
      [
        engine_lib.Request(r.episode.token_ids, r.key, r.budget)
        for r in entering
      ]
    )
    running.update(zip(slots, entering, strict=True))

  def _answer(self, running: dict[int, _Live]) -> None:
    """Appends what the tools said to every slot whose calls are all back."""
    observations = {}
    for slot, live in running.items():
      if not live.calls or not all(call.done() for call in live.calls):
        continue
      outcomes = [call.result() for call in live.calls]
      live.calls = []
      for outcome in outcomes:
        live.episode.record_call(outcome)
      if any(o.status == layout.ToolStatus.INFRA for o in outcomes):
        live.episode.stop(layout.StopReason.INFRA)
        continue
      ids, roles = self.chat.tool_suffix([o.text for o in outcomes])
      # One more than the answer: the model must be able to say something.
      if len(ids) >= live.budget:
        live.episode.stop(layout.StopReason.TOOL_OVERFLOW)
        continue
      live.episode.append_environment(ids, roles)
      live.budget -= len(ids)
      observations[slot] = ids
    if observations:
      self.sampler.extend(observations)

  def _read(self, live: _Live, chunk: engine_lib.Drawn) -> None:
    """Takes in drawn tokens; at the end of a turn, decides what comes next."""
    live.episode.append_model(chunk.tokens, chunk.logps)
    live.turn += chunk.tokens
    live.budget -= len(chunk.tokens)
    if not chunk.is_stopped:
      return
    turn = self.toolbox.parse_turn(live.turn, self.chat.tokenizer)
    live.episode.record_turn(turn)
    is_whole = live.turn[-1] in self.chat.stop_ids
    live.turn = []
    if not is_whole:
      live.episode.stop(layout.StopReason.MAX_TOKENS)
    elif not turn.calls:
      live.episode.stop(layout.StopReason.ANSWERED)
    elif live.episode.n_turns >= self.limits.max_turns:
      live.episode.stop(layout.StopReason.MAX_TURNS)
    else:
      self._call(live, turn.calls)

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
    name = _trajectory(e)
    live.calls = [
      self.toolbox.submit(call, trajectory=name, call_index=n_before + i)
      for i, call in enumerate(calls_lib.limit(calls, room))
    ]


def _trajectory(episode: episode_lib.Episode) -> tuple[int, int, int]:
  """The rollout's name in the sandbox, the same in every run."""
  return (episode.step, episode.task_index, episode.rollout_id)


def _wait_for_any(running: Iterable[_Live]) -> float:
  """Sleeps until some tool call is back; returns the seconds it took."""
  start = time.perf_counter()
  pending = [c for r in running for c in r.calls if not c.done()]
  if pending:
    futures.wait(pending, _WAIT_S, return_when=futures.FIRST_COMPLETED)
  return time.perf_counter() - start


def draw_from_head(
  sampler: Sampler,
  chat: chat_lib.ChatFormat,
  problems: Sequence[problem_lib.Problem],
  *,
  seed: int,
  max_tokens: int,
) -> list[str]:
  r"""What the policy answers when it may not use the tool.

  Its turn is opened with `<answer>\boxed{` already written, so that all it can
  do is to fill in the box.

  Returns:
    One text for each problem, up to the closing brace.
  """
  key_B2 = np.asarray(
    sampling.rollout_keys(
      seed,
      0,
      jnp.asarray([p.index for p in problems]),
      jnp.zeros(len(problems), jnp.int32),
    )
  )
  texts: list[str] = []
  while len(texts) < len(problems):
    part = slice(len(texts), len(texts) + sampler.n_free)
    slots = sampler.submit(
      [
        engine_lib.Request(
          chat.prompt_ids(p.question) + chat.answer_prefix_ids(),
          key,
          max_tokens,
        )
        for p, key in zip(problems[part], key_B2[part], strict=True)
      ]
    )
    drawn: dict[int, list[int]] = {slot: [] for slot in slots}
    while chunk := sampler.decode():
      for slot, piece in chunk.items():
        drawn[slot] += piece.tokens
    sampler.release(slots)
    texts += [
      chat.tokenizer.decode(ids).split("}")[0] for ids in drawn.values()
    ]
  return texts
