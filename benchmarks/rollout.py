"""The rollout engine beside its peers and beside what the machine can do.

One model for all: a Qwen3 of 4 layers and 3.3 M parameters, float32, random
weights, and no id that could end a turn, so that all draw equally many tokens.

Rows, chosen by `--rows` (ours with its defaults, in 1 to 3 with pages of 128
and chunks of 32 tokens):
  1  32 prompts of 64 tokens, 192 new ones: Tunix
  2  the same, with 4096 tokens of cache for every row: Tunix
  3  as 1: Hugging Face `generate`
  4  lengths that differ (geometric, mean 96), 128 rollouts through 32 slots:
     Tunix in four static batches. Each is told the length of its longest row,
     which nobody knows beforehand, and stops there; useful tokens count.
  5  8 rollouts of each of 4 prompts of 512 tokens: Tunix, prompts repeated
  6  conversations with three tool calls of 20 to 200 ms: a loop that takes
     turns in batches of 32 and prefills the conversation again each time, by
     our own engine and by Tunix; and Tunix with one conversation a thread, as
     its agents have it
  7  decoding at full batch: the same matrix products and reads of the same
     cache pages in a bare loop; and the machine's own speed

Ours and the peers run in turns. Rows named `target` hold the median ratio of
speeds beside its aim: above 1 it is reached. Peers need `--peers=PYTHON`, an
interpreter of another virtual environment with google-tunix 0.1.7 (install it
with --no-deps beside jax 0.10.2, flax 0.12, optax, orbax-checkpoint, qwix,
grain, numba, omegaconf, clu, perfetto, google-metrax and sentencepiece), and
with transformers and torch. Without it our numbers stand alone.

  python -m benchmarks.rollout [--json] [--peers PYTHON] [--rows 1,2,3]
"""

import argparse
import contextlib
import dataclasses
import functools
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from benchmarks import common, rollout_ours, rollout_peers, rollout_work
from benchmarks.rollout_ours import SLOTS
from roc.device import engine as engine_lib

RAGGED_CAP = (
  448  # longest rollout of row 4; its cache holds 512 with the prompt
)
TUNIX = "Tunix 0.1.7"


@dataclasses.dataclass
class Side:
  """One way of doing a row's work.

  Attributes:
    name: as printed.
    run: does it once.
    aim: how many times faster than this ours is to be; 0: no aim.
    took: each timed run.
  """

  name: str
  run: Callable[[], rollout_peers.Took]
  aim: float = 0.0
  took: list[rollout_peers.Took] = dataclasses.field(default_factory=list)

  @property
  def speed(self) -> list[float]:
    """Tokens or conversations a second, run by run."""
    return [t.n / t.wall for t in self.took]

  @property
  def cpu_ms(self) -> list[float]:
    """Processor milliseconds for each of them."""
    return [t.cpu / t.n * 1e3 for t in self.took]


@dataclasses.dataclass
class Bench:
  """What the rows share."""

  repeats: int
  slow_repeats: int
  tunix: rollout_peers.Worker | None
  hf: rollout_peers.Worker | None


def measure(
  case: str, unit: str, sides: Sequence[Side], repeats: int
) -> Iterator[common.Row]:
  """Runs the sides in turns; yields speed, processor time and aim of each."""
  for round_ in range(repeats + 1):
    for side in sides:
      took = side.run()
      if round_:
        side.took.append(took)
  ours, median = sides[0], statistics.median
  for peer in sides[1:] or [None]:
    name = peer.name if peer else ""
    for what, values, of in (
      ("", "speed", f"{unit}/s"),
      (", cpu", "cpu_ms", f"ms/{unit[:-1]}"),
    ):
      yield common.Row(
        "rollout",
        case + what,
        median(getattr(ours, values)),
        median(getattr(peer, values)) if peer else None,
        name,
        of,
      )
    if peer and peer.aim:
      pairs = zip(ours.speed, peer.speed, strict=True)
      yield target(case, name, median(a / b for a, b in pairs), peer.aim)


def target(case: str, name: str, ratio: float, aim: float) -> common.Row:
  """A row that holds a ratio beside the least that it is to be."""
  case = f"{case}, target: {name}"
  return common.Row("rollout", case, ratio, aim, "at least", "x")


def our_side(
  engine: engine_lib.Engine,
  prompts: Sequence[list[int]],
  budgets: Sequence[int],
) -> Side:
  """Our engine drawing rollouts; what counts is tokens."""
  run = lambda: sum(map(len, rollout_ours.draw(engine, prompts, budgets)))
  return Side("ours", lambda: rollout_peers.clock(run))


