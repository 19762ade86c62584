"""One rollout: every token with its role and log-prob, every call, the verdict.

Ids, roles and log-probs grow together through three `append_*` methods, so a
token without a role, or a tool's token that carries loss, cannot be written
down. A line of a trace is one episode as JSON.
"""

import dataclasses
import itertools
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from roc import jsonl, layout
from roc.host import calls, rewards, tools
from roc.host import tokenizer as tokenizer_lib

_ENVIRONMENT_ROLES = frozenset({layout.Role.TOOL, layout.Role.TEMPLATE})


@dataclasses.dataclass(frozen=True)
class ToolRecord:
  """One call of a rollout: how it ended, what ran, what the model read."""

  status: layout.ToolStatus
  name: str
  code: str
  text: str


@dataclasses.dataclass
class Episode:
  """One rollout of one problem.

  Attributes:
    task_id: the problem's id.
    task_index: number of the problem in its set; one may come twice in a run.
    place: place of the problem in the order of what drew it, counted on from
      step to step: no two groups of a run share one.
    question: text that was asked.
    gold: right answer.
    kind: the problem's kind.
    group_index: number of the group in its batch.
    rollout_id: stable place in the group, 0..O-1, never completion order.
    step: training step that drew it, or after which evaluation did.
    drawn_by: the command, or the part of it: train, evaluate or rollout.
    temperature: of the softmax at sampling; None where nobody sampled.
    token_ids: ids in order; never re-rendered.
    roles: `Role` of each token.
    logprobs: log-prob of each token at sampling, as float32; 0 unless MODEL.
    tool_records: calls in order.
    answers: well-formed answers of the model, in order.
    n_turns: turns that the model took.
    has_void_turn: some turn held neither a closed call nor an answer.
    stop_reason: why it ended; None while it runs.
    outcome: raw correctness.
    reward: scalar reward, shaping included.
    verdict: reason of the outcome in a word.
    void_reason: what failed where the outcome is VOID; else None.
    advantage: set after the update; None before.
    kept: whether the filter kept it; None before.
    p_err: share of failed calls (0.5 with no call); None before the filter.
    p_format: format penalty; None before the filter.
    p_total: their sum; None before the filter.
    why: why the filter kept or dropped it.
  """

  task_id: str = ""
  task_index: int = 0
  place: int = 0
  question: str = ""
  gold: str = ""
  kind: str = ""
  group_index: int = 0
  rollout_id: int = 0
  step: int = 0
  drawn_by: str = "train"
  temperature: float | None = None
  token_ids: list[int] = dataclasses.field(default_factory=list)
  roles: list[int] = dataclasses.field(default_factory=list)
  logprobs: list[float] = dataclasses.field(default_factory=list)
  tool_records: list[ToolRecord] = dataclasses.field(default_factory=list)
  answers: list[str] = dataclasses.field(default_factory=list)
  n_turns: int = 0
  has_void_turn: bool = False
  stop_reason: layout.StopReason | None = None
  outcome: layout.Outcome = layout.Outcome.WRONG
  reward: float = 0.0
  verdict: str = ""
  void_reason: layout.VoidReason | None = None
  advantage: float | None = None
  kept: bool | None = None
  p_err: float | None = None
  p_format: float | None = None
  p_total: float | None = None
  why: str = ""

  def __len__(self) -> int:
    return len(self.token_ids)

  @property
  def n_answers(self) -> int:
    """Well-formed answers that the model wrote."""
    return len(self.answers)

  @property
  def answer(self) -> str | None:
    """The answer that counts: the last one; None without any."""
    return self.answers[-1] if self.answers else None

  @property
  def is_truncated(self) -> bool:
    """Stopped by a turn or token limit."""
    return self.stop_reason in layout.TRUNCATED_REASONS

  @property
  def n_failed_calls(self) -> int:
    """Calls that failed by the model's fault."""
    return sum(r.status in layout.FAILED_STATUSES for r in self.tool_records)

  @property
  def n_judged_calls(self) -> int:
    """Calls on which the sandbox did its part."""
    return sum(r.status in layout.JUDGED_STATUSES for r in self.tool_records)

  @property
  def n_model_tokens(self) -> int:
    """Tokens that the policy sampled."""
    return self.roles.count(layout.Role.MODEL)

  # ------------------------------------------------------------ building

  def append_prompt(self, ids: Sequence[int]) -> None:
    """Starts the episode with its prompt, once."""
    if self.token_ids:
      raise ValueError("the prompt must be the first thing in an episode")
    if not len(ids):
      raise ValueError("a prompt needs at least one token")
    self._append(ids, [layout.Role.PROMPT] * len(ids))

  def append_model(self, ids: Sequence[int], logprobs: Sequence[float]) -> None:
    """Adds sampled tokens with their log-probs at sampling.

    Args:
      ids: ids exactly as sampled, the end-of-turn token included.
      logprobs: one finite number <= 0 for each (up to rounding).

    Raises:
      ValueError: lengths differ, a log-prob is no log-prob, or no prompt yet.
    """
    if len(ids) != len(logprobs):
      raise ValueError(f"{len(ids)} sampled ids but {len(logprobs)} log-probs")
    for value in logprobs:
      if not math.isfinite(value) or value > 1e-3:
        raise ValueError(f"{value} is not the log of a probability")
    self._append(ids, [layout.Role.MODEL] * len(ids), logprobs)

  def append_lesson(self, ids: Sequence[int]) -> None:
    """Adds a turn to be learnt, which nobody sampled: log-probs are 0."""
    self._append(ids, [layout.Role.MODEL] * len(ids))

  def append_environment(
    self, ids: Sequence[int], roles: Sequence[int]
  ) -> None:
    """Adds what the environment wrote: tool answers and re-added headers.

    Args:
      ids: tokens to read, never to learn.
      roles: `TOOL` or `TEMPLATE` for each.

    Raises:
      ValueError: lengths differ, another role, or no prompt yet.
    """
    if len(ids) != len(roles):
      raise ValueError(f"{len(ids)} ids but {len(roles)} roles")
    if not _ENVIRONMENT_ROLES.issuperset(roles):
      raise ValueError(
        "the environment may only write tokens of role TOOL or TEMPLATE"
      )
    self._append(ids, roles)

  def record_turn(self, turn: calls.ParsedTurn) -> None:
    """Counts a turn of the model, one cut short included; keeps its answers."""
    self.n_turns += 1
    self.answers.extend(turn.answers)
    self.has_void_turn = self.has_void_turn or turn.is_void

  def record_call(self, outcome: tools.ToolOutcome) -> None:
    """Notes how a call ended, in the order in which the calls were written."""
    self.tool_records.append(
      ToolRecord(
        status=outcome.status,
        name=outcome.call.name,
        code=str(outcome.call.arguments.get("code", outcome.call.raw)),
        text=outcome.text,
      )
    )

  def finish(
    self,
    stop_reason: layout.StopReason,
    score: Callable[..., rewards.Verdict] = rewards.score,
  ) -> None:
    """Ends the episode and judges it at once: `stop`, then `judge`.

    Args:
      stop_reason: why it ended.
      score: judges the answers, called as `rewards.score` is.
    """
    self.stop(stop_reason)
    if self.outcome != layout.Outcome.VOID:
      self.judge(score(self.answers, self.gold, is_truncated=self.is_truncated))

  def stop(
    self, stop_reason: layout.StopReason, *, verdict: str = "void"
  ) -> None:
    """Ends the episode; it has a verdict only where it needs no judging.

    An environment's fault (`layout.VOID_STOPS`) makes it VOID, outside its
    group.

    Args:
      stop_reason: why it ended.
      verdict: of an environment's fault, in a word.
    """
    self.stop_reason = stop_reason
    self.void_reason = layout.VOID_STOPS.get(stop_reason)
    if self.void_reason is not None:
      self.outcome = layout.Outcome.VOID
      self.verdict = verdict

  def judge(self, verdict: rewards.Verdict) -> None:
    """Takes the verdict on an episode that has ended.

    Shaping may change `reward` later. A checker's own fault makes the episode
    VOID as a tool's does.

    Raises:
      ValueError: the episode has not ended, or is VOID.
    """
    if self.stop_reason is None or self.outcome == layout.Outcome.VOID:
      raise ValueError("only an episode that ended, and not VOID, is judged")
    self.verdict = verdict.reason
    self.reward = verdict.reward
    self.outcome = verdict.outcome
    self.void_reason = verdict.void_reason

  def _append(
    self,
    ids: Sequence[int],
    roles: Sequence[int],
    logprobs: Sequence[float] | None = None,
  ) -> None:
    if not self.token_ids and roles and roles[0] != layout.Role.PROMPT:
      raise ValueError("append_prompt must come first")
    if self.stop_reason is not None:
      raise ValueError("the episode has ended; nothing can be appended")
    self.token_ids.extend(map(int, ids))
    self.roles.extend(map(int, roles))
    logprobs = [0.0] * len(ids) if logprobs is None else logprobs
    self.logprobs.extend(map(_shortest_float32, logprobs))

  # ---------------------------------------------------------------- JSON

  def segments(
    self, tokenizer: tokenizer_lib.Tokenizer
  ) -> list[dict[str, str]]:
    """Decoded text of each run of tokens with one role, for people."""
    pairs = zip(self.token_ids, self.roles, strict=True)
    return [
      {
        "role": layout.Role(role).name.lower(),
        "text": tokenizer.decode([index for index, _ in run]),
      }
      for role, run in itertools.groupby(pairs, key=lambda pair: pair[1])
    ]

  def to_json(self, tokenizer: tokenizer_lib.Tokenizer | None = None) -> str:
    """One line of JSON; with a tokenizer also `messages`, the decoded text."""
    row = {
      field.name: getattr(self, field.name)
      for field in dataclasses.fields(self)
    }
    row["stop_reason"] = (
      None if self.stop_reason is None else self.stop_reason.name.lower()
    )
    row["outcome"] = self.outcome.name.lower()
    row["void_reason"] = (
      None if self.void_reason is None else self.void_reason.name.lower()
    )
    row["tool_records"] = [
      {
        "status": record.status.name.lower(),
        "name": record.name,
        "code": record.code,
        "text": record.text,
      }
      for record in self.tool_records
    ]
    row["answer"] = self.answer
    row["is_truncated"] = self.is_truncated
    if tokenizer is not None:
      row["messages"] = self.segments(tokenizer)
    return json.dumps(row)

  @classmethod
  def from_json(cls, line: bytes | str, where: str = "episode") -> "Episode":
    """Reads a line that `to_json` wrote.

    Args:
      line: one JSON object; fields that `to_json` derives are ignored.
      where: names the line in errors, such as `step_000001.jsonl line 3`.

    Raises:
      ValueError: no JSON object, a missing or malformed field, or lists whose
        lengths differ.
    """
    row = with_later_fields(jsonl.parse(line, where).fields)
    values = {}
    for field in dataclasses.fields(cls):
      if field.name not in row:
        raise ValueError(f"{where}: field {field.name!r} is missing")
      try:
        values[field.name] = _read_field(field.name, row[field.name])
      except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
          f"{where}: field {field.name!r} is malformed: {error!r}"
        ) from error
    episode = cls(**values)
    lists = (episode.token_ids, episode.roles, episode.logprobs)
    if len(set(map(len, lists))) != 1:
      raise ValueError(
        f"{where}: token_ids, roles and logprobs must be equally long"
      )
    return episode


