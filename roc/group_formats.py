"""A line of a file of rollouts as the few numbers that a filter looks at.

Three formats, each with a field that only it has: roc's own traces, one line a
group with all of its rollouts, and a minimal one (docs/filter.md). Every
mistake is a `BadLineError` that says what is wrong, without the place.
"""

import json
import re
import typing
import zlib
from collections.abc import Callable
from typing import Any

from roc import errors, layout

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
    return json.loads(line.decode())
  except UnicodeDecodeError:
    raise BadLineError("it is not UTF-8") from None
  except (ValueError, RecursionError) as e:
    raise BadLineError(f"not a line of JSON ({e})") from None


def format_of(row: Any) -> Callable[[Any], Parsed]:
  """What reads such lines: takes the value, returns group and rollouts.

  Raises:
    BadLineError: no known format.
  """
  for field, parse in FORMATS.items():
    if isinstance(row, dict) and field in row:
      return parse
  raise BadLineError(
    f"no known format: a rollout has one of the fields {', '.join(FORMATS)}"
    " (docs/filter.md)"
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


# By the field that only this format has.
FORMATS: dict[str, Callable[[Any], Parsed]] = {
  "tool_records": _trace,
  "rollouts": _grouped,
  "group": _minimal,
}
