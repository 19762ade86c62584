"""The agent loop with a scripted sampler: no weights, and tools on command."""

import collections
import dataclasses
import itertools
import math
import threading
import time
import types
from concurrent import futures

import jax.numpy as jnp
import numpy as np
import pytest

from roc import evaluate, layout, replay, rollout, scripted
from roc import groups as groups_lib
from roc.device import sampling
from roc.host import chat as chat_lib
from roc.host import pack, rewards, tools, traces
from roc.host import tokenizer as tokenizer_lib
from roc.host.tasks import problem

Status, Stop, Role = layout.ToolStatus, layout.StopReason, layout.Role
SEED, STEP = 3, 5
FIRST, STREAM = 40, 2  # place of the first problem, stream of the draws


# ------------------------------------------------------------------ scripts


@pytest.fixture(scope="module")
def tokenizer():
  return tokenizer_lib.quickstart_tokenizer()


@pytest.fixture(scope="module")
def chat(tokenizer):
  return chat_lib.ChatFormat(tokenizer)


@dataclasses.dataclass(frozen=True)
class Result:
  """What of a sandbox's result the text side reads."""

  status: Status = Status.OK
  stdout: str = ""
  stderr: str = ""
  error_type: str = ""
  exit_code: int | None = 0


class Sandbox:
  """Answers a program after a number of looks; notes what was asked."""

  def __init__(self, delay=lambda code: 0, results=None):
    self.delay = delay
    self.results = results or {}
    self.asked = []
    self.finished = []
    self.ended = []  # trajectories, in the order in which they ended
    self.was_asked = threading.Event()
    self.now = 0.0
    self._waiting = []

  @property
  def cancelled(self):
    return [code for _, code, future in self._waiting if future.cancelled()]

  def submit(self, code, *, trajectory="", call_index=0, tool="python"):
    self.asked.append((code, trajectory, call_index))
    future = futures.Future()
    self._waiting.append([self.delay(code), code, future])
    self._release()
    self.was_asked.set()
    return future

  def end_trajectory(self, trajectory):
    self.ended.append(trajectory)

  def tick(self):
    self.now += 1.0
    for entry in self._waiting:
      entry[0] -= 1
    self._release()

  def _release(self):
    due = [entry for entry in self._waiting if entry[0] <= 0]
    self._waiting = [entry for entry in self._waiting if entry[0] > 0]
    for _, code, future in due:
      if future.set_running_or_notify_cancel():
        self.finished.append(code)
        future.set_result(self.results.get(code, Result(stdout=f"<{code}>")))


class Sampler(scripted.ScriptedSampler):
  """Moves the sandbox's clock with every look; keeps accounts and a log."""

  def __init__(self, scripts, sandbox, log, **sizes):
    """`scripts` are the turns of each rollout by the bytes of its key."""
    super().__init__(lambda request: scripts[request.key.tobytes()], **sizes)
    self.sandbox = sandbox
    self.log = log
    self.handles = {}  # by key
    self.budget_at_end = {}  # by handle

  def submit(self, requests):
    handles = super().submit(requests)
    for handle, request in zip(handles, requests, strict=True):
      self.handles[request.key.tobytes()] = handle
    return handles

  def dispatch(self):
    self.sandbox.tick()
    is_drawing = super().dispatch()
    self.log.append("draw" if is_drawing else "idle")
    return is_drawing

  def collect(self):
    drawn = super().collect()
    self.log.append("collect")
    return drawn

  def release(self, handles):
    for handle in handles:
      self.budget_at_end[handle] = self.budget_left(handle)
    super().release(handles)


class Toolbox(tools.Toolbox):
  """Notes when the host reads a turn and when it starts a call."""

  def __init__(self, sandbox, log, **kwargs):
    super().__init__(sandbox, **kwargs)
    self.log = log

  def parse_turn(self, ids, tokenizer):
    self.log.append("parse")
    return super().parse_turn(ids, tokenizer)

  def submit(self, call, **kwargs):
    self.log.append("call")
    return super().submit(call, **kwargs)


