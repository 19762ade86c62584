"""Right answers of data sets and their near misses, as the verifier sees them.

Each right answer is held against itself with other delimiters, what sympy and
Python print for it, and answers that are near it and wrong. All of it runs in
this process, without the sandbox; a check that takes more than its CPU seconds
counts as one that came to no end.

    python -m benchmarks.answers FILE... [--show=20]
"""

import collections
import dataclasses
import json
import logging
import signal
import statistics
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import sympy

from benchmarks import common
from roc.host import answers, units, verify_program
from roc.host.tasks import formats, rows

_DEFAULT = ("experiments/data/gsm8k/test.jsonl",)
_CPU_S = 5.0
_PROBE = r"\frac{\sqrt{7919}}{13}+1"  # equal to no right answer


class Variant(NamedTuple):
  """An answer that is made from a right one."""

  kind: str
  text: str
  is_equal: bool


@dataclasses.dataclass
class Tally:
  """What became of the variants of one kind."""

  is_equal: bool = True
  asked: int = 0
  accepted: int = 0
  no_end: int = 0
  others: list = dataclasses.field(default_factory=list)


def main() -> None:
  """Measures and prints."""
  flags = common.parser(str(__doc__).splitlines()[0])
  flags.add_argument("files", nargs="*", default=_DEFAULT)
  flags.add_argument(
    "--show", type=int, default=0, help="examples of what came out otherwise"
  )
  flags.add_argument(
    "--every",
    type=int,
    default=1,
    help="of the answers that are no plain numbers only each so many-th",
  )
  values = flags.parse_args()
  logging.disable(logging.CRITICAL)
  verify_program.guard_parser()
  signal.signal(signal.SIGPROF, _stop)
  golds, n_none = _golds(values.files)
  golds = _sample(golds, values.every)
  tallies: dict[str, Tally] = {}
  unreadable = 0
  seconds = []
  for gold, count in golds.items():
    try:
      variants = list(_variants(gold))
    except Exception:  # what sympy prints cannot be had
      variants = [Variant("itself", f"${gold}$.", True)]
    readable, _ = _check(_PROBE, gold)
    if readable is None:
      unreadable += count
      continue
    for variant in variants:
      tally = tallies.setdefault(variant.kind, Tally(variant.is_equal))
      is_equal, took = _check(variant.text, gold)
      seconds.append(took)
      tally.asked += count
      tally.accepted += count * (is_equal is True)
      tally.no_end += count * (is_equal is None)
      if is_equal is not variant.is_equal:
        tally.others.append((gold, variant.text))
  _print(tallies, seconds, golds, (n_none, unreadable), values)


def _golds(files: Any) -> tuple[collections.Counter, int]:
  """Right answers with how often each comes, and rows that have none."""
  golds: collections.Counter[str] = collections.Counter()
  n_none = 0
  for file in files:
    name = ""
    for row in rows.read(file):
      name = name or formats.detect(row)
      try:
        gold = answers.find(formats.read(row, name).answer)
      except ValueError:
        n_none += 1
        continue
      golds[gold] += 1
  for gold in [g for g in golds if answers.is_no_answer(g)]:
    n_none += golds.pop(gold)
  return golds, n_none


def _sample(golds: collections.Counter, every: int) -> collections.Counter:
  """Plain numbers, and every so many-th of the others."""
  is_plain = lambda g: answers.number(answers.tidy(g)) is not None
  kept = [g for g in golds if is_plain(g)]
  kept += [g for g in golds if not is_plain(g)][::every]
  return collections.Counter({g: golds[g] for g in kept})


