"""GSM8K's solutions as conversations in which a tool does the sums.

`steps`: the prose as it stands, and where the calculator was used a call of the
tool; the prose goes on behind its answer. `program`: one call that does all the
sums, each on a line with a name, and prints the last.
"""

import re
from collections.abc import Sequence
from typing import Any

from roc.host import rewards
from roc.host.tasks import gsm8k_solutions

STYLES = ("steps", "program")

_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?|\.\d+")
# What a calculation in prose ends with, before its result.
_OPEN_END = re.compile(r"[\s=$€£(]+$")


def programs(solution: gsm8k_solutions.Solution, style: str) -> list[str]:
  """Code of each call, in order."""
  if style == "steps":
    return [f"print({s.expression})" for s in solution.sums]
  return [_program(solution)]


def expected(
  solution: gsm8k_solutions.Solution, style: str
) -> list[gsm8k_solutions.Sum]:
  """The sum whose value each call must print."""
  return list(solution.sums) if style == "steps" else [solution.sums[-1]]


def is_right(printed: str, found: gsm8k_solutions.Sum) -> bool:
  """Whether a call printed the value that the solution has.

  Up to the last digits of floating-point numbers.
  """
  try:
    value = float(printed)
  except ValueError:
    return False
  wanted = float(found.number)
  return abs(value - wanted) <= 1e-9 * max(abs(wanted), 1.0)


def messages(
  solution: gsm8k_solutions.Solution,
  style: str,
  answers: Sequence[str],
  tool_name: str,
) -> list[dict[str, Any]]:
  """The conversation, in the chat format of `roc.host.messages`.

  Args:
    solution: what to tell.
    style: one of `STYLES`.
    answers: what the model reads of each call's result.
    tool_name: by which the tool is called.
  """
  turns: list[dict[str, Any]] = [{"role": "user", "content": solution.question}]
  words = [s.before for s in solution.sums] if style == "steps" else [""]
  calls = zip(words, programs(solution, style), answers, strict=True)
  for text, code, answer in calls:
    call = {"name": tool_name, "arguments": {"code": code}}
    turns += [
      {
        "role": "assistant",
        "content": text.strip(),
        "tool_calls": [{"type": "function", "function": call}],
      },
      {"role": "tool", "content": answer},
    ]
  end = solution.after
  if style == "program":  # what else it says may need results that none read
    end = end.partition("\n")[0]
  boxed = f"<answer>\\boxed{{{solution.answer}}}</answer>"
  text = "\n".join(filter(None, [end.strip(), boxed]))
  return [*turns, {"role": "assistant", "content": text}]


def _program(solution: gsm8k_solutions.Solution) -> str:
  """Each sum with a name; what uses an earlier result says so by its name.

  A number that also stands in the question is taken to be the question's.
  """
  given = _numbers(solution.question)
  names: dict[Any, str] = {}

  def name_of(match: re.Match[str]) -> str:
    text = match[0].rstrip(",")
    value = rewards.parse_number(text.replace(",", ""))
    name = text if value in given else names.get(value, text)
    return name + match[0][len(text) :]

  lines = []
  for i, one in enumerate(solution.sums, start=1):
    # What stands before the sum in its own line of prose; behind another sum
    # that is the other's result.
    _, newline, sentence = one.before.strip().rpartition("\n")
    comment = _OPEN_END.sub("", sentence) if i == 1 or newline else ""
    if comment:
      lines.append(f"# {_NUMBER.sub(name_of, comment)}")
    lines.append(f"x{i} = {_NUMBER.sub(name_of, one.expression)}")
    names[one.number] = f"x{i}"
  return "\n".join([*lines, f"print(x{len(solution.sums)})"])


def _numbers(text: str) -> set[Any]:
  return {
    rewards.parse_number(found.rstrip(",").replace(",", ""))
    for found in _NUMBER.findall(text)
  }
