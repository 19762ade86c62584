"""Judges answers to problems of reasoning-gym by the scorers of its sets.

A scorer may evaluate what the model wrote, so it runs in the sandbox, one
process an answer, under limits of its own.
"""

import functools
import json
from collections.abc import Sequence
from concurrent import futures
from typing import Any

from roc import layout
from roc.host import rewards, verify
from roc.host.sandbox import contract

PROGRAM = """\
import io, json, sys
import reasoning_gym
out, sys.stdout = sys.stdout, io.StringIO()
asked = json.loads(sys.stdin.read())
entry = asked["entry"]
scorer = reasoning_gym.create_dataset(entry["reasoning_gym"], size=1, seed=0)
out.write(json.dumps(float(scorer.score_answer(asked["answer"], entry))))
out.flush()
"""
_OUT_OF_BOUNDS = (
  layout.ToolStatus.TIMEOUT,
  layout.ToolStatus.MEMORY,
  layout.ToolStatus.RESOURCE,
)


def gym_score(
  sandbox: verify.Runner,
  *,
  least: float = 1.0,
  cpu_s: float = 5.0,
  wall_s: float = 30.0,
  memory_mb: int = 1024,
) -> rewards.Score:
  """Scores answers to problems of `GymTask`.

  Args:
    sandbox: started; scorers run in it.
    least: score, of at most 1, from which on an answer is correct.
    cpu_s: CPU seconds of one scorer.
    wall_s: its seconds on the clock, with room for a machine that is busy.
    memory_mb: its address space.

  Returns:
    A scorer, called as `rewards.score` is, that returns a verdict or the
    future of one.
  """
  limits = contract.Limits(wall_s=wall_s, cpu_s=cpu_s, memory_mb=memory_mb)
  return functools.partial(score, sandbox, limits, least)


def score(
  sandbox: verify.Runner,
  limits: contract.Limits,
  least: float,
  answers: Sequence[str],
  gold: str,
  *,
  is_truncated: bool = False,
) -> rewards.Verdict | futures.Future[rewards.Verdict]:
  """Judges a rollout by the last of its answers, see `gym_score`."""
  verdict = rewards.unanswered(answers, is_truncated=is_truncated)
  if verdict is not None:
    return verdict
  answer = answers[-1]
  as_verdict = lambda is_correct, why: rewards.Verdict(
    is_correct, why, answer, len(answers)
  )
  try:
    entry = json.loads(gold)
    own = entry["answer"]
    assert "reasoning_gym" in entry
  except (ValueError, KeyError, TypeError, AssertionError):
    return as_verdict(False, "bad_gold")
  if answer == own:
    return as_verdict(True, "correct")
  judged: futures.Future[rewards.Verdict] = futures.Future()
  judged.set_running_or_notify_cancel()

  def finish(running: futures.Future) -> None:
    value, fault = _read(running)
    if fault:
      judged.set_result(as_verdict(False, fault))
    else:
      is_correct = value >= least
      why = "correct" if is_correct else "wrong"
      judged.set_result(as_verdict(is_correct, why))

  asked = {"answer": answer, "entry": entry}
  running = sandbox.submit(
    PROGRAM, stdin=json.dumps(asked), trajectory="verify", limits=limits
  )
  running.add_done_callback(finish)
  return judged


def _read(running: futures.Future[Any]) -> tuple[float, str]:
  """The score, and what went wrong, in a word of `rewards.VOID_REASONS`."""
  if running.cancelled() or running.exception() is not None:
    return 0.0, "infra"
  result = running.result()
  status = layout.ToolStatus(result.status)
  if status == layout.ToolStatus.INFRA:
    return 0.0, "infra"
  if status in _OUT_OF_BOUNDS:
    return 0.0, "verifier_timeout"
  try:
    value = json.loads(result.stdout)
  except ValueError:
    return 0.0, "verifier_error"
  is_number = isinstance(value, int | float) and not isinstance(value, bool)
  return (value, "") if is_number else (0.0, "verifier_error")
