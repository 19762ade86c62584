"""What supervised training says of conversations that it did not learn."""

import json

import numpy as np
import pytest

from experiments import quickstart
from roc import build, config, heldout, sft
from roc.host import pack

CALL = {
  "type": "function",
  "function": {"name": "python", "arguments": {"code": "print(1)"}},
}
CONVERSATION = {
  "messages": [
    {"role": "user", "content": "1?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "1"},
    {"role": "assistant", "content": r"<answer>\boxed{1}</answer>"},
  ]
}


def settings(path, **changes):
  c = quickstart.get_config("tiny")
  c.log.progress = c.log.tensorboard = False
  c.sft.data = (str(path),)
  c.sft.heldout = 0.25
  c.sft.heldout_every = 20
  for name, value in {"lr": 1e-2, "steps": 60, "rows": 4, **changes}.items():
    setattr(c.sft, name, value)
  return config.resolve(c)


@pytest.fixture(scope="module")
def host():
  return build.host_parts(config.resolve(quickstart.get_config("tiny")))


@pytest.fixture
def files(tmp_path):
  """Eight conversations that differ in nothing but their ids."""
  path = tmp_path / "talks.jsonl"
  rows = [{"id": f"t{i}", **CONVERSATION} for i in range(8)]
  path.write_text("\n".join(map(json.dumps, rows)))
  return path


@pytest.mark.slow
def test_well_formed_calls_are_learnt(files, tmp_path):
  sft.run(settings(files), tmp_path / "run")
  text = (tmp_path / "run" / "metrics.jsonl").read_text()
  rows = [json.loads(line) for line in text.splitlines()]
  measured = [row for row in rows if heldout.LOSS in row]
  assert [row["step"] for row in measured] == [0, 20, 40, 60]
  first, last = measured[0], measured[-1]
  assert first[heldout.N_TURNS] == last[heldout.N_TURNS] == 2
  assert first[heldout.WELL_FORMED] == 0 and last[heldout.WELL_FORMED] == 1
  assert last[heldout.LOSS] < 0.1 * first[heldout.LOSS]


@pytest.mark.slow
def test_nothing_is_measured_where_nothing_is_held_out(files, tmp_path):
  sft.run(settings(files, heldout=0.0, steps=2), tmp_path / "run")
  assert heldout.LOSS not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_calls_that_would_not_run_are_not_well_formed(host):
  toolbox = host.make_toolbox(host.make_sandbox())
  good = '{"name": "python", "arguments": {"code": "x"}}'
  for body, is_ended, want in (
    (good, True, True),
    (good, False, False),
    (good.replace("python", "other"), True, False),
    ("{", True, False),
  ):
    ids = host.chat.call_ids(body)
    ids += host.chat.turn_end_ids if is_ended else []
    assert heldout.is_well_formed(ids, host.chat, toolbox) is want
  words = host.tokenizer.encode("no call") + host.chat.turn_end_ids
  assert not heldout.is_well_formed(words, host.chat, toolbox)


def test_turns_come_with_all_that_stands_before_them(host):
  chat = host.chat
  prompt = chat.prompt_ids("1?")
  turn = chat.assistant_ids("one")
  suffix, roles = chat.user_suffix("2?")
  ids = [*prompt, *turn, *suffix, *turn[:-1]]
  roles = [1] * len(prompt) + [2] * len(turn) + roles + [2] * (len(turn) - 1)
  lesson = pack.Compact("x", np.array(ids, np.int32), np.array(roles, np.int8))
  (found,) = heldout.turns_of(lesson, chat)  # the last is cut off
  assert found.history == prompt and found.ids == turn