class World:
  """Scripts for N problems of O rollouts, and the loop that runs them."""

  def __init__(self, chat, texts, *, n_slots=4, chunk=3, **limits):
    """`texts[n][o]` are the turns of a rollout, as lists of ids."""
    self.chat = chat
    self.n_rollouts = len(texts[0])
    self.problems = [
      problem.Problem(f"p{n}", 100 + n, f"{n}+{n}", str(2 * n), "sum")
      for n in range(len(texts))
    ]
    place_B = np.repeat(FIRST + np.arange(len(texts)), self.n_rollouts)
    rollout_B = np.tile(np.arange(self.n_rollouts), len(texts))
    keys_B2 = np.asarray(
      sampling.rollout_keys(
        SEED, STREAM, jnp.asarray(place_B), jnp.asarray(rollout_B)
      )
    )
    flat = [turns for group in texts for turns in group]
    self.keys = [k.tobytes() for k in keys_B2]
    self.scripts = dict(zip(self.keys, flat, strict=True))
    self.limits = rollout.Limits(
      **{"max_turns": 4, "max_tokens": 200, "max_calls": 6, **limits}
    )
    self.sizes = {"n_slots": n_slots, "chunk": chunk}

  def build(self, sandbox=None, score=rewards.score, tool="python"):
    self.log = []
    self.sandbox = sandbox or Sandbox()
    self.sampler = Sampler(self.scripts, self.sandbox, self.log, **self.sizes)
    self.toolbox = Toolbox(
      self.sandbox, self.log, tool=tool, tool_name="python"
    )
    self.loop = rollout.AgentLoop(
      self.sampler, self.chat, self.toolbox, self.limits, score=score
    )
    return self.loop

  def draw(self, **kwargs):
    """Runs the loop that was built."""
    groups, self.timing = self.loop.run(
      self.problems,
      self.n_rollouts,
      seed=SEED,
      step=STEP,
      **{"first": FIRST, "stream": STREAM, **kwargs},
    )
    assert self.sampler.n_rollouts == 0
    return groups

  def run(self, sandbox=None, score=rewards.score, **kwargs):
    self.build(sandbox, score)
    return self.draw(**kwargs)

  def run_one(self, sandbox=None):
    ((episode,),) = self.run(sandbox)
    self.check(episode, self.keys[0])
    return episode

  def check(self, episode, key):
    """What holds for every episode, whatever happened in it."""
    assert len(episode.token_ids) == len(episode.roles) == len(episode.logprobs)
    # Token in, token out: the engine saw the very ids, once each.
    handle = self.sampler.handles[key]
    assert episode.token_ids == self.sampler.fed[handle]
    for role, logp in zip(episode.roles, episode.logprobs, strict=True):
      assert (logp < 0) == (role == Role.MODEL)
    n_prompt = episode.roles.count(Role.PROMPT)
    used = len(episode) - n_prompt
    left = self.sampler.budget_at_end[handle]
    assert left == self.limits.max_tokens - used >= 0

  def check_all(self, groups):
    episodes = [e for group in groups for e in group]
    for episode, key in zip(episodes, self.keys, strict=True):
      self.check(episode, key)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
  monkeypatch.setattr(rollout, "_WAIT_S", 0.0)


@pytest.fixture(scope="module")
def say(chat):
  return Speaker(chat)


class Speaker:
  """Builds turns of the model."""

  def __init__(self, chat):
    self.chat = chat
    self.end = chat.turn_end_id

  def text(self, words):
    return self.chat.tokenizer.encode(words)

  def calls(self, *codes):
    """A turn with one well-formed call for each program."""
    ids = []
    for code in codes:
      ids += self.chat.call_ids(
        '{"name": "python", "arguments": {"code": "' + code + '"}}'
      )
    return [*ids, self.end]

  def raw_call(self, body):
    return [*self.chat.call_ids(body), self.end]

  def answer(self, text):
    return [*self.chat.answer_ids(text), self.end]


# -------------------------------------------------------------- stop reasons


def test_answered_at_once(chat, say):
  world = World(chat, [[[say.answer("0")]]])
  episode = world.run_one()
  assert episode.stop_reason == Stop.ANSWERED and not episode.is_truncated
  assert episode.outcome == layout.Outcome.CORRECT and episode.reward == 1.0
  assert episode.n_turns == 1 and episode.answers == ["0"]
  assert (episode.task_index, episode.place) == (100, FIRST)
  assert (episode.step, episode.drawn_by) == (STEP, "train")
  prompt = chat.prompt_ids("0+0")
  assert episode.token_ids == prompt + say.answer("0")
  assert episode.roles == [Role.PROMPT] * len(prompt) + [Role.MODEL] * len(
    say.answer("0")
  )


def test_answered_wrong(chat, say):
  episode = World(chat, [[[say.answer("7")]]]).run_one()
  assert episode.stop_reason == Stop.ANSWERED
  assert episode.outcome == layout.Outcome.WRONG and episode.reward == 0.0


def test_a_call_and_its_answer(chat, say):
  turns = [say.calls("print(0)"), say.answer("0")]
  world = World(chat, [[turns]])
  episode = world.run_one()
  suffix, roles = chat.tool_suffix(["<print(0)>"])
  prompt = chat.prompt_ids("0+0")
  assert episode.token_ids == prompt + turns[0] + suffix + turns[1]
  start = len(prompt) + len(turns[0])
  assert episode.roles[start : start + len(suffix)] == roles
  assert episode.outcome == layout.Outcome.CORRECT
  assert [r.status for r in episode.tool_records] == [Status.OK]
  assert episode.tool_records[0].code == "print(0)"
  assert episode.tool_records[0].text == "<print(0)>"
  # The tool's random numbers are seeded by who calls and for the how manieth
  # time.
  assert world.sandbox.asked == [("print(0)", (STREAM, FIRST, 0), 0)]


def test_max_turns(chat, say):
  turns = [say.calls("a"), say.calls("b"), say.answer("0")]
  world = World(chat, [[turns]], max_turns=2)
  episode = world.run_one()
  assert episode.stop_reason == Stop.MAX_TURNS and episode.is_truncated
  assert episode.n_turns == 2
  # The call of the last turn could never be read, so it does not run.
  assert [code for code, *_ in world.sandbox.asked] == ["a"]
  assert episode.outcome == layout.Outcome.WRONG


def test_max_turns_in_the_last_turn_may_answer(chat, say):
  turns = [say.calls("a"), say.answer("0")]
  episode = World(chat, [[turns]], max_turns=2).run_one()
  assert episode.stop_reason == Stop.ANSWERED
  assert episode.outcome == layout.Outcome.CORRECT


def test_max_tokens(chat, say):
  long = say.text("1234567890" * 2) + say.answer("0")
  episode = World(chat, [[[long]]], max_tokens=17).run_one()
  assert episode.stop_reason == Stop.MAX_TOKENS and episode.is_truncated
  assert episode.n_model_tokens == 17 and episode.n_turns == 1
  assert episode.outcome == layout.Outcome.WRONG


