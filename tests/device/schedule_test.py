"""Who enters, who is fed, who draws: book-keeping, no device."""

import numpy as np
import pytest

from roc.device import sampling, schedule

KEY = np.zeros(2, np.uint32)


def make(**changes):
  return schedule.Schedule(
    sampling.SamplingConfig(
      **{
        "n_slots": 2,
        "chunk": 4,
        "extend_chunk": 4,
        "cache_length": 32,
        "cache_tokens": 96,
        "page": 4,
        **changes,
      }
    )
  )


def request(prompt, budget=8):
  return schedule.Request(prompt, KEY, budget)


def feed(s):
  """Feeds all that is hungry, as the engine does, and forks."""
  fed = []
  while pieces := s.feed():
    fed += [piece.ids for piece in pieces]
    s.fork()
  s.fork()
  return fed


def draw(s, n=4):
  """Draws n tokens for those that may."""
  handles = s.draw()
  for handle in handles:
    r = s.rollouts[handle]
    r.length += n
    r.budget -= n
    r.n_drawn += n
    r.is_parked = r.budget <= 0
  return handles


def test_rollouts_enter_as_slots_fall_free():
  s = make()
  a, b, c = s.submit([request([1]), request([2]), request([3])])
  assert s.n_rollouts == 3
  s.admit()
  assert list(s.rollouts) == [a, b] == s.draw()
  assert s.is_anyone_waiting(2)
  s.rollouts[a].is_parked = True  # waits for a tool: its slot is free
  s.admit()
  assert list(s.rollouts) == [a, b, c] and s.draw() == [b, c]
  s.extend(a, [9])
  assert s.draw() == [b, c]  # still hungry
  assert feed(s) == [[1]]
  assert s.draw() == [a, b]
  s.release(b)
  assert s.draw() == [a, c] and s.n_rollouts == 2


def test_a_shared_prompt_is_fed_once():
  s = make(n_slots=4)
  prompt = list(range(1, 8))  # six to feed: a page and a half
  handles = s.submit([request(prompt)] * 3 + [request([9, 8])])
  s.admit()
  assert feed(s) == [[1, 2, 3, 4], [9], [5, 6]]
  first, second, third, alone = (s.rollouts[h] for h in handles)
  assert first.length == second.length == 6 and alone.length == 1
  assert first.pending == 7 and alone.pending == 8
  # The full page is the same one, the half one is each rollout's own.
  assert first.table_J[0] == second.table_J[0] == third.table_J[0]
  assert len({r.table_J[1] for r in (first, second, third)}) == 3
  assert s.draw() == handles


def test_a_call_is_filled_with_pieces():
  s = make(extend_rows=4, n_slots=3)
  long, short = list(range(1, 22)), [7, 8]
  s.submit([request(long), request(short), request([9] * 6)])
  s.admit()
  pieces = s.feed()
  # One each, then the rest of the rows to what is left, the oldest first.
  assert [(p.start, p.ids) for p in pieces] == [
    (0, long[:4]),
    (0, [7]),
    (0, [9] * 4),
    (4, long[4:8]),
  ]
  assert [(p.start, p.ids) for p in s.feed()] == [
    (8, long[8:12]),
    (4, [9]),
    (12, long[12:16]),
    (16, long[16:20]),
  ]
  assert s.feed() == [] and len(s.draw()) == 3


def test_shared_pages_live_as_long_as_somebody_needs_them():
  s = make()
  prompt = list(range(1, 8))
  a, b, c = s.submit([request(prompt)] * 3)
  s.admit()
  feed(s)
  n_free = s.book.n_free
  s.release(a)
  s.release(b)
  s.admit()  # the third finds the prompt in the cache
  assert feed(s) == [] and s.book.n_free == n_free + 1
  assert s.draw() == [c]
  s.release(c)
  assert s.book.n_free == s.book.n_pages


