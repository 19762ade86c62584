"""A published model's own chat template, used only forwards.

Templates are not prefix-preserving: Qwen3's drops the reasoning of old turns
when a new one comes. So a conversation is never rendered again. The prompt is
rendered once, and what the template writes behind a turn of the model, when a
tool or the user answers it, is found once for the template and then appended as
ids. `TemplateChat` refuses a template for which that is not always the same.
"""

import functools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from roc import errors, layout
from roc.host import calls as calls_lib
from roc.host import chat as chat_lib
from roc.host import dialects, suffixes, templates
from roc.host import messages as messages_lib
from roc.host import tokenizer as tokenizer_lib

# Words by which a turn is found again in rendered text. The result holds what
# JSON would escape, to see whether the template writes it as JSON.
_TURN = "zqturnqz"
_USER = "zqquestionqz"
_RESULT = 'zq"result"\n{}qz'
_NAME = "zqtoolqz"
# What a call must bring through rendering and reading: what JSON would escape,
# line breaks, and what looks like tags.
_PARAMETER = "zqparameterqz"
_PROBE = {
  "type": "function",
  "function": {
    "name": _NAME,
    "description": "Runs.",
    "parameters": {
      "type": "object",
      "properties": {_PARAMETER: {"type": "string", "description": "Words."}},
      "required": [_PARAMETER],
    },
  },
}
_CODE = 'x = {"a": "ü\\n"}  # <b>\n\nprint(f"{x}", end="")'
# Tags that a header may leave open, and what closes them.
_THINK = (chat_lib.THINK_OPEN, f"\n{chat_lib.THINK_CLOSE}\n\n")
_REASON = (tokenizer_lib.REASON_OPEN, f"{tokenizer_lib.REASON_CLOSE}\n")