def measure_equal(
  bench: Bench, cache: int, peers: Sequence[Side], repeats: int
) -> Iterator[common.Row]:
  """Rows 1 to 3: all prompts and answers of one length."""
  n, n_prompt, n_new = SLOTS, 64, 192
  ours = our_side(
    rollout_ours.engine(cache, page=128, chunk=32),
    rollout_work.prompts(n, n_prompt),
    [n_new] * n,
  )
  case = f"{n} x {n_prompt} + {n_new}, cache {cache}"
  yield from measure(case, "tokens", [ours, *peers], repeats)


def tunix_equal(bench: Bench, cache: int, aim: float) -> list[Side]:
  """Tunix on the same."""
  if bench.tunix is None:
    return []
  run = functools.partial(
    bench.tunix, "generate", n=SLOTS, n_prompt=64, n_new=192, cache=cache
  )
  return [Side(TUNIX, run, aim)]


def row_1(bench: Bench) -> Iterator[common.Row]:
  """Cache as long as the rollouts."""
  return measure_equal(bench, 256, tunix_equal(bench, 256, 1.5), bench.repeats)


def row_2(bench: Bench) -> Iterator[common.Row]:
  """A cache that is mostly empty."""
  peers = tunix_equal(bench, 4096, 15)
  return measure_equal(bench, 4096, peers, bench.slow_repeats)


def row_3(bench: Bench) -> Iterator[common.Row]:
  """Hugging Face `generate`, whose cache grows as needed."""
  if bench.hf is None:
    return iter(())
  run = functools.partial(bench.hf, "generate", n=SLOTS, n_prompt=64, n_new=192)
  peers = [Side("transformers generate", run, 2)]
  return measure_equal(bench, 256, peers, bench.repeats)


def row_4(bench: Bench) -> Iterator[common.Row]:
  """Lengths that differ."""
  n, n_prompt, cache = 4 * SLOTS, 64, 64 + RAGGED_CAP
  drawn_N = np.random.default_rng(0).geometric(1 / 96, n)
  lengths = np.minimum(drawn_N, RAGGED_CAP).tolist()
  sides = [
    our_side(
      rollout_ours.engine(cache), rollout_work.prompts(n, n_prompt), lengths
    )
  ]
  if bench.tunix is not None:
    run = functools.partial(
      bench.tunix,
      "ragged",
      lengths=lengths,
      batch=SLOTS,
      n_prompt=n_prompt,
      cache=cache,
    )
    sides.append(Side(f"{TUNIX}, told the longest", run, 2.5))
  case = f"{n} x {n_prompt} + geometric, mean 96, at most {RAGGED_CAP}"
  yield from measure(case, "tokens", sides, bench.slow_repeats)


def row_5(bench: Bench) -> Iterator[common.Row]:
  """Rollouts that share long prompts."""
  n, repeat, n_prompt, n_new = 4, 8, 512, 64
  cache = n_prompt + n_new
  prompts = [
    prompt
    for prompt in rollout_work.prompts(n, n_prompt)
    for _ in range(repeat)
  ]
  sides = [
    our_side(rollout_ours.engine(cache), prompts, [n_new] * len(prompts))
  ]
  if bench.tunix is not None:
    run = functools.partial(
      bench.tunix,
      "generate",
      n=n,
      repeat=repeat,
      n_prompt=n_prompt,
      n_new=n_new,
      cache=cache,
    )
    sides.append(Side(TUNIX, run, 4))
  case = f"{n} prompts x {repeat}, {n_prompt} + {n_new}"
  yield from measure(case, "tokens", sides, bench.repeats)


