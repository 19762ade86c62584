"""GRPO with resample on correct, from rollouts to update, step by step.

A step draws O rollouts for each of N problems with the policy and the Python
tool, keeps G of each group, and makes one or more updates on the rows that
remain. Everything random is a function of the seed, the step, the problem's
place in the run's order and the rollout's id, and a checkpoint holds all that a
step changes, so a run that is killed at any moment and started again continues
as if nothing had happened.
"""

import dataclasses
import functools
import pathlib
import time
from typing import Any

import jax
import numpy as np
import optax

from roc import (
  build,
  curves,
  errors,
  evaluate,
  layout,
  parameters,
  pretrained,
  replay,
  rollout,
  runlog,
  updates,
  wiring,
)
from roc import config as config_lib
from roc import progress as progress_lib
from roc.core import metrics, resample
from roc.core import trajectories as trajectories_lib
from roc.device import checkpoint, selection
from roc.device import learner as learner_lib
from roc.device import step as step_lib
from roc.host import episode as episode_lib
from roc.host import pack, tools, traces
from roc.host import tokenizer as tokenizer_lib

# Steps without any rollout, in a row, that end a run.
_MAX_VOID_STEPS = 3


@dataclasses.dataclass
class Cursor:
  """What a run counts besides the policy; saved with every checkpoint."""

  next_problem: int = 0
  rollouts_drawn: int = 0
  tokens_sampled: int = 0
  void_steps: int = 0  # the latest ones, in a row, that left no rollout


def _sandbox_figures(stats: dict[str, Any]) -> dict[str, float]:
  """What of the sandbox's counters belongs into a row of metrics."""
  return {
    "time/call_p50": stats["p50_ms"] / 1e3,
    "time/call_p99": stats["p99_ms"] / 1e3,
    "time/call_wait_p50": stats["wait_p50_ms"] / 1e3,
    "time/call_wait_p99": stats["wait_p99_ms"] / 1e3,
    "sandbox/restarts": float(stats["restarts"]),
  }


