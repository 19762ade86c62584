"""The agent loop with a scripted sampler: no weights, and tools on command."""

import dataclasses
from concurrent import futures

import jax.numpy as jnp
import numpy as np
import pytest

from roc import layout, rollout
from roc.device import engine as engine_lib
from roc.device import sampling
from roc.host import chat as chat_lib
from roc.host import rewards, tools
from roc.host import tokenizer as tokenizer_lib
from roc.host.tasks import problem

Status, Stop, Role = layout.ToolStatus, layout.StopReason, layout.Role
SEED, STEP = 3, 5


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
  """Answers a program after a number of decode calls; notes what was asked."""

  def __init__(self, delay=lambda code: 0, results=None):
    self.delay = delay
    self.results = results or {}
    self.asked = []
    self.finished = []
    self._waiting = []

  def submit(self, code, *, trajectory="", call_index=0):
    self.asked.append((code, trajectory, call_index))
    future = futures.Future()
    self._waiting.append([self.delay(code), code, future])
    self._release()
    return future

  def tick(self):
    for entry in self._waiting:
      entry[0] -= 1
    self._release()

  def _release(self):
    due = [entry for entry in self._waiting if entry[0] <= 0]
    self._waiting = [entry for entry in self._waiting if entry[0] > 0]
    for _, code, future in due:
      self.finished.append(code)
      future.set_result(self.results.get(code, Result(stdout=f"<{code}>")))


class Sampler:
  """Emits given turns in chunks; keeps the engine's accounts, and checks."""

  def __init__(self, scripts, n_slots=4, chunk=3, sandbox=None):
    self.scripts = scripts  # turns of each rollout, by the bytes of its key
    self.chunk = chunk
    self.sandbox = sandbox
    self.fed = {}  # everything that a slot was given or drew, by key
    self.budget_left = {}
    self._free = list(range(n_slots))
    self._live = {}

  @property
  def n_free(self):
    return len(self._free)

  def submit(self, requests):
    assert len(requests) <= len(self._free)
    slots = [self._free.pop() for _ in requests]
    for slot, request in zip(slots, requests, strict=True):
      key = np.asarray(request.key).tobytes()
      turns = [list(t) for t in self.scripts[key]]
      self.fed[key] = list(request.prompt)
      self._live[slot] = [key, turns, request.budget, True]
    return slots

  def decode(self):
    if self.sandbox is not None:
      self.sandbox.tick()
    drawn = {}
    for slot, live in self._live.items():
      key, turns, budget, is_running = live
      if not is_running:
        continue
      tokens = turns[0][: min(self.chunk, budget)]
      turns[0] = turns[0][len(tokens) :]
      live[2] -= len(tokens)
      live[3] = bool(turns[0]) and live[2] > 0
      self.fed[key] += tokens
      logps = [-0.5 - 0.25 * (t % 3) for t in tokens]
      drawn[slot] = engine_lib.Drawn(tokens, logps, not live[3])
    return drawn

  def extend(self, observations):
    for slot, ids in observations.items():
      live = self._live[slot]
      assert not live[3], "extended while it runs"
      assert len(ids) <= live[2], "beyond the budget"
      live[1].pop(0)
      live[2] -= len(ids)
      live[3] = live[2] > 0
      self.fed[live[0]] += list(ids)

  def release(self, slots):
    for slot in slots:
      key, _, budget, _ = self._live.pop(slot)
      self.budget_left[key] = budget
    self._free += list(slots)


