"""The programs that the engine runs: feed tokens, draw tokens, copy pages.

All shapes come from the config: one program of each kind is compiled, whatever
prompts, tools and lengths are. Each works in one shape only, because XLA's CPU
backend rounds differently for another number of rows, and what is drawn would
depend on how many happened to be fed together.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from roc.core import logprobs, products
from roc.device import model as model_lib
from roc.device import paged, sampling


@dataclasses.dataclass(frozen=True)
class Rows:
  """Rollouts that a chunk is drawn for, one a slot: numpy from the host."""

  table_SJ: Any  # int32: cache pages
  length_S: Any  # int32: tokens in the cache
  pending_S: Any  # int32: next input token, not in the cache yet
  budget_S: Any  # int32: tokens it may still draw; 0: an idle slot
  key_S2: Any  # uint32: its random stream


@dataclasses.dataclass(frozen=True)
class Chunk:
  """What a chunk drew."""

  token_ST: jax.Array  # int32
  logp_ST: jax.Array  # of the sampling distribution
  raw_logp_ST: jax.Array  # of the model's own distribution
  n_S: jax.Array  # int32: how many of them
  is_stopped_S: jax.Array  # bool: by a stop id, the budget or broken logits
  is_broken_S: jax.Array  # bool: its logits were not finite
  n_steps: jax.Array  # int32 []


for _cls in (Rows, Chunk):
  jax.tree_util.register_dataclass(
    _cls,
    data_fields=[f.name for f in dataclasses.fields(_cls)],
    meta_fields=[],
  )


class Programs:
  """The jitted programs of one policy and sampling config."""

  def __init__(
    self,
    policy: model_lib.Policy,
    config: sampling.SamplingConfig,
    stop_ids: Sequence[int],
  ):
    self._policy = policy
    self._config = config
    self._stop_ids = tuple(stop_ids)
    self._sample = functools.partial(
      sampling.sample,
      temperature=config.temperature,
      top_k=config.top_k,
      top_p=config.top_p,
      min_p=config.min_p,
    )
    self.feed = jax.jit(self._feed_fn, donate_argnums=1)
    self.draw = jax.jit(self._draw_fn, donate_argnums=1)
    # Functions of their own: jit shares its cache between wrappers of one.
    copy = lambda *args: paged.copy_pages(*args)
    clear = lambda *args: paged.clear_pages(*args)
    self.copy = jax.jit(copy, donate_argnums=0)
    self.clear = jax.jit(clear, donate_argnums=0)

  @property
  def n_compiled(self) -> int:
    """Programs compiled so far."""
    jitted = (self.feed, self.draw, self.copy, self.clear)
    return sum(f._cache_size() for f in jitted)  # pyrefly: ignore

  def _feed_fn(self, params, pool, table_RJ, start_R, n_R, tokens_RT):
    """Caches tokens; also returns a number that is there when they are."""
    place = paged.place(
      table_RJ,
      start_R,
      n_R,
      length=tokens_RT.shape[1],
      page=self._config.page,
    )
    _, pool = self._policy.append(params, pool, tokens_RT, place)
    return pool, jnp.sum(n_R)

  def _draw_fn(self, params, pool, rows: Rows, most_idle):
    """Draws up to `chunk` tokens a row, all in one loop on the device.

    It ends early once no row is left, or `most_idle` rows have stopped.
    """
    c = self._config
    T = c.chunk
    unembed_DV = self._policy.unembedding(params)
    stop_ids = jnp.array(self._stop_ids, jnp.int32)
    n_start = jnp.sum(rows.budget_S > 0)
    # Position in the rollout: what is cached, plus the pending token. A row
    # that draws at step t has drawn at every step before.
    index_ST = rows.length_S[:, None] + 1 + jnp.arange(T)[None]
    u_ST = sampling.uniforms(rows.key_S2, index_ST)

    def goes_on(carry):
      _, chunk, _, is_live_S = carry
      n_live = jnp.sum(is_live_S)
      is_worth_it = n_start - n_live < most_idle
      return (chunk.n_steps < T) & (n_live > 0) & is_worth_it

    def one_token(carry):
      pool, chunk, pending_S, is_live_S = carry
      t = chunk.n_steps
      length_S = rows.length_S + chunk.n_S
      place = paged.place(
        rows.table_SJ,
        length_S,
        is_live_S.astype(jnp.int32),
        length=1,
        page=c.page,
      )
      hidden_S1D, pool = self._policy.append(
        params, pool, pending_S[:, None], place
      )
      logits_SV = products.product(
        "sd,dv->sv", self._policy.dtype, hidden_S1D[:, 0], unembed_DV
      )
      logits_SV = logprobs.mask_ids(logits_SV, self._policy.n_ids)
      u_S = jax.lax.dynamic_index_in_dim(u_ST, t, 1, keepdims=False)
      token_S, *logps = self._sample(logits_SV, u_S)
      # One that is not finite makes the normaliser, so every log-prob, so too.
      is_broken_S = is_live_S & ~jnp.isfinite(logps[1])
      is_drawn_S = is_live_S & ~is_broken_S
      is_stop_S = jnp.any(token_S[:, None] == stop_ids[None], axis=-1)
      n_S = chunk.n_S + is_drawn_S
      is_over_S = is_stop_S | (n_S >= rows.budget_S) | is_broken_S
      put = lambda x_ST, x_S: x_ST.at[:, t].set(jnp.where(is_drawn_S, x_S, 0))
      chunk = Chunk(
        put(chunk.token_ST, token_S),
        put(chunk.logp_ST, logps[0]),
        put(chunk.raw_logp_ST, logps[1]),
        n_S,
        chunk.is_stopped_S | (is_live_S & is_over_S),
        chunk.is_broken_S | is_broken_S,
        t + 1,
      )
      pending_S = jnp.where(is_drawn_S, token_S, pending_S)
      return pool, chunk, pending_S, is_live_S & ~is_over_S

    carry = (
      pool,
      _empty_chunk(c.n_slots, T),
      rows.pending_S,
      rows.budget_S > 0,
    )
    pool, chunk, _, _ = jax.lax.while_loop(goes_on, one_token, carry)
    return pool, chunk


def _empty_chunk(S: int, T: int) -> Chunk:
  no_S = jnp.zeros(S, bool)
  zeros_ST = jnp.zeros((S, T), jnp.float32)
  return Chunk(
    jnp.zeros((S, T), jnp.int32),
    zeros_ST,
    zeros_ST,
    jnp.zeros(S, jnp.int32),
    no_S,
    no_S,
    jnp.int32(0),
  )
