"""How a conversation becomes token ids, piece by piece and only forwards.

Ids are the only state: a prompt is built once, and every later piece is
appended. Nothing here takes a list of messages and renders it anew, because
chat templates are not prefix-preserving and what was sampled must be what is
trained on.

Two styles share the tags of ChatML and Hermes. `compact` puts no newline
between a tag and its neighbour (the quickstart, where each token is time);
`qwen` writes the newlines that Qwen's models were trained with:

  compact  <|im_start|>user\\nQ<|im_end|><|im_start|>assistant\\n
  qwen     <|im_start|>user\\nQ<|im_end|>\\n<|im_start|>assistant\\n
"""

import abc
from collections.abc import Callable, Sequence

from roc import layout
from roc.host import dialects
from roc.host import messages as messages_lib
from roc.host import tokenizer as tokenizer_lib

STYLES = ("compact", "qwen")

THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"
# Tags that a model may write; all others are the template's.
MODEL_TAGS = (
  *(tokenizer_lib.CALL_OPEN, tokenizer_lib.CALL_CLOSE, dialects.PYTHON_TAG),
  *(tokenizer_lib.ANSWER_OPEN, tokenizer_lib.ANSWER_CLOSE),
  *(tokenizer_lib.REASON_OPEN, tokenizer_lib.REASON_CLOSE),
  *(THINK_OPEN, THINK_CLOSE),
)


class Chat(abc.ABC):
  """A format of conversations: what the agent loop and training need of it.

  Args:
    tokenizer: should hold the tags as special tokens. A tag that is none is
      spelt out, and where it ends a turn `find_stop` has to look for it.
    turn_end: the tag that ends a turn of the model.

  Attributes:
    dialect: in which the model writes calls.
  """

  def __init__(
    self,
    tokenizer: tokenizer_lib.Tokenizer,
    turn_end: str = tokenizer_lib.TURN_END,
  ):
    self.tokenizer = tokenizer
    self.dialect = dialects.HERMES
    self._turn_end = turn_end

  @abc.abstractmethod
  def prompt_ids(self, question: str, system: str = "") -> list[int]:
    """Ids of the prompt, the header of the model's first turn included.

    Args:
      question: the user's text; tags in it are encoded as plain characters.
      system: text of the system turn; no such turn when empty.

    Returns:
      Ids, all of role `PROMPT`.
    """

  @abc.abstractmethod
  def tool_suffix(self, results: Sequence[str]) -> tuple[list[int], list[int]]:
    """What follows a turn of the model that called tools.

    A block for each call, in order, then the header of the model's next turn.
    The model's own end-of-turn tag is not part of it: the model sampled that.

    Args:
      results: one text for each call; tags in it are plain characters.

    Returns:
      ids: tokens to append.
      roles: `Role.TOOL` for the results' text, `Role.TEMPLATE` for the rest.

    Raises:
      ValueError: there is no result, so there is nothing to answer.
    """

  @abc.abstractmethod
  def user_suffix(self, text: str) -> tuple[list[int], list[int]]:
    """What follows a turn of the model when the user speaks again.

    Args:
      text: the user's; tags in it are plain characters.

    Returns:
      ids: tokens to append, the header of the model's next turn included.
      roles: `Role.TEMPLATE` for all of them.
    """

  @abc.abstractmethod
  def turn_text(
    self,
    content: str,
    calls: Sequence[messages_lib.Call] = (),
    reasoning: str = "",
  ) -> str:
    """How the model would write a turn, for `assistant_ids`.

    Args:
      content: what it says.
      calls: tools that it calls, written behind that.
      reasoning: what it thinks before.

    Raises:
      ValueError: the format has no place for one of them.
    """

  def assistant_ids(self, text: str) -> list[int]:
    """A turn that the model is to learn, its end included.

    Args:
      text: what the model writes, with the tags of `MODEL_TAGS`; any others are
        plain characters.
    """
    ids = self.tokenizer.encode_trusted(text, MODEL_TAGS)
    return ids + self.turn_end_ids

  @property
  def stop_ids(self) -> tuple[int, ...]:
    """Ids that end the model's turn, by format and dialect, or the text."""
    ids = self.tokenizer.special_ids
    tags = (self._turn_end, *self.dialect.ends, tokenizer_lib.END_OF_TEXT)
    return tuple(ids[tag] for tag in tags if tag in ids)

  @property
  def find_stop(self) -> Callable[[Sequence[int]], int | None] | None:
    """Finds the end of a turn that no single id marks; None if one does.

    The function takes the ids of a turn so far and returns how many of them
    the turn has, its spelt end included, or None while it goes on.
    """
    if self._turn_end in self.tokenizer.special_ids:
      return None

    def find(ids: Sequence[int]) -> int | None:
      if not self._has_turn_end(ids):
        return None
      # Decoded text only grows with its ids, so halving finds the first.
      low, high = 1, len(ids)
      while low < high:
        middle = (low + high) // 2
        if self._has_turn_end(ids[:middle]):
          high = middle
        else:
          low = middle + 1
      return low

    return find

  def is_whole(self, ids: Sequence[int]) -> bool:
    """Whether a turn was ended by the model, not by its budget."""
    if ids and ids[-1] in self.stop_ids:
      return True
    return self.find_stop is not None and self._has_turn_end(ids)

  def _has_turn_end(self, ids: Sequence[int]) -> bool:
    return self._turn_end in self.tokenizer.decode(ids)

  @property
  def pad_id(self) -> int:
    """Id of padding; the end of text where the vocabulary has no padding."""
    specials = self.tokenizer.special_ids
    if tokenizer_lib.PAD in specials:
      return specials[tokenizer_lib.PAD]
    return self.tokenizer.special_id(tokenizer_lib.END_OF_TEXT)

  @property
  def turn_end_id(self) -> int:
    """Id of the tag that closes a turn."""
    return self.tokenizer.special_id(self._turn_end)

  @property
  def turn_end_ids(self) -> list[int]:
    """The tag that closes a turn, spelt out where it is no token."""
    return self._tag(self._turn_end)

  def answer_prefix_ids(self) -> list[int]:
    r"""`<answer>\boxed{`: forces an answer from the head, with no tool."""
    return self._tag(tokenizer_lib.ANSWER_OPEN) + self.tokenizer.encode(
      "\\boxed{"
    )

  def call_ids(self, body: str) -> list[int]:
    """A tool call with `body` between its tags, for demonstrations."""
    return [
      *self._tag(tokenizer_lib.CALL_OPEN),
      *self.tokenizer.encode(body),
      *self._tag(tokenizer_lib.CALL_CLOSE),
    ]

  def answer_ids(self, answer: str) -> list[int]:
    r"""`<answer>\boxed{ANSWER}</answer>`, for demonstrations."""
    return [
      *self._tag(tokenizer_lib.ANSWER_OPEN),
      *self.tokenizer.encode("\\boxed{" + answer + "}"),
      *self._tag(tokenizer_lib.ANSWER_CLOSE),
    ]

  def _tag(self, text: str) -> list[int]:
    """A tag as its one special id, or spelt out where it is no token."""
    specials = self.tokenizer.special_ids
    return [specials[text]] if text in specials else self.tokenizer.encode(text)


