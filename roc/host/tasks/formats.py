"""What the columns of a row mean, by the names that data sets use.

`plain` is the project's own: `prompt`, `answer`, and if wanted `id`, `kind`,
`info`. The others are read as published; what they say beyond question and
answer goes into `info`.
"""

import dataclasses
import hashlib
import json
import types
from collections.abc import Callable, Mapping
from typing import Any

from roc import errors
from roc.host import answers, rewards
from roc.host.tasks import rows as rows_lib

_PLAIN_FIELDS = ("id", "prompt", "answer", "kind", "info")
_ID_FIELDS = ("id", "ID", "unique_id", "uuid", "qid", "example_id")
_KIND_FIELDS = (
  *("subject", "type", "Type", "data_source", "source"),
  *("topic", "dataset", "task"),
)
_ASKED = ("problem", "question", "Problem", "Question")
_ANSWERS = ("answer", "final_answer", "expected_answer", "Answer")
_SOLUTIONS = ("solution", "Solution")


@dataclasses.dataclass(frozen=True)
class Draft:
  """A row that was understood; `Problem` without its place in a set."""

  id: str
  question: str
  answer: str
  kind: str
  info: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Format:
  """How rows of one kind are read.

  Attributes:
    is_like: whether a first row, by its fields, is of this kind.
    read: (fields, where) to question, answer and the fields that these took.
  """

  is_like: Callable[[dict[str, Any]], bool]
  read: Callable[[dict[str, Any], str], tuple[str, str, tuple[str, ...]]]


def detect(row: rows_lib.Row) -> str:
  """The name of the format that a file's first row is of.

  Raises:
    ValueError: of none.
  """
  for name, one in FORMATS.items():
    if one.is_like(row.fields):
      return name
  raise ValueError(
    f"{row.where}: its fields {', '.join(sorted(row.fields)) or '(none)'} are"
    f" those of no known format ({', '.join(FORMATS)}); name them as one of"
    " these does, such as prompt and answer"
  )


def read(row: rows_lib.Row, name: str) -> Draft:
  """Reads a row of a format.

  Raises:
    ValueError: a field is missing or of another type; names row and field.
  """
  where, fields = row
  if name not in FORMATS:
    raise ValueError(
      f"format {name!r} is unknown{errors.closest(name, FORMATS)}; choose one"
      f" of {', '.join(FORMATS)}"
    )
  question, answer, taken = FORMATS[name].read(fields, where)
  answer = answers.find(answer)
  if name == "plain":
    kind = _typed(fields, "kind", str, "", where)
    info = _typed(fields, "info", dict, {}, where)
    given = _typed(fields, "id", str, "", where)
  else:
    kind = next((fields[k] for k in _KIND_FIELDS if _is_text(fields, k)), "")
    info = {k: v for k, v in fields.items() if k not in taken}
    if name == "verifiers":
      info = {k: v for k, v in info.items() if k != "info"}
      info |= _info(fields, where)
    given = next(
      (fields[k] for k in _ID_FIELDS if fields.get(k) is not None), ""
    )
  return Draft(
    id=str(given) if given != "" else _digest(question, answer),
    question=question,
    answer=answer,
    kind=kind,
    info=types.MappingProxyType(info),
  )


def _digest(question: str, answer: str) -> str:
  text = json.dumps([question, answer])
  return hashlib.sha256(text.encode()).hexdigest()[:16]


# ------------------------------------------------------------------ columns


def _is_text(fields: Mapping[str, Any], name: str) -> bool:
  return isinstance(fields.get(name), str)


def _shown(fields: Mapping[str, Any], name: str) -> str:
  return repr(fields[name])[:80] if name in fields else "missing"


def _typed(
  fields: Mapping[str, Any], name: str, kind: type, default: Any, where: str
) -> Any:
  if fields.get(name) is None:
    return default
  if not isinstance(fields[name], kind):
    raise ValueError(
      f"{where}: field {name!r} must be a JSON"
      f" {'object' if kind is dict else 'string'}, not {_shown(fields, name)}"
    )
  return fields[name]


def _question(fields: Mapping[str, Any], name: str, where: str) -> str:
  """Text, or messages of which the only one of a user, at the end, is it."""
  found = fields.get(name)
  if isinstance(found, list) and 1 <= len(found) <= 2:
    roles = [m.get("role") if isinstance(m, dict) else None for m in found]
    if roles in (["user"], ["system", "user"]):
      found = found[-1].get("content")
  if not isinstance(found, str) or not found.strip():
    raise ValueError(
      f"{where}: field {name!r} must be text or a list with one user message,"
      f" not {_shown(fields, name)}"
    )
  return found


def _answer(fields: Mapping[str, Any], name: str, where: str) -> str:
  """Text or a number; 27.0 is 27."""
  found = fields.get(name)
  if isinstance(found, float) and found.is_integer() and abs(found) < 2**53:
    found = int(found)
  if isinstance(found, (int, float)) and not isinstance(found, bool):
    return str(found)
  if not isinstance(found, str) or not found.strip():
    raise ValueError(
      f"{where}: field {name!r} must be the answer, text or a number, not"
      f" {_shown(fields, name)}"
    )
  return found.strip()


