"""Task files: rows as written, and errors that name file, line and field."""

import json

import pytest

from roc.host.tasks import jsonl

ROW = {"prompt": "What is 2+2?", "answer": "4"}


def _write(tmp_path, *rows):
  path = tmp_path / "task.jsonl"
  lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
  path.write_text("\n".join(lines) + "\n", encoding="utf-8")
  return path


def test_rows_become_problems_in_order(tmp_path):
  path = _write(
    tmp_path,
    {"id": "a", **ROW, "kind": "sum", "info": {"level": 3}},
    "",
    {"prompt": [{"role": "user", "content": "Q\u2028?"}], "answer": 5},
  )
  first, second = jsonl.read_problems(path)
  assert (first.id, first.index, first.kind) == ("a", 0, "sum")
  assert first.info["level"] == 3
  assert (second.question, second.answer, second.index) == ("Q\u2028?", "5", 1)


def test_a_missing_id_comes_from_the_content(tmp_path):
  path = _write(tmp_path, ROW, {**ROW, "prompt": "Q"})
  first, second = jsonl.read_problems(path)
  (again,) = jsonl.read_problems(_write(tmp_path, ROW))
  assert first.id == again.id != second.id
  assert len(first.id) == 16


@pytest.mark.parametrize(
  ("rows", "message"),
  [
    (["{"], "line 1: not a line of JSON"),
    ([ROW, "[1]"], "line 2: expected a JSON object"),
    ([{"answer": "4"}], "line 1: field 'prompt' .* not missing"),
    ([{"prompt": "Q"}], "line 1: field 'answer' .* not missing"),
    ([{**ROW, "prompt": 3}], "field 'prompt'"),
    ([{**ROW, "prompt": " "}], "field 'prompt'"),
    ([{**ROW, "prompt": []}], "field 'prompt'"),
    (
      [{**ROW, "prompt": [{"role": "system", "content": "S"}]}],
      "field 'prompt'",
    ),
    ([{**ROW, "answer": True}], "field 'answer'"),
    ([{**ROW, "answer": ""}], "field 'answer'"),
    ([{**ROW, "answer": 1.5}], "field 'answer'"),
    ([{**ROW, "id": 3}], "field 'id' must be a JSON string"),
    ([{**ROW, "info": []}], "field 'info' must be a JSON object"),
    ([{**ROW, "gold": "4"}], "field 'gold' is unknown"),
    ([ROW, {**ROW, "prompt": "Q"}, ROW], "line 3: field 'id'.* line 1"),
    ([""], "holds no problem"),
  ],
)
def test_a_bad_row_names_file_line_and_field(tmp_path, rows, message):
  path = _write(tmp_path, *rows)
  with pytest.raises(ValueError, match=message) as error:
    jsonl.JsonlTask(path)
  assert str(path) in str(error.value)


def test_a_missing_or_binary_file_is_an_error(tmp_path):
  with pytest.raises(ValueError, match="cannot read task file .*none.jsonl"):
    jsonl.JsonlTask(tmp_path / "none.jsonl")
  path = tmp_path / "bytes.jsonl"
  path.write_bytes(b"\xff\xfe\x00")
  with pytest.raises(ValueError, match="cannot read task file"):
    jsonl.JsonlTask(path)


def test_epochs_follow_each_other(tmp_path):
  rows = [{**ROW, "id": str(i), "prompt": f"Q{i}"} for i in range(5)]
  path = _write(tmp_path, *rows)
  in_order = jsonl.JsonlTask(path)
  assert len(in_order) == 5
  assert [p.index for p in in_order.problems(3, 4)] == [3, 4, 0, 1]
  shuffled = jsonl.JsonlTask(path, seed=1)
  epochs = [[p.index for p in shuffled.problems(5 * e, 5)] for e in range(6)]
  assert all(sorted(epoch) == list(range(5)) for epoch in epochs)
  assert len({tuple(epoch) for epoch in epochs}) > 1
  assert shuffled.problem(12) == jsonl.JsonlTask(path, seed=1).problem(12)
  with pytest.raises(ValueError, match="-1"):
    in_order.problem(-1)
