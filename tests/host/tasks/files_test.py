"""Task files: rows as written, choices, and errors that say where."""

import gzip
import json
import pathlib

import pyarrow
import pyarrow.parquet
import pytest

from roc.host.tasks import files, formats, instructions, mixture, order, overlap
from roc.host.tasks import rows as rows_lib

ROW = {"prompt": "What is 2+2?", "answer": "4"}


def _write(tmp_path, *lines, name="task.jsonl"):
  path = tmp_path / name
  text = [row if isinstance(row, str) else json.dumps(row) for row in lines]
  path.write_text("\n".join(text) + "\n", encoding="utf-8")
  return path


def _sums(tmp_path, n, name="task.jsonl", first=0, **columns):
  made = [
    {"id": f"p{i}", "prompt": f"What is {i}+1?", "answer": i + 1, **columns}
    for i in range(first, first + n)
  ]
  return _write(tmp_path, *made, name=name)


def _ids(task):
  return [p.id for p in task.all_problems]


def test_rows_become_problems_in_order(tmp_path):
  path = _write(
    tmp_path,
    {"id": "a", **ROW, "kind": "sum", "info": {"level": 3}},
    "",
    {"prompt": [{"role": "user", "content": "Q\u2028?"}], "answer": 5},
  )
  first, second = files.FileTask(path).problems(0, 2)
  assert (first.id, first.index, first.kind) == ("a", 0, "sum")
  assert first.info["level"] == 3
  assert (second.question, second.answer, second.index) == ("Q\u2028?", "5", 1)


def test_boxes_and_sentences_around_answers_are_taken_off(tmp_path):
  written = ("$\\boxed{4}$", "The answer is 4.", "2 + 2 = 4 #### 4", "x = 4")
  path = _write(
    tmp_path,
    *({"id": str(i), **ROW, "answer": a} for i, a in enumerate(written)),
  )
  answers = [p.answer for p in files.FileTask(path).all_problems]
  assert answers == ["4", "4", "4", "x = 4"]


def test_a_missing_id_comes_from_the_content(tmp_path):
  path = _write(tmp_path, ROW, {**ROW, "prompt": "Q"})
  first, second = files.FileTask(path).all_problems
  (again,) = files.FileTask(_write(tmp_path, ROW)).all_problems
  assert first.id == again.id != second.id
  assert len(first.id) == 16


@pytest.mark.parametrize(
  ("lines", "message"),
  [
    (["{"], "line 1: not JSON"),
    ([ROW, "[1]"], "line 2: expected a JSON object"),
    (["{}"], "line 1: its fields .none. are those of no known format"),
    ([ROW, {"answer": "4"}], "line 2: field 'prompt' .* not missing"),
    ([ROW, {"prompt": "Q"}], "line 2: field 'answer' .* not missing"),
    ([{**ROW, "prompt": 3}], "field 'prompt'"),
    ([{**ROW, "prompt": " "}], "field 'prompt'"),
    ([{**ROW, "prompt": []}], "field 'prompt'"),
    (
      [{**ROW, "prompt": [{"role": "system", "content": "S"}]}],
      "field 'prompt'",
    ),
    ([{**ROW, "answer": True}], "field 'answer'"),
    ([{**ROW, "answer": ""}], "field 'answer'"),
    ([{**ROW, "answer": None}], "line 1: field 'answer'.* not None"),
    ([{**ROW, "id": 3}], "field 'id' must be a JSON string"),
    ([{**ROW, "info": []}], "field 'info' must be a JSON object"),
    ([ROW, {**ROW, "gold": "4"}], "line 2: field 'gold' is unknown"),
    ([ROW, {**ROW, "prompt": "Q"}, ROW], "line 3: field 'id'.* line 1"),
    ([""], "holds no problem"),
    (["[" * 100_000], "line 1: not JSON"),
    ([{"problem": "Q", "solution": "4"}], r"no \\boxed answer"),
    ([{"question": "Q", "answer": "#### "}], "must end with"),
  ],
)
def test_what_is_wrong_is_said_with_its_place(tmp_path, lines, message):
  path = _write(tmp_path, *lines)
  with pytest.raises(ValueError, match=f"task.jsonl.*{message}"):
    files.FileTask(path)


