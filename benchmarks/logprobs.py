"""Chunked token log-probs against full logits: memory, time, gradients.

Both sides compute a value and its gradients in hidden states and unembedding,
float32, with and without entropy. Memory is the compiler's own account of
temporary buffers at B * T = 16k, where full logits need tens of GB and are only
compiled, not run. Time is taken in turns at a size that both can run
(`--timed`), and for ours alone at the full size too, compared per token.
Targets: memory at most 0.1, time at most 1.3, gradients equal to 1e-5.

  python -m benchmarks.logprobs [--json] [--tokens 16384] [--timed 1024]
"""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from roc.core import logprobs

BENCH = "logprobs"
N_ROWS = 4


def full_logits(hidden_BTD, unembed_DV, target_BT, with_entropy: bool):
  """What one writes first: logits, logsumexp, gather, all of [B, T, V]."""
  logits_BTV = jnp.einsum(
    "btd,dv->btv", hidden_BTD, unembed_DV, preferred_element_type=jnp.float32
  )
  lse_BT1 = jax.nn.logsumexp(logits_BTV, axis=-1, keepdims=True)
  at_BT1 = jnp.take_along_axis(logits_BTV, target_BT[:, :, None], axis=-1)
  logp_BT = (at_BT1 - lse_BT1)[:, :, 0]
  if not with_entropy:
    return logp_BT, None
  logp_BTV = logits_BTV - lse_BT1
  return logp_BT, -jnp.sum(jnp.exp(logp_BTV) * logp_BTV, axis=-1)


def make_step(side: str, with_entropy: bool, chunk: int):
  """Value and gradients of a mixture of log-probs and entropy, jitted."""

  def loss(hidden_BTD, unembed_DV, target_BT):
    if side == "ours":
      logp_BT, entropy_BT = logprobs.token_logprobs(
        hidden_BTD,
        unembed_DV,
        target_BT,
        chunk=chunk,
        with_entropy=with_entropy,
      )
    else:
      logp_BT, entropy_BT = full_logits(
        hidden_BTD, unembed_DV, target_BT, with_entropy
      )
    # Uneven weights, as advantages are: a plain mean would be kinder.
    weight_BT = 1.0 + jnp.sin(target_BT.astype(jnp.float32))
    value = -jnp.mean(weight_BT * logp_BT)
    return value if entropy_BT is None else value - 0.1 * jnp.mean(entropy_BT)

  return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))


def make_inputs(n_tokens: int, width: int, vocab: int):
  """Random hidden states, unembedding and targets."""
  keys = jax.random.split(jax.random.key(0), 3)
  shape = (N_ROWS, n_tokens // N_ROWS)
  return (
    jax.random.normal(keys[0], (*shape, width)),
    jax.random.normal(keys[1], (width, vocab)) / width**0.5,
    jax.random.randint(keys[2], shape, 0, vocab),
  )


def temp_gib(step, n_tokens: int, width: int, vocab: int) -> float:
  """Temporary buffers that the compiled step holds at its peak."""
  spec = jax.eval_shape(lambda: make_inputs(n_tokens, width, vocab))
  analysis = step.lower(*spec).compile().memory_analysis()
  return analysis.temp_size_in_bytes / 2**30


def gradient_gap(steps, n_tokens: int, width: int, vocab: int) -> float:
  """Largest difference of a gradient entry, over the largest entry."""
  inputs = make_inputs(n_tokens, width, vocab)
  gaps = [
    np.max(np.abs(a - b)) / np.max(np.abs(b))
    for a, b in zip(
      *(jax.device_get(steps[s](*inputs)[1]) for s in ("ours", "peer")),
      strict=True,
    )
  ]
  return float(max(gaps))


def measure(args, width: int, with_entropy: bool) -> list[common.Row]:
  """All rows of one width."""
  steps = {s: make_step(s, with_entropy, args.chunk) for s in ("ours", "peer")}
  what = f"D={width}{', entropy' if with_entropy else ''}"
  peer = "full logits"

  def row(case, ours, other, unit, peer_name=peer):
    return common.Row(BENCH, f"{what}: {case}", ours, other, peer_name, unit)

  memory = {
    s: temp_gib(step, args.tokens, width, args.vocab)
    for s, step in steps.items()
  }
  rows = [
    row(
      f"peak temporaries, {args.tokens} tokens",
      memory["ours"],
      memory["peer"],
      "GiB",
    )
  ]
  inputs = make_inputs(args.timed, width, args.vocab)
  timings = common.alternate(
    {
      s: lambda step=step: jax.block_until_ready(step(*inputs))
      for s, step in steps.items()
    },
    repeats=args.repeats,
  )
  ours, other = timings["ours"], timings["peer"]
  rows += [
    row(f"wall, {args.timed} tokens", ours.median_wall, other.median_wall, "s"),
    row(f"cpu, {args.timed} tokens", ours.median_cpu, other.median_cpu, "s"),
  ]
  if args.tokens > args.timed:
    large = make_inputs(args.tokens, width, args.vocab)
    alone = common.alternate(
      {"ours": lambda: jax.block_until_ready(steps["ours"](*large))},
      repeats=max(1, args.repeats // 3),
      warmup=0,
    )["ours"]
    rows.append(
      row(
        f"wall per 1k tokens, {args.tokens} tokens",
        alone.median_wall / args.tokens * 1e3,
        other.median_wall / args.timed * 1e3,
        "s",
        f"{peer}, {args.timed} tokens",
      )
    )
  gap = gradient_gap(steps, 256, width, args.vocab)
  return [*rows, row("gradient difference", gap, 1e-5, "relative", "target")]


def main() -> None:
  """Parses flags, measures, prints."""
  parser = common.parser(__doc__.splitlines()[0])
  parser.add_argument("--tokens", type=int, default=16384)
  parser.add_argument("--timed", type=int, default=1024)
  parser.add_argument("--vocab", type=int, default=151_936)
  parser.add_argument("--widths", type=int, nargs="+", default=[64, 256])
  parser.add_argument("--chunk", type=int, default=512)
  parser.add_argument("--repeats", type=int, default=3)
  args = parser.parse_args()
  rows = []
  for width in args.widths:
    for with_entropy in (False, True):
      rows += measure(args, width, with_entropy)
  common.emit(rows, args.json)


if __name__ == "__main__":
  main()
