"""Resample on correct: one jitted program against a Python loop over groups.

Both sides start from tool statuses and counts, compute the penalties and choose
G of O rollouts per group; "sort" must agree exactly, "inverse" draws from the
same distribution with numpy's generator. Target: under 1 ms for 512 groups.

  python -m benchmarks.roc_filter [--json] [--groups 512] [--drawn 32]
"""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from roc import layout
from roc.core import resample

BENCH = "roc_filter"
MIN_KEPT = 2
EPS = 0.1


def make_groups(n_groups: int, n_drawn: int, n_calls: int, seed: int = 0):
  """Random statuses, answers, turns and outcomes, as numpy arrays."""
  rng = np.random.default_rng(seed)
  n_made = rng.integers(0, n_calls + 1, (n_groups, n_drawn, 1))
  status = rng.choice([s.value for s in layout.ToolStatus][1:], size=n_calls)
  status = rng.permuted(
    np.broadcast_to(status, (n_groups, n_drawn, n_calls)), axis=-1
  )
  status = np.where(np.arange(n_calls) < n_made, status, -1).astype(np.int8)
  n_answers = rng.integers(0, 3, (n_groups, n_drawn)).astype(np.int32)
  n_turns = n_made[:, :, 0].astype(np.int32) + 1
  accuracy = rng.uniform(0.05, 0.95, (n_groups, 1))
  outcome = (rng.uniform(size=(n_groups, n_drawn)) < accuracy).astype(np.int8)
  return status, n_answers, n_turns, outcome


def penalty(status, answers: int, turns: int) -> float:
  """p_err + p_format of one rollout, in plain Python."""
  judged = [s for s in status if s in layout.JUDGED_STATUSES]
  failed = [s for s in judged if s in layout.FAILED_STATUSES]
  p_err = len(failed) / len(judged) if judged else 0.5
  p_format = min(1.0, (answers - 1) / max(turns, 1)) if answers else 1.0
  return p_err + p_format


def loop_over_groups(mode, groups, n_keep: int, rng) -> np.ndarray:
  """The same selection, one group after the other."""
  status, n_answers, n_turns, outcome = (x.tolist() for x in groups)
  keep = np.zeros(groups[3].shape, bool)
  for n, results in enumerate(outcome):
    p = [
      penalty(*x) for x in zip(status[n], n_answers[n], n_turns[n], strict=True)
    ]
    pos = [o for o, result in enumerate(results) if result == 1]
    neg = [o for o, result in enumerate(results) if result == 0]
    if mode == "sort":
      n_neg = round(len(neg) * n_keep / len(results))
    else:
      n_neg = len(neg) * n_keep // len(results)
    n_neg = max(n_neg, min(MIN_KEPT, len(neg)))
    n_pos = max(n_keep - n_neg, min(MIN_KEPT, len(pos)))
    if mode == "sort":
      chosen = sorted(pos, key=lambda o: p[o])[:n_pos] + neg[: n_keep - n_pos]
    else:
      weight = np.array([1.0 / (p[o] + EPS) for o in pos])
      chosen = [*rng.choice(neg, n_keep - n_pos, replace=False)]
      if pos:
        share = weight / weight.sum()
        chosen += [*rng.choice(pos, n_pos, replace=False, p=share)]
    keep[n, [int(o) for o in chosen]] = True
  return keep


def measure(mode: str, groups, n_keep: int, repeats: int) -> list[common.Row]:
  """All rows of one mode, after checking that both sides agree."""
  arrays = [jnp.asarray(x) for x in groups]
  key, rng = jax.random.key(0), np.random.default_rng(0)

  @jax.jit
  def choose(key, status_NOC, n_answers_NO, n_turns_NO, outcome_NO):
    p = resample.penalties(status_NOC, n_answers_NO, n_turns_NO)
    return resample.resample(
      mode,
      key,
      outcome_NO,
      p.p_total_NO,
      n_keep=n_keep,
      min_pos=MIN_KEPT,
      min_neg=MIN_KEPT,
      eps=EPS,
    )

  ours = lambda: jax.block_until_ready(choose(key, *arrays))
  peer = lambda: loop_over_groups(mode, groups, n_keep, rng)
  keep, expected = np.asarray(ours()), peer()
  if mode == "sort" and not np.array_equal(keep, expected):
    raise AssertionError("sort: the loop and the jitted program disagree")
  if not np.array_equal(keep.sum(-1), expected.sum(-1)):
    raise AssertionError(f"{mode}: the two sides keep different numbers")
  pair = common.alternate(
    {"ours": ours, "peer": peer}, repeats=max(3, repeats // 10)
  )
  alone = common.alternate({"ours": ours}, repeats=repeats)["ours"]
  n_groups, n_drawn = groups[3].shape
  case = f"{mode} [{n_groups},{n_drawn}]->{n_keep}"

  def row(what, seconds, other_ms, peer_name):
    return common.Row(
      BENCH, f"{case} {what}", seconds * 1e3, other_ms, peer_name, "ms"
    )

  a, b = pair["ours"], pair["peer"]
  loop = "Python loop"
  return [
    row("in turns, wall", a.median_wall, b.median_wall * 1e3, loop),
    row("in turns, cpu", a.median_cpu, b.median_cpu * 1e3, loop),
    row("alone, wall", alone.median_wall, 1.0, "target"),
  ]


def main() -> None:
  """Parses flags, measures, prints."""
  parser = common.parser(__doc__.splitlines()[0])
  parser.add_argument("--groups", type=int, default=512)
  parser.add_argument("--drawn", type=int, default=32)
  parser.add_argument("--kept", type=int, default=16)
  parser.add_argument("--calls", type=int, default=8)
  parser.add_argument("--repeats", type=int, default=101)
  args = parser.parse_args()
  groups = make_groups(args.groups, args.drawn, args.calls)
  rows = []
  for mode in ("sort", "inverse"):
    rows += measure(mode, groups, args.kept, args.repeats)
  common.emit(rows, args.json)


if __name__ == "__main__":
  main()