def row_6(bench: Bench) -> Iterator[common.Row]:
  """Conversations with tools."""
  talk = rollout_work.Talk(batch=SLOTS)
  cache = -(-talk.n_tokens // 64) * 64
  engine = rollout_ours.engine(
    cache,
    # Conversations that wait for a tool keep their pages.
    cache_tokens=talk.n_conversations * cache,
    find_stop=lambda ids: talk.n_turn if len(ids) >= talk.n_turn else None,
  )
  again = lambda rows, n: rollout_ours.draw(engine, rows, [n] * len(rows))
  clock = rollout_peers.clock
  sides = [
    Side("ours", lambda: clock(rollout_ours.Conversations(engine, talk).run)),
    Side(
      "our engine, turn by turn, prefilled again",
      lambda: clock(lambda: rollout_work.talk_in_batches(again, talk)),
      2,
    ),
  ]
  if bench.tunix is not None:
    few = dataclasses.replace(talk, n_conversations=talk.n_threads)
    for name, how, setting, aim in (
      ("turn by turn, prefilled again", "batches", talk, 2),
      (f"one a thread, {few.n_conversations} of them", "threads", few, 8),
    ):
      run = functools.partial(
        bench.tunix,
        "talk",
        how=how,
        cache=cache,
        setting=dataclasses.asdict(setting),
      )
      sides.append(Side(f"{TUNIX}, {name}", run, aim))
  case = f"{talk.n_conversations} conversations, {talk.n_calls} tool calls"
  yield from measure(case, "conversations", sides, bench.slow_repeats)


def decode_side(engine: engine_lib.Engine, n_prompt: int, n_new: int) -> Side:
  """Our engine after its first chunk: all slots are full, nothing is fed."""

  def run() -> rollout_peers.Took:
    prompts = rollout_work.prompts(SLOTS, n_prompt)
    engine.submit(rollout_ours.requests(prompts, [n_new] * SLOTS))
    engine.decode()
    took = rollout_peers.clock(lambda: rollout_ours.finish(engine))
    if took.n != SLOTS * (n_new - engine.config.chunk):
      raise RuntimeError(f"{took.n} tokens were drawn")
    return took

  return Side("ours", run)


def row_7(bench: Bench) -> Iterator[common.Row]:
  """Decoding at full batch beside bare loops, and the machine's own speed."""
  n_prompt, n_new, clock = 64, 192, rollout_peers.clock
  engine = rollout_ours.engine(256)
  config, chunk = engine.policy.config, engine.config.chunk
  params = engine.policy.fuse(engine.policy.init(jax.random.key(0)))
  sides = [decode_side(engine, n_prompt, n_new)]
  n_start, n_steps = n_prompt - 1 + chunk, n_new - chunk
  for read, aim in (("pages", 0.75), ("sum", 0.0), ("nothing", 0.0)):
    loop = rollout_ours.BareLoop(
      config, SLOTS, n_start, n_steps, engine.config.page, read
    ).build(params)
    name = f"bare loop, cache: {read}"
    sides.append(Side(name, functools.partial(clock, loop), aim))
  probes = rollout_ours.machine(config, SLOTS)
  probed = {
    name: Side(name, functools.partial(clock, run))
    for name, (run, _) in probes.items()
  }
  case = f"decoding {SLOTS} rows of {n_start} to {n_start + n_steps} tokens"
  yield from measure(case, "tokens", sides, bench.repeats)
  for _ in measure("machine", "runs", list(probed.values()), bench.repeats):
    pass
  flops, *sizes = rollout_ours.work(config, SLOTS, n_start + n_steps / 2)
  yield figure("a token's operations", flops / 1e6, "MFLOP")
  for name, size in zip(("weights", "keys and values"), sizes, strict=True):
    yield figure(f"{name} read for a token", size / 1e6, "MB")
  for name, (_, amount) in probes.items():
    speed = statistics.median(probed[name].speed) * amount / 1e9
    yield figure(f"this machine: {name}", speed, "G/s")


def figure(case: str, value: float, unit: str) -> common.Row:
  """A row without a peer."""
  return common.Row("rollout", case, value, None, "", unit)


ROWS: dict[str, Callable[[Bench], Iterator[common.Row]]] = {
  "1": row_1,
  "2": row_2,
  "3": row_3,
  "4": row_4,
  "5": row_5,
  "6": row_6,
  "7": row_7,
}


def main() -> None:
  """Parses flags, measures, prints."""
  parser = common.parser(__doc__.splitlines()[0])
  parser.epilog = __doc__
  parser.formatter_class = argparse.RawDescriptionHelpFormatter
  parser.add_argument("--rows", default=",".join(ROWS))
  parser.add_argument("--repeats", type=int, help="5; 3 without peers")
  parser.add_argument("--slow_repeats", type=int, help="rows 2, 4, 6: 3, or 1")
  parser.add_argument("--peers", help="interpreter that has the peers")
  args = parser.parse_args()
  chosen = args.rows.split(",")
  rows = [figure("load average before", os.getloadavg()[0], "")]
  with contextlib.ExitStack() as workers:

    def worker(peer: str, users: str) -> rollout_peers.Worker | None:
      if not args.peers or not set(users) & set(chosen):
        return None
      return workers.enter_context(rollout_peers.Worker(args.peers, peer))

    bench = Bench(
      args.repeats or (5 if args.peers else 3),
      args.slow_repeats or (3 if args.peers else 1),
      worker("tunix", "12456"),
      worker("hf", "3"),
    )
    for name in chosen:
      for row in ROWS[name](bench):
        peer = "-" if row.peer is None else f"{row.peer:.4g}"
        print(f"{row.case}: {row.ours:.4g}, {peer}", file=sys.stderr)
        rows.append(row)
  rows.append(figure("load average after", os.getloadavg()[0], ""))
  common.emit(rows, args.json)


if __name__ == "__main__":
  main()