def with_later_fields(row: dict[str, Any]) -> dict[str, Any]:
  """A trace's fields, with those that earlier versions did not write.

  A problem was then known by its row, and evaluations by their step.
  """
  is_evaluation = row.get("step") == 2**31 - 1
  return {
    "place": row.get("task_index"),
    "drawn_by": "evaluate" if is_evaluation else "train",
    "temperature": None,
    "void_reason": None,
  } | row


def void_shares(groups: Sequence[Sequence[Episode]]) -> dict[str, float]:
  """Share of rollouts that are VOID, of all and by what failed.

  Args:
    groups: at least one rollout.

  Returns:
    `errors/void_frac`, and `errors/void_sandbox` and so on, which add up to it.
  """
  reasons = [e.void_reason for group in groups for e in group]
  shares = {
    f"errors/void_{reason.name.lower()}": reasons.count(reason) / len(reasons)
    for reason in layout.VoidReason
  }
  n_void = len(reasons) - reasons.count(None)
  return {"errors/void_frac": n_void / len(reasons)} | shares


def read_episodes(path: str | pathlib.Path) -> Iterator[Episode]:
  """Reads a JSONL file of episodes.

  Raises:
    ValueError: the file cannot be read, or a line is no episode; the message
      names file, line and field.
  """
  for number, line in jsonl.lines(path):
    yield Episode.from_json(line, where=f"{path} line {number}")


