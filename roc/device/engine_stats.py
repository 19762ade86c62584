"""What an engine did, in numbers for a row of metrics."""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass
class Stats:
  """Counters since `take` was last called.

  Seconds are wall time from the start of a chunk (or of feeding) to the moment
  when its result was fetched, the host's own work in between included.
  """

  n_slots: int
  n_pages: int
  decode_tokens: int = 0
  decode_s: float = 0.0
  prompt_tokens: int = 0
  answer_tokens: int = 0
  feed_s: float = 0.0
  n_steps: int = 0
  n_chunks: int = 0
  page_share: float = 0.0  # summed over chunks
  most_page_share: float = 0.0
  prefilled_tokens: int = 0  # over the engine's life
  n_compiled: int = 0  # when last asked

  def count_fed(self, n_tokens: int, *, is_answer: bool) -> None:
    """Notes tokens that were fed, of a prompt or of a tool's answer."""
    self.prefilled_tokens += n_tokens
    if is_answer:
      self.answer_tokens += n_tokens
    else:
      self.prompt_tokens += n_tokens

  def count_feeding(self, seconds: float) -> None:
    """Notes how long feeding took."""
    self.feed_s += seconds

  def count_chunk(
    self, seconds: float, *, n_tokens: int, n_steps: int, n_free_pages: int
  ) -> None:
    """Notes a chunk: tokens of all slots, and steps that it took."""
    self.decode_s += seconds
    self.decode_tokens += n_tokens
    self.n_steps += n_steps
    self.n_chunks += 1
    share = 1 - n_free_pages / self.n_pages
    self.page_share += share
    self.most_page_share = max(self.most_page_share, share)

  def take(self, n_compiled: int) -> dict[str, float]:
    """Rates and shares since the last call, and starts anew.

    Returns:
      `decode_tokens_per_s`, and `prefill_`, `extend_tokens_per_s` over the time
      of feeding; `slot_occupancy`, share of slot steps that drew a token;
      `cache_use` and `cache_use_max`, shares of pages; `compilations`. What
      never happened is left out.
    """
    row = {"compilations": float(n_compiled - self.n_compiled)}
    if self.n_chunks:
      row |= {
        "decode_tokens_per_s": self.decode_tokens / max(self.decode_s, 1e-9),
        "slot_occupancy": self.decode_tokens / (self.n_steps * self.n_slots),
        "cache_use": self.page_share / self.n_chunks,
        "cache_use_max": self.most_page_share,
      }
    for name, n in (
      ("prefill", self.prompt_tokens),
      ("extend", self.answer_tokens),
    ):
      if n:
        row[f"{name}_tokens_per_s"] = n / max(self.feed_s, 1e-9)
    fresh = Stats(self.n_slots, self.n_pages)
    fresh.prefilled_tokens = self.prefilled_tokens
    fresh.n_compiled = n_compiled
    self.__dict__.update(fresh.__dict__)
    return row


def together(rows: Sequence[dict[str, float]]) -> dict[str, float]:
  """Rows of engines that ran side by side as one: rates and counts add up."""
  merged = {}
  for name in {name: None for row in rows for name in row}:
    values = [row[name] for row in rows if name in row]
    if name.endswith("_per_s") or name == "compilations":
      merged[name] = sum(values)
    elif name.endswith("_max"):
      merged[name] = max(values)
    else:
      merged[name] = sum(values) / len(values)
  return merged
