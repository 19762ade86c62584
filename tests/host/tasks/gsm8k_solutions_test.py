"""GSM8K's rows: the sums in them, and which rows hold no trace."""

import json
import pathlib

import pytest

from roc.host.tasks import gsm8k_solutions as solutions

SAMPLE = (
  pathlib.Path(__file__).parents[3] / "experiments/data/gsm8k/train.jsonl"
)
ANSWER = (
  "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n"
  "She sold 48+24 = <<48+24=72>>72 clips altogether.\n#### 72"
)


def test_a_solution_comes_apart():
  found = solutions.parse("How many?", ANSWER)
  assert found.sums == (
    solutions.Sum("Natalia sold 48/2 = ", "48/2", "24"),
    solutions.Sum("24 clips in May.\nShe sold 48+24 = ", "48+24", "72"),
  )
  assert found.after == "72 clips altogether.\n"
  assert found.answer == "72" and found.question == "How many?"
  pieces = "".join(
    f"{s.before}<<{s.expression}={s.value}>>" for s in found.sums
  )
  assert f"{pieces}{found.after}#### {found.answer}" == ANSWER


@pytest.mark.parametrize(
  ("answer", "why"),
  [
    ("It is 3.\n#### 3", solutions.NO_SUMS),
    ("<<1+1=2>>2\n#### 3", solutions.NOT_THE_ANSWER),
    ("<<1+1=2>>2, <<2+2=4>>4\n#### 2", solutions.NOT_THE_ANSWER),
    ("<<1+1=2>>2\n#### two", solutions.NOT_THE_ANSWER),
    ("<<exit()=2>>2\n#### 2", "a sum is no plain arithmetic"),
    ("<<2=>>2\n#### 2", "a sum is no plain arithmetic"),
    ("<<2>>2\n#### 2", "a sum is no plain arithmetic"),
  ],
)
def test_rows_without_a_trace_say_why(answer, why):
  with pytest.raises(solutions.Unusable, match=f"^{why}$"):
    solutions.parse("Q", answer)


def test_equal_numbers_may_be_written_differently():
  found = solutions.parse("Q", "<<1000+200=1200.0>>1,200\n#### 1,200")
  assert found.sums[0].number == 1200 and found.answer == "1,200"


@pytest.mark.parametrize(
  ("line", "sentence"),
  [
    ("{", "x line 3: not JSON"),
    ("3", "x line 3: expected a JSON object with question and answer"),
    ('{"question": "Q"}', "line 3: field 'answer' must be text, not missing"),
    ('{"question": 3, "answer": "#### 3"}', "'question' must be text, not 3"),
    ('{"question": "Q", "answer": "3"}', "'answer' has no line '#### ANSWER'"),
  ],
)
def test_other_lines_are_errors(line, sentence):
  with pytest.raises(ValueError, match=sentence):
    solutions.read_row(line, "x line 3")


def test_the_sample_is_the_published_one():
  lines = SAMPLE.read_text(encoding="utf-8").splitlines()
  assert len(lines) == 64
  reasons = []
  for line in lines:
    assert set(json.loads(line)) == {"question", "answer"}
    try:
      solutions.parse(*solutions.read_row(line, "sample"))
    except solutions.Unusable as why:
      reasons.append(str(why))
  assert reasons.count(solutions.NOT_THE_ANSWER) == 5
  assert reasons.count(solutions.NO_SUMS) == 1 and len(reasons) == 6
