r"""Dialects of tool calls: what a model writes, depending on its training.

  hermes    <tool_call>{"name": N, "arguments": {...}}</tool_call>
            (Hermes, Qwen2.5, Qwen3)
  llama3    {"name": N, "parameters": {...}} at the start of a line, several
            apart by `;`; or <|python_tag|> and such a call, or plain code
            (Llama 3.1, 3.2, 3.3)
  qwen_xml  <tool_call><function=N><parameter=P>...</parameter></function>
            </tool_call> (Qwen3-Coder, Qwen3.5)

A dialect finds calls among the pieces of a turn, reads name and arguments, and
writes a call. Which tools there are is the business of `calls`.
"""

import itertools
import json
import math
import re
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from roc.host import tokenizer as tokenizer_lib

PYTHON_TAG = "<|python_tag|>"
# Name of the call that is plain code behind `PYTHON_TAG`.
CODE = "python"
# Tags behind a call's first one among which its end is looked for, and attempts
# at a call that are no JSON: a turn of nothing but tags must be read in time.
_NEAR = 16


class Piece(NamedTuple):
  """A tag, or a run of text (`tag` is None)."""

  tag: str | None
  text: str
  is_special: bool


class Body(NamedTuple):
  """What a call says.

  Attributes:
    name: of the tool; not always text, as models write it.
    arguments: likewise not always an object; None where there are none.
    is_code: the whole call is code for whatever tool there is.
  """

  name: Any
  arguments: Any
  is_code: bool = False


class Found(NamedTuple):
  """A call among the pieces of a turn.

  Attributes:
    raw: its text, without tags around it.
    body: what it says; None where that cannot be read.
    error: then why, in a few words.
    detail: more about that.
    is_closed: the call was not cut off.
  """

  raw: str
  body: Body | None
  error: str = ""
  detail: str = ""
  is_closed: bool = True


class BadCallError(ValueError):
  """The text of a call is not in its dialect; `error` is the kind of it."""

  def __init__(self, error: str, detail: str):
    super().__init__(detail)
    self.error = error


class Dialect(NamedTuple):
  """One way to write calls.

  Attributes:
    name: of the dialect.
    tags: that delimit a call.
    ends: tags that end a turn beside the chat template's own.
    split: pieces of a turn to pieces and calls, in order.
    write: name, arguments and the gap inside tags ("" or a line break) to text.
  """

  name: str
  tags: tuple[str, ...]
  ends: tuple[str, ...]
  split: Callable[[Sequence[Piece]], list[Piece | Found]]
  write: Callable[[str, Mapping[str, Any], str], str]


# ---------------------------------------------------------------- in tags


def _split_tagged(
  pieces: Sequence[Piece], read: Callable[[str], Body]
) -> list[Piece | Found]:
  """Calls between `<tool_call>` and `</tool_call>`, their text read by `read`.

  A call ends at the first of its closing tags at which its text is whole.
  """
  out: list[Piece | Found] = []
  at = 0
  while at < len(pieces):
    if pieces[at].tag != tokenizer_lib.CALL_OPEN:
      out.append(pieces[at])
      at += 1
      continue
    end, is_closed = _tagged_end(pieces, at, read)
    raw = _text(pieces[at + 1 : end]).strip()
    if is_closed:
      out.append(_found(raw, read))
    else:
      detail = "there is no closing tag"
      out.append(Found(raw, None, "unclosed", detail, is_closed=False))
    at = end + is_closed
  return out


def _tagged_end(
  pieces: Sequence[Piece], start: int, read: Callable[[str], Body]
) -> tuple[int, bool]:
  """Piece that ends the call opened at `start`, and whether it closes it."""
  tags = itertools.islice(
    (
      i
      for i in range(start + 1, len(pieces))
      if pieces[i].tag in (tokenizer_lib.CALL_OPEN, tokenizer_lib.CALL_CLOSE)
    ),
    _NEAR,
  )
  first = None
  for i in tags:
    first = i if first is None else first
    if pieces[i].tag == tokenizer_lib.CALL_CLOSE:
      found = _found(_text(pieces[start + 1 : i]).strip(), read)
      if found.body is not None:
        return i, True
  if first is None:
    return len(pieces), False
  return first, pieces[first].tag == tokenizer_lib.CALL_CLOSE


def _found(raw: str, read: Callable[[str], Body]) -> Found:
  try:
    return Found(raw, read(raw))
  except BadCallError as e:
    return Found(raw, None, e.error, str(e))


def _text(pieces: Sequence[Piece]) -> str:
  return "".join(piece.text for piece in pieces)


# ------------------------------------------------------------------ hermes


