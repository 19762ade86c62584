"""Solutions as conversations: what the model says, and what it may not know."""

import re

import pytest

from roc.host import messages as messages_lib
from roc.host.tasks import gsm8k_calls, gsm8k_solutions

QUESTION = "Natalia sold clips to 48 friends in April, half as many in May."
ANSWER = (
  "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n"
  "Natalia sold 48+24 = $<<48+24=72>>72 altogether.\nThat is all.\n#### 72"
)
SOLUTION = gsm8k_solutions.parse(QUESTION, ANSWER)


def shown(style, answers):
  rows = gsm8k_calls.messages(SOLUTION, style, answers, "python")
  found = messages_lib.read(rows)  # it is a conversation
  return [
    (m.role, m.content, *[c.arguments["code"] for c in m.calls]) for m in found
  ]


def test_steps_go_on_behind_the_tools_answer():
  assert shown("steps", ["24.0", "72"]) == [
    ("user", QUESTION),
    ("assistant", "Natalia sold 48/2 =", "print(48/2)"),
    ("tool", "24.0"),
    (
      "assistant",
      "24 clips in May.\nNatalia sold 48+24 = $",
      "print(48+24)",
    ),
    ("tool", "72"),
    (
      "assistant",
      "72 altogether.\nThat is all.\n<answer>\\boxed{72}</answer>",
    ),
  ]


def test_a_program_names_its_results():
  code = (
    "# Natalia sold 48/2\nx1 = 48/2\n# Natalia sold 48+x1\nx2 = 48+x1\n"
    "print(x2)"
  )
  assert shown("program", ["72.0"]) == [
    ("user", QUESTION),
    ("assistant", "", code),
    ("tool", "72.0"),
    ("assistant", "72 altogether.\n<answer>\\boxed{72}</answer>"),
  ]


def program(question, answer):
  found = gsm8k_solutions.parse(question, answer)
  return gsm8k_calls.programs(found, "program")[0]


def test_a_number_of_the_question_is_the_questions():
  answer = "It is <<6-4=2>>2. Then <<2*5=10>>10.\n#### 10"
  assert "x2 = x1*5" in program("6, 4 and 5?", answer)
  assert "x2 = 2*5" in program("6, 4, 5 and 2?", answer)


def test_no_result_stands_where_it_is_not_known_yet():
  """Behind a sum in the same line the prose says what came out."""
  answer = (
    "It is <<1000+234=1234>>1,234 and 1,234, doubled, makes"
    " <<1234*2=2468>>2468.\nOf 2,468, half is <<2468/2=1234>>1234\n#### 1234"
  )
  code = program("1,000 and 234?", answer)
  assert code == (
    "# It is\nx1 = 1000+234\nx2 = x1*2\n# Of x2, half is\nx3 = x2/2\nprint(x3)"
  )
  assert not re.search(r"1,?234|2,?468", code)


def test_both_styles_run_to_the_same_values(capsys):
  for style in gsm8k_calls.STYLES:
    for code, wanted in zip(
      gsm8k_calls.programs(SOLUTION, style),
      gsm8k_calls.expected(SOLUTION, style),
      strict=True,
    ):
      exec(code, {})  # our own constant, plain arithmetic
      assert gsm8k_calls.is_right(capsys.readouterr().out, wanted)


@pytest.mark.parametrize(
  ("printed", "holds"),
  [
    ("24", True),
    ("24.0\n", True),
    ("24.000000000001", True),
    ("24.001", False),
    ("", False),
    ("24\n25", False),
    ("nan", False),
    ("inf", False),
  ],
)
def test_what_was_printed_is_compared(printed, holds):
  assert gsm8k_calls.is_right(printed, SOLUTION.sums[0]) is holds
