"""Episodes: built whole or not at all, judged, and the same after JSON."""

import dataclasses
import json

import numpy as np
import pytest

from roc import layout
from roc.host import calls, episode, rewards, tools

ROLE = layout.Role
STATUS = layout.ToolStatus
STOP = layout.StopReason
GOOD = calls.read_call('{"name": "python", "arguments": {"code": "print(7)"}}')


def _finished(chat, stop=STOP.ANSWERED, gold="7"):
  """One call that worked, then the answer 7."""
  out = episode.Episode(task_id="t-1", task_index=1, gold=gold, question="Q")
  out.append_prompt(chat.prompt_ids("Q"))
  turns = [
    [*chat.call_ids(GOOD.raw), chat.turn_end_id],
    [*chat.answer_ids("7"), chat.turn_end_id],
  ]
  for number, ids in enumerate(turns):
    out.append_model(ids, np.linspace(-3, -0.1, len(ids), dtype=np.float32))
    out.record_turn(calls.parse_turn(ids, chat.tokenizer))
    if number == 0:
      out.record_call(tools.ToolOutcome(GOOD, STATUS.OK, "7"))
      out.append_environment(*chat.tool_suffix(["7"]))
  out.finish(stop)
  return out


def test_lists_grow_together_and_only_sampled_tokens_have_log_probs(chat):
  done = _finished(chat)
  assert len(done.token_ids) == len(done.roles) == len(done.logprobs)
  assert len(done) == len(done.token_ids)
  for role, logprob in zip(done.roles, done.logprobs, strict=True):
    assert (logprob != 0) == (role == ROLE.MODEL)
  assert done.n_model_tokens == done.roles.count(ROLE.MODEL) > 0


def test_what_was_sampled_is_what_is_kept(chat):
  out = episode.Episode()
  out.append_prompt([5, 6])
  # Not the ids that encoding the decoded text would give.
  spelt = [chat.tokenizer.encode(c)[0] for c in "print("]
  out.append_model(spelt, [-0.5] * len(spelt))
  assert out.token_ids == [5, 6, *spelt]
  assert spelt != chat.tokenizer.encode("print(")


def test_counts_and_verdict(chat):
  done = _finished(chat)
  assert (done.n_turns, done.n_answers, done.answer) == (2, 1, "7")
  assert not done.has_void_turn
  assert (done.n_judged_calls, done.n_failed_calls) == (1, 0)
  assert (done.outcome, done.reward) == (layout.Outcome.CORRECT, 1.0)
  assert done.verdict == "correct"


@pytest.mark.parametrize(
  ("stop", "gold", "outcome", "verdict"),
  [
    (STOP.ANSWERED, "8", layout.Outcome.WRONG, "wrong"),
    (STOP.MAX_TOKENS, "7", layout.Outcome.WRONG, "truncated"),
    (STOP.MAX_TURNS, "7", layout.Outcome.WRONG, "truncated"),
    (STOP.TOOL_OVERFLOW, "7", layout.Outcome.WRONG, "truncated"),
    (STOP.INFRA, "7", layout.Outcome.VOID, "void"),
    (STOP.CANCELLED, "7", layout.Outcome.VOID, "void"),
  ],
)
def test_three_outcomes(chat, stop, gold, outcome, verdict):
  done = _finished(chat, stop, gold)
  assert (done.outcome, done.reward, done.verdict) == (outcome, 0.0, verdict)
  assert done.is_truncated == (verdict == "truncated")


def test_statuses_count_as_the_layout_says():
  out = episode.Episode()
  for status in (STATUS.OK, STATUS.TIMEOUT, STATUS.REJECTED, STATUS.INFRA):
    out.record_call(tools.ToolOutcome(GOOD, status, ""))
  assert (out.n_judged_calls, out.n_failed_calls) == (3, 2)


def test_a_rejected_call_keeps_its_raw_text():
  out = episode.Episode()
  bad = calls.read_call("{oops")
  out.record_call(tools.ToolOutcome(bad, STATUS.REJECTED, "Invalid"))
  assert out.tool_records[0].code == "{oops"


def test_void_turns_are_remembered(chat):
  out = episode.Episode()
  out.record_turn(calls.parse_turn([], chat.tokenizer))
  out.record_turn(calls.parse_turn(chat.answer_ids("7"), chat.tokenizer))
  assert (out.has_void_turn, out.n_turns, out.n_answers) == (True, 2, 1)


def _started():
  out = episode.Episode()
  out.append_prompt([5])
  return out


