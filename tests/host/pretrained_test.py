"""Tokenizers of Hugging Face folders: Qwen's ranks, and bad folders."""

import base64
import json
import pathlib
import shutil
import unicodedata

import pytest

from roc.host import pretrained, templates
from roc.host import tokenizer as tokenizer_lib

ROOT = pathlib.Path(__file__).parents[2]
TINY = ROOT / "experiments" / "tiny_qwen3"


@pytest.fixture(scope="module")
def qwen3():
  return pretrained.load_tokenizer(TINY)


def ranks(*pairs):
  """A file of ranks: every byte, then these tokens."""
  tokens = [bytes([b]) for b in range(256)] + list(pairs)
  return b"".join(
    base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens)
  )


def folder(path, *, config=None, **files):
  path.mkdir(exist_ok=True)
  added = {"256": {"content": "<|im_end|>", "special": True}}
  config = {"added_tokens_decoder": added} if config is None else config
  (path / "tokenizer_config.json").write_text(json.dumps(config))
  for name, content in files.items():
    name = name.replace("__", ".")
    if isinstance(content, bytes):
      (path / name).write_bytes(content)
    else:
      (path / name).write_text(content)
  return path


# The ids are those that Qwen's own tokenizers give (Hugging Face's, tiktoken).
@pytest.mark.parametrize(
  ("text", "ids"),
  [
    ("Hello, world!", [9707, 11, 1879, 0]),
    ("", []),
    ("e\u0301", [963]),  # NFC
    ("1234", [16, 17, 18, 19]),
    ("a\n\n\nb", [64, 1406, 65]),
    ("<|im_end|>", [27, 91, 318, 6213, 91, 29]),  # spelt out, so no tag
  ],
)
def test_ranks_give_the_published_ids(qwen3, text, ids):
  assert qwen3.encode(text) == ids


def test_the_whole_vocabulary_is_there(qwen3):
  assert qwen3.vocab_size == 151_669
  ids = qwen3.special_ids
  for tag, index in (
    ("<|endoftext|>", 151643),
    ("<|im_start|>", 151644),
    ("<|im_end|>", 151645),
    ("<tool_call>", 151657),
    ("</tool_response>", 151666),
    ("<think>", 151667),
  ):
    assert ids[tag] == index
  assert qwen3.published.eos_ids == (151645, 151643)
  assert qwen3.published.named_tokens["eos_token"] == "<|im_end|>"
  assert "enable_thinking" in qwen3.published.templates["default"]


@pytest.mark.parametrize(
  "text",
  [
    "naïve café — 数学 한국어 👩‍🔬 \u200b\u00a0\t\r\n x",
    "def f(x):\n    return x ** 2  # ok\n",
    "\ufffd\u0000 \x7f",
    "a" * 5000,
  ],
)
def test_text_comes_back(qwen3, text):
  normal = unicodedata.normalize("NFC", text)
  assert qwen3.decode(qwen3.encode(text)) == normal


def test_what_was_made_of_ranks_is_kept_as_tokenizer_json(tmp_path):
  made = pretrained.load_tokenizer(
    folder(
      tmp_path / "a",
      config={
        "added_tokens_decoder": {"258": {"content": "<|x|>", "special": True}},
        "eos_token": {"content": "<|x|>"},
        "chat_template": "T",
      },
      small__tiktoken=ranks(b"ab", b"abc"),
    )
  )
  assert made.encode("abcab") == [257, 256]
  made.save(tmp_path / "a" / "tokenizer.json")
  again = pretrained.load_tokenizer(tmp_path / "a")
  assert again.fingerprint == made.fingerprint
  assert again.published == made.published
  alone = pretrained.load_tokenizer(tmp_path / "a" / "tokenizer.json")
  assert alone.encode("abcab") == [257, 256]


