"""One look for every figure: matplotlib drawn once, readable light and dark.

A figure is drawn in the light colours below. In its SVG form each of those
colours is then replaced by a CSS variable, so that the page (or the SVG's own
style sheet, when it stands alone) chooses the shade that suits the reader's
background. Text stays text, ids are removed and dates left out, so the same
numbers always give the same bytes.
"""

import io
import re

import matplotlib
import matplotlib.axes
import matplotlib.figure
import matplotlib.layout_engine
import matplotlib.ticker
import numpy as np
import numpy.typing as npt

# name -> (light, dark). The light hex doubles as the marker that `to_svg`
# looks for, so no two may be equal.
COLOURS = {
  "ink": ("#22262b", "#e4e7eb"),
  "muted": ("#69707a", "#a3abb6"),
  "grid": ("#dfe3e8", "#363c45"),
  "blue": ("#1c69b0", "#6cb2f5"),
  "orange": ("#c85f08", "#f5a35c"),
  "green": ("#138056", "#5ccf9e"),
  "magenta": ("#a93b78", "#ec8fc4"),
  "violet": ("#6a4fc0", "#b4a3f7"),
  "grey": ("#7b828c", "#959da8"),
}
_LEGEND_COLUMNS = 4
FONTS = "system-ui, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"

_RC = {
  "svg.fonttype": "none",
  "svg.hashsalt": "roc",
  "font.size": 9.5,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.spines.left": False,
  "axes.titlelocation": "left",
  "axes.titlesize": 11,
  "axes.titleweight": "bold",
  "axes.titlepad": 10,
  "axes.axisbelow": True,
  "axes.grid": True,
  "axes.grid.axis": "y",
  "grid.linewidth": 0.8,
  "xtick.major.size": 3,
  "ytick.major.size": 0,
  "legend.frameon": False,
  "legend.fontsize": 8.5,
  "legend.handlelength": 1.8,
  "lines.linewidth": 2.0,
  "lines.solid_capstyle": "round",
  "figure.facecolor": "none",
  "axes.facecolor": "none",
}


def light(name: str) -> str:
  """Returns the light shade of a colour: the one that figures draw with."""
  return COLOURS[name][0]


def _style() -> dict[str, object]:
  inks = dict.fromkeys(
    ("text.color", "axes.titlecolor", "legend.labelcolor"), light("ink")
  )
  muted = dict.fromkeys(
    ("axes.labelcolor", "xtick.color", "ytick.color"), light("muted")
  )
  lines = {"grid.color": light("grid"), "axes.edgecolor": light("muted")}
  return {**_RC, **inks, **muted, **lines}


def panels(
  n_rows: int = 1, n_columns: int = 1, *, size: tuple[float, float] = (4.6, 2.9)
) -> tuple[matplotlib.figure.Figure, list[matplotlib.axes.Axes]]:
  """Makes an empty figure in the common style.

  Args:
    n_rows: rows of panels.
    n_columns: columns of panels.
    size: width and height of one panel, in inches.

  Returns:
    The figure and its axes, row by row.
  """
  with matplotlib.rc_context(_style()):
    engine = matplotlib.layout_engine.ConstrainedLayoutEngine(
      hspace=0.08 if n_rows > 1 else None
    )
    figure = matplotlib.figure.Figure(
      figsize=(size[0] * n_columns, size[1] * n_rows), layout=engine
    )
    axes = figure.subplots(n_rows, n_columns, squeeze=False)
  return figure, list(axes.flat)


def curve(
  ax: matplotlib.axes.Axes,
  xs: npt.ArrayLike,
  ys: npt.ArrayLike,
  *,
  label: str,
  colour: str,
  is_dashed: bool = False,
  window: int = 1,
  has_points: bool = False,
) -> None:
  """Draws one series; a noisy one as a faint line under its running mean.

  Args:
    ax: where to draw.
    xs: positions.
    ys: values; a NaN is a gap.
    label: name in the legend.
    colour: a key of `COLOURS`.
    is_dashed: draw dashes instead of a solid line.
    window: width of the centred running mean; 1 draws the values as they are.
    has_points: mark each value, for series with few of them.
  """
  colour = light(colour)
  style = (0, (2.4, 1.6)) if is_dashed else "-"
  values = np.asarray(ys, dtype=float)
  if window > 1:
    ax.plot(xs, values, color=colour, linewidth=0.8, alpha=0.35, zorder=2)
    values = running_mean(values, window)
  ax.plot(
    xs,
    values,
    color=colour,
    linestyle=style,
    label=label,
    marker="o" if has_points else "",
    markersize=3.5,
    zorder=3,
  )


