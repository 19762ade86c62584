"""`roc.main convert`: real rows in the real sandbox, stopped and resumed."""

import json
import pathlib

import pytest

from roc import convert, main
from roc.host import chat as chat_lib
from roc.host import conversations, corpus, tools
from roc.host import tokenizer as tokenizer_lib

ROOT = pathlib.Path(__file__).parents[1]
SAMPLE = ROOT / "experiments/data/gsm8k/train.jsonl"


def run(capsys, source, output, *flags):
  argv = [f"--input={source}", f"--output={output}", "--json", *flags]
  assert main.main(["convert", "gsm8k", *argv]) == 0, capsys.readouterr().err
  return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
  path = tmp_path_factory.mktemp("steps") / "calls.jsonl"
  argv = ["convert", "gsm8k", f"--input={SAMPLE}", f"--output={path}"]
  assert main.main(argv) == 0
  return path


def test_the_sample_becomes_traces_that_the_loop_would_read(steps):
  found = list(conversations.read([steps]))
  assert len(found) == 58 and found[0].id == "train-1"
  n_calls = sum(len(m.calls) for c in found for m in c.messages)
  assert n_calls == 204
  # The answers are what Python printed.
  assert found[0].messages[2].content == "24.0"

  class NeverRuns:
    def submit(self, code, **_):
      raise AssertionError

  chat = chat_lib.ChatFormat(tokenizer_lib.quickstart_tokenizer())
  writer = corpus.Writer(chat, tools.Toolbox(NeverRuns()))
  for row, line in zip(
    writer.episodes(found), steps.read_text().splitlines(), strict=True
  ):
    assert row.answers == [json.loads(line)["answer"]]


def test_a_program_makes_one_call(capsys, tmp_path):
  source = tmp_path / "ten.jsonl"
  source.write_text("".join(SAMPLE.read_text().splitlines(True)[:10]))
  found = run(
    capsys,
    source,
    tmp_path / "calls.jsonl",
    *("--style=program", "--renderer=rstar", "--tool_name=calc"),
  )
  rows = list(conversations.read([tmp_path / "calls.jsonl"]))
  assert found["kept"] == found["calls"] == len(rows)
  assert found["rows"] == 10 == found["kept"] + sum(found["dropped"].values())
  for row in rows:
    assert [m.role for m in row.messages] == [
      *("user", "assistant", "tool", "assistant")
    ]
    assert row.messages[1].calls[0].name == "calc" == row.tools[0]
    assert row.messages[2].content.startswith("Tool call success\nstdout: ")


def test_what_does_not_come_out_is_left_out_and_counted(capsys, tmp_path):
  source = tmp_path / "rows.jsonl"
  answers = (
    "<<1+1=2>>2\n#### 2",
    "<<1+1=3>>3\n#### 3",  # not so
    "<<1/0=3>>3\n#### 3",  # no value
    "<<1 1=2>>2\n#### 2",  # no Python
    "two\n#### 2",
    "<<1+1=2>>2\n#### 7",
  )
  source.write_text(
    "\n\n".join(json.dumps({"question": "Q", "answer": a}) for a in answers)
  )
  found = run(capsys, source, tmp_path / "calls.jsonl")
  assert found["dropped"] == {
    "a call failed": 2,
    "a call gave another value": 1,
    "no sums": 1,
    "the last sum is not the answer": 1,
  }
  assert (found["rows"], found["kept"], found["calls"]) == (6, 1, 1)
  (row,) = conversations.read([tmp_path / "calls.jsonl"])
  assert row.id == "rows-1"


class Stopped(BaseException):
  """Ends a command where a kill would."""


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.slow
def test_a_stopped_command_goes_on(steps, capsys, tmp_path, monkeypatch, cut):
  output = tmp_path / "calls.jsonl"
  real, lines = convert._Unfinished.add, []

  def add(self, line, row):
    lines.append(line)
    if len(lines) == 40:
      raise Stopped
    real(self, line, row)

  argv = ["convert", "gsm8k", f"--input={SAMPLE}", f"--output={output}"]
  with monkeypatch.context() as patch:
    patch.setattr(convert._Unfinished, "add", add)
    with pytest.raises(Stopped):
      main.main(argv)
  assert not output.exists()
  unfinished = tmp_path / ".calls.jsonl.unfinished"
  if cut:  # as if the machine had stopped in the middle of a line
    data = unfinished.read_bytes()
    unfinished.write_bytes(data[:-20])
  capsys.readouterr()
  assert main.main(argv) == 0
  shown = capsys.readouterr()
  assert f"going on behind line {38 if cut else 39}" in shown.err
  assert "58 of 64 rows, 204 calls" in shown.out
  assert output.read_bytes() == steps.read_bytes()
  assert list(tmp_path.iterdir()) == [output]


@pytest.mark.slow
def test_work_on_something_else_is_not_gone_on_with(steps, capsys, tmp_path):
  output = tmp_path / "calls.jsonl"
  unfinished = tmp_path / ".calls.jsonl.unfinished"
  for left in ('{"format": 1, "input": "other"}\n{"line": 60}\n', "damaged"):
    unfinished.write_text(left)
    run(capsys, SAMPLE, output)
    assert output.read_bytes() == steps.read_bytes()
    output.unlink()


@pytest.mark.parametrize(
  ("text", "sentence"),
  [
    (None, "cannot read"),
    ("\n", "holds no rows"),
    ('{"question": "Q"}', "rows.jsonl line 1: field 'answer' must be text"),
    (
      json.dumps({"question": "Q", "answer": "#### 3"}),
      "no row can be converted ({'no sums': 1})",
    ),
  ],
)
def test_bad_input_is_one_sentence(text, sentence, capsys, tmp_path):
  source, output = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
  if text is not None:
    source.write_text(text)
  argv = ["convert", "gsm8k", f"--input={source}", f"--output={output}"]
  assert main.main(argv) == 2
  err = capsys.readouterr().err.splitlines()
  assert sentence in err[-1] and err[-1].startswith("error: ")
  assert not output.exists()


def test_nothing_is_overwritten(steps, capsys):
  before = steps.read_bytes()
  argv = ["convert", "gsm8k", f"--input={SAMPLE}", f"--output={steps}"]
  assert main.main(argv) == 2
  assert "exists; name another file, or move it" in capsys.readouterr().err
  assert steps.read_bytes() == before


def test_two_commands_do_not_make_one_file(capsys, tmp_path):
  output = tmp_path / "calls.jsonl"
  with convert._Unfinished(output, {}):
    argv = ["convert", "gsm8k", f"--input={SAMPLE}", f"--output={output}"]
    assert main.main(argv) == 2
  assert "being made by another process" in capsys.readouterr().err
