"""Picks trajectories that show what the filter does, and words their story.

For the first and the last step on record one problem is chosen, the one whose
group shows most: clean and messy correct rollouts, wrong ones, kept and
dropped. Traces are read leniently: a report is worth having of a run that is
still writing.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from roc import curves, jsonl, layout

Trace = Mapping[str, Any]

N_OPEN = 3
_FAILED = {status.name.lower() for status in layout.FAILED_STATUSES}
_STOPS = {
  "answered": "answered",
  "max_turns": "ran out of turns",
  "max_tokens": "ran out of tokens",
  "tool_overflow": "the tool's answer did not fit",
  "cancelled": "cancelled",
  "infra": "the sandbox failed",
}


class Chip(NamedTuple):
  """How a tool call ended, as a badge."""

  status: str
  css: str


class Segment(NamedTuple):
  """A stretch of text with one author, and the call that it answers."""

  role: str
  text: str
  chip: Chip | None


class View(NamedTuple):
  """One rollout, ready for the page."""

  outcome: str
  outcome_css: str
  is_kept: bool
  fate: str
  why: str
  calls: list[Chip]
  segments: list[Segment]
  facts: str


class Exhibit(NamedTuple):
  """All rollouts of one problem at one step."""

  heading: str
  question: str
  gold: str
  summary: str
  views: list[View]
  open_at: set[int]


def exhibits(folder: pathlib.Path) -> list[Exhibit]:
  """Shows a telling group of the first and of the last step on record.

  Args:
    folder: a run's rollouts/, with files step_<n>.jsonl.

  Returns:
    Two exhibits, one where there is one step, none where there is none.
  """
  steps = {}
  for path in folder.glob("step_*.jsonl"):
    digits = path.stem.removeprefix("step_")
    if digits.isdigit():
      steps[int(digits)] = path
  shown = []
  for step in sorted({min(steps), max(steps)}) if steps else ():
    groups = _groups(steps[step])
    if not groups:
      continue
    place = "first" if step == min(steps) else "last"
    heading = f"Step {step}, the {place} on record"
    shown.append(_exhibit(heading, max(groups, key=telling)))
  return shown


def _groups(path: pathlib.Path) -> list[list[Trace]]:
  """Reads one step's traces by problem, passing over half-written lines."""
  groups: dict[Any, list[Trace]] = {}
  for _, line in jsonl.lines(path):
    try:
      trace = jsonl.loads(line)
    except jsonl.JsonlError:
      continue
    if isinstance(trace, dict):
      place = trace.get("place", trace.get("task_index"))
      groups.setdefault(place, []).append(trace)
  return list(groups.values())


def telling(group: Sequence[Trace]) -> tuple[int, int]:
  """How much a group shows of the filter; larger is better.

  Args:
    group: traces of one problem.

  Returns:
    (number of different fates, number of different penalties among the
    correct): a correct rollout kept and one dropped are two fates.
  """
  fates = {(t.get("outcome"), t.get("kept")) for t in group}
  penalties = {t.get("p_total") for t in group if t.get("outcome") == "correct"}
  return len(fates), len(penalties)


def _exhibit(heading: str, group: Sequence[Trace]) -> Exhibit:
  ordered = sorted(group, key=_reading_order)
  views = [_view(trace) for trace in ordered]
  n_correct = sum(t.get("outcome") == "correct" for t in group)
  n_kept = sum(bool(t.get("kept")) for t in group)
  return Exhibit(
    heading=heading,
    question=str(group[0].get("question", "")),
    gold=str(group[0].get("gold", "")),
    summary=(
      f"{len(group)} rollouts drawn, {n_correct} correct; {n_kept} kept."
    ),
    views=views,
    open_at=_open_at(ordered),
  )


def _reading_order(trace: Trace) -> tuple[bool, bool, float, int]:
  penalty = trace.get("p_total")
  return (
    trace.get("outcome") != "correct",
    not trace.get("kept"),
    penalty if curves.is_number(penalty) else 0.0,
    trace.get("rollout_id") or 0,
  )


def _open_at(ordered: Sequence[Trace]) -> set[int]:
  """Opens the cleanest correct rollout kept, the messiest dropped, a wrong."""
  seen: dict[Any, int] = {}
  for i, trace in enumerate(ordered):
    fate = (trace.get("outcome"), bool(trace.get("kept")))
    if fate not in seen or fate == ("correct", False):
      seen[fate] = i
  return set(list(seen.values())[:N_OPEN])


def _view(trace: Trace) -> View:
  outcome = str(trace.get("outcome", ""))
  calls = [
    Chip(status, "bad" if status in _FAILED else "good")
    for status in (str(record.get("status", "")) for record in _records(trace))
  ]
  kept = trace.get("kept")
  fate = "not filtered" if kept is None else "kept" if kept else "dropped"
  return View(
    outcome=outcome,
    outcome_css={"correct": "good", "wrong": "bad"}.get(outcome, ""),
    is_kept=kept is not False,
    fate=fate,
    why=str(trace.get("why") or "").removeprefix(f"{fate}: "),
    calls=calls,
    segments=_segments(trace, calls),
    facts=_facts(trace),
  )


def _records(trace: Trace) -> list[Mapping[str, Any]]:
  records = trace.get("tool_records") or []
  return [r for r in records if isinstance(r, Mapping)]


def _segments(trace: Trace, calls: Sequence[Chip]) -> list[Segment]:
  """Splits a rollout by author; a tool's text gets its call's status."""
  messages = [m for m in trace.get("messages") or [] if isinstance(m, Mapping)]
  shown = [m for m in messages if m.get("role") != "pad"]
  n_answers = sum(m.get("role") == "tool" for m in shown)
  # An empty tool answer leaves no segment; then the order cannot be trusted.
  chips = iter(calls if n_answers == len(calls) else ())
  return [
    Segment(
      str(m.get("role", "")),
      str(m.get("text", "")),
      next(chips, None) if m.get("role") == "tool" else None,
    )
    for m in shown
  ]


def _facts(trace: Trace) -> str:
  """One line: the penalty and its parts, reward, advantage, how it ended."""
  numbers = [
    ("p", trace.get("p_total")),
    ("p_err", trace.get("p_err")),
    ("p_format", trace.get("p_format")),
    ("reward", trace.get("reward")),
    ("advantage", trace.get("advantage") if trace.get("kept") else None),
  ]
  parts = [f"{n} {v:.3g}" for n, v in numbers if curves.is_number(v)]
  if isinstance(trace.get("n_turns"), int):
    parts.append(f"turns {trace['n_turns']}")
  if trace.get("answer") is not None:
    parts.append(f"answer {trace['answer']}")
  stop = trace.get("stop_reason")
  if stop:
    parts.append(_STOPS.get(str(stop), str(stop)))
  return " · ".join(parts)