@pytest.mark.parametrize(
  ("files", "said"),
  [
    ({}, r"holds no tokenizer: neither tokenizer.json nor \*.tiktoken"),
    ({"a__tiktoken": b"!!! 0\n"}, "a.tiktoken line 1 is not a token"),
    ({"a__tiktoken": b"YQ== 0 1\n"}, "line 1 is not a token"),
    ({"a__tiktoken": b"YQ== 0\n"}, "no whole vocabulary"),
    ({"a__tiktoken": ranks(b"ab") + b"YWM= 300\n"}, "no whole vocabulary"),
    ({"a__tiktoken": ranks(b"ab", b"wxyz")}, r"no merges lead to .*b'wxyz'"),
    (
      {"a__tiktoken": ranks(), "b__tiktoken": ranks()},
      "several files",
    ),
    ({"a__tiktoken": ranks(b"ab")}, "must follow the 257 ranks"),
    ({"a__tiktoken": ranks(), "config": {}}, "added_tokens_decoder which"),
    ({"a__tiktoken": ranks(), "config": []}, "holds no JSON object"),
    ({"tokenizer__json": "{"}, "tokenizer.json"),
    ({"tokenizer__json": ""}, "tokenizer.json"),
    (
      {
        "a__tiktoken": ranks(),
        "generation_config__json": '{"eos_token_id": "x"}',
      },
      "eos_token_id is 'x', no id",
    ),
    (
      {"a__tiktoken": ranks(), "chat_template__jinja": b"\xff"},
      "chat_template.jinja cannot be read",
    ),
  ],
)
def test_a_folder_that_cannot_be_used(tmp_path, files, said):
  with pytest.raises(ValueError, match=said):
    pretrained.load_tokenizer(folder(tmp_path / "a", **files))


def test_paths_that_are_none(tmp_path):
  with pytest.raises(ValueError, match="nowhere does not exist"):
    pretrained.load_tokenizer(tmp_path / "nowhere")
  (tmp_path / "file.json").write_text("[]")
  with pytest.raises(ValueError, match="file.json"):
    pretrained.load_tokenizer(tmp_path / "file.json")


def test_a_template_of_its_own_file_wins(tmp_path):
  path = folder(
    tmp_path / "a",
    config={
      "chat_template": [
        {"name": "default", "template": "D"},
        {"name": "tool_use", "template": "U"},
      ]
    },
  )
  tokenizer_lib.quickstart_tokenizer().save(path / "tokenizer.json")
  load = lambda: pretrained.load_tokenizer(path).published.templates
  assert load() == {"default": "D", "tool_use": "U"}
  (path / "chat_template.json").write_text('{"chat_template": "J"}')
  assert load() == {"default": "D", "tool_use": "U"}
  (path / "chat_template.jinja").write_text("F")
  assert load() == {"default": "F"}
  # As transformers saves several.
  more = path / "additional_chat_templates"
  more.mkdir()
  (more / "tool_use.jinja").write_text("T")
  (more / "rag.jinja").write_text("R")
  assert load() == {"default": "F", "tool_use": "T", "rag": "R"}
  found = pretrained.load_tokenizer(path)
  text = lambda *args, **kwargs: templates.read(*args, **kwargs).text([])
  assert text("", found) == "T" and text("", found, has_tools=False) == "F"
  assert text("rag", found) == "R"
  (path / "chat_template.jinja").unlink()
  assert load() == {"default": "D", "tool_use": "T", "rag": "R"}
  shutil.rmtree(more)
  config_file = path / "tokenizer_config.json"
  config_file.write_text("{}")
  assert load() == {"default": "J"}
  (path / "chat_template.json").write_text('{"chat_template": [1]}')
  with pytest.raises(ValueError, match="chat_template must be text"):
    load()


def test_older_folders_name_their_tokens_elsewhere(tmp_path):
  """special_tokens_map.json counts where added tokens are not described."""
  path = folder(tmp_path / "a", config={"eos_token": "<|endoftext|>"})
  tokenizer_lib.quickstart_tokenizer().save(path / "tokenizer.json")
  named = lambda: pretrained.load_tokenizer(path).published.named_tokens
  assert named() == {"eos_token": "<|endoftext|>"}
  specials = {"eos_token": {"content": "<|im_end|>"}, "pad_token": "<|pad|>"}
  (path / "special_tokens_map.json").write_text(json.dumps(specials))
  assert named() == {"eos_token": "<|im_end|>", "pad_token": "<|pad|>"}
  config = {"eos_token": "<|endoftext|>", "added_tokens_decoder": {}}
  (path / "tokenizer_config.json").write_text(json.dumps(config))
  assert named() == {"eos_token": "<|endoftext|>"}
  (path / "special_tokens_map.json").write_text("[")
  (path / "tokenizer_config.json").unlink()
  with pytest.raises(ValueError, match="special_tokens_map.json is not JSON"):
    named()


def test_the_shipped_files_are_unchanged(tmp_path):
  """Ids would move otherwise, and every rendered prompt."""
  copy = tmp_path / "copy"
  shutil.copytree(TINY, copy)
  assert pretrained.load_tokenizer(copy).fingerprint == "95a048d9ce25afcb"
