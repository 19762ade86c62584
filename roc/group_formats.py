"""A line of a file of rollouts as the few numbers that a filter looks at.

Formats are told apart by their fields (docs/filter.md): roc's own traces, one
line a group with all of its rollouts, those of verl and of verifiers, messages
of OpenAI's API, and a minimal one. Every mistake is a `BadLineError` that says
what is wrong, without the place.
"""

import hashlib
import json
import re
import typing
import zlib
from collections.abc import Callable
from typing import Any

from roc import errors, jsonl, layout
from roc.host import episode

_MAX_INT = 2**31 - 1
_FAILED = {s.name.lower() for s in layout.FAILED_STATUSES}
_JUDGED = {s.name.lower() for s in layout.JUDGED_STATUSES}
_STATUSES = _JUDGED | {layout.ToolStatus.INFRA.name.lower()}
_OUTCOMES = {o.name.lower(): o for o in layout.Outcome}
# These transcripts have no typed status: how a call ended is in its text.
_FAILURE = re.compile(r"Error|Exception|Traceback|timeout")
_BOX = re.compile(r"\\boxed\s*\{")


class BadLineError(ValueError):
  """What is wrong with a line, without its place."""


class Rollout(typing.NamedTuple):
  """What a filter sees of one rollout."""

  rollout_id: int  # distinct in its group; -1: its place in the group
  outcome: int  # `layout.Outcome`
  n_judged: int  # calls on which the sandbox did its part
  n_failed: int  # of those, the model's fault
  n_answers: int
  n_turns: int


class Group(typing.NamedTuple):
  """One problem at one step."""

  name: str  # as --group takes it
  stream_id: int  # what its random numbers are folded from
  step: int


Parsed = tuple[Group, list[Rollout]]


def loads(line: bytes) -> Any:
  """The value of a line.

  Raises:
    BadLineError: no JSON.
  """
  try:
    return jsonl.loads(line)
  except jsonl.JsonlError as e:
    raise BadLineError(str(e)) from None


def format_of(row: Any) -> Callable[[Any], Parsed]:
  """What reads such lines: takes the value, returns group and rollouts.

  Raises:
    BadLineError: no known format.
  """
  for one in FORMATS:
    if isinstance(row, dict) and set(one.fields) <= set(row):
      return one.read
  known = ", ".join(" and ".join(one.fields) for one in FORMATS)
  raise BadLineError(
    f"no known format: a rollout has one of the fields {known} (docs/filter.md)"
  )


def _int(row: Any, name: str, most: int = _MAX_INT) -> int:
  value = _field(row, name)
  if type(value) is not int or not 0 <= value <= most:
    raise BadLineError(
      f"{name!r} must be a whole number from 0 to {most}, not {_short(value)}"
    )
  return value


def _field(row: Any, name: str) -> Any:
  if not isinstance(row, dict):
    raise BadLineError(f"expected an object with {name!r}, not {_short(row)}")
  if name not in row:
    raise BadLineError(f"field {name!r} is missing{errors.closest(name, row)}")
  return row[name]


def _list(row: Any, name: str) -> list:
  value = _field(row, name)
  if not isinstance(value, list):
    raise BadLineError(f"{name!r} must be a list, not {_short(value)}")
  return value


def _short(value: Any) -> str:
  text = json.dumps(value)
  return text if len(text) <= 40 else f"{text[:37]}..."


def _trace(row: Any) -> Parsed:
  """A line of `Episode.to_json`; only what the filter needs is looked at."""
  row = episode.with_later_fields(row)
  statuses = []
  for record in _list(row, "tool_records"):
    status = _field(record, "status")
    if not isinstance(status, str) or status not in _STATUSES:
      raise BadLineError(f"{_short(status)} is no status of a tool call")
    statuses.append(status)
  outcome = _field(row, "outcome")
  if not isinstance(outcome, str) or outcome not in _OUTCOMES:
    raise BadLineError(
      f"'outcome' must be one of {', '.join(_OUTCOMES)}, not {_short(outcome)}"
    )
  step, place = _int(row, "step"), _int(row, "place")
  rollout = Rollout(
    _int(row, "rollout_id"),
    _OUTCOMES[outcome],
    sum(s in _JUDGED for s in statuses),
    sum(s in _FAILED for s in statuses),
    len(_list(row, "answers")),
    _int(row, "n_turns"),
  )
  name = f"{step}:{place}"
  if row.get("drawn_by") == "evaluate":  # its places are not the run's
    name = f"eval:{name}"
  return Group(name, place, step), [rollout]