def test_copies_of_a_part_full_page():
  s = make(n_slots=3)
  s.submit([request(list(range(1, 8)))] * 3)
  s.admit()
  assert len(s.feed()) == 2
  copies = s.fork()
  assert len(copies) == 3 and len({page for page, _ in copies}) == 1
  assert {copy for _, copy in copies} == {
    r.table_J[1] for r in s.rollouts.values()
  }
  assert s.fork() == []


def test_a_full_page_is_not_copied():
  s = make(n_slots=3)
  s.submit([request(list(range(1, 6)))] * 3)  # four to feed
  s.admit()
  assert len(s.feed()) == 1
  assert s.fork() == []
  assert s.draw() == list(s.rollouts)


@pytest.mark.parametrize("n_same, is_shared", [(1, False), (2, True)])
def test_only_what_several_wait_for_is_shared(n_same, is_shared):
  s = make()
  (first, *_) = s.submit([request([1, 2, 3])] * n_same)
  s.admit()
  assert (s.rollouts[first].prompt is not None) == is_shared


def test_sharing_can_be_turned_off():
  s = make(share_prompts=False)
  s.submit([request([1, 2, 3])] * 2)
  s.admit()
  assert feed(s) == [[1, 2], [1, 2]]


def test_all_rollouts_of_a_prompt_enter_before_the_next():
  s = make(n_slots=3)
  a1, b1, a2, b2 = s.submit(
    [request([1, 1]), request([2, 2]), request([1, 1]), request([2, 2])]
  )
  s.admit()
  assert list(s.rollouts) == [a1, a2, b1]
  s.release(a1)
  s.admit()
  assert list(s.rollouts) == [a2, b1, b2]


def test_released_from_the_queue():
  s = make(n_slots=1)
  a, b = s.submit([request([1]), request([2])])
  s.admit()
  s.release(b)
  assert s.n_rollouts == 1 and not s.is_anyone_waiting(1)
  s.release(a)
  assert s.n_rollouts == 0 and s.book.n_free == s.book.n_pages


def test_a_rollout_waits_for_its_next_page():
  """The cache holds more rollouts than could all grow to their full length."""
  s = make(n_slots=4, cache_tokens=48, cache_length=32, chunk=4)
  handles = s.submit([request([i + 1], budget=31) for i in range(4)])
  s.admit()
  assert list(s.rollouts) == handles
  n_stalled = 0
  for _ in range(100):
    drawn = draw(s)
    assert drawn, "nobody can go on"
    n_active = sum(not r.is_parked for r in s.rollouts.values())
    n_stalled += len(drawn) < min(n_active, 4)
    for handle, r in list(s.rollouts.items()):
      if r.budget <= 0:
        s.release(handle)
    if not s.rollouts:
      break
  assert n_stalled > 0 and s.book.n_free == s.book.n_pages


def test_broken_pages_are_told_once():
  s = make(n_slots=3)
  handles = s.submit([request([1, 2, 3])] * 3)
  s.admit()
  feed(s)
  s.draw()
  s.rollouts[handles[0]].is_broken = True
  for handle in handles:
    s.release(handle)
  # The rollout's own two and the prompt's, from which it may have come.
  assert len(s.take_broken_pages()) == 3
  assert s.take_broken_pages() == []


def test_extending_is_checked():
  s = make()
  (a,) = s.submit([request([1])])
  assert s.budget_left(a) == 8
  s.admit()
  with pytest.raises(ValueError, match="middle of a turn"):
    s.extend(a, [5])
  s.rollouts[a].is_parked = True
  with pytest.raises(ValueError, match="by nothing"):
    s.extend(a, [])
  with pytest.raises(ValueError, match="exceed rollout 0's budget 8"):
    s.extend(a, [5] * 9)
  s.extend(a, [5] * 8)
  assert s.budget_left(a) == 0 and s.draw() == []


@pytest.mark.parametrize(
  "changes, match",
  [
    ({"n_slots": 0}, "n_slots is 0"),
    ({"cache_tokens": 28}, "cannot hold one rollout"),
  ],
)
def test_settings_that_cannot_be(changes, match):
  with pytest.raises(ValueError, match=match):
    make(**changes)
