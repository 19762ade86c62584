"""A template used forwards: the same ids as rendering, where that is stable."""

import pathlib

import pytest

from roc import layout
from roc.host import pretrained, template_chat, templates, tools

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "chat"
PLAIN = str(GOLDEN / "plain.jinja")
SCHEMA = tools.tool_schema(tools.python, "python")
CODE = {"name": "python", "arguments": {"code": "print(156)"}}
CALL = '<tool_call>\n{"name": "python", "arguments": {"code": "print(156)"}}\n'
CALL += "</tool_call>"
TOLD = "Call python with code, and stdin if it reads any."
RESULTS = ["156", 'a "quoted" <|im_end|>\n{line}', "", "é 数\n\n"]
ROLE = layout.Role


@pytest.fixture(scope="module")
def qwen3():
  return pretrained.load_tokenizer(ROOT / "experiments" / "tiny_qwen3")


@pytest.fixture(scope="module")
def make(qwen3):
  def make(template="", **options):
    if template not in ("", "rstar2"):  # these write no calls
      options = {"dialect": "hermes"} | options
    options = {"tools": [SCHEMA]} | options
    return template_chat.TemplateChat(qwen3, template=template, **options)

  return make


def user(text):
  return {"role": "user", "content": text}


@pytest.mark.parametrize("template", ["", "rstar2", PLAIN])
def test_the_prompt_is_the_rendered_one(make, qwen3, template):
  chat = make(template, system="Be brief.", instruction="Solve: ")
  turns = [{"role": "system", "content": "Be brief."}, user("Solve: 1?")]
  rendered = templates.read(template, qwen3).render(
    turns, [SCHEMA], add_generation_prompt=True
  )
  assert chat.prompt_ids("1?") == rendered[1]
  own = chat.prompt_ids("1?", "Another.")
  assert "Another." in qwen3.decode(own) != rendered[0]


def test_variables_of_the_template_reach_it(make, qwen3):
  chat = make(arguments={"enable_thinking": False})
  assert qwen3.decode(chat.prompt_ids("1?")).endswith(
    "assistant\n<think>\n\n</think>\n\n"
  )
  # The model's later turns open the same way as the first.
  text = qwen3.decode(chat.tool_suffix(["1"])[0])
  assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
  # And what the header opened is not opened again in a turn to learn.
  learnt = chat.assistant_ids("<think>\n\n</think>\n\n156")
  assert qwen3.decode(learnt) == "156<|im_end|>"


@pytest.mark.parametrize("template", ["", "rstar2"])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_suffixes_are_what_rendering_would_append(make, qwen3, template, n):
  """Behind a call; ids are appended to ids and never made anew."""
  chat = make(template)
  called = {
    "role": "assistant",
    "content": "Let me see.",
    "tool_calls": [{"type": "function", "function": CODE}],
  }
  answers = [{"role": "tool", "content": text} for text in RESULTS[:n]]
  read = templates.read(template, qwen3)
  text, _ = read.render(
    [user("1?"), called, *answers], [SCHEMA], add_generation_prompt=True
  )
  ids = [
    *chat.prompt_ids("1?"),
    *chat.assistant_ids(f"Let me see.\n{CALL}"),
    *chat.tool_suffix(RESULTS[:n])[0],
  ]
  # rStar2's header opens a block that this turn did not come with.
  assert (
    qwen3.decode(ids)
    == text.replace("assistant\nLet me", "assistant\n<reason>Let me")
    if template
    else qwen3.decode(ids) == text
  )


def test_a_template_that_keeps_its_prefix_gives_the_same_ids(make, qwen3):
  chat = make(PLAIN)
  said = "It is 12 * 13."
  whole = [user("1?"), {"role": "assistant", "content": said}]
  read = templates.read(PLAIN, qwen3)
  for last, suffix in (
    (user("And 2?"), chat.user_suffix("And 2?")),
    ({"role": "tool", "content": "156"}, chat.tool_suffix(["156"])),
  ):
    ids = [*chat.prompt_ids("1?"), *chat.assistant_ids(said), *suffix[0]]
    rendered = read.render([*whole, last], [SCHEMA], add_generation_prompt=True)
    assert ids == rendered[1]