def _read_field(name: str, value: Any) -> Any:
  if name == "stop_reason":
    return None if value is None else layout.StopReason[value.upper()]
  if name == "outcome":
    return layout.Outcome[value.upper()]
  if name == "void_reason":
    return None if value is None else layout.VoidReason[value.upper()]
  if name == "tool_records":
    return [
      ToolRecord(
        status=layout.ToolStatus[record["status"].upper()],
        name=record["name"],
        code=record["code"],
        text=record["text"],
      )
      for record in value
    ]
  if name in _LIST_TYPES:
    if not all(isinstance(item, _LIST_TYPES[name]) for item in value):
      raise TypeError(f"expected a list of {_LIST_TYPES[name]}")
    return list(value)
  expected = _SCALAR_TYPES[name]
  if not isinstance(value, expected):
    raise TypeError(f"expected {expected}, not {value!r}")
  return value


_LIST_TYPES = {
  "token_ids": int,
  "roles": int,
  "logprobs": (int, float),
  "answers": str,
}
_NUMBER_OR_NONE = (int, float, type(None))
_SCALAR_TYPES = {
  **dict.fromkeys(("task_id", "question", "gold", "kind", "why"), str),
  "drawn_by": str,
  **dict.fromkeys(("task_index", "place", "group_index", "rollout_id"), int),
  **dict.fromkeys(("step", "n_turns"), int),
  **dict.fromkeys(("p_err", "p_format", "p_total"), _NUMBER_OR_NONE),
  **dict.fromkeys(("advantage", "temperature"), _NUMBER_OR_NONE),
  "kept": (bool, type(None)),
  "has_void_turn": bool,
  "reward": (int, float),
  "verdict": str,
}


def _shortest_float32(value: float) -> float:
  """The float with the fewest digits that is the same float32."""
  return float(str(np.float32(value)) if value else value)
