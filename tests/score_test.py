"""`roc.main score`: the numbers of a reference, and sentences for mistakes."""

import io
import json
import pathlib

import numpy as np
import pytest

from roc import main

MODELS = pathlib.Path(__file__).parent / "golden" / "models"


def run(tmp_path, capsys, text, *flags, name="qwen3"):
  path = tmp_path / "rows.jsonl"
  path.write_text(text)
  argv = ["score", f"--model={MODELS / name}", f"--input={path}", *flags]
  code = main.main(argv)
  out, err = capsys.readouterr()
  return code, out, err


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama"])
def test_rows_of_unequal_length_have_the_reference_s_numbers(
  tmp_path, capsys, name
):
  golden = np.load(MODELS / name / "golden.npz")
  lengths = golden["length"].tolist()
  rows = [
    ids_T[:n].tolist()
    for ids_T, n in zip(golden["right_ids"], lengths, strict=True)
  ]
  # Short and long in turns: another shape each time.
  rows = [rows[0], rows[1] * 9, rows[2]]
  text = "\n\n".join(json.dumps({"ids": ids}) for ids in rows)
  code, out, _ = run(tmp_path, capsys, text, "--json", name=name)
  found = [json.loads(line) for line in out.splitlines()]
  assert code == 0 and [len(f["entropy"]) for f in found] == [14, 81, 4]
  assert all(f["logprobs"][0] is None for f in found)
  for i, n in ((0, 14), (1, 9), (2, 4)):
    np.testing.assert_allclose(
      found[i]["logprobs"][1:n], golden["right_logp"][i, : n - 1], atol=1e-5
    )
    np.testing.assert_allclose(
      found[i]["entropy"][:n], golden["right_entropy"][i, :n], atol=1e-5
    )


def test_for_people(tmp_path, capsys):
  code, out, _ = run(tmp_path, capsys, '{"ids": [1, 2, 3]}\n{"ids": [4]}')
  first, second = out.splitlines()
  assert code == 0
  assert "3 tokens  mean log-prob -" in first and "mean entropy" in first
  assert "1 tokens  mean log-prob -  " in second


def test_standard_input(monkeypatch, capsys):
  given = io.BytesIO(b'{"ids": [1, 2]}\n')
  monkeypatch.setattr("sys.stdin", io.TextIOWrapper(given))
  assert main.main(["score", f"--model={MODELS / 'llama'}", "--json"]) == 0
  assert len(json.loads(capsys.readouterr().out)["logprobs"]) == 2


@pytest.mark.parametrize(
  ("text", "sentence"),
  [
    ("", "holds no line such as"),
    ('{"ids": [1]}\nx', "line 2: not JSON"),
    ('{"ids": []}', "line 1: expected a JSON object such as"),
    ('{"ids": [1.5]}', "line 1: expected a JSON object such as"),
    ('{"ids": [true]}', "line 1: expected a JSON object such as"),
    ('{"tokens": [1]}', "line 1: expected a JSON object such as"),
    ("[1]", "line 1: expected a JSON object such as"),
    ('{"ids": [1, 96]}', "holds id 96, and the model's vocabulary has 96"),
    ('{"ids": [-1]}', "holds id -1"),
  ],
)
def test_bad_input(tmp_path, capsys, text, sentence):
  code, out, err = run(tmp_path, capsys, text, "--json")
  assert (code, out) == (2, "") and sentence in err
  assert len(err.splitlines()) == 1 and "rows.jsonl" in err


@pytest.mark.parametrize(
  ("argv", "sentence"),
  [
    ([], "required: --model"),
    (["--model=/nowhere", "--input=/nowhere"], "cannot read /nowhere"),
    (["--model=x", "--dtype=int8"], "invalid choice: 'int8'"),
  ],
)
def test_bad_flags(capsys, argv, sentence):
  assert main.main(["score", *argv]) == 2
  assert sentence in capsys.readouterr().err


def test_a_folder_that_is_no_model(tmp_path, capsys):
  (tmp_path / "rows.jsonl").write_text('{"ids": [1]}')
  argv = [f"--model={tmp_path}", f"--input={tmp_path / 'rows.jsonl'}"]
  assert main.main(["score", *argv]) == 2
  assert "config.json cannot be read" in capsys.readouterr().err
