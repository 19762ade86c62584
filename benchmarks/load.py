"""Loading a checkpoint: time and host memory, against reading all of it first.

Writes a checkpoint of a published shape with random bfloat16 numbers, several
files and an index, and loads it into float32 parameters in a process of its own
each time: ours tensor by tensor, and the plain way, which reads every tensor
and then stacks and places them. Memory is the most resident memory of the
process beyond what it had before, pages of mapped files included, beside the
size of the parameters; on a CPU these lie in the same memory. With --devices
the CPU is that many devices, and the parameters are split over all of them.

  python -m benchmarks.load [--json] [--model Qwen/Qwen3-1.7B] [--repeats 3]
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from benchmarks import common
from roc.device import families, model, sharding, weights

SIDES = ("ours", "all first")


def write(folder: pathlib.Path, name: str) -> None:
  """A checkpoint as the hub has it, parameter by parameter."""
  config = families.PUBLISHED[name]
  rng = np.random.default_rng(0)
  noise_N = (rng.standard_normal(1 << 20, np.float32) * 0.02).astype(
    jnp.bfloat16
  )
  params = jax.tree.map(
    lambda x: np.broadcast_to(
      np.resize(noise_N, x.shape[-2:] if len(x.shape) > 1 else x.shape), x.shape
    ),
    model.Policy(config).abstract_params,
  )
  weights.export(params, config, folder, shard_bytes=1 << 30)


def load(folder: pathlib.Path, side: str) -> model.Params:
  """One way of getting the parameters onto the device."""
  policy = model.Policy(families.read(folder))
  n_devices = len(jax.devices())
  n_tensor = 2 if n_devices % 2 == 0 else 1
  mesh = sharding.make_mesh(1, n_devices // n_tensor, n_tensor)
  if side == "ours":
    return weights.load(folder, policy, mesh)
  tensors = {}
  for path in sorted(folder.glob("*.safetensors")):
    tensors |= safetensors.numpy.load_file(path)

  def place(path, x):
    leaf = weights.Leaf(sharding.path_name(path), x.shape)
    parts = [
      np.asarray(tensors[n].T if leaf.is_transposed else tensors[n], np.float32)
      for n in leaf.names
    ]
    whole = np.stack(parts) if leaf.is_stacked else parts[0]
    where = sharding.param_sharding(mesh, leaf.path, leaf.shape)
    return jax.device_put(whole, where)

  return jax.tree_util.tree_map_with_path(place, policy.abstract_params)


def resident_bytes() -> int:
  """Memory of this process, mapped files included."""
  status = pathlib.Path("/proc/self/status").read_text()
  line = next(x for x in status.splitlines() if x.startswith("VmRSS"))
  return int(line.split()[1]) << 10


def run_side(folder: pathlib.Path, side: str) -> dict[str, float]:
  """Loads once and runs one forward pass; seconds and bytes."""
  jax.block_until_ready(jnp.zeros(1))
  before = most = resident_bytes()
  is_over = threading.Event()

  def watch() -> None:
    nonlocal most
    while not is_over.wait(0.005):
      most = max(most, resident_bytes())

  watcher = threading.Thread(target=watch)
  watcher.start()
  start = time.perf_counter()
  params = jax.block_until_ready(load(folder, side))
  loaded = time.perf_counter()
  is_over.set()
  watcher.join()
  policy = model.Policy(families.read(folder))
  jax.block_until_ready(
    jax.jit(policy.hidden)(params, jnp.zeros((1, 16), jnp.int32))
  )
  return {
    "load": loaded - start,
    "forward": time.perf_counter() - loaded,
    "most": most - before,
    "size": sum(x.nbytes for x in jax.tree.leaves(params)),
    "largest": largest_tensor(params),
  }


def largest_tensor(params: model.Params) -> int:
  """Bytes of the largest in float32; layers are tensors of their own."""
  found = 0
  for path, x in jax.tree_util.tree_leaves_with_path(params):
    leaf = weights.Leaf(sharding.path_name(path), x.shape)
    found = max(found, x.nbytes // len(leaf.names))
  return found


def in_a_process(
  folder: pathlib.Path, side: str, n_devices: int
) -> dict[str, float]:
  """`run_side`, in a fresh interpreter."""
  command = [sys.executable, "-m", "benchmarks.load"]
  command += [f"--folder={folder}", f"--side={side}"]
  found = subprocess.run(
    command,
    check=True,
    stdout=subprocess.PIPE,
    text=True,
    env=os.environ | {"JAX_NUM_CPU_DEVICES": str(n_devices)},
  )
  return json.loads(found.stdout.splitlines()[-1])


def measure(
  name: str, folder: pathlib.Path, repeats: int, n_devices: int
) -> Iterator[common.Row]:
  """Both sides in turns."""
  runs = {side: [] for side in SIDES}
  for _ in range(repeats):
    for side in SIDES:
      runs[side].append(in_a_process(folder, side, n_devices))
  median = lambda side, key: statistics.median(r[key] for r in runs[side])
  size, largest = median("ours", "size"), median("ours", "largest")
  row = lambda what, ours, peer, of, unit: common.Row(
    "load", f"{name}, {what}", ours, peer, of, unit
  )
  for key in ("load", "forward"):
    values = median("ours", key), median("all first", key)
    yield row(key, *values, "all first", "s")
  extra = {side: (median(side, "most") - size) / 1e9 for side in SIDES}
  yield row("size in float32", size / 1e9, None, "", "GB")
  yield row(
    "memory beyond it", extra["ours"], extra["all first"], "all first", "GB"
  )
  aim = (largest + size / 10) / 1e9
  yield row("memory beyond it, target", extra["ours"], aim, "at most", "GB")


def main() -> None:
  """Parses flags, measures, prints."""
  parser = common.parser(__doc__.splitlines()[0])
  parser.add_argument(
    "--model", choices=families.PUBLISHED, default="Qwen/Qwen3-0.6B"
  )
  parser.add_argument("--repeats", type=int, default=1)
  parser.add_argument("--devices", type=int, default=1)
  parser.add_argument("--folder", type=pathlib.Path, help="for its own use")
  parser.add_argument("--side", choices=SIDES, help="for its own use")
  args = parser.parse_args()
  if args.side:
    print(json.dumps(run_side(args.folder, args.side)))
    return
  with tempfile.TemporaryDirectory() as scratch:
    folder = pathlib.Path(scratch) / "model"
    write(folder, args.model)
    common.emit(
      list(measure(args.model, folder, args.repeats, args.devices)), args.json
    )


if __name__ == "__main__":
  main()
