"""How well what was not learnt is known: its loss, and calls drawn greedily.

The loss is that of supervised training, on the held-out lessons. For the calls
every turn that calls the tool is drawn anew from the history that its lesson
has; it is well-formed if it ends by itself and the agent loop would run all of
its calls. Whether they compute the right thing is not looked at.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from roc import build, evaluate, layout, wiring
from roc import config as config_lib
from roc.core import metrics
from roc.device import engine, model
from roc.device import learner as learner_lib
from roc.device import step as step_lib
from roc.host import chat as chat_lib
from roc.host import pack, tools

LOSS = "eval/heldout/loss"
WELL_FORMED = "eval/heldout/well_formed"
N_TURNS = "eval/heldout/n_turns"


class Turn(NamedTuple):
  """A turn of a lesson, and all that stands before it."""

  history: list[int]
  ids: list[int]


class Heldout:
  """Measures parameters on held-out lessons; the same each time."""

  def __init__(
    self,
    cfg: config_lib.Config,
    policy: model.Policy,
    host: wiring.HostParts,
    learner: learner_lib.Learner,
    lessons: Sequence[pack.Compact],
  ):
    loss_fn = step_lib.sft_loss(policy, cfg.loss.logprob_chunk)
    self._stats = jax.jit(lambda params, batch: loss_fn(params, batch)[1])
    self._learner = learner
    self._batches = list(_batches(cfg, lessons))
    self._chat = host.chat
    # Nothing is run: it says which calls would be.
    self._toolbox = host.make_toolbox(host.make_sandbox())
    room = cfg.sampling.cache_length
    turns = (
      turn
      for lesson in lessons
      for turn in turns_of(lesson, host.chat)
      if self._toolbox.parse_turn(turn.ids, host.chat).calls
      and len(turn.history) + len(turn.ids) <= room
    )
    self._requests = [
      engine.Request(
        turn.history,
        np.zeros(2, np.uint32),
        min(cfg.sampling.max_tokens, room - len(turn.history)),
      )
      for turn, _ in zip(turns, range(cfg.sft.heldout_calls), strict=False)
    ]
    self._sampler = None
    if self._requests:
      greedy = dataclasses.replace(cfg.sampling, temperature=0.0)
      self._sampler = build.make_engine(policy, greedy, host)

  def run(self, params: Any) -> dict[str, float]:
    """Measures parameters (all of them, `Learner.params`).

    Returns:
      `LOSS` in nats per token, and if there are turns that call, their number
      and the share of well-formed ones.
    """
    total = None
    for rows in self._batches:
      stats = {"loss": self._stats(params, self._learner.place(rows))["loss"]}
      total = stats if total is None else metrics.add(total, stats)
    row = {LOSS: metrics.finalize(total or {})["loss"]}
    if self._sampler is not None:
      self._sampler.set_params(params)
      drawn = evaluate.draw_turns(self._sampler, self._requests)
      row[N_TURNS] = float(len(drawn))
      row[WELL_FORMED] = float(
        np.mean([self._is_well_formed(t) for t in drawn])
      )
    return row

  def _is_well_formed(self, ids: Sequence[int]) -> bool:
    return is_well_formed(ids, self._chat, self._toolbox)


def is_well_formed(
  ids: Sequence[int], chat: chat_lib.Chat, toolbox: tools.Toolbox
) -> bool:
  """Whether a turn ends by itself and makes calls, all of which would run."""
  calls = toolbox.parse_turn(ids, chat).calls
  return (
    chat.is_whole(ids) and bool(calls) and all(c.error is None for c in calls)
  )


def turns_of(lesson: pack.Compact, chat: chat_lib.Chat) -> Iterator[Turn]:
  """The whole turns of the assistant in a lesson; one cut off is none."""
  is_model = np.concatenate(
    [[False], lesson.roles == layout.Role.MODEL, [False]]
  )
  edges = np.flatnonzero(np.diff(is_model.astype(np.int8)))
  for start, end in edges.reshape(-1, 2).tolist():
    ids = lesson.token_ids[start:end].tolist()
    if chat.is_whole(ids):
      yield Turn(lesson.token_ids[:start].tolist(), ids)


def _batches(
  cfg: config_lib.Config, lessons: Sequence[pack.Compact]
) -> Iterator[dict[str, np.ndarray]]:
  """Packed rows, as many at a time as one gradient has; the last padded."""
  rows = pack.pack_sft(lessons, cfg.sft.length)
  n = cfg.sft.microbatch_rows or cfg.sft.rows
  for at in range(0, len(rows["tokens_BT"]), n):
    batch = {name: array[at : at + n] for name, array in rows.items()}
    n_missing = n - len(batch["tokens_BT"])
    batch = {
      name: np.pad(array, ((0, n_missing), (0, 0)))
      for name, array in batch.items()
    }
    batch["weight_BT"] = np.zeros(batch["tokens_BT"].shape, np.float32)
    yield batch
