"""Decoding at full batch, as a fraction of the device's memory bandwidth.

A step of decoding has to read all weights once and the keys and values of
every row; what it does with them takes an accelerator far less time. So the
time of a step is held against those bytes over the bandwidth that a copy
reaches in the same run. The model is a Qwen3-0.6B in bfloat16 with random
weights; `--small` is the 3.3 M-parameter model of `benchmarks.rollout` in
float32, for a CPU, where products and not bytes take the time.

Rows with `x 8` draw eight rollouts of a prompt, whose pages are read once a
group; bytes are those that have to be read, a shared page once a prompt.

`--hf=PYTHON` (an interpreter with torch and transformers) runs Hugging Face
`generate` on the same lengths, prefill included, in turns with ours.

  python -m benchmarks.decode [--small] [--json] [--hf PYTHON]
"""

import argparse
import dataclasses
import functools
import statistics
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from benchmarks import common, rollout_ours, rollout_peers, rollout_work
from roc.device import engine as engine_lib
from roc.device import sampling


@dataclasses.dataclass(frozen=True)
class Case:
  """Sizes of a row; `n_same` rollouts of each prompt."""

  n_slots: int
  n_prompt: int
  n_new: int
  n_same: int = 1

  @property
  def name(self) -> str:
    """As printed."""
    same = f" x {self.n_same}" if self.n_same > 1 else ""
    n_prompts = self.n_slots // self.n_same
    return f"{n_prompts}{same} x {self.n_prompt} + {self.n_new}"

  def prompts(self) -> list[list[int]]:
    """One for every slot."""
    distinct = rollout_work.prompts(self.n_slots // self.n_same, self.n_prompt)
    return [prompt for prompt in distinct for _ in range(self.n_same)]


LARGE = (
  Case(32, 64, 192),
  Case(64, 512, 256),
  Case(256, 512, 256),
  Case(64, 3584, 256),
)
SMALL = (Case(32, 64, 192), Case(32, 512, 64, n_same=8))


def engine(case: Case, is_small: bool) -> engine_lib.Engine:
  """An engine with weights and compiled programs."""
  shape = rollout_work.SHAPES["small" if is_small else "qwen3-0.6b"]
  policy = rollout_ours.policy(shape, "float32" if is_small else "bfloat16")
  config = sampling.SamplingConfig(
    n_slots=case.n_slots,
    chunk=16 if is_small else 64,
    extend_chunk=32 if is_small else 256,
    cache_length=-(-(case.n_prompt + case.n_new) // 64) * 64,
  )
  made = engine_lib.Engine(policy, config, [rollout_work.NO_STOP + 10**6])
  made.set_params(jax.jit(policy.init)(jax.random.key(0)))
  return made


def decode(engine: engine_lib.Engine, case: Case) -> tuple[float, float]:
  """Draws the case; returns steps, and seconds, after the first chunk."""
  prompts = case.prompts()
  engine.submit(rollout_ours.requests(prompts, [case.n_new] * len(prompts)))
  n = sum(len(drawn.tokens) for drawn in engine.decode().values())
  if n != case.n_slots * engine.config.chunk:
    raise RuntimeError(f"the first chunk drew {n} tokens")

  took = rollout_peers.clock(lambda: rollout_ours.finish(engine))
  return took.n / case.n_slots, took.wall


def step_bytes(engine: engine_lib.Engine, case: Case) -> float:
  """Bytes that a step after the first chunk has to read, on average."""
  config = engine.policy.config
  drawn = (engine.config.chunk + case.n_new) / 2
  held = drawn + case.n_prompt / case.n_same
  _, weights, cache = rollout_ours.work(config, case.n_slots, held)
  share = jnp.dtype(config.dtype).itemsize / 4  # those are of float32
  return share * case.n_slots * (weights + cache)


def copy_bandwidth(n_bytes: int) -> float:
  """Bytes per second that adding to a large array reads and writes."""
  n_times = 20
  add = lambda i, x_N: x_N + i
  run = jax.jit(lambda x_N: jax.lax.fori_loop(0, n_times, add, x_N))
  x_N = jnp.zeros(n_bytes // 4, jnp.float32)
  once = lambda: jax.block_until_ready(run(x_N)).size
  once()
  wall = min(rollout_peers.clock(once).wall for _ in range(3))
  return 2 * n_bytes * n_times / wall


def measure(
  case: Case, is_small: bool, bandwidth: float, repeats: int
) -> Iterator[common.Row]:
  """Rows of one case."""
  made = engine(case, is_small)
  runs = [decode(made, case) for _ in range(repeats + 1)][1:]
  step_s = statistics.median(seconds / steps for steps, seconds in runs)
  n_bytes = step_bytes(made, case)
  row = functools.partial(common.Row, "decode")
  yield row(case.name, case.n_slots / step_s, None, "", "tokens/s")
  yield row(
    f"{case.name}, step", step_s * 1e3, n_bytes / bandwidth * 1e3, "bound", "ms"
  )
  share = n_bytes / bandwidth / step_s
  yield row(f"{case.name}, of the bandwidth", share, None, "", "")


def against_hf(
  case: Case, is_small: bool, hf: rollout_peers.Worker, repeats: int
) -> common.Row:
  """Whole rollouts, prefill included, in turns with `generate`."""
  made, prompts = engine(case, is_small), case.prompts()
  draw = lambda: rollout_ours.draw(made, prompts, [case.n_new] * len(prompts))
  ours, theirs = [], []
  for _ in range(repeats + 1):
    took = rollout_peers.clock(lambda: sum(map(len, draw())))
    ours.append(took.n / took.wall)
    took = hf(
      "generate", n=len(prompts), n_prompt=case.n_prompt, n_new=case.n_new
    )
    theirs.append(took.n / took.wall)
  median = statistics.median
  return common.Row(
    "decode",
    f"{case.name}, with prefill",
    median(ours[1:]),
    median(theirs[1:]),
    "transformers generate",
    "tokens/s",
  )


def main() -> None:
  """Parses flags, measures, prints."""
  parser = common.parser(__doc__.splitlines()[0])
  parser.epilog = __doc__
  parser.formatter_class = argparse.RawDescriptionHelpFormatter
  parser.add_argument("--small", action="store_true", help="for a CPU")
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--hf", help="interpreter with torch and transformers")
  args = parser.parse_args()
  is_small = args.small or jax.default_backend() == "cpu"
  bandwidth = copy_bandwidth(1 << (26 if is_small else 30))
  name = jax.devices()[0].device_kind
  rows: list[common.Row] = []

  def add(row: common.Row) -> None:
    print(f"{row.case}: {row.ours:.4g} {row.unit}", file=sys.stderr)
    rows.append(row)

  add(common.Row("decode", f"{name}: copy", bandwidth / 1e9, None, "", "GB/s"))
  cases = SMALL if is_small else LARGE
  for case in cases:
    for row in measure(case, is_small, bandwidth, args.repeats):
      add(row)
  if args.hf:
    shape = "small" if is_small else "qwen3-0.6b"
    with rollout_peers.Worker(args.hf, "hf", shape=shape) as hf:
      for case in cases:
        if case.n_same == 1 and case.n_slots * case.n_prompt <= 1 << 15:
          add(against_hf(case, is_small, hf, args.repeats))
  common.emit(rows, args.json)


if __name__ == "__main__":
  main()
