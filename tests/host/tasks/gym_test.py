"""Problems of reasoning-gym: a stand-in, and the real one if it is there."""

import json
import sys
import types

import pytest

from roc.host import gym_score, sandbox
from roc.host.tasks import gym

STAND_IN = """
class Sums:
  def __init__(self, seed, size, top=9):
    self.seed, self.size, self.top = seed, size, top

  def __len__(self):
    return self.size

  def __getitem__(self, i):
    a, b = (self.seed * 7 + i) % self.top, i % self.top
    return {
      "question": f"{a} + {b}?",
      "answer": str(a + b),
      "metadata": {"sum": a + b},
    }

  def score_answer(self, answer, entry):
    if "hang" in answer:
      while True:
        pass
    value = float(eval(answer))
    return 1.0 if value == entry["metadata"]["sum"] else 0.5


def create_dataset(name, **config):
  if name != "sums":
    raise ValueError(f"Dataset {name!r} not registered")
  return Sums(**config)
"""


@pytest.fixture
def stand_in(monkeypatch):
  module = types.ModuleType("reasoning_gym")
  exec(STAND_IN, module.__dict__)
  monkeypatch.setitem(sys.modules, "reasoning_gym", module)


@pytest.fixture(scope="module")
def box():
  with sandbox.Sandbox(sandbox.Limits(cpu_s=2.0, wall_s=30.0)) as started:
    yield started


def test_problems_are_the_set_s_entries(stand_in):
  task = gym.GymTask("sums", seed=3, config={"top": 5}, size=10)
  first = task.problem(1)
  assert (first.id, first.index, first.kind) == ("sums-3-1", 1, "sums")
  assert first.question == "2 + 1?"
  assert json.loads(first.answer)["metadata"] == {"sum": 3}
  assert task.problem(11) == first
  assert [p.index for p in task.problems(8, 4)] == [8, 9, 0, 1]
  assert gym.GymTask("sums", seed=4).problem(1) != first
  held_out = gym.GymTask("sums")
  assert held_out.problem(0).id == f"sums-{2**32 - 1}-0"
  with pytest.raises(ValueError, match="index must be >= 0"):
    task.problem(-1)


def test_sets_that_cannot_be(stand_in, monkeypatch):
  with pytest.raises(ValueError, match="'nope': Dataset 'nope' not regist"):
    gym.GymTask("nope")
  with pytest.raises(ValueError, match="'sums': .*unexpected.*'bottom'"):
    gym.GymTask("sums", config={"bottom": 1})
  monkeypatch.setitem(sys.modules, "reasoning_gym", None)
  with pytest.raises(ValueError, match="pip install reasoning-gym"):
    gym.GymTask("sums")


def test_the_set_s_own_scorer_judges(stand_in, box, monkeypatch):
  program = gym_score.PROGRAM.replace(
    "import reasoning_gym\n",
    "import types\nreasoning_gym = types.ModuleType('reasoning_gym')\n"
    f"exec({STAND_IN!r}, reasoning_gym.__dict__)\n",
  )
  monkeypatch.setattr(gym_score, "PROGRAM", program)
  gold = gym.GymTask("sums", seed=3, size=10).problem(1).answer  # 3 + ...
  own = json.loads(gold)["answer"]

  def judge(answers, gold=gold, **options):
    score = gym_score.gym_score(box, cpu_s=1.0, **options)
    verdict = score(answers, gold)
    verdict = verdict.result() if hasattr(verdict, "result") else verdict
    return verdict.is_correct, verdict.reason

  assert judge([own]) == (True, "correct")
  assert judge(["1", f"{own} + 0"]) == (True, "correct")
  assert judge(["-1"]) == (False, "wrong")
  assert judge(["-1"], least=0.5) == (True, "correct")
  assert judge(["hang"]) == (False, "verifier_timeout")
  assert judge(["no python"]) == (False, "verifier_error")
  assert judge([]) == (False, "no_answer")
  assert judge(["1"], gold="42") == (False, "bad_gold")


def test_the_real_sets_know_their_own_answers(box):
  pytest.importorskip("reasoning_gym")
  for name in ("chain_sum", "countdown", "lcm"):
    problem = gym.GymTask(name, seed=1, size=5).problem(2)
    score = gym_score.gym_score(box, cpu_s=20.0)
    own = json.loads(problem.answer)["answer"]
    assert score([own], problem.answer).is_correct
    assert not score(["nothing"], problem.answer).result().is_correct
    spaced = score([f" {own} "], problem.answer).result()
    assert spaced.reason in ("correct", "wrong")
