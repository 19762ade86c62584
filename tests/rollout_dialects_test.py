"""Whole rollouts in the dialect of a chat template, with the real tool."""

import json
import pathlib

import pytest
import tokenizers

from roc import build, config, errors, layout, rollout, scripted
from roc.host import pretrained, sandbox, template_chat, tools
from roc.host import tokenizer as tokenizer_lib
from roc.host.tasks import problem

CHAT = pathlib.Path(__file__).parent / "golden" / "chat"
ANSWER = "<answer>\\boxed{42}</answer>"
TURNS = {
  "llama3": [
    'Hm.\n{"name": "python", "parameters": {"code": "print(6 * 7)"}}<|eot_id|>',
    "<|python_tag|>x = 5\nprint(x)<|eom_id|>",
    f"{ANSWER}<|eot_id|>",
  ],
  "qwen_xml": [
    "Hm.\n</think>\n\n<tool_call>\n<function=python>\n<parameter=code>\n"
    "print(6 * 7)\n</parameter>\n</function>\n</tool_call>\n"
    "<tool_call>\n<function=python>\n<parameter=code>\nx = 5\nprint(x)\n"
    "</parameter>\n</function>\n</tool_call><|im_end|>",
    f"\n</think>\n\n{ANSWER}<|im_end|>",
  ],
}
TAGS = {
  "llama3": [
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eot_id|>", "<|eom_id|>", "<|python_tag|>"),
  ],
  "qwen_xml": [
    *("<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>"),
    *("<tool_response>", "</tool_response>", "<think>", "</think>"),
  ],
}


def make_tokenizer(dialect):
  vocab = {name: i for i, name in enumerate(tokenizer_lib.byte_names())}
  backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=False
  )
  backend.decoder = tokenizers.decoders.ByteLevel()
  backend.add_special_tokens(TAGS[dialect])
  return tokenizer_lib.Tokenizer(backend)


@pytest.mark.parametrize("dialect", TURNS)
def test_calls_are_run_and_answered(dialect):
  tokenizer = make_tokenizer(dialect)
  turns = [tokenizer.encode_trusted(turn) for turn in TURNS[dialect]]
  with sandbox.Sandbox(sandbox.Limits()) as started:
    toolbox = tools.Toolbox(started)
    chat = template_chat.TemplateChat(
      tokenizer,
      tools=[toolbox.schema],
      template=str(CHAT / f"{dialect}.jinja"),
    )
    loop = rollout.AgentLoop(
      scripted.ScriptedSampler(lambda *_: turns),
      chat,
      toolbox,
      rollout.Limits(max_turns=4, max_tokens=2000, max_calls=8),
    )
    asked = problem.Problem("p", 0, "6 * 7?", "42")
    ((episode,),), _ = loop.run([asked], 1, seed=0, step=0)
  assert chat.dialect.name == dialect
  assert [(r.code, r.text) for r in episode.tool_records] == [
    ("print(6 * 7)", "42"),
    ("x = 5\nprint(x)", "5"),
  ]
  assert episode.outcome == layout.Outcome.CORRECT
  # What the model sampled is what is trained on, tags that end turns included.
  sampled = [
    i
    for i, role in zip(episode.token_ids, episode.roles, strict=True)
    if role == layout.Role.MODEL
  ]
  assert sampled == [i for turn in turns for i in turn]


def test_a_run_is_refused_before_it_starts(tmp_path):
  """Every program builds its host side here."""
  make_tokenizer("llama3").save(tmp_path / "tokenizer.json")
  text = (CHAT / "llama3.jinja").read_text()
  c = config.default_config()
  c.pretrained = str(tmp_path)
  cfg = config.resolve(c)
  for template, said in (
    (text.replace('"parameters": \' ~', '"kwargs": \' ~'), "no tool call that"),
    (text.replace("tojson(indent=4)", "length"), "does not show the tool"),
  ):
    side = {"chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(side))
    assert pretrained.load_tokenizer(tmp_path).published.templates
    with pytest.raises(errors.UserError, match=said) as e:
      build.host_parts(cfg)
    assert "\n" not in str(e.value)