def test_an_answer_that_just_fits(chat, say):
  turn = say.answer("0")
  episode = World(chat, [[[turn]]], max_tokens=len(turn)).run_one()
  assert episode.stop_reason == Stop.ANSWERED and episode.reward == 1.0
  episode = World(chat, [[[turn]]], max_tokens=len(turn) - 1).run_one()
  assert episode.stop_reason == Stop.MAX_TOKENS and episode.reward == 0.0


def test_tool_overflow(chat, say):
  """An answer fits if one token is left to say something with."""
  turns = [say.calls("a"), say.answer("0")]
  suffix, _ = chat.tool_suffix(["<a>"])
  exact = len(turns[0]) + len(suffix)
  world = World(chat, [[turns]], max_tokens=exact)
  episode = world.run_one()
  assert episode.stop_reason == Stop.TOOL_OVERFLOW and episode.is_truncated
  assert episode.token_ids[-len(turns[0]) :] == turns[0]
  # The call ran and counts, though nobody read what it said.
  assert [r.status for r in episode.tool_records] == [Status.OK]
  world = World(chat, [[turns]], max_tokens=exact + 1)
  episode = world.run_one()
  assert episode.stop_reason == Stop.MAX_TOKENS
  assert episode.token_ids[-1] == turns[1][0]


def test_every_answer_of_a_tool_counts(chat, say):
  """The second one does not fit only because the first was read."""
  turns = [say.calls("a"), say.calls("a"), say.answer("0")]
  suffix, _ = chat.tool_suffix(["<a>"])
  exact = 2 * (len(turns[0]) + len(suffix))
  episode = World(chat, [[turns]], max_tokens=exact).run_one()
  assert episode.stop_reason == Stop.TOOL_OVERFLOW and episode.n_turns == 2
  assert len(episode.tool_records) == 2
  turn = len(say.answer("0"))
  episode = World(chat, [[turns]], max_tokens=exact + turn).run_one()
  assert episode.stop_reason == Stop.ANSWERED


def test_infra_is_no_wrong_answer(chat, say):
  texts = [[[say.calls("bad"), say.answer("0")], [say.answer("0")]]]
  world = World(chat, texts)
  sandbox = Sandbox(results={"bad": Result(status=Status.INFRA)})
  ((failed, fine),) = world.run(sandbox)
  assert failed.stop_reason == Stop.INFRA
  assert failed.outcome == layout.Outcome.VOID and failed.reward == 0.0
  assert failed.void_reason == layout.VoidReason.SANDBOX
  assert [r.status for r in failed.tool_records] == [Status.INFRA]
  assert failed.n_judged_calls == 0
  assert fine.outcome == layout.Outcome.CORRECT


# ------------------------------------------------------------------- rewards

OPEN, CLOSE = tokenizer_lib.ANSWER_OPEN, tokenizer_lib.ANSWER_CLOSE


@pytest.mark.parametrize(
  ("last", "answers"),
  [
    ([], []),
    (["The tool said 0."], []),
    (["So it is \\boxed{0}."], []),
    ([OPEN, "\\boxed{0}"], []),
    ([OPEN, "0", CLOSE], []),
    ([OPEN, "\\boxed{}", CLOSE, "\\boxed{0}"], []),
    ([OPEN, "\\boxed{7}", CLOSE, "\\boxed{0}"], ["7"]),
    ([OPEN, "\\boxed{0}", CLOSE, OPEN, "\\boxed{7}", CLOSE], ["0", "7"]),
    ([OPEN, "\\boxed{0} or \\boxed{7}", CLOSE], ["7"]),
    (["<answer>\\boxed{0}</answer>"], []),
  ],
)
def test_what_a_tool_printed_or_stands_outside_earns_nothing(
  chat, say, last, answers
):
  """The gold answer is everywhere but where it would count."""
  special = chat.tokenizer.special_ids
  turn = [
    token
    for piece in last
    for token in ([special[piece]] if piece in special else say.text(piece))
  ]
  world = World(chat, [[[say.calls("print"), [*turn, say.end]]]])
  printed = f"{OPEN}\\boxed{{0}}{CLOSE}"
  episode = world.run_one(Sandbox(results={"print": Result(stdout=printed)}))
  assert printed in chat.tokenizer.decode(episode.token_ids)
  assert episode.stop_reason == Stop.ANSWERED and episode.answers == answers
  assert episode.outcome == layout.Outcome.WRONG and episode.reward == 0.0
  assert episode.verdict == ("wrong" if answers else "no_answer")


def test_an_answer_without_a_box_does_not_take_one_back(chat, say):
  tags = [chat.tokenizer.special_id(tag) for tag in (OPEN, CLOSE)]
  turn = [*say.answer("0")[:-1], tags[0], *say.text("7"), tags[1], say.end]
  episode = World(chat, [[[turn]]]).run_one()
  assert episode.answers == ["0"] and episode.reward == 1.0


class LateScore:
  """Gives futures, and the verdicts when asked to, the last one first."""

  def __init__(self):
    self.asked = []

  def __call__(self, answers, gold, *, is_truncated=False):
    future = futures.Future()
    self.asked.append((future, answers, gold, is_truncated))
    return future

  def resolve(self):
    for future, answers, gold, is_truncated in reversed(self.asked):
      if not future.done():
        future.set_result(
          rewards.score(answers, gold, is_truncated=is_truncated)
        )


