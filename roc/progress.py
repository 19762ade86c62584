"""What a run shows while it works: a bar on a terminal, lines elsewhere."""

import collections
import sys
import time
from typing import Any

import rich.console
import rich.progress

# Which metrics are shown, under which short name, if a row has them.
_SHOWN = {
  "loss": "loss",
  "reward": "reward",
  "accuracy": "acc",
  "tools/failure_frequency": "fail",
  "eval/heldout/accuracy": "held-out",
  "eval/heldout/loss": "held-out loss",
  "eval/heldout/well_formed": "well-formed",
}


class Progress:
  """Shows steps done, a few metrics, tokens per second and the time left.

  On a terminal it is one line that is drawn again; elsewhere a plain line at
  most every `every_s` seconds. Use as a context manager.
  """

  def __init__(
    self,
    title: str,
    total: int,
    *,
    start: int = 0,
    is_shown: bool = True,
    every_s: float = 5.0,
    console: rich.console.Console | None = None,
  ):
    """Args: title, total steps, step to start at, where and how often."""
    self.title = title
    self.total = total
    self.is_shown = is_shown
    self._step = start
    self._every_s = every_s
    self._console = console or rich.console.Console(
      file=sys.stdout, highlight=False, soft_wrap=True
    )
    self._shown_at = 0.0
    self._values: dict[str, str] = {}
    # Ends of the last steps. The first step compiles, so its length says
    # nothing about what comes.
    self._marks: collections.deque[tuple[float, int, float | None]] = (
      collections.deque(maxlen=11)
    )
    self._bar: rich.progress.Progress | None = None
    self._task: Any = None

  def __enter__(self) -> "Progress":
    if self.is_shown and self._console.is_terminal:
      self._bar = rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(bar_width=20),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn("{task.fields[text]}"),
        console=self._console,
        refresh_per_second=4,
      )
      self._task = self._bar.add_task(
        self.title, total=self.total, completed=self._step, text=""
      )
      self._bar.start()
    return self

  def __exit__(self, *_: object) -> None:
    if self._bar is not None:
      self._bar.stop()
      self._bar = None

  def update(self, step: int, metrics: dict[str, Any] | None = None) -> None:
    """Shows that `step` is done.

    Args:
      step: how many of `total` are done.
      metrics: a row as it goes to `runlog.MetricsLog`; some of it is shown, and
        the growth of `tokens_sampled`, or of `tokens_trained` in supervised
        training, gives the tokens per second.
    """
    metrics = metrics or {}
    tokens = metrics.get("tokens_sampled", metrics.get("tokens_trained"))
    if step > self._step:
      self._marks.append((time.monotonic(), step, tokens))
      self._step = step
    for name, label in _SHOWN.items():
      value = metrics.get(name)
      if value is not None:
        self._values[label] = f"{label} {value:.3f}"
    self._show(is_last=step >= self.total)

  def phase(self, text: str) -> None:
    """Names what is being done within the step (sampling, update, ...)."""
    if self._bar is not None:
      self._bar.update(self._task, description=f"{self.title}: {text}")

  def note(self, text: str) -> None:
    """Prints a line of its own, above the bar."""
    if self.is_shown:
      self._console.print(text, markup=False, highlight=False)

  def text(self) -> str:
    """Returns the metrics, the pace and the time left as one line."""
    parts = list(self._values.values())
    counted = [(t, n) for t, _, n in self._marks if n is not None]
    if len(counted) > 1 and counted[-1][0] > counted[0][0]:
      (t0, n0), (t1, n1) = counted[0], counted[-1]
      parts.append(f"{(n1 - n0) / (t1 - t0):,.0f} tok/s")
    if len(self._marks) > 1:
      (t0, step0, _), (t1, step1, _) = self._marks[0], self._marks[-1]
      left = (t1 - t0) / (step1 - step0) * max(0, self.total - step1)
      parts.append(f"{_clock(left)} left")
    return "  ".join(parts)

  def _show(self, *, is_last: bool) -> None:
    if not self.is_shown:
      return
    if self._bar is not None:
      self._bar.update(self._task, completed=self._step, text=self.text())
      return
    now = time.monotonic()
    if is_last or not self._shown_at or now - self._shown_at >= self._every_s:
      self._shown_at = now
      line = f"{self.title}  {self._step}/{self.total}  {self.text()}"
      self._console.print(line.rstrip(), markup=False, highlight=False)


def _clock(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f"{hours}:{minutes:02d}:{seconds:02d}"
  return f"{minutes}:{seconds:02d}"
