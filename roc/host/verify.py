"""Checks answers as mathematics, in processes that can be killed.

math-verify and the sympy underneath may hang, eat memory or fail, so they
never run in the trainer. What the text alone decides (`roc.host.answers`) is
decided here; the rest runs as a program of the sandbox under limits of its own.
A check that does not come to an end has a status of its own and is no wrong
answer: see docs/rewards.md.
"""

import collections
import dataclasses
import functools
import json
import pathlib
import threading
from collections.abc import Sequence
from concurrent import futures
from typing import Any, Protocol

from roc import layout
from roc.host import answers as answers_lib
from roc.host import rewards
from roc.host.sandbox import contract

# Kept as text for the sandbox; `import math_verify` stands in it literally, so
# that it can be run where that is loaded already.
PROGRAM = (
  pathlib.Path(__file__).with_name("verify_program.py").read_text("utf-8")
)
_OUT_OF_BOUNDS = frozenset(
  {
    layout.ToolStatus.TIMEOUT,
    layout.ToolStatus.MEMORY,
    layout.ToolStatus.RESOURCE,
  }
)
_PROGRAM_STATUSES = ("ok", "bad_gold")


@dataclasses.dataclass(frozen=True)
class Check:
  """What became of one comparison.

  Attributes:
    is_equal: whether the answer is right; None unless `status` is `ok`.
    status: `ok`, `bad_gold` (the gold answer cannot be read),
      `verifier_timeout` (time or memory ran out), `verifier_error` (the
      program failed) or `infra` (the sandbox failed).
    reason: in a few words.
  """

  is_equal: bool | None
  status: str
  reason: str


class Runner(Protocol):
  """The part of the sandbox that a checker needs."""

  def submit(
    self,
    code: str,
    *,
    stdin: bytes | str = ...,
    trajectory: Any = ...,
    limits: contract.Limits | None = ...,
  ) -> futures.Future: ...


class MathChecker:
  """Compares answers; the hard ones in the sandbox.

  Thread-safe. Equal questions share one process: rollouts of a group often
  give the same answer.

  Args:
    sandbox: started; runs the program.
    cpu_s: CPU seconds of one check, the limit that decides.
    wall_s: seconds on the clock, with room for a machine that is busy.
    memory_mb: address space of one check.
    n_cached: checks that are remembered.
  """

  def __init__(
    self,
    sandbox: Runner,
    *,
    cpu_s: float = 5.0,
    wall_s: float = 30.0,
    memory_mb: int = 1024,
    n_cached: int = 4096,
  ):
    self._sandbox = sandbox
    self._limits = contract.Limits(
      wall_s=wall_s, cpu_s=cpu_s, memory_mb=memory_mb
    )
    self._n_cached = n_cached
    self._cache: collections.OrderedDict[
      tuple[str, str], futures.Future[Check]
    ] = collections.OrderedDict()
    self._lock = threading.Lock()
    self.n_processes = 0

  def submit(self, answer: str, gold: str) -> futures.Future[Check]:
    """Compares an answer with the gold answer; never blocks, never raises.

    Args:
      answer: the content of the box; any text.
      gold: the right answer.

    Returns:
      A future that holds no exception; done at once where no process is needed.
    """
    decision = answers_lib.compare(answer, gold)
    if decision.is_equal is not None:
      return _done(Check(decision.is_equal, "ok", decision.reason))
    if not decision.pairs:
      return _done(Check(None, "bad_gold", decision.reason))
    key = (answer, gold)
    with self._lock:
      known = self._cache.get(key)
      if known is not None:
        self._cache.move_to_end(key)
        return known
      result: futures.Future[Check] = futures.Future()
      # Running from the start: a future that is shared cannot be cancelled.
      result.set_running_or_notify_cancel()
      self._cache[key] = result
      while len(self._cache) > self._n_cached:
        self._cache.popitem(last=False)
      self.n_processes += 1
    self._start(key, decision.pairs, result)
    return result

  def test(self) -> None:
    """Compares two answers that need a process.

    Raises:
      contract.SandboxError: that does not work; says how it ended.
    """
    check = self.submit(r"(x-1)(x+1)", r"x^2-1").result()
    if check.is_equal is not True:
      raise contract.SandboxError(
        f"answers cannot be checked: {check.status}, {check.reason}; install"
        " math-verify[antlr4_13_2], or raise math_score's cpu_s, wall_s and"
        " memory_mb"
      )

  def _start(
    self,
    key: tuple[str, str],
    pairs: list[list[tuple[str, str]]],
    result: futures.Future[Check],
  ) -> None:
    def finish(running: futures.Future) -> None:
      check = _read(running)
      if check.status not in _PROGRAM_STATUSES:
        # The next rollout with this answer may have more luck.
        with self._lock:
          if self._cache.get(key) is result:
            del self._cache[key]
      result.set_result(check)

    try:
      running = self._sandbox.submit(
        PROGRAM,
        stdin=json.dumps({"conditions": pairs}),
        trajectory="verify",
        limits=self._limits,
      )
    except Exception as error:  # a sandbox that is closed or cannot be used
      running = futures.Future()
      running.set_exception(error)
    running.add_done_callback(finish)


