"""Generated problems: repeatable, right, and disjoint between splits."""

import re

import pytest

from roc.host.tasks import arithmetic


def _operands(task, count):
  return {
    (p.kind, tuple(sorted(p.info["operands"]))) for p in task.problems(0, count)
  }


def test_a_problem_is_a_function_of_seed_split_and_index():
  one, two = (
    arithmetic.ArithmeticTask(seed=3),
    arithmetic.ArithmeticTask(seed=3),
  )
  backwards = [two.problem(i) for i in reversed(range(50))]
  assert one.problems(0, 50) == backwards[::-1]
  other_seed = arithmetic.ArithmeticTask(seed=4).problems(0, 50)
  other_split = arithmetic.ArithmeticTask(3, "heldout").problems(0, 50)
  questions = {p.question for p in one.problems(0, 50)}
  assert len(questions & {p.question for p in other_seed}) < 3
  assert not questions & {p.question for p in other_split}


def test_a_known_problem_stays_what_it_was():
  problem = arithmetic.ArithmeticTask(seed=0).problem(0)
  assert problem.id == "train-0-0"
  assert problem.question == (
    "342 boxes hold 39 pens each. 136 pens are added. How many now?"
  )
  assert problem.answer == "13474"
  assert problem.info["steps"] == ("342*39", "{p}+136")


def test_splits_share_no_numbers_whatever_the_seeds():
  train = _operands(arithmetic.ArithmeticTask(seed=0), 3000)
  heldout = _operands(arithmetic.ArithmeticTask(7, "heldout"), 3000)
  again = _operands(arithmetic.ArithmeticTask(9, "train"), 3000)
  assert not train & heldout
  assert not again & heldout
  assert len(heldout) > 2500


def test_order_of_factors_does_not_cross_the_line():
  for a in range(100, 140):
    assert arithmetic.split_of("product", (a, 57)) == arithmetic.split_of(
      "product", (57, a)
    )


def test_split_shares_are_as_stated():
  pairs = [(a, b) for a in range(100, 200) for b in range(200, 250)]
  heldout = sum(arithmetic.split_of("sum", p) == "heldout" for p in pairs)
  assert 0.08 < heldout / len(pairs) < 0.12


def test_every_answer_is_what_python_says():
  for problem in arithmetic.ArithmeticTask(seed=1).problems(0, 500):
    value = 0
    for step in problem.info["steps"]:
      value = eval(step.replace("{p}", f"({value})"))
    assert problem.answer == str(value)
    assert all(str(n) in problem.question for n in problem.info["operands"])


def test_kinds_follow_the_mix_and_use_every_form():
  problems = arithmetic.ArithmeticTask().problems(0, 2000)
  for kind, share in arithmetic.DEFAULT_MIX.items():
    found = sum(p.kind == kind for p in problems) / len(problems)
    assert abs(found - share) < 0.04
  forms = {re.sub(r"\d+", "N", p.question) for p in problems}
  assert len(forms) == sum(len(f) for f in arithmetic.FORMS.values())


def test_order_of_the_mix_does_not_matter():
  mix = {"word": 1.0, "product": 3.0}
  one = arithmetic.ArithmeticTask(mix=mix)
  two = arithmetic.ArithmeticTask(mix=dict(reversed(mix.items())))
  assert one.problems(0, 30) == two.problems(0, 30)
  assert {p.kind for p in one.problems(0, 30)} == {"word", "product"}


def test_answers_are_beyond_the_head_and_never_negative():
  problems = arithmetic.ArithmeticTask(seed=2).problems(0, 2000)
  answers = [int(p.answer) for p in problems]
  assert min(answers) > 0
  assert sum(answer >= 1000 for answer in answers) > 0.98 * len(answers)
  # No one answer is worth guessing.
  assert max(answers.count(a) for a in set(answers)) < 10


def test_words_between_the_numbers_are_single_tokens(tokenizer):
  for forms in arithmetic.FORMS.values():
    for form in forms:
      for words in re.split(r"\{\d\}", form.question):
        assert len(tokenizer.encode(words)) <= 1, words


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    ({"split": "test"}, "'test' is unknown"),
    ({"mix": {"roots": 1.0}}, "'roots' is unknown"),
    ({"mix": {}}, "not all 0"),
    ({"mix": {"sum": 0.0}}, "not all 0"),
    ({"mix": {"sum": -1.0, "word": 2.0}}, ">= 0"),
  ],
)
def test_bad_settings_are_errors(kwargs, message):
  with pytest.raises(ValueError, match=message):
    arithmetic.ArithmeticTask(**kwargs)


def test_a_negative_index_is_an_error():
  with pytest.raises(ValueError, match="-1"):
    arithmetic.ArithmeticTask().problem(-1)
