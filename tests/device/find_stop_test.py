"""A turn's end that no single id marks: what lies behind it was never drawn."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from roc.device import engine as engine_lib
from roc.device import sampling

STOP_IDS = (1, 2, 3, 4)
BUDGET = 40
CONFIG = sampling.SamplingConfig(
  n_slots=4,
  chunk=5,
  extend_chunk=3,
  extend_rows=3,
  cache_length=64,
  page=8,
  max_tokens=BUDGET,
)
N_JOBS = 6
OBSERVATIONS = ([11, 12, 13], [14], [15, 16, 17, 18])


@dataclasses.dataclass
class Turn:
  """A turn of a rollout, and the budget that it left."""

  tokens: list[int] = dataclasses.field(default_factory=list)
  logps: list[float] = dataclasses.field(default_factory=list)
  raw_logps: list[float] = dataclasses.field(default_factory=list)
  budget_left: int = 0


class Finder:
  """Looks for an end from the left; counts how much lay behind it."""

  def __init__(self, is_end):
    """`is_end(ids)` says whether a turn may end with these."""
    self._is_end = is_end
    self.n_cut = 0

  def __call__(self, ids):
    for n in range(1, len(ids) + 1):
      if self._is_end(ids[:n]):
        self.n_cut += len(ids) - n
        return n
    return None


def ends_in_one(ids):
  return ids[-1] in STOP_IDS


def ends_in_two(ids):
  """An end of two ids, in turns of a few tokens as a rule."""
  return len(ids) > 1 and sum(ids[-2:]) % 9 == 0


@pytest.fixture(scope="module")
def make_engine(policy, params):
  def make(stop_ids=(), find_stop=None, **changes):
    config = dataclasses.replace(CONFIG, **changes)
    made = engine_lib.Engine(policy, config, stop_ids, find_stop=find_stop)
    made.set_params(params)
    return made

  return make


@pytest.fixture(scope="module")
def requests():
  rng = np.random.default_rng(0)
  prompts = [rng.integers(5, 40, n).tolist() for n in (1, 6, 11)]
  task_B = np.arange(N_JOBS) % 3
  key_B2 = sampling.rollout_keys(
    0, 1, jnp.asarray(task_B), jnp.arange(N_JOBS) // 3
  )
  return [
    engine_lib.Request(prompts[task], np.asarray(key), BUDGET)
    for task, key in zip(task_B, key_B2, strict=True)
  ]


def drive(engine, requests):
  """The turns of each rollout, answered as long as its budget lasts."""
  handles = engine.submit(requests)
  turns = {handle: [Turn()] for handle in handles}
  while drawn := engine.decode():
    for handle, chunk in drawn.items():
      done = turns[handle]
      turn = done[-1]
      turn.tokens += chunk.tokens
      turn.logps += chunk.logps
      turn.raw_logps += chunk.raw_logps
      if not chunk.is_stopped:
        continue
      turn.budget_left = engine.budget_left(handle)
      answer = OBSERVATIONS[len(done) % len(OBSERVATIONS)]
      if len(answer) < turn.budget_left:
        engine.extend({handle: answer})
        done.append(Turn())
      else:
        engine.release([handle])
  assert engine.n_rollouts == 0
  return list(turns.values())


@pytest.mark.parametrize("chunk", [5, pytest.param(16, marks=pytest.mark.slow)])
def test_an_end_of_one_id_is_as_good_as_a_stop_id(make_engine, requests, chunk):
  """The device stops at it, or the host does, a few tokens later."""
  find = Finder(ends_in_one)
  want = drive(make_engine(STOP_IDS), requests)
  got = drive(make_engine(find_stop=find, chunk=chunk), requests)
  assert got == want
  assert find.n_cut > 10 and max(len(turns) for turns in want) > 3


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [5, 16])
def test_an_end_of_two_ids_leaves_no_trace_behind_it(
  make_engine, requests, chunk
):
  """Token by token nothing can be drawn past the end.

  Ids and log-probs of later turns are equal to the bit, so the cache is.
  """
  token_by_token, find = Finder(ends_in_two), Finder(ends_in_two)
  want = drive(make_engine(find_stop=token_by_token, chunk=1), requests)
  got = drive(make_engine(find_stop=find, chunk=chunk), requests)
  assert got == want
  assert token_by_token.n_cut == 0 and find.n_cut > 10
  assert max(len(turns) for turns in want) > 3
  whole = [t for turns in want for t in turns if ends_in_two(t.tokens)]
  # Some ends have an id in each of two chunks.
  assert chunk == 16 or any(len(t.tokens) % chunk == 1 for t in whole)


def test_budgets_count_what_was_kept(make_engine, requests):
  find = Finder(ends_in_two)
  for turns in drive(make_engine(find_stop=find, chunk=16), requests):
    left = BUDGET
    for number, turn in enumerate(turns, start=1):
      left -= len(turn.tokens)
      assert turn.budget_left == left
      left -= len(OBSERVATIONS[number % len(OBSERVATIONS)])
      n_all = len(turn.tokens)
      assert n_all == len(turn.logps) == len(turn.raw_logps)
      # No end before the end.
      assert not any(ends_in_two(turn.tokens[:n]) for n in range(1, n_all))


@pytest.fixture(scope="module")
def endless(make_engine, requests):
  """What a rollout says if nobody stops it: one turn of its whole budget."""
  ((turn,),) = drive(make_engine(chunk=16), requests[1:2])
  assert len(turn.tokens) == BUDGET
  return turn.tokens


@pytest.fixture(scope="module")
def pair(endless):
  """Two ids in a row, the last one new there, soon after a chunk began."""
  for n in range(17, 28):
    if endless[n] not in endless[:n]:
      return endless[n - 1 : n + 1]
  raise AssertionError("this rollout says the same over and over")


def two_turns(engine, request):
  """A turn, an answer of three ids, and a turn."""
  (handle,) = engine.submit([request])
  turns = []
  for answer in ([11, 12, 13], None):
    turn = Turn()
    while drawn := engine.decode():
      turn.tokens += drawn[handle].tokens
      turn.logps += drawn[handle].logps
    turn.budget_left = engine.budget_left(handle)
    turns.append(turn)
    if answer:
      engine.extend({handle: answer})
  engine.release([handle])
  return turns


@pytest.mark.slow
def test_a_stop_id_for_the_last_id_of_the_end(
  make_engine, requests, endless, pair
):
  """Where that id comes with no other before it, both end the same turn."""
  find = Finder(lambda ids: ids[-2:] == pair)
  want = two_turns(make_engine(pair[1:], chunk=16), requests[1])
  got = two_turns(make_engine(find_stop=find, chunk=16), requests[1])
  n_turn = endless.index(pair[1]) + 1
  assert want[0].tokens == endless[:n_turn]
  assert got[0] == want[0] and find.n_cut > 0
  # The second turn, until one of them stops.
  n = min(len(want[1].tokens), len(got[1].tokens))
  assert n > 2
  assert got[1].tokens[:n] == want[1].tokens[:n]
  assert got[1].logps[:n] == want[1].logps[:n]


@pytest.mark.parametrize("spare", [0, 1, 2])
def test_an_end_just_before_the_budgets(
  make_engine, requests, endless, pair, spare
):
  """The device stopped for want of budget; the host gives some of it back."""
  n_turn = endless.index(pair[1]) + 1
  engine = make_engine(find_stop=Finder(lambda ids: ids[-2:] == pair), chunk=16)
  cut = dataclasses.replace(requests[1], budget=n_turn + spare)
  (handle,) = engine.submit([cut])
  tokens = []
  while drawn := engine.decode():
    tokens += drawn[handle].tokens
  assert tokens == endless[:n_turn]
  assert engine.budget_left(handle) == spare
  if spare:
    engine.extend({handle: [11]})
    drawn = engine.decode()
    assert [len(d.tokens) for d in drawn.values()] == [1] * (spare - 1)
  engine.release([handle])
