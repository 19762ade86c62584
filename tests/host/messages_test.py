"""Chat messages: what is accepted, and how the rest is named."""

import json

import pytest

from roc.host import messages as messages_lib

USER = {"role": "user", "content": "What is 6 * 7?"}
DONE = {"role": "assistant", "content": "42"}


def call(code, index="", **changes):
  function = {"name": "python", "arguments": {"code": code}} | changes
  return {"type": "function", "id": index, "function": function}


def asks(*calls, **changes):
  return {"role": "assistant", "content": "", "tool_calls": [*calls]} | changes


def tool(text, index=""):
  return {"role": "tool", "content": text, "tool_call_id": index}


def test_a_whole_conversation():
  rows = [
    {"role": "system", "content": "Be brief."},
    USER,
    asks(call("print(6*7)", "a"), content=None, reasoning_content="Hm."),
    tool("42", "a"),
    DONE,
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes."},
  ]
  found = messages_lib.read(rows)
  assert [m.role for m in found] == [row["role"] for row in rows]
  assert [m.content for m in found] == [row["content"] or "" for row in rows]
  assert found[2].reasoning == "Hm."
  assert found[2].calls == (
    messages_lib.Call("python", {"code": "print(6*7)"}, "a"),
  )


@pytest.mark.parametrize(
  "row",
  [
    call("x"),
    call("x", arguments=json.dumps({"code": "x"})),
    {"name": "python", "arguments": {"code": "x"}},
    {"name": "python", "arguments": '{"code": "x"}'},
  ],
)
def test_calls_are_read_flat_or_apart_as_objects_or_text(row):
  found = messages_lib.read([USER, asks(row), tool("1"), DONE])
  assert found[1].calls == (messages_lib.Call("python", {"code": "x"}),)


def test_content_may_be_text_parts_and_empty_fields_null():
  parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
  rows = [{"role": "user", "content": parts, "name": None}, DONE | {"x": None}]
  assert messages_lib.read(rows)[0].content == "ab"


def test_answers_are_put_in_the_order_of_the_calls():
  calls = asks(call("1", "a"), call("2", "b"), call("3", "c"))
  rows = [USER, calls, tool("3", "c"), tool("1", "a"), tool("2", "b"), DONE]
  assert [m.content for m in messages_lib.read(rows)[2:5]] == ["1", "2", "3"]
  unnamed = [USER, calls, tool("3"), tool("1"), tool("2"), DONE]
  found = messages_lib.read(unnamed)
  assert [m.content for m in found[2:5]] == ["3", "1", "2"]


@pytest.mark.parametrize(
  ("rows", "sentence"),
  [
    (None, "field 'messages' must be a list of messages, not missing"),
    ([], "must be a list"),
    ([1], r"field 'messages\[0\]' must be an object, not 1"),
    ([{"role": "usr"}], r"\[0\].role' must be one of .* \(did you mean user"),
    ([DONE], r"\[0\].role' is assistant at the start, where system or user"),
    ([USER, USER], r"\[1\].role' is user after user, where assistant must"),
    ([USER, tool("1"), DONE], r"\[1\].role' is tool after user"),
    ([USER, DONE, DONE], r"\[2\].role' is assistant after assistant"),
    ([USER], "is user, and a conversation must end with a turn of the ass"),
    ([USER, asks(call("x")), tool("1")], r"\[2\].role' is tool, and a conv"),
    ([{"role": "user"}, DONE], r"\[0\].content' must be text .*not missing"),
    ([USER, DONE | {"content": " "}], r"\[1\].content' is empty"),
    (
      [{"role": "user", "content": [{"type": "image_url"}]}, DONE],
      r"\[0\].content' must be text or a list of text parts",
    ),
    ([USER, DONE | {"tool_call": 1}], r"unknown.*\(did you mean tool_calls\?"),
    ([USER | {"tool_calls": []}, DONE], r"\[0\].tool_calls' is unknown in a m"),
    (
      [USER, DONE | {"reasoning_content": 3}],
      "reasoning_content' must be text",
    ),
    ([USER, asks(3)], r"tool_calls\[0\]' must be an object, not 3"),
    ([USER, asks({"function": 3})], r"tool_calls\[0\].function' must be an o"),
    ([USER, asks(call("x", name=""))], r"\[0\].function.name' must be a tool"),
    (
      [USER, asks(call("x", arguments="{"))],
      r"function.arguments' is not JSON",
    ),
    (
      [USER, asks(call("x", arguments=[1]))],
      "arguments' must be an object, or",
    ),
    ([USER, DONE | {"tool_calls": {}}], "tool_calls' must be a list of calls"),
    (
      [USER, asks(call("1", "a"), call("2", "b")), tool("", "a"), tool("", "a")]
      + [DONE],
      r"field 'messages\[2\].tool_call_id' is there twice",
    ),
  ],
)
def test_what_is_wrong_is_named(rows, sentence):
  with pytest.raises(messages_lib.MessageError, match=sentence):
    messages_lib.read(rows)
