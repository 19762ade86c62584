"""Conversations as ids: the assistant alone is learnt, as the loop reads."""

import itertools
import json

import pytest

from roc import layout
from roc.host import chat as chat_lib
from roc.host import conversations, corpus, template_chat, tools

ROLE = layout.Role
# As Qwen3's: reasoning of the last turn only, calls in Hermes style.
QWEN = """
{%- if tools %}{{ '<|im_start|>system\n' }}
{%- for tool in tools %}{{ tool | tojson }}{% endfor %}{{ '<|im_end|>\n' }}
{%- endif %}
{%- for m in messages %}
{%- if m.role == 'tool' %}
{{- '<|im_start|>user' if messages[loop.index0 - 1].role != 'tool' }}
{{- '\n<tool_response>\n' + m.content + '\n</tool_response>' }}
{{- '<|im_end|>\n' if loop.last or messages[loop.index0 + 1].role != 'tool' }}
{%- else %}
{{- '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' and loop.last %}
{{- '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}
{{- m.content }}
{%- for call in m.tool_calls or [] %}
{{- '\n' if m.content or not loop.first }}
{{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson }}{{ '}\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and not enable_thinking %}
{{- '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}
"""


def call(code, name="python"):
  return {"name": name, "arguments": {"code": code}}


TALK = [
  {"role": "user", "content": "What is 6 * 7?"},
  {
    "role": "assistant",
    "content": "Two:",
    "tool_calls": [call("1"), call("2")],
  },
  {"role": "tool", "content": "1"},
  {"role": "tool", "content": "<answer>2"},
  {"role": "assistant", "content": "So <answer>\\boxed{42}</answer>"},
  {"role": "user", "content": "Sure?"},
  {"role": "assistant", "content": "Yes."},
]


@pytest.fixture
def toolbox(canned_sandbox):
  return tools.Toolbox(canned_sandbox())


def conversation(messages, **fields):
  row = json.dumps({"messages": messages} | fields)
  return conversations.parse(row, "data.jsonl line 3")


def template(tmp_path, tokenizer, toolbox, **arguments):
  path = tmp_path / "qwen.jinja"
  path.write_text(QWEN)
  return template_chat.TemplateChat(
    tokenizer,
    tools=[toolbox.schema],
    template=str(path),
    arguments=arguments or None,
  )


def spoken(episode, tokenizer):
  """Pairs of role and text, neighbours of one role together."""
  return [(s["role"], s["text"]) for s in episode.segments(tokenizer)]


def test_only_the_assistant_is_learnt(chat, toolbox, tokenizer):
  episode = corpus.Writer(chat, toolbox).episode(conversation(TALK, id="a"))
  call_text = (
    '<tool_call>{"name": "python", "arguments": {"code": "%s"}}</tool_call>'
  )
  assert spoken(episode, tokenizer) == [
    (
      "prompt",
      "<|im_start|>user\nWhat is 6 * 7?<|im_end|><|im_start|>assistant\n",
    ),
    ("model", "Two:" + call_text % 1 + call_text % 2 + "<|im_end|>"),
    ("template", "<|im_start|>user\n<tool_response>"),
    ("tool", "1"),
    ("template", "</tool_response><tool_response>"),
    ("tool", "<answer>2"),
    ("template", "</tool_response><|im_end|><|im_start|>assistant\n"),
    ("model", "So <answer>\\boxed{42}</answer><|im_end|>"),
    (
      "template",
      "<|im_start|>user\nSure?<|im_end|><|im_start|>assistant\n",
    ),
    ("model", "Yes.<|im_end|>"),
  ]
  assert episode.task_id == "a" and episode.question == "What is 6 * 7?"
  assert episode.answers == ["42"] and episode.n_turns == 3
  assert set(episode.logprobs) == {0.0}
  assert episode.stop_reason == layout.StopReason.ANSWERED


def test_a_call_is_one_the_loop_reads(chat, toolbox, tokenizer):
  """Also code with quotes, newlines and tags in it."""
  code = 'print("<tool_call>")\n# ü </tool_call> \\ end'
  messages = [
    TALK[0],
    {"role": "assistant", "content": None, "tool_calls": [call(code)]},
  ]
  for form in (chat, chat_lib.ChatFormat(tokenizer, style="qwen")):
    episode = corpus.Writer(form, toolbox).episode(conversation(messages))
    start = episode.roles.index(ROLE.MODEL)
    parsed = toolbox.parse_turn(episode.token_ids[start:], chat)
    assert [c.arguments["code"] for c in parsed.calls] == [code]
    assert parsed.calls[0].error is None


def test_a_template_writes_as_it_is_sampled(tmp_path, toolbox, tokenizer):
  form = template(tmp_path, tokenizer, toolbox)
  episode = corpus.Writer(form, toolbox).episode(conversation(TALK[:5]))
  model = [t for role, t in spoken(episode, tokenizer) if role == "model"]
  call_text = (
    '<tool_call>\n{"name": "python", "arguments": {"code": "%s"}}\n</tool_call>'
  )
  assert model == [
    "<think>\n\n</think>\n\nTwo:\n"
    + (call_text % 1 + "\n" + call_text % 2 + "<|im_end|>"),
    "<think>\n\n</think>\n\nSo <answer>\\boxed{42}</answer><|im_end|>",
  ]
  prompt = form.prompt_ids("What is 6 * 7?")
  assert episode.token_ids[: len(prompt)] == prompt
  suffix = form.tool_suffix(["1", "<answer>2"])[0]
  text = tokenizer.decode(episode.token_ids)
  assert tokenizer.decode(suffix) in text