def test_files_that_cannot_be_read(tmp_path):
  (tmp_path / "bad.jsonl").write_bytes(b'{"prompt": "\xff"}')
  (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b"{}" * 999)[:20])
  (tmp_path / "text.parquet").write_text("PAR1 no")
  (tmp_path / "one.json").write_text('{"prompt": "Q"}')
  (tmp_path / "table.csv").write_text("a,b")
  for name, message in (
    ("none.jsonl", "does not exist"),
    ("bad.jsonl", "not UTF-8"),
    ("cut.jsonl.gz", "damaged"),
    ("text.parquet", "no parquet file"),
    ("one.json", "list of rows"),
    ("table.csv", "none of .jsonl"),
    ("hf://models/a/b/c", "hf://datasets/ORG/NAME"),
  ):
    name = name if name.startswith("hf:") else str(tmp_path / name)
    with pytest.raises(ValueError, match=message):
      files.FileTask(name)


@pytest.mark.parametrize(
  ("row", "name", "want"),
  [
    (
      {
        "data_source": "deepscaler",
        "prompt": [
          {"role": "system", "content": "S"},
          {"role": "user", "content": "Q"},
        ],
        "ability": "math",
        "reward_model": {"ground_truth": "7", "style": "rule"},
        "extra_info": {"index": 3},
      },
      "verl",
      ("Q", "7", "deepscaler"),
    ),
    ({"prompt": "Q", "ground_truth": "1", "x": 2}, "trl", ("Q", "1", "")),
    (
      {"prompt": "Q", "solution": r"so \boxed{\frac12}.", "level": 1},
      "trl",
      ("Q", r"\frac12", ""),
    ),
    (
      {"question": "Q", "answer": "48/2 = <<48/2=24>>24\n#### 1,024"},
      "gsm8k",
      ("Q", "1024", ""),
    ),
    (
      {"problem": "Q", "solution": r"\boxed{8}", "answer": "9", "type": "T"},
      "math",
      ("Q", "9", "T"),
    ),
    ({"problem": "Q", "solution": r"\boxed{8}"}, "math", ("Q", "8", "")),
    ({"id": 0, "problem": "Q", "answer": 27.0}, "math", ("Q", "27", "")),
    ({"problem": "Q", "expected_answer": "70"}, "math", ("Q", "70", "")),
    (
      {"ID": "c1", "Body": "A", "Question": "B?", "Answer": 5.5, "Type": "T"},
      "svamp",
      ("A. B?", "5.5", "T"),
    ),
    ({"input": "Q", "target": -3.0, "code": "x"}, "gsm_hard", ("Q", "-3", "")),
  ],
)
def test_rows_of_other_projects(row, name, want):
  row = rows_lib.Row("f line 1", row)
  assert formats.detect(row) == name
  draft = formats.read(row, name)
  assert (draft.question, draft.answer, draft.kind) == want


def test_json_parquet_and_gzip_are_the_same_rows(tmp_path):
  made = [{"prompt": f"Q{i}", "answer": str(i)} for i in range(5)]
  text = "".join(json.dumps(row) + "\n" for row in made)
  (tmp_path / "a.jsonl").write_text(text)
  (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text.encode()))
  (tmp_path / "a.json").write_text(json.dumps(made))
  table = pyarrow.Table.from_pylist(made)
  pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
  want = files.FileTask(tmp_path / "a.jsonl").all_problems
  for name in ("a.jsonl.gz", "a.json", "a.parquet"):
    assert files.FileTask(tmp_path / name).all_problems == want


def test_several_files_are_one_set(tmp_path):
  a, b = _sums(tmp_path, 3, "a.jsonl"), _sums(tmp_path, 2, "b.jsonl", first=7)
  task = files.FileTask([str(a), str(b)])
  assert _ids(task) == ["p0", "p1", "p2", "p7", "p8"]
  assert [p.index for p in task.all_problems] == [0, 1, 2, 3, 4]
  with pytest.raises(ValueError, match=r"a.jsonl line 1: .*'p0' is also on"):
    files.FileTask([str(a), str(a)])
  twice = files.FileTask([str(a), str(a)], duplicates="drop")
  assert len(twice) == 3 and "3 rows are there already" in twice.notes[0]


