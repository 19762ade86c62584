"""The parser's policy, one row a case, on ids as a model would sample them."""

import json
import re
import time

import pytest

from roc.host import calls
from roc.host import tokenizer as tokenizer_lib

GOOD = '{"name": "python", "arguments": {"code": "print(1)"}}'
BOX = "\\boxed{7}"


def _ids(tokenizer, text: str) -> list[int]:
  """Ids of text in which every tag is the one special token."""
  ids = []
  pattern = "|".join(re.escape(tag) for tag in tokenizer_lib.SPECIALS)
  for piece in re.split(f"({pattern})", text):
    special = tokenizer.special_ids.get(piece)
    ids += tokenizer.encode(piece) if special is None else [special]
  return ids


# text of the turn, errors of its calls (None = good), answers, is_void
POLICY = [
  ("", [], [], True),
  ("The product is ready.<|im_end|>", [], [], True),
  (f"<tool_call>{GOOD}</tool_call><|im_end|>", [None], [], False),
  (f"Let me see.<tool_call>\n{GOOD}\n</tool_call>", [None], [], False),
  (f"<tool_call>{GOOD}</tool_call>" * 3, [None] * 3, [], False),
  (f"<tool_call>{GOOD}<|im_end|>", ["unclosed"], [], True),
  (f"<tool_call>{GOOD}", ["unclosed"], [], True),
  (
    f"<tool_call>{GOOD}<tool_call>{GOOD}</tool_call>",
    ["unclosed", None],
    [],
    False,
  ),
  (f"{GOOD}</tool_call>", [], [], True),
  ("<tool_call></tool_call>", ["bad JSON"], [], False),
  ("<tool_call>print(1)</tool_call>", ["bad JSON"], [], False),
  ('<tool_call>["python"]</tool_call>', ["bad JSON"], [], False),
  (f"<tool_call>{GOOD}}}</tool_call>", ["bad JSON"], [], False),
  *(
    (
      f'<tool_call>{{"name": "python", "arguments": {{"code": {number}}}}}'
      "</tool_call>",
      ["bad JSON"],
      [],
      False,
    )
    for number in ("NaN", "-Infinity", "1e999")
  ),
  ("<tool_call>" + "[" * 9000 + "</tool_call>", ["bad JSON"], [], False),
  (
    '<tool_call>{"name": "python", "arguments": {"code": "<answer>"}}'
    "</tool_call>",
    [None],
    [],
    False,
  ),
  (
    '<tool_call>{"name": "python", "arguments": {"code": "</tool_call>"}}'
    "</tool_call>",
    [None],
    [],
    False,
  ),
  (
    '<tool_call>{"name": "python", "arguments": {"code": "<tool_call>"}}'
    "</tool_call>",
    [None],
    [],
    False,
  ),
  (
    f'<tool_call>{{"name": "python</tool_call><tool_call>{GOOD}</tool_call>',
    ["bad JSON", None],
    [],
    False,
  ),
  (
    f"<tool_call>{{oops}}</tool_call><tool_call>{GOOD}</tool_call>",
    ["bad JSON", None],
    [],
    False,
  ),
  (
    f"<think>Maybe <tool_call>{GOOD}</tool_call></think>",
    [None],
    [],
    False,
  ),
  ("<tool_call>" + "</tool_call>" * 99, ["bad JSON"], [], False),
  (
    '<tool_call>{"name": "bash", "arguments": {"code": "1"}}</tool_call>',
    ["unknown tool"],
    [],
    False,
  ),
  (
    '<tool_call>{"arguments": {"code": "1"}}</tool_call>',
    ["unknown tool"],
    [],
    False,
  ),
  (
    '<tool_call>{"name": "python", "arguments": {}}</tool_call>',
    ["bad arguments"],
    [],
    False,
  ),
  ('<tool_call>{"name": "python"}</tool_call>', ["bad arguments"], [], False),
  (
    '<tool_call>{"name": "python", "arguments": {"code": 1}}</tool_call>',
    ["bad arguments"],
    [],
    False,
  ),
  (
    '<tool_call>{"name": "python", "arguments": {"code": "1", "x": 2}}'
    "</tool_call>",
    ["bad arguments"],
    [],
    False,
  ),
  (
    '<tool_call>{"name": "python", "arguments": "{\\"code\\": \\"1\\"}"}'
    "</tool_call>",
    [None],
    [],
    False,
  ),
  (
    '<tool_call>{"name": "python", "arguments": "print(1)"}</tool_call>',
    ["bad JSON"],
    [],
    False,
  ),
  (f"<answer>{BOX}</answer>", [], ["7"], False),
  (f"<answer>It is {BOX}, so.</answer>", [], ["7"], False),
  (f"<answer>{BOX}</answer>" * 2, [], ["7", "7"], False),
  (f"<answer>\\boxed{{6}} {BOX}</answer>", [], ["7"], False),
  ("<answer>7</answer>", [], [], True),
  ("<answer>\\boxed{}</answer>", [], [], True),
  ("<answer>\\boxed{7</answer>", [], [], True),
  (f"<answer>{BOX}", [], [], True),
  (f"{BOX}</answer>", [], [], True),
  (f"{BOX}", [], [], True),
  (f"<answer><answer>{BOX}</answer>", [], ["7"], False),
  (f"<answer><reason>{BOX}</answer>", [], [], True),
  (f"<answer></tool_call>{BOX}</answer>", [], [], True),
  (
    f"<answer><tool_call>{GOOD}</tool_call>{BOX}</answer>",
    [None],
    [],
    False,
  ),
  (
    f"<tool_call>{GOOD}</tool_call><answer>{BOX}</answer>",
    [None],
    ["7"],
    False,
  ),
  ("<tool_response>7</tool_response>", [], [], True),
]


