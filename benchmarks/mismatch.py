"""How far the engine's log-probs are from the trainer's, in either dtype.

The engine draws tokens through its pages; the train step scores the same tokens
as whole rows, with the same weights. What is left between the two is rounding:
`mismatch_kl`, the mean of ratio - 1 - log ratio over the drawn tokens, as
training logs it at every step. Weights are random; as in a trained model,
logits differ by some nats, and what layers add outweighs the embedding.

  python -m benchmarks.mismatch [--json] [--shapes quickstart 4x256 12x512]
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from roc.core import corrections, metrics
from roc.device import engine as engine_lib
from roc.device import families, model, network, sampling
from roc.device import step as step_lib

DTYPES = ("float32", "bfloat16")
SHAPES = {
  "quickstart": model.ModelConfig(vocab_size=337),
  "4x256": model.ModelConfig(
    vocab_size=512, d_model=256, head_dim=64, d_ff=768, rope_theta=1e6
  ),
  "12x512": model.ModelConfig(
    vocab_size=2048,
    d_model=512,
    n_layers=12,
    n_heads=8,
    n_kv_heads=4,
    head_dim=64,
    d_ff=1536,
    rope_theta=1e6,
  ),
  # For an accelerator.
  "qwen3-0.6b": families.PUBLISHED["Qwen/Qwen3-0.6B"],
}
ON_A_CPU = ("quickstart", "4x256", "12x512")
N_ROWS, N_PROMPT, N_DRAWN = 32, 40, 88
LOGIT_DEVIATION = 3.0  # nats


def draw(
  policy: model.Policy, params: model.Params
) -> tuple[np.ndarray, np.ndarray]:
  """Tokens and the engine's log-probs of them, 0 over the prompts."""
  T = N_PROMPT + N_DRAWN
  settings = sampling.SamplingConfig(
    n_slots=N_ROWS, cache_length=T, page=32, max_tokens=N_DRAWN
  )
  sampler = engine_lib.Engine(policy, settings, [policy.config.vocab_size])
  sampler.set_params(params)
  rng = np.random.default_rng(0)
  tokens_BT = rng.integers(0, policy.config.vocab_size, (N_ROWS, T), np.int32)
  key_B2 = rng.integers(0, 2**32, (N_ROWS, 2), dtype=np.uint32)
  logp_BT = np.zeros((N_ROWS, T), np.float32)
  handles = sampler.submit(
    [
      engine_lib.Request(row[:N_PROMPT].tolist(), key, N_DRAWN)
      for row, key in zip(tokens_BT, key_B2, strict=True)
    ]
  )
  n_B = dict.fromkeys(handles, N_PROMPT)
  while drawn := sampler.decode():
    for handle, chunk in drawn.items():
      row, start = handles.index(handle), n_B[handle]
      n_B[handle] = end = start + len(chunk.tokens)
      tokens_BT[row, start:end] = chunk.tokens
      logp_BT[row, start:end] = chunk.logps
      if chunk.is_stopped:
        sampler.release([handle])
  return tokens_BT, logp_BT


def weights(policy: model.Policy) -> model.Params:
  """Random ones; see the module's head."""
  c = policy.config
  params = jax.jit(policy.init)(jax.random.key(0))
  deviation = LOGIT_DEVIATION / np.sqrt(c.d_model)
  params["embed"]["embedding"] *= deviation / 0.02
  for name in ("o_proj", "down_proj"):
    params["layers"][name]["kernel"] *= np.sqrt(2 * c.n_layers)
  return params


def measure(config: model.ModelConfig) -> dict[str, float]:
  """`mismatch_kl`, and the largest difference of a log-prob, in nats."""
  policy = model.Policy(config)
  params = weights(policy)
  tokens_BT, logp_BT = draw(policy, params)
  scored_BT, _ = jax.jit(
    lambda params, tokens_BT: step_lib.score(
      policy, params, {"tokens_BT": tokens_BT}, chunk=1024, temperature=1.0
    )
  )(params, tokens_BT)
  is_drawn_BT = jnp.arange(tokens_BT.shape[1])[None] >= N_PROMPT
  is_drawn_BT = jnp.broadcast_to(is_drawn_BT, tokens_BT.shape)
  kl = corrections.mismatch_kl(scored_BT, jnp.asarray(logp_BT), is_drawn_BT)
  difference_BT = np.abs(np.asarray(scored_BT) - logp_BT)
  return {
    "mismatch_kl": metrics.finalize({"kl": kl})["kl"],
    "largest difference": float(difference_BT[:, N_PROMPT:].max()),
  }


def rows(names: list[str], dtypes: list[network.Dtype]) -> Iterator[common.Row]:
  """Every shape in every dtype."""
  for name in names:
    for dtype in dtypes:
      config = dataclasses.replace(SHAPES[name], dtype=dtype)
      for what, value in measure(config).items():
        case = f"{name}, {dtype}, {what}"
        yield common.Row("mismatch", case, value, None, "", "nats")


def main() -> None:
  """Parses flags, measures, prints."""
  parser = common.parser(__doc__.splitlines()[0])
  parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=ON_A_CPU)
  parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=[*DTYPES])
  args = parser.parse_args()
  common.emit(rows(args.shapes, args.dtypes), args.json)


if __name__ == "__main__":
  main()
