"""What a step does with its rows: score them, cut them, learn from them.

The rows of a step become one or more updates (minibatches), each of one or more
gradients (microbatches). All updates of a step have one learning rate, that of
the step in the schedule, so that warm-up and decay count steps of the run
whatever an update is.
"""

import functools
from typing import Any

import jax
import numpy as np

from roc import build, errors
from roc import config as config_lib
from roc.core import metrics
from roc.device import checkpoint, optim
from roc.device import learner as learner_lib
from roc.device import model as model_lib
from roc.device import step as step_lib


class Updates:
  """The updates of a step, called as `(state, batch, step)`."""

  def __init__(
    self,
    cfg: config_lib.Config,
    policy: model_lib.Policy,
    learner: learner_lib.Learner,
  ):
    """`learner` is `make_learner`'s."""
    self._cfg = cfg
    self._learner = learner
    self._rate = optim.learning_rate(cfg.train)
    self._reference: Any = None
    n_rows = rows_of_an_update(cfg)
    n_microbatches = n_rows // (cfg.train.microbatch_rows or n_rows)
    self.score = jax.jit(
      functools.partial(
        _score,
        policy,
        chunk=cfg.loss.logprob_chunk,
        temperature=cfg.sampling.temperature,
        n_parts=cfg.train.minibatches * n_microbatches,
      ),
      out_shardings=learner.rows,
    )
    self._minibatch = jax.jit(
      functools.partial(
        _minibatch, n_rows=n_rows, n_minibatches=cfg.train.minibatches
      ),
      out_shardings=learner.rows,
    )

  def set_reference(self, trained: Any) -> None:
    """Keeps what a KL term compares with, as `TrainState.params` has it."""
    self._reference = trained

  def __call__(
    self, state: step_lib.TrainState, batch: step_lib.Batch, step: int
  ) -> tuple[step_lib.TrainState, dict[str, float]]:
    """One update for each minibatch; groups stay whole.

    Args:
      state: before them; donated.
      batch: rows of `selection.select`.
      step: number of the step, from 1.

    Returns:
      The state after them, and what the metrics say of them.
    """
    c = self._cfg
    batch = self._learner.place(batch)
    if c.loss.old_logprobs == "recompute":
      params = self._learner.params(state.params)
      batch["logp_old_BT"] = self.score(params, batch)
    if self._reference is not None:
      reference = self._learner.params(self._reference)
      batch["logp_ref_BT"] = self.score(reference, batch)
    rate = np.asarray(self._rate(step - 1), np.float32)
    M, n_rows = c.train.minibatches, rows_of_an_update(c)
    total = None
    for i in range(M):
      part = batch if M == 1 else self._minibatch(batch, i * n_rows)
      state, stats = self._learner.update(state, part, rate)
      total = stats if total is None else metrics.add(total, stats)
    jax.block_until_ready(state.params)
    row = metrics.finalize(total or {})
    for name in (learner_lib.SKIPPED, learner_lib.NOT_FINITE):
      row[name] = round(row[name] * M)  # a count, not a share
    return state, row | {"updates": int(state.step), "lr": float(rate)}


def rows_of_an_update(cfg: config_lib.Config) -> int:
  """Rows that an update learns from: a minibatch."""
  return cfg.train.prompts * cfg.filter.n_kept // cfg.train.minibatches


def make_learner(
  cfg: config_lib.Config, policy: model_lib.Policy
) -> learner_lib.Learner:
  """The jitted update of `cfg.loss` with `cfg.train`'s optimizer."""
  n_rows = rows_of_an_update(cfg)
  return learner_lib.Learner(
    policy,
    optim.make_optimizer(cfg.train),
    step_lib.grpo_loss(policy, cfg.loss, cfg.sampling.temperature),
    build.make_mesh(cfg),
    n_microbatches=n_rows // (cfg.train.microbatch_rows or n_rows),
  )


def check_finite(
  row: dict[str, float],
  step: int,
  checkpoints: checkpoint.Checkpoints,
  program: str,
) -> None:
  """Takes the count of updates that were not finite out of a row of metrics.

  Raises:
    errors.UserError: there was one, which the learner did not make; says what
      it was and where to go on from.
  """
  if not row.pop(learner_lib.NOT_FINITE):
    return
  say = lambda name: f"{row.get(name, float('nan')):.4g}"
  raise errors.UserError(
    f"step {step}: the update is not finite (gradient norm {say('grad_norm')},"
    f" loss {say('loss')}) and was not made; {newest(checkpoints)}; lower"
    f" config.{program}.lr or config.{program}.grad_clip and go on with"
    " --allow_config_change, or from an older checkpoint with --restore_step=N"
  )


def newest(checkpoints: checkpoint.Checkpoints) -> str:
  """Says which checkpoint a run would go on from."""
  step = checkpoints.newest_whole_step()
  if step is None:
    return "no checkpoint was saved yet"
  return f"the newest checkpoint is that of step {step}"


def _score(
  policy: model_lib.Policy,
  params: model_lib.Params,
  batch: step_lib.Batch,
  *,
  chunk: int,
  temperature: float,
  n_parts: int,
) -> jax.Array:
  """Log-probs [B, T], as many rows at a time as one gradient has."""
  one = lambda part: step_lib.score(
    policy, params, part, chunk=chunk, temperature=temperature
  )[0]
  read = {"tokens_BT": batch["tokens_BT"]}
  if n_parts == 1:
    return one(read)
  parts = jax.lax.map(one, learner_lib.split_rows(read, n_parts))
  return learner_lib.join_rows(parts)


def _minibatch(
  batch: step_lib.Batch, start: jax.Array, *, n_rows: int, n_minibatches: int
) -> step_lib.Batch:
  """Some rows of a batch, their weights scaled to sum as the whole's did."""
  part = {
    k: jax.lax.dynamic_slice_in_dim(v, start, n_rows) for k, v in batch.items()
  }
  part["weight_BT"] = part["weight_BT"] * n_minibatches
  return part