def test_verdicts_may_come_after_the_last_token(chat, mixed):
  want = dump(World(chat, mixed).run())
  score = LateScore()
  n_running = []

  def on_finished(n_done, n_all):
    n_running.append(n_all - n_done)
    if n_done == n_all:
      score.resolve()

  world = World(chat, mixed, n_slots=2)
  got = world.run(score=score, on_finished=on_finished)
  assert dump(got) == want
  # All had been drawn before the first was judged.
  assert n_running[-1] == 0 and len(score.asked) == 9


@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize("reason", sorted(rewards.VOID_REASONS))
def test_a_failed_check_is_no_wrong_answer(chat, say, reason, is_late):
  def score(answers, gold, *, is_truncated=False):
    verdict = rewards.Verdict(False, reason, answers[-1], len(answers))
    if answers != ["7"]:
      verdict = rewards.score(answers, gold, is_truncated=is_truncated)
    future = futures.Future()
    future.set_result(verdict)
    return future if is_late else verdict

  world = World(chat, [[[say.answer("7")], [say.answer("0")]]])
  ((failed, fine),) = world.run(score=score)
  assert failed.stop_reason == Stop.ANSWERED
  assert (failed.outcome, failed.verdict) == (layout.Outcome.VOID, reason)
  said = {"bad_gold": "GOLD", "infra": "SANDBOX"}.get(reason, "VERIFIER")
  assert failed.void_reason == layout.VoidReason[said]
  assert fine.void_reason is None
  again = type(failed).from_json(failed.to_json())
  assert again.void_reason == failed.void_reason
  assert failed.reward == 0.0
  assert fine.outcome == layout.Outcome.CORRECT and fine.reward == 1.0


def test_a_rollout_that_met_infra_is_not_judged(chat, say):
  score = LateScore()
  world = World(chat, [[[say.calls("bad")]]])
  sandbox = Sandbox(results={"bad": Result(status=Status.INFRA)})
  ((episode,),) = world.run(sandbox, score=score)
  assert score.asked == [] and episode.verdict == "void"
  assert episode.outcome == layout.Outcome.VOID


# --------------------------------------------------------------------- calls


def test_parallel_calls_are_answered_in_their_order(chat, say):
  """The last one to finish is the first to be read."""
  turns = [say.calls("slow", "mid", "fast"), say.answer("0")]
  world = World(chat, [[turns]])
  delays = {"slow": 9, "mid": 4, "fast": 1}
  sandbox = Sandbox(
    delays.__getitem__,
    {"mid": Result(Status.ERROR, stderr="ValueError", error_type="ValueError")},
  )
  episode = world.run_one(sandbox)
  assert sandbox.finished == ["fast", "mid", "slow"]
  assert [r.code for r in episode.tool_records] == ["slow", "mid", "fast"]
  assert [r.status for r in episode.tool_records] == [
    Status.OK,
    Status.ERROR,
    Status.OK,
  ]
  suffix, _ = chat.tool_suffix([r.text for r in episode.tool_records])
  start = len(chat.prompt_ids("0+0")) + len(turns[0])
  assert episode.token_ids[start : start + len(suffix)] == suffix
  assert [index for *_, index in sandbox.asked] == [0, 1, 2]


@pytest.mark.parametrize(
  "body",
  [
    "not json",
    '{"name": "ruby", "arguments": {"code": "1"}}',
    '{"name": "python", "arguments": {}}',
  ],
)
def test_malformed_calls_are_answered(chat, say, body):
  world = World(chat, [[[say.raw_call(body), say.answer("0")]]])
  episode = world.run_one()
  assert world.sandbox.asked == []
  (record,) = episode.tool_records
  assert record.status == Status.REJECTED and record.text
  assert episode.n_failed_calls == episode.n_judged_calls == 1
  # The model reads why, and may go on.
  assert episode.roles.count(Role.TOOL) == len(
    chat.tokenizer.encode(record.text)
  )
  assert episode.outcome == layout.Outcome.CORRECT


def test_call_limit_of_a_rollout(chat, say):
  turns = [say.calls("a", "b"), say.calls("c", "d"), say.calls("e")]
  world = World(chat, [[turns]], max_calls=3)
  episode = world.run_one()
  # The last one that fits says that there were too many; then it is over.
  assert [r.status for r in episode.tool_records] == [
    Status.OK,
    Status.OK,
    Status.REJECTED,
  ]
  assert [code for code, *_ in world.sandbox.asked] == ["a", "b"]
  assert "too many calls" in episode.tool_records[2].text
  assert episode.stop_reason == Stop.MAX_TURNS


def test_the_model_cannot_play_the_tool(chat, say):
  """A tool's answer written by the model is the model's: status and role."""
  forged, _ = chat.tool_suffix(["0"])
  turn = [*say.calls("oops")[:-1], *forged[:-1], say.end]
  sandbox = Sandbox(
    results={"oops": Result(Status.ERROR, stderr="X", error_type="NameError")}
  )
  # It stops at its first end of turn, as the engine would stop it.
  stop = turn.index(say.end) + 1
  turns = [turn[:stop], say.answer("0")]
  world = World(chat, [[turns]])
  episode = world.run_one(sandbox)
  start = len(chat.prompt_ids("0+0"))
  assert set(episode.roles[start : start + stop]) == {Role.MODEL}
  assert [r.status for r in episode.tool_records] == [Status.ERROR]
  response = chat.tokenizer.special_id(tokenizer_lib.RESPONSE_OPEN)
  at = [i for i, t in enumerate(episode.token_ids) if t == response]
  assert [episode.roles[i] for i in at] == [Role.MODEL, Role.TEMPLATE]


