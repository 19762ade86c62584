r"""Dialects of calls: found, read, written, and chosen by the template."""

import json
import pathlib

import pytest
import tokenizers

from roc import layout
from roc.host import (
  calls,
  conversations,
  corpus,
  dialects,
  template_chat,
  tools,
)
from roc.host import messages as messages_lib
from roc.host import tokenizer as tokenizer_lib

SCHEMA = tools.tool_schema(tools.python, "python")
CODE = 'x = {"a": 1}\nprint("</tool_call>", x)  # <b> é \\n'
CALL = messages_lib.Call("python", {"code": CODE})
ROLE = layout.Role

# Templates of our own in the shape of the published ones.
CHAT = pathlib.Path(__file__).parents[1] / "golden" / "chat"
LLAMA = (CHAT / "llama3.jinja").read_text()
XML = (CHAT / "qwen_xml.jinja").read_text()
HEADERS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>")
TAGS = (*HEADERS, "<|eot_id|>", "<|eom_id|>", "<|python_tag|>")


@pytest.fixture(scope="module")
def llama():
  """A tokenizer with the tags of Llama 3 and none of ChatML."""
  vocab = {name: i for i, name in enumerate(tokenizer_lib.byte_names())}
  backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=False
  )
  backend.decoder = tokenizers.decoders.ByteLevel()
  backend.add_special_tokens(list(TAGS))
  return tokenizer_lib.Tokenizer(backend)


@pytest.fixture
def make(tmp_path):
  def make(tokenizer, template, **options):
    path = tmp_path / "t.jinja"
    path.write_text(template)
    return template_chat.TemplateChat(
      tokenizer, tools=[SCHEMA], template=str(path), **options
    )

  return make


def read(text, dialect, tool=calls.PYTHON):
  turn = calls.parse_text(text, tool=tool, dialect=dialects.DIALECTS[dialect])
  return [c.error or c.arguments["code"] for c in turn.calls], turn


@pytest.mark.parametrize("dialect", dialects.DIALECTS.values())
@pytest.mark.parametrize(
  "code", ["1", CODE, "", "\n\n a\n\n", '"""<parameter=code>"""', "#<|eot|>"]
)
def test_what_is_written_is_read(dialect, code, tokenizer):
  written = dialect.write("python", {"code": code}, "\n")
  ids = tokenizer.encode_trusted(f"So:\n{written}<|im_end|>")
  turn = calls.parse_turn(ids, tokenizer, dialect=dialect)
  assert [(c.error, dict(c.arguments)) for c in turn.calls] == [
    (None, {"code": code})
  ]
  assert turn.content == "So:" and not turn.is_void


LLAMA_CALL = '{"name": "python", "parameters": {"code": "%s"}}'


@pytest.mark.parametrize(
  ("text", "found", "content"),
  [
    (LLAMA_CALL % 1 + "<|eot_id|>", ["1"], ""),
    ("  " + LLAMA_CALL % 1 + "\n", ["1"], ""),
    ("Let me see.\n" + LLAMA_CALL % 1, ["1"], "Let me see."),
    (f"{LLAMA_CALL % 1}; {LLAMA_CALL % 2}<|eom_id|>", ["1", "2"], ""),
    (f"{LLAMA_CALL % 1}{LLAMA_CALL % 2}", ["1", "2"], ""),
    (f"{LLAMA_CALL % 1}\nand\n{LLAMA_CALL % 2}.", ["1", "2"], "and\n."),
    ("<|python_tag|>" + LLAMA_CALL % 1, ["1"], ""),
    ("<|python_tag|>print(1)\nprint(2)<|eom_id|>", ["print(1)\nprint(2)"], ""),
    ("Hm.<|python_tag|>print(1)<|eom_id|>", ["print(1)"], "Hm."),
    # An object of a text, or within a line, is no call.
    ('{"name": "Ann", "age": 3}', [], '{"name": "Ann", "age": 3}'),
    (f"Such as {LLAMA_CALL % 1}", [], f"Such as {LLAMA_CALL % 1}"),
    ('{"x": 1}', [], '{"x": 1}'),
    # Faults of the model.
    ('{"name": "bash", "parameters": {"code": "1"}}', ["unknown tool"], ""),
    ('{"name": "python", "parameters": {"x": "1"}}', ["bad arguments"], ""),
    ('{"name": "python", "parameters": {"code": 1}}', ["bad arguments"], ""),
    ('{"name": "python", "parameters": {code}}', ["bad JSON"], ""),
    ('{"name": "python", "parameters": {"code": "1', ["unclosed"], ""),
    ('{"name": "python", {}}\n' + LLAMA_CALL % 2, ["bad JSON", "2"], ""),
    ('{"name": "python", "parameters": {"code": NaN}}', ["bad JSON"], ""),
    # Other spellings that models of this family are known for.
    (
      '{"type": "function", "name": "python", "parameters": {"code": "1"}}',
      ["1"],
      "",
    ),
    (
      '{"type": "function", "function": '
      '{"name": "python", "parameters": {"code": "1"}}}',
      ["1"],
      "",
    ),
  ],
)
def test_calls_of_llama3(text, found, content, llama):
  assert read(text, "llama3")[0] == found
  assert read(text, "llama3")[1].content == content
  ids = llama.encode_trusted(text + "<|eot_id|>")
  turn = calls.parse_turn(ids, llama, dialect=dialects.LLAMA3)
  assert [c.error or c.arguments["code"] for c in turn.calls] == found
  assert turn.content == content
  assert turn.is_void == (not found or found == ["unclosed"])