class World:
  """Scripts for N problems of O rollouts, and the loop that runs them."""

  def __init__(self, chat, texts, *, n_slots=4, chunk=3, **limits):
    """`texts[n][o]` are the turns of a rollout, as lists of pieces."""
    self.chat = chat
    self.n_rollouts = len(texts[0])
    self.problems = [
      problem.Problem(f"p{n}", 100 + n, f"{n}+{n}", str(2 * n), "sum")
      for n in range(len(texts))
    ]
    task_B = np.repeat([p.index for p in self.problems], self.n_rollouts)
    rollout_B = np.tile(np.arange(self.n_rollouts), len(texts))
    keys_B2 = np.asarray(
      sampling.rollout_keys(
        SEED, STEP, jnp.asarray(task_B), jnp.asarray(rollout_B)
      )
    )
    flat = [turns for group in texts for turns in group]
    self.keys = [k.tobytes() for k in keys_B2]
    self.scripts = dict(zip(self.keys, flat, strict=True))
    self.limits = rollout.Limits(
      **{"max_turns": 4, "max_tokens": 200, "max_calls": 6, **limits}
    )
    self.n_slots, self.chunk = n_slots, chunk

  def run(self, sandbox=None, score=rewards.score, **kwargs):
    self.sandbox = sandbox or Sandbox()
    self.sampler = Sampler(self.scripts, self.n_slots, self.chunk, self.sandbox)
    self.toolbox = tools.Toolbox(self.sandbox)
    loop = rollout.AgentLoop(
      self.sampler, self.chat, self.toolbox, self.limits, score=score
    )
    groups, self.timing = loop.run(
      self.problems, self.n_rollouts, seed=SEED, step=STEP, **kwargs
    )
    return groups

  def run_one(self, sandbox=None):
    ((episode,),) = self.run(sandbox)
    self.check(episode, self.keys[0])
    return episode

  def check(self, episode, key):
    """What holds for every episode, whatever happened in it."""
    assert len(episode.token_ids) == len(episode.roles) == len(episode.logprobs)
    # Token in, token out: the engine saw the very ids, once each.
    assert episode.token_ids == self.sampler.fed[key]
    for role, logp in zip(episode.roles, episode.logprobs, strict=True):
      assert (logp < 0) == (role == Role.MODEL)
    n_prompt = episode.roles.count(Role.PROMPT)
    used = len(episode) - n_prompt
    assert self.sampler.budget_left[key] == self.limits.max_tokens - used >= 0


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
  assert episode.task_index == 100 and episode.step == STEP
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
  assert world.sandbox.asked == [("print(0)", (STEP, 100, 0), 0)]


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


def test_infra_is_no_wrong_answer(chat, say):
  texts = [[[say.calls("bad"), say.answer("0")], [say.answer("0")]]]
  world = World(chat, texts)
  sandbox = Sandbox(results={"bad": Result(status=Status.INFRA)})
  ((failed, fine),) = world.run(sandbox)
  assert failed.stop_reason == Stop.INFRA
  assert failed.outcome == layout.Outcome.VOID and failed.reward == 0.0
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
  assert [g[0].group_index for g in groups] == [0, 1, 2]
  for episode, key in zip(
    [e for g in groups for e in g], world.keys, strict=True
  ):
    world.check(episode, key)


@pytest.mark.parametrize("n_slots", [1, 2, 9])
@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_schedule_does_not_change_episodes(chat, mixed, n_slots, chunk):
  want = dump(World(chat, mixed).run())
  delay = lambda code: sum(code.encode()) * 7 % 11
  got = World(chat, mixed, n_slots=n_slots, chunk=chunk).run(Sandbox(delay))
  assert dump(got) == want


def test_others_decode_while_one_waits(chat, say):
  texts = [[[say.calls("slow"), say.answer("0")], [say.answer("0")]]]
  world = World(chat, texts, n_slots=2, chunk=1)
  seen = []
  sandbox = Sandbox(lambda code: 60)
  world.run(sandbox, on_finished=lambda n, n_all: seen.append((n, n_all)))
  assert seen == [(1, 2), (2, 2)]
  assert sandbox.finished == ["slow"]
  assert world.timing.generate > 0 and world.timing.tools >= 0


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
  sampler = Sampler(scripts, n_slots=2)
  texts = rollout.draw_from_head(
    sampler, chat, problems, seed=SEED, max_tokens=24
  )
  assert texts == ["00", "10", "20", "30", "40"]
  assert sampler.n_free == 2
  fed = sampler.fed[keys_B2[3].tobytes()]
  prefix = chat.prompt_ids("3+1") + chat.answer_prefix_ids()
  assert fed[: len(prefix)] == prefix