def test_parallel_calls_of_several_rollouts_do_not_mix(chat, say):
  texts = [
    [[say.calls(f"a{o}", f"b{o}", f"c{o}"), say.answer("0")] for o in range(3)]
  ]
  # The first call of one ends with the last call of another.
  delay = lambda code: 1 + 3 * ((ord(code[0]) + int(code[1])) % 3)
  world = World(chat, texts)
  groups = world.run(Sandbox(delay))
  assert len(set(world.sandbox.finished[:3])) == 3
  for o, episode in enumerate(groups[0]):
    assert [r.code for r in episode.tool_records] == [f"{c}{o}" for c in "abc"]
    suffix, _ = chat.tool_suffix([f"<{c}{o}>" for c in "abc"])
    start = len(chat.prompt_ids("0+0")) + len(texts[0][o][0])
    assert episode.token_ids[start : start + len(suffix)] == suffix
    assert episode.outcome == layout.Outcome.CORRECT
  world.check_all(groups)


def test_a_rejected_call_keeps_its_place_among_slow_ones(chat, say):
  """It is answered at once, and read with the others."""
  good = say.calls("slow")[:-1]
  turns = [[*say.raw_call("no json")[:-1], *good, say.end], say.answer("0")]
  episode = World(chat, [[turns]]).run_one(Sandbox(lambda code: 7))
  assert [r.status for r in episode.tool_records] == [
    Status.REJECTED,
    Status.OK,
  ]
  texts = [r.text for r in episode.tool_records]
  suffix, _ = chat.tool_suffix(texts)
  start = len(chat.prompt_ids("0+0")) + len(turns[0])
  assert episode.token_ids[start : start + len(suffix)] == suffix


# ----------------------------------------------------------------- deadlines


@pytest.fixture
def timed(monkeypatch):
  """A sandbox by whose clock the loop goes; a look at it is a second."""

  def make(*args, **kwargs):
    sandbox = Sandbox(*args, **kwargs)
    clock = types.SimpleNamespace(
      monotonic=lambda: sandbox.now, perf_counter=time.perf_counter
    )
    monkeypatch.setattr(rollout, "time", clock)
    return sandbox

  return make


def assert_given_up(episode, verdict):
  assert episode.stop_reason == Stop.DEADLINE and not episode.is_truncated
  assert episode.outcome == layout.Outcome.VOID and episode.reward == 0.0
  assert episode.verdict == verdict
  assert episode.void_reason == layout.VoidReason.DEADLINE


class CountingScore:
  """Judges as always; notes how many answers it saw."""

  def __init__(self):
    self.n_asked = 0

  def __call__(self, answers, gold, *, is_truncated=False):
    self.n_asked += 1
    return rewards.score(answers, gold, is_truncated=is_truncated)


def test_a_call_that_never_ends_is_given_up(chat, say, timed):
  stuck = [say.calls("quick", "never"), say.answer("0")]
  slow = [say.calls("slow"), say.answer("0")]
  texts = [[stuck, slow, [say.answer("0")]]]
  delays = {"quick": 0, "never": math.inf, "slow": 9}
  score = CountingScore()
  world = World(chat, texts, call_deadline=10.0)
  groups = world.run(timed(delays.__getitem__), score)
  given_up, *others = groups[0]
  assert_given_up(given_up, "call_deadline")
  assert given_up.token_ids == chat.prompt_ids("0+0") + stuck[0]
  assert given_up.n_turns == 1 and given_up.tool_records == []
  assert world.sandbox.cancelled == ["never"]
  assert world.sandbox.finished == ["quick", "slow"]
  assert score.n_asked == 2
  world.check_all(groups)
  # The others are what they are beside one that does not hang.
  _, *want = World(chat, texts).run()[0]
  assert dump([others]) == dump([want])
  assert {e.outcome for e in others} == {layout.Outcome.CORRECT}


@pytest.mark.parametrize(
  ("deadline", "delay", "stop"),
  [
    (10.0, 5, Stop.ANSWERED),
    (10.0, 20, Stop.DEADLINE),
    (0.0, 500, Stop.ANSWERED),
  ],
)
def test_deadline_of_a_call(chat, say, timed, deadline, delay, stop):
  """Each call has its own: three that take five seconds each are in time."""
  turns = [*(say.calls(code) for code in "abc"), say.answer("0")]
  world = World(chat, [[turns]], call_deadline=deadline)
  episode = world.run_one(timed(lambda code: delay))
  assert episode.stop_reason == stop


def test_deadline_of_a_rollout(chat, say, timed):
  """It ends one that waits and one that speaks, and no other."""
  waits = [say.calls("never"), say.answer("0")]
  speaks = [say.text("12" * 80) + say.answer("0")]
  texts = [[waits, speaks, [say.answer("0")]]]
  world = World(chat, texts, chunk=1, rollout_deadline=60.0)
  groups = world.run(timed(lambda code: math.inf))
  waiting, speaking, fine = groups[0]
  assert_given_up(waiting, "rollout_deadline")
  assert_given_up(speaking, "rollout_deadline")
  # A token a second, until a second too many has gone by.
  assert 60 <= speaking.n_model_tokens <= 63 and speaking.n_turns == 0
  assert world.sandbox.cancelled == ["never"]
  assert fine.outcome == layout.Outcome.CORRECT
  handle = world.sampler.handles[world.keys[1]]
  fed = world.sampler.fed[handle]
  assert fed[: len(speaking)] == speaking.token_ids


