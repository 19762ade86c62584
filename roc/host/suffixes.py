"""What a chat template writes behind a turn of the model, piece by piece."""

import json
from collections.abc import Sequence
from typing import NamedTuple

from roc import layout
from roc.host import tokenizer as tokenizer_lib


class Suffix(NamedTuple):
  """What a template writes around the answers to a turn of the model."""

  head: str
  between: str
  tail: str
  is_json: bool

  def parts(self, texts: Sequence[str]) -> list[tuple[str, bool]]:
    """Pieces of the text in order, each with whether it is an answer."""
    pieces = [(self.head, False)]
    for i, text in enumerate(texts):
      if i:
        pieces.append((self.between, False))
      pieces.append((as_json(text) if self.is_json else text, True))
    return [*pieces, (self.tail, False)]

  def text(self, texts: Sequence[str]) -> str:
    """The pieces as one text."""
    return "".join(piece for piece, _ in self.parts(texts))


def encode(
  parts: Sequence[tuple[str, bool]], tokenizer: tokenizer_lib.Tokenizer
) -> tuple[list[int], list[int]]:
  """Ids and roles of pieces; text up to the next tag is encoded in one go.

  Args:
    parts: pieces of text, each with whether it is an answer; a tag in an answer
      is plain characters.
    tokenizer: whose tags they are.

  Returns:
    ids, and for each `Role.TOOL` where an answer has a part in it, else
    `Role.TEMPLATE`.
  """
  ids: list[int] = []
  roles: list[int] = []
  run, has_answer = "", False

  def add(new: list[int], role: layout.Role) -> None:
    ids.extend(new)
    roles.extend([int(role)] * len(new))

  def end_run() -> None:
    role = layout.Role.TOOL if has_answer else layout.Role.TEMPLATE
    add(tokenizer.encode(run), role)

  for text, is_answer in parts:
    pieces = tokenizer.split_tags(text) if not is_answer else [(None, text)]
    for tag, piece in pieces:
      if tag is None:
        run += piece
        has_answer = has_answer or is_answer
        continue
      end_run()
      run, has_answer = "", False
      add([tokenizer.special_id(tag)], layout.Role.TEMPLATE)
  end_run()
  return ids, roles


def as_json(text: str) -> str:
  """How text stands inside the quotes of JSON."""
  return json.dumps(text, ensure_ascii=False)[1:-1]