def test_bad_rows_are_counted_and_left_out(tmp_path):
  path = _write(tmp_path, ROW, {"prompt": "Q", "answer": None}, {"prompt": "R"})
  task = files.FileTask(path, bad_rows="drop")
  assert len(task) == 1
  assert task.notes == [f"{path}: 2 rows cannot be understood: line 2; line 3"]


# --------------------------------------------------------------------- order


def test_every_place_of_the_endless_order_is_repeatable(tmp_path):
  path = _sums(tmp_path, 10)
  in_order = files.FileTask(path)
  assert [p.id for p in in_order.problems(8, 4)] == ["p8", "p9", "p0", "p1"]
  shuffled = files.FileTask(path, seed=1)
  epochs = [[p.id for p in shuffled.problems(10 * i, 10)] for i in range(3)]
  assert all(sorted(epoch) == sorted(_ids(in_order)) for epoch in epochs)
  assert epochs[0] != epochs[1] != epochs[2]
  assert shuffled.problem(12) == files.FileTask(path, seed=1).problem(12)
  other = [p.id for p in files.FileTask(path, seed=2).problems(0, 10)]
  assert other != epochs[0]
  with pytest.raises(ValueError, match="index must be >= 0"):
    shuffled.problem(-1)


@pytest.mark.slow
def test_a_mixture_keeps_to_its_weights(tmp_path):
  _sums(tmp_path, 7, "a.jsonl")
  _sums(tmp_path, 50, "b.jsonl", first=100)
  make = lambda name: lambda seed: files.FileTask(tmp_path / name, seed=seed)
  task = mixture.MixedTask(
    [make("a.jsonl"), make("b.jsonl")], seed=3, weights=[0.3, 0.7]
  )
  problems = task.problems(0, 2000)
  is_a = [p.id in {f"p{i}" for i in range(7)} for p in problems]
  assert sum(is_a[:1000]) == sum(is_a[1000:]) == 300
  assert 0.1 < sum(is_a[:100]) / 100 < 0.5
  # Each set in its own order, epoch after epoch, under numbers of its own.
  of_a = [p for p, yes in zip(problems, is_a, strict=True) if yes]
  alone = files.FileTask(tmp_path / "a.jsonl", seed=3)
  assert [p.id for p in of_a] == [p.id for p in alone.problems(0, 600)]
  assert len({p.index for p in task.all_problems}) == len(task) == 57
  again = mixture.MixedTask(
    [make("a.jsonl"), make("b.jsonl")], seed=3, weights=[0.3, 0.7]
  )
  assert again.problem(1234) == problems[1234]
  by_size = mixture.MixedTask([make("a.jsonl"), make("b.jsonl")], seed=3)
  n_a = sum(p.index < 7 for p in by_size.problems(0, 1000))
  assert n_a == round(1000 * 7 / 57)


def test_mixtures_that_cannot_be(tmp_path):
  path = _sums(tmp_path, 3)
  make = lambda seed: files.FileTask(path, seed=seed)
  for tasks, weights, message in (
    ([], [], "needs tasks"),
    ([make], [0.5, 0.5], "1 tasks and 2 weights"),
    ([make, make], [], "'p0' is in .*task.jsonl and in"),
    ([make], [0.0], "must be positive"),
  ):
    with pytest.raises(ValueError, match=message):
      mixture.MixedTask(tasks, seed=0, weights=weights)
  with pytest.raises(ValueError, match="less than a thousandth"):
    order.Mixture([1.0, 1e-6], 0)


# ------------------------------------------------------------------- choices