def test_code_that_was_cut_off_is_no_call(llama):
  ids = llama.encode_trusted("<|python_tag|>print(1")
  turn = calls.parse_turn(ids, llama, dialect=dialects.LLAMA3)
  assert [c.error for c in turn.calls] == ["unclosed"] and turn.is_void


def test_code_is_for_the_tool_that_there_is(llama):
  spec = calls.ToolSpec("jupyter_code", "session")
  (call,) = read("<|python_tag|>1 + 1", "llama3", spec)[1].calls
  assert (call.name, call.arguments) == ("jupyter_code", {"code": "1 + 1"})


def test_answers_stand_beside_calls(llama):
  text = f"<answer>\\boxed{{7}}</answer>\n{LLAMA_CALL % 1}"
  turn = read(text, "llama3")[1]
  assert turn.answers == ("7",) and len(turn.calls) == 1
  text = f"<answer>\\boxed{{7}}\n{LLAMA_CALL % '</answer>'}"
  found, turn = read(text, "llama3")
  assert found == ["</answer>"] and not turn.answers


XML_CALL = (
  "<tool_call>\n<function=python>\n<parameter=code>\n%s\n</parameter>\n"
  "</function>\n</tool_call>"
)


@pytest.mark.parametrize(
  ("text", "found"),
  [
    (XML_CALL % "print(1)\nprint(2)", ["print(1)\nprint(2)"]),
    (XML_CALL % 1 + "\n" + XML_CALL % 2, ["1", "2"]),
    (XML_CALL % "print('</tool_call>')", ["print('</tool_call>')"]),
    (XML_CALL % "print('</parameter>')", ["print('</parameter>')"]),
    (XML_CALL % "print('</function>')", ["print('</function>')"]),
    (XML_CALL.replace("\n", "") % 1, ["1"]),
    (
      "<tool_call>\n<function=python>\n</function>\n</tool_call>",
      ["bad arguments"],
    ),
    ((XML_CALL % 1).replace("=python", "=bash"), ["unknown tool"]),
    ((XML_CALL % 1).replace("</parameter>", ""), ["bad XML"]),
    ((XML_CALL % 1).replace("</function>", ""), ["bad XML"]),
    ((XML_CALL % 1).replace("<function=python>", ""), ["bad XML"]),
    ((XML_CALL % 1).replace("</tool_call>", ""), ["unclosed"]),
    (
      (XML_CALL % 1).replace(
        "</function>",
        "</function><function=python><parameter=code>2</parameter></function>",
      ),
      ["bad XML"],
    ),
    ('<tool_call>{"name": "python", "arguments": {}}</tool_call>', ["bad XML"]),
    (
      (XML_CALL % 1).replace("</function>", "<parameter=code>2</parameter>")
      + "</function></tool_call>",
      ["bad XML"],
    ),
  ],
)
def test_calls_of_qwen_xml(text, found, tokenizer):
  assert read(text, "qwen_xml")[0] == found
  ids = tokenizer.encode_trusted(text)
  turn = calls.parse_turn(ids, tokenizer, dialect=dialects.QWEN_XML)
  assert [c.error or c.arguments["code"] for c in turn.calls] == found


@pytest.mark.parametrize(
  ("dialect", "text"),
  [
    ("llama3", '{"name": '),
    ("llama3", '\n{"name": '),
    ("llama3", LLAMA_CALL % 1 + "\n"),
    ("llama3", '{"name": 1}\n'),
    ("llama3", "<|python_tag|>"),
    ("qwen_xml", "<tool_call><function=a>"),
    ("qwen_xml", "<tool_call><function=a><parameter=b></parameter>"),
    ("qwen_xml", "</parameter>"),
  ],
)
def test_long_turns_are_read_in_time(dialect, text):
  turn = read(text * 10_000, dialect, None)[1]
  assert len(turn.calls) <= 10_000


