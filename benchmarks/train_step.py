"""One GRPO update of a small model beside Tunix's and torch's.

The same numbers everywhere: a Qwen3-like model in float32, rows of 64 prompt
and 192 drawn tokens, the clipped surrogate (0.2, 0.28) with given old
log-probs, AdamW; two threads, compile time left out. Each side runs in a
process of its own, in turns, and sleeps while the others run; memory is the
most resident memory of the process, once whole and once beyond what it had
before the model was built.

  ours    `Learner.update`, rows in microbatches of 4
  tunix   google-tunix 0.1.7, the jitted step of its trainer, all rows at once
  torch   transformers' model and torch.optim.AdamW, eager, all rows at once

Peers need `--peers=PYTHON`, an interpreter that has them (docs/benchmarks.md
says what to install). `--vocab=151936 --rows=16` is the vocabulary of Qwen3.

  python -m benchmarks.train_step [--json] [--peers PYTHON] [--vocab N]
    [--rows N] [--against tunix torch]
"""

import contextlib
import importlib
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from benchmarks import common

ROOT = pathlib.Path(__file__).resolve().parents[1]
SIDES = ("ours", "tunix", "torch")
LAYERS, D, F, HEADS, KV_HEADS, HEAD_DIM = 4, 256, 768, 4, 2, 64
PROMPT, NEW = 64, 192
EPS_LOW, EPS_HIGH, LR = 0.2, 0.28, 1e-6
# The least speed beside each peer and the most memory, as shares.
AIMS = {"tunix": 1.25, "torch": 1.0}
MEMORY_AIM = {512: 0.5, 151_936: 0.2}

_LOGITS = 1 << 25  # of ours at one time

Step = Callable[[], float]


def data(vocab: int, rows: int) -> dict[str, np.ndarray]:
  """Random rows, the same for every side."""
  rng = np.random.default_rng(0)
  return {
    "tokens_BT": rng.integers(3, vocab, (rows, PROMPT + NEW)).astype(np.int32),
    "advantage_B": rng.standard_normal(rows).astype(np.float32),
  }