class Trainer:
  """The parts of a run and what one step does with them."""

  def __init__(
    self,
    cfg: config_lib.Config,
    host: wiring.HostParts,
    toolbox: tools.Toolbox,
    policy: Any,
    learner: learner_lib.Learner,
    saved: replay.Replay | None = None,
  ):
    """Builds the loop and the evaluator; `saved` stands in for sampling."""
    self.cfg = cfg
    self._saved = saved
    self.cursor = Cursor()
    self.origin: dict[str, Any] = {}  # see `parameters.Beginning`
    self._host = host
    self._toolbox = toolbox
    self._policy = policy
    self._learner = learner
    self._loop = build.make_loop(policy, cfg.sampling, host, toolbox)
    self.evaluator = evaluate.Evaluator(cfg, policy, host, toolbox, self._loop)
    self._select = jax.jit(
      functools.partial(
        selection.select,
        filter_config=cfg.filter,
        loss_config=cfg.loss,
        max_tokens=cfg.sampling.max_tokens,
      )
    )
    self.updates = updates.Updates(cfg, policy, learner)

  def params(self, state: step_lib.TrainState) -> Any:
    """The policy's parameters."""
    return self._learner.params(state.params)

  def step(
    self, state: step_lib.TrainState, step: int, bar: progress_lib.Progress
  ) -> tuple[step_lib.TrainState, dict[str, float], list]:
    """One step of training.

    Args:
      state: before the step; donated.
      step: its number, from 1.
      bar: shows the phases.

    Returns:
      The state after it, the metrics row, and the annotated rollouts.
    """
    started = time.perf_counter()
    bar.phase("sampling")
    groups, timing = self._draw(self.params(state), step)
    scored = time.perf_counter()
    bar.phase("scoring")
    selected = self._choose(groups, step)
    row = metrics.finalize(selected.metrics)
    updating = time.perf_counter()
    bar.phase("update")
    state, made = self.updates(state, selected.batch, step)
    row |= made
    ended = time.perf_counter()
    row |= {
      "time/generate": timing.generate,
      "time/tools": timing.tools,
      "time/text": timing.text,
      "time/score": updating - scored,
      "time/update": ended - updating,
      "time/step": ended - started,
    }
    row |= _sandbox_figures(self._toolbox.stats())
    row |= self._engine_figures(timing)
    return state, row | self._count(groups), groups

  def _draw(self, params: Any, step: int):
    f, t = self.cfg.filter, self.cfg.train
    if self._saved is not None:
      groups = self._saved.groups(self.cursor.next_problem, t.prompts, step)
      return groups, rollout.Timing()
    first = self.cursor.next_problem
    problems = self._host.train_task.problems(first, t.prompts)
    build.check_prompts(self._loop, problems, self.cfg.sampling.cache_length)
    self._loop.sampler.set_params(params)
    self._loop.sampler.stats()  # what an evaluation in between did
    groups, timing = self._loop.run(
      problems, f.n_drawn, seed=self.cfg.seed, step=step, first=first
    )
    _report_broken(params, step, groups)
    return groups, timing

  def _engine_figures(self, timing: rollout.Timing) -> dict[str, float]:
    """How the engine was used; it depends on the clock, so time/ all of it."""
    if self._saved is not None:
      return {}
    row = self._loop.sampler.stats()
    row["tool_wait_share"] = timing.tools / (timing.tools + timing.generate)
    return {f"time/{name}": value for name, value in row.items()}

  def _choose(
    self, groups: list[list[episode_lib.Episode]], step: int
  ) -> selection.Selection:
    longest = max(len(e) for g in groups for e in g)
    arrays = pack.pack(
      groups,
      n_rollouts=self.cfg.filter.n_drawn,
      n_calls=self.cfg.sampling.max_calls,
      length=pack.bucket_length(longest, self.cfg.train.buckets),
    )
    selected = self._select(
      trajectories_lib.Trajectories(**arrays),
      resample.step_key(self.cfg.seed, step),
    )
    traces.annotate(
      groups,
      mode=self.cfg.filter.mode,
      keep_NO=np.asarray(selected.keep_NO),
      is_live_NO=np.asarray(selected.is_live_NO),
      advantage_NO=np.asarray(selected.advantage_NO),
      p_err_NO=np.asarray(selected.penalties.p_err_NO),
      p_format_NO=np.asarray(selected.penalties.p_format_NO),
    )
    return selected

  def _count(self, groups) -> dict[str, float]:
    episodes = [e for g in groups for e in g]
    self.cursor.next_problem += len(groups)
    self.cursor.rollouts_drawn += len(episodes)
    self.cursor.tokens_sampled += sum(e.n_model_tokens for e in episodes)
    void = episode_lib.void_shares(groups)
    is_lost = void["errors/void_frac"] == 1
    self.cursor.void_steps = self.cursor.void_steps + 1 if is_lost else 0
    return void | {
      "rollouts_drawn": self.cursor.rollouts_drawn,
      "tokens_sampled": self.cursor.tokens_sampled,
    }

  def check_void(
    self,
    row: dict[str, float],
    step: int,
    checkpoints: checkpoint.Checkpoints,
  ) -> None:
    """Warns of a step that lost many rollouts to the environment.

    Raises:
      errors.UserError: the latest steps lost all of theirs.
    """
    share = row["errors/void_frac"]
    if share <= self.cfg.log.void_warning and share < 1:
      return
    reasons = ", ".join(
      f"{reason.name.lower()} {lost:.0%}"
      for reason in layout.VoidReason
      if (lost := row[f"errors/void_{reason.name.lower()}"])
    )
    if self.cursor.void_steps >= _MAX_VOID_STEPS:
      raise errors.UserError(
        f"step {step}: the environment failed every rollout of"
        f" {self.cursor.void_steps} steps in a row ({reasons}), so nothing is"
        f" learnt; {updates.newest(checkpoints)}; mend the environment and run"
        " the same command again"
      )
    build.say(
      f"step {step}: {share:.0%} of the rollouts were lost to the environment"
      f" ({reasons}) and are outside of their groups"
    )


def _report_broken(
  params: Any, step: int, groups: list[list[episode_lib.Episode]]
) -> None:
  """Says that logits were not finite; stops a run that has nothing else.

  Raises:
    errors.UserError: no rollout of the step is left.
  """
  reasons = [e.void_reason for g in groups for e in g]
  n_broken, n_all = reasons.count(layout.VoidReason.LOGITS), len(reasons)
  if not n_broken:
    return
  norm = float(optax.tree.norm(params))
  what = (
    f"step {step}: the logits of {n_broken} of {n_all} rollouts were not finite"
    f" (norm of the parameters: {norm:.4g})"
  )
  if n_broken == n_all:
    raise errors.UserError(
      f"{what}; go back to an older checkpoint (--restore_step=N) with a lower"
      " config.train.lr or config.train.grad_clip and --allow_config_change"
    )
  build.say(f"{what}; they are left out of their groups")


def read_replay(cfg: config_lib.Config, policy: Any) -> replay.Replay:
  """The rollouts of `cfg.train.replay`, checked, and a line about them.

  Raises:
    errors.UserError: they cannot be trained on; says where and what to do.
  """
  needs = replay.Needs(
    n_drawn=cfg.filter.n_drawn,
    vocab_size=policy.n_ids or policy.config.vocab_size,
    max_length=cfg.train.buckets[-1],
    max_calls=cfg.sampling.max_calls,
    temperature=cfg.sampling.temperature,
  )
  saved = replay.Replay(pathlib.Path(cfg.train.replay), needs)
  build.say(saved.about(cfg.train.steps, cfg.train.prompts))
  return saved


