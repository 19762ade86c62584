"""Supervised training: the policy that RL starts from.

`lessons` says what from; the loss is on the model's own tokens. The order of
rows is a function of the seed and the step, so a run that was killed goes on
where it was.
"""

import pathlib

import jax
import numpy as np

from roc import build, heldout, lessons, parameters, pretrained, runlog, updates
from roc import config as config_lib
from roc import progress as progress_lib
from roc.core import metrics
from roc.device import learner as learner_lib
from roc.device import model as model_lib
from roc.device import optim
from roc.device import step as step_lib
from roc.host import pack


def run(
  cfg: config_lib.Config,
  workdir: pathlib.Path,
  *,
  restore_step: int | None = None,
) -> None:
  """Trains from nothing, `init_from` or `pretrained`; resumable.

  Args:
    cfg: of the run.
    workdir: of the run.
    restore_step: go back to the checkpoint of this step.

  Raises:
    errors.UserError: bad input, before any work starts.
  """
  cfg = pretrained.settle(cfg)
  # ------------------------------------------------------------- parts
  host = build.host_parts(cfg)
  policy = build.make_policy(cfg, host)
  learner = _make_learner(cfg, policy)
  claim = build.claim(cfg, host, workdir, "sft", lessons.identity(cfg))
  checkpoints = build.checkpoints(cfg, workdir)
  with claim:
    # ---------------------------------------------------------- restore
    restored = checkpoints.restore(learner.abstract_state, restore_step)
    for note in checkpoints.notes:
      build.say(note)
    start = restored.step if restored else 0
    if start >= cfg.sft.steps:
      build.say(f"{workdir}: all {start} steps are done")
      return
    found = lessons.read(cfg, host, workdir, claim)
    rows = pack.pack_sft(found.learnt, cfg.sft.length)
    if restored:
      state = parameters.go_on(cfg, learner, restored)
      origin = parameters.origin_of(restored)
    else:
      begun = parameters.begin(cfg, learner)
      state, origin = begun.state, begun.origin
      claim.note(**origin)

    apart = None
    if found.heldout:
      apart = heldout.Heldout(cfg, policy, host, learner, found.heldout)

    if restore_step is not None:
      build.go_back(checkpoints, workdir, restore_step)
    # ------------------------------------------------------------- loop
    weights_of = jax.jit(step_lib.sft_weights)
    rate_of = optim.learning_rate(cfg.sft)
    with (
      runlog.MetricsLog(
        workdir,
        restored_step=restored.step if restored else None,
        tensorboard=cfg.log.tensorboard,
      ) as log,
      progress_lib.Progress(
        "sft", cfg.sft.steps, start=start, is_shown=cfg.log.progress
      ) as bar,
    ):
      n_tokens = start * cfg.sft.rows * cfg.sft.length
      if apart is not None and not start:
        log.write(0, apart.run(learner.params(state.params)))
      for step in range(start + 1, cfg.sft.steps + 1):
        index_B = _row_order(cfg, len(rows["tokens_BT"]), step)
        batch = learner.place({k: v[index_B] for k, v in rows.items()})
        batch["weight_BT"] = weights_of(batch["roles_BT"])
        rate = np.asarray(rate_of(step - 1), np.float32)
        state, stats = learner.update(state, batch, rate)
        n_tokens += batch["tokens_BT"].size
        row = metrics.finalize(stats)
        row |= {"lr": float(rate), "tokens_trained": n_tokens}
        updates.check_finite(row, step, checkpoints, "sft")
        if apart is not None and _is_measured(cfg, step):
          row |= apart.run(learner.params(state.params))
        log.write(step, row)
        bar.update(step, row)
        if step % (cfg.checkpoint.every * 20) == 0 or step == cfg.sft.steps:
          checkpoints.save(step, state, {"tokens": n_tokens} | origin)


def _make_learner(
  cfg: config_lib.Config, policy: model_lib.Policy
) -> learner_lib.Learner:
  return learner_lib.Learner(
    policy,
    optim.make_optimizer(cfg.sft),
    step_lib.sft_loss(policy, cfg.loss.logprob_chunk),
    build.make_mesh(cfg),
    n_microbatches=cfg.sft.rows // (cfg.sft.microbatch_rows or cfg.sft.rows),
  )


def _is_measured(cfg: config_lib.Config, step: int) -> bool:
  """Whether held-out lessons are measured behind a step."""
  every = cfg.sft.heldout_every
  return step == cfg.sft.steps or (every > 0 and step % every == 0)


def _row_order(cfg: config_lib.Config, n_rows: int, step: int) -> np.ndarray:
  """Rows of one update: epochs of shuffled rows, cut where they end."""
  start = (step - 1) * cfg.sft.rows
  picked = []
  while len(picked) < cfg.sft.rows:
    epoch, at = divmod(start + len(picked), n_rows)
    order = np.random.default_rng([cfg.seed, epoch]).permutation(n_rows)
    picked.extend(order[at : at + cfg.sft.rows - len(picked)])
  return np.array(picked)
