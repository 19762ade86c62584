"""Chat templates of Hugging Face folders, rendered to text and to ids.

The environment is the one that these templates are written for: Jinja in its
sandbox, with `tojson` that leaves characters as they are, `raise_exception`,
`break` and `continue`, and `generation` blocks. `strftime_now` is not there: a
prompt that changes with the calendar cannot be drawn twice.

What a user, a dataset or a tool wrote may spell a tag. Rendered by itself that
would be the tag. So a character that no text holds is put into every such
spelling before rendering and taken out when the text between the real tags is
encoded.
"""

import functools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext

from roc.host import bounded_jinja
from roc.host import chat as chat_lib
from roc.host import tokenizer as tokenizer_lib

_OWN = pathlib.Path(__file__).parents[1] / "templates"
# Chat templates that come with this package, by name.
NAMED = ("rstar2",)
# Unicode's noncharacters, which no text may hold.
_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]

Message = Mapping[str, Any]


class ChatTemplate:
  """A Jinja chat template and the tokenizer whose tags it writes.

  Args:
    text: of the template.
    tokenizer: its special tokens are the tags; `bos_token` and the like are
      variables of the template.
    name: in messages about it.

  Raises:
    ValueError: the text is no template; says where.
  """

  def __init__(
    self,
    text: str,
    tokenizer: tokenizer_lib.Tokenizer,
    name: str = "the chat template",
  ):
    self.tokenizer = tokenizer
    self._name = name
    # The system text is the same in every prompt, and long.
    self._encode = functools.lru_cache(maxsize=64)(tokenizer.encode)
    try:
      self._template = _environment().template(text)
    except jinja2.TemplateSyntaxError as e:
      raise ValueError(f"{name} line {e.lineno}: {e.message}") from e
    except (RecursionError, SyntaxError, MemoryError) as e:
      raise ValueError(f"{name} is nested too deeply to be read") from e

  def render(
    self,
    /,  # a variable of the template may be named so
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] = (),
    **arguments: Any,
  ) -> tuple[str, list[int]]:
    """Writes messages as one text, and as ids.

    Args:
      messages: with `role`, `content` and, of an assistant, `tool_calls` and
        `reasoning_content`. Tags count in an assistant's content alone, and
        there those that a model may write (`chat.MODEL_TAGS`).
      tools: schemas of the tools that are offered.
      **arguments: other variables of the template, such as
        `add_generation_prompt` and `enable_thinking`.

    Returns:
      The text, and its ids.

    Raises:
      ValueError: the template does not take these messages; says why.
    """
    text, mark = self._written(messages, tools, arguments)
    ids = []
    for tag, piece in self.tokenizer.split_tags(text):
      if tag is None:
        ids += self._encode(piece.replace(mark, ""))
      else:
        ids.append(self.tokenizer.special_id(tag))
    return text.replace(mark, ""), ids

  def text(
    self,
    /,  # a variable of the template may be named so
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] = (),
    **arguments: Any,
  ) -> str:
    """The text of `render` alone."""
    text, mark = self._written(messages, tools, arguments)
    return text.replace(mark, "")

  def _written(
    self,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]],
    arguments: Mapping[str, Any],
  ) -> tuple[str, str]:
    """The text, and the character that spoils tags in it that are not ours."""
    mark = _unused_character(messages)
    variables: dict[str, Any] = {
      **self.tokenizer.published.named_tokens,
      "add_generation_prompt": False,
      **arguments,
      "messages": self._guard(messages, mark),
      "tools": list(tools) or None,
    }
    try:
      text = bounded_jinja.render(self._template, variables)
    except Exception as e:  # whatever a template's expressions raise
      reason = str(e) or type(e).__name__
      if "strftime_now" in reason:
        reason += ": prompts here do not change with the calendar"
      raise ValueError(
        f"{self._name} cannot render the messages: {reason}"
      ) from e
    return text, mark

  def _guard(self, messages: Sequence[Message], mark: str) -> list[Any]:
    """A copy in which text that is not ours spells no tag."""

    def spoil(text: str, allowed: Sequence[str] = ()) -> str:
      pieces = self.tokenizer.split_tags(text)
      return "".join(
        piece if tag is None or tag in allowed else piece[:1] + mark + piece[1:]
        for tag, piece in pieces
      )

    guarded = []
    for message in messages:
      copy = {k: _map_text(v, spoil) for k, v in message.items() if k != "role"}
      if message.get("role") == "assistant" and "content" in message:
        keep = lambda text: spoil(text, chat_lib.MODEL_TAGS)
        copy["content"] = _map_text(message["content"], keep)
      guarded.append({"role": message.get("role")} | copy)
    return guarded


def read(
  name: str, tokenizer: tokenizer_lib.Tokenizer, *, has_tools: bool = True
) -> ChatTemplate:
  """Finds a template.

  Args:
    name: "" for the tokenizer's own; one of several that its folder names; one
      of `NAMED`; or a file.
    tokenizer: whose tags it writes.
    has_tools: whether tools are offered, for which some folders have a template
      of its own (`tool_use`).

  Raises:
    ValueError: there is no such template.
  """
  if not name:
    found = tokenizer.published.templates
    for kind in ("tool_use", "default") if has_tools else ("default",):
      if kind in found:
        return ChatTemplate(found[kind], tokenizer)
    others = [*found, *NAMED]
    raise ValueError(
      f"the tokenizer's folder has no{' default' if found else ''} chat"
      f" template; name one of {', '.join(others)}, or a file"
    )
  if name in tokenizer.published.templates:
    return ChatTemplate(tokenizer.published.templates[name], tokenizer)
  path = _OWN / f"{name}.jinja" if name in NAMED else pathlib.Path(name)
  try:
    text = path.read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError) as e:
    raise ValueError(
      f"chat template {name} is neither one of {', '.join(NAMED)} nor a file"
      f" that can be read: {e}"
    ) from e
  return ChatTemplate(text, tokenizer, f"chat template {name}")


class _Generation(jinja2.ext.Extension):
  """`{% generation %}` marks what a model wrote; here it changes nothing."""

  tags = {"generation"}

  def parse(self, parser: Any) -> Any:
    next(parser.stream)
    return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> bounded_jinja.Environment:
  environment = bounded_jinja.Environment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[_Generation, jinja2.ext.loopcontrols],
  )
  environment.filters["tojson"] = _to_json
  names: dict[str, Any] = environment.globals
  names["raise_exception"] = _raise
  return environment


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
  return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise(message: str) -> None:
  raise jinja2.TemplateError(message)


def _map_text(value: Any, change: Callable[[str], str]) -> Any:
  """A copy of nested lists and dicts with every string in it changed."""
  if isinstance(value, str):
    return change(value)
  if isinstance(value, Mapping):
    return {k: _map_text(v, change) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [_map_text(v, change) for v in value]
  return value


def _unused_character(messages: Sequence[Message]) -> str:
  text = json.dumps([dict(m) for m in messages], ensure_ascii=False)
  for character in _NONCHARACTERS:
    if character not in text:
      return character
  raise ValueError("the messages hold every noncharacter of Unicode")
