"""Right answers that the verifier cannot read are found before a run."""

import json

import pytest

from roc.host import golds, sandbox, verify

PLAIN = ["42", "-3", "1,000", r"\frac{1}{2}", "Tuesday", "2.5e6"]
EXPRESSIONS = [r"\frac{\pi}{3}", r"3\sqrt{2}", r"(0,\infty)", "x^2+1"]
UNREADABLE = [r"\mathbb{Z}_8", r"\begin{pmatrix} 1 & \phantom -1"]


@pytest.fixture(scope="module")
def box():
  with sandbox.Sandbox(sandbox.Limits(cpu_s=2.0, wall_s=30.0)) as started:
    yield started


class Counting:
  """A sandbox that counts what it is asked."""

  def __init__(self, box, fail=()):
    self._box = box
    self._fail = fail
    self.asked = []

  def submit(self, code, *, stdin, **others):
    self.asked.append(json.loads(stdin))
    if any(word in stdin for word in self._fail):
      code = "import math_verify; raise SystemExit(3)"
    return self._box.submit(code, stdin=stdin, **others)


def test_only_the_unreadable_are_found(box, tmp_path):
  answers = [*PLAIN, *UNREADABLE, *EXPRESSIONS, UNREADABLE[0]]
  counting = Counting(box)
  found = golds.find_unreadable(answers, counting, cache=tmp_path)
  assert found == [len(PLAIN), len(PLAIN) + 1, len(answers) - 1]
  # Plain ones cost no process, equal ones are asked once, all go together.
  ((batch,),) = [list(asked.values()) for asked in counting.asked]
  assert len(batch) == len(UNREADABLE) + len(EXPRESSIONS)
  again = Counting(box)
  assert golds.find_unreadable(answers, again, cache=tmp_path) == found
  assert again.asked == []


def test_plain_answers_need_no_sandbox():
  assert golds.find_unreadable(PLAIN, None) == []


def test_words_for_no_answer_are_unreadable():
  answers = ["1", "proof", "notfound", "none"]
  assert golds.find_unreadable(answers, None) == [1, 2]


def test_one_that_ends_its_batch_does_not_take_others_along(box):
  answers = [UNREADABLE[0], r"\frac{\pi}{7}", r"\sqrt{5}+\sqrt{11}"]
  counting = Counting(box, fail=(r"\\sqrt{11}",))
  assert golds.find_unreadable(answers, counting) == [0]
  assert [len(asked["batch"]) for asked in counting.asked] == [3, 1, 1, 1]


def test_a_cache_that_cannot_be_used(box, tmp_path):
  for cache in (tmp_path / "file" / "x", tmp_path / "broken"):
    (tmp_path / "file").write_text("")
    (tmp_path / "broken").mkdir(exist_ok=True)
    assert golds.find_unreadable(UNREADABLE[:1], box, cache=cache) == [0]
  (kept,) = (tmp_path / "broken").iterdir()
  kept.write_text("{")
  assert golds.find_unreadable(UNREADABLE[:1], box, cache=kept.parent) == [0]


def test_it_agrees_with_the_check_of_a_rollout(box):
  checker = verify.MathChecker(box)
  for answer in (*EXPRESSIONS, *UNREADABLE):
    status = checker.submit(r"\frac{\sqrt{7919}}{13}+1", answer).result().status
    is_bad = golds.find_unreadable([answer], box) == [0]
    assert is_bad == (status == "bad_gold"), (answer, status)