def band(
  ax: matplotlib.axes.Axes,
  xs: npt.ArrayLike,
  low: npt.ArrayLike,
  high: npt.ArrayLike,
  *,
  colour: str,
  alpha: float = 0.15,
) -> None:
  """Shades an interval around a curve of the same colour."""
  ax.fill_between(
    xs, low, high, color=light(colour), alpha=alpha, linewidth=0, zorder=1
  )


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
  """Centred mean over the values present in each window.

  Args:
    values: [n], NaN where there is no value.
    window: number of positions, cut off at both ends.

  Returns:
    [n] float; NaN where the window holds no value at all.
  """
  half = window // 2
  out = np.full(len(values), np.nan)
  for i in range(len(values)):
    near = values[max(0, i - half) : i + half + 1]
    near = near[np.isfinite(near)]
    if near.size:
      out[i] = near.mean()
  return out


def finish(
  ax: matplotlib.axes.Axes,
  title: str,
  *,
  xlabel: str = "step",
  is_percent: bool = False,
  floor: float | None = 0.0,
  has_legend: bool = True,
) -> None:
  """Adds title, axis labels, tick format and legend to a drawn panel.

  Args:
    ax: the panel.
    title: what is shown, short.
    xlabel: name of the horizontal axis.
    is_percent: values are shares; tick labels get a per-cent sign.
    floor: bottom of the vertical axis; None leaves it to the data.
    has_legend: name the series above the panel.
  """
  with matplotlib.rc_context(_style()):
    _finish(ax, title, xlabel, is_percent, floor, has_legend)


def _finish(
  ax: matplotlib.axes.Axes,
  title: str,
  xlabel: str,
  is_percent: bool,
  floor: float | None,
  has_legend: bool,
) -> None:
  ax.set_xlabel(xlabel)
  ax.margins(x=0.02)
  n_series = len(ax.get_legend_handles_labels()[1])
  is_named = has_legend and n_series > 0
  n_lines = -(-n_series // _LEGEND_COLUMNS) if is_named else 0
  ax.set_title(title, pad=10 + 14 * n_lines)
  if floor is not None:
    # Head room, so that a line at the top is not cut by the frame.
    low, high = ax.get_ylim()
    ax.set_ylim(floor - 0.02 * (high - floor), high)
  if is_percent:
    ax.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0, 0))
  ax.xaxis.set_major_locator(
    matplotlib.ticker.MaxNLocator(6, integer=True, min_n_ticks=1)
  )
  if is_named:
    ax.legend(
      loc="lower left",
      bbox_to_anchor=(-0.01, 0.995),
      ncols=min(_LEGEND_COLUMNS, n_series),
      borderaxespad=0.0,
      columnspacing=1.2,
      handletextpad=0.5,
    )


def shared_legend(
  figure: matplotlib.figure.Figure, ax: matplotlib.axes.Axes
) -> None:
  """Names the series of one panel once for all, above the figure."""
  handles, labels = ax.get_legend_handles_labels()
  with matplotlib.rc_context(_style()):
    figure.legend(handles, labels, loc="outside upper left", ncols=len(labels))


def style_sheet(selector: str) -> str:
  """CSS that defines the colour variables for light and dark backgrounds.

  Args:
    selector: what carries the variables: `:root` in a page, `svg` in a file.

  Returns:
    Two CSS rules as text.
  """
  sides = [
    "".join(f"--{name}:{pair[i]};" for name, pair in COLOURS.items())
    for i in (0, 1)
  ]
  return (
    f"{selector}{{{sides[0]}}}\n"
    f"@media (prefers-color-scheme:dark){{{selector}{{{sides[1]}}}}}"
  )


def to_svg(
  figure: matplotlib.figure.Figure, *, is_standalone: bool = False
) -> str:
  """Turns a figure into SVG whose colours follow the reader's background.

  Args:
    figure: what `panels` made.
    is_standalone: add the XML header and an own style sheet, for a file; else
      the text is an element to put inside a page that has `style_sheet`.

  Returns:
    The SVG as text; equal figures give equal text.
  """
  buffer = io.StringIO()
  with matplotlib.rc_context(_style()):
    figure.savefig(
      buffer, format="svg", transparent=True, metadata={"Date": None}
    )
  svg = buffer.getvalue()
  svg = svg[svg.index("<svg") :]
  svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
  # Names such as "axes_1" repeat in every figure of a page; nothing refers
  # to them. Clip paths and markers have hashed names and stay.
  svg = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", svg)
  for name, (shade, _) in COLOURS.items():
    svg = svg.replace(shade, f"var(--{name})")
  svg = re.sub(r"'DejaVu Sans'[^;\"]*", FONTS, svg)
  if not is_standalone:
    return svg
  end = svg.index(">") + 1
  sheet = f"<style>{style_sheet('svg')}</style>"
  return (
    f'<?xml version="1.0" encoding="utf-8"?>\n{svg[:end]}{sheet}{svg[end:]}'
  )


def to_png(figure: matplotlib.figure.Figure) -> bytes:
  """Turns a figure into a PNG on white, for places that take no SVG."""
  buffer = io.BytesIO()
  with matplotlib.rc_context(_style()):
    figure.savefig(buffer, format="png", dpi=160, facecolor="white")
  return buffer.getvalue()