def _minimal(row: Any) -> Parsed:
  """One rollout a line, counted already."""
  correct = _field(row, "correct")
  if correct is not None and correct not in (False, True):
    raise BadLineError(
      f"'correct' must be true, false or null, not {_short(correct)}"
    )
  n_calls = _int(row, "calls")
  rollout = Rollout(
    _int(row, "rollout") if "rollout" in row else -1,
    layout.Outcome.VOID if correct is None else int(correct),
    n_calls,
    _int(row, "failed_calls", most=n_calls),
    _int(row, "answers"),
    _int(row, "turns"),
  )
  return _named(row, "group"), [rollout]


def _grouped(row: Any) -> Parsed:
  """One group a line: tool-integrated transcripts with a label each."""
  members = _list(row, "rollouts")
  if not members:
    raise BadLineError("the group is empty: 'rollouts' holds no rollout")
  rollouts = []
  for i, member in enumerate(members):
    try:
      rollouts.append(_transcript(member, i))
    except BadLineError as e:
      raise BadLineError(f"rollout {i} of the group: {e}") from None
  return _named(row, "qid"), rollouts


def _transcript(row: Any, rollout_id: int) -> Rollout:
  label = _field(row, "label")
  if label not in (0, 1):
    raise BadLineError(f"'label' must be 0 or 1, not {_short(label)}")
  n_calls = n_failed = n_answers = n_turns = 0
  was_model = False
  for segment in _list(row, "segments"):
    match segment:
      case ["execution", str(text)]:
        n_calls += 1
        n_failed += bool(_FAILURE.search(text))
        was_model = False
      case ["text" | "code" as kind, str(text)]:
        n_turns += not was_model  # a turn ends where a tool answers
        was_model = True
        n_answers += len(_BOX.findall(text)) if kind == "text" else 0
      case _:
        raise BadLineError(
          "a segment must be a pair of text, code or execution and its text,"
          f" not {_short(segment)}"
        )
  return Rollout(rollout_id, int(label), n_calls, n_failed, n_answers, n_turns)


def _named(row: Any, field: str) -> Group:
  name = _field(row, field)
  if type(name) not in (str, int) or name == "":
    raise BadLineError(f"{field!r} must be a name or a number")
  # Not the place in the file: another order must not change the choice.
  return Group(str(name), zlib.crc32(str(name).encode()) & _MAX_INT, 0)


# ------------------------------------------------- rollouts of other trainers

# Around what a tool said, where Hermes and Qwen write it into a turn of a user.
_RESPONSE = re.compile("(</?tool_response>)")
# What is left of a header whose special tokens were left out.
_HEADER = re.compile(r"\b(?:user|assistant|tool)\b|\s")
_VERDICTS = ("correct", "acc", "reward", "score")
_NAMES = (
  *("group_id", "example_id", "problem_id", "prompt_id", "uid", "qid", "id"),
)


def _verl(row: Any) -> Parsed:
  """One rollout a line, as verl's `trainer.rollout_data_dir` has it.

  `output` is all that follows the prompt, tools' answers included.
  """
  prompt = _text(row, "input")
  said, heard = _parted(_text(row, "output"))
  n_turns = sum(bool(_HEADER.sub("", text)) for text in said)
  step = _int(row, "step") if "step" in row else 0
  key = f"{_text(row, 'gts')}\n{prompt}" if "gts" in row else prompt
  return _by_prompt(key, step), [
    Rollout(
      -1,
      _outcome(row),
      len(heard),
      _n_failures(heard),
      sum(len(_BOX.findall(text)) for text in said),
      max(n_turns, 1),
    )
  ]


def _parted(text: str) -> tuple[list[str], list[str]]:
  """What stands outside of tools' answers, and these; one more of the first."""
  said: list[list[str]] = [[]]
  heard: list[str] = []
  opened: list[str] | None = None
  for part in _RESPONSE.split(text):
    if part == "<tool_response>" and opened is None:
      opened = []
    elif part == "</tool_response>" and opened is not None:
      heard.append("".join(opened))
      said.append([])
      opened = None
    else:
      (said[-1] if opened is None else opened).append(part)
  said[-1] += opened or []
  return ["".join(parts) for parts in said], heard