@pytest.mark.parametrize(
  ("start", "method", "args", "message"),
  [
    (_started, "append_prompt", ([5],), "first thing"),
    (episode.Episode, "append_prompt", ([],), "at least one"),
    (episode.Episode, "append_model", ([5], [-1.0]), "append_prompt must"),
    (
      episode.Episode,
      "append_environment",
      ([5], [ROLE.TOOL]),
      "append_prompt must",
    ),
    (_started, "append_model", ([5, 6], [-1.0]), "2 sampled ids but 1"),
    (_started, "append_model", ([5], [float("nan")]), "not the log"),
    (_started, "append_model", ([5], [float("-inf")]), "not the log"),
    (_started, "append_model", ([5], [0.5]), "not the log"),
    (_started, "append_environment", ([5], []), "1 ids but 0"),
    (_started, "append_environment", ([5], [ROLE.MODEL]), "TOOL or TEMPLATE"),
    (_started, "append_environment", ([5], [ROLE.PROMPT]), "TOOL or TEMPLATE"),
  ],
)
def test_what_cannot_be_is_refused_whole(start, method, args, message):
  out = start()
  before = list(out.token_ids)
  with pytest.raises(ValueError, match=message):
    getattr(out, method)(*args)
  assert out.token_ids == before
  assert len(out.roles) == len(out.logprobs) == len(before)


def test_nothing_is_appended_after_the_end(chat):
  done = _finished(chat)
  with pytest.raises(ValueError, match="has ended"):
    done.append_model([5], [-1.0])


def test_json_round_trip_is_exact(chat, tokenizer):
  done = _finished(chat)
  done = dataclasses.replace(
    done, advantage=-0.25, kept=False, p_err=0.5, p_format=0.0, why="drawn\nby"
  )
  line = done.to_json(tokenizer)
  assert "\n" not in line
  again = episode.Episode.from_json(line)
  assert again == done
  exact = np.asarray(done.logprobs, np.float32)
  assert (np.asarray(again.logprobs, np.float32) == exact).all()
  assert episode.Episode.from_json(done.to_json()) == done


def test_messages_tell_who_wrote_what(chat, tokenizer):
  row = json.loads(_finished(chat).to_json(tokenizer))
  roles = [message["role"] for message in row["messages"]]
  assert roles == [
    *("prompt", "model", "template", "tool", "template", "model"),
  ]
  text = "".join(message["text"] for message in row["messages"])
  assert text == tokenizer.decode(row["token_ids"])
  assert row["stop_reason"] == "answered"
  assert row["tool_records"][0]["status"] == "ok"


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"roles": None}, "field 'roles' is malformed"),
    ({"roles": [1]}, "equally long"),
    ({"token_ids": "abc"}, "field 'token_ids' is malformed"),
    ({"stop_reason": "bored"}, "field 'stop_reason' is malformed"),
    ({"outcome": 1}, "field 'outcome' is malformed"),
    ({"tool_records": [{}]}, "field 'tool_records' is malformed"),
    ({"step": "1"}, "field 'step' is malformed"),
    ({"kept": 1}, "field 'kept' is malformed"),
  ],
)
def test_a_bad_line_names_file_line_and_field(chat, tmp_path, change, message):
  good = _finished(chat).to_json()
  path = tmp_path / "step_000001.jsonl"
  path.write_text(good + "\n" + json.dumps(json.loads(good) | change) + "\n")
  with pytest.raises(ValueError, match=message) as error:
    list(episode.read_episodes(path))
  assert f"{path} line 2" in str(error.value)


def test_files_are_read_in_order_and_errors_are_clear(chat, tmp_path):
  path = tmp_path / "step.jsonl"
  done = _finished(chat)
  other = dataclasses.replace(done, rollout_id=1)
  path.write_text(done.to_json() + "\n\n" + other.to_json() + "\n")
  assert list(episode.read_episodes(path)) == [done, other]
  row = json.loads(done.to_json())
  del row["reward"]
  for text, message in [
    ("{", "line 1: not JSON"),
    ("[]", "line 1: expected a JSON object"),
    (json.dumps(row), "line 1: field 'reward' is missing"),
  ]:
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
      list(episode.read_episodes(path))
  with pytest.raises(ValueError, match="cannot read .*none"):
    list(episode.read_episodes(tmp_path / "none"))


def test_traces_of_earlier_versions_are_read(chat):
  """They know a problem by its row and an evaluation by its step."""
  done = dataclasses.replace(_finished(chat), task_index=7, step=3)
  row = json.loads(done.to_json())
  for name in ("place", "drawn_by", "temperature", "void_reason"):
    del row[name]
  read = episode.Episode.from_json(json.dumps(row))
  assert (read.place, read.drawn_by, read.temperature) == (7, "train", None)
  evaluated = episode.Episode.from_json(json.dumps(row | {"step": 2**31 - 1}))
  assert evaluated.drawn_by == "evaluate"


def test_it_is_judged_once_it_has_ended(chat):
  verdict = rewards.Verdict(True, "correct", "7", 1)
  running = episode.Episode(gold="7")
  running.append_prompt([1, 2])
  with pytest.raises(ValueError, match="ended"):
    running.judge(verdict)
  running.stop(STOP.ANSWERED)
  assert running.verdict == "" and running.outcome == layout.Outcome.WRONG
  running.judge(verdict)
  assert running.outcome == layout.Outcome.CORRECT and running.reward == 1.0
  failed = dataclasses.replace(running, reward=0.0)
  failed.judge(rewards.Verdict(False, "verifier_timeout", "7", 1))
  assert failed.outcome == layout.Outcome.VOID and failed.reward == 0.0
  failed.stop(STOP.INFRA)
  with pytest.raises(ValueError, match="VOID"):
    failed.judge(verdict)
  assert failed.verdict == "void"