@pytest.mark.parametrize("template", ["", "rstar2", PLAIN])
def test_roles_say_who_put_a_token_there(make, qwen3, template):
  chat = make(template)
  ids, roles = chat.tool_suffix(["the 156 answer"])
  assert len(ids) == len(roles) and set(roles) == {ROLE.TOOL, ROLE.TEMPLATE}
  by_tool = [i for i, r in zip(ids, roles, strict=True) if r == ROLE.TOOL]
  assert qwen3.decode(by_tool).strip() == "the 156 answer"
  ids, roles = chat.user_suffix("And now?")
  assert set(roles) == {ROLE.TEMPLATE} and "And now?" in qwen3.decode(ids)


@pytest.mark.parametrize("result", RESULTS)
def test_results_are_characters_whatever_they_spell(make, qwen3, result):
  chat = make()
  ids, _ = chat.tool_suffix([result])
  n_tags = sum(qwen3.find_special(i) is not None for i in ids)
  plain, _ = chat.tool_suffix(["x"])
  assert n_tags == sum(qwen3.find_special(i) is not None for i in plain)
  assert result in qwen3.decode(ids)


def test_what_ends_a_turn(make, qwen3):
  chat = make()
  ids = qwen3.special_ids
  assert set(chat.stop_ids) == {ids["<|im_end|>"], ids["<|endoftext|>"]}
  assert chat.find_stop is None
  assert chat.pad_id == ids["<|endoftext|>"]
  assert chat.assistant_ids("x")[-1] == chat.turn_end_id == ids["<|im_end|>"]


def test_calls_of_a_turn_without_a_tool(make):
  chat = make(tools=[])
  assert "<tools>" not in chat.tokenizer.decode(chat.prompt_ids("1?"))
  with pytest.raises(ValueError, match="made without tools"):
    chat.tool_suffix(["1"])
  with pytest.raises(ValueError, match="at least one call"):
    make().tool_suffix([])


HEAD = "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\\n' }}"
END = "{{ '<|im_end|>\\n' }}{%- endfor -%}"
OPEN = (
  "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.mark.parametrize(
  ("template", "said"),
  [
    # The answer comes with the number of turns before it.
    (HEAD + "{{ loop.index ~ m.content }}" + END + OPEN, "not append-only"),
    # An old turn of the model is written otherwise than the last.
    (
      HEAD
      + "{{ m.content }}{% if m.role == 'assistant' and not loop.last %}"
      + "{{ '</think>\\n' }}{% else %}{{ '<|im_end|>\\n' }}{% endif %}"
      + "{%- endfor -%}"
      + OPEN,
      "differently when an answer follows",
    ),
    # The model's turns fall away.
    (
      "{%- for m in messages if m.role != 'assistant' -%}{{ m.content }}"
      + END
      + OPEN,
      "leaves the model's turns out",
    ),
    # A tool's answer falls away.
    (
      "{%- for m in messages if m.role != 'tool' -%}"
      + "{{ '<|im_start|>' + m.role + m.content }}"
      + END
      + OPEN,
      "does not show what a tool says",
    ),
    # Nothing ends a turn.
    (
      "{%- for m in messages -%}{{ m.content }}{%- endfor -%}",
      "nothing that ends a turn",
    ),
    # Opening the model's turn rewrites what was there.
    (
      "{%- if add_generation_prompt %}{{ 'Go on.' }}{% endif %}"
      + HEAD
      + "{{ m.content }}"
      + END,
      "changes the conversation|append-only",
    ),
    # A second result changes the first.
    (
      HEAD
      + "{% if m.role == 'tool' and not loop.last %}{{ m.content | upper }}"
      + "{% else %}{{ m.content }}{% endif %}"
      + END
      + OPEN,
      "cannot be put together",
    ),
  ],
)
def test_templates_that_cannot_be_used_forwards(make, tmp_path, template, said):
  path = tmp_path / "t.jinja"
  path.write_text(template)
  with pytest.raises(ValueError, match=said):
    make(str(path), system=TOLD)


def test_a_template_that_writes_results_as_json(make, tmp_path, qwen3):
  path = tmp_path / "t.jinja"
  shown = "{% if m.role == 'tool' %}{{ {'r': m.content} | tojson }}{% else %}"
  path.write_text(HEAD + shown + "{{ m.content }}{% endif %}" + END + OPEN)
  chat = make(str(path), system=TOLD)
  ids, roles = chat.tool_suffix(['a "b"\n'])
  assert r'{"r": "a \"b\"\n"}' in qwen3.decode(ids)
  assert ROLE.TOOL in roles