def _completion(row: Any) -> Parsed:
  """One rollout a line, as `vf-eval` of verifiers saves it."""
  example = _field(row, "example_id")
  if isinstance(row["completion"], str):
    messages: Any = [{"role": "assistant", "content": row["completion"]}]
  else:
    messages = _list(row, "completion")
  return _named({"example_id": example}, "example_id"), [
    _spoken(messages, _outcome(row))
  ]


def _messages(row: Any) -> Parsed:
  """One rollout a line, in messages of OpenAI's API, and its reward."""
  messages = _list(row, "messages")
  names = [name for name in ("group", *_NAMES) if row.get(name) is not None]
  if names:
    group = _named(row, names[0])
  else:
    first = next(
      (i for i, m in enumerate(messages) if _role(m) == "assistant"),
      len(messages),
    )
    group = _by_prompt(json.dumps(messages[:first], sort_keys=True), 0)
  return group, [_spoken(messages, _outcome(row))]


def _spoken(messages: list, outcome: int) -> Rollout:
  """Counts in messages; those of system and user before say nothing."""
  n_turns = n_answers = 0
  heard: list[str] = []
  for message in messages:
    role, text = _role(message), _content(message)
    if role == "assistant":
      n_turns += 1
      n_answers += len(_BOX.findall(text))
    elif role == "tool":
      heard.append(text)
    elif role == "user":  # in which Hermes and Qwen write the tools' answers
      heard += _parted(text)[1]
  if not n_turns:
    raise BadLineError("there is no message of an assistant")
  n_failed = _n_failures(heard)
  return Rollout(-1, outcome, len(heard), n_failed, n_answers, n_turns)


def _n_failures(heard: list[str]) -> int:
  return sum(_FAILURE.search(text) is not None for text in heard)


def _role(message: Any) -> str:
  role = _field(message, "role")
  if role not in ("system", "developer", "user", "assistant", "tool"):
    raise BadLineError(f"{_short(role)} is no role of a message")
  return role


def _content(message: Any) -> str:
  """Text of a message, which may be in parts, or nothing beside a call."""
  content = message.get("content")
  if isinstance(content, list):
    parts = [x.get("text") for x in content if isinstance(x, dict)]
    content = "".join(x for x in parts if isinstance(x, str))
  if content is not None and not isinstance(content, str):
    raise BadLineError(f"'content' must be text, not {_short(content)}")
  return content or ""


def _outcome(row: Any) -> int:
  """Correct or wrong, by the first of some fields; null: VOID.

  A reward of more than a half is one for a right answer: sets pay 1 and 0, 1
  and -1, or a little for form alone.
  """
  name = next((name for name in _VERDICTS if name in row), None)
  if name is None:
    raise BadLineError(
      f"nothing says whether it is correct: one of {', '.join(_VERDICTS)}"
    )
  value = row[name]
  if value is None:
    return int(layout.Outcome.VOID)
  if not isinstance(value, bool | int | float) or value != value:
    raise BadLineError(
      f"{name!r} must be a number or null, not {_short(value)}"
    )
  is_correct = value > 0.5
  return int(layout.Outcome.CORRECT if is_correct else layout.Outcome.WRONG)


def _text(row: Any, name: str) -> str:
  value = _field(row, name)
  if not isinstance(value, str):
    raise BadLineError(f"{name!r} must be text, not {_short(value)}")
  return value


def _by_prompt(prompt: str, step: int) -> Group:
  """A group that is known by its prompt alone."""
  digest = hashlib.sha256(prompt.encode()).hexdigest()
  name = f"{step}:{digest[:12]}" if step else digest[:12]
  return Group(name, int(digest[:8], 16) & _MAX_INT, step)


class Format(typing.NamedTuple):
  """A kind of lines.

  Attributes:
    fields: that a line of it has, and no line of the kinds before it.
    read: takes the value of a line, returns group and rollouts.
  """

  fields: tuple[str, ...]
  read: Callable[[Any], Parsed]


# In the order in which a first line is held against them.
FORMATS: tuple[Format, ...] = (
  Format(("tool_records",), _trace),
  Format(("rollouts",), _grouped),
  Format(("input", "output"), _verl),
  Format(("example_id", "completion"), _completion),
  Format(("messages",), _messages),
  Format(("group",), _minimal),
)