def read_hermes(raw: str) -> Body:
  """Reads the JSON between a call's tags.

  Args:
    raw: an object with `name` and `arguments`; arguments may themselves be text
      that holds JSON.

  Raises:
    BadCallError: it is none.
  """
  try:
    body = _JSON.decode(raw)
    if not isinstance(body, dict):
      raise ValueError("the call must be a JSON object")
    return Body(body.get("name"), _arguments(body, "arguments"))
  # Deep nesting exhausts the parser's stack: the model's fault too.
  except (ValueError, RecursionError) as e:
    raise BadCallError("bad JSON", str(e)) from e


def _arguments(body: Mapping[str, Any], *names: str) -> Any:
  """Arguments under the first of the names that is there."""
  found = next((body[name] for name in names if name in body), None)
  return _JSON.decode(found) if isinstance(found, str) else found


def _no_number(text: str) -> float:
  raise ValueError(f"{text} is no number of JSON")


def _finite(text: str) -> float:
  return float(text) if math.isfinite(float(text)) else _no_number(text)


# JSON has no NaN and no infinite numbers.
_JSON = json.JSONDecoder(parse_constant=_no_number, parse_float=_finite)


def _write_hermes(name: str, arguments: Mapping[str, Any], gap: str) -> str:
  body = {"name": name, "arguments": dict(arguments)}
  text = json.dumps(body, ensure_ascii=False)
  return f"{tokenizer_lib.CALL_OPEN}{gap}{text}{gap}{tokenizer_lib.CALL_CLOSE}"


# ------------------------------------------------------------------ llama3

# Where a call may begin, and what stands between calls.
_OBJECT = re.compile(r'\{\s*"(?:name|type)"\s*:')
_AT_LINE = re.compile(r'^[ \t]*(?=\{\s*"(?:name|type)"\s*:)', re.MULTILINE)
_BETWEEN = re.compile(r"[\s;,]*")


def _split_llama3(pieces: Sequence[Piece]) -> list[Piece | Found]:
  """Calls in JSON without tags, and what stands behind the python tag."""
  out: list[Piece | Found] = []
  at = 0
  while at < len(pieces):
    is_tagged = pieces[at].tag == PYTHON_TAG
    start = at + is_tagged
    end = start
    while end < len(pieces) and not _is_border(pieces[end]):
      end += 1
    run = pieces[start:end]
    if is_tagged:
      text = _text(run)
      if _OBJECT.match(text.lstrip()):
        out += _split_objects(run)
      else:
        # What was cut off has nothing behind it: a turn ends with a token.
        is_closed = end < len(pieces)
        out.append(_code(text.strip(), is_closed))
    elif run:
      out += _split_objects(run)
    else:
      out.append(pieces[at])
      end = at + 1
    at = end
  return out


def _is_border(piece: Piece) -> bool:
  """Whether no call goes on behind it: a tag of turns, `<|...|>`."""
  is_of_turns = piece.is_special and piece.text.startswith("<|")
  return is_of_turns or piece.tag == PYTHON_TAG or piece.text == ""


def _code(text: str, is_closed: bool) -> Found:
  if is_closed:
    return Found(text, Body(CODE, text, is_code=True))
  return Found(text, None, "unclosed", "the turn was cut off", is_closed=False)


def _split_objects(run: Sequence[Piece]) -> list[Piece | Found]:
  """The JSON calls in a run of pieces without a special token."""
  text = _text(run)
  out: list[Piece | Found] = []
  done = at = n_bad = 0
  while n_bad < _NEAR:
    # Directly behind another call, or at the start of a line.
    between = _BETWEEN.match(text, at)
    near = between.end() if between else at
    is_near = bool(out) and at == done and bool(_OBJECT.match(text, near))
    if not is_near:
      line = _AT_LINE.search(text, at)
      if line is None:
        break
      near = line.end()
    found, end = _read_object(text, near)
    if found is None:  # an object, and no call
      at = end
      continue
    n_bad += found.body is None
    if not is_near:
      out += _again(text[done:near], run)
    out.append(found)
    done = at = end
  if not out:
    return list(run)
  return out + _again(text[done:], run)


def _read_object(text: str, start: int) -> tuple[Found | None, int]:
  """The call at a place, and where it ends; None for what is no call."""
  try:
    body, end = _JSON.raw_decode(text, start)
    inner = body.get("function")
    body = inner if isinstance(inner, dict) else body
    if "name" not in body or not {"parameters", "arguments"} & set(body):
      return None, end
    arguments = _arguments(body, "parameters", "arguments")
    return Found(text[start:end], Body(body["name"], arguments)), end
  except (ValueError, RecursionError) as e:
    following = _AT_LINE.search(text, start + 1)
    end = following.start() if following else len(text)
    raw = text[start:end].rstrip()
    if raw.endswith("}"):
      return Found(raw, None, "bad JSON", str(e)), end
    detail = "the object is not closed"
    return Found(raw, None, "unclosed", detail, is_closed=False), end


