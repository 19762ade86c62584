"""Drawing the next token, each rollout by its own random stream."""

import dataclasses

import jax
import jax.numpy as jnp

_NEG_INF = -1e30
_BLOCK = 512  # ids; about the root of a large vocabulary


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
  """How rollouts are drawn."""

  # Devices of this host that sample, each with weights, slots and cache of its
  # own; 0: all accelerators, or one CPU.
  n_devices: int = 0
  n_slots: int = 64  # rollouts that a device decodes at once
  chunk: int = 16  # tokens decoded on the device between two looks at the host
  extend_chunk: int = 32  # tokens of a prompt or tool answer fed in per call
  extend_rows: int = 8  # prompts and tool answers fed in per call
  cache_length: int = 256  # longest rollout: prompt + max_tokens
  # Tokens that the key/value cache holds for all rollouts together, those that
  # wait for a tool included; 0: n_slots x cache_length.
  cache_tokens: int = 0
  page: int = 64  # tokens of a cache page
  share_prompts: bool = True  # prefill a prompt once for all its rollouts
  temperature: float = 1.0  # of the softmax; log-probs are taken at it too
  top_k: int = 0  # keep the k likeliest tokens; 0: all
  top_p: float = 1.0  # keep the likeliest tokens up to this mass; 1: all
  min_p: float = 0.0  # keep tokens at least this share as likely as the top; 0
  max_turns: int = 4  # assistant turns of a rollout
  max_tokens: int = 160  # budget of a rollout after its prompt, tools included
  max_calls: int = 8  # tool calls of a rollout
  call_deadline: float = 300.0  # seconds until a tool call is given up; 0: none
  rollout_deadline: float = 0.0  # seconds until a rollout is given up; 0: none


def rollout_keys(
  seed: int, stream: int, place_B: jax.Array, rollout_B: jax.Array
) -> jax.Array:
  """The key of each rollout: `fold_in` of seed, stream, place and rollout.

  Nothing else enters, so slots, batch mates and tool latency cannot change
  what is drawn.

  Args:
    seed: of the run.
    stream: keeps training, evaluation and collected rollouts apart.
    place_B: int32 [B], place of the problem in the run's order. Not the number
      of its row: a problem that comes twice is drawn anew.
    rollout_B: int32 [B], rollout id.

  Returns:
    uint32 [B, 2] key data.
  """
  key = jax.random.fold_in(jax.random.key(seed), stream)

  def one(place, rollout):
    folded = jax.random.fold_in(jax.random.fold_in(key, place), rollout)
    return jax.random.key_data(folded)

  return jax.vmap(one)(place_B, rollout_B)


def restrict(
  logits_BV: jax.Array, top_k: int, top_p: float, min_p: float = 0.0
) -> jax.Array:
  """Logits with everything outside top-k, top-p and min-p removed, in turn.

  The nucleus (arXiv 1904.09751) is the smallest set of most likely tokens
  whose probability reaches `top_p`; min-p (arXiv 2407.01082) keeps tokens at
  least `min_p` times as likely as the likeliest. That one always stays.
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
  if min_p > 0.0:
    floor_B1 = jnp.max(logits_BV, axis=-1, keepdims=True) + jnp.log(min_p)
    logits_BV = jnp.where(logits_BV < floor_B1, _NEG_INF, logits_BV)
  return logits_BV


def uniforms(key_B2: jax.Array, index_BT: jax.Array) -> jax.Array:
  """One random number for each token, which depends on nothing else.

  Args:
    key_B2: uint32 key data of each row's stream.
    index_BT: positions of tokens in their rollout; folded into the key.

  Returns:
    float32 [B, T] in [0, 1).
  """

  def one(key_data, index):
    key = jax.random.fold_in(jax.random.wrap_key_data(key_data), index)
    return jax.random.uniform(key)

  return jax.vmap(jax.vmap(one, (None, 0)))(key_B2, index_BT)


def sample(
  logits_BV: jax.Array,
  u_B: jax.Array,
  *,
  temperature: float,
  top_k: int = 0,
  top_p: float = 1.0,
  min_p: float = 0.0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Draws one token per row by inverting the distribution function.

  That takes a single random number a token; noise for every id, as the
  Gumbel-max trick has it, costs more than the model's layers on a CPU.

  Args:
    logits_BV: float.
    u_B: a random number in [0, 1) for each row, see `uniforms`.
    temperature: divides the logits; 0 takes the likeliest token.
    top_k: keep this many; 0 keeps all.
    top_p: nucleus mass; 1 keeps all.
    min_p: least share of the likeliest token's probability; 0 keeps all.

  Returns:
    token_B int32, its log-prob under the distribution it was drawn from (at
    temperature 0: under the untempered softmax), and its log-prob under the
    model's own, untempered and unrestricted.
  """
  logits_BV = logits_BV.astype(jnp.float32)
  used_BV = logits_BV
  if temperature > 0:
    used_BV = restrict(logits_BV / temperature, top_k, top_p, min_p)
  top_B1, mass_BV = _mass(used_BV)
  if temperature > 0:
    token_B = invert(mass_BV, u_B)
  else:
    token_B = jnp.argmax(used_BV, axis=-1).astype(jnp.int32)
  logp_B = _logp(used_BV, token_B, top_B1, mass_BV)
  if temperature in (0, 1) and not top_k and top_p >= 1 and min_p <= 0:
    return token_B, logp_B, logp_B
  return token_B, logp_B, _logp(logits_BV, token_B, *_mass(logits_BV))


