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


def annotate(
  groups: Sequence[Sequence[episode_lib.Episode]],
  *,
  keep_NO: np.ndarray,
  is_live_NO: np.ndarray,
  advantage_NO: np.ndarray,
  p_err_NO: np.ndarray,
  p_format_NO: np.ndarray,
) -> None:
  """Writes the filter's decision and its reason into the episodes.

  Args:
    groups: N groups; an episode's column is its rollout id.
    keep_NO: bool, chosen by the resampler.
    is_live_NO: bool, kept and in the loss.
    advantage_NO: float.
    p_err_NO: float, share of failed calls (0.5 without any).
    p_format_NO: float, format penalty.
  """
  for n, group in enumerate(groups):
    for e in group:
      at = n, e.rollout_id
      e.kept = bool(is_live_NO[at])
      e.advantage = float(advantage_NO[at])
      e.p_err, e.p_format = float(p_err_NO[at]), float(p_format_NO[at])
      e.p_total = e.p_err + e.p_format
      e.why = reason(
        e.outcome,
        e.p_total,
        is_chosen=bool(keep_NO[at]),
        is_live=e.kept,
        has_group=bool(keep_NO[n].any()),
      )


def reason(
  outcome: layout.Outcome,
  p_total: float,
  *,
  is_chosen: bool,
  is_live: bool,
  has_group: bool,
) -> str:
  """Says why a rollout is kept or dropped.

  Args:
    outcome: of the rollout.
    p_total: its penalty.
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
  if is_correct:
    return f"dropped: {what}, others were cleaner or were drawn"
  return "dropped: wrong, not in the sample of wrong ones"


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
