"""The one reader of JSON lines: what files look like, and what is said."""

import gzip
import io
import json

import pytest

from roc import errors, jsonl

ROWS = [{"a": "é\u2028x"}, {"a": 2}]
PLAIN = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x"])
@pytest.mark.parametrize(
  "data",
  [
    PLAIN.encode(),
    PLAIN.encode("utf-8-sig"),
    PLAIN.replace("\n", "\r\n").encode(),
    ("\n  \n" + PLAIN + "\n\n").encode(),
    PLAIN.rstrip("\n").encode(),
    gzip.compress(PLAIN.encode("utf-8-sig")),
    # Appended to, as several writers do.
    gzip.compress(PLAIN[:3].encode()) + gzip.compress(PLAIN[3:].encode()),
  ],
)
def test_files_however_they_are_written(tmp_path, name, data):
  path = tmp_path / name
  path.write_bytes(data)
  found = list(jsonl.read(path))
  assert [one.fields for one in found] == ROWS
  first = 3 if data.startswith(b"\n") else 1
  assert [one.where for one in found] == [
    f"{path} line {first}",
    f"{path} line {first + 1}",
  ]
  # Also where it cannot be wound back, such as a pipe.
  pipe = io.BufferedReader(_Pipe(data))
  assert [jsonl.loads(x) for _, x in jsonl.split(pipe)] == ROWS


class _Pipe(io.RawIOBase):
  def __init__(self, data):
    self._data = data

  def readable(self):
    return True

  def readinto(self, buffer):
    n = min(len(buffer), len(self._data), 5)
    buffer[:n], self._data = self._data[:n], self._data[n:]
    return n


def test_a_short_first_line(tmp_path):
  for text, n in (("1\n2\n", 2), ("\n\n7", 1), ("", 0), ("\n", 0), ("1", 1)):
    (tmp_path / "x").write_text(text)
    assert len(list(jsonl.lines(tmp_path / "x"))) == n


def test_half_a_surrogate_pair_is_no_text():
  found = jsonl.loads(r'{"a": ["\ud83d", "\ud83d\ude00", {"\udc00b": "é"}]}')
  assert found == {"a": ["\ufffd", "\U0001f600", {"\ufffdb": "é"}]}
  json.dumps(found, ensure_ascii=False).encode()


@pytest.mark.parametrize(
  ("data", "said"),
  [
    (b'{"a": 1}\n{oops\n', "x.jsonl line 2: not JSON"),
    (b'{"a": 1}\n[1]\n', "x.jsonl line 2: expected a JSON object"),
    (b'{"a": "\xff"}', "x.jsonl line 1: it is not UTF-8"),
    (b"\n" + b"[" * 100_000, "x.jsonl line 2: not JSON"),
    (gzip.compress(b'{"a": 1}\n')[:-4], "cannot read .*x.jsonl: it is damaged"),
    (b"\x1f\x8bno", "cannot read .*x.jsonl: "),
    (None, "cannot read .*x.jsonl: No such file"),
  ],
)
def test_mistakes_are_one_sentence(tmp_path, data, said):
  path = tmp_path / "x.jsonl"
  if data is not None:
    path.write_bytes(data)
  with pytest.raises(errors.UserError, match=said) as e:
    list(jsonl.read(path))
  assert isinstance(e.value, ValueError) and "\n" not in str(e.value)


def test_names_of_several_files(tmp_path):
  for name in ("a-1.jsonl", "a-0.jsonl.gz", "b.jsonl", "c[1].jsonl", "d.txt"):
    (tmp_path / name).write_text("")
  names = lambda pattern: [p.name for p in jsonl.find(tmp_path / pattern)]
  assert names("a-*.jsonl*") == ["a-0.jsonl.gz", "a-1.jsonl"]
  assert names("c[1].jsonl") == ["c[1].jsonl"]
  assert names("none") == ["none"] and names("none*") == []
  assert [p.name for p in jsonl.inside(tmp_path)] == [
    *("a-0.jsonl.gz", "a-1.jsonl", "b.jsonl", "c[1].jsonl")
  ]