def test_only_rows_that_are_asked_for(tmp_path):
  made = [
    {"problem": f"Q{i}", "answer": a, "level": i, "type": t}
    for i, (a, t) in enumerate(
      [("1", "Algebra"), ("1/2", "Geometry"), ("x", "Algebra"), ("-4", "NT")]
    )
  ]
  path = _write(tmp_path, *made)
  for where, want in (
    ({"level": (1, 2)}, [1, 2]),
    ({"type": "Algebra"}, [0, 2]),
    ({"kind": ["NT", "Geometry"]}, [1, 3]),
    ({"type": "Algebra", "level": (1, 9)}, [2]),
    ({"level": 3}, [3]),
  ):
    task = files.FileTask(path, where=where)
    assert [p.index for p in task.all_problems] == want
    assert f"{4 - len(want)} of 4 problems are not as" in task.notes[0]
  whole = files.FileTask(path, integers=True)
  assert [p.index for p in whole.all_problems] == [0, 3]
  assert len(files.FileTask(path, limit=2)) == 2
  with pytest.raises(ValueError, match="holds no problem .*4 of 4 problems"):
    files.FileTask(path, where={"level": 9})


def test_splits_divide_and_do_not_move(tmp_path):
  path = _sums(tmp_path, 200)
  parts = [
    set(_ids(files.FileTask(path, split=s, heldout_share=0.2)))
    for s in ("train", "heldout")
  ]
  assert not parts[0] & parts[1] and len(parts[0] | parts[1]) == 200
  assert 20 < len(parts[1]) < 60
  longer = files.FileTask(
    _sums(tmp_path, 400), split="heldout", heldout_share=0.2
  )
  assert parts[1] <= set(_ids(longer))


def test_settings_that_are_none(tmp_path):
  path = _sums(tmp_path, 3)
  for name in ("split", "duplicates", "bad_rows", "unreadable"):
    with pytest.raises(ValueError, match=f"{name} must be one of"):
      files.FileTask(path, **{name: "maybe"})
  with pytest.raises(ValueError, match="'gsm8' is unknown.*gsm8k"):
    files.FileTask(path, format="gsm8")


def test_what_shares_words_with_the_evaluation_is_left_out(tmp_path):
  words = list("abcdefghij")
  text = " ".join(words)
  path = _write(
    tmp_path,
    {"id": "same", "prompt": f"Before. {text.upper()} after", "answer": 1},
    {"id": "seven", "prompt": " ".join(words[:7]) + " 8", "answer": 1},
    {"id": "inside", "prompt": " ".join(words[2:]), "answer": 1},
    {"id": "short", "prompt": "What is it?", "answer": 1},
  )
  seen = _write(
    tmp_path,
    {"problem": text, "answer": "3"},
    {"problem": "what  IS it?", "answer": "3"},
    name="seen.jsonl",
  )
  task = files.FileTask(path, not_in=str(seen))
  assert _ids(task) == ["seven"]
  assert "3 of 4 problems share 8 words in a row with" in task.notes[0]
  assert _ids(files.FileTask(path, not_in=[str(seen)], ngram=9)) == [
    "seven",
    "inside",
  ]
  assert "never seen" not in overlap.Overlap([text])


def test_problems_by_how_often_they_were_solved(tmp_path):
  path = _sums(tmp_path, 4)
  shares = {"p0": 8, "p1": 3, "p2": 0}
  rollouts = [
    {"task_id": name, "outcome": "correct" if i < n else "wrong"}
    for name, n in shares.items()
    for i in range(8)
  ]
  rollouts.append({"task_id": "p1", "outcome": "void"})
  drawn = tmp_path / "drawn"
  drawn.mkdir()
  _write(drawn, *rollouts[:10], name="a.jsonl")
  _write(drawn, *rollouts[10:], name="b.jsonl")
  task = files.FileTask(path, rollouts=str(drawn), max_pass_rate=0.99)
  assert _ids(task) == ["p1", "p2", "p3"]
  assert "1 of 4 problems have no rollout" in task.notes[0]
  some = files.FileTask(
    path, rollouts=str(drawn), min_pass_rate=0.1, max_pass_rate=0.5
  )
  assert _ids(some) == ["p1"]


