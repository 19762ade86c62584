"""Scripts go wrong as often as stated, and the tool's words are the tool's."""

import collections
import dataclasses

import numpy as np
import pytest

from roc import layout
from roc.host import calls, sandbox, tools
from roc.host.tasks import arithmetic, demonstrations
from roc.host.tasks import problem as problem_lib

STATUS = layout.ToolStatus
RATES = demonstrations.MessRates()
TASK = arithmetic.ArithmeticTask(seed=5)


def _scripts(count, rates=RATES, seed=0, task=TASK):
  return [
    demonstrations.make_demonstration(problem, seed, rates)
    for problem in task.problems(0, count)
  ]


def _share(scripts, name, of=None):
  among = [s for s in scripts if of is None or of in s.mess]
  return sum(name in s.mess for s in among) / len(among)


@pytest.fixture(scope="module")
def toolbox():
  limits = sandbox.Limits(wall_s=0.5, cpu_s=0.5)
  with sandbox.Sandbox(limits, n_workers=2) as box:
    yield tools.Toolbox(box)


def test_shares_are_as_stated():
  scripts = _scripts(4000)
  with_tool = [s for s in scripts if "head_guess" not in s.mess]
  answered = [s for s in scripts if "no_answer" not in s.mess]
  found = {
    "head_guess": _share(scripts, "head_guess"),
    "no_answer": _share(scripts, "no_answer"),
    "answers_twice": _share(answered, "answers_twice"),
    "fails": _share(with_tool, "fails"),
    "wrong_operator": _share(with_tool, "wrong_operator"),
    "fails_again": _share(with_tool, "fails_again", of="fails"),
  }
  for name, share in found.items():
    assert abs(share - getattr(RATES, name)) < 0.03, name


def test_styles_and_failures_are_mixed_by_their_weights():
  clean = [
    turn.code
    for script in _scripts(1500, demonstrations.CLEAN)
    for turn in script.turns[:-1]
  ]
  share = sum(code.startswith("x=") for code in clean) / len(clean)
  assert abs(share - demonstrations.CLEAN.assigns) < 0.04
  rates = dataclasses.replace(
    demonstrations.CLEAN, fails=1.0, assigns=0.0, timeout=0.1
  )
  task = arithmetic.ArithmeticTask(mix={"product": 1.0})
  broken = [s.turns[0].code for s in _scripts(1500, rates, task=task)]
  found = {
    "timeout": sum(code.startswith("while") for code in broken),
    "wrong_variable": sum(code.startswith("x=") for code in broken),
    "syntax_error": sum(code.count("(") > code.count(")") for code in broken),
  }
  total = sum(rates.failure_weights.values())
  for kind, count in found.items():
    expected = rates.failure_weights[kind] / total
    assert abs(count / len(broken) - expected) < 0.04, kind


def test_mess_does_not_follow_from_the_question():
  problem = TASK.problem(0)
  kinds = collections.Counter()
  for seed in range(200):
    script = demonstrations.make_demonstration(problem, seed, RATES)
    assert script == demonstrations.make_demonstration(problem, seed, RATES)
    kinds["messy" if script.mess else "clean"] += 1
    kinds.update(script.mess)
  assert kinds["clean"] > 20
  names = {"fails", "wrong_operator", "head_guess", "no_answer"}
  assert all(kinds[name] > 3 for name in names)


def test_a_guess_is_as_long_as_the_answer_and_almost_never_right():
  rates = dataclasses.replace(demonstrations.CLEAN, head_guess=1.0)
  scripts = _scripts(1000, rates)
  guesses = [script.turns[0].answers[0] for script in scripts]
  golds = [script.problem.answer for script in scripts]
  assert all(len(script.turns) == 1 for script in scripts)
  assert [len(g) for g in guesses] == [len(g) for g in golds]
  assert all(int(g) > 0 and g[0] != "0" for g in guesses)
  assert np.mean([a == b for a, b in zip(guesses, golds, strict=True)]) < 0.01


def test_clean_scripts_are_clean_right_and_short(toolbox, chat):
  scripts = _scripts(40, demonstrations.CLEAN)
  episodes = demonstrations.run_demonstrations(scripts, toolbox, chat)
  for script, episode in zip(scripts, episodes, strict=True):
    n_steps = len(script.problem.info["steps"])
    assert [r.status for r in episode.tool_records] == [STATUS.OK] * n_steps
    assert episode.tool_records[-1].text == script.problem.answer
    assert episode.outcome == layout.Outcome.CORRECT
    assert (episode.n_turns, episode.n_answers) == (n_steps + 1, 1)
    assert episode.stop_reason == layout.StopReason.ANSWERED
    if episode.kind == "product":
      assert len(episode) <= 64
  product = [len(e) for e in episodes if e.kind == "product"]
  assert np.mean(product) < 58