def _again(text: str, run: Sequence[Piece]) -> list[Piece]:
  """Cuts text between calls at the tags that were found in it before."""
  tags = {piece.tag for piece in run if piece.tag is not None}
  return [
    Piece(part if part in tags else None, part, False)
    for part in split_at(sorted(tags), text)
  ]


def split_at(tags: Sequence[str], text: str) -> list[str]:
  """Text cut in front of and behind each of some tags."""
  pattern = "|".join(map(re.escape, tags))
  parts = re.split(f"({pattern})", text) if pattern else [text]
  return [part for part in parts if part]


def _write_llama3(name: str, arguments: Mapping[str, Any], gap: str) -> str:
  del gap  # there are no tags
  body = {"name": name, "parameters": dict(arguments)}
  return json.dumps(body, ensure_ascii=False)


# ---------------------------------------------------------------- qwen_xml

_FUNCTION = re.compile(r"<function=([^<>\n]+)>")
_PARAMETER = re.compile(r"\s*<parameter=([^<>\n]+)>")
_NEXT_FUNCTION = re.compile(
  r"\s*</function>\s*<function=[^<>\n]+>\s*<parameter="
)
_FUNCTION_END, _PARAMETER_END = "</function>", "</parameter>"


def read_qwen_xml(raw: str) -> Body:
  """Reads the XML between a call's tags.

  A value is the text between its tags without the line breaks next to them. It
  ends at the first `</parameter>` behind which another parameter or the end of
  the function follows, so that code may spell the tag.

  Args:
    raw: `<function=NAME>`, parameters, `</function>`.

  Raises:
    BadCallError: it is none.
  """
  opened = _FUNCTION.match(raw)
  if not opened or not raw.endswith(_FUNCTION_END):
    raise BadCallError(
      "bad XML", "the call must be <function=NAME> ... </function>"
    )
  body = raw[opened.end() : -len(_FUNCTION_END)].rstrip()
  arguments: dict[str, str] = {}
  at = 0
  while at < len(body):
    parameter = _PARAMETER.match(body, at)
    if parameter is None:
      raise BadCallError("bad XML", "a function holds <parameter=NAME> alone")
    name = parameter[1].strip()
    if name in arguments:
      raise BadCallError("bad XML", f"parameter {name!r} is there twice")
    end = body.find(_PARAMETER_END, parameter.end())
    while end >= 0:
      behind = end + len(_PARAMETER_END)
      if behind == len(body) or _PARAMETER.match(body, behind):
        break
      if _NEXT_FUNCTION.match(body, behind):
        raise BadCallError("bad XML", "a call holds one function alone")
      end = body.find(_PARAMETER_END, behind)
    if end < 0:
      raise BadCallError("bad XML", f"parameter {name!r} is not closed")
    value = body[parameter.end() : end]
    arguments[name] = value.removeprefix("\n").removesuffix("\n")
    at = end + len(_PARAMETER_END)
  return Body(opened[1].strip(), arguments)


def _write_qwen_xml(name: str, arguments: Mapping[str, Any], gap: str) -> str:
  del gap  # the format has line breaks of its own
  lines = [tokenizer_lib.CALL_OPEN, f"<function={name}>"]
  for key, value in arguments.items():
    text = value if isinstance(value, str) else json.dumps(value)
    lines += [f"<parameter={key}>", text, _PARAMETER_END]
  return "\n".join([*lines, _FUNCTION_END, tokenizer_lib.CALL_CLOSE])


_TAGGED = (tokenizer_lib.CALL_OPEN, tokenizer_lib.CALL_CLOSE)

HERMES = Dialect(
  "hermes",
  _TAGGED,
  (),
  lambda pieces: _split_tagged(pieces, read_hermes),
  _write_hermes,
)
LLAMA3 = Dialect(
  "llama3",
  (PYTHON_TAG,),
  ("<|eom_id|>", "<|eot_id|>"),
  _split_llama3,
  _write_llama3,
)
QWEN_XML = Dialect(
  "qwen_xml",
  _TAGGED,
  (),
  lambda pieces: _split_tagged(pieces, read_qwen_xml),
  _write_qwen_xml,
)
DIALECTS: Mapping[str, Dialect] = types.MappingProxyType(
  {one.name: one for one in (HERMES, LLAMA3, QWEN_XML)}
)
