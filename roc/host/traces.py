"""Trace files: every rollout of a step, and what the filter made of it."""

import os
import pathlib
import re
from collections.abc import Sequence

import numpy as np

from roc import layout
from roc.host import episode as episode_lib
from roc.host import tokenizer as tokenizer_lib


def path_of(workdir: pathlib.Path, step: int) -> pathlib.Path:
  """Where the rollouts of a step lie."""
  return workdir / "rollouts" / f"step_{step:06d}.jsonl"


def evaluation_path(workdir: pathlib.Path, step: int) -> pathlib.Path:
  """Where the rollouts of the evaluation after a step lie."""
  return workdir / "rollouts" / f"eval_{step:06d}.jsonl"


def is_evaluation(path: pathlib.Path) -> bool:
  """Whether a file is one of `evaluation_path`."""
  return re.fullmatch(r"eval_\d{6,}\.jsonl", path.name) is not None


def later_than(workdir: pathlib.Path, step: int) -> list[pathlib.Path]:
  """Files of `path_of` and `evaluation_path` of later steps."""
  found = []
  for path in sorted((workdir / "rollouts").glob("*.jsonl")):
    match = re.fullmatch(r"(?:step|eval)_(\d{6,})\.jsonl", path.name)
    if match and int(match[1]) > step:
      found.append(path)
  return found


def annotate(
  groups: Sequence[Sequence[episode_lib.Episode]],
  *,
  mode: str,
  keep_NO: np.ndarray,
  is_live_NO: np.ndarray,
  advantage_NO: np.ndarray,
  p_err_NO: np.ndarray,
  p_format_NO: np.ndarray,
) -> None:
  """Writes the filter's decision and its reason into the episodes.

  Args:
    groups: N groups; an episode's column is its rollout id.
    mode: of the resampler (`core.resample`).
    keep_NO: bool, chosen by the resampler.
    is_live_NO: bool, kept and in the loss.
    advantage_NO: float.
    p_err_NO: float, share of failed calls (0.5 without any).
    p_format_NO: float, format penalty.
  """
  for n, group in enumerate(groups):
    p_total_O = [_penalty(p_err_NO, p_format_NO, n, e) for e in group]
    chosen = [bool(keep_NO[n, e.rollout_id]) for e in group]
    worst_kept = max(
      (
        p
        for p, e, is_chosen in zip(p_total_O, group, chosen, strict=True)
        if is_chosen and e.outcome == layout.Outcome.CORRECT
      ),
      default=None,
    )
    for e, p_total, is_chosen in zip(group, p_total_O, chosen, strict=True):
      at = n, e.rollout_id
      e.kept = bool(is_live_NO[at])
      e.advantage = float(advantage_NO[at])
      e.p_err, e.p_format = float(p_err_NO[at]), float(p_format_NO[at])
      e.p_total = p_total
      e.why = reason(
        mode,
        e.outcome,
        p_total,
        worst_kept=worst_kept,
        is_chosen=is_chosen,
        is_live=e.kept,
        has_group=any(chosen),
      )


def _penalty(p_err_NO, p_format_NO, n: int, e: episode_lib.Episode) -> float:
  return float(p_err_NO[n, e.rollout_id]) + float(p_format_NO[n, e.rollout_id])


def reason(
  mode: str,
  outcome: layout.Outcome,
  p_total: float,
  *,
  worst_kept: float | None,
  is_chosen: bool,
  is_live: bool,
  has_group: bool,
) -> str:
  """Says why a rollout is kept or dropped.

  Args:
    mode: of the resampler.
    outcome: of the rollout.
    p_total: its penalty.
    worst_kept: the largest penalty among the correct rollouts of its group that
      were chosen; None if none was.
    is_chosen: the resampler chose it.
    is_live: and no row filter left it out.
    has_group: the resampler chose something of its group.

  Returns:
    `kept: ...`, `dropped: ...` or `outside: ...`.
  """
  if outcome == layout.Outcome.VOID:
    return "outside: the environment failed"
  if not has_group:
    return "dropped: too few rollouts of the group are left"
  is_correct = outcome == layout.Outcome.CORRECT
  what = f"correct, p {p_total:.2f}" if is_correct else "wrong"
  if is_live:
    return f"kept: {what}"
  if is_chosen:
    return f"dropped: {what}, but a row filter left it out"
  why = _why_not_chosen(mode, p_total, is_correct, worst_kept)
  return f"dropped: {what}, {why}"


def _why_not_chosen(
  mode: str, p_total: float, is_correct: bool, worst_kept: float | None
) -> str:
  if mode != "sort":
    return "not drawn"
  if not is_correct:
    return "enough wrong ones have smaller ids"
  if worst_kept is None:
    return "the group keeps no correct one"
  if p_total > worst_kept:
    return "enough correct ones are cleaner"
  return "enough others as clean have smaller ids"


def write(
  path: pathlib.Path,
  groups: Sequence[Sequence[episode_lib.Episode]],
  tokenizer: tokenizer_lib.Tokenizer,
) -> None:
  """Writes all episodes, one a line; a file is whole or is not there."""
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_suffix(".unfinished")
  with partial.open("w", encoding="utf-8") as out:
    for group in groups:
      for e in group:
        out.write(e.to_json(tokenizer) + "\n")
    out.flush()
    os.fsync(out.fileno())  # or a power cut may leave the name without the text
  partial.replace(path)
