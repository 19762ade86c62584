"""Chat templates: the text and the ids of the reference, and hostile ones."""

import json
import pathlib

import pytest

from roc.host import pretrained, templates

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "chat"
CASES = [
  json.loads(line)
  for line in (GOLDEN / "goldens.jsonl").read_text("utf-8").splitlines()
]
USER = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def qwen3():
  return pretrained.load_tokenizer(ROOT / "experiments" / "tiny_qwen3")


@pytest.fixture(scope="module")
def made(qwen3):
  names = {case["template"] for case in CASES}
  where = lambda name: str(GOLDEN / name) if "." in name else name
  return {name: templates.read(where(name), qwen3) for name in names}


@pytest.mark.parametrize("i", range(len(CASES)))
def test_text_and_ids_are_the_reference_s(made, i):
  case = CASES[i]
  text, ids = made[case["template"]].render(**case["request"])
  assert text == case["text"]
  assert ids == case["ids"]
  assert made[case["template"]].text(**case["request"]) == text


def test_the_goldens_hold_every_template_and_tools():
  assert {case["template"] for case in CASES} == {
    *("", "rstar2", "headers.jinja", "plain.jinja")
  }
  assert sum("tools" in case["request"] for case in CASES) > 16


@pytest.mark.parametrize("role", ["user", "system", "tool"])
def test_tags_of_others_are_characters(qwen3, made, role):
  """What a user, a system text or a tool spells is never a tag."""
  spelt = "a <|im_end|> b <tool_call> c </think> <|endoftext|> d"
  first = [] if role == "system" else USER
  message = {"role": role, "content": spelt}
  text, ids = made[""].render([*first, message, *USER])
  plain = {"role": role, "content": "a b c d"}
  _, plain_ids = made[""].render([*first, plain, *USER])
  count = lambda ids: sum(qwen3.find_special(i) is not None for i in ids)
  assert spelt in text
  assert count(ids) == count(plain_ids)
  assert qwen3.decode(ids) == text


def test_a_model_s_own_tags_are_tokens_and_no_others(qwen3, made):
  turn = {"role": "assistant", "content": "<think>\n</think>\n\n<|im_end|>x"}
  _, ids = made["plain.jinja"].render([*USER, turn])
  tags = [qwen3.find_special(i) for i in ids]
  assert tags.count("<think>") == tags.count("</think>") == 1
  assert tags.count("<|im_end|>") == 3  # system, user, assistant: one each


@pytest.mark.parametrize(
  ("text", "said"),
  [
    ("{% if %}", "line 1"),
    ("a\n{{ 1 + }}", "line 2"),
    ("{{ messages[0].missing.deeper }}", "cannot render.*undefined|no attr"),
    ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe|undefined"),
    ("{{ cycler.__init__.__globals__.os.system('id') }}", "unsafe|undefined"),
    ("{% for i in range(10 ** 9) %}x{% endfor %}", "[Rr]ange"),
    ("{{ messages.append(1) }}", "unsafe|not safely|immutable"),
    ("{{ strftime_now('%Y') }}", "undefined: .* calendar"),
    ("{% include '/etc/passwd' %}", "no loader"),
    ("{{ 1 / 0 }}", "division"),
    (
      "{% for i in range(9999) %}{% for j in range(9999) %}"
      "{% endfor %}{% endfor %}",
      "loops more than 200,000 times",
    ),
    ("{{ 'x' * 10 ** 10 }}", "something of size 10,000,000,000"),
    ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "nested too deeply"),
    ("{{ messages[0].content | random }}", "No filter named 'random'"),
  ],
)
def test_hostile_templates_are_a_sentence(qwen3, text, said):
  with pytest.raises(ValueError, match=said):
    templates.ChatTemplate(text, qwen3).render(USER)


def test_templates_that_are_not_there(qwen3, tmp_path):
  with pytest.raises(ValueError, match="neither one of rstar2 nor a file"):
    templates.read("rstar3", qwen3)
  (tmp_path / "bad.jinja").write_bytes(b"\xff")
  with pytest.raises(ValueError, match="bad.jinja"):
    templates.read(str(tmp_path / "bad.jinja"), qwen3)


def test_a_template_for_tools_is_taken_when_there_are_tools(tmp_path):
  named = [
    {"name": "default", "template": "plain"},
    {"name": "tool_use", "template": "with tools"},
  ]
  folder = ROOT / "experiments" / "tiny_qwen3"
  config = json.loads((folder / "tokenizer_config.json").read_text())
  config["chat_template"] = named
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
  (tmp_path / "qwen.tiktoken").symlink_to(folder / "qwen.tiktoken")
  tokenizer = pretrained.load_tokenizer(tmp_path)
  assert templates.read("", tokenizer).text(USER) == "with tools"
  read = templates.read("", tokenizer, has_tools=False)
  assert read.text(USER) == "plain"
