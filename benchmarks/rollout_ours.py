"""Our side of `benchmarks.rollout`: the engine, and a loop that bounds it.

A bare loop does the products of a decode step, in the shapes and in the scan
over layers that the engine has them, and reads the cache. It has no norm, no
rotation, no softmax, no sampling, no cache writes and no host; how the cache is
read is the difference between the bounds:
  pages     gathered by the table, page by page, with both batched products
  sum       keys and values of each row lie side by side and are added up once
  nothing   products with weights only
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import rollout_work
from roc.device import engine as engine_lib
from roc.device import model as model_lib
from roc.device import network, paged, sampling

SLOTS = 32


def policy(
  s: rollout_work.Shape = rollout_work.SHAPE, dtype: network.Dtype = "float32"
) -> model_lib.Policy:
  """The model that all sides run."""
  return model_lib.Policy(
    model_lib.ModelConfig(
      vocab_size=s.vocab,
      d_model=s.d_model,
      n_layers=s.n_layers,
      n_heads=s.n_heads,
      n_kv_heads=s.n_kv_heads,
      head_dim=s.head_dim,
      d_ff=s.d_ff,
      rope_theta=s.rope_theta,
      dtype=dtype,
    )
  )


def engine(
  cache_length: int,
  *,
  find_stop: engine_lib.FindStop | None = None,
  **settings: Any,
) -> engine_lib.Engine:
  """An engine with weights and compiled programs; `settings` of sampling."""
  config = sampling.SamplingConfig(
    n_slots=SLOTS, cache_length=cache_length, **settings
  )
  result = engine_lib.Engine(
    policy(), config, [rollout_work.NO_STOP], find_stop=find_stop
  )
  result.set_params(result.policy.init(jax.random.key(0)))
  return result


def requests(
  prompts: Sequence[list[int]], budgets: Sequence[int]
) -> list[engine_lib.Request]:
  """Requests with a random stream each."""
  key_B2 = np.random.default_rng(3).integers(
    0, 2**32, (len(prompts), 2), dtype=np.uint32
  )
  return [
    engine_lib.Request(prompt, key, budget)
    for prompt, key, budget in zip(prompts, key_B2, budgets, strict=True)
  ]


def finish(engine: engine_lib.Engine) -> int:
  """Draws all that is under way to its end; returns how many tokens."""
  n = 0
  while drawn := engine.decode():
    n += sum(len(chunk.tokens) for chunk in drawn.values())
    engine.release([h for h, chunk in drawn.items() if chunk.is_stopped])
  return n


def draw(
  engine: engine_lib.Engine,
  prompts: Sequence[list[int]],
  budgets: Sequence[int],
) -> list[list[int]]:
  """Draws rollouts as long as their budgets; returns their tokens."""
  handles = engine.submit(requests(prompts, budgets))
  tokens: dict[int, list[int]] = {handle: [] for handle in handles}
  while drawn := engine.decode():
    for handle, chunk in drawn.items():
      tokens[handle] += chunk.tokens
    engine.release([h for h, chunk in drawn.items() if chunk.is_stopped])
  if [len(ids) for ids in tokens.values()] != list(budgets):
    raise RuntimeError("a rollout is not as long as its budget")
  return list(tokens.values())


class Conversations:
  """Conversations by our engine, driven as `roc.rollout` drives it."""

  def __init__(self, engine: engine_lib.Engine, talk: rollout_work.Talk):
    self._engine = engine
    self._talk = talk
    self._seconds, self._answers = talk.seconds(), talk.answers()
    self._index: dict[int, int] = {}  # of those under way, by handle
    self._turn: dict[int, int] = {}
    self._calls: dict[int, futures.Future] = {}
    self._n_drawn = 0

  def run(self) -> int:
    """Holds them all; returns how many there were."""
    talk = self._talk
    n, budget = talk.n_conversations, talk.n_tokens - talk.n_prompt
    handles = self._engine.submit(
      requests(rollout_work.prompts(n, talk.n_prompt), [budget] * n)
    )
    self._index = {handle: i for i, handle in enumerate(handles)}
    self._turn = dict.fromkeys(handles, 0)
    self._n_drawn = 0
    with futures.ThreadPoolExecutor(n) as tools:
      self._drive(tools)
    if self._n_drawn != n * (talk.n_calls + 1) * talk.n_turn:
      raise RuntimeError(f"{self._n_drawn} tokens were drawn")
    return n

  def _drive(self, tools: futures.Executor) -> None:
    drawn: dict[int, engine_lib.Drawn] = {}
    while self._index:
      self._answer()
      is_in_flight = self._engine.dispatch()
      was_idle = not drawn
      for handle, chunk in drawn.items():
        self._read(handle, chunk, tools)
      drawn = {}
      if is_in_flight:
        drawn = self._engine.collect()
      elif was_idle:
        futures.wait(self._calls.values(), return_when=futures.FIRST_COMPLETED)

  def _answer(self) -> None:
    for handle in [h for h, call in self._calls.items() if call.done()]:
      del self._calls[handle]
      ids = self._answers[self._index[handle]][self._turn[handle]]
      self._turn[handle] += 1
      self._engine.extend({handle: ids})

  def _read(
    self, handle: int, chunk: engine_lib.Drawn, tools: futures.Executor
  ) -> None:
    self._n_drawn += len(chunk.tokens)
    if not chunk.is_stopped:
      return
    turn = self._turn[handle]
    if turn < self._talk.n_calls:
      seconds = self._seconds[self._index[handle]][turn]
      self._calls[handle] = tools.submit(time.sleep, seconds)
    else:
      self._engine.release([handle])
      del self._index[handle]


@dataclasses.dataclass(frozen=True)
class BareLoop:
  """The loop, for S rows that all hold `n_start` tokens at first.

  Attributes:
    config: of the model.
    n_rows: S.
    n_start: tokens in the cache before the first step.
    n_steps: tokens drawn for each row.
    page: Z.
    read: "pages", "sum" or "nothing".
  """

  config: model_lib.ModelConfig
  n_rows: int
  n_start: int
  n_steps: int
  page: int
  read: str

  def build(self, params: model_lib.Params) -> Callable[[], int]:
    """Compiles it for fused parameters; the result runs it, counting tokens."""
    n_columns = -(-(self.n_start + self.n_steps) // self.page)
    n_pages = self.n_rows * n_columns
    c = self.config
    rng = np.random.default_rng(0)
    table_SJ = rng.permutation(n_pages).reshape(self.n_rows, n_columns)
    shape = paged.empty(
      c.n_layers, n_pages, self.page, c.n_kv_heads, c.head_dim, jnp.float32
    )
    pool = jax.tree.map(
      lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32)), shape
    )
    table_SJ = jnp.asarray(table_SJ, jnp.int32)
    loop = jax.jit(self._loop)

    def run() -> int:
      jax.block_until_ready(loop(params, pool, table_SJ))
      return self.n_rows * self.n_steps

    return run

  def _loop(self, params, pool: paged.Pool, table_SJ) -> jax.Array:
    first_SD = params["embed"]["embedding"][: self.n_rows]
    unembed_DV = params["head"]["kernel"]
    D = first_SD.shape[1]
    layers = params["layers"]

    def step(t, x_SD):
      n_columns = (self.n_start + t) // self.page + 1

      def layer(x_SD, xs):
        i, w = xs
        read = functools.partial(self._read, pool, table_SJ, i, n_columns)
        return self._layer(x_SD, w, read), None

      steps = (jnp.arange(self.config.n_layers), layers)
      x_SD, _ = jax.lax.scan(layer, x_SD, steps)
      logits_SV = x_SD @ unembed_DV
      # The next step needs this one, and numbers do not grow.
      return first_SD + 1e-6 * logits_SV[:, :D] + 1e-6 * logits_SV[:, -D:]

    return jax.lax.fori_loop(0, self.n_steps, step, first_SD)

  def _layer(self, x_SD, w: dict[str, Any], read) -> jax.Array:
    c = self.config
    n_q = c.n_heads * c.head_dim
    qkv_SN = x_SD @ w["qkv_proj"]["kernel"]
    # All of the product is used, so that none of it is left out.
    q_SN = qkv_SN[:, :n_q] + jnp.sum(qkv_SN[:, n_q:], axis=-1, keepdims=True)
    q_SKME = q_SN.reshape(x_SD.shape[0], c.n_kv_heads, -1, c.head_dim)
    x_SD += read(q_SKME).reshape(-1, n_q) @ w["o_proj"]["kernel"]
    gate_SF, up_SF = jnp.split(x_SD @ w["gate_up_proj"]["kernel"], 2, axis=-1)
    return x_SD + (gate_SF * up_SF) @ w["down_proj"]["kernel"]

  def _read(self, pool, table_SJ, i, n_columns, q_SKME) -> jax.Array:
    if self.read == "nothing":
      return q_SKME
    S = self.n_rows

    def sum_column(j, out_SKME):
      # Column j of all rows side by side, in place of a gather.
      get = lambda x: jax.lax.dynamic_slice_in_dim(x[i], j * S, S)
      k_SKEZ, v_SKZE = get(pool.k_LPKEZ), get(pool.v_LPKZE)
      sum_SKE = jnp.sum(k_SKEZ, axis=-1) + jnp.sum(v_SKZE, axis=-2)
      return out_SKME + sum_SKE[:, :, None]

    def page(j, out_SKME):
      page_S = jax.lax.dynamic_index_in_dim(table_SJ, j, 1, keepdims=False)
      get = lambda x: x.at[i, page_S].get(mode="clip")
      k_SKEZ, v_SKZE = get(pool.k_LPKEZ), get(pool.v_LPKZE)
      p_SKMZ = jnp.einsum("skme,skez->skmz", q_SKME, k_SKEZ)
      return out_SKME + jnp.einsum("skmz,skze->skme", p_SKMZ, v_SKZE)

    body = page if self.read == "pages" else sum_column
    return jax.lax.fori_loop(0, n_columns, body, jnp.zeros_like(q_SKME))


def machine(
  config: model_lib.ModelConfig, n_rows: int
) -> dict[str, tuple[Callable[[], int], float]]:
  """Loops that show the machine's speed.

  Returns:
    by name: the loop, and how many operations or bytes it takes.
  """
  rng = np.random.default_rng(0)
  random = lambda *shape: jnp.asarray(rng.random(shape, np.float32))
  N, D, F = 1024, config.d_model, 2 * config.d_ff
  large_N = random(1 << 24)

  def square(x_NN):
    return jax.lax.fori_loop(0, 10, lambda _, y: y @ x_NN * 1e-3, x_NN)

  def narrow(x_BD, w_DF):
    def body(_, y_BD):
      return (y_BD @ w_DF).reshape(n_rows, -1, D).sum(axis=1) * 1e-3

    return jax.lax.fori_loop(0, 1000, body, x_BD)

  def add(large_N):
    # In place: memory that is new at every call costs page faults.
    return jax.lax.fori_loop(0, 4, lambda i, x: x + i, large_N)

  def loop(function, *inputs) -> Callable[[], int]:
    jitted = jax.jit(function)

    def run() -> int:
      jax.block_until_ready(jitted(*inputs))
      return 1

    return run

  narrow_loop = loop(narrow, random(n_rows, D), random(D, F))
  n_bytes = large_N.nbytes
  return {
    f"{N}^3 products, FLOP": (loop(square, random(N, N)), 10 * 2 * N**3),
    f"[{n_rows},{D}] x [{D},{F}], FLOP": (
      narrow_loop,
      1000 * 2 * n_rows * D * F,
    ),
    "64 MiB read and written, bytes": (loop(add, large_N), 4 * 2 * n_bytes),
    "sum of 64 MiB, bytes": (loop(jnp.sum, large_N), n_bytes),
  }


def work(
  config: model_lib.ModelConfig, n_rows: int, n_held: float
) -> tuple[float, float, float]:
  """Floating-point operations and bytes of one token of a full batch.

  Args:
    config: of the model; float32.
    n_rows: that share the weights read in a step.
    n_held: tokens that a row holds on average.

  Returns:
    operations, bytes of weights, bytes of keys and values.
  """
  c = config
  n_q, n_kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
  layer = c.d_model * (2 * n_q + 2 * n_kv + 3 * c.d_ff)
  n_weights = c.n_layers * layer + c.d_model * c.vocab_size
  flops = 2 * n_weights + 4 * c.n_layers * n_q * n_held
  return flops, 4 * n_weights / n_rows, 8 * c.n_layers * n_kv * n_held