def test_a_rollouts_clock_starts_with_its_first_token(chat, say, timed):
  """The last of ten in one slot has waited for longer than it may take."""
  turn = say.text("123456789") + say.answer("0")
  world = World(
    chat, [[[turn]] * 10], n_slots=1, chunk=1, rollout_deadline=30.0
  )
  groups = world.run(timed())
  assert world.sandbox.now > 100
  assert {e.stop_reason for e in groups[0]} == {Stop.ANSWERED}


# -------------------------------------------------------------- cancellation


def test_cancel_while_the_loop_waits(chat, say):
  turns = [say.calls("never"), say.answer("0")]
  world = World(chat, [[turns, [say.answer("0")]]])
  loop = world.build(Sandbox(lambda code: math.inf))

  def cancel():
    if world.sandbox.was_asked.wait(30):
      loop.cancel()

  thread = threading.Thread(target=cancel)
  thread.start()
  groups = world.draw()
  thread.join()
  assert groups[0][0].stop_reason == Stop.CANCELLED
  assert world.sandbox.cancelled == ["never"]


class CancellingSandbox(Sandbox):
  """Has another thread cancel the loop when it is asked for `cancel`."""

  def submit(self, code, **kwargs):
    if code == "cancel":
      thread = threading.Thread(target=self.loop.cancel)
      thread.start()
      thread.join()
    return super().submit(code, **kwargs)


def test_cancel_ends_all_that_is_under_way(chat, say):
  """One had ended, two wait, one speaks and two stand in the queue."""
  long = say.text("12" * 60)
  texts = [
    [
      [say.answer("0")],
      [say.calls("never"), say.answer("0")],
      [long[:9] + say.calls("cancel"), say.answer("0")],
      [long + say.answer("0")],
      [say.answer("0")],
      [say.answer("0")],
    ]
  ]
  want = dump(World(chat, texts).run())
  world = World(chat, texts, n_slots=1, chunk=40)
  sandbox = CancellingSandbox(lambda code: math.inf)
  sandbox.loop = world.build(sandbox, tool="session")
  (episodes,) = world.draw()
  ended, *rest = episodes
  assert ended.outcome == layout.Outcome.CORRECT
  for episode in rest:
    assert episode.stop_reason == Stop.CANCELLED
    assert (episode.outcome, episode.verdict) == (layout.Outcome.VOID, "void")
    assert episode.void_reason == layout.VoidReason.CANCELLED
    assert episode.reward == 0.0
  n_prompt = len(chat.prompt_ids("0+0"))
  assert [len(e) > n_prompt for e in rest] == [True, True, False, False, False]
  # The one that spoke had its first chunk drawn, which nobody read.
  assert len(world.sampler.fed[3]) == n_prompt + 40
  assert world.sandbox.cancelled == ["never", "cancel"]
  assert world.sandbox.ended == [(STREAM, FIRST, o) for o in range(6)]
  # The next run is not cancelled.
  world.sandbox.loop = types.SimpleNamespace(cancel=lambda: None)
  world.sandbox.delay = lambda code: 1
  assert dump(world.draw()) == want


def break_once(owner, name, error, *, at, is_done):
  """Makes a method raise at its `at`-th call, before or after its work."""
  real, numbers = getattr(owner, name), itertools.count(1)

  def method(*args, **kwargs):
    is_due = next(numbers) == at
    if is_due and not is_done:
      raise error
    result = real(*args, **kwargs)
    if is_due:
      raise error
    return result

  setattr(owner, name, method)


