"""Problems that share words with evaluation problems.

Decontamination as language models are usually checked: two texts overlap where
they share a run of n words (n = 8 in rStar2-Agent, arXiv 2508.20722, section on
training data). A text that is shorter than n words overlaps with an equal one.
"""

from collections.abc import Iterable


def words(text: str) -> list[str]:
  """The text as it is compared: what spaces divide, case apart."""
  return text.casefold().split()


def ngrams(text: str, n: int) -> set[tuple[str, ...]]:
  """All runs of n words; of a shorter text, the whole."""
  found = words(text)
  if len(found) < n:
    return {tuple(found)} if found else set()
  return {tuple(found[i : i + n]) for i in range(len(found) - n + 1)}


class Overlap:
  """The n-grams of the texts that nothing may overlap with.

  Args:
    texts: of the evaluation.
    n: words of a run.
  """

  def __init__(self, texts: Iterable[str], n: int = 8):
    if n < 1:
      raise ValueError(f"ngram must be at least 1, not {n}")
    self._n = n
    self._seen: set[tuple[str, ...]] = set()
    for text in texts:
      self._seen |= ngrams(text, n)

  def __contains__(self, text: str) -> bool:
    """Whether the text shares a run of words with one of them."""
    return not self._seen.isdisjoint(ngrams(text, self._n))
