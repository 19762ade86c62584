"""Text to token ids and back, where untrusted text never becomes a tag.

What a tool printed or a dataset row says is only characters: `encode` spells
out `<tool_call>` letter by letter even when the vocabulary holds it as one
token. The special ids are put into a sequence by `special_id` alone, that is by
our own templates and by the policy.

`quickstart_tokenizer` is a vocabulary small enough to read: tags, 256 bytes
and the strings that the arithmetic task repeats.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

PAD = "<|pad|>"
END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
CALL_OPEN = "<tool_call>"
CALL_CLOSE = "</tool_call>"
RESPONSE_OPEN = "<tool_response>"
RESPONSE_CLOSE = "</tool_response>"
ANSWER_OPEN = "<answer>"
ANSWER_CLOSE = "</answer>"
REASON_OPEN = "<reason>"
REASON_CLOSE = "</reason>"

# In id order: padding is 0.
SPECIALS = (
  PAD,
  END_OF_TEXT,
  TURN_START,
  TURN_END,
  CALL_OPEN,
  CALL_CLOSE,
  RESPONSE_OPEN,
  RESPONSE_CLOSE,
  ANSWER_OPEN,
  ANSWER_CLOSE,
  REASON_OPEN,
  REASON_CLOSE,
)

# Whole strings that cost one token each in the quickstart's vocabulary. ASCII
# only: the byte-level decoder would read other characters as byte names.
QUICKSTART_STRINGS = (
  # Turn headers.
  "system\n",
  "user\n",
  "assistant\n",
  # A call and an answer.
  '{"name": "python", "arguments": {"code": "',
  '"}}',
  "\\boxed{",
  # Code: names right and misspelt, and the escapes that JSON needs.
  "print(",
  "print(x)",
  "print",
  "prnt",
  "pritn",
  "Print",
  "printf",
  "total",
  "value",
  "result",
  "x=",
  "\\n",
  '\\"',
  "while True: pass",
  # What the interpreter answers.
  "NameError: name '",
  "' is not defined",
  ". Did you mean: '",
  "'?",
  "SyntaxError: ",
  "'(' was never closed",
  "invalid syntax",
  "unterminated string literal",
  "unmatched ')'",
  "TypeError: ",
  "ValueError: ",
  "ZeroDivisionError: division by zero",
  "Traceback (most recent call last):",
  "Timeout",
  "Memory limit",
  "Output limit",
  "(no output)",
  "Invalid call: ",
  "bad JSON",
  "unclosed",
  "unknown tool",
  "bad arguments",
  # Turns that end with words and no answer.
  "Done.",
  "I do not know.",
  # Questions: the words between the numbers.
  "What is ",
  "Compute ",
  "Multiply ",
  "Add ",
  "Find the sum of ",
  "Find the product of ",
  " * ",
  " + ",
  " - ",
  " by ",
  " and ",
  " times ",
  " plus ",
  " minus ",
  ", ",
  " boxes hold ",
  " pens each. ",
  " pens are lost. How many are left?",
  " pens are added. How many now?",
  " rows have ",
  " seats each. ",
  " seats are taken. How many are free?",
  "A shop sells ",
  " pens a day. How many in ",
  " days?",
)


@dataclasses.dataclass(frozen=True)
class Published:
  """What a published folder says of its tokenizer beside the vocabulary.

  Attributes:
    templates: Jinja text of each chat template by its name; most folders have
      one, `default`.
    named_tokens: text of `bos_token`, `eos_token` and the like.
    eos_ids: ids at which generation ends (generation_config.json).
  """

  templates: Mapping[str, str] = dataclasses.field(default_factory=dict)
  named_tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)
  eos_ids: tuple[int, ...] = ()


class Tokenizer:
  """A `tokenizers` tokenizer whose tags cannot be forged by text.

  Args:
    backend: any tokenizer of the `tokenizers` library. Added tokens that look
      like tags are treated as special even where its file does not mark them so
      (Qwen's `<tool_call>` and `<think>`).
    published: what its folder says beside the vocabulary, if it has one.
  """

  def __init__(
    self,
    backend: tokenizers.Tokenizer,
    published: Published | None = None,
  ):
    self._backend = _mark_tags_special(backend)
    self.published = published or Published()
    self._backend.encode_special_tokens = True
    self._backend.no_padding()
    self._backend.no_truncation()
    added = self._backend.get_added_tokens_decoder()
    self._special_ids = {
      token.content: index for index, token in added.items() if token.special
    }
    self._specials = {i: text for text, i in self._special_ids.items()}

  @functools.cached_property
  def vocab_size(self) -> int:
    """Number of ids, added tokens included; every id is below it."""
    return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

  @property
  def special_ids(self) -> dict[str, int]:
    """Id of every special token by its text (a copy)."""
    return dict(self._special_ids)

  @functools.cached_property
  def fingerprint(self) -> str:
    """16 hex digits that change with any id, rule of encoding or template."""
    rules = json.loads(self._backend.to_str())
    if self.published.templates:
      rules["chat_templates"] = dict(self.published.templates)
    canonical = json.dumps(rules, sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]

  def special_id(self, text: str) -> int:
    """Id of one special token, such as `"<tool_call>"`.

    Raises:
      KeyError: the vocabulary has no such special token.
    """
    if text not in self._special_ids:
      raise KeyError(
        f"the tokenizer has no special token {text!r}; it has "
        f"{', '.join(sorted(self._special_ids))}"
      )
    return self._special_ids[text]

  def find_special(self, index: int) -> str | None:
    """Text of a special id, or None for an ordinary id."""
    return self._specials.get(index)

  def encode(self, text: str) -> list[int]:
    """Ids of plain text: never a special id, whatever the text says.

    Half a surrogate pair, which is no Unicode text, becomes U+FFFD.

    Args:
      text: any string; the empty one has no ids.

    Returns:
      Ids that `decode` turns back into the same text exactly (byte-level
      vocabularies).
    """
    clean = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return self._backend.encode(clean, add_special_tokens=False).ids

  def encode_trusted(
    self, text: str, tags: Collection[str] | None = None
  ) -> list[int]:
    """Ids of text of our own, in which a tag is its one special id.

    Args:
      text: nothing that a dataset, a tool or a policy wrote.
      tags: special tokens to look for; by default all of them.
    """
    ids = []
    for tag, piece in self.split_tags(text, tags):
      ids += self.encode(piece) if tag is None else [self._special_ids[tag]]
    return ids

  def split_tags(
    self, text: str, tags: Collection[str] | None = None
  ) -> list[tuple[str | None, str]]:
    """Cuts text at special tokens: pairs of (tag or None, text)."""
    if tags is None:
      pattern = self._tag_pattern
    else:
      pattern = _alternatives(t for t in tags if t in self._special_ids)
    pairs = []
    for i, piece in enumerate(pattern.split(text)):
      if piece:
        pairs.append((piece if i % 2 else None, piece))
    return pairs

  @functools.cached_property
  def _tag_pattern(self) -> re.Pattern[str]:
    return _alternatives(self._special_ids)

  def decode(self, ids: Sequence[int]) -> str:
    """Text of ids, special tokens spelt out; broken UTF-8 shows as U+FFFD.

    Raises:
      ValueError: an id is outside the vocabulary.
    """
    for index in (min(ids), max(ids)) if len(ids) else ():
      if not 0 <= index < self.vocab_size:
        raise ValueError(
          f"token id {index} is outside the vocabulary of {self.vocab_size}"
        )
    return self._backend.decode(list(ids), skip_special_tokens=False)

  def save(self, path: str | pathlib.Path) -> None:
    """Writes `tokenizer.json`, which `load` and other tools read."""
    pathlib.Path(path).write_text(
      self._backend.to_str(pretty=True), encoding="utf-8"
    )

  @classmethod
  def load(
    cls, path: str | pathlib.Path, published: Published | None = None
  ) -> "Tokenizer":
    """Reads a `tokenizer.json`; `pretrained.load_tokenizer` a whole folder.

    Raises:
      ValueError: the file is missing or is no tokenizer.
    """
    try:
      text = pathlib.Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
      raise ValueError(f"cannot read tokenizer file {path}: {error}") from error
    try:
      backend = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
      raise ValueError(
        f"{path} is not a tokenizer.json of the tokenizers library: {error}"
      ) from error
    return cls(backend, published)


def quickstart_tokenizer() -> Tokenizer:
  """The quickstart's vocabulary: tags, bytes and frequent whole strings.

  Numbers are spelt digit by digit, so that a small model can copy them.
  Between the strings the longest match from the left wins.
  """
  texts = [*SPECIALS, *byte_names(), *QUICKSTART_STRINGS]
  vocab = {text: index for index, text in enumerate(texts)}
  backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=False
  )
  backend.decoder = decoders.ByteLevel()
  backend.add_special_tokens(_added(SPECIALS, is_special=True))
  backend.add_tokens(_added(QUICKSTART_STRINGS, is_special=False))
  return Tokenizer(backend)


def _added(
  texts: Iterable[str], is_special: bool
) -> list[tokenizers.AddedToken]:
  return [
    tokenizers.AddedToken(text, special=is_special, normalized=False)
    for text in texts
  ]


def byte_names() -> list[str]:
  """The printable character by which byte-level vocabularies name each byte.

  GPT-2's table: printable Latin-1 bytes are themselves, the others are numbered
  from U+0100 in order.
  """
  printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
  n_shifted = 0
  names = []
  for byte in range(256):
    if byte in printable:
      names.append(chr(byte))
    else:
      names.append(chr(256 + n_shifted))
      n_shifted += 1
  return names


_TAG = re.compile(r"<[^\s<>]+>")


def _mark_tags_special(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
  """A copy in which every added token that looks like a tag is special."""
  copy = tokenizers.Tokenizer.from_str(backend.to_str())
  copy.add_special_tokens(
    [
      tokenizers.AddedToken(
        token.content,
        special=True,
        normalized=False,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        single_word=token.single_word,
      )
      for token in copy.get_added_tokens_decoder().values()
      if not token.special and _TAG.fullmatch(token.content)
    ]
  )
  return copy


def _alternatives(texts: Iterable[str]) -> re.Pattern[str]:
  """Finds any of some texts, the longest where several fit; none: nothing."""
  longest_first = sorted(texts, key=len, reverse=True)
  return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
