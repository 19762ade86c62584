"""What adapters cost, beside training all parameters.

Decoding at full batch, where two small products stand beside each projection,
and an update, whose gradients are those of adapters alone. A Qwen3-0.6B in
bfloat16 with random weights; `--small` is the 3.3 M-parameter model of
`benchmarks.rollout` in float32, for a CPU.

  python -m benchmarks.adapters [--small] [--rank 16] [--json]
"""

import argparse
import statistics
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import common, decode, rollout_ours, rollout_work
from roc.device import engine as engine_lib
from roc.device import learner as learner_lib
from roc.device import lora, model, sampling, sharding
from roc.device import step as step_lib

CASE = decode.Case(32, 64, 192)
ROWS, LENGTH = 8, 512


def make_policy(is_small: bool, rank: int) -> model.Policy:
  """With adapters, or without where `rank` is 0."""
  shape = rollout_work.SHAPES["small" if is_small else "qwen3-0.6b"]
  dtype = "float32" if is_small else "bfloat16"
  config = rollout_ours.policy(shape, dtype).config
  adapters = lora.LoraConfig(rank=rank, base_dtype=dtype)
  return model.Policy(config, adapters=adapters)


def make_learner(policy: model.Policy) -> learner_lib.Learner:
  """As `train` has it."""
  return learner_lib.Learner(
    policy,
    optax.adamw(1e-6),
    step_lib.grpo_loss(policy, step_lib.LossConfig(), 1.0),
    sharding.make_mesh(1, 1, 1),
  )


def make_engine(policy: model.Policy, params: Any) -> engine_lib.Engine:
  """With compiled programs."""
  is_small = policy.config.dtype == "float32"
  config = sampling.SamplingConfig(
    n_slots=CASE.n_slots,
    chunk=16 if is_small else 64,
    cache_length=CASE.n_prompt + CASE.n_new,
  )
  made = engine_lib.Engine(policy, config, [policy.config.vocab_size])
  made.set_params(params)
  return made


def make_batch(vocab: int) -> dict[str, Any]:
  """Rows that are drawn from their third token on."""
  rng = np.random.default_rng(0)
  shape = ROWS, LENGTH
  is_drawn_BT = np.broadcast_to(np.arange(LENGTH) > 1, shape)
  logp_BT = np.where(is_drawn_BT, -np.log(vocab), 0).astype(np.float32)
  return {
    "tokens_BT": rng.integers(0, vocab, shape, np.int32),
    "roles_BT": (1 + is_drawn_BT).astype(np.int8),
    "logp_sampler_BT": logp_BT,
    "logp_old_BT": logp_BT,
    "weight_BT": (is_drawn_BT / is_drawn_BT.sum()).astype(np.float32),
    "advantage_B": rng.standard_normal(ROWS, np.float32),
  }


class Side:
  """One way of training: its state, its engine, and how long they take."""

  def __init__(self, is_small: bool, rank: int):
    policy = make_policy(is_small, rank)
    self.learner = make_learner(policy)
    self.state = self.learner.init(jax.random.key(0))
    params = self.learner.params(self.state.params)
    self.engine = make_engine(policy, params)
    batch = make_batch(policy.config.vocab_size)
    self.batch = self.learner.place(jax.tree.map(jnp.asarray, batch))

  def step(self) -> float:
    """Seconds of a decoding step."""
    steps, seconds = decode.decode(self.engine, CASE)
    return seconds / steps

  def update(self) -> None:
    """One update."""
    self.state, _ = self.learner.update(self.state, self.batch)
    jax.block_until_ready(self.state.params)


def measure(args: argparse.Namespace) -> Iterator[common.Row]:
  """Both sides in turns."""
  is_small = args.small or jax.default_backend() == "cpu"
  ranks = {"adapters": args.rank, "all": 0}
  sides = {name: Side(is_small, rank) for name, rank in ranks.items()}
  name = jax.devices()[0].device_kind
  row = lambda what, ours, peer, unit: common.Row(
    *("adapters", f"{name}, rank {args.rank}: {what}"),
    *(ours, peer, "all parameters", unit),
  )
  steps = {name: [] for name in sides}
  for _ in range(args.repeats + 1):
    for which, side in sides.items():
      steps[which].append(side.step() * 1e3)
  ours, peer = (statistics.median(steps[which][1:]) for which in sides)
  yield row(f"decoding step, {CASE.name}", ours, peer, "ms")
  timings = common.alternate(
    {which: side.update for which, side in sides.items()},
    repeats=args.repeats,
  )
  ours, peer = (timings[which].median_wall for which in sides)
  yield row(f"update of {ROWS} x {LENGTH} tokens", ours, peer, "s")


def main() -> None:
  """Parses flags, measures, prints."""
  parser = common.parser(__doc__.splitlines()[0])
  parser.add_argument("--small", action="store_true", help="for a CPU")
  parser.add_argument("--rank", type=int, default=16)
  parser.add_argument("--repeats", type=int, default=3)
  args = parser.parse_args()
  common.emit(measure(args), args.json)


if __name__ == "__main__":
  main()
