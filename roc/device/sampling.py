"""Drawing the next token, each rollout by its own random stream."""

import dataclasses

import jax
import jax.numpy as jnp

_NEG_INF = -1e30


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
  """How rollouts are drawn."""

  n_slots: int = 64  # rollouts that are decoded at once
  chunk: int = 16  # tokens decoded on the device between two looks at the host
  extend_chunk: int = 32  # tokens of a tool's answer fed in per call
  extend_rows: int = 16  # slots fed in per call
  cache_length: int = 256  # key/value cache of a slot: prompt + max_tokens
  temperature: float = 1.0  # of the softmax; log-probs are taken at it too
  top_k: int = 0  # keep the k likeliest tokens; 0: all
  top_p: float = 1.0  # keep the likeliest tokens up to this mass; 1: all
  max_turns: int = 4  # assistant turns of a rollout
  max_tokens: int = 160  # budget of a rollout after its prompt, tools included
  max_calls: int = 8  # tool calls of a rollout


def rollout_keys(
  seed: int, step: int, task_B: jax.Array, rollout_B: jax.Array
) -> jax.Array:
  """The stream of each rollout: `fold_in` of seed, step, task and rollout.

  Nothing else enters, so slots, batch mates and tool latency cannot change
  what is drawn.

  Returns:
    uint32 [B, 2] key data.
  """
  key = jax.random.fold_in(jax.random.key(seed), step)

  def one(task, rollout):
    folded = jax.random.fold_in(jax.random.fold_in(key, task), rollout)
    return jax.random.key_data(folded)

  return jax.vmap(one)(task_B, rollout_B)


def restrict(logits_BV: jax.Array, top_k: int, top_p: float) -> jax.Array:
  """Logits with everything outside top-k and the top-p nucleus removed.

  The nucleus (arXiv 1904.09751) is the smallest set of most likely tokens
  whose probability reaches `top_p`; the likeliest token always stays.
  """
  if top_k:
    kth_B1 = jax.lax.top_k(logits_BV, top_k)[0][:, -1:]
    logits_BV = jnp.where(logits_BV < kth_B1, _NEG_INF, logits_BV)
  if top_p < 1.0:
    sorted_BV = jnp.sort(logits_BV, axis=-1)[:, ::-1]
    p_BV = jax.nn.softmax(sorted_BV, axis=-1)
    is_in_BV = jnp.cumsum(p_BV, axis=-1) - p_BV < top_p
    floor_B1 = jnp.min(
      jnp.where(is_in_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True
    )
    logits_BV = jnp.where(logits_BV < floor_B1, _NEG_INF, logits_BV)
  return logits_BV


def sample(
  logits_BV: jax.Array,
  key_B2: jax.Array,
  index_B: jax.Array,
  *,
  temperature: float,
  top_k: int = 0,
  top_p: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
  """Draws one token per row by the Gumbel-max trick.

  Args:
    logits_BV: float.
    key_B2: uint32 key data of each row's stream.
    index_B: position of the token in its rollout; folded into the key.
    temperature: divides the logits; 0 takes the likeliest token.
    top_k: keep this many; 0 keeps all.
    top_p: nucleus mass; 1 keeps all.

  Returns:
    token_B int32, and its log-prob under the distribution it was drawn from
    (at temperature 0: under the untempered softmax).
  """
  logits_BV = logits_BV.astype(jnp.float32)
  if temperature > 0:
    logits_BV = restrict(logits_BV / temperature, top_k, top_p)

    def gumbel(key_data, index):
      key = jax.random.fold_in(jax.random.wrap_key_data(key_data), index)
      return jax.random.gumbel(key, (logits_BV.shape[-1],))

    noisy_BV = logits_BV + jax.vmap(gumbel)(key_B2, index_B)
  else:
    noisy_BV = logits_BV
  token_B = jnp.argmax(noisy_BV, axis=-1).astype(jnp.int32)
  logp_BV = jax.nn.log_softmax(logits_BV, axis=-1)
  logp_B = jnp.take_along_axis(logp_BV, token_B[:, None], axis=-1)[:, 0]
  return token_B, logp_B