def run(
  cfg: config_lib.Config,
  workdir: pathlib.Path,
  *,
  restore_step: int | None = None,
) -> None:
  """Trains to `cfg.train.steps`, or goes on from the newest checkpoint.

  Args:
    cfg: of the run.
    workdir: of the run.
    restore_step: go back to the checkpoint of this step instead.

  Raises:
    errors.UserError: bad input, before any work starts.
  """
  cfg = pretrained.settle(cfg)
  # ------------------------------------------------------------- parts
  host = build.host_parts(cfg)
  policy = build.make_policy(cfg, host)
  learner = updates.make_learner(cfg, policy)
  saved = read_replay(cfg, policy) if cfg.train.replay else None
  drawn_from = [] if saved else [host.train_task]
  build.check_lengths(cfg, host, [*drawn_from, host.eval_task])
  data = build.contents(host) | ({} if saved is None else saved.identity)
  claim = build.claim(cfg, host, workdir, "train", data=data)
  checkpoints = build.checkpoints(cfg, workdir)
  with claim, build.started_sandbox(host) as sandbox:
    claim.note(sandbox=sandbox.info())
    build.check_answers(host, sandbox)
    toolbox = host.make_toolbox(sandbox)
    trainer = Trainer(cfg, host, toolbox, policy, learner, saved)

    # ------------------------- where from: own checkpoint, init_from, nothing
    restored = checkpoints.restore(learner.abstract_state, restore_step)
    for note in checkpoints.notes:
      build.say(note)
    start = restored.step if restored else 0
    if start >= cfg.train.steps:
      build.say(f"{workdir}: all {start} steps are done")
      return
    if restored:
      if cfg.loss.kl_coef:
        reference = parameters.load_reference(checkpoints, learner)
        trainer.updates.set_reference(reference)
      state = parameters.go_on(cfg, learner, restored)
      trainer.origin = parameters.origin_of(restored)
      trainer.cursor = Cursor(**restored.extra["cursor"])
      build.say(f"going on after step {start}")
    else:
      begun = parameters.begin(
        cfg, learner, keep_optimizer=cfg.train.keep_optimizer
      )
      state, trainer.origin = begun.state, begun.origin
      claim.note(**begun.origin)
      if cfg.loss.kl_coef:
        reference = parameters.keep_reference(checkpoints, begun)
        trainer.updates.set_reference(reference)
      del begun  # the first update donates its state

    if restore_step is not None:
      build.go_back(checkpoints, workdir, restore_step)
    _loop(trainer, workdir, checkpoints, state, start, host.tokenizer)
    build.say(curves.time_split(curves.read(workdir / runlog.METRICS)))


def _loop(
  trainer: Trainer,
  workdir: pathlib.Path,
  checkpoints: checkpoint.Checkpoints,
  state: step_lib.TrainState,
  start: int,
  tokenizer: tokenizer_lib.Tokenizer,
) -> None:
  """Steps start + 1 to the last: train, evaluate, write down, save."""
  cfg = trainer.cfg
  n_steps, saved_step = cfg.train.steps, start or None

  def evaluated(state: step_lib.TrainState, step: int) -> evaluate.Summary:
    row, groups = trainer.evaluator.run(trainer.params(state), step)
    traces.write(traces.evaluation_path(workdir, step), groups, tokenizer)
    return row

  with (
    runlog.MetricsLog(
      workdir, restored_step=saved_step, tensorboard=cfg.log.tensorboard
    ) as log,
    progress_lib.Progress(
      "train", n_steps, start=start, is_shown=cfg.log.progress
    ) as bar,
  ):
    if not start:
      bar.phase("evaluation")
      log.write(0, row := evaluated(state, 0))
      bar.update(0, row)
    for step in range(start + 1, n_steps + 1):
      state, row, groups = trainer.step(state, step, bar)
      is_last = step == n_steps
      if is_last or _is_due(step, cfg.log.traces_every, first=1):
        traces.write(traces.path_of(workdir, step), groups, tokenizer)
      updates.check_finite(row, step, checkpoints, "train")
      trainer.check_void(row, step, checkpoints)
      if is_last or _is_due(step, cfg.eval.every):
        bar.phase("evaluation")
        row |= evaluated(state, step)
      log.write(step, row)
      bar.update(step, row)
      if is_last or _is_due(step, cfg.checkpoint.every):
        bar.phase("checkpoint")
        cursor = dataclasses.asdict(trainer.cursor)
        checkpoints.save(step, state, {"cursor": cursor} | trainer.origin)


def _is_due(step: int, every: int, first: int | None = None) -> bool:
  """Whether something that happens every so many steps (0: never) is due."""
  return bool(every) and (step % every == 0 or step == first)