def test_rollouts_that_say_nothing(tmp_path):
  path = _sums(tmp_path, 2)
  other = _write(tmp_path, {"task_id": "x", "correct": True}, name="o.jsonl")
  void = _write(tmp_path, {"task_id": "x", "outcome": "void"}, name="v.jsonl")
  bad = _write(tmp_path, {"task_id": "x"}, name="b.jsonl")
  for rollouts, message in (
    (other, "no rollout of any problem"),
    (void, "no rollout that was judged"),
    (bad, "b.jsonl line 1 is no rollout"),
    (tmp_path / "none", "does not exist"),
  ):
    with pytest.raises(ValueError, match=message):
      files.FileTask(path, rollouts=str(rollouts))
  (tmp_path / "empty").mkdir()
  with pytest.raises(ValueError, match=r"holds no \*.jsonl"):
    files.FileTask(path, rollouts=str(tmp_path / "empty"))


# ------------------------------------------------------------ answers as golds


def test_answers_that_the_verifier_cannot_read(tmp_path):
  path = _sums(tmp_path, 4)
  find = lambda answers: [i for i, a in enumerate(answers) if a in ("2", "3")]
  task = files.FileTask(path, seed=5)
  (note,) = task.check_answers(find)
  assert "cannot read 2 of 4 answers: line 2 ('2'); line 3 ('3')" in note
  assert "void" in note and len(task) == 4
  task = files.FileTask(path, seed=5, unreadable="drop")
  (note,) = task.check_answers(find)
  assert "left out" in note and _ids(task) == ["p0", "p3"]
  assert {p.id for p in task.problems(0, 20)} == {"p0", "p3"}
  assert task.check_answers(find) == []
  task = files.FileTask(path, unreadable="error")
  with pytest.raises(ValueError, match="mend them, or set unreadable"):
    task.check_answers(find)
  task = files.FileTask(path, unreadable="drop")
  with pytest.raises(ValueError, match="holds no problem"):
    task.check_answers(lambda answers: range(len(answers)))


def test_prompts_that_are_too_long(tmp_path):
  path = _sums(tmp_path, 9)
  find = lambda questions: {
    i: f"{i} tokens" for i in range(len(questions)) if i not in (0, 4)
  }
  task = files.FileTask(path)
  with pytest.raises(ValueError) as e:
    task.check_lengths(find)
  assert "7 of 9 prompts are too long: line 2 (1 tokens); line 3 (2 tok" in (
    str(e.value)
  )
  assert str(e.value).endswith("line 7 (6 tokens) and 2 more")
  assert len(task) == 9 and task.check_lengths(lambda questions: {}) == []
  task = files.FileTask(path, on_overlong="drop")
  (note,) = task.check_lengths(find)
  assert "left out" in note and _ids(task) == ["p0", "p4"]
  with pytest.raises(ValueError, match="on_overlong must be one of"):
    files.FileTask(path, on_overlong="keep")
  mixed = mixture.MixedTask([lambda seed: files.FileTask(path, seed)])
  with pytest.raises(ValueError, match="7 of 9 prompts"):
    mixed.check_lengths(find)


def test_a_digest_is_of_the_problems_and_not_of_their_place(tmp_path):
  path = _sums(tmp_path, 4)
  digest = files.FileTask(path).digest
  moved = path.rename(tmp_path / "moved.jsonl")
  assert files.FileTask(moved, seed=3).digest == digest
  assert files.FileTask(moved, limit=3).digest != digest
  text = moved.read_text()
  moved.write_text(text.replace('"answer": 1', '"answer": 7'))
  assert files.FileTask(moved).digest != digest
  mixed = mixture.MixedTask([lambda seed: files.FileTask(moved, seed)])
  assert mixed.digest == files.FileTask(moved).digest


# ------------------------------------------------------------------ downloads