class ChatFormat(Chat):
  """ChatML with the tags of Hermes, in a style of our own.

  Args:
    tokenizer: see `Chat`.
    style: `compact` or `qwen`, see the module's head.
  """

  def __init__(
    self, tokenizer: tokenizer_lib.Tokenizer, style: str = "compact"
  ):
    if style not in STYLES:
      raise ValueError(
        f"chat style {style!r} is unknown; choose one of {', '.join(STYLES)}"
      )
    super().__init__(tokenizer)
    self.style = style
    self._gap = tokenizer.encode("\n") if style == "qwen" else []
    self._header = self._turn_open("assistant\n")

  def prompt_ids(self, question: str, system: str = "") -> list[int]:
    """See `Chat.prompt_ids`."""
    ids = []
    if system:
      ids += self._turn_open("system\n" + system) + self._turn_close()
    ids += self._turn_open("user\n" + question) + self._turn_close()
    return ids + self._header

  def tool_suffix(self, results: Sequence[str]) -> tuple[list[int], list[int]]:
    """See `Chat.tool_suffix`: one user turn, a block for each result."""
    if not results:
      raise ValueError("tool_suffix needs the result of at least one call")
    newline = "\n" if self.style == "qwen" else ""
    ids = self._gap + self._turn_open("user\n")
    roles = [layout.Role.TEMPLATE] * len(ids)
    for index, text in enumerate(results):
      if index and newline:
        ids += self._gap
        roles += [layout.Role.TEMPLATE] * len(self._gap)
      body = self.tokenizer.encode(newline + text + newline)
      for piece, role in (
        (self._tag(tokenizer_lib.RESPONSE_OPEN), layout.Role.TEMPLATE),
        (body, layout.Role.TOOL),
        (self._tag(tokenizer_lib.RESPONSE_CLOSE), layout.Role.TEMPLATE),
      ):
        ids += piece
        roles += [role] * len(piece)
    tail = self._turn_close() + self._header
    return ids + tail, [int(r) for r in roles] + _template_roles(tail)

  def user_suffix(self, text: str) -> tuple[list[int], list[int]]:
    """See `Chat.user_suffix`."""
    ids = self._gap + self._turn_open("user\n" + text) + self._turn_close()
    ids += self._header
    return ids, _template_roles(ids)

  def turn_text(
    self,
    content: str,
    calls: Sequence[messages_lib.Call] = (),
    reasoning: str = "",
  ) -> str:
    """See `Chat.turn_text`."""
    gap = "\n" if self.style == "qwen" else ""
    text = content
    if reasoning and self.style == "qwen":
      text = f"{THINK_OPEN}\n{reasoning}\n{THINK_CLOSE}\n\n{content}"
    elif reasoning:
      text = (
        f"{tokenizer_lib.REASON_OPEN}{reasoning}{tokenizer_lib.REASON_CLOSE}"
        + content
      )
    for call in calls:
      text += gap if text else ""
      text += self.dialect.write(call.name, call.arguments, gap)
    return text

  def _turn_open(self, text: str) -> list[int]:
    return [
      *self._tag(tokenizer_lib.TURN_START),
      *self.tokenizer.encode(text),
    ]

  def _turn_close(self) -> list[int]:
    return [*self._tag(tokenizer_lib.TURN_END), *self._gap]


def _template_roles(ids: Sequence[int]) -> list[int]:
  return [int(layout.Role.TEMPLATE)] * len(ids)
