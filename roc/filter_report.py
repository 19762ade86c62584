"""What a filter kept, in numbers: rows of JSON and tables."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import rich.table

from roc import choice, layout
from roc import groups as groups_lib
from roc.host import traces

SCOPES = ("all", "mixed")


@dataclasses.dataclass(frozen=True)
class Found:
  """Rollouts, their penalties, and what each mode keeps of them.

  Attributes:
    rollouts: n of them.
    penalties: float32 [n] each.
    keep: bool [n], by mode.
    n_kept: int [groups], G of each group where the mode chooses.
  """

  rollouts: groups_lib.Rollouts
  penalties: choice.Penalties
  keep: dict[str, np.ndarray]
  n_kept: np.ndarray

  def has_sign(self, sign: layout.Outcome) -> np.ndarray:
    """Whether each rollout has this outcome, bool [n]."""
    return self.rollouts.outcome == sign

  def per_group(self, is_counted: np.ndarray) -> np.ndarray:
    """How many of each group are counted, int64 by group."""
    n_groups = len(self.rollouts.groups)
    return np.bincount(self.rollouts.group[is_counted], minlength=n_groups)

  def n_of_group(self, mode: str) -> np.ndarray:
    """How many of each group a mode keeps, int64 by group."""
    return self.per_group(self.keep[mode])

  def is_mixed(self, is_counted: np.ndarray) -> np.ndarray:
    """Which groups have counted rollouts of both signs, bool by group.

    The others have no advantage: training leaves them out.
    """
    signs = (layout.Outcome.CORRECT, layout.Outcome.WRONG)
    n_pos, n_neg = (
      self.per_group(is_counted & self.has_sign(sign)) for sign in signs
    )
    return (n_pos > 0) & (n_neg > 0)

  def in_scope(self, scope: str) -> np.ndarray:
    """Rollouts of all groups, or of those that were drawn mixed; bool [n]."""
    everything = np.ones(len(self.rollouts), bool)
    if scope == "all":
      return everything
    return self.is_mixed(everything)[self.rollouts.group]


# -------------------------------------------------------------------- figures


def side(found: Found, is_counted: np.ndarray) -> dict[str, Any]:
  """Calls and failures of the rollouts that are counted, bool [n]."""
  r = found.rollouts
  n = int(is_counted.sum())
  n_calls = int(r.n_judged[is_counted].sum())
  n_failed = int(r.n_failed[is_counted].sum())
  p_total = found.penalties.p_total[is_counted]
  return {
    "rollouts": n,
    "calls": n_calls,
    "failed_calls": n_failed,
    "error_share": n_failed / n_calls if n_calls else None,
    "with_failure": int((r.n_failed[is_counted] > 0).sum()),
    "without_call": int((r.n_judged[is_counted] == 0).sum()),
    "mean_penalty": float(p_total.mean()) if n else None,
  }


def mode_row(found: Found, mode: str, scope: str) -> dict[str, Any]:
  """What one mode does to all groups, or to the mixed ones."""
  is_in, keep = found.in_scope(scope), found.keep[mode]
  row: dict[str, Any] = {
    "row": "mode",
    "mode": mode,
    "scope": scope,
    "groups": int((found.per_group(is_in) > 0).sum()),
    "groups_kept": int((found.per_group(is_in & keep) > 0).sum()),
    "groups_mixed_before": int(found.is_mixed(is_in).sum()),
    "groups_mixed_after": int(found.is_mixed(is_in & keep).sum()),
    "rollouts": int(is_in.sum()),
    "void": int((is_in & found.has_sign(layout.Outcome.VOID)).sum()),
    "kept": int((is_in & keep).sum()),
  }
  for name in ("correct", "wrong"):
    of_sign = is_in & found.has_sign(layout.Outcome[name.upper()])
    row[name] = {
      "before": side(found, of_sign),
      "after": side(found, of_sign & keep),
    }
  return row


def quota_rows(found: Found, mode: str) -> list[dict[str, Any]]:
  """How many correct rollouts are kept of how many, by size of the group."""
  is_in = ~found.has_sign(layout.Outcome.VOID)
  is_pos = found.has_sign(layout.Outcome.CORRECT)
  kept = found.per_group(is_pos & found.keep[mode])
  is_kept = found.per_group(found.keep[mode]) > 0
  kinds = np.stack(
    [found.per_group(is_in), found.n_kept, found.per_group(is_pos)], axis=1
  )
  unique, index = np.unique(kinds[is_kept], axis=0, return_inverse=True)
  index = index.reshape(-1)
  return [
    {
      "row": "quota",
      "mode": mode,
      "drawn": int(drawn),
      "kept": int(drawn if mode == "none" else n_kept),
      "correct_drawn": int(n_pos),
      "groups": int((index == i).sum()),
      "correct_kept": float(kept[is_kept][index == i].mean()),
    }
    for i, (drawn, n_kept, n_pos) in enumerate(unique)
  ]


def common_quotas(found: Found) -> dict[str, list[dict[str, Any]]]:
  """`quota_rows` of each mode, of the commonest size of group alone."""
  rows = {mode: quota_rows(found, mode) for mode in found.keep}
  counts: dict[int, int] = {}
  for row in next(iter(rows.values())):
    counts[row["drawn"]] = counts.get(row["drawn"], 0) + row["groups"]
  size = max(counts, key=lambda k: (counts[k], k), default=0)
  return {m: [r for r in rs if r["drawn"] == size] for m, rs in rows.items()}


# --------------------------------------------------------------------- tables


def mode_table(found: Found, scope: str) -> rich.table.Table:
  """Drawn and kept, a line a mode."""
  rows = [mode_row(found, mode, scope) for mode in found.keep]
  first = rows[0]
  title = f"all {first['groups']:,} groups"
  if scope == "mixed":
    title = (
      f"the {first['groups']:,} groups with correct and wrong rollouts, those"
      " that training uses"
    )
  table = rich.table.Table(title=title, title_justify="left", title_style="")
  table.add_column("")
  for name in (
    "correct", "wrong", "failing calls,\ncorrect", "failing calls,\nwrong",
    "correct with\na failure", "still\nmixed",
  ):  # fmt: skip
    table.add_column(name, justify="right")
  cells = lambda row, when: [
    f"{row['correct'][when]['rollouts']:,}",
    f"{row['wrong'][when]['rollouts']:,}",
    percent(row["correct"][when]["error_share"]),
    percent(row["wrong"][when]["error_share"]),
    percent(_ratio(row["correct"][when], "with_failure")),
    f"{row[f'groups_mixed_{when}']:,}",
  ]
  table.add_row("drawn", *cells(first, "before"))
  for row in rows:
    table.add_row(row["mode"], *cells(row, "after"))
  return table


def quota_table(found: Found) -> rich.table.Table | None:
  """Correct rollouts kept, for each number of correct ones drawn."""
  quotas = common_quotas(found)
  first = next(iter(quotas.values()))
  if not first:
    return None
  kept = {r["kept"] for m, rs in quotas.items() if m != "none" for r in rs}
  kept_text = "".join(f", {n} kept" for n in sorted(kept))
  table = rich.table.Table(
    title=f"correct rollouts kept, groups of {first[0]['drawn']}{kept_text}",
    title_justify="left",
    title_style="",
  )
  for name in ("correct\ndrawn", "groups", *quotas):
    table.add_column(name, justify="right")
  for rows in zip(*quotas.values(), strict=True):
    table.add_row(
      f"{rows[0]['correct_drawn']}",
      f"{rows[0]['groups']:,}",
      *(f"{r['correct_kept']:.2f}".removesuffix(".00") for r in rows),
    )
  return table


def percent(share: float | None) -> str:
  """`12.3 %`, or a dash."""
  return "–" if share is None else f"{100 * share:.1f} %"


def _ratio(values: Mapping[str, Any], name: str) -> float | None:
  return values[name] / values["rollouts"] if values["rollouts"] else None


# ------------------------------------------------------------------ one group


def fate(found: Found, mode: str, i: int) -> dict[str, Any]:
  """The fields in which a trace has what a filter made of rollout i."""
  r, is_kept = found.rollouts, bool(found.keep[mode][i])
  p_err, p_format, p_total = (float(p[i]) for p in found.penalties)
  return {
    "kept": is_kept,
    "p_err": p_err,
    "p_format": p_format,
    "p_total": p_total,
    "why": traces.reason(
      mode,
      layout.Outcome(r.outcome[i]),
      p_total,
      worst_kept=None if is_kept else _worst_kept(found, mode, r.group[i]),
      is_chosen=is_kept,
      is_live=is_kept,
      has_group=is_kept or bool(found.n_of_group(mode)[r.group[i]]),
    ),
  }


def _worst_kept(found: Found, mode: str, group: int) -> float | None:
  """The largest penalty among the correct rollouts kept of a group."""
  is_kept = found.keep[mode] & found.has_sign(layout.Outcome.CORRECT)
  p_total = found.penalties.p_total[is_kept & (found.rollouts.group == group)]
  return float(p_total.max()) if p_total.size else None


def group_rows(found: Found, group: int) -> list[dict[str, Any]]:
  """The rollouts of a group by id, once for each mode: counts and fate."""
  r = found.rollouts
  members = np.flatnonzero(r.group == group)
  members = members[np.argsort(r.rollout_id[members])]
  return [
    {
      "row": "rollout",
      "mode": mode,
      "group": r.groups[group].name,
      "rollout": int(r.rollout_id[i]),
      "line": int(r.line[i]),
      "outcome": layout.Outcome(r.outcome[i]).name.lower(),
      "calls": int(r.n_judged[i]),
      "failed_calls": int(r.n_failed[i]),
      "answers": int(r.n_answers[i]),
      "turns": int(r.n_turns[i]),
      **fate(found, mode, i),
    }
    for mode in found.keep
    for i in members
  ]


def group_text(rows: Sequence[Mapping[str, Any]]) -> str:
  """`group_rows` for people; of one mode with the reasons."""
  modes = list(dict.fromkeys(row["mode"] for row in rows))
  n = len(rows) // len(modes)
  outcomes = [row["outcome"] for row in rows[:n]]
  lines = [
    f"group {rows[0]['group']}: {n} rollouts,"
    f" {outcomes.count('correct')} correct, {outcomes.count('wrong')} wrong"
  ]
  if not {"correct", "wrong"} <= set(outcomes):
    lines[0] += "; of one outcome: with equal rewards nothing to learn from"
  head = "rollout  outcome  failed  answers  turns  p_err  p_format     p"
  lines += ["", "  ".join([head, *(f"{mode:<7}" for mode in modes)]).rstrip()]
  for i, row in enumerate(rows[:n]):
    failed = f"{row['failed_calls']}/{row['calls']}"
    cells = (
      f"{row['rollout']:>7}  {row['outcome']:<7}  {failed:>6}"
      f"  {row['answers']:>7}  {row['turns']:>5}  {row['p_err']:>5.2f}"
      f"  {row['p_format']:>8.2f}  {row['p_total']:>4.2f}"
    )
    fates = [rows[k * n + i] for k in range(len(modes))]
    shown = [f"{'kept' if f['kept'] else '·':<7}" for f in fates]
    if len(modes) == 1:
      shown = [row["why"]]
    lines.append("  ".join([cells, *shown]).rstrip())
  return "\n".join(lines)
