"""The sampler without weights: what it plays, and what it does not put up with.

`rollout_test` drives an agent loop with it.
"""

import inspect

import numpy as np
import pytest

from roc import scripted
from roc.device import engine

KEY = np.zeros(2, np.uint32)


def ask(first, budget=20):
  """A request whose first id tells the script which rollout it is."""
  return engine.Request([first, 7], KEY, budget)


def make(turns, **sizes):
  """A sampler of rollouts 0, 1, ... with these turns each."""
  return scripted.ScriptedSampler(
    lambda request: turns[request.prompt[0]], **sizes
  )


def tokens(drawn):
  return {handle: d.tokens for handle, d in drawn.items()}


def test_it_has_the_engines_verbs():
  verbs = {
    name: list(inspect.signature(f).parameters)
    for name, f in inspect.getmembers(engine.Engine, inspect.isfunction)
    if not name.startswith("_")
  }
  assert {"submit", "dispatch", "collect", "extend", "release"} <= set(verbs)
  for name, parameters in verbs.items():
    f = getattr(scripted.ScriptedSampler, name)
    assert list(inspect.signature(f).parameters) == parameters


def test_turns_come_in_chunks():
  sampler = make([[[1, 2, 3, 4, 5], [6]]], chunk=3)
  (handle,) = sampler.submit([ask(0)])
  first = sampler.decode()[handle]
  assert (first.tokens, first.is_stopped) == ([1, 2, 3], False)
  second = sampler.decode()[handle]
  assert (second.tokens, second.is_stopped) == ([4, 5], True)
  assert not first.is_broken and len(first.logps) == 3
  assert max(first.logps) < 0 and first.raw_logps == first.logps
  assert sampler.decode() == {} and not sampler.dispatch()
  sampler.extend({handle: [8, 9]})
  assert sampler.decode()[handle].tokens == [6]
  assert sampler.fed[handle] == [0, 7, 1, 2, 3, 4, 5, 8, 9, 6]
  assert sampler.budget_left(handle) == 20 - 8
  sampler.release([handle])
  assert sampler.n_rollouts == 0 and sampler.stats() == {}


def test_the_budget_cuts_a_turn():
  sampler = make([[[1, 2, 3, 4, 5]]], chunk=4)
  (handle,) = sampler.submit([ask(0, budget=3)])
  drawn = sampler.decode()[handle]
  assert (drawn.tokens, drawn.is_stopped) == ([1, 2, 3], True)
  assert sampler.budget_left(handle) == 0 and sampler.decode() == {}


def test_a_full_budget_of_observation_says_nothing():
  sampler = make([[[1], [2]]])
  (handle,) = sampler.submit([ask(0, budget=3)])
  sampler.decode()
  sampler.extend({handle: [8, 9]})
  assert sampler.budget_left(handle) == 0 and sampler.decode() == {}
  (none,) = sampler.submit([ask(0, budget=0)])
  assert sampler.decode() == {} and sampler.budget_left(none) == 0
  assert sampler.n_rollouts == 2


def test_slots_go_by_age():
  sampler = make([[[1, 1], [1]], [[2, 2]], [[3, 3]]], n_slots=2, chunk=1)
  handles = sampler.submit([ask(0), ask(1), ask(2)])
  assert sampler.n_rollouts == 3
  assert list(sampler.decode()) == handles[:2]
  assert list(sampler.decode()) == handles[:2]
  # Both wait, so the third has come in; the first goes before it.
  assert list(sampler.decode()) == handles[2:]
  sampler.extend({handles[0]: [9]})
  assert tokens(sampler.decode()) == {handles[0]: [1], handles[2]: [3]}
  assert sampler.submit([ask(1)]) == [3]


def test_those_that_go_on_share_the_slots():
  sampler = make([[[1], [2]], [[3], [4]]], n_slots=1)
  first, second = sampler.submit([ask(0), ask(1)])
  assert tokens(sampler.decode()) == {first: [1]}
  assert tokens(sampler.decode()) == {second: [3]}
  sampler.extend({second: [9], first: [9]})
  assert tokens(sampler.decode()) == {first: [2]}
  assert tokens(sampler.decode()) == {second: [4]}