@pytest.mark.parametrize("is_done", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize(
  ("owner", "name", "at"),
  [
    ("sampler", "dispatch", 3),
    ("sampler", "collect", 3),
    ("sampler", "extend", 2),
    ("toolbox", "parse_turn", 4),
    ("toolbox", "end_trajectory", 1),
    ("sandbox", "submit", 2),
    ("loop", "score", 1),
  ],
)
def test_an_interrupted_run_leaves_nothing_behind(
  chat, mixed, owner, name, at, error, is_done
):
  want = dump(World(chat, mixed).run())
  # In a chunk as long as a turn several rollouts end at once.
  world = World(chat, mixed, n_slots=6, chunk=100)
  world.build(tool="session")
  break_once(
    getattr(world, owner), name, error("stop here"), at=at, is_done=is_done
  )
  with pytest.raises(error, match="stop here"):
    world.draw()
  assert world.sampler.n_rollouts == 0
  names = {(STREAM, FIRST + n, o) for n in range(3) for o in range(3)}
  # Of `end_trajectory` itself one call fell away.
  n_lost = name == "end_trajectory" and not is_done
  assert len(names - set(world.sandbox.ended)) == n_lost
  world.sandbox.ended.clear()
  assert dump(world.draw()) == want
  assert sorted(world.sandbox.ended) == sorted(names)


def test_a_failing_sandbox_is_heard(chat, say):
  world = World(chat, [[[say.calls("a")], [say.calls("b")]]])
  future = futures.Future()
  future.set_exception(OSError("the sandbox is gone"))
  sandbox = Sandbox()
  sandbox.submit = lambda *args, **kwargs: future
  with pytest.raises(OSError, match="is gone"):
    world.run(sandbox)
  assert world.sampler.n_rollouts == 0


# ------------------------------------------------------------- broken logits


def test_broken_logits_are_no_wrong_answer(chat, say):
  words = say.text("12345")
  calls = say.calls("a")
  texts = [
    [
      [[*words, scripted.BREAK]],
      [[scripted.BREAK]],
      [calls, [*words, scripted.BREAK]],
      [calls, say.answer("0")],
    ]
  ]
  score = CountingScore()
  world = World(chat, texts)
  groups = world.run(score=score)
  *broken, fine = groups[0]
  for episode in broken:
    assert episode.stop_reason == Stop.LOGITS
    assert episode.outcome == layout.Outcome.VOID and episode.reward == 0.0
    assert episode.verdict == "broken_logits"
    assert episode.void_reason == layout.VoidReason.LOGITS
  assert score.n_asked == 1
  # What was drawn before stays on record.
  prompt, (suffix, _) = chat.prompt_ids("0+0"), chat.tool_suffix(["<a>"])
  assert [e.token_ids for e in broken] == [
    prompt + words,
    prompt,
    prompt + calls + suffix + words,
  ]
  assert [e.n_judged_calls for e in broken] == [0, 0, 1]
  assert fine.outcome == layout.Outcome.CORRECT
  world.check_all(groups)


# --------------------------------------------------------- the device is busy


def test_the_next_chunk_is_drawn_while_the_host_reads_the_last(chat, say):
  texts = [[[say.answer("0")], [say.answer("0")]]]
  world = World(chat, texts, n_slots=1, chunk=100)
  world.run()
  assert world.log == [
    *("draw", "collect"),
    *("draw", "parse", "collect"),
    *("idle", "parse"),
  ]


def test_a_call_starts_while_others_draw(chat, say):
  texts = [[[say.calls("a"), say.answer("0")], [say.text("1" * 150)]]]
  world = World(chat, texts, n_slots=2, chunk=40)
  world.run()
  start = world.log.index("call")
  assert world.log[start - 2 : start + 2] == [
    *("draw", "parse", "call", "collect")
  ]


@pytest.fixture
def waits(monkeypatch):
  """Lets the loop note in a log that it waits for tools."""
  real = futures.wait

  def use(log):
    def wait(*args, **kwargs):
      log.append("wait")
      return real(*args, **kwargs)

    monkeypatch.setattr(futures, "wait", wait)

  return use


@pytest.mark.parametrize("n_slots", [1, 3, 9])
@pytest.mark.parametrize("delay", [0, 30])
def test_nothing_is_waited_for_while_something_can_be_drawn(
  chat, mixed, waits, n_slots, delay
):
  world = World(chat, mixed, n_slots=n_slots)
  world.build(Sandbox(lambda code: delay))
  waits(world.log)
  world.draw()
  for before, now in itertools.pairwise(world.log):
    # Only after a look at which nobody could draw and nothing was left to
    # read; and no turn is read before the device has its next work.
    assert now != "wait" or before == "idle"
    assert now != "parse" or before != "collect"
  assert ("wait" in world.log) == (delay == 30)


def test_waiting_is_not_generating(chat, say, monkeypatch):
  """The clock stands still but for the sleeps on tools, a minute each."""
  world = World(chat, [[[say.calls("a"), say.answer("0")]]])
  world.build(Sandbox(lambda code: 5))
  now = [0.0]
  clock = types.SimpleNamespace(
    monotonic=time.monotonic, perf_counter=lambda: now[0]
  )
  monkeypatch.setattr(rollout, "time", clock)

  def wait(*args, **kwargs):
    now[0] += 60.0

  monkeypatch.setattr(futures, "wait", wait)
  world.draw()
  n_sleeps = now[0] / 60.0
  assert n_sleeps >= 2
  assert world.timing.tools == now[0] and world.timing.generate == 0.0


def test_waiting_for_a_verdict_is_not_generating(chat, say, monkeypatch):
  now = [0.0]
  clock = types.SimpleNamespace(
    monotonic=time.monotonic, perf_counter=lambda: now[0]
  )
  monkeypatch.setattr(rollout, "time", clock)

  class Verdict(futures.Future):
    def result(self, timeout=None):
      now[0] += 60.0
      return rewards.score(["0"], "0")

  world = World(chat, [[[say.answer("0")], [say.answer("0")]]])
  world.run(score=lambda *args, **kwargs: Verdict())
  assert world.timing.tools == 120.0 and world.timing.generate == 0.0


def test_a_sampler_that_draws_nothing_is_an_error(chat, say):
  """Rather than a loop that turns for ever."""
  world = World(chat, [[[say.answer("0")]]])
  world.build()
  world.sampler.dispatch = lambda: False
  with pytest.raises(RuntimeError, match="draws nothing"):
    world.draw()
  assert world.sampler.n_rollouts == 0


# --------------------------------------------------------------------- order


@pytest.fixture(scope="module")
def mixed(say):
  """Nine rollouts of all kinds, more than there are slots."""
  return [
    [
      [say.calls(f"a{n}"), say.calls(f"b{n}"), say.answer(str(2 * n))],
      [say.answer(str(n))],
      [say.calls(f"c{n}", f"d{n}"), say.answer("1"), say.answer("2")],
    ]
    for n in range(3)
  ]


def dump(groups):
  return [[e.to_json() for e in group] for group in groups]


def test_episodes_stand_in_order_of_ids(chat, mixed):
  world = World(chat, mixed, n_slots=2)
  groups = world.run()
  assert [[e.rollout_id for e in g] for g in groups] == [[0, 1, 2]] * 3
  assert [g[0].task_index for g in groups] == [100, 101, 102]
  assert [g[0].place for g in groups] == [FIRST, FIRST + 1, FIRST + 2]
  assert [g[0].group_index for g in groups] == [0, 1, 2]
  world.check_all(groups)


def test_a_problem_that_comes_twice_is_drawn_twice(chat, say, tmp_path):
  """Each time has its own random stream, sandbox sessions and traces."""
  call = [say.calls("print(1)"), say.answer("0")]
  world = World(chat, [[call, call], [call, call]])
  world.problems = [world.problems[0]] * 2  # an epoch of one problem
  world.build(tool="session")
  first, again = world.draw()
  assert len(set(world.keys)) == 4
  assert [e.place for e in first + again] == [FIRST] * 2 + [FIRST + 1] * 2
  names = {(STREAM, FIRST + n, o) for n in range(2) for o in range(2)}
  assert {name for _, name, _ in world.sandbox.asked} == names
  assert sorted(world.sandbox.ended) == sorted(names)
  arrays = pack.pack([first, again], n_calls=6, length=256)
  assert arrays["place"].tolist() == [FIRST, FIRST + 1]
  traces.write(tmp_path / "step_000005.jsonl", [first, again], chat.tokenizer)
  needs = replay.Needs(2, chat.tokenizer.vocab_size, 256, 6, 1.0)
  assert replay.Replay(tmp_path, needs).groups(FIRST, 2, STEP) == [first, again]
  read = groups_lib.read([tmp_path / "step_000005.jsonl"])
  assert [g.name for g in read.groups] == [f"{STEP}:{FIRST}", f"{STEP}:41"]
  assert [g.stream_id for g in read.groups] == [FIRST, FIRST + 1]


@pytest.mark.parametrize("n_slots", [1, 2, 9])
@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_schedule_does_not_change_episodes(chat, mixed, n_slots, chunk):
  want = dump(World(chat, mixed).run())
  delay = lambda code: sum(code.encode()) * 7 % 11
  got = World(chat, mixed, n_slots=n_slots, chunk=chunk).run(Sandbox(delay))
  assert dump(got) == want


@pytest.mark.parametrize("seed", range(12))
def test_random_schedules_do_not_change_episodes(chat, say, mixed, seed):
  """Slots, chunks and the patience that each call asks for, by the dice."""
  rng = np.random.default_rng(seed)
  odd = [
    [say.text("1234567890" * 30)],  # too long
    [say.calls("x", "y", "z"), [*say.text("12345"), scripted.BREAK]],
    [say.calls("bad"), say.answer("6")],
  ]
  results = {"bad": Result(status=Status.INFRA)}
  texts = [*mixed, odd]
  want = dump(World(chat, texts).run(Sandbox(results=results)))
  delays = collections.defaultdict(lambda: int(rng.integers(0, 25)))
  world = World(
    chat,
    texts,
    n_slots=int(rng.integers(1, 13)),
    chunk=int(rng.integers(1, 50)),
  )
  groups = world.run(Sandbox(delays.__getitem__, results))
  assert dump(groups) == want
  world.check_all(groups)


def test_others_decode_while_one_waits(chat, say):
  texts = [[[say.calls("slow"), say.answer("0")], [say.answer("0")]]]
  world = World(chat, texts, n_slots=2, chunk=1)
  seen = []
  sandbox = Sandbox(lambda code: 60)
  world.run(sandbox, on_finished=lambda n, n_all: seen.append((n, n_all)))
  assert seen == [(1, 2), (2, 2)]
  assert sandbox.finished == ["slow"]
  assert world.timing.generate > 0 and world.timing.tools >= 0
  assert 0 < world.timing.text < world.timing.generate


def test_nothing_to_do(chat):
  world = World(chat, [[[]]])
  world.problems = []
  assert world.run() == []


# ---------------------------------------------------------------- the head


def test_head_fills_in_the_box(chat, say):
  """Without the tool the model only completes `<answer>\\boxed{`."""
  problems = [
    problem.Problem(f"p{n}", n, f"{n}+1", str(n + 1)) for n in range(5)
  ]
  keys_B2 = np.asarray(
    sampling.rollout_keys(SEED, 0, jnp.arange(5), jnp.zeros(5, jnp.int32))
  )
  scripts = {
    k.tobytes(): [say.text(f"{n}0}}}}rest") + [say.end]]
    for n, k in enumerate(keys_B2)
  }
  sampler = scripted.ScriptedSampler(
    lambda request: scripts[request.key.tobytes()], n_slots=2
  )
  texts = evaluate.draw_from_head(
    sampler, chat, problems, seed=SEED, max_tokens=24
  )
  assert texts == ["00", "10", "20", "30", "40"]
  assert sampler.n_rollouts == 0
  fed = sampler.fed[3]
  prefix = chat.prompt_ids("3+1") + chat.answer_prefix_ids()
  assert fed[: len(prefix)] == prefix


def test_a_head_without_room_says_nothing(chat):
  problems = [problem.Problem("p", 0, "1+1", "2")]
  sampler = scripted.ScriptedSampler(lambda request: [])
  texts = evaluate.draw_from_head(
    sampler, chat, problems, seed=SEED, max_tokens=0
  )
  assert texts == [""] and sampler.n_rollouts == 0