class TemplateChat(chat_lib.Chat):
  """Conversations as a Jinja chat template writes them.

  Args:
    tokenizer: with the template's tags, and often with the template.
    tools: schemas of the tools that are offered.
    template: "" for the tokenizer's own, `rstar2`, or a file.
    system: text of the system turn, where the problem brings none.
    instruction: text before every question.
    arguments: other variables of the template, such as
      `{"enable_thinking": False}`.
    dialect: name in `dialects.DIALECTS` of how the model writes calls; "": as
      the template writes them.

  Raises:
    ValueError: there is no template, what it writes behind a turn cannot be
      appended, it does not show the tools, or no dialect reads the calls that
      it writes; says why.
  """

  def __init__(
    self,
    tokenizer: tokenizer_lib.Tokenizer,
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    template: str = "",
    system: str = "",
    instruction: str = "",
    arguments: Mapping[str, Any] | None = None,
    dialect: str = "",
  ):
    if dialect and dialect not in dialects.DIALECTS:
      raise ValueError(
        f"dialect {dialect!r} is unknown"
        f"{errors.closest(dialect, dialects.DIALECTS)}; choose one of"
        f" {', '.join(dialects.DIALECTS)}"
      )
    self._template = templates.read(template, tokenizer, has_tools=bool(tools))
    self._tools = list(tools)
    self._system = system
    self._instruction = instruction
    self._arguments = dict(arguments or {})
    # Whether calls stand in `tool_calls`: in what the template is shown before
    # an answer, and in what it writes; and whether their arguments are text.
    self._has_calls = self._writes_calls = self._takes_text = False
    super().__init__(tokenizer, self._find_turn_end())
    self._turn_end_of_call = self._turn_end
    self._user = self._find_user_suffix()
    self._header = self._find_header()
    self._opener, self._opened = self._find_opener()
    self._tool = None
    if tools:
      self._check_schema()
      self.dialect = self._find_dialect(dialect)
      if self._writes_calls:
        self._turn_end_of_call = self._find_turn_end_of_call()
      self._check_round_trip()
      self._tool = self._find_tool_suffix()

  @property
  def stop_ids(self) -> tuple[int, ...]:
    """Ids that end the model's turn: the template's, the folder's, the text's.

    See `tokenizer.Published.eos_ids`.
    """
    published = self.tokenizer.published
    ids = [*super().stop_ids, *published.eos_ids]
    specials = self.tokenizer.special_ids
    eos = published.named_tokens.get("eos_token")
    for tag in (self._turn_end_of_call, eos):
      if tag in specials:
        ids.append(specials[tag])
    return tuple(dict.fromkeys(ids))

  @property
  def pad_id(self) -> int:
    """Id of padding, as the folder says; else the end of text, or of a turn."""
    specials = self.tokenizer.special_ids
    named = self.tokenizer.published.named_tokens.get("pad_token")
    for tag in (tokenizer_lib.PAD, named, tokenizer_lib.END_OF_TEXT):
      if tag in specials:
        return specials[tag]
    return self.stop_ids[0] if self.stop_ids else 0

  def prompt_ids(self, question: str, system: str = "") -> list[int]:
    """See `Chat.prompt_ids`; without `system` it is the chat's own."""
    system = system or self._system
    turns = [{"role": "system", "content": system}] if system else []
    turns.append({"role": "user", "content": self._instruction + question})
    return self._render(turns, add_generation_prompt=True)[1]

  def tool_suffix(self, results: Sequence[str]) -> tuple[list[int], list[int]]:
    """See `Chat.tool_suffix`.

    Raises:
      ValueError: there is no result, or no tool was offered.
    """
    if not results:
      raise ValueError("tool_suffix needs the result of at least one call")
    if self._tool is None:
      raise ValueError("a tool answers, and the chat was made without tools")
    return suffixes.encode(self._tool.parts(results), self.tokenizer)

  def user_suffix(self, text: str) -> tuple[list[int], list[int]]:
    """See `Chat.user_suffix`."""
    ids, roles = suffixes.encode(self._user.parts([text]), self.tokenizer)
    return ids, [int(layout.Role.TEMPLATE)] * len(roles)

  def assistant_ids(self, text: str) -> list[int]:
    """See `Chat.assistant_ids`; what the header opened is not opened again."""
    if (
      self._turn_end_of_call != self._turn_end
      and calls_lib.parse_text(text, dialect=self.dialect).calls
    ):
      ids = self.tokenizer.encode_trusted(text, chat_lib.MODEL_TAGS)
      return ids + self._tag(self._turn_end_of_call)
    for n in range(min(len(text), len(self._header)), 0, -1):
      opened = self._header[-n:]
      if text.startswith(opened) and "<" in opened:
        return super().assistant_ids(text[n:])
    return super().assistant_ids(text)

  def turn_text(
    self,
    content: str,
    calls: Sequence[messages_lib.Call] = (),
    reasoning: str = "",
  ) -> str:
    """See `Chat.turn_text`: as the template writes the last turn.

    What the template opens for the model (`<think>`) is closed behind the
    reasoning, even if that is empty.
    """
    written = ""
    if calls and not self._writes_calls:  # the template would leave them out
      each = (self.dialect.write(c.name, c.arguments, "\n") for c in calls)
      written, calls = "\n".join(each), ()
      content = f"{content}\n{written}" if content else written
    turn: dict[str, Any] = {"role": "assistant", "content": content}
    if reasoning:
      turn["reasoning_content"] = reasoning
    if calls:
      turn["tool_calls"] = [self._call(c, i) for i, c in enumerate(calls)]
    text = self._last_turn(
      turn, self._turn_end_of_call if calls else self._turn_end
    )
    said = content.rpartition(chat_lib.THINK_CLOSE)[2].strip()
    if calls and said not in text:  # Llama's writes the call alone
      text = f"{content.rstrip()}\n{text}"
    has_reasoning = not reasoning or reasoning.strip() in text
    if not text.startswith(self._opened):
      for tags in (_THINK, _REASON):
        if tags[0] in self._opened:
          text = f"{self._opened}{reasoning}{tags[1]}{text}"
          has_reasoning = True
    if not has_reasoning or not text.startswith(self._opened):
      raise ValueError(
        "the chat template has no place for reasoning; put it into the content"
        if reasoning
        else f"the chat template begins a turn with {self._opened!r}, which"
        " this one does not go on from"
      )
    return text

  # ------------------------------------------------- what the template does

  def _render(
    self, turns: Sequence[templates.Message], **arguments: Any
  ) -> tuple[str, list[int]]:
    return self._template.render(
      turns, self._tools, **(self._arguments | arguments)
    )

  def _histories(self) -> list[list[dict[str, Any]]]:
    """Conversations that end where the model speaks, short ones and long."""
    first = {"role": "user", "content": self._instruction + "1?"}
    turns = (
      [{"role": "system", "content": self._system}] if self._system else []
    )
    short = [*turns, first]
    talk = [*short, self._model_turn("Yes."), {"role": "user", "content": "2?"}]
    if not self._tools:
      return [short, talk]
    called = [
      *short,
      self._model_turn("print(1)", is_call=True),
      self._answer("1"),
    ]
    return [short, talk, called]

  def _model_turn(self, text: str, is_call: bool = False) -> dict[str, Any]:
    if not is_call or not self._has_calls:
      return {"role": "assistant", "content": text}
    call = messages_lib.Call(self._tools[0]["function"]["name"], {"code": text})
    return {
      "role": "assistant",
      "content": "",
      "tool_calls": [self._call(call, 0)],
    }

  def _call(self, call: messages_lib.Call, index: int) -> dict[str, Any]:
    arguments: Any = dict(call.arguments)
    if self._takes_text:
      arguments = json.dumps(arguments, ensure_ascii=False)
    return {
      "type": "function",
      "id": f"call{index:05d}",
      "function": {"name": call.name, "arguments": arguments},
    }

  def _answer(self, text: str) -> dict[str, Any]:
    name = self._tools[0]["function"]["name"]
    return {
      "role": "tool",
      "content": text,
      "name": name,
      "tool_call_id": "call00000",
    }

  def _behind(
    self,
    history: Sequence[dict[str, Any]],
    answers: Sequence[dict[str, Any]],
    *,
    is_call: bool = False,
    add_generation_prompt: bool = True,
  ) -> str:
    """What is written behind a turn of the model that follows a history."""
    turns = [*history, self._model_turn(_TURN, is_call), *answers]
    text, _ = self._render(turns, add_generation_prompt=add_generation_prompt)
    _, found, rest = text.rpartition(_TURN)
    if not found:
      raise ValueError("the chat template leaves the model's turns out")
    return rest

  def _find_turn_end(self) -> str:
    """The tag that the template closes a turn of the model with."""
    history = [{"role": "user", "content": "1?"}]
    rest = self._behind(history, [], add_generation_prompt=False)
    for tag, _ in self._template.tokenizer.split_tags(rest):
      if tag is not None:
        return tag
    if not rest.strip():
      raise ValueError(
        "the chat template writes nothing that ends a turn of the model"
      )
    return rest.strip()

  def _find_turn_end_of_call(self) -> str:
    """The tag that the template closes a turn with a call with."""
    rest = self._behind(
      self._histories()[0], [], is_call=True, add_generation_prompt=False
    )
    tags = (self._turn_end, *self.dialect.ends)
    return next((tag for tag in tags if tag in rest), self._turn_end)

  def _check_schema(self) -> None:
    """Raises a ValueError where the prompt does not show the tools."""
    history = self._histories()[0]
    text = self._template.text(
      history, [_PROBE], add_generation_prompt=True, **self._arguments
    )
    if all(word in text for word in (_NAME, _PARAMETER)):
      return
    # Words of the run's own may describe them.
    own = self._system + self._instruction
    for tool in self._tools:
      function = tool["function"]
      names = [function["name"], *_parameters(function)]
      missing = [name for name in names if name not in own]
      if missing:
        raise ValueError(
          "the chat template does not show the tool"
          f" {function['name']!r} in the prompt; describe it and its"
          f" {', '.join(names[1:])} in TemplateChat.system, or use another"
          " template, such as rstar2"
        )

  def _find_dialect(self, name: str) -> dialects.Dialect:
    """The dialect that the template writes calls in, or the one of a name.

    Raises:
      ValueError: it writes none that is known.
    """
    wanted = [dialects.DIALECTS[name]] if name else dialects.DIALECTS.values()
    call = self._probe_call()
    turn = {"role": "assistant", "content": ""}
    try:
      silent = self._written(turn)
    except ValueError:
      silent = self._opener
    for self._takes_text in (False, True):
      try:
        text = self._written(turn | {"tool_calls": [self._call(call, 0)]})
      except ValueError:
        continue
      for dialect in wanted:
        read, without = (
          calls_lib.parse_text(t.removeprefix(self._opener), dialect=dialect)
          for t in (text, silent)
        )
        # Nothing may be left of it, such as tags of another dialect.
        if _is_read(read, call) and read.content == without.content:
          self._has_calls = self._writes_calls = True
          return dialect
    self._takes_text = False
    if name:  # and calls are written without the template
      return dialects.DIALECTS[name]
    raise ValueError(
      "the chat template writes no tool call that can be read back"
      f" ({', '.join(dialects.DIALECTS)} are known); use another template, such"
      " as rstar2, or name the dialect with TemplateChat.dialect"
    )

  def _probe_call(self) -> messages_lib.Call:
    function = self._tools[0]["function"]
    parameter = next(iter(_parameters(function)), "code")
    return messages_lib.Call(function["name"], {parameter: _CODE})

  def _check_round_trip(self) -> None:
    """Raises a ValueError where a call is not read as it was written."""
    call = self._probe_call()
    try:
      text = self.turn_text("", [call])
    except ValueError:  # only supervised training has turns written
      text = self.dialect.write(call.name, call.arguments, "\n")
    ids = self.assistant_ids(text)
    turn = calls_lib.parse_turn(
      ids, self.tokenizer, tool=None, dialect=self.dialect
    )
    if not _is_read(turn, call):
      raise ValueError(
        "a tool call that the chat template writes is not read back as"
        f" {self.dialect.name}; use another template, such as rstar2"
      )

  def _after_turn_end(self, rest: str, *, is_call: bool) -> str:
    end = self._turn_end_of_call if is_call else self._turn_end
    before, found, after = rest.partition(end)
    has_answer = _USER in before or _RESULT.partition("\n")[0] in before
    if not found or has_answer:
      raise ValueError(
        "the chat template ends a turn of the model differently when an answer"
        f" follows: {rest[:80]!r} instead of {end!r}; it cannot be"
        " used for turns that follow one another"
      )
    return after

  def _find_user_suffix(self) -> suffixes.Suffix:
    answer = {"role": "user", "content": _USER}
    return self._find_suffix([answer], [_USER], is_call=False)

  def _find_tool_suffix(self) -> suffixes.Suffix:
    """Also for several results; tried without `tool_calls` before, and with."""
    texts = [_RESULT.format(i) for i in range(3)]
    answers = [self._answer(text) for text in texts]
    if not self._has_calls:
      try:
        self._behind([self._histories()[0][-1]], answers[:1])
      except ValueError:
        self._has_calls = True
    one = self._find_suffix(answers[:1], texts[:1], is_call=True)
    short = self._histories()[0]
    find = lambda n: self._after_turn_end(
      self._behind(short, answers[:n], is_call=True), is_call=True
    )
    shown = [suffixes.as_json(t) if one.is_json else t for t in texts]
    start, end = one.head + shown[0], shown[1] + one.tail
    two = find(2)
    if two.startswith(start) and two.endswith(end):
      found = one._replace(between=two[len(start) : len(two) - len(end)])
      if find(3) == found.text(texts):
        return found
    raise ValueError(
      "the chat template writes several results in a way that cannot be put"
      " together from single ones; set Toolbox and prompts to another template"
    )

  def _find_suffix(
    self,
    answers: Sequence[dict[str, Any]],
    texts: Sequence[str],
    *,
    is_call: bool,
  ) -> suffixes.Suffix:
    """What stands around one answer, the same behind every history.

    Raises:
      ValueError: it is not the same, or the answer cannot be found in it.
    """
    found = set()
    for history in self._histories():
      rest = self._behind(history, answers, is_call=is_call)
      rest = self._after_turn_end(rest, is_call=is_call)
      for is_json, text in (
        (False, texts[0]),
        (True, suffixes.as_json(texts[0])),
      ):
        if text in rest:
          head, _, tail = rest.partition(text)
          found.add(suffixes.Suffix(head, "", tail, is_json))
          break
      else:
        raise ValueError(
          f"the chat template does not show what a {answers[0]['role']} says;"
          " use another one, such as rstar2"
        )
    if len(found) > 1:
      raise ValueError(
        "the chat template is not append-only: what it writes when a"
        f" {answers[0]['role']} answers depends on the turns before; use"
        " another one, such as rstar2"
      )
    return found.pop()

  def _find_header(self) -> str:
    """What opens a turn of the model."""
    history = self._histories()[0]
    closed, _ = self._render(history, add_generation_prompt=False)
    opened, _ = self._render(history, add_generation_prompt=True)
    if not opened.startswith(closed):
      raise ValueError(
        "the chat template changes the conversation when the model is to speak;"
        " use another one, such as rstar2"
      )
    return opened[len(closed) :]

  def _find_opener(self) -> tuple[str, str]:
    """The part of the header that every turn of the model begins with, and the
    rest of it, which the model goes on from.
    """
    body = self._written({"role": "assistant", "content": _TURN})
    opener = os.path.commonprefix([self._header, body.partition(_TURN)[0]])
    return opener, self._header[len(opener) :]

  def _written(self, turn: dict[str, Any]) -> str:
    """What a turn adds to a conversation that it ends."""
    text = self._text([*self._histories()[0], turn])
    if not text.startswith(self._before):
      raise ValueError(
        "the chat template changes the conversation when the model has spoken;"
        " use another one, such as rstar2"
      )
    return text[len(self._before) :]

  @functools.cached_property
  def _before(self) -> str:
    """The shortest conversation in which the model is to speak."""
    return self._text(self._histories()[0])

  def _text(self, turns: Sequence[templates.Message]) -> str:
    return self._template.text(turns, self._tools, **self._arguments)

  def _last_turn(self, turn: dict[str, Any], end: str) -> str:
    """A turn without what opens it and what ends it."""
    text, found, _ = self._written(turn).rpartition(end)
    if not found or not text.startswith(self._opener):
      raise ValueError(
        f"the chat template opens each turn of the model with {self._opener!r}"
        " and would not open this one so; leave out its reasoning, or set the"
        " template's arguments (enable_thinking) to let the model reason"
      )
    return text[len(self._opener) :]


def _parameters(function: Mapping[str, Any]) -> Mapping[str, Any]:
  """Parameters of a tool by name, from its schema."""
  return function.get("parameters", {}).get("properties", {})


def _is_read(turn: calls_lib.ParsedTurn, call: messages_lib.Call) -> bool:
  """Whether a turn makes this call and no other."""
  return [(c.name, c.arguments, c.error) for c in turn.calls] == [
    (call.name, dict(call.arguments), None)
  ]