def invert(mass_BV: jax.Array, u_B: jax.Array) -> jax.Array:
  """The id at which the cumulated mass passes a share `u` of all mass.

  In two steps, blocks of ids and then the ids of one block: a cumulated sum
  over a whole vocabulary is slow, and less exact.

  Args:
    mass_BV: float32, unnormalised and not negative.
    u_B: float32 in [0, 1).

  Returns:
    int32 [B]; never an id without mass, wherever a row has any.
  """
  B, V = mass_BV.shape
  C = min(_BLOCK, V)
  mass_BNC = jnp.pad(mass_BV, ((0, 0), (0, -V % C))).reshape(B, -1, C)
  mass_BN = jnp.sum(mass_BNC, axis=-1)
  u_B, n_B = _cross(mass_BN, u_B * jnp.sum(mass_BN, axis=-1))
  inside_BC = jnp.take_along_axis(mass_BNC, n_B[:, None, None], axis=1)[:, 0]
  _, c_B = _cross(inside_BC, u_B)
  return n_B * C + c_B


def _cross(
  mass_BN: jax.Array, goal_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Where the cumulated mass passes the goal; also what was left to go.

  Cumulated sums are not monotone in floats: each is added up in an order of its
  own, so at an id without mass the sum may rise, fall and pass the goal. So the
  crossing is looked for among ids that have mass.
  """
  sum_BN = jnp.cumsum(mass_BN, axis=-1)
  has_mass_BN = mass_BN > 0
  is_behind_BN = has_mass_BN & (sum_BN > goal_B[:, None])
  # A goal may lie behind the last sum, which again rounds otherwise.
  index_N = jnp.arange(mass_BN.shape[1], dtype=jnp.int32)
  last_B = jnp.max(jnp.where(has_mass_BN, index_N, 0), axis=-1)
  first_B = jnp.argmax(is_behind_BN, axis=-1).astype(jnp.int32)
  n_B = jnp.where(jnp.any(is_behind_BN, axis=-1), first_B, last_B)
  before_BN = jnp.pad(sum_BN, ((0, 0), (1, 0)))[:, :-1]
  before_B = jnp.take_along_axis(before_BN, n_B[:, None], axis=1)[:, 0]
  return goal_B - before_B, n_B


def _mass(logits_BV: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The largest logit of each row, and exp of the logits less it."""
  top_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
  return top_B1, jnp.exp(logits_BV - top_B1)


def _logp(
  logits_BV: jax.Array,
  token_B: jax.Array,
  top_B1: jax.Array,
  mass_BV: jax.Array,
) -> jax.Array:
  """Log-softmax at the tokens."""
  logit_B1 = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)
  return (logit_B1 - top_B1)[:, 0] - jnp.log(jnp.sum(mass_BV, axis=-1))
