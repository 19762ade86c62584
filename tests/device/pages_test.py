"""Pages are given so that nobody ever waits for ever."""

import numpy as np
import pytest

from roc.device import pages


def test_pages_come_and_go():
  book = pages.PageBook(4)
  assert book.open("a", 3) and book.n_free == 4
  first = book.take("a", 2)
  assert len(set(first)) == 2 and book.n_free == 2
  (third,) = book.take("a", 1)
  assert list(book.held("a")) == [*first, third]
  book.close("a")
  assert book.n_free == 4
  assert book.open("b", 4) and sorted(book.take("b", 4)) == [0, 1, 2, 3]


def test_more_may_be_claimed_than_there_is():
  book = pages.PageBook(4)
  assert book.open("a", 3) and book.open("b", 4)
  assert book.take("a", 2) is not None
  # Two are free and `a` may still need one of them: `b` gets one, not two.
  assert book.take("b", 2) is None
  assert book.take("b", 1) is not None
  assert book.take("b", 1) is None
  assert book.take("a", 1) is not None
  assert book.take("b", 1) is None
  book.close("a")
  assert len(book.take("b", 3)) == 3


def test_a_claim_beyond_the_pool_is_refused():
  book = pages.PageBook(4)
  assert not book.open("a", 5)
  assert book.open("a", 4)


def test_what_is_kept_does_not_come_back():
  book = pages.PageBook(4)
  assert book.open("a", 3) and book.take("a", 1)
  # With two pages kept, `a` could not get its last one.
  assert book.keep("p", 2) is None
  assert len(book.keep("p", 1)) == 1
  assert not book.open("b", 4)
  book.close("p")
  assert book.open("b", 4)


def test_misuse():
  book = pages.PageBook(4)
  book.open("a", 1)
  with pytest.raises(ValueError, match="has a claim already"):
    book.open("a", 1)
  with pytest.raises(ValueError, match="asks for 2 pages and claimed 1"):
    book.take("a", 2)


@pytest.mark.parametrize("seed", range(20))
def test_everybody_ends(seed):
  """Whoever asks in whatever order: all get what they claimed, in the end."""
  rng = np.random.default_rng(seed)
  n_pages = int(rng.integers(4, 12))
  book = pages.PageBook(n_pages)
  waiting = list(range(30))
  most = rng.integers(1, n_pages, 30)
  left = {}
  for _ in range(5000):
    if waiting and book.open(waiting[0], int(most[waiting[0]])):
      owner = waiting.pop(0)
      left[owner] = int(most[owner])
    for owner in rng.permutation(list(left)):
      n = int(rng.integers(1, left[owner] + 1))
      if book.take(owner, n) is not None:
        left[owner] -= n
      if not left[owner]:
        book.close(owner)
        del left[owner]
    held = [page for owner in left for page in book.held(owner)]
    assert len(held) == len(set(held)) == n_pages - book.n_free
    if not waiting and not left:
      break
  else:
    raise AssertionError("somebody waits for ever")
  assert book.n_free == n_pages