@pytest.mark.parametrize(("text", "errors", "answers", "is_void"), POLICY)
def test_policy(tokenizer, text, errors, answers, is_void):
  turn = calls.parse_turn(_ids(tokenizer, text), tokenizer)
  assert [call.error for call in turn.calls] == errors
  assert list(turn.answers) == answers
  assert turn.n_answers == len(answers)
  assert turn.is_void == is_void
  for call in turn.calls:
    assert bool(call.arguments) == (call.error is None)
    assert bool(call.detail) == (call.error is not None)


def test_code_arrives_exactly(tokenizer):
  code = 'print("é\\n🎈", "<answer>")\n'
  body = json.dumps({"name": "python", "arguments": {"code": code}})
  ids = [
    tokenizer.special_id("<tool_call>"),
    *tokenizer.encode(body),
    tokenizer.special_id("</tool_call>"),
  ]
  (call,) = calls.parse_turn(ids, tokenizer).calls
  assert call.error is None
  assert call.arguments == {"code": code}


def test_tags_spelt_by_characters_are_no_tags(tokenizer):
  text = f"<tool_call>{GOOD}</tool_call><answer>{BOX}</answer>"
  turn = calls.parse_turn(tokenizer.encode(text), tokenizer)
  assert (turn.calls, turn.answers, turn.is_void) == ((), (), True)


def test_a_vocabulary_without_answer_tags_finds_them_as_text(
  tokenizer, tmp_path
):
  path = tmp_path / "tokenizer.json"
  tokenizer.save(path)
  state = json.loads(path.read_text())
  state["added_tokens"] = [
    token for token in state["added_tokens"] if "answer" not in token["content"]
  ]
  path.write_text(json.dumps(state))
  other = tokenizer_lib.Tokenizer.load(path)
  assert "<answer>" not in other.special_ids
  turn = calls.parse_turn(other.encode(f"So <answer>{BOX}</answer>."), other)
  assert turn.answers == ("7",)
  body = GOOD.replace("print(1)", "print('<answer>')")
  ids = [
    other.special_id("<tool_call>"),
    *other.encode(body),
    other.special_id("</tool_call>"),
  ]
  (call,) = calls.parse_turn(ids, other).calls
  assert call.arguments == {"code": "print('<answer>')"}


def test_too_many_calls_leave_a_rejected_one(tokenizer):
  ids = _ids(tokenizer, f"<tool_call>{GOOD}</tool_call>" * 6)
  turn = calls.parse_turn(ids, tokenizer, max_calls=3)
  assert [call.error for call in turn.calls] == [None, None, "too many calls"]
  assert len(calls.parse_turn(ids, tokenizer, max_calls=6).calls) == 6


def test_tool_name_is_selectable(tokenizer):
  ids = _ids(tokenizer, f"<tool_call>{GOOD}</tool_call>")
  (call,) = calls.parse_turn(ids, tokenizer, tool=calls.ToolSpec("run")).calls
  assert (call.error, call.name) == ("unknown tool", "python")


def test_text_is_read_as_ids_are(tokenizer):
  """Where no tag is spelt out, text and ids say the same."""
  for text, errors, answers, is_void in POLICY:
    turn = calls.parse_text(text, tool=calls.PYTHON, max_calls=4)
    assert [call.error for call in turn.calls] == errors, text
    if "<reason>" not in text and "<answer></tool_call>" not in text:
      assert list(turn.answers) == answers, text
      assert turn.is_void == is_void, text


@pytest.mark.parametrize(
  ("text", "content", "found"),
  [
    ("Hello.", "Hello.", []),
    (
      'Let me see.\n<tool_call>\n{"name": "f", "arguments": {"a": [1]}}\n'
      "</tool_call>",
      "Let me see.",
      [("f", {"a": [1]}, None)],
    ),
    (
      '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>then',
      "then",
      [("f", {"a": 1}, None)],
    ),
    ('a<tool_call>{"name": "f"}</tool_call>b', "ab", [("f", {}, "bad arg")]),
    ('<tool_call>{"arguments": {}}</tool_call>', "", [("", {}, "unknown")]),
    ('<tool_call>{"name": 3, "arguments": {}}</tool_call>', "", [None]),
    ('<tool_call>[{"name": "f", "arguments": {}}]</tool_call>', "", [None]),
    ('x</tool_call>{"name": "f"}', 'x</tool_call>{"name": "f"}', []),
    ("x <|im_end|>\n<|endoftext|>", "x", []),
    ("<|im_end|> is how it ends", "<|im_end|> is how it ends", []),
    ('a<tool_call>{"name": "f", "arguments": {}}', "a", [("", {}, "unclosed")]),
  ],
)
def test_text_with_any_tools(text, content, found):
  turn = calls.parse_text(text)
  assert turn.content == content
  assert len(turn.calls) == len(found)
  for call, want in zip(turn.calls, found, strict=True):
    if want is None:
      assert call.error is not None
      continue
    name, arguments, error = want
    assert (call.name, dict(call.arguments)) == (name, arguments)
    assert (call.error or "").startswith(error or "")
    assert (call.error is None) == (error is None)


@pytest.mark.parametrize(
  "text",
  [
    "<tool_call>{" + "</tool_call>" * 20,
    "<tool_call>{",
    "<tool_call>{</tool_call>",
    '<tool_call>{"a": "',
    "<answer>",
  ],
)
def test_a_turn_of_many_tags_is_read_in_time(text):
  start = time.perf_counter()
  turn = calls.parse_text(text * 10_000)
  assert len(turn.calls) == 10_000 * text.count("<tool_call>")
  assert time.perf_counter() - start < 10
