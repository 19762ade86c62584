"""What a run needs on one device, by the memory of its compiled programs.

Nothing runs: the update and the engine's programs are compiled for a described
TPU chip (which needs libtpu and no TPU) or for this machine's own device, and
the compiler says what each needs beside its arguments. What is held all the
time, the state, a frozen base, the engine's weights and its cache, is added up
from shapes. A TPU's compiler refuses a program that does not fit the chip.

  python -m benchmarks.memory --machine v5e [--model Qwen/Qwen3-1.7B]
    [--rank 16] [--rows 8] [--microbatch 2] [--length 2048] [--json]
"""

import argparse
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies

from benchmarks import common
from roc.device import (
  decoding,
  families,
  learner,
  lora,
  model,
  sampling,
  sharding,
)
from roc.device import step as step_lib

# Four chips of each, of which one is compiled for.
MACHINES = {"v5e": "v5e:2x2", "v5p": "v5:2x2x1", "v6e": "v6e:2x2"}
SMALL = 16.0  # GB, of a v5e chip and of many GPUs


def make_mesh(machine: str) -> jax.sharding.Mesh:
  """One device: of a machine that need not be there, or of this one."""
  if machine == "here":
    return sharding.make_mesh(1, 1, 1)
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  topology = topologies.get_topology_desc(
    platform="tpu", topology_name=MACHINES[machine]
  )
  return jax.sharding.Mesh(
    np.array(topology.devices[:1]).reshape(1, 1, 1),
    sharding.MESH_AXES,
    axis_types=(jax.sharding.AxisType.Auto,) * 3,
  )