def math_score(
  sandbox: Runner,
  *,
  cpu_s: float = 5.0,
  wall_s: float = 30.0,
  memory_mb: int = 1024,
) -> rewards.Score:
  r"""Scores answers as mathematics: `\frac12`, sets, units, LaTeX.

  Args:
    sandbox: started; checks run in it.
    cpu_s: CPU seconds of one check, the limit that decides.
    wall_s: its seconds on the clock, with room for a machine that is busy.
    memory_mb: its address space.

  Returns:
    A scorer, called as `rewards.score` is, that returns a verdict or the
    future of one.

  Raises:
    contract.SandboxError: checking does not work here; says why.
  """
  checker = MathChecker(
    sandbox, cpu_s=cpu_s, wall_s=wall_s, memory_mb=memory_mb
  )
  checker.test()
  return functools.partial(score, checker)


def score(
  checker: MathChecker,
  answers: Sequence[str],
  gold: str,
  *,
  is_truncated: bool = False,
) -> rewards.Verdict | futures.Future[rewards.Verdict]:
  """Judges a rollout by the last of its answers, as mathematics.

  Args:
    checker: compares the answers.
    answers: contents of the model's well-formed answers, in order.
    gold: the right answer.
    is_truncated: the rollout ran into a turn or token limit.

  Returns:
    The verdict; its future where a process is still at work.
  """
  verdict = rewards.unanswered(answers, is_truncated=is_truncated)
  if verdict is not None:
    return verdict
  checking = checker.submit(answers[-1], gold)
  if checking.done():
    return _verdict(checking.result(), answers)
  judged: futures.Future[rewards.Verdict] = futures.Future()
  judged.set_running_or_notify_cancel()
  checking.add_done_callback(
    lambda done: judged.set_result(_verdict(done.result(), answers))
  )
  return judged


def _verdict(check: Check, answers: Sequence[str]) -> rewards.Verdict:
  if check.status != "ok":
    return rewards.Verdict(False, check.status, answers[-1], len(answers))
  reason = "correct" if check.is_equal else "wrong"
  return rewards.Verdict(
    bool(check.is_equal), reason, answers[-1], len(answers)
  )


def _done(check: Check) -> futures.Future[Check]:
  future: futures.Future[Check] = futures.Future()
  future.set_result(check)
  return future


def _read(running: futures.Future) -> Check:
  """Reads how the program ended; only its own last line is believed."""
  if running.cancelled():
    return Check(None, "infra", "cancelled")
  error = running.exception()
  if error is not None:
    return Check(None, "infra", f"{type(error).__name__}: {error}"[:200])
  result = running.result()
  status = layout.ToolStatus(result.status)
  name = status.name.lower()
  if status in _OUT_OF_BOUNDS:
    return Check(None, "verifier_timeout", name)
  if status == layout.ToolStatus.INFRA:
    return Check(None, "infra", result.stderr[-200:].strip() or name)
  if status != layout.ToolStatus.OK:
    said = result.stderr.strip()[-200:]
    return Check(None, "verifier_error", f"{name} {said}".strip())
  try:
    row = json.loads(result.stdout)
    verdict = Check(row["is_equal"], row["status"], row["reason"])
  except (ValueError, KeyError, TypeError):
    return Check(None, "verifier_error", "no verdict was printed")
  is_whole = isinstance(verdict.is_equal, bool) == (verdict.status == "ok")
  if verdict.status not in _PROGRAM_STATUSES or not is_whole:
    return Check(None, "verifier_error", "a malformed verdict was printed")
  return verdict