def test_a_file_of_the_hub_is_downloaded_once(tmp_path, monkeypatch):
  import huggingface_hub

  asked = []
  path = _sums(tmp_path, 2)

  def download(repo, file, *, repo_type, revision):
    asked.append((repo, file, repo_type, revision))
    return str(path)

  monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
  task = files.FileTask("hf://datasets/org/name@v2/deep/train.jsonl")
  assert len(task) == 2
  assert asked == [("org/name", "deep/train.jsonl", "dataset", "v2")]

  def fail(*args, **kwargs):
    raise OSError("no route to host\nmore")

  monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
  with pytest.raises(ValueError, match=r"downloaded \(no route to host\);"):
    files.FileTask("hf://datasets/org/name/train.jsonl")


def test_shards_of_the_hub(tmp_path, monkeypatch):
  import huggingface_hub

  names = ["README.md", "data/train-0.jsonl", "data/train-1.jsonl", "x.jsonl"]
  for i in range(2):
    _sums(tmp_path, 2, name=f"train-{i}.jsonl", first=2 * i)

  def listed(self, repo, *, repo_type, revision):
    assert (repo, repo_type, revision) == ("org/name", "dataset", None)
    return names[::-1]

  monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", listed)
  monkeypatch.setattr(
    huggingface_hub,
    "hf_hub_download",
    lambda repo, file, **_: str(tmp_path / pathlib.Path(file).name),
  )
  task = files.FileTask("hf://datasets/org/name/data/train-*.jsonl")
  assert _ids(task) == ["p0", "p1", "p2", "p3"]
  with pytest.raises(ValueError, match="fits no file of that dataset"):
    files.FileTask("hf://datasets/org/name/test-*.jsonl")


LAST = (
  "Solve the following math problem step by step. The last line of your"
  " response should be of the form Answer: $Answer (without quotes) where"
  " $Answer is the answer to the problem.\n\nWhat is 6 * 7?\n\nRemember to put"
  ' your answer on its own line after "Answer:".'
)


@pytest.mark.parametrize(
  ("row", "name", "want"),
  [
    (  # DeepMath-103K
      {"question": "q?", "final_answer": "7", "difficulty": 5.0}
      | {"topic": "Algebra", "r1_solution_1": "so \\boxed{8}"},
      "math",
      ("q?", "7", "Algebra"),
    ),
    (  # AIME as several publish it
      {"ID": "2024-I-1", "Problem": "q?", "Solution": "s", "Answer": 7},
      "math",
      ("q?", "7", ""),
    ),
    (
      {"ID": "1983-1", "Year": 1983, "Question": "q?", "Answer": "007"},
      "math",
      ("q?", "007", ""),
    ),
    (
      {"id": 60, "problem": "q?", "solution": "so \\boxed{8}"}
      | {"answer": "7", "url": "u", "year": "2024"},
      "math",
      ("q?", "7", ""),
    ),
    (  # RLVR-MATH, RLVR-GSM
      {"messages": [{"role": "user", "content": "q?"}]}
      | {"ground_truth": "7", "dataset": "MATH"},
      "rlvr",
      ("q?", "7", "MATH"),
    ),
    (
      {"messages": [{"role": "user", "content": "q?"}]}
      | {"ground_truth": ["7"], "dataset": ["math"], "constraint": ""},
      "rlvr",
      ("q?", "7", ""),
    ),
    (  # NuminaMath-1.5, NuminaMath-CoT
      {"problem": "q?", "solution": "so \\boxed{8}", "answer": "7"}
      | {"problem_type": "Algebra", "source": "amc_aime", "synthetic": False},
      "math",
      ("q?", "7", "amc_aime"),
    ),
    (
      {"problem": "q?", "solution": "so \\boxed{7}", "answer": None}
      | {"source": "olympiads", "messages": []},
      "math",
      ("q?", "7", "olympiads"),
    ),
    (  # verifiers
      {"question": "q?", "answer": "7", "task": "math", "info": '{"a": 1}'},
      "verifiers",
      ("q?", "7", "math"),
    ),
    (
      {"prompt": [{"role": "user", "content": "q?"}], "answer": "7"}
      | {"example_id": 3, "info": {"a": 1}},
      "verifiers",
      ("q?", "7", ""),
    ),
    (  # Big-Math, and its processed form
      {"problem": "q?", "answer": "7", "source": "orca_math"}
      | {"domain": ["Algebra"], "llama8b_solve_rate": 0.5},
      "math",
      ("q?", "7", "orca_math"),
    ),
    (
      {"prompt": "q?", "solution": "7", "source": "orca_math"}
      | {"domain": ["Algebra"], "llama8b_solve_rate": 0.5},
      "trl",
      ("q?", "7", "orca_math"),
    ),
  ],
)
def test_sets_by_the_names_of_their_fields(row, name, want):
  found = rows_lib.Row("x.jsonl line 1", row)
  assert formats.detect(found) == name
  draft = formats.read(found, name)
  assert (draft.question, draft.answer, draft.kind) == want
  if name == "verifiers":
    assert draft.info["a"] == 1 and "info" not in draft.info


