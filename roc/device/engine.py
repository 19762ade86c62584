"""The rollout engine: S slots, one KV cache, tokens drawn on the device.

Four verbs, which the agent loop drives: `submit` puts rollouts into free
slots, `decode` draws up to a chunk of tokens for every running slot in one
device-side loop, `extend` appends a tool's answer behind what a slot already
holds (nothing is ever prefilled twice), `release` frees it. Each slot keeps
one token *pending*: known, but not yet in the cache. Sampling never looks at
other slots, so the schedule does not change what is drawn.

All shapes are fixed by the config: two programs are compiled, whatever the
prompts, tools and lengths are.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from roc.device import model as model_lib
from roc.device import sampling


@dataclasses.dataclass(frozen=True)
class SlotState:
  """What the device knows of each slot."""

  cache: model_lib.Cache
  length_S: jax.Array  # int32: tokens in the cache
  pending_S: jax.Array  # int32: next input token
  budget_S: jax.Array  # int32: tokens it may still draw
  key_S2: jax.Array  # uint32: the rollout's random stream
  is_running_S: jax.Array  # bool: decode draws for it


jax.tree_util.register_dataclass(
  SlotState,
  data_fields=[f.name for f in dataclasses.fields(SlotState)],
  meta_fields=[],
)


@dataclasses.dataclass(frozen=True)
class Request:
  """One rollout to start.

  Attributes:
    prompt: token ids.
    key: uint32 [2], see `sampling.rollout_keys`.
    budget: tokens it may hold beyond the prompt, tool tokens included.
  """

  prompt: Sequence[int]
  key: np.ndarray
  budget: int


@dataclasses.dataclass(frozen=True)
class Drawn:
  """What one decode chunk gave one slot.

  Attributes:
    tokens: ids in order, a stop id last if one was drawn.
    logps: log-probs of the sampling distribution, one a token.
    is_stopped: a stop id was drawn or the budget is spent; the slot waits for
      `extend` or `release`.
  """

  tokens: list[int]
  logps: list[float]
  is_stopped: bool


class Engine:
  """Batched sampler over a fixed number of slots."""

  def __init__(
    self,
    policy: model_lib.Policy,
    config: sampling.SamplingConfig,
    stop_ids: Sequence[int],
  ):
    self.policy = policy
    self.config = config
    self.prefilled_tokens = 0  # fed by submit and extend, over its life
    self._stop_ids = tuple(stop_ids)
    self._params: model_lib.Params | None = None
    self._free = list(range(config.n_slots))[::-1]
    self._append = jax.jit(self._append_fn, donate_argnums=1)
    self._decode = jax.jit(self._decode_fn, donate_argnums=1)
    # Committed, like the weights, and so is all that the host writes into it:
    # jit compiles once more for every other placement of its arguments.
    self._device = jax.local_devices()[0]
    self._state = jax.device_put(self._empty_state(), self._device)

  @property
  def n_free(self) -> int:
    """Slots that can take a request."""
    return len(self._free)

  def set_params(self, params: model_lib.Params) -> None:
    """Weights for all that follows, brought to the engine's device.

    Raises:
      RuntimeError: a slot is in use; its cache belongs to the weights that
        filled it.
    """
    if len(self._free) != self.config.n_slots:
      raise RuntimeError("set_params while rollouts are in flight")
    self._params = jax.device_put(params, self._device)

  def submit(self, requests: Sequence[Request]) -> list[int]:
    """Starts rollouts; returns the slot of each.

    Raises:
      RuntimeError: no parameters yet.
      ValueError: more requests than free slots, an empty prompt, or a prompt
        and budget that exceed the cache.
    """
    if self._params is None:
      raise RuntimeError("set_params comes before submit")
    if len(requests) > len(self._free):
      raise ValueError(f"{len(requests)} requests for {len(self._free)} slots")
    for r in requests:
      if not r.prompt:
        raise ValueError("a prompt holds at least one token")
      if len(r.prompt) + r.budget > self.config.cache_length:
        raise ValueError(
          f"prompt of {len(r.prompt)} tokens plus budget {r.budget} exceeds "
          f"sampling.cache_length={self.config.cache_length}"
        )
    slots = [self._free.pop() for _ in requests]
    length_S, budget_S, key_S2 = self._host_copy()
    for slot, r in zip(slots, requests, strict=True):
      length_S[slot] = 0
      budget_S[slot] = r.budget
      key_S2[slot] = r.key
    self._write(length_S=length_S, budget_S=budget_S, key_S2=key_S2)
    self._feed(
      {s: list(r.prompt) for s, r in zip(slots, requests, strict=True)}
    )
    return slots

  def extend(self, observations: Mapping[int, Sequence[int]]) -> None:
    """Appends ids behind what each slot holds and lets it run again.

    The ids count against the slot's budget; the caller checks that they fit
    (`budget_left`).
    """
    pending_S = np.asarray(self._state.pending_S)
    budget_S = np.array(self._state.budget_S)
    feed = {}
    for slot, ids in observations.items():
      if len(ids) > budget_S[slot]:
        raise ValueError(
          f"{len(ids)} tokens exceed slot {slot}'s budget {budget_S[slot]}"
        )
      budget_S[slot] -= len(ids)
      feed[slot] = [int(pending_S[slot]), *ids]
    self._write(budget_S=budget_S)
    self._feed(feed)

  def decode(self) -> dict[int, Drawn]:
    """Draws up to `chunk` tokens for every running slot.

    Returns:
      a `Drawn` for each slot that drew something.
    """
    if self._params is None:
      raise RuntimeError("set_params comes before decode")
    self._state, out = self._decode(self._params, self._state)
    token_SK, logp_SK, n_S, is_running_S = jax.device_get(out)
    return {
      int(s): Drawn(
        token_SK[s, : n_S[s]].tolist(),
        logp_SK[s, : n_S[s]].tolist(),
        not is_running_S[s],
      )
      for s in np.flatnonzero(n_S)
    }

  def budget_left(self, slot: int) -> int:
    """Tokens that the slot may still hold."""
    return int(self._state.budget_S[slot])

  def release(self, slots: Sequence[int]) -> None:
    """Frees slots, running or not."""
    is_running_S = np.array(self._state.is_running_S)
    is_running_S[list(slots)] = False
    self._write(is_running_S=is_running_S)
    self._free.extend(slots)

  # -- inside ---------------------------------------------------------------

  def _empty_state(self) -> SlotState:
    c = self.config
    zeros_S = jnp.zeros(c.n_slots, jnp.int32)
    # `append` writes whole chunks, so the last one needs room behind it.
    spare = max(c.extend_chunk, 1)
    return SlotState(
      cache=self.policy.empty_cache(c.n_slots, c.cache_length + spare),
      length_S=zeros_S,
      pending_S=zeros_S,
      budget_S=zeros_S,
      key_S2=jnp.zeros((c.n_slots, 2), jnp.uint32),
      is_running_S=jnp.zeros(c.n_slots, bool),
    )

  def _write(self, **fields: np.ndarray) -> None:
    """Replaces fields of the state from the host."""
    self._state = dataclasses.replace(
      self._state, **jax.device_put(fields, self._device)
    )

  def _host_copy(self) -> tuple[np.ndarray, ...]:
    s = self._state
    return tuple(np.array(x) for x in (s.length_S, s.budget_S, s.key_S2))

  def _feed(self, ids_by_slot: dict[int, list[int]]) -> None:
    """Caches all but the last id of each slot; the last becomes pending."""
    P, R = self.config.extend_chunk, self.config.extend_rows
    longest = max((len(ids) for ids in ids_by_slot.values()), default=0) - 1
    for start in range(0, longest, P):
      parts = [
        (slot, ids[start : min(start + P, len(ids) - 1)])
        for slot, ids in ids_by_slot.items()
        if start < len(ids) - 1
      ]
      for first in range(0, len(parts), R):
        self._feed_rows(parts[first : first + R])
    pending_S = np.array(self._state.pending_S)
    is_running_S = np.array(self._state.is_running_S)
    budget_S = np.asarray(self._state.budget_S)
    for slot, ids in ids_by_slot.items():
      pending_S[slot] = ids[-1]
      is_running_S[slot] = budget_S[slot] > 0
    self._write(pending_S=pending_S, is_running_S=is_running_S)

  def _feed_rows(self, parts: Sequence[tuple[int, list[int]]]) -> None:
    """Caches a piece of at most R slots, in the one shape that is compiled."""
    P, R = self.config.extend_chunk, self.config.extend_rows
    slot_R = np.full(R, self.config.n_slots, np.int32)  # rows without a slot
    tokens_RP = np.zeros((R, P), np.int32)
    n_R = np.zeros(R, np.int32)
    for row, (slot, part) in enumerate(parts):
      slot_R[row], n_R[row] = slot, len(part)
      tokens_RP[row, : len(part)] = part
    self.prefilled_tokens += int(n_R.sum())
    self._state = self._append(
      self._params, self._state, slot_R, tokens_RP, n_R
    )

  def _append_fn(
    self, params, state: SlotState, slot_R, tokens_RP, n_R
  ) -> SlotState:
    # A row without a slot reads any slot and is dropped on writing.
    take = functools.partial(jnp.take, mode="clip")
    rows = jax.tree.map(lambda x: take(x, slot_R, axis=1), state.cache)
    _, rows = self.policy.append(
      params, rows, tokens_RP, take(state.length_S, slot_R)
    )
    cache = jax.tree.map(
      lambda x, row: x.at[:, slot_R].set(row, mode="drop"), state.cache, rows
    )
    length_S = state.length_S.at[slot_R].add(n_R, mode="drop")
    return dataclasses.replace(state, cache=cache, length_S=length_S)

  def _decode_fn(self, params, state: SlotState):
    c = self.config
    S, K = c.n_slots, c.chunk
    unembed_DV = self.policy.unembedding(params)
    stop_ids = jnp.array(self._stop_ids, jnp.int32)
    draw = functools.partial(
      sampling.sample,
      temperature=c.temperature,
      top_k=c.top_k,
      top_p=c.top_p,
    )

    def any_running(carry):
      t, state, *_ = carry
      return (t < K) & jnp.any(state.is_running_S)

    def one_token(carry):
      t, state, token_SK, logp_SK, n_S = carry
      hidden_S1D, cache = self.policy.append(
        params, state.cache, state.pending_S[:, None], state.length_S
      )
      logits_SV = hidden_S1D[:, 0] @ unembed_DV
      # Position in the rollout: what is cached, plus the pending token.
      token_S, logp_S = draw(logits_SV, state.key_S2, state.length_S + 1)
      live_S = state.is_running_S
      step_S = live_S.astype(jnp.int32)
      budget_S = state.budget_S - step_S
      is_stop_S = jnp.any(token_S[:, None] == stop_ids[None], axis=-1)
      state = dataclasses.replace(
        state,
        cache=cache,
        length_S=state.length_S + step_S,
        pending_S=jnp.where(live_S, token_S, state.pending_S),
        budget_S=budget_S,
        is_running_S=live_S & ~is_stop_S & (budget_S > 0),
      )
      token_SK = token_SK.at[:, t].set(jnp.where(live_S, token_S, 0))
      logp_SK = logp_SK.at[:, t].set(jnp.where(live_S, logp_S, 0.0))
      return t + 1, state, token_SK, logp_SK, n_S + step_S

    carry = (
      jnp.int32(0),
      state,
      jnp.zeros((S, K), jnp.int32),
      jnp.zeros((S, K), jnp.float32),
      jnp.zeros(S, jnp.int32),
    )
    _, state, token_SK, logp_SK, n_S = jax.lax.while_loop(
      any_running, one_token, carry
    )
    return state, (token_SK, logp_SK, n_S, state.is_running_S)