@dataclasses.dataclass(frozen=True)
class Run:
  """The parts of a run on one device, as shapes."""

  policy: model.Policy
  mesh: jax.sharding.Mesh
  settings: sampling.SamplingConfig
  learner: learner.Learner

  @classmethod
  def of(cls, args: argparse.Namespace, mesh: jax.sharding.Mesh) -> "Run":
    """As `train` would build it."""
    shapes = dataclasses.replace(
      families.PUBLISHED[args.model],
      dtype="bfloat16",
      remat="full",
      attention="xla" if args.machine == "here" else "pallas",
    )
    adapters = lora.LoraConfig(rank=args.rank)
    policy = model.Policy(shapes, mesh, adapters=adapters)
    settings = sampling.SamplingConfig(
      n_slots=args.slots,
      page=128,
      extend_chunk=128,
      cache_length=args.length,
      cache_tokens=args.cache_tokens,
      max_tokens=args.length // 2,
    )
    loss = step_lib.LossConfig()
    made = learner.Learner(
      policy,
      optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-5)),
      step_lib.grpo_loss(policy, loss, 1.0),
      mesh,
      n_microbatches=args.rows // args.microbatch,
    )
    return cls(policy, mesh, settings, made)

  def shape(self, *shape: int, dtype: Any = jnp.int32) -> Any:
    """An array on the device."""
    whole = sharding.replicated(self.mesh)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

  def placed(self, tree: Any) -> Any:
    """Arrays on the device."""
    return jax.tree.map(lambda x: self.shape(*x.shape, dtype=x.dtype), tree)

  @property
  def weights(self) -> Any:
    """The engine's, adapters included."""
    params = self.policy.abstract_params
    if self.policy.lora.rank:
      key = jax.random.key(0)
      adapters = jax.eval_shape(self.policy.init_adapters, key)
      params = lora.join(params, adapters)
    return self.placed(jax.eval_shape(self.policy.fuse, params))

  @property
  def pool(self) -> Any:
    """The engine's cache."""
    n_pages = self.settings.cache_tokens // self.settings.page
    make = lambda: self.policy.empty_pool(n_pages, self.settings.page)
    return self.placed(jax.eval_shape(make))

  def held(self) -> dict[str, int]:
    """Bytes of what is there all the time."""
    state, base = self.learner.abstract_state, self.learner.abstract_base
    weights = self.weights
    if base:  # shared, so the engine adds its adapters
      _, weights = lora.split(weights)
    return {
      "trained parameters and optimizer": size(state),
      "frozen base": size(base),
      "engine's weights": size(weights),
      "engine's cache": size(self.pool),
    }

  def programs(self, rows: int, length: int) -> Mapping[str, tuple]:
    """Jitted functions and their arguments."""
    s = self.settings
    of_rows = lambda dtype: self.shape(rows, length, dtype=dtype)
    batch = {
      "tokens_BT": of_rows(jnp.int32),
      "roles_BT": of_rows(jnp.int8),
      "logp_sampler_BT": of_rows(jnp.float32),
      "logp_old_BT": of_rows(jnp.float32),
      "weight_BT": of_rows(jnp.float32),
      "advantage_B": self.shape(rows, dtype=jnp.float32),
    }
    engine = decoding.Programs(self.policy, s, [self.policy.config.vocab_size])
    S, J, R = s.n_slots, -(-s.cache_length // s.page), s.extend_rows
    slots = decoding.Rows(
      table_SJ=self.shape(S, J),
      length_S=self.shape(S),
      pending_S=self.shape(S),
      budget_S=self.shape(S),
      key_S2=self.shape(S, 2, dtype=jnp.uint32),
    )
    pieces = self.shape(R, J), self.shape(R), self.shape(R)
    return {
      "update": (
        self.learner.jitted,
        self.learner.abstract_state,
        self.learner.abstract_base,
        batch,
        self.shape(dtype=jnp.float32),
      ),
      "drawing": (engine.draw, self.weights, self.pool, slots, self.shape()),
      "feeding": (
        *(engine.feed, self.weights, self.pool),
        *(*pieces, self.shape(R, s.extend_chunk)),
      ),
    }


def size(tree: Any) -> int:
  """Bytes of arrays."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def beside(mesh: jax.sharding.Mesh, jitted: Any, *args: Any) -> int:
  """Bytes that a program needs beside its arguments."""
  # A kernel asks its mesh for the kind of device, else the local machine.
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    memory = jitted.lower(*args).compile().memory_analysis()
  new = memory.output_size_in_bytes - memory.alias_size_in_bytes
  return memory.temp_size_in_bytes + new + memory.generated_code_size_in_bytes


def measure(args: argparse.Namespace) -> Iterator[common.Row]:
  """What is held, what programs add, and the most of it all."""
  run = Run.of(args, make_mesh(args.machine))
  kind = f"rank {args.rank}" if args.rank else "all parameters"
  row = lambda what, n_bytes, peer=None: common.Row(
    *("memory", f"{args.model}, {kind}, {args.machine}: {what}"),
    *(n_bytes / 1e9, peer, "at most" if peer else "", "GB"),
  )
  held = run.held()
  for name, n_bytes in held.items():
    yield row(name, n_bytes)
  added = {}
  for name, program in run.programs(args.rows, args.length).items():
    added[name] = beside(run.mesh, *program)
    yield row(f"{name} adds", added[name])
  yield row("most", sum(held.values()) + max(added.values()), SMALL)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
  """Flags, by default those of the command line."""
  parser = common.parser(__doc__.splitlines()[0])
  parser.add_argument(
    "--model", choices=families.PUBLISHED, default="Qwen/Qwen3-1.7B"
  )
  parser.add_argument("--machine", choices=("here", *MACHINES), default="here")
  parser.add_argument("--rank", type=int, default=16, help="0: no adapters")
  parser.add_argument("--rows", type=int, default=8, help="of an update")
  parser.add_argument("--microbatch", type=int, default=2)
  parser.add_argument("--length", type=int, default=2048)
  parser.add_argument("--slots", type=int, default=32)
  parser.add_argument("--cache_tokens", type=int, default=32_768)
  return parser.parse_args(argv)


def main() -> None:
  """Compiles, prints."""
  args = parse()
  common.emit(measure(args), args.json)


if __name__ == "__main__":
  main()