# ----------------------------------------------------- chosen by the template


def test_a_template_with_parameters_is_llama3(make, llama):
  chat = make(llama, LLAMA)
  assert chat.dialect is dialects.LLAMA3
  ends = {llama.special_id("<|eot_id|>"), llama.special_id("<|eom_id|>")}
  assert set(chat.stop_ids) == ends
  assert '"name": "python"' in llama.decode(chat.prompt_ids("1?"))
  text = chat.turn_text("", [messages_lib.Call("python", {"code": "1"})])
  assert text == '{"name": "python", "parameters": {"code": "1"}}'
  # What the model thinks before it calls is not lost.
  text = chat.turn_text("Let me see.", [CALL])
  assert text.startswith('Let me see.\n{"name": "python", "parameters": {')
  # Results are read in a turn of `ipython`, each in its own.
  suffix = llama.decode(chat.tool_suffix(['a"b', "c"])[0])
  turn = "<|start_header_id|>ipython<|end_header_id|>\n\n"
  assert suffix == (
    f'{turn}"a\\"b"<|eot_id|>{turn}"c"<|eot_id|>'
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
  )


def test_a_call_may_end_its_turn_by_a_tag_of_its_own(make, llama):
  chat = make(llama, LLAMA, arguments={"builtin_tools": ["search"]})
  ids = chat.assistant_ids(chat.turn_text("", [CALL]))
  assert ids[-1] == llama.special_id("<|eom_id|>") and chat.is_whole(ids)
  assert chat.assistant_ids("42")[-1] == llama.special_id("<|eot_id|>")
  assert llama.decode(chat.tool_suffix(["1"])[0]).startswith(
    "<|start_header_id|>ipython"
  )


def test_a_template_with_functions_is_qwen_xml(make, tokenizer):
  chat = make(tokenizer, XML)
  assert chat.dialect is dialects.QWEN_XML
  text = chat.turn_text("Two:", [messages_lib.Call("python", {"code": "1"})])
  assert text == "\n</think>\n\nTwo:\n" + XML_CALL % 1
  assert chat.dialect.write("python", {"code": "1"}, "") == XML_CALL % 1


@pytest.mark.parametrize("template", [LLAMA, XML])
def test_supervised_turns_are_read_back(
  make, tokenizer, llama, template, canned_sandbox
):
  of = llama if template is LLAMA else tokenizer
  chat, toolbox = make(of, template), tools.Toolbox(canned_sandbox())
  call = {"name": "python", "arguments": {"code": CODE}}
  row = {
    "messages": [
      {"role": "user", "content": "6 * 7?"},
      {"role": "assistant", "content": "Let me see.", "tool_calls": [call]},
      {"role": "tool", "content": "42"},
      {"role": "assistant", "content": "It is <answer>\\boxed{42}</answer>"},
    ]
  }
  episode = corpus.Writer(chat, toolbox).episode(
    conversations.parse(json.dumps(row), "line 1")
  )
  assert episode.answers == ["42"] and episode.n_turns == 2
  start = episode.roles.index(ROLE.MODEL)
  end = next(
    i
    for i in range(start, len(episode.roles))
    if episode.roles[i] != ROLE.MODEL
  )
  turn = toolbox.parse_turn(episode.token_ids[start:end], chat)
  assert [dict(c.arguments) for c in turn.calls] == [{"code": CODE}]
  assert "Let me see." in turn.content


def test_templates_that_teach_no_known_call_are_refused(make, llama):
  for template, said in (
    (LLAMA.replace('"parameters": \' ~', '"kwargs": \' ~'), "no tool call"),
    (LLAMA.replace("{{ t | tojson(indent=4) }}", ""), "does not show the tool"),
  ):
    with pytest.raises(ValueError, match=said) as e:
      make(llama, template)
    assert "\n" not in str(e.value)
  with pytest.raises(ValueError, match="'lama3' is unknown.*llama3"):
    make(llama, LLAMA, dialect="lama3")


def test_a_dialect_may_be_named(make, llama):
  """Where the template writes none, and the run's own words teach it."""
  silent = LLAMA.replace("m.tool_calls", "m.nothing")
  chat = make(
    llama, silent, dialect="llama3", system="python takes code and stdin."
  )
  text = chat.turn_text("So:", [CALL])
  assert text == "So:\n" + dialects.LLAMA3.write("python", {"code": CODE}, "")


def test_arguments_that_a_template_wants_as_text(make, llama):
  chat = make(llama, LLAMA.replace("(f.arguments | tojson)", "f.arguments"))
  turn = calls.parse_text(
    chat.turn_text("", [CALL]), tool=calls.PYTHON, dialect=chat.dialect
  )
  assert turn.calls[0].arguments == {"code": CODE}
