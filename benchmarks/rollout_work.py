"""What all sides of the rollout benchmarks get: models, prompts, talks."""

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from concurrent import futures

import numpy as np

# Whole conversations and a number of tokens: what was drawn behind each.
Generate = Callable[[Sequence[list[int]], int], list[list[int]]]


@dataclasses.dataclass(frozen=True)
class Shape:
  """The model that all sides run: a Qwen3 with random weights."""

  vocab: int = 512
  d_model: int = 256
  n_layers: int = 4
  n_heads: int = 4
  n_kv_heads: int = 2
  head_dim: int = 64
  d_ff: int = 768
  rope_theta: float = 1e6


SHAPE = Shape()
# As published, but with random weights.
QWEN3_0_6B = Shape(151_936, 1024, 28, 16, 8, 128, 3072)
SHAPES = {"small": SHAPE, "qwen3-0.6b": QWEN3_0_6B}
NO_STOP = SHAPE.vocab + 7  # an id that cannot be drawn


def prompts(n: int, length: int, seed: int = 0) -> list[list[int]]:
  """Random prompts, the same in every process."""
  ids = np.random.default_rng(seed).integers(3, SHAPE.vocab, (n, length))
  return ids.tolist()


# ----------------------------------------------------- conversations with tools


@dataclasses.dataclass(frozen=True)
class Talk:
  """Conversations with a tool that answers after a while."""

  n_conversations: int = 64
  batch: int = 32  # conversations that are decoded at once
  n_threads: int = 16  # conversations under way where each has its thread
  n_prompt: int = 64
  n_turn: int = 64  # tokens of each turn
  n_calls: int = 3  # one behind every turn but the last
  n_answer: int = 24
  least_s: float = 0.02
  most_s: float = 0.2

  @property
  def n_tokens(self) -> int:
    """Length of a whole conversation."""
    drawn = (self.n_calls + 1) * self.n_turn
    return self.n_prompt + drawn + self.n_calls * self.n_answer

  def seconds(self) -> list[list[float]]:
    """How long each call of each conversation takes."""
    rng = np.random.default_rng(1)
    shape = (self.n_conversations, self.n_calls)
    return rng.uniform(self.least_s, self.most_s, shape).tolist()

  def answers(self) -> list[list[list[int]]]:
    """What each call says, as ids."""
    flat = prompts(self.n_conversations * self.n_calls, self.n_answer, 2)
    n = self.n_calls
    return [flat[i : i + n] for i in range(0, len(flat), n)]


def _check(conversations: Sequence[list[int]], talk: Talk) -> int:
  """Returns how many conversations there are, all of them whole."""
  lengths = {len(x) for x in conversations}
  if lengths != {talk.n_tokens}:
    raise RuntimeError(f"conversations of {lengths}, not {talk.n_tokens}")
  return len(conversations)


def talk_in_batches(generate: Generate, talk: Talk) -> int:
  """A batch takes a turn together, then waits for all of its tools.

  Every turn starts from the whole conversation so far.

  Returns:
    the number of conversations.
  """
  rows, seconds, answers = (
    prompts(talk.n_conversations, talk.n_prompt),
    talk.seconds(),
    talk.answers(),
  )
  with futures.ThreadPoolExecutor(talk.batch) as tools:
    for start in range(0, talk.n_conversations, talk.batch):
      batch = range(start, min(start + talk.batch, talk.n_conversations))
      for turn in range(talk.n_calls + 1):
        drawn = generate([rows[i] for i in batch], talk.n_turn)
        for i, ids in zip(batch, drawn, strict=True):
          rows[i] = rows[i] + ids
        if turn == talk.n_calls:
          continue
        list(tools.map(time.sleep, [seconds[i][turn] for i in batch]))
        for i in batch:
          rows[i] = rows[i] + answers[i][turn]
  return _check(rows, talk)


def talk_in_threads(generate: Generate, talk: Talk) -> int:
  """Each conversation has its thread and asks for one turn of one row.

  Calls to the model wait for each other, tools do not.

  Returns:
    the number of conversations.
  """
  lock = threading.Lock()
  firsts, seconds, answers = (
    prompts(talk.n_conversations, talk.n_prompt),
    talk.seconds(),
    talk.answers(),
  )

  def speak(ids: list[int]) -> list[int]:
    with lock:
      return generate([ids], talk.n_turn)[0]

  def converse(i: int) -> list[int]:
    row = firsts[i]
    for turn in range(talk.n_calls):
      row = row + speak(row)
      time.sleep(seconds[i][turn])
      row = row + answers[i][turn]
    return row + speak(row)

  with futures.ThreadPoolExecutor(talk.n_threads) as threads:
    return _check(list(threads.map(converse, range(len(firsts)))), talk)