def test_messy_episodes_hold_what_the_tool_really_said(toolbox, chat):
  rates = dataclasses.replace(RATES, fails=0.9, timeout=0.1)
  scripts = _scripts(60, rates)
  episodes = demonstrations.run_demonstrations(scripts, toolbox, chat)
  texts = {r.text for e in episodes for r in e.tool_records}
  assert "SyntaxError: '(' was never closed" in texts
  assert "Timeout" in texts
  assert any(text.startswith("NameError: name 'p") for text in texts)
  for script, episode in zip(scripts, episodes, strict=True):
    n_failures = ("fails" in script.mess) + ("fails_again" in script.mess)
    assert episode.n_failed_calls == n_failures
    assert episode.n_answers == (
      0 if "no_answer" in script.mess else 1 + ("answers_twice" in script.mess)
    )
    assert episode.has_void_turn == ("no_answer" in script.mess)
    is_wrong = script.mess & {"no_answer", "head_guess", "wrong_operator"}
    assert (episode.outcome == layout.Outcome.CORRECT) == (not is_wrong)
    assert len(episode) <= 160
    if len(episode.tool_records) == 3 and n_failures == 1:
      assert len(episode) <= 130


def test_running_again_gives_the_same_episodes(toolbox, chat):
  scripts = _scripts(25, seed=3)
  steps = []
  first = demonstrations.run_demonstrations(
    scripts, toolbox, chat, progress=lambda *at: steps.append(at)
  )
  assert demonstrations.run_demonstrations(scripts, toolbox, chat) == first
  n_turns = sum(len(script.turns) for script in scripts)
  assert steps == [(i + 1, n_turns) for i in range(n_turns)]


def test_every_frequent_string_of_an_episode_is_a_token(toolbox, chat):
  # Apart from digits and operators, an episode has next to no spelt-out text.
  episodes = demonstrations.run_demonstrations(
    _scripts(40, seed=1), toolbox, chat
  )
  decode = chat.tokenizer.decode
  spelt = collections.Counter(
    text
    for episode in episodes
    for text in (decode([index]) for index in episode.token_ids)
    if len(text) == 1 and not text.isdigit()
  )
  assert set(spelt) <= set("*+-()}.?,")


def test_model_tokens_are_the_script_and_nothing_of_the_tool(toolbox, chat):
  (script,) = _scripts(1, demonstrations.CLEAN)
  (episode,) = demonstrations.run_demonstrations([script], toolbox, chat)
  model = [
    index
    for index, role in zip(episode.token_ids, episode.roles, strict=True)
    if role == layout.Role.MODEL
  ]
  first_turn = model[: model.index(chat.turn_end_id)]
  (call,) = calls.parse_turn(first_turn, chat.tokenizer).calls
  assert call.arguments["code"] == script.turns[0].code
  assert model.count(chat.turn_end_id) == episode.n_turns
  assert chat.tokenizer.special_id("<tool_response>") not in model


def test_a_sandbox_that_fails_stops_the_run(
  canned_sandbox, canned_result, chat
):
  (script,) = _scripts(1, demonstrations.CLEAN)
  code = script.turns[0].code
  broken = canned_sandbox({code: canned_result(status=STATUS.INFRA)})
  with pytest.raises(RuntimeError, match="sandbox failed"):
    demonstrations.run_demonstrations([script], tools.Toolbox(broken), chat)
  silent = canned_sandbox({code: canned_result(status=STATUS.ERROR)})
  with pytest.raises(RuntimeError, match="printed nothing.*ERROR"):
    demonstrations.run_demonstrations([script], tools.Toolbox(silent), chat)


@pytest.mark.parametrize(
  ("rates", "message"),
  [
    ({"fails": 1.5}, "fails must be within 0..1, not 1.5"),
    ({"no_answer": -0.1}, "no_answer must be"),
    (
      {
        **dict.fromkeys(("name_error", "syntax_error"), 0.0),
        **dict.fromkeys(("wrong_variable", "timeout"), 0.0),
      },
      "every kind has rate 0",
    ),
  ],
)
def test_impossible_rates_are_errors(rates, message):
  with pytest.raises(ValueError, match=message):
    demonstrations.MessRates(**rates)


def test_a_problem_without_steps_cannot_be_scripted():
  problem = problem_lib.Problem(id="p9", index=0, question="Q", answer="1")
  with pytest.raises(ValueError, match="'p9' has no `steps`"):
    demonstrations.make_demonstration(problem, 0)
