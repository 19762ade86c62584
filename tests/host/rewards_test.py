"""Exact comparison, and only of the model's last well-formed answer."""

import fractions
import time

import pytest

from roc import layout
from roc.host import calls, rewards


@pytest.mark.parametrize(
  ("text", "value"),
  [
    ("1234", 1234),
    ("1,234", 1234),
    ("+5", 5),
    (" -12 ", -12),
    ("12.0", 12),
    ("12.", 12),
    (".5", fractions.Fraction(1, 2)),
    ("007", 7),
    ("3/4", fractions.Fraction(3, 4)),
    ("-3 / 4", fractions.Fraction(-3, 4)),
    ("\\frac{3}{4}", fractions.Fraction(3, 4)),
    ("-\\dfrac{3}{4}", fractions.Fraction(-3, 4)),
    ("$1{,}0$", None),
    ("$42$", 42),
    ("1\\,000", 1000),
    ("1,23", None),
    ("12,34,567", None),
    ("1 2", None),
    ("1e9", None),
    ("50%", None),
    ("1/0", None),
    ("1/2/3", None),
    ("", None),
    (".", None),
    ("-", None),
    ("--5", None),
    ("٣", None),
    ("²", None),
    ("nan", None),
    ("inf", None),
    ("7 pens", None),
  ],
)
def test_parse_number(text, value):
  assert rewards.parse_number(text) == value


def test_a_huge_answer_is_no_answer_and_costs_nothing():
  started = time.monotonic()
  assert rewards.parse_number("9" * 5_000_000) is None
  assert not rewards.is_equal("9" * 5_000_000, "9")
  assert time.monotonic() - started < 1


@pytest.mark.parametrize(
  ("answer", "gold", "is_equal"),
  [
    ("1,234.0", "1234", True),
    ("2468/2", "1234", True),
    ("0.1", "1/10", True),
    ("1235", "1234", False),
    ("-1234", "1234", False),
    ("x+1", " x+1", True),
    ("x+1", "x+2", False),
    ("12", "x", False),
  ],
)
def test_is_equal(answer, gold, is_equal):
  assert rewards.is_equal(answer, gold) == is_equal


@pytest.mark.parametrize(
  ("answers", "is_truncated", "is_correct", "reason"),
  [
    (["7"], False, True, "correct"),
    (["8"], False, False, "wrong"),
    (["8", "7"], False, True, "correct"),
    (["7", "8"], False, False, "wrong"),
    ([], False, False, "no_answer"),
    (["7"], True, False, "truncated"),
    ([], True, False, "truncated"),
  ],
)
def test_score(answers, is_truncated, is_correct, reason):
  verdict = rewards.score(answers, "7.0", is_truncated=is_truncated)
  assert (verdict.is_correct, verdict.reason) == (is_correct, reason)
  assert verdict.reward == float(is_correct)
  assert verdict.n_answers == len(answers)
  assert verdict.answer == (answers[-1] if answers else None)


def test_exact_score_needs_no_sandbox():
  score = rewards.exact_score(None)
  assert score(["2468/2"], "1234").is_correct


@pytest.mark.parametrize(
  ("reason", "outcome"),
  [
    ("correct", layout.Outcome.CORRECT),
    ("wrong", layout.Outcome.WRONG),
    ("no_answer", layout.Outcome.WRONG),
    ("truncated", layout.Outcome.WRONG),
    ("verifier_timeout", layout.Outcome.VOID),
    ("verifier_error", layout.Outcome.VOID),
    ("infra", layout.Outcome.VOID),
    ("bad_gold", layout.Outcome.VOID),
  ],
)
def test_outcome_of_a_verdict(reason, outcome):
  verdict = rewards.Verdict(reason == "correct", reason, "7", 1)
  assert verdict.outcome == outcome
  assert verdict.reward == float(outcome == layout.Outcome.CORRECT)


@pytest.mark.parametrize(
  ("text", "content"),
  [
    ("\\boxed{7}", "7"),
    ("a \\boxed{1} b \\boxed{ 2 } c", "2"),
    ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
    ("\\boxed{1} \\text{ or } \\boxed{2}", "2"),
    ("\\boxed{7} cm, roughly", "7"),
    ("\\boxed{7} \\boxed{}", None),
    ("\\boxed{}", None),
    ("\\boxed{ }", None),
    ("\\boxed{7", None),
    ("\\boxed 7", "7"),
    ("\\boxed 42.", "42"),
    ("so $\\boxed 5$ apples", "5"),
    ("\\(\\boxed 5\\), I think", "5"),
    ("\\boxed\\frac{1}{2}", "\\frac{1}{2}"),
    ("\\boxed \\sqrt{x + 1} or so", "\\sqrt{x + 1}"),
    ("{\\boxed 5}", "5"),
    ("\\boxed {7}", "7"),
    ("\\boxed", None),
    ("\\boxed .", None),
    ("\\boxed \\frac{1", None),
    ("\\boxedness", None),
    ("7", None),
  ],
)
def test_extract_boxed(text, content):
  assert rewards.extract_boxed(text) == content


def test_a_tools_words_earn_nothing(chat, tokenizer):
  # The tool prints a whole answer; only the model's own turns are parsed, and
  # even the same characters in the model's turn are no tags.
  printed = "<answer>\\boxed{7}</answer>"
  suffix, _ = chat.tool_suffix([printed])
  copied = [*tokenizer.encode(printed), chat.turn_end_id]
  for ids in (suffix, copied):
    answers = calls.parse_turn(ids, tokenizer).answers
    assert rewards.score(answers, "7").reason == "no_answer"
  said = [*chat.answer_ids("7"), chat.turn_end_id]
  answers = calls.parse_turn(said, tokenizer).answers
  assert rewards.score(answers, "7").is_correct
