"""Supervised training on demonstrations: the policy that RL starts from.

Demonstrations are scripted, run against the real tool once and kept in the
workdir; the loss is on the model's own tokens. The order of rows is a function
of the seed and the step, so a run that was killed goes on where it was.
"""

import pathlib

import jax
import numpy as np

from roc import build, errors, pretrained, runlog, wiring
from roc import config as config_lib
from roc import progress as progress_lib
from roc.core import metrics
from roc.device import checkpoint, optim
from roc.device import step as step_lib
from roc.host import episode as episode_lib
from roc.host import pack
from roc.host.tasks import demonstrations

DEMONSTRATIONS = "demonstrations.jsonl"


def run(cfg: config_lib.Config, workdir: pathlib.Path) -> None:
  """Trains from nothing (or `init_from`) on demonstrations; resumable.

  Raises:
    errors.UserError: bad input, before any work starts.
  """
  cfg = pretrained.settle(cfg)
  # ------------------------------------------------------------- parts
  host = build.host_parts(cfg)
  policy = build.make_policy(cfg, host)
  mesh = build.make_mesh(cfg)
  learner = step_lib.Learner(
    policy,
    optim.make_optimizer(cfg.sft),
    step_lib.sft_loss(policy, cfg.loss.logprob_chunk),
    mesh,
    n_microbatches=cfg.sft.rows // (cfg.sft.microbatch_rows or cfg.sft.rows),
  )
  claim = build.claim(cfg, host, workdir, "sft")
  checkpoints = checkpoint.Checkpoints(
    workdir / "checkpoints", keep=cfg.checkpoint.keep
  )
  with claim:
    # ---------------------------------------------------------- restore
    restored = checkpoints.restore(learner.abstract_state)
    for note in checkpoints.notes:
      build.say(note)
    start = restored.step if restored else 0
    if start >= cfg.sft.steps:
      build.say(f"{workdir}: all {start} steps are done")
      return
    try:
      episodes = _demonstrations(cfg, host, workdir, claim)
      rows = pack.pack_sft(episodes, cfg.sft.length)
    except ValueError as e:  # a task without scripts, a damaged or a long line
      raise errors.UserError(f"demonstrations: {e}") from e
    first = build.first_state(cfg, learner)
    state = restored.state if restored else first

    # ------------------------------------------------------------- loop
    weights_of = jax.jit(step_lib.sft_weights)
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
      for step in range(start + 1, cfg.sft.steps + 1):
        index_B = _row_order(cfg, len(rows["tokens_BT"]), step)
        batch = learner.place({k: v[index_B] for k, v in rows.items()})
        batch["weight_BT"] = weights_of(batch["roles_BT"])
        state, stats = learner.update(state, batch)
        n_tokens += batch["tokens_BT"].size
        row = metrics.finalize(stats) | {"tokens_sampled": n_tokens}
        log.write(step, row)
        bar.update(step, row)
        if step % (cfg.checkpoint.every * 20) == 0 or step == cfg.sft.steps:
          checkpoints.save(step, state, {"tokens": n_tokens})


def _row_order(cfg: config_lib.Config, n_rows: int, step: int) -> np.ndarray:
  """Rows of one update: epochs of shuffled rows, cut where they end."""
  start = (step - 1) * cfg.sft.rows
  picked = []
  while len(picked) < cfg.sft.rows:
    epoch, at = divmod(start + len(picked), n_rows)
    order = np.random.default_rng([cfg.seed, epoch]).permutation(n_rows)
    picked.extend(order[at : at + cfg.sft.rows - len(picked)])
  return np.array(picked)


def _demonstrations(
  cfg: config_lib.Config,
  host: wiring.HostParts,
  workdir: pathlib.Path,
  claim: runlog.Run,
) -> list[episode_lib.Episode]:
  """Reads the workdir's demonstrations, or makes them with the real tool."""
  path = workdir / DEMONSTRATIONS
  if path.exists():
    return list(episode_lib.read_episodes(path))
  scripts = [
    demonstrations.make_demonstration(p, cfg.seed, host.rates)
    for p in host.train_task.problems(0, cfg.sft.n_demos)
  ]
  n_turns = sum(len(script.turns) for script in scripts)
  with (
    build.started_sandbox(host) as sandbox,
    progress_lib.Progress(
      "demonstrations", n_turns, is_shown=cfg.log.progress
    ) as bar,
  ):
    claim.note(sandbox=sandbox.info())
    episodes = demonstrations.run_demonstrations(
      scripts,
      host.make_toolbox(sandbox),
      host.chat,
      progress=lambda n, _: bar.update(n),
    )
  partial = path.with_suffix(".unfinished")
  partial.write_text("".join(e.to_json() + "\n" for e in episodes))
  partial.rename(path)
  return episodes
