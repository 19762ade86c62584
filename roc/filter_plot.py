"""A picture of what a filter kept."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.axes
import matplotlib.figure
import matplotlib.ticker
import numpy as np

from roc import filter_report, layout, plots

COLOURS = {
  "none": "grey", "uniform": "orange", "stratified": "green",
  "balanced": "violet", "sort": "blue", "inverse": "magenta",
}  # fmt: skip
# Upper bounds and names of the classes of penalties.
_CLASSES = ((0.0, "0"), (0.25, "to ¼"), (0.5, "to ½"), (2.0, "over ½"))


def figure(
  found: filter_report.Found, scope: str = "mixed"
) -> matplotlib.figure.Figure:
  """Four panels: failing calls by sign, quotas, and who is kept by penalty.

  Args:
    found: what to draw.
    scope: which groups all panels but the quotas' are about.
  """
  drawn, axes = plots.panels(2, 2, size=(4.4, 2.8))
  modes = [mode for mode in found.keep if mode != "none"] or ["none"]
  rows = [filter_report.mode_row(found, mode, scope) for mode in modes]
  for ax, sign in zip(axes, ("correct", "wrong"), strict=False):
    _draw_shares(ax, rows, sign)
  _draw_quotas(axes[2], filter_report.common_quotas(found), modes)
  _draw_kept(axes[3], found, modes, found.in_scope(scope))
  return drawn


def _draw_shares(
  ax: matplotlib.axes.Axes, rows: Sequence[Mapping[str, Any]], sign: str
) -> None:
  """Bars: failing calls per call, as drawn and as each mode keeps them."""
  sides = [rows[0][sign]["before"], *(row[sign]["after"] for row in rows)]
  shares = [values["error_share"] or 0.0 for values in sides]
  names = ["drawn", *(row["mode"] for row in rows)]
  colours = ["ink", *(COLOURS[row["mode"]] for row in rows)]
  ax.bar(range(len(names)), shares, 0.6, color=list(map(plots.light, colours)))
  for x, share in enumerate(shares):
    ax.annotate(
      filter_report.percent(share), (x, share), (0, 3),
      textcoords="offset points", ha="center", fontsize=8.5,
      color=plots.light("ink"),
    )  # fmt: skip
  ax.set_ylim(0, 1.15 * max(*shares, 0.01))
  plots.finish(
    ax, f"Failing calls in {sign} rollouts", xlabel="", has_legend=False
  )
  ax.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
  _name_ticks(ax, names)


def _draw_quotas(
  ax: matplotlib.axes.Axes,
  quotas: Mapping[str, Sequence[Mapping[str, Any]]],
  modes: Sequence[str],
) -> None:
  """Correct rollouts kept against correct ones drawn."""
  for mode in modes:
    rows = quotas[mode]
    if rows:
      plots.curve(
        ax,
        [r["correct_drawn"] for r in rows],
        [r["correct_kept"] for r in rows],
        label=mode, colour=COLOURS[mode], has_points=len(rows) < 20,
        is_dashed=mode == "inverse",
      )  # fmt: skip
  size = next((r["drawn"] for rs in quotas.values() for r in rs), 0)
  plots.finish(
    ax, "Correct rollouts kept", xlabel=f"correct ones among {size} drawn"
  )


def _draw_kept(
  ax: matplotlib.axes.Axes,
  found: filter_report.Found,
  modes: Sequence[str],
  is_in: np.ndarray,
) -> None:
  """Share of the correct rollouts that is kept, by penalty."""
  is_pos = is_in & found.has_sign(layout.Outcome.CORRECT)
  bounds = [bound for bound, _ in _CLASSES]
  kind = np.searchsorted(bounds, found.penalties.p_total - 1e-6)
  counts = np.bincount(kind[is_pos], minlength=len(_CLASSES))
  filled = np.flatnonzero(counts)
  for mode in modes:
    kept = np.bincount(kind[is_pos & found.keep[mode]], minlength=len(_CLASSES))
    plots.curve(
      ax, range(len(filled)), kept[filled] / counts[filled], label=mode,
      colour=COLOURS[mode], has_points=True, is_dashed=mode == "inverse",
    )  # fmt: skip
  ax.set_ylim(0, max(ax.get_ylim()[1], 0.1))
  plots.finish(
    ax, "Share of correct rollouts kept", is_percent=True,
    xlabel="penalty p (how many were drawn)",
  )  # fmt: skip
  _name_ticks(ax, [f"{_CLASSES[i][1]}\n({counts[i]:,})" for i in filled])


def _name_ticks(ax: matplotlib.axes.Axes, names: Sequence[str]) -> None:
  ax.xaxis.set_major_locator(matplotlib.ticker.FixedLocator(range(len(names))))
  ax.xaxis.set_major_formatter(matplotlib.ticker.FixedFormatter(list(names)))
  ax.set_xlim(-0.5, max(len(names), 1) - 0.5)  # no group may be left
