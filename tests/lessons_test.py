"""What supervised training reads: files, lengths, what is held out."""

import gzip
import json

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import quickstart
from roc import build, config, errors, layout, lessons, runlog, sft

ROLE = layout.Role


def settings(**changes):
  c = quickstart.get_config("tiny")
  c.log.progress = c.log.tensorboard = False
  for name, value in changes.items():
    section, _, key = name.rpartition("__")
    setattr(getattr(c, section) if section else c, key, value)
  return config.resolve(c)


def conversation(i, n_words=1):
  call = {"name": "python", "arguments": {"code": f"print({i}*7)"}}
  return {
    "id": f"row-{i}",
    "messages": [
      {"role": "user", "content": f"What is {i} * 7?"},
      {"role": "assistant", "content": "", "tool_calls": [call]},
      {"role": "tool", "content": str(i * 7)},
      {
        "role": "assistant",
        "content": "word " * n_words + f"<answer>\\boxed{{{i * 7}}}</answer>",
      },
    ],
  }


@pytest.fixture
def data(tmp_path):
  path = tmp_path / "data.jsonl"
  rows = [conversation(i) for i in range(1, 21)]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def read(tmp_path, **changes):
  cfg = settings(**changes)
  host = build.host_parts(cfg)
  with build.claim(cfg, host, tmp_path / "run", "sft") as claim:
    return lessons.read(cfg, host, tmp_path / "run", claim)


def test_every_conversation_is_learnt_or_held_out(data, tmp_path, capsys):
  found = read(tmp_path, sft__data=(str(data),), sft__heldout=0.25)
  assert len(found.heldout) == 5 and len(found.learnt) == 15
  names = [x.task_id for x in found.learnt], [x.task_id for x in found.heldout]
  assert sorted(names[0] + names[1]) == sorted(f"row-{i}" for i in range(1, 21))
  assert "15 conversations to learn and 5 held out" in capsys.readouterr().out
  again = read(tmp_path, sft__data=(str(data),), sft__heldout=0.25)
  assert [x.task_id for x in again.heldout] == names[1]
  assert all({ROLE.MODEL, ROLE.TOOL} <= set(x.roles) for x in found.learnt)


@pytest.mark.parametrize(
  ("rule", "n", "longest"), [("drop", 20, 60), ("truncate", 21, 64)]
)
def test_what_is_too_long_is_counted_and_said(
  rule, n, longest, data, tmp_path, capsys
):
  with data.open("a") as file:
    file.write(json.dumps(conversation(99, n_words=80)) + "\n")
  found = read(
    tmp_path, sft__data=(str(data),), sft__length=64, sft__overlong=rule
  )
  assert len(found.learnt) == n
  assert max(len(x.token_ids) for x in found.learnt) <= longest
  said = capsys.readouterr().out
  assert "1 of 21 lessons are longer than config.sft.length=64" in said
  assert "row-99" in said
  assert ("left out" if rule == "drop" else "cut off there") in said


def test_what_is_cut_before_the_model_speaks_is_left_out(
  data, tmp_path, capsys
):
  long = conversation(5)
  long["messages"][0]["content"] = "word " * 80
  with data.open("a") as file:
    file.write(json.dumps(long) + "\n")
  found = read(
    tmp_path, sft__data=(str(data),), sft__length=64, sft__overlong="truncate"
  )
  assert len(found.learnt) == 20
  assert "1 with nothing to learn by then left out" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("changes", "sentence"),
  [
    ({"sft__length": 32}, "config.sft.length=32 .the longest, row-.*overlong"),
    ({"sft__heldout": 0.99}, "leave nothing to learn from"),
    (
      {"sft__length": 16, "sft__overlong": "drop"},
      "20 of 20 lessons .* nothing is left; raise it",
    ),
  ],
)
def test_what_cannot_be_is_one_sentence(changes, sentence, data, tmp_path):
  with pytest.raises(errors.UserError, match=sentence):
    read(tmp_path, sft__data=(str(data),), **changes)


def test_shards_are_one_set(data, tmp_path):
  """Gzip or not, in order of their names."""
  lines = data.read_bytes().splitlines(keepends=True)
  (tmp_path / "part-1.jsonl").write_bytes(b"".join(lines[10:]))
  first = gzip.compress(b"".join(lines[:10]))
  (tmp_path / "part-0.jsonl.gz").write_bytes(first)
  whole, pattern = (str(data),), (str(tmp_path / "part-*.jsonl*"),)
  found = lessons.paths(settings(sft__data=pattern))
  assert [p.name for p in found] == ["part-0.jsonl.gz", "part-1.jsonl"]
  (tmp_path / "a").mkdir()
  (tmp_path / "b").mkdir()
  ids = lambda x: [(y.task_id, y.token_ids.tolist()) for y in x.learnt]
  assert ids(read(tmp_path / "a", sft__data=whole)) == ids(
    read(tmp_path / "b", sft__data=pattern)
  )


def test_a_bad_line_is_named_before_any_work(data, tmp_path):
  with data.open("a") as file:
    file.write('{"messages": []}\n')
  cfg = settings(sft__data=(str(data),))
  with pytest.raises(errors.UserError, match=r"data.jsonl line 21: field 'mes"):
    sft.run(cfg, tmp_path / "run")
  cfg = settings(sft__data=(str(tmp_path / "none.jsonl"),))
  with pytest.raises(errors.UserError, match="none.jsonl does not exist"):
    sft.run(cfg, tmp_path / "other")


@pytest.mark.slow
def test_a_run_learns_from_files_and_knows_them_again(data, tmp_path):
  cfg = settings(
    sft__data=(str(data),), sft__steps=60, sft__lr=1e-2, sft__warmup=2
  )
  sft.run(cfg, tmp_path / "run")
  rows = runlog.read_metrics(tmp_path / "run" / runlog.METRICS)
  assert [row["step"] for row in rows] == list(range(1, 61))
  assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
  assert not (tmp_path / "run" / lessons.DEMONSTRATIONS).exists()
  # The same file elsewhere is the same run; other contents are another one.
  moved = data.rename(tmp_path / "moved.jsonl")
  sft.run(settings(**_same(cfg, moved)), tmp_path / "run")
  moved.write_text(json.dumps(conversation(3)) + "\n")
  with pytest.raises(errors.UserError, match="sft.data"):
    sft.run(settings(**_same(cfg, moved)), tmp_path / "run")


def _same(cfg, path):
  return {
    "sft__data": (str(path),),
    "sft__steps": cfg.sft.steps,
    "sft__lr": cfg.sft.lr,
    "sft__warmup": cfg.sft.warmup,
  }


def test_only_the_assistant_carries_loss(data, tmp_path):
  """The weight is 0 at prompts, tools, template and padding."""
  from roc.device import step as step_lib
  from roc.host import pack

  found = read(tmp_path, sft__data=(str(data),))
  rows = pack.pack_sft(found.learnt, 128)
  weight_BT = np.asarray(step_lib.sft_weights(jnp.asarray(rows["roles_BT"])))
  is_model_BT = rows["roles_BT"] == ROLE.MODEL
  assert (weight_BT[~is_model_BT] == 0).all()
  assert weight_BT.sum() == pytest.approx(1)
  assert is_model_BT.sum() == sum(
    (x.roles == ROLE.MODEL).sum() for x in found.learnt
  )
