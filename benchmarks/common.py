"""What the benchmarks share: one row format, one way of taking time.

A claim of speed is a pair. Ours and the peer run alternately in one process, so
that a busy machine slows both; medians are compared; processor seconds stand
beside wall seconds, because a wait for another program shows in one only.
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterable

import rich.console
import rich.table


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of a benchmark.

  Attributes:
    bench: name of the program.
    case: what was measured, sizes included.
    ours: our number.
    peer: the number to compare with, None where there is none.
    peer_name: what the peer is, or the target where the peer is a target.
    unit: of both numbers.
  """

  bench: str
  case: str
  ours: float
  peer: float | None
  peer_name: str
  unit: str

  @property
  def ratio(self) -> float | None:
    """Ours over the peer's; below 1 is better than the peer."""
    return self.ours / self.peer if self.peer else None


@dataclasses.dataclass(frozen=True)
class Timing:
  """Seconds of each run of one function."""

  wall: list[float]
  cpu: list[float]

  @property
  def median_wall(self) -> float:
    """Median wall-clock seconds."""
    return statistics.median(self.wall)

  @property
  def median_cpu(self) -> float:
    """Median processor seconds of this process, all threads added."""
    return statistics.median(self.cpu)


def alternate(
  functions: dict[str, Callable[[], object]], *, repeats: int, warmup: int = 1
) -> dict[str, Timing]:
  """Times several functions in turns.

  Args:
    functions: each must return only when its work is done.
    repeats: timed rounds.
    warmup: rounds before them, for compilation and caches.

  Returns:
    `Timing` by name.
  """
  timings = {name: Timing([], []) for name in functions}
  for round_ in range(warmup + repeats):
    for name, function in functions.items():
      wall, cpu = time.perf_counter(), time.process_time()
      function()
      wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
      if round_ >= warmup:
        timings[name].wall.append(wall)
        timings[name].cpu.append(cpu)
  return timings


def emit(rows: Iterable[Row], as_json: bool) -> None:
  """Prints rows for a reader, or one JSON object a line for a program.

  Args:
    rows: in the order of printing.
    as_json: whether to print JSON lines instead of a table.
  """
  rows = list(rows)
  if as_json:
    for row in rows:
      record = dataclasses.asdict(row)
      unit = record.pop("unit")
      print(json.dumps(record | {"ratio": row.ratio, "unit": unit}))
    return
  table = rich.table.Table(title=rows[0].bench if rows else "no rows")
  table.add_column("case", overflow="fold")
  for name in ("ours", "peer", "ratio"):
    table.add_column(name, justify="right", no_wrap=True)
  table.add_column("unit", no_wrap=True)
  table.add_column("peer is", overflow="fold")
  number = lambda x: "-" if x is None else f"{x:.4g}"
  for r in rows:
    table.add_row(
      r.case,
      number(r.ours),
      number(r.peer),
      number(r.ratio),
      r.unit,
      r.peer_name,
    )
  rich.console.Console().print(table)


def parser(description: str) -> argparse.ArgumentParser:
  """A parser that knows `--json`; benchmarks add their own sizes.

  Args:
    description: first line of the benchmark's docstring.

  Returns:
    `argparse.ArgumentParser`.
  """
  result = argparse.ArgumentParser(description=description)
  result.add_argument(
    "--json", action="store_true", help="print one JSON object a row"
  )
  return result
