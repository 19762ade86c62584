"""Scripted demonstrations with controlled mess, run against the real tool.

Supervised training on these gives a policy that is often right and often messy,
the situation for which resample-on-correct exists. Which mess a demonstration
holds is drawn at random for each one and never follows from the question: the
policy learns a mixture, and reinforcement can shift the mixture's weights.

A script only says what the model writes. What the tool answers is what the
sandbox really printed when the script's code ran.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from concurrent import futures

import numpy as np

from roc import layout
from roc.host import chat as chat_lib
from roc.host import episode as episode_lib
from roc.host import messages as messages_lib
from roc.host import tools
from roc.host.sandbox import contract
from roc.host.tasks import problem as problem_lib


@dataclasses.dataclass(frozen=True)
class MessRates:
  """How often demonstrations go wrong, and how; all drawn independently.

  Attributes:
    fails: share in which one step's first call fails and is then repaired.
    fails_again: share of those in which the repair fails too, then succeeds.
    name_error: weight of a misspelt `print` among failing calls.
    syntax_error: weight of a parenthesis left open.
    wrong_variable: weight of printing a name that was never set.
    timeout: weight of a loop that never ends; each costs the time limit.
    wrong_operator: share that computes the wrong thing.
    head_guess: share that calls no tool and answers with a random number.
    no_answer: share that ends in words, with no answer.
    answers_twice: share that writes its answer twice.
    assigns: share of calls that set a variable before printing it.
  """

  fails: float = 0.45
  fails_again: float = 0.25
  name_error: float = 0.4
  syntax_error: float = 0.3
  wrong_variable: float = 0.29
  timeout: float = 0.01
  wrong_operator: float = 0.12
  head_guess: float = 0.12
  no_answer: float = 0.06
  answers_twice: float = 0.15
  assigns: float = 0.3

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if not 0 <= value <= 1:
        raise ValueError(
          f"mess rate {field.name} must be within 0..1, not {value}"
        )
    if self.fails and not sum(self.failure_weights.values()):
      raise ValueError(
        "mess rates: calls are to fail but every kind has rate 0"
      )

  @property
  def failure_weights(self) -> dict[str, float]:
    """Weight of each kind of failing call."""
    return {kind: getattr(self, kind) for kind in _BROKEN_CODE}


CLEAN = MessRates(
  fails=0.0,
  wrong_operator=0.0,
  head_guess=0.0,
  no_answer=0.0,
  answers_twice=0.0,
)

_PREVIOUS = "{p}"
# Demonstrations under way at once; each has at most one call in the queue.
_BLOCK = 4096
_MISSPELT = ("prnt", "pritn", "Print", "printf")
_UNSET = ("total", "value", "result")
_WORDS = ("Done.", "I do not know.")
_OTHER_OPERATOR = {"*": "+", "+": "-", "-": "+"}

# Code that fails, by kind: a function of the expression and a random generator.
_BROKEN_CODE: dict[str, Callable[[str, np.random.Generator], str]] = {
  "name_error": lambda e, rng: f"{rng.choice(_MISSPELT)}({e})",
  "syntax_error": lambda e, rng: f"print({e}",
  "wrong_variable": lambda e, rng: f"x={e}\nprint({rng.choice(_UNSET)})",
  "timeout": lambda e, rng: "while True: pass",
}


@dataclasses.dataclass(frozen=True)
class Turn:
  """One turn of a script: a call, or words and answers that end it.

  Attributes:
    code: program of the call; None for the last turn. `{p}` stands for what the
      last successful call printed.
    text: words of the last turn.
    answers: answers of the last turn, `{p}` as above.
  """

  code: str | None = None
  text: str = ""
  answers: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Demonstration:
  """A problem, what the model is to write, and which mess was put in."""

  problem: problem_lib.Problem
  turns: tuple[Turn, ...]
  mess: frozenset[str]


def make_demonstration(
  problem: problem_lib.Problem, seed: int, rates: MessRates | None = None
) -> Demonstration:
  """Writes the script for one problem.

  Args:
    problem: its `info["steps"]` are the expressions to run, one call each.
    seed: with the problem's index it decides the mess; the question does not.
    rates: how often what goes wrong.

  Raises:
    ValueError: the problem has no steps to script.
  """
  rates = rates or MessRates()
  if "steps" not in problem.info:
    raise ValueError(
      f"problem {problem.id!r} has no `steps`, so it cannot be scripted; "
      "demonstrations are made from the arithmetic task"
    )
  # A stream apart from the one that draws problems of the same seed and index.
  rng = np.random.default_rng([seed, problem.index, 0xDE30])
  steps = list(problem.info["steps"])
  mess = _draw_mess(rng, rates)
  if "head_guess" in mess:
    mess -= {"wrong_operator", "fails", "fails_again"}
    turns, result = [], _random_number(rng, len(problem.answer))
  else:
    if "wrong_operator" in mess:
      at = rng.integers(len(steps))
      steps[at] = _swap_operator(steps[at])
    turns, result = _call_turns(steps, mess, rng, rates), _PREVIOUS
  if "no_answer" in mess:
    mess -= {"answers_twice"}
    last = Turn(text=str(rng.choice(_WORDS)))
  else:
    last = Turn(answers=(result,) * (2 if "answers_twice" in mess else 1))
  return Demonstration(problem, (*turns, last), frozenset(mess))


def _draw_mess(rng: np.random.Generator, rates: MessRates) -> set[str]:
  names = (
    "fails",
    "fails_again",
    "wrong_operator",
    "head_guess",
    "no_answer",
    "answers_twice",
  )
  draws = rng.random(len(names))
  mess = {
    name
    for name, draw in zip(names, draws, strict=True)
    if draw < getattr(rates, name)
  }
  return mess if "fails" in mess else mess - {"fails_again"}


def _call_turns(
  steps: Sequence[str],
  mess: set[str],
  rng: np.random.Generator,
  rates: MessRates,
) -> list[Turn]:
  """One good call for each step, failing calls before one of them."""
  n_failures = ("fails" in mess) + ("fails_again" in mess)
  failing_step = rng.integers(len(steps))
  weights = np.array(list(rates.failure_weights.values()))
  turns = []
  for index, expression in enumerate(steps):
    if index == failing_step and n_failures:
      kinds = rng.choice(
        list(_BROKEN_CODE), size=n_failures, p=weights / weights.sum()
      )
      turns += [Turn(code=_BROKEN_CODE[k](expression, rng)) for k in kinds]
    code = f"print({expression})"
    if rng.random() < rates.assigns:
      code = f"x={expression}\nprint(x)"
    turns.append(Turn(code=code))
  return turns


def _swap_operator(expression: str) -> str:
  """The expression with another operator at its first place for one."""
  return re.sub(
    r"(?<=[\d}])[*+-]",
    lambda found: _OTHER_OPERATOR[found[0]],
    expression,
    count=1,
  )


def _random_number(rng: np.random.Generator, n_chars: int) -> str:
  """A plausible number: as long as the right one and otherwise random."""
  digits = rng.integers(0, 10, n_chars)
  digits[0] = rng.integers(1, 10)
  return "".join(str(digit) for digit in digits)


def run_demonstrations(
  demonstrations: Sequence[Demonstration],
  toolbox: tools.Toolbox,
  chat: chat_lib.Chat,
  *,
  progress: Callable[[int, int], None] | None = None,
) -> list[episode_lib.Episode]:
  """Runs scripts and writes them down as episodes.

  A block of demonstrations advances together, one turn a wave, so that the
  sandbox always has many calls to run and its queue never overflows.

  Args:
    demonstrations: scripts, in the order of the result.
    toolbox: runs and words the calls.
    chat: makes the ids.
    progress: called with (turns done, turns in all) as calls come back.

  Returns:
    One finished episode for each script, log-probs 0, judged like a rollout.

  Raises:
    SandboxError: a call that must succeed did not; the sandbox is not well.
  """
  runs = [_Run(demo, chat, toolbox, i) for i, demo in enumerate(demonstrations)]
  n_total = sum(len(demo.turns) for demo in demonstrations)
  n_done = 0
  for start in range(0, len(runs), _BLOCK):
    waiting = runs[start : start + _BLOCK]
    while waiting:
      started = [run.advance() for run in waiting]
      for run, running in zip(waiting, started, strict=True):
        run.read([future.result() for future in running])
        n_done += 1
        if progress is not None:
          progress(n_done, n_total)
      waiting = [run for run in waiting if not run.is_done]
  return [run.episode for run in runs]


class _Run:
  """A script on its way: the episode so far and the next turn."""

  def __init__(
    self,
    demonstration: Demonstration,
    chat: chat_lib.Chat,
    toolbox: tools.Toolbox,
    rollout: int,
  ):
    problem = demonstration.problem
    self.episode = episode_lib.Episode(
      task_id=problem.id,
      task_index=problem.index,
      question=problem.question,
      gold=problem.answer,
      kind=problem.kind,
      why=",".join(sorted(demonstration.mess)),
    )
    self.episode.append_prompt(chat.prompt_ids(problem.question))
    self._turns = list(demonstration.turns)
    self._chat = chat
    self._toolbox = toolbox
    self._name = f"demonstration-{rollout}"
    self._printed = ""

  @property
  def is_done(self) -> bool:
    return self.episode.stop_reason is not None

  def advance(self) -> list[futures.Future[tools.ToolOutcome]]:
    """Writes the next turn and starts its calls."""
    ids = self._turn_ids(self._turns.pop(0))
    self.episode.append_model(ids, [0.0] * len(ids))
    parsed = self._toolbox.parse_turn(ids, self._chat)
    self.episode.record_turn(parsed)
    return [
      self._toolbox.submit(
        call,
        trajectory=self._name,
        call_index=len(self.episode.tool_records) + offset,
      )
      for offset, call in enumerate(parsed.calls)
    ]

  def read(self, outcomes: Sequence[tools.ToolOutcome]) -> None:
    """Appends what the tool said, or ends the episode if nothing was asked."""
    for outcome in outcomes:
      self.episode.record_call(outcome)
      if outcome.status == layout.ToolStatus.INFRA:
        raise contract.SandboxError(
          f"the sandbox failed on a demonstration's call ({outcome.text}); run"
          " the same command again"
        )
      if outcome.status == layout.ToolStatus.OK:
        self._printed = outcome.text
    if outcomes:
      self.episode.append_environment(
        *self._chat.tool_suffix([outcome.text for outcome in outcomes])
      )
    else:
      self.episode.finish(layout.StopReason.ANSWERED)

  def _turn_ids(self, turn: Turn) -> list[int]:
    if turn.code is not None:
      code = self._fill(turn.code)
      call = messages_lib.Call(self._toolbox.tool_name, {"code": code})
      return self._chat.assistant_ids(self._chat.turn_text("", [call]))
    ids = self._chat.tokenizer.encode(turn.text)
    for answer in turn.answers:
      ids = ids + self._chat.answer_ids(self._fill(answer))
    return [*ids, self._chat.turn_end_id]

  def _fill(self, text: str) -> str:
    if _PREVIOUS in text and not self._printed:
      ends = ", ".join(r.status.name for r in self.episode.tool_records)
      raise contract.SandboxError(
        f"{self.episode.task_id}: a demonstration's call printed nothing; its"
        f" calls ended as {ends}; raise the limits of a tool call or run the"
        " same command again"
      )
    return text.replace(_PREVIOUS, self._printed)