def _first(fields: Mapping[str, Any], *names: str) -> str:
  """The first of the names that the row has; else the first."""
  return next((n for n in names if fields.get(n) is not None), names[0])


def _plain(fields, where):
  unknown = sorted(set(fields) - set(_PLAIN_FIELDS))
  if unknown:
    raise ValueError(
      f"{where}: field {unknown[0]!r} is unknown; put extra data into 'info'"
    )
  question = _question(fields, "prompt", where)
  return question, _answer(fields, "answer", where), _PLAIN_FIELDS


def _verl(fields, where):
  model = _typed(fields, "reward_model", dict, {}, where)
  question = _question(fields, "prompt", where)
  answer = _answer(model, "ground_truth", f"{where}: field 'reward_model'")
  return question, answer, ("prompt", "reward_model")


def _trl(fields, where):
  name = _first(fields, "answer", "ground_truth", "solution")
  question = _question(fields, "prompt", where)
  answer = _answer(fields, name, where)
  if name == "solution":
    answer = rewards.extract_boxed(answer) or answer
  return question, answer, ("prompt", name, "messages")


def _rlvr(fields, where):
  question = _question(fields, "messages", where)
  if fields.get("constraint"):
    raise ValueError(
      f"{where}: field 'constraint' asks for a form of the text, and there is"
      " no answer to be checked"
    )
  found = fields.get("ground_truth")
  if isinstance(found, list) and len(found) == 1:
    fields = fields | {"ground_truth": found[0]}
  answer = _answer(fields, "ground_truth", where)
  return question, answer, ("messages", "ground_truth")


def _verifiers(fields, where):
  asked = _first(fields, "prompt", "question")
  question = _question(fields, asked, where)
  return question, _answer(fields, "answer", where), (asked, "answer")


def _info(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
  """`info` of verifiers: an object, or text that holds one."""
  found = fields.get("info")
  if isinstance(found, str):
    try:
      found = json.loads(found or "{}")
    except (ValueError, RecursionError):
      found = 0
  if found is not None and not isinstance(found, dict):
    raise ValueError(
      f"{where}: field 'info' must be an object, or text that holds one, not"
      f" {_shown(fields, 'info')}"
    )
  return found or {}


def _gsm8k(fields, where):
  _, mark, answer = _answer(fields, "answer", where).rpartition("####")
  if not mark or not answer.strip():
    raise ValueError(
      f"{where}: field 'answer' must end with '#### ' and the number"
    )
  number = answer.strip().replace(",", "")
  return _question(fields, "question", where), number, ("question",)


def _math(fields, where):
  asked = _first(fields, *_ASKED)
  question = _question(fields, asked, where)
  name = _first(fields, *_ANSWERS, *_SOLUTIONS)
  answer = _answer(fields, name, where)
  if name in _SOLUTIONS:
    boxed = rewards.extract_boxed(answer)
    if boxed is None:
      raise ValueError(
        f"{where}: field {name!r} holds no \\boxed answer, and there is no"
        " field 'answer'"
      )
    return question, boxed, (asked,)
  return question, answer, (asked, name)


def _svamp(fields, where):
  body = _question(fields, "Body", where).rstrip()
  text = body if body.endswith((".", "?", "!", ",")) else f"{body}."
  question = f"{text} {_question(fields, 'Question', where)}"
  taken = ("Body", "Question", "Answer")
  return question, _answer(fields, "Answer", where), taken


def _gsm_hard(fields, where):
  question = _question(fields, "input", where)
  return question, _answer(fields, "target", where), ("input", "target")


def _has(*names: str) -> Callable[[dict[str, Any]], bool]:
  return lambda fields: all(name in fields for name in names)


# In the order in which a first row is held against them.
FORMATS: dict[str, Format] = {
  "verl": Format(_has("prompt", "reward_model"), _verl),
  "plain": Format(
    lambda fields: "prompt" in fields and set(fields) <= set(_PLAIN_FIELDS),
    _plain,
  ),
  "verifiers": Format(
    lambda fields: (
      "answer" in fields
      and bool({"prompt", "question"} & set(fields))
      and bool({"task", "example_id"} & set(fields))
    ),
    _verifiers,
  ),
  "trl": Format(_has("prompt"), _trl),
  "rlvr": Format(_has("messages", "ground_truth"), _rlvr),
  "svamp": Format(_has("Body", "Question", "Answer"), _svamp),
  "gsm_hard": Format(_has("input", "target"), _gsm_hard),
  "gsm8k": Format(
    lambda fields: (
      _has("question", "answer")(fields)
      and "problem" not in fields
      and "####" in str(fields["answer"])
    ),
    _gsm8k,
  ),
  "math": Format(lambda fields: any(name in fields for name in _ASKED), _math),
}