def test_a_rollout_that_is_released_in_flight_said_nothing():
  sampler = make([[[1, 2]], [[3, 4]]], chunk=1)
  first, second = sampler.submit([ask(0), ask(1)])
  assert sampler.dispatch()
  sampler.release([first])
  assert tokens(sampler.collect()) == {second: [3]}
  assert sampler.fed[first] == [0, 7]
  # So does one that never left the queue.
  (queued,) = sampler.submit([ask(0)])
  sampler.release([queued])
  assert tokens(sampler.decode()) == {second: [4]}


def test_a_turn_may_break_off():
  sampler = make([[[1, 2, scripted.BREAK, 3]], [[4]]], chunk=9)
  broken, fine = sampler.submit([ask(0), ask(1)])
  drawn = sampler.decode()
  assert drawn[broken].tokens == [1, 2] and len(drawn[broken].logps) == 2
  assert drawn[broken].is_broken and drawn[broken].is_stopped
  assert not drawn[fine].is_broken
  assert sampler.fed[broken] == [0, 7, 1, 2]
  assert sampler.budget_left(broken) == 18
  with pytest.raises(ValueError, match="is broken: it can only be released"):
    sampler.extend({broken: [9]})
  sampler.release([broken, fine])


# ------------------------------------------------------------------- misuse


def test_dispatch_and_collect_take_turns():
  sampler = make([[[1, 2, 3]]], chunk=1)
  with pytest.raises(RuntimeError, match="dispatch comes before collect"):
    sampler.collect()
  sampler.submit([ask(0)])
  assert sampler.dispatch()
  for again in (sampler.dispatch, sampler.decode):
    with pytest.raises(RuntimeError, match="collect comes before the next"):
      again()
  assert tokens(sampler.collect()) == {0: [1]}
  with pytest.raises(RuntimeError, match="dispatch comes before collect"):
    sampler.collect()


def test_only_what_waits_and_fits_is_appended():
  sampler = make([[[1, 2], [3]]], chunk=1)
  (handle,) = sampler.submit([ask(0, budget=4)])
  with pytest.raises(KeyError):  # still in the queue
    sampler.extend({handle: [9]})
  sampler.decode()
  with pytest.raises(ValueError, match="in the middle of a turn"):
    sampler.extend({handle: [9]})
  sampler.dispatch()
  # Its turn ends with what is in flight, which nobody has seen yet.
  with pytest.raises(ValueError, match="in the middle of a turn"):
    sampler.extend({handle: [9]})
  sampler.collect()
  with pytest.raises(ValueError, match="3 tokens exceed rollout 0's budget 2"):
    sampler.extend({handle: [9] * 3})
  with pytest.raises(ValueError, match="extended by nothing"):
    sampler.extend({handle: []})
  assert sampler.budget_left(handle) == 2
  sampler.extend({handle: [9]})
  with pytest.raises(ValueError, match="in the middle of a turn"):
    sampler.extend({handle: [9]})


@pytest.mark.parametrize("turns", [[], [[]], [[1], []], [[1]]])
def test_a_script_that_is_too_short_is_named(turns):
  sampler = make([turns])
  (handle,) = sampler.submit([ask(0)])
  with pytest.raises(ValueError, match="rollout 0 has no turn left"):
    sampler.decode()
    sampler.extend({handle: [9]})
    sampler.decode()
  sampler.release([handle])
  assert sampler.n_rollouts == 0


def test_what_cannot_be():
  with pytest.raises(ValueError, match="n_slots=0"):
    make([], n_slots=0)
  with pytest.raises(ValueError, match="chunk=0"):
    make([], chunk=0)
  sampler = make([[[1]]])
  with pytest.raises(ValueError, match="at least one token"):
    sampler.submit([ask(0), engine.Request([], KEY, 3)])
  assert sampler.n_rollouts == 0
  (handle,) = sampler.submit([ask(0)])
  with pytest.raises(RuntimeError, match="in flight"):
    sampler.set_params(None)
  sampler.release([handle])
  with pytest.raises(KeyError):
    sampler.release([handle])
  sampler.set_params(None)