def ours(vocab: int, rows: int, micro: int) -> Step:
  """The update of this project."""
  import jax

  from roc import config, layout
  from roc.device import learner as learner_lib
  from roc.device import model, optim, sharding
  from roc.device import step as step_lib

  policy = model.Policy(
    model.ModelConfig(
      vocab_size=vocab,
      d_model=D,
      n_layers=LAYERS,
      n_heads=HEADS,
      n_kv_heads=KV_HEADS,
      head_dim=HEAD_DIM,
      d_ff=F,
      rope_theta=1e6,
    )
  )
  settings = config.LossConfig(
    eps_low=EPS_LOW,
    eps_high=EPS_HIGH,
    logprob_chunk=min(1024, _LOGITS // vocab),
  )
  learner = learner_lib.Learner(
    policy,
    optim.make_optimizer(config.TrainConfig(lr=LR, warmup=0)),
    step_lib.grpo_loss(policy, settings, 1.0),
    sharding.make_mesh(1, 1, 1),
    n_microbatches=rows // min(micro, rows),
  )
  given = data(vocab, rows)
  is_new_T = np.arange(PROMPT + NEW) >= PROMPT
  roles_T = np.where(is_new_T, layout.Role.MODEL, layout.Role.PROMPT)
  shape = given["tokens_BT"].shape
  old_BT = np.where(is_new_T, -np.log(vocab), 0.0).astype(np.float32)
  old_BT = np.broadcast_to(old_BT, shape)
  weight_BT = np.broadcast_to(is_new_T / (rows * NEW), shape)
  batch = learner.place(
    {
      **given,
      "roles_BT": np.broadcast_to(roles_T, shape).astype(np.int8),
      "logp_sampler_BT": old_BT,
      "logp_old_BT": old_BT,
      "weight_BT": weight_BT.astype(np.float32),
    }
  )
  state = learner.init(jax.random.key(0))

  def step() -> float:
    nonlocal state
    state, stats = learner.update(state, batch)
    return float(jax.block_until_ready(stats)["grad_norm"][0])

  return step


def tunix(vocab: int, rows: int) -> Step:
  """The jitted step of Tunix's GRPO trainer, as its learner calls it."""
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  jax = importlib.import_module("jax")
  jnp = importlib.import_module("jax.numpy")
  nnx = importlib.import_module("flax.nnx")
  grpo = importlib.import_module("tunix.rl.grpo.grpo_learner")
  devices = np.array(jax.devices()).reshape(-1, 1)
  mesh = jax.sharding.Mesh(devices, ("fsdp", "tp"))
  made = _tunix_cluster(vocab, mesh)
  config = grpo.GRPOConfig(
    num_generations=4, num_iterations=1, beta=0.0, epsilon=EPS_LOW
  )
  grpo.GRPOLearner(made, config, reward_fns=lambda **_: [0.0])
  given = data(vocab, rows)
  example = grpo.TrainExample(
    prompt_ids=jnp.asarray(given["tokens_BT"][:, :PROMPT]),
    prompt_mask=jnp.ones((rows, PROMPT), bool),
    completion_ids=jnp.asarray(given["tokens_BT"][:, PROMPT:]),
    completion_mask=jnp.ones((rows, NEW), bool),
    advantages=jnp.asarray(given["advantage_B"]),
    ref_per_token_logps=None,
    old_per_token_logps=jnp.full((rows, NEW), -np.log(vocab)),
  )
  trainer = made.actor_trainer
  run, _ = trainer.jit_train_and_eval_step(False, True)

  def step() -> float:
    with mesh:
      loss, _, norm = run(example)
      jax.block_until_ready((loss, norm))
      jax.block_until_ready(jax.tree.leaves(nnx.state(trainer.model)))
    return float(norm)

  return step


def _tunix_cluster(vocab: int, mesh: Any) -> Any:
  """Tunix's own holder of a model and its trainer."""
  jnp = importlib.import_module("jax.numpy")
  nnx = importlib.import_module("flax.nnx")
  optax = importlib.import_module("optax")
  qwen3 = importlib.import_module("tunix.models.qwen3.model")
  cluster = importlib.import_module("tunix.rl.rl_cluster")
  base = importlib.import_module("tunix.rl.rollout.base_rollout")
  words = importlib.import_module("benchmarks.rollout_peers").Words()
  shape = qwen3.ModelConfig(
    num_layers=LAYERS,
    vocab_size=vocab,
    embed_dim=D,
    hidden_dim=F,
    num_heads=HEADS,
    head_dim=HEAD_DIM,
    num_kv_heads=KV_HEADS,
    rope_theta=1_000_000,
    norm_eps=1e-6,
    use_tied_embedding=True,
    dtype=jnp.float32,
    param_dtype=jnp.float32,
  )
  roles = (cluster.Role.ACTOR, cluster.Role.REFERENCE, cluster.Role.ROLLOUT)
  settings = cluster.ClusterConfig(
    role_to_mesh=dict.fromkeys(roles, mesh),
    rollout_engine="vanilla",
    offload_to_cpu=False,
    training_config=cluster.RLTrainingConfig(
      actor_optimizer=optax.adamw(LR),
      eval_every_n_steps=10**9,
      max_steps=10**6,
    ),
    rollout_config=base.RolloutConfig(
      max_tokens_to_generate=NEW,
      max_prompt_length=PROMPT,
      kv_cache_size=PROMPT + NEW,
      eos_tokens=[vocab + 7],
    ),
  )
  return cluster.RLCluster(
    actor=qwen3.Qwen3(shape, rngs=nnx.Rngs(0)),
    reference=None,
    tokenizer=words,
    cluster_config=settings,
  )


def torch(vocab: int, rows: int) -> Step:
  """transformers' Qwen3 and torch's AdamW, eager."""
  lib = importlib.import_module("torch")
  transformers = importlib.import_module("transformers")
  lib.set_num_threads(2)
  model = transformers.Qwen3ForCausalLM(
    transformers.Qwen3Config(
      vocab_size=vocab,
      hidden_size=D,
      intermediate_size=F,
      num_hidden_layers=LAYERS,
      num_attention_heads=HEADS,
      num_key_value_heads=KV_HEADS,
      head_dim=HEAD_DIM,
      tie_word_embeddings=True,
    )
  ).train()
  optimizer = lib.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
  given = data(vocab, rows)
  tokens = lib.from_numpy(given["tokens_BT"]).long()
  advantage = lib.from_numpy(given["advantage_B"])[:, None]

  def step() -> float:
    optimizer.zero_grad(set_to_none=True)
    logits = model(input_ids=tokens).logits[:, PROMPT - 1 : -1]
    logp = lib.log_softmax(logits.float(), -1)
    logp = logp.gather(-1, tokens[:, PROMPT:, None])[..., 0]
    ratio = lib.exp(logp + float(np.log(vocab)))
    clipped = ratio.clamp(1 - EPS_LOW, 1 + EPS_HIGH)
    loss = -lib.minimum(ratio * advantage, clipped * advantage).mean()
    loss.backward()
    norm = lib.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return float(norm)

  return step


PEERS = {
  "tunix": (tunix, ("tunix.rl.grpo.grpo_learner",)),
  "torch": (torch, ("torch", "transformers")),
}


# ------------------------------------------------------------------- processes


def resident() -> float:
  """The most resident memory of this process so far, GB."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def serve(side: str, vocab: int, rows: int, micro: int) -> None:
  """Steps once for every line that comes in; says what it took."""
  if side == "ours":
    importlib.import_module("roc.train")
    before = resident()
    step = ours(vocab, rows, micro)
  else:
    build, packages = PEERS[side]
    for name in packages:
      importlib.import_module(name)
    before = resident()
    step = build(vocab, rows)
  for _ in sys.stdin:
    wall, cpu = time.perf_counter(), time.process_time()
    norm = step()
    took = {
      "wall": time.perf_counter() - wall,
      "cpu": time.process_time() - cpu,
      "norm": norm,
      "peak": resident(),
      "beyond": resident() - before,
    }
    print(json.dumps(took), flush=True)


class Side:
  """One side in a process of its own."""

  def __init__(self, python: str, side: str, flags: list[str]):
    self.took: list[dict[str, float]] = []
    command = [python, "-m", "benchmarks.train_step", f"--side={side}", *flags]
    self._process = subprocess.Popen(
      command,
      cwd=ROOT,
      env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"},
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      text=True,
    )

  def __enter__(self) -> "Side":
    return self

  def __exit__(self, *_: Any) -> None:
    self._process.kill()
    self._process.communicate()

  def step(self) -> None:
    """Runs one step and remembers what it took."""
    assert self._process.stdin is not None and self._process.stdout is not None
    self._process.stdin.write("\n")
    self._process.stdin.flush()
    while line := self._process.stdout.readline():
      if line.startswith("{"):
        self.took.append(json.loads(line))
        return
    raise SystemExit(f"{self._process.args}: ended without an answer")

  def median(self, name: str) -> float:
    """Of the steps after the first, which compiles."""
    return statistics.median(took[name] for took in self.took[1:])


def measure(args: Any) -> Iterator[common.Row]:
  """All sides in turns."""
  sizes = {"vocab": args.vocab, "rows": args.rows, "micro": args.micro}
  flags = [f"--{name}={size}" for name, size in sizes.items()]
  case = f"{args.rows} x {PROMPT + NEW}, vocabulary {args.vocab}"
  names = ["ours", *(args.against if args.peers else ())]
  with contextlib.ExitStack() as stack:
    sides = {
      name: stack.enter_context(
        Side(sys.executable if name == "ours" else args.peers, name, flags)
      )
      for name in names
    }
    for _ in range(args.repeats + 1):
      for side in sides.values():
        side.step()
  own = sides.pop("ours")
  n = args.rows * (PROMPT + NEW)
  row = lambda what, mine, peer, name, unit: common.Row(
    "train_step", f"{case}: {what}", mine, peer, name, unit
  )
  share = MEMORY_AIM.get(args.vocab, 1.0)
  for name, side in sides.items() or [("", None)]:
    of = lambda key, side=side: side.median(key) if side else None
    yield row("wall", own.median("wall"), of("wall"), name, "s")
    yield row("processor", own.median("cpu"), of("cpu"), name, "s")
    yield row("most memory", own.median("peak"), of("peak"), name, "GB")
    yield row("beyond imports", own.median("beyond"), of("beyond"), name, "GB")
    theirs = n / side.median("wall") if side else None
    yield row("tokens/s", n / own.median("wall"), theirs, name, "1/s")
    if side:
      pairs = zip(own.took[1:], side.took[1:], strict=True)
      speed = statistics.median(b["wall"] / a["wall"] for a, b in pairs)
      yield row(f"speed by {name}'s", speed, AIMS[name], "at least", "x")
      memory = own.median("peak") / side.median("peak")
      yield row(f"memory by {name}'s", memory, share, "at most", "x")


def main() -> None:
  """Parses flags, measures, prints."""
  parser = common.parser(__doc__.splitlines()[0])
  parser.add_argument("--peers", help="interpreter that has the peers")
  parser.add_argument(
    "--against", nargs="+", choices=SIDES[1:], default=SIDES[1:]
  )
  parser.add_argument("--vocab", type=int, default=512)
  parser.add_argument("--rows", type=int, default=64)
  parser.add_argument("--micro", type=int, default=4, help="of ours")
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--side", choices=SIDES, help="for its own use")
  args = parser.parse_args()
  if args.side:
    serve(args.side, args.vocab, args.rows, args.micro)
    return
  common.emit(list(measure(args)), args.json)


if __name__ == "__main__":
  main()
