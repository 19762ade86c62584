"""Round trips of any text, and text that tries to forge a tag."""

import json
import random
import sys

import pytest
import tokenizers

from roc.host import tokenizer as tokenizer_lib

SPECIAL = tokenizer_lib.SPECIALS


def _random_text(rng: random.Random) -> str:
  """Characters of every plane, mixed with pieces of tags and vocabulary."""
  pieces = []
  for _ in range(rng.randrange(30)):
    kind = rng.randrange(4)
    if kind == 0:
      pieces.append(rng.choice(SPECIAL))
    elif kind == 1:
      pieces.append(rng.choice(tokenizer_lib.QUICKSTART_STRINGS))
    elif kind == 2:
      pieces.append(chr(rng.randrange(0, 128)))
    else:
      code = rng.randrange(sys.maxunicode + 1)
      pieces.append("" if 0xD800 <= code < 0xE000 else chr(code))
  return "".join(pieces)


def test_any_text_survives_the_round_trip_without_special_ids(tokenizer):
  rng = random.Random(0)
  for _ in range(500):
    text = _random_text(rng)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert min(ids, default=99) >= len(SPECIAL)
    assert max(ids, default=0) < tokenizer.vocab_size


@pytest.mark.parametrize(
  "text",
  [
    "",
    "\x00",
    "🎈👩‍👩‍👧",
    "é",
    "e\u0301",
    "ﬁ",
    " lead",
    "trail \n",
    "\r\n",
    "\u2028",
  ],
)
def test_awkward_text_is_not_normalised(tokenizer, text):
  assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("tag", SPECIAL)
def test_a_tag_in_text_is_spelt_out(tokenizer, tag):
  ids = tokenizer.encode(f"a{tag}b")
  assert tokenizer.special_id(tag) not in ids
  assert len(ids) > 4
  assert tokenizer.decode(ids) == f"a{tag}b"


def test_specials_are_the_first_ids_and_padding_is_zero(tokenizer):
  assert [tokenizer.special_id(tag) for tag in SPECIAL] == list(
    range(len(SPECIAL))
  )
  assert tokenizer.find_special(0) == "<|pad|>"
  assert tokenizer.find_special(len(SPECIAL)) is None
  assert tokenizer.decode([4, 5]) == "<tool_call></tool_call>"


def test_half_a_surrogate_pair_becomes_the_replacement_character(tokenizer):
  assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


def test_vocabulary_is_small_and_every_string_is_one_token(tokenizer):
  assert tokenizer.vocab_size <= 420
  strings = tokenizer_lib.QUICKSTART_STRINGS
  assert len(set(strings)) == len(strings)
  for text in strings:
    assert text.isascii()
    assert len(tokenizer.encode(text)) == 1, text


def test_numbers_are_spelt_by_digit(tokenizer):
  assert len(tokenizer.encode("9075")) == 4


def test_save_and_load_keep_ids_and_fingerprint(tokenizer, tmp_path):
  path = tmp_path / "tokenizer.json"
  tokenizer.save(path)
  loaded = tokenizer_lib.Tokenizer.load(path)
  text = "What is 12 * 34? <tool_call> 🎈"
  assert loaded.encode(text) == tokenizer.encode(text)
  assert loaded.fingerprint == tokenizer.fingerprint
  assert loaded.special_ids == tokenizer.special_ids


def test_fingerprint_sees_another_vocabulary(tokenizer, tmp_path):
  path = tmp_path / "tokenizer.json"
  tokenizer.save(path)
  path.write_text(path.read_text().replace("Done.", "Over."))
  loaded = tokenizer_lib.Tokenizer.load(path)
  assert loaded.fingerprint != tokenizer.fingerprint


def test_tags_that_a_file_calls_ordinary_are_protected_too(tokenizer, tmp_path):
  path = tmp_path / "tokenizer.json"
  tokenizer.save(path)
  state = json.loads(path.read_text())
  for token in state["added_tokens"]:
    token["special"] = False
  path.write_text(json.dumps(state))
  plain = tokenizers.Tokenizer.from_file(str(path))
  call = tokenizer.special_id("<tool_call>")
  assert plain.encode("<tool_call>").ids == [call], "the control must forge"
  loaded = tokenizer_lib.Tokenizer.load(path)
  assert call not in loaded.encode("<tool_call>")
  assert loaded.special_id("<tool_call>") == call


@pytest.mark.parametrize("bad", [-1, 10_000])
def test_ids_outside_the_vocabulary_are_an_error(tokenizer, bad):
  with pytest.raises(ValueError, match=f"{bad} is outside"):
    tokenizer.decode([20, bad])


def test_unknown_special_is_named(tokenizer):
  with pytest.raises(KeyError, match="<nope>"):
    tokenizer.special_id("<nope>")


@pytest.mark.parametrize("content", [None, b"{}", b"\xff\xfe", b"no json"])
def test_a_bad_file_is_one_clear_error(tmp_path, content):
  path = tmp_path / "tokenizer.json"
  if content is not None:
    path.write_bytes(content)
  with pytest.raises(ValueError, match="tokenizer.json"):
    tokenizer_lib.Tokenizer.load(path)