def _variants(gold: str) -> Iterator[Variant]:
  """Answers that are equal to a right one, and some that are nearly so."""
  text = answers.tidy(gold)
  yield Variant("itself", f"${text}$.", True)
  bare = units.split(text).bare
  value = answers.number(bare)
  if value is not None:
    yield Variant("its print", str(value), True)
    exact = "exact" if float(value) == value else "rounded"
    yield Variant(f"its float, {exact}", repr(float(value)), True)
    yield Variant("one more", str(value + 1), False)
    yield Variant("one less", str(value - 1), False)
    if value:
      yield Variant("the other sign", str(-value), False)
    if len(str(value)) > 1:
      yield Variant("truncated", str(value)[:-1].rstrip("/"), False)
    return
  if answers.compare(_PROBE, gold).is_equal is not None:
    return  # words or a choice
  found = verify_program.parse(bare, is_complex=False)
  if found is None:
    return
  yield Variant("its print", str(_evaluated(found)), True)
  if isinstance(found, sympy.Expr):
    yield from _near_expression(found, bare)
  else:
    yield from _near_list(found, bare)


def _evaluated(found: Any) -> Any:
  """sympy prints an expression that is not evaluated with `1*1/2`."""
  return found.doit() if isinstance(found, sympy.Expr) else found


def _near_expression(found: Any, bare: str) -> Iterator[Variant]:
  if found.is_infinite:
    return
  yield Variant("one more", f"({bare})+1", False)
  yield Variant("one more", f"{_evaluated(found)} + 1", False)
  if found.is_zero is not True:
    yield Variant("the other sign", f"-({bare})", False)
  if found.is_number and found.is_real:
    yield Variant("its float, rounded", str(float(found)), True)


def _near_list(found: Any, bare: str) -> Iterator[Variant]:
  members: list[Any]
  if isinstance(found, sympy.Interval):
    members = [found.start, found.end]
  elif isinstance(found, sympy.FiniteSet | sympy.Tuple):
    members = list(getattr(found, "_unsorted_args", found.args))
  else:
    return
  start, end = ("(", ")") if answers.is_tuple(bare) else ("", "")
  listed = lambda parts: start + ", ".join(map(str, parts)) + end
  if start and members[0] != members[1]:
    swapped = [members[1], members[0], *members[2:]]
    yield Variant("permuted", listed(swapped), False)
  first, *others = members
  if getattr(first, "is_finite", False):
    yield Variant("one more", listed([first + 1, *others]), False)
  if members[-1] not in members[:-1]:
    yield Variant("truncated", listed(members[:-1]), False)


def _check(answer: str, gold: str) -> tuple[bool | None, float]:
  """The verdict, None where there is none, and its CPU seconds."""
  started = time.process_time()
  is_equal = None
  try:
    signal.setitimer(signal.ITIMER_PROF, _CPU_S)
    decision = answers.compare(answer, gold)
    is_equal = decision.is_equal
    if is_equal is None and decision.pairs:
      is_equal = verify_program.answer_question(decision.pairs)["is_equal"]
  except TimeoutError:
    pass
  finally:
    signal.setitimer(signal.ITIMER_PROF, 0)
  return is_equal, time.process_time() - started


def _stop(*_: Any) -> None:
  raise TimeoutError


def _print(tallies, seconds, golds, without, values) -> None:
  row = lambda case, ours, peer, name, unit="answers": common.Row(
    "answers", case, ours, peer, name, unit
  )
  total = sum(golds.values())
  found = [
    row("right answers", total, total + without[0], "rows"),
    row("which cannot be read", without[1], total, "right answers"),
  ]
  for kind, tally in sorted(tallies.items(), key=lambda x: not x[1].is_equal):
    wanted = "right" if tally.is_equal else "wrong"
    case = f"{kind} ({wanted}): accepted"
    found.append(row(case, tally.accepted, tally.asked, "asked"))
  hard = sorted(s for s in seconds if s > 1e-3)
  for name, times in (("all", sorted(seconds)), ("not by text", hard)):
    if times:
      case = f"a check, {name}"
      p99 = times[int(0.99 * len(times))] * 1e3
      found += [
        row(f"{case}, median", statistics.median(times) * 1e3, None, "", "ms"),
        row(f"{case}, 99th percentile", p99, None, "", "ms"),
      ]
  common.emit(found, values.json)
  for kind, tally in tallies.items():
    for gold, text in tally.others[: values.show]:
      print(json.dumps([kind, gold, text]))


if __name__ == "__main__":
  main()