def test_reasoning_goes_where_the_template_has_it(tmp_path, toolbox, tokenizer):
  messages = [TALK[0], TALK[6] | {"reasoning_content": "Hm."}]
  form = template(tmp_path, tokenizer, toolbox)
  episode = corpus.Writer(form, toolbox).episode(conversation(messages))
  assert spoken(episode, tokenizer)[-1] == (
    "model",
    "<think>\nHm.\n</think>\n\nYes.<|im_end|>",
  )


def test_reasoning_that_the_header_opened_is_gone_on_from(toolbox, tokenizer):
  form = template_chat.TemplateChat(
    tokenizer, tools=[toolbox.schema], template="rstar2"
  )
  messages = [TALK[0], TALK[6] | {"reasoning_content": "Hm."}]
  for found, text in (
    (messages, "Hm.</reason>\nYes.<|im_end|>"),
    ([TALK[0], TALK[6]], "</reason>\nYes.<|im_end|>"),
    (
      [TALK[0], TALK[6] | {"content": "<reason>Hm.</reason>Yes."}],
      "Hm.</reason>Yes.<|im_end|>",
    ),
  ):
    episode = corpus.Writer(form, toolbox).episode(conversation(found))
    assert spoken(episode, tokenizer)[-1] == ("model", text)


def test_reasoning_without_a_place_is_an_error(tmp_path, toolbox, tokenizer):
  form = template(tmp_path, tokenizer, toolbox, enable_thinking=False)
  writer = corpus.Writer(form, toolbox)
  plain = writer.episode(conversation([TALK[0], TALK[6]]))
  assert spoken(plain, tokenizer)[-1] == ("model", "Yes.<|im_end|>")
  messages = [TALK[0], TALK[6] | {"reasoning_content": "Hm."}]
  with pytest.raises(
    ValueError, match=r"line 3: field 'messages\[1\]'.*enable"
  ):
    writer.episode(conversation(messages))


def test_the_loop_and_the_writer_agree_on_every_id(chat, toolbox):
  """A rollout that says the same has the same ids and roles."""
  episode = corpus.Writer(chat, toolbox).episode(conversation(TALK[:5]))
  ids = chat.prompt_ids(TALK[0]["content"])
  roles = [ROLE.PROMPT] * len(ids)
  turns = [
    list(run)
    for role, run in itertools.groupby(
      zip(episode.token_ids, episode.roles, strict=True), key=lambda p: p[1]
    )
    if role == ROLE.MODEL
  ]
  for turn, answers in zip(turns, (["1", "<answer>2"], None), strict=True):
    sampled = [i for i, _ in turn]
    assert chat.is_whole(sampled)
    ids, roles = ids + sampled, roles + [ROLE.MODEL] * len(sampled)
    if answers is not None:
      more, kinds = chat.tool_suffix(answers)
      ids, roles = ids + more, roles + kinds
  assert episode.token_ids == ids and episode.roles == roles


@pytest.mark.parametrize(
  ("messages", "fields", "sentence"),
  [
    (TALK, {"tools": [{"name": "web"}]}, "'tools' offers 'web', and the run's"),
    (
      [TALK[0], TALK[4] | {"tool_calls": [call("1", "web")]}],
      {},
      r"messages\[1\].tool_calls\[0\]' makes a call that would not run \(unk",
    ),
    (
      [TALK[0], TALK[4] | {"tool_calls": [call(3)]}],
      {},
      "tool_calls.*would not run .bad arguments: `code` must be a string",
    ),
    (
      [TALK[0], TALK[4] | {"content": "<tool_call>{</tool_call>"}],
      {},
      r"messages\[1\].content' makes a call that would not run \(bad JSON",
    ),
    (
      [*TALK[:3], TALK[4]],
      {},
      r"messages\[2\]' follows a turn with 2 tool calls, and 1 of them are",
    ),
    (
      [TALK[0], TALK[4], TALK[2], TALK[4]],
      {},
      r"messages\[2\]' follows a turn with 0 tool calls, and 1 of them",
    ),
    (
      [*TALK[:2], *TALK[5:]],
      {},
      r"messages\[2\]' follows a turn with 2 tool calls, and 0 of them",
    ),
    (
      [TALK[0], TALK[4] | {"tool_calls": [call("1")] * 5}],
      {},
      "too many calls: at most 4",
    ),
  ],
)
def test_what_the_loop_would_not_run_is_refused(
  messages, fields, sentence, chat, toolbox
):
  with pytest.raises(
    ValueError, match=f"data.jsonl line 3: field .*{sentence}"
  ):
    corpus.Writer(chat, toolbox).episode(conversation(messages, **fields))


def test_a_system_message_is_the_prompts(chat, toolbox, tokenizer):
  messages = [{"role": "system", "content": "Be brief."}, TALK[0], TALK[6]]
  episode = corpus.Writer(chat, toolbox).episode(conversation(messages))
  prompt = chat.prompt_ids(TALK[0]["content"], "Be brief.")
  assert episode.token_ids[: len(prompt)] == prompt
  assert episode.roles[len(prompt)] == ROLE.MODEL


def test_calls_that_the_template_hides_are_refused(
  tmp_path, toolbox, tokenizer
):
  path = tmp_path / "other.jinja"
  path.write_text(QWEN.replace("<tool_call>", "[CALL]"))
  with pytest.raises(ValueError, match="no tool call that can be read back"):
    template_chat.TemplateChat(
      tokenizer, tools=[toolbox.schema], template=str(path)
    )
