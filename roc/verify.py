"""Whether an answer is right, as the reward would say.

    python -m roc.main verify --gold '1/2' --answer '0.5'

What the texts alone do not decide is checked in the sandbox.
"""

import argparse
import json
from collections.abc import Sequence

from roc import cli, errors
from roc.host import answers as answers_lib
from roc.host import sandbox, verify


def main(argv: Sequence[str]) -> int:
  """Runs `verify ...`; returns the exit code.

  Raises:
    errors.UserError: bad flags, or no sandbox to check in.
  """
  values = make_parser().parse_args(argv)
  answer, gold = answers_lib.find(values.answer), answers_lib.find(values.gold)
  check = compare(answer, gold)
  found = {
    "correct": check.is_equal,
    "status": check.status,
    "reason": check.reason,
  }
  if values.json:
    print(json.dumps(found))
    return 0
  says = {True: "correct", False: "wrong", None: "cannot say"}
  print(f"{says[check.is_equal]} ({check.status}: {check.reason})")
  return 0


def compare(answer: str, gold: str) -> verify.Check:
  """Compares two answers; starts a sandbox only where that is needed.

  Raises:
    errors.UserError: no sandbox can be started.
  """
  decision = answers_lib.compare(answer, gold)
  if decision.is_equal is not None:
    return verify.Check(decision.is_equal, "ok", decision.reason)
  if not decision.pairs:
    return verify.Check(None, "bad_gold", decision.reason)
  try:
    with sandbox.Sandbox(sandbox.Limits(wall_s=30.0, cpu_s=5.0)) as started:
      return verify.MathChecker(started).submit(answer, gold).result()
  except sandbox.SandboxError as e:
    raise errors.UserError(f"answers cannot be checked: {e}") from e


def make_parser() -> argparse.ArgumentParser:
  """The flags of the command."""
  parser = cli.Parser(
    prog="python -m roc.main verify",
    description="Compares an answer with the right one, as math_score does"
    " (docs/rewards.md). Of a text with a \\boxed{...} its content counts, of "
    '"The answer is ..." what follows.',
    epilog="example: python -m roc.main verify --gold='\\frac{1}{2}'"
    " --answer=0.5",
  )
  parser.add_argument("--gold", required=True, help="the right answer")
  parser.add_argument("--answer", required=True, help="the one in question")
  parser.add_argument(
    "--json",
    action="store_true",
    help='one line of JSON: "correct" (null where there is no saying), "status"'
    ' and "reason"',
  )
  return parser
