"""Rollouts of other trainers, in lines as those write them."""

import json

import numpy as np
import pytest

from roc import groups, layout, main

PROMPT = "system\nYou are helpful.\nuser\nWhat is 6 * 7?\nassistant\n"
CALL = '<tool_call>\n{"name": "code", "arguments": {"code": "6 * 7"}}\n'
CALL += "</tool_call>"


def answered(*texts):
  said = "".join(f"<tool_response>\n{t}\n</tool_response>\n" for t in texts)
  return f"\nuser\n{said}assistant\n"


# verl, `trainer.rollout_data_dir`: N.jsonl, special tokens left out.
VERL = [
  {
    "input": PROMPT,
    "output": f"Let me see.\n{CALL}{answered('42')}So \\boxed{{42}}",
    "gts": "42",
    "score": 1.0,
    "step": 3,
    "acc": True,
    "pred": "42",
  },
  {
    "input": PROMPT,
    "output": f"{CALL}\n{CALL}{answered('NameError: x', '1')}{CALL}"
    + answered("SyntaxError")
    + "\\boxed{1}, no, \\boxed{2}",
    "gts": "42",
    "score": -1.0,
    "step": 3,
    "acc": False,
    "pred": "2",
  },
  {
    "input": PROMPT,
    "output": "I give up",
    "gts": "42",
    "score": 0.1,
    "step": 3,
  },
  {
    "input": PROMPT,
    "output": "\\boxed{42}",
    "gts": "42",
    "score": 1,
    "step": 4,
  },
]
# verifiers, `vf-eval --save-results`: results.jsonl.
USER = [{"role": "user", "content": "What is 6 * 7?"}]
TOOL_CALLS = [
  {
    "id": "call_1",
    "type": "function",
    "function": {"name": "python", "arguments": '{"code": "6 * 7"}'},
  }
]
SPOKEN = [
  {"role": "assistant", "content": None, "tool_calls": TOOL_CALLS},
  {"role": "tool", "tool_call_id": "call_1", "content": "Traceback: x"},
  {"role": "assistant", "content": [{"type": "text", "text": "\\boxed{42}"}]},
]
VERIFIERS = [
  {"example_id": 0, "prompt": USER, "completion": SPOKEN, "answer": "42"}
  | {"task": "math", "reward": 1.0, "correct_answer": 1.0, "info": {}},
  {"example_id": 0, "prompt": USER, "completion": SPOKEN[:1], "answer": "42"}
  | {"task": "math", "reward": 0.0, "info": {}},
  {"example_id": 1, "prompt": "q", "completion": "It is \\boxed{1}."}
  | {"answer": "2", "task": "math", "reward": None},
]
# Messages with a reward each.
MESSAGES = [
  {"messages": [*USER, *SPOKEN], "reward": 1.0, "problem_id": "p1"},
  {
    "messages": [
      *USER,
      {"role": "assistant", "content": CALL},
      {"role": "user", "content": "<tool_response>1</tool_response>"},
      {"role": "assistant", "content": "No."},
    ],
    "reward": 0.0,
    "problem_id": "p1",
  },
  {"messages": [*USER, SPOKEN[-1]], "correct": True},
  {"messages": [*USER, SPOKEN[-1]], "correct": False},
]


def read(tmp_path, rows):
  path = tmp_path / "r.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return groups.read([path])


def columns(found):
  names = ("outcome", "n_judged", "n_failed", "n_answers", "n_turns")
  return np.stack([getattr(found, n) for n in names], axis=1).tolist()


@pytest.mark.parametrize(
  ("rows", "group", "wanted"),
  [
    # Outcome, calls, failed ones, answers, turns; by hand.
    (
      VERL,
      [0, 0, 0, 1],
      [[1, 1, 0, 1, 2], [0, 3, 2, 2, 3], [0, 0, 0, 0, 1], [1, 0, 0, 1, 1]],
    ),
    (VERIFIERS, [0, 0, 1], [[1, 1, 1, 1, 2], [0, 0, 0, 0, 1], [2, 0, 0, 1, 1]]),
    (
      MESSAGES,
      [0, 0, 1, 1],
      [[1, 1, 1, 1, 2], [0, 1, 0, 0, 2], [1, 0, 0, 1, 1], [0, 0, 0, 1, 1]],
    ),
  ],
)
def test_rollouts_of_other_trainers(tmp_path, rows, group, wanted):
  found = read(tmp_path, rows)
  assert found.group.tolist() == group
  assert columns(found) == wanted
  assert found.outcome.max() <= layout.Outcome.VOID
  # Another order of the lines names the same groups.
  other = read(tmp_path, rows[::-1])
  assert set(other.groups) == set(found.groups)


@pytest.mark.parametrize("rows", [VERL[:3], VERIFIERS[:2], MESSAGES[2:]])
def test_they_are_filtered_and_written_as_they_were(tmp_path, capsys, rows):
  path, out = tmp_path / "r.jsonl", tmp_path / "kept.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  argv = ["filter", str(path), "--mode=uniform", "--kept=2"]
  assert main.main([*argv, f"--output={out}"]) == 0
  capsys.readouterr()
  kept = [json.loads(line) for line in out.read_text().splitlines()]
  assert len(kept) == 2
  for row in kept:
    assert row["kept"] and any(row.items() >= old.items() for old in rows)


@pytest.mark.parametrize(
  ("row", "said"),
  [
    (VERL[0] | {"output": 3}, "'output' must be text, not 3"),
    (VERL[2] | {"score": "high"}, "'score' must be a number or null"),
    (VERIFIERS[0] | {"completion": 3}, "'completion' must be a list"),
    (VERIFIERS[0] | {"example_id": None}, "'example_id' must be a name or a n"),
    ({"messages": [], "correct": True}, "no message of an assistant"),
    (
      {"messages": SPOKEN},
      "nothing says whether it is correct: one of",
    ),
    ({"messages": [{"role": "bot"}], "correct": 1}, '"bot" is no role'),
    ({"messages": [3], "correct": 1}, "expected an object with 'role', not 3"),
    (
      {"messages": [{"role": "assistant", "content": 3}], "correct": 1},
      "'content' must be text, not 3",
    ),
    ({"x": 1}, "one of the fields tool_records, rollouts, input and output,"),
  ],
)
def test_lines_that_say_too_little(tmp_path, row, said):
  with pytest.raises(Exception, match="r.jsonl line 1: .*") as e:
    read(tmp_path, [row])
  assert said in str(e.value) and "\n" not in str(e.value)


def test_a_text_of_nothing_but_tags_is_read_in_time(tmp_path):
  text = "<tool_response>" * 50_000
  found = read(tmp_path, [VERL[0] | {"output": text}])
  assert columns(found) == [[1, 0, 0, 0, 1]]
