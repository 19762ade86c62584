"""`roc.main filter`: the trainer's choice, figures by hand, mistakes."""

import errno
import functools
import gzip
import json
import pathlib
import random
import subprocess
import sys

import jax
import numpy as np
import pytest

from roc import choice, groups, layout, main
from roc.core import resample, trajectories
from roc.device import selection, step
from roc.host import episode, pack

S = layout.ToolStatus
MODES = tuple(mode for mode in resample.MODES if mode != "none")


def run(capsys, *argv):
  code = main.main(["filter", *map(str, argv)])
  out, err = capsys.readouterr()
  return code, out, err


def rows_of(capsys, *argv):
  code, out, err = run(capsys, *argv, "--json")
  assert (code, err) == (0, "")
  return [json.loads(line) for line in out.splitlines()]


def write(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def minimal(group, correct, calls=1, failed=0, answers=1, turns=2, **more):
  return {
    "group": group, "correct": correct, "calls": calls, "failed_calls": failed,
    "answers": answers, "turns": turns, **more,
  }  # fmt: skip


def transcript(label, *executions, boxes=1, starts_with="text"):
  """A turn before each execution and one with the answers after the last."""
  segments = []
  for text in executions:
    first = [["text", "Let us see."]] if starts_with == "text" else []
    segments += [*first, ["code", "x = 'Error'"], ["execution", text]]
  answers = " ".join(["\\boxed {2}"] * boxes) or "I give up: Error"
  segments.append(["text", answers])
  return {"label": label, "segments": segments}


# By hand: correct 4 rollouts, 6 calls, 2 failed; wrong 3 rollouts, 4 calls, 3
# failed; the second group is not mixed.
TRANSCRIPTS = [
  {
    "qid": "a",
    "rollouts": [
      transcript(1, "NameError: x", "2"),
      transcript(1, "2", starts_with="code"),
      transcript(0, "Traceback (most recent call last)", "timeout", "3"),
      transcript(0, boxes=0),
      transcript(1, "an error of mine", "ZeroDivisionError", boxes=2),
    ],
  },
  {"qid": "b", "rollouts": [transcript(1, "2"), transcript(1)]},
  {"qid": "c", "rollouts": [transcript(0, "An Exception"), transcript(1)]},
]


def make_episode(rng, place, rollout_id, at_step=3):
  e = episode.Episode(
    place=place, rollout_id=rollout_id, step=at_step,
    token_ids=[1, 2], roles=[1, 2], logprobs=[0.0, -0.5],
    n_turns=rng.randint(1, 4), answers=["4"] * rng.randint(0, 3),
    stop_reason=layout.StopReason.ANSWERED,
    outcome=rng.choice([layout.Outcome.WRONG, layout.Outcome.CORRECT]),
  )  # fmt: skip
  if rng.random() < 0.1:
    e.outcome = layout.Outcome.VOID
  statuses = [s for s in S if s != S.NONE]
  for _ in range(rng.randint(0, 4)):
    status = rng.choice([S.OK, rng.choice(statuses)])
    e.tool_records.append(episode.ToolRecord(status, "python", "1", "1"))
  e.reward = float(e.outcome == layout.Outcome.CORRECT)
  return e


def test_traces_of_earlier_versions_are_grouped_by_row(tmp_path):
  lines = []
  for o in range(2):
    row = json.loads(make_episode(random.Random(o), 0, o).to_json())
    row["task_index"] = 41
    del row["place"], row["drawn_by"]
    lines.append(json.dumps(row))
  path = tmp_path / "step_000003.jsonl"
  path.write_text("\n".join(lines))
  (group,) = groups.read([path]).groups
  assert group.name == "3:41"


def _members(read, name):
  """Places of a group's rollouts, by id."""
  n = [g.name for g in read.groups].index(name)
  at = np.flatnonzero(read.group == n)
  return at[np.argsort(read.rollout_id[at])]


@pytest.mark.parametrize("mode", MODES)
def test_the_choice_is_the_trainer_s(tmp_path, mode):
  rng = random.Random(0)
  drawn = [[make_episode(rng, 40 + n, o) for o in range(8)] for n in range(30)]
  arrays = pack.pack(drawn, n_rollouts=8, n_calls=4, length=8)
  select = functools.partial(
    selection.select,
    filter_config=selection.FilterConfig(mode, n_drawn=8, n_kept=4, eps=0.05),
    loss_config=step.LossConfig(),
    max_tokens=8,
  )
  selected = jax.jit(select)(
    trajectories.Trajectories(**arrays), resample.step_key(seed=5, step=3)
  )
  lines = [e.to_json() for g in drawn for e in g]
  rng.shuffle(lines)
  path = tmp_path / "step_000003.jsonl"
  path.write_text("\n".join(lines))
  read = groups.read([path])
  found = choice.penalties(read)
  keep = choice.choose(read, found.p_total, choice.Rule(mode, 4, 5, 0.05))
  for n, group in enumerate(drawn):
    at = _members(read, f"3:{group[0].place}")
    np.testing.assert_array_equal(keep[at], selected.keep_NO[n])
    for name in ("p_err", "p_format", "p_total"):
      expected = getattr(selected.penalties, f"{name}_NO")[n]
      np.testing.assert_array_equal(getattr(found, name)[at], expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.slow
def test_groups_of_unequal_size_are_chosen_as_each_alone(tmp_path, mode):
  rng = random.Random(1)
  rows = [
    minimal(n, rng.random() < 0.5, 4, rng.randint(0, 4), rollout=o)
    for n in range(30)
    for o in range((2, 5, 9)[n % 3])
  ]
  rng.shuffle(rows)
  read = groups.read([write(tmp_path / "a.jsonl", rows)])
  p_total = choice.penalties(read).p_total
  keep = choice.choose(read, p_total, choice.Rule(mode, seed=2))
  stream = {g.name: g.stream_id for g in read.groups}
  for first, size in enumerate((2, 5, 9)):
    names = [str(n) for n in range(first, 30, 3)]
    at_NO = np.stack([_members(read, name) for name in names])
    alike = functools.partial(resample.resample, mode, n_keep=max(2, size // 2))
    expected_NO = jax.jit(alike)(
      resample.step_key(2, 0),
      read.outcome[at_NO],
      p_total[at_NO],
      rollout_id_NO=read.rollout_id[at_NO],
      group_id_N=np.array([stream[name] for name in names]),
    )
    np.testing.assert_array_equal(keep[at_NO], expected_NO)


def test_transcripts_by_hand(tmp_path, capsys):
  path = write(tmp_path / "groups.jsonl", TRANSCRIPTS)
  rows = rows_of(capsys, path, "--mode=none")
  everything, mixed = rows[:2]
  assert everything["groups"] == 3 and mixed["groups"] == 2
  for sign, n, calls, failed, dirty, bare in (
    ("correct", 6, 6, 2, 2, 2),
    ("wrong", 3, 4, 3, 2, 1),
  ):
    for side in ("before", "after"):
      values = everything[sign][side]
      assert values["rollouts"] == n
      assert (values["calls"], values["failed_calls"]) == (calls, failed)
      assert values["error_share"] == pytest.approx(failed / calls)
      assert (values["with_failure"], values["without_call"]) == (dirty, bare)
  assert mixed["correct"]["before"]["calls"] == 5
  shown = rows_of(capsys, path, "--group=a", "--mode=sort")
  facts = [
    [r[k] for k in ("calls", "failed_calls", "answers", "turns")] for r in shown
  ]
  assert facts == [
    [2, 1, 1, 3], [1, 0, 1, 2], [3, 2, 1, 4], [0, 0, 0, 1], [2, 1, 2, 3],
  ]  # fmt: skip
  # One clean correct rollout and the first wrong one.
  assert [r["kept"] for r in shown] == [False, True, True, False, False]
  assert shown[4]["p_total"] == pytest.approx(0.5 + 1 / 3)
  assert shown[1]["why"] == "kept: correct, p 0.00"


def test_infra_calls_count_for_nothing(tmp_path, capsys):
  rng = random.Random(0)
  group = [make_episode(rng, 7, o) for o in range(4)]
  for e, statuses in zip(
    group,
    ([S.INFRA], [S.INFRA, S.OK], [S.TIMEOUT, S.INFRA], [S.REJECTED]),
    strict=True,
  ):
    e.outcome = layout.Outcome.CORRECT
    e.tool_records = [episode.ToolRecord(s, "", "", "") for s in statuses]
  path = tmp_path / "t.jsonl"
  path.write_text("\n".join(e.to_json() for e in group))
  shown = rows_of(capsys, path, "--group=3:7")
  assert [r["calls"] for r in shown] == [0, 1, 1, 1]
  assert [r["p_err"] for r in shown] == [0.5, 0.0, 1.0, 1.0]


def test_all_modes_and_their_quotas(tmp_path, capsys):
  rows = [
    minimal(f"g{n}", o < n, 2, o % 3, rollout=o)
    for n in range(9)
    for o in range(8)
  ]
  found = rows_of(capsys, write(tmp_path / "a.jsonl", rows), "--all")
  assert {r["mode"] for r in found} == set(resample.MODES)
  quotas = {
    m: [r["correct_kept"] for r in found
        if r["row"] == "quota" and r["mode"] == m]
    for m in resample.MODES
  }  # fmt: skip
  # Halves to even, and never without the last of a sign.
  assert quotas["sort"] == [0, 1, 1, 2, 2, 2, 3, 3, 4]
  assert quotas["inverse"] == [0, 1, 1, 2, 2, 3, 3, 3, 4]
  assert quotas["none"] == list(range(9))
  assert sum(quotas["uniform"]) > 0
  sort = next(r for r in found if r["row"] == "mode" and r["mode"] == "sort")
  assert sort["kept"] == 36 and sort["groups_mixed_after"] == 7
  before, after = sort["correct"]["before"], sort["correct"]["after"]
  assert after["error_share"] < before["error_share"]


def test_for_people(tmp_path, capsys):
  path = write(tmp_path / "groups.jsonl", TRANSCRIPTS)
  code, out, _ = run(capsys, path, "--all")
  assert code == 0 and "3 groups, 9 rollouts, 10 tool calls" in out
  assert all(mode in out for mode in resample.MODES)
  code, out, _ = run(capsys, path, "--group=b")
  assert "of one outcome: with equal rewards nothing to learn from" in out
  code, out, _ = run(capsys, path, "--group=a", "--all")
  assert code == 0 and "uniform" in out


def test_gzip_is_read_and_written_and_kept_lines_can_be_read_again(
  tmp_path, capsys
):
  path = tmp_path / "groups.jsonl.gz"
  path.write_bytes(
    gzip.compress("\n\n".join(map(json.dumps, TRANSCRIPTS)).encode())
  )
  kept = tmp_path / "kept.jsonl.gz"
  assert run(capsys, path, f"--output={kept}")[0] == 0
  text = gzip.decompress(kept.read_bytes()).decode()
  lines = [json.loads(line) for line in text.splitlines()]
  assert [len(x["rollouts"]) for x in lines] == [2, 2, 2]
  assert (
    lines[0]["rollouts"][0]["segments"]
    == (TRANSCRIPTS[0]["rollouts"][1]["segments"])
  )
  assert lines[0]["rollouts"][0]["why"] == "kept: correct, p 0.00"
  first = rows_of(capsys, kept, "--mode=none")[0]
  assert first["rollouts"] == first["kept"] == 6
  assert sorted(p.name for p in tmp_path.iterdir()) == [path.name, kept.name]


def test_kept_traces_are_traces_with_this_choice(tmp_path, capsys):
  rng = random.Random(3)
  drawn = [make_episode(rng, n, o) for n in range(5) for o in range(6)]
  for e in drawn:
    e.kept, e.advantage, e.why = True, 1.0, "of another filter"
  path, kept = tmp_path / "t.jsonl", tmp_path / "kept.jsonl"
  path.write_text("\n".join(e.to_json() for e in drawn))
  shown = [
    row
    for n in range(5)
    for row in rows_of(
      capsys, path, f"--group=3:{n}", f"--output={kept}", "--mode=inverse"
    )
  ]
  expected = [r for r in shown if r["kept"]]
  found = list(episode.read_episodes(kept))
  assert 0 < len(found) < len(drawn)
  assert [f"3:{e.place} {e.rollout_id}" for e in found] == [
    f"{r['group']} {r['rollout']}" for r in expected
  ]
  for e, row in zip(found, expected, strict=True):
    assert e.kept and e.advantage is None
    assert (e.p_total, e.why) == (row["p_total"], row["why"])


@pytest.mark.parametrize("name", ["kept.png", "kept.svg"])
@pytest.mark.parametrize("flags", [("--all",), ("--mode=none",)])
def test_pictures(tmp_path, capsys, name, flags):
  path = write(tmp_path / "groups.jsonl", TRANSCRIPTS)
  assert run(capsys, path, f"--plot={tmp_path / name}", *flags)[0] == 0
  start = (tmp_path / name).read_bytes()[:5]
  assert start in (b"\x89PNG\r", b"<?xml")


def test_directory_without_its_evaluation(tmp_path, capsys):
  rng = random.Random(0)
  rollouts = tmp_path / "rollouts"
  rollouts.mkdir()
  for name, at_step, n in (("eval", 1, 1), ("step", 1, 4), ("step", 2, 4)):
    group = [make_episode(rng, 7, o, at_step) for o in range(n)]
    for e in group:
      e.drawn_by = "evaluate" if name == "eval" else "train"
    text = "\n".join(e.to_json() for e in group)
    (rollouts / f"{name}_{at_step:06d}.jsonl").write_text(text)
  (tmp_path / "metrics.jsonl").write_text('{"step": 0}')
  for directory in (rollouts, tmp_path):  # the rollouts of a run, the run
    assert rows_of(capsys, directory)[0]["groups"] == 2
  both = [rollouts / f"{name}_000001.jsonl" for name in ("eval", "step")]
  names = [g.name for g in groups.read(both).groups]
  assert names == ["eval:1:7", "1:7"]


GOOD = json.dumps(minimal("a", True))


@pytest.mark.parametrize(
  ("text", "sentence"),
  [
    ("", "a.jsonl holds no rollout"),
    ("\n \n", "a.jsonl holds no rollout"),
    ("{", "line 1: not JSON"),
    ("[1]", "line 1: no known format"),
    ('{"problem": 1}', "line 1: no known format"),
    (f"{GOOD}\nnull", "line 2: expected an object with 'correct'"),
    (f"{GOOD}\n{{}}", "line 2: field 'correct' is missing"),
    (GOOD.replace("correct", "corect"), "(did you mean corect?)"),
    (GOOD.replace("true", "2"), "'correct' must be true, false or null"),
    (GOOD.replace("true", "[1]"), "'correct' must be true, false or null"),
    (GOOD.replace('"a"', "1.5"), "'group' must be a name or a number"),
    (GOOD.replace('"calls": 1', '"calls": -1'), "'calls' must be a whole"),
    (GOOD.replace('"calls": 1', '"calls": true'), "'calls' must be a whole"),
    (GOOD.replace('_calls": 0', '_calls": 2'), "from 0 to 1, not 2"),
    (GOOD, "group a has 1 rollout, and 2 are to be kept"),
    ('{"qid": "a", "rollouts": []}', "the group is empty"),
    ('{"rollouts": [{"label": 1, "segments": []}]}', "'qid' is missing"),
    ('{"qid": "a", "rollouts": [{"label": 1}]}', "rollout 0 of the group"),
    ('{"qid": "a", "rollouts": [{"label": 3}]}', "'label' must be 0 or 1"),
    (
      '{"qid": "a", "rollouts": [{"label": 1, "segments": [["x", "y"]]}]}',
      'code or execution and its text, not ["x", "y"]',
    ),
    ('{"tool_records": [{"status": "fine"}]}', "no status of a tool call"),
    ('{"tool_records": [{"status": [1]}]}', "no status of a tool call"),
    ('{"tool_records": [], "outcome": "good"}', "'outcome' must be one of"),
    ('{"tool_records": {}, "outcome": "wrong"}', "must be a list"),
  ],
)  # fmt: skip
def test_bad_files(tmp_path, capsys, text, sentence):
  (tmp_path / "a.jsonl").write_text(text)
  code, out, err = run(capsys, tmp_path / "a.jsonl", "--json")
  assert (code, out) == (2, "") and sentence in err
  assert err.count("\n") == 1 and "a.jsonl" in err


def test_bytes_that_are_no_text_and_damaged_gzip(tmp_path, capsys):
  path = tmp_path / "a.jsonl"
  path.write_bytes(b"\xff\n")
  assert "line 1: it is not UTF-8" in run(capsys, path)[2]
  path.write_bytes(gzip.compress(GOOD.encode() * 99)[:-9])
  assert "cannot read" in run(capsys, path)[2]
  assert "cannot read" in run(capsys, tmp_path / "none.jsonl")[2]
  (tmp_path / "empty").mkdir()
  assert "holds no *.jsonl" in run(capsys, tmp_path / "empty")[2]


def test_a_rollout_that_is_there_twice(tmp_path, capsys):
  rows = [minimal("a", o < 2, rollout=o) for o in (0, 1, 2, 1)]
  code, _, err = run(capsys, write(tmp_path / "a.jsonl", rows))
  assert code == 2 and "line 4: rollout 1 of group a is also" in err
  assert "line 2;" in err


def test_bad_lines_and_small_groups_can_be_passed_over(tmp_path, capsys):
  path = tmp_path / "a.jsonl"
  good = [json.dumps(minimal("b", o < 2)) for o in range(4)]
  path.write_text("\n".join(["{", GOOD, *good[:2], "[]", *good[2:]]))
  kept = tmp_path / "kept.jsonl"
  code, out, err = run(capsys, path, "--skip-bad", "--json", f"--output={kept}")
  assert code == 0 and "passed over 2 bad lines" in err
  assert "passed over 1 groups that are too small" in err
  assert json.loads(out.splitlines()[0])["rollouts"] == 4
  assert len(kept.read_text().splitlines()) == 2
  path.write_text(GOOD)
  assert "no group of" in run(capsys, path, "--skip-bad")[2]
  path.write_text("{")
  assert "no line is left" in run(capsys, path, "--skip-bad")[2]


@pytest.mark.parametrize(
  ("flags", "sentence"),
  [
    (["--kept=1"], "needs at least 2"),
    (["--kept=3"], "group b has 2 rollouts, and 3 are to be kept; lower"),
    (["--kept=x"], "invalid int value"),
    (["--mode=best"], "invalid choice: 'best'"),
    (["--eps=0"], "--eps is 0.0"),
    (["--eps=nan"], "--eps is nan"),
    (["--seed=-1"], "--seed is -1"),
    (["--min_pos=2"], "must fit together into --kept, here 2"),
    (["--mode=none", "--kept=2"], "leave --kept out"),
    (["--all", "--output=o.jsonl"], "--output needs one --mode"),
    (["--all", "--mode=sort"], "not allowed with"),
    (["--plot=kept.jpg"], "must end in .png or .svg"),
    (["--plot=/nowhere/kept.png"], "there is no directory /nowhere"),
    (["--group=z"], "there is no group z; the first are a, b, c"),
  ],
)
def test_bad_flags(tmp_path, capsys, flags, sentence):
  path = write(tmp_path / "g.jsonl", TRANSCRIPTS)
  code, out, err = run(capsys, path, *flags)
  assert (code, out) == (2, "") and err.count("\n") == 1
  assert sentence in err
  assert [p.name for p in tmp_path.iterdir()] == ["g.jsonl"]


def test_what_is_read_is_not_overwritten(tmp_path, capsys):
  path = write(tmp_path / "g.jsonl", TRANSCRIPTS)
  before = path.read_bytes()
  err = run(capsys, path, f"--output={tmp_path / 'x' / '..' / 'g.jsonl'}")[2]
  assert "there is no directory" in err or "would overwrite" in err
  assert "would overwrite" in run(capsys, path, f"--output={path}")[2]
  assert path.read_bytes() == before


def test_a_file_system_that_is_read_only(tmp_path, monkeypatch, capsys):
  path = write(tmp_path / "g.jsonl", TRANSCRIPTS)

  def refuse(self, *_, **__):
    raise OSError(errno.EROFS, "Read-only file system", str(self))

  monkeypatch.setattr(pathlib.Path, "unlink", refuse)
  (tmp_path / "there").mkdir()  # cannot be replaced by a file
  code, _, err = run(capsys, path, f"--output={tmp_path / 'there'}")
  assert code == 2 and err.count("\n") == 1
  assert f"cannot write {tmp_path / 'there'}" in err


def test_the_seed_draws_and_sort_does_not(tmp_path, capsys):
  rows = [minimal(n, o % 2, 2, o % 3) for n in range(30) for o in range(8)]
  path = write(tmp_path / "a.jsonl", rows)
  read = groups.read([path])
  p_total = choice.penalties(read).p_total
  keeps = {
    (mode, seed): choice.choose(read, p_total, choice.Rule(mode, 4, seed))
    for mode in MODES
    for seed in (0, 1)
  }
  for mode in MODES:
    is_same = np.array_equal(keeps[mode, 0], keeps[mode, 1])
    assert is_same == (mode == "sort")


def test_step_key_is_a_stream_of_its_own():
  at = lambda *a: jax.random.key_data(resample.step_key(*a)).tolist()
  assert len({tuple(at(s, t)) for s in (0, 1) for t in (0, 1, 2)}) == 6


def test_whoever_reads_the_output_may_stop(tmp_path):
  path = write(tmp_path / "a.jsonl", [minimal(n // 2, n % 2) for n in range(4)])
  command = [sys.executable, "-m", "roc.main", "filter", str(path), "--json"]
  with subprocess.Popen(
    command, stdout=subprocess.PIPE, stderr=subprocess.PIPE
  ) as child:
    child.stdout.close()
    said = child.stderr.read()
  assert (child.returncode, said) == (0, b"")


def test_no_group_is_mixed(tmp_path, capsys):
  rows = [minimal("a", True), minimal("a", True)]
  code, out, _ = run(capsys, write(tmp_path / "a.jsonl", rows))
  assert code == 0 and "no group has correct and wrong rollouts" in out
  # warnings are errors: an axis without a group has a width
  assert (
    run(capsys, tmp_path / "a.jsonl", f"--plot={tmp_path / 'p.svg'}")[0] == 0
  )


def test_mode_none_takes_groups_of_one(tmp_path, capsys):
  path = write(tmp_path / "a.jsonl", [minimal(n, n % 2) for n in range(3)])
  first = rows_of(capsys, path, "--mode=none")[0]
  assert (first["groups"], first["kept"]) == (3, 3)
