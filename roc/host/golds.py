"""Which right answers the verifier cannot read, before anything is drawn.

A problem whose own answer is no mathematics to the verifier makes every rollout
void. Plain numbers and words are known to be readable from the text; the rest
is read by the verifier's program in the sandbox, many to a process, and what
was found is remembered between runs.
"""

import contextlib
import hashlib
import json
import pathlib
from collections.abc import Sequence

from roc import layout
from roc.host import answers as answers_lib
from roc.host import verify
from roc.host.sandbox import contract

# Equal to no answer, so that the program has to read the right one.
_PROBE = r"\frac{\sqrt{7919}}{13}+1"
_BATCH = 16
_CPU_S = 20.0


def find_unreadable(
  answers: Sequence[str],
  sandbox: verify.Runner,
  *,
  cache: pathlib.Path | None = None,
) -> list[int]:
  """Places of the right answers that the verifier cannot read.

  One that takes too long to read is not among them: a check of it has a status
  of its own.

  Args:
    answers: right answers of problems.
    sandbox: started; reads those that are not plain.
    cache: directory in which what was found is kept; None: nowhere.
  """
  asked: dict[str, list] = {}
  unreadable = set()
  for answer in dict.fromkeys(answers):
    if answers_lib.is_no_answer(answer):
      unreadable.add(answer)
      continue
    if answers_lib.number(answers_lib.tidy(answer)) is not None:
      continue
    decision = answers_lib.compare(_PROBE, answer)
    if decision.is_equal is None and not decision.pairs:
      unreadable.add(answer)
    elif decision.is_equal is None:
      asked[answer] = decision.pairs
  known = _Known(cache, list(asked))
  if known.unreadable is None:
    known.keep(_ask(asked, sandbox))
  unreadable |= known.unreadable or set()
  return [i for i, answer in enumerate(answers) if answer in unreadable]


class _Known:
  """What an earlier run found of the same answers with the same verifier."""

  def __init__(self, cache: pathlib.Path | None, answers: list[str]):
    text = json.dumps([verify.PROGRAM, answers])
    digest = hashlib.sha256(text.encode()).hexdigest()[:32]
    self._path = cache / f"{digest}.json" if cache else None
    self.unreadable: set[str] | None = None if answers else set()
    if self._path is not None:
      with contextlib.suppress(OSError, ValueError):
        self.unreadable = set(json.loads(self._path.read_text("utf-8")))

  def keep(self, unreadable: set[str]) -> None:
    self.unreadable = unreadable
    if self._path is None:
      return
    try:
      self._path.parent.mkdir(parents=True, exist_ok=True)
      partial = self._path.with_suffix(".unfinished")
      partial.write_text(json.dumps(sorted(unreadable)), "utf-8")
      partial.replace(self._path)
    except OSError:  # a cache that cannot be written costs time, nothing else
      pass


def _ask(asked: dict[str, list], sandbox: verify.Runner) -> set[str]:
  """Has batches read; those of a batch that failed once more by themselves."""
  answers = list(asked)
  batches = [answers[i : i + _BATCH] for i in range(0, len(answers), _BATCH)]
  found = _read(batches, asked, sandbox)
  again = [
    [answer]
    for batch, statuses in zip(batches, found, strict=True)
    if statuses is None
    for answer in batch
  ]
  batches += again
  found += _read(again, asked, sandbox)
  return {
    answer
    for batch, statuses in zip(batches, found, strict=True)
    for answer, status in zip(batch, statuses or [], strict=False)
    if status == "bad_gold"
  }


def _read(
  batches: Sequence[Sequence[str]],
  asked: dict[str, list],
  sandbox: verify.Runner,
) -> list[list[str] | None]:
  """Statuses of each batch; None of one whose program came to no end."""
  limits = contract.Limits(wall_s=60.0, cpu_s=_CPU_S, memory_mb=1024)
  running = [
    sandbox.submit(
      verify.PROGRAM,
      stdin=json.dumps({"batch": [asked[answer] for answer in batch]}),
      trajectory="verify",
      limits=limits,
    )
    for batch in batches
  ]
  found: list[list[str] | None] = []
  for batch, one in zip(batches, running, strict=True):
    result = one.result()
    statuses = None
    if result.status == layout.ToolStatus.OK:
      verdicts = json.loads(result.stdout)["verdicts"]
      statuses = [verdict["status"] for verdict in verdicts]
      assert len(statuses) == len(batch)
    found.append(statuses)
  return found