@pytest.mark.parametrize(
  ("row", "said"),
  [
    (
      {"messages": [{"role": "user", "content": "q?"}], "ground_truth": "{}"}
      | {"constraint": "no commas"},
      "'constraint' asks for a form",
    ),
    (
      {"messages": [{"role": "user", "content": "q?"}], "ground_truth": None},
      "'ground_truth' must be the answer",
    ),
    (
      {"question": "q?", "answer": "7", "task": "t", "info": "[1]"},
      "'info' must be an object",
    ),
    ({"Problem": "q?", "Solution": "none"}, "'Solution' holds no"),
  ],
)
def test_rows_of_sets_that_cannot_be_used(row, said):
  found = rows_lib.Row("x.jsonl line 1", row)
  with pytest.raises(ValueError, match=f"x.jsonl line 1: field {said}"):
    formats.read(found, formats.detect(found))


def test_shards_are_one_set(tmp_path, monkeypatch):
  for i in range(3):
    name = f"train-{i}.jsonl"
    path = _sums(tmp_path, 2, name=name, first=2 * i)
    if i == 1:
      data = pathlib.Path(path).read_bytes()
      (tmp_path / f"{name}.gz").write_bytes(gzip.compress(data))
      pathlib.Path(path).unlink()
  task = files.FileTask(str(tmp_path / "train-*.jsonl*"))
  alone = files.FileTask(str(tmp_path / "train-1.jsonl.gz"))
  assert len(task) == 6 and len(alone) == 2
  assert [p.question for p in task.all_problems[2:4]] == [
    p.question for p in alone.all_problems
  ]
  with pytest.raises(ValueError, match=r"none-\*.jsonl does not exist"):
    files.FileTask(str(tmp_path / "none-*.jsonl"))


@pytest.mark.parametrize(
  ("question", "form"),
  [
    (LAST, "a line `Answer: X`"),
    ("What is 1 + 1? End with `Answer: <number>`.", "a line `Answer: X`"),
    ('Output the final answer after "####".', "`#### X`"),
    ("6 * 7? Put your final answer within \\boxed{}.", r"a \boxed{X} alone"),
    ("Give it inside a \\\\boxed{} please.", r"a \boxed{X} alone"),
    ("(A) 1 (B) 2. Answer with the letter only.", "a letter alone"),
    # What is no such instruction.
    ("What is 6 * 7?", ""),
    ("Find the answer: is 91 prime?", ""),
    ("Which letter comes next with probability 1/2?", ""),
    ("Give <answer>\\boxed{X}</answer> within the \\boxed{}.", ""),
    ("in the box " * 20_000, ""),
    ("within " * 20_000, ""),
  ],
)
def test_what_a_prompt_asks_for(question, form):
  assert instructions.form_of(question) == form


def test_prompts_that_ask_for_another_form_are_noted(tmp_path):
  rows = [{"id": str(i), "prompt": f"{i}?", "answer": "1"} for i in range(3)]
  rows[1]["prompt"] = LAST
  path = tmp_path / "dapo.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  (note,) = files.FileTask(str(path)).notes
  assert "1 of 3 prompts ask for a line `Answer: X`" in note and "'1'" in note
  rows[1]["prompt"] = "1?"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  assert files.FileTask(str(path)).notes == []
