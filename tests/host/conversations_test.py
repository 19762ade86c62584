"""Files of conversations: order, and errors with file, line and field."""

import json

import pytest

from roc.host import conversations

MESSAGES = [
  {"role": "user", "content": "What is 6 * 7?"},
  {"role": "assistant", "content": "42"},
]


def line(**fields):
  return json.dumps({"messages": MESSAGES} | fields)


def test_files_are_read_in_order_and_other_columns_ignored(tmp_path):
  one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
  one.write_text(f"{line(id=7, source='web')}\n\n{line(tools=None)}\n")
  two.write_text(line(id="x"))
  found = list(conversations.read([one, two]))
  assert [c.id for c in found] == ["7", "", "x"]
  assert [c.where for c in found] == [
    *(f"{one} line 1", f"{one} line 3", f"{two} line 1")
  ]
  assert [c.messages[1].content for c in found] == ["42"] * 3
  n_bytes = sum(p.stat().st_size for p in (one, two))
  assert found[-1].n_read == n_bytes - 1  # without the blank line


def test_a_line_may_hold_what_splitlines_would_cut(tmp_path):
  path = tmp_path / "one.jsonl"
  text = "a\u2028b\x85c\x0cd"
  messages = [MESSAGES[0] | {"content": text}, MESSAGES[1]]
  row = json.dumps({"messages": messages}, ensure_ascii=False)
  path.write_text(f"{row}\n{row}\n", encoding="utf-8")
  found = list(conversations.read([path]))
  assert [c.messages[0].content for c in found] == [text, text]


def test_tools_are_read_in_every_shape():
  schema = {"name": "python", "parameters": {}}
  for tools in (
    [schema],
    [{"type": "function", "function": schema}],
    json.dumps([schema]),
  ):
    assert conversations.parse(line(tools=tools)).tools == ("python",)
  assert conversations.parse(line(tools=[])).tools == ()
  assert conversations.parse(line()).tools is None


@pytest.mark.parametrize(
  ("text", "sentence"),
  [
    ("{", "not JSON"),
    ("[" * 100_000, "not JSON"),
    ("[]", "expected a JSON object with messages"),
    ("{}", "field 'messages' must be a list of messages, not missing"),
    (line(messages=MESSAGES[:1]), r"field 'messages\[0\].role' is user, and"),
    (line(tools=[{"name": 3}]), r"field 'tools\[0\]' must be a tool's schema"),
    (line(tools={"name": "x"}), "field 'tools' must be a tool's schema"),
    (line(tools="["), "field 'tools' is not JSON"),
  ],
)
def test_errors_name_file_line_and_field(text, sentence, tmp_path):
  path = tmp_path / "bad.jsonl"
  path.write_text(f"{line()}\n{text}\n")
  with pytest.raises(ValueError, match=rf"bad.jsonl line 2: .*{sentence}"):
    list(conversations.read([path]))


def test_files_that_cannot_be_read(tmp_path):
  (tmp_path / "empty").write_text("\n")
  (tmp_path / "bytes").write_bytes(b"\xff\xfe\n")
  with pytest.raises(ValueError, match="empty holds no conversation"):
    list(conversations.read([tmp_path / "empty"]))
  for name, said in (
    ("bytes", "bytes line 1: it is not UTF-8"),
    ("missing", "cannot read .*missing"),
  ):
    with pytest.raises(ValueError, match=said):
      list(conversations.read([tmp_path / name]))
  with pytest.raises(ValueError, match="cannot read .*missing"):
    conversations.digest([tmp_path / "missing"])


def test_the_digest_follows_the_bytes_and_not_the_name(tmp_path):
  for name, text in (("a", "x"), ("b", "x"), ("c", "y")):
    (tmp_path / name).write_text(text)
  a, b, c = (conversations.digest([tmp_path / n]) for n in "abc")
  assert a == b != c and len(a) == 16
