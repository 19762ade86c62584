"""Rollouts of a run's newest checkpoint, saved to be read or to be replayed.

The command is `rollout` (`roc/rollout.py` is the agent loop). Problems are cut
into shards, a file each, and a file is there only when it is whole: the same
command goes on where it was killed and leaves the same bytes. A record beside
the files says what drew them, so that no two policies are mixed.

The run itself is only read. Training may go on in the same workdir.
"""

import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import re
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Any

import rich.console
import rich.table

from roc import (
  build,
  errors,
  layout,
  parameters,
  pretrained,
  records,
  rollout,
  wiring,
)
from roc import config as config_lib
from roc import progress as progress_lib
from roc.host import episode as episode_lib
from roc.host import traces
from roc.host.tasks import problem as problem_lib

_RECORD = "collect.json"
# What the engine counts (`engine.Engine.stats`), as the table shows it.
_ENGINE_FIGURES = {
  "decode_tokens_per_s": ("tokens/s, decoding", "{:,.0f}"),
  "prefill_tokens_per_s": ("tokens/s, reading prompts", "{:,.0f}"),
  "extend_tokens_per_s": ("tokens/s, reading tool answers", "{:,.0f}"),
  "slot_occupancy": ("slot use", "{:.1%}"),
  "cache_use": ("cache use", "{:.1%}"),
  "cache_use_max": ("cache use, most", "{:.1%}"),
  "compilations": ("compilations", "{:.0f}"),
}


@dataclasses.dataclass(frozen=True)
class Shard:
  """Some problems of the task's order, and the file that holds them."""

  path: pathlib.Path
  first: int  # place of the first problem
  problems: list[problem_lib.Problem]


@dataclasses.dataclass
class Tally:
  """Counts over rollouts; those of outcome VOID are only counted as such."""

  rollouts: int = 0
  void: int = 0
  correct: int = 0
  calls: int = 0
  failed_calls: int = 0
  tokens: int = 0  # sampled

  def add(self, episodes: Iterable[episode_lib.Episode]) -> None:
    """Counts finished rollouts."""
    for e in episodes:
      self.rollouts += 1
      if e.outcome == layout.Outcome.VOID:
        self.void += 1
        continue
      self.correct += e.outcome == layout.Outcome.CORRECT
      self.calls += e.n_judged_calls
      self.failed_calls += e.n_failed_calls
      self.tokens += e.n_model_tokens

  @property
  def accuracy(self) -> float:
    """Share of correct ones; 0 of nothing."""
    return self.correct / max(1, self.rollouts - self.void)


@dataclasses.dataclass
class Spent:
  """Seconds of this process, and the tokens that it sampled in them."""

  wall: float = 0.0
  tools: float = 0.0
  tokens: int = 0


def run(cfg: config_lib.Config, workdir: pathlib.Path) -> None:
  """Draws the rollouts that `cfg.collect` asks for and that are not there.

  Raises:
    errors.UserError: no checkpoint, too few problems, files of other settings,
      or a directory that is in use or cannot be written.
  """
  cfg = pretrained.settle(cfg)
  host = build.host_parts(cfg)
  task = host.eval_task if cfg.collect.task == "eval" else host.train_task
  build.check_lengths(cfg, host, [task])
  problems = choose(cfg.collect, host)
  policy = build.make_policy(cfg, host)
  loaded = parameters.load_policy(cfg, workdir, policy, build.make_mesh(cfg))
  build.say(loaded.where)
  folder = workdir / "rollouts" / f"collect_{cfg.collect.task}"
  with _claimed(folder, _made_with(cfg, host, loaded.name)):
    shards = cut(folder, cfg.collect, problems)
    present = [shard for shard in shards if shard.path.exists()]
    missing = [shard for shard in shards if shard not in present]
    tally, rows = Tally(), {}
    for shard in present:
      tally.add(_read(shard, cfg.collect.samples))
    if present:
      build.say(
        f"{folder}: {len(present)} of {len(shards)} files are there already"
      )
    if missing:
      with build.started_sandbox(host) as sandbox:
        toolbox = host.make_toolbox(sandbox)
        loop = build.make_loop(policy, cfg.sampling, host, toolbox)
        loop.sampler.set_params(loaded.params)
        spent = _draw(cfg, host, loop, missing, tally)
        rows = speed(spent, loop.sampler.stats())
  table = rich.table.Table("rollouts", f"{tally.rollouts}")
  for name, value in (quality(tally) | rows).items():
    table.add_row(name, value)
  rich.console.Console(highlight=False).print(table)
  build.say(f"written: {folder}")


def choose(
  settings: config_lib.CollectConfig, host: wiring.HostParts
) -> list[problem_lib.Problem]:
  """The problems that are asked for, in the task's order.

  Raises:
    errors.UserError: the task has fewer.
  """
  task = host.eval_task if settings.task == "eval" else host.train_task
  end = settings.first + settings.n_problems
  # A task of a file starts over at its end, and the same problem again would
  # give the same rollouts again. One that is made up as it goes has no length.
  if isinstance(task, collections.abc.Sized) and end > len(task):
    raise errors.UserError(
      f"config.collect.first + config.collect.n_problems is {end}, and the"
      f" {settings.task} task ends after {len(task)}; lower one of them"
    )
  return task.problems(settings.first, settings.n_problems)


def cut(
  folder: pathlib.Path,
  settings: config_lib.CollectConfig,
  problems: Sequence[problem_lib.Problem],
) -> list[Shard]:
  """Assigns problems to files, named by the places that they hold.

  Raises:
    errors.UserError: a file that is there holds some of a shard's problems, and
      not just them.
  """
  shards = []
  present = {
    path: range(int(match[1]), int(match[2]) + 1)
    for path in sorted(folder.glob("*.jsonl"))
    if (match := re.search(r"_(\d+)-(\d+)$", path.stem))
  }
  for start in range(0, len(problems), settings.shard):
    part = list(problems[start : start + settings.shard])
    first, last = settings.first + start, settings.first + start + len(part) - 1
    path = folder / f"{settings.task}_{first:06d}-{last:06d}.jsonl"
    for other, places in present.items():
      if other != path and places.start <= last and first < places.stop:
        raise errors.UserError(
          f"{other} holds some of the problems {first} to {last} already, cut"
          " otherwise; set config.collect.first, n_problems and shard so that"
          " files agree, or move that file away"
        )
    shards.append(Shard(path, first, part))
  return shards


def quality(tally: Tally) -> dict[str, str]:
  """Rows of the table that say how the rollouts went."""
  n_judged = tally.rollouts - tally.void
  rows = {}
  if n_judged:
    rows["accuracy"] = f"{tally.accuracy:.1%}"
  if tally.calls:
    rows["failing calls"] = (
      f"{tally.failed_calls / tally.calls:.1%} of {tally.calls}"
    )
  if n_judged:
    rows["mean tokens"] = f"{tally.tokens / n_judged:.1f}"
  if tally.void:
    rows["void (the environment's fault)"] = f"{tally.void}"
  return rows


def speed(spent: Spent, engine: Mapping[str, float]) -> dict[str, str]:
  """Rows of the table that say where the time went.

  Args:
    spent: seconds and tokens of the loop.
    engine: what the engine counted; rows are made of the keys that are there.
  """
  rows = {}
  if spent.wall:
    rows["tokens/s"] = f"{spent.tokens / spent.wall:,.0f}"
  for key, (name, form) in _ENGINE_FIGURES.items():
    if key in engine:
      rows[name] = form.format(engine[key])
  if spent.wall:
    rows["waiting for tools"] = f"{spent.tools / spent.wall:.1%} of the time"
  return rows


def _draw(
  cfg: config_lib.Config,
  host: wiring.HostParts,
  loop: rollout.AgentLoop,
  shards: Sequence[Shard],
  tally: Tally,
) -> Spent:
  """Draws and writes shard after shard; `tally` grows."""
  c, spent = cfg.collect, Spent()
  for shard in shards:
    build.check_prompts(loop, shard.problems, cfg.sampling.cache_length)
  n_there = tally.rollouts
  n_all = n_there + c.samples * sum(len(shard.problems) for shard in shards)
  with progress_lib.Progress(
    "rollout", n_all, start=n_there, is_shown=cfg.log.progress
  ) as bar:

    def show(n_done: int, n_of_shard: int) -> None:
      if n_done < n_of_shard:  # what follows a whole shard is shown with it
        bar.update(tally.rollouts + n_done)

    for shard in shards:
      n_tokens = tally.tokens
      start = time.perf_counter()
      groups, timing = loop.run(
        shard.problems,
        c.samples,
        seed=cfg.seed,
        step=c.step,
        first=shard.first,
        drawn_by="rollout",
        stream=c.step,
        on_finished=show,
      )
      spent.wall += time.perf_counter() - start
      spent.tools += timing.tools
      traces.write(shard.path, groups, host.tokenizer)
      for group in groups:
        tally.add(group)
      spent.tokens += tally.tokens - n_tokens
      bar.update(tally.rollouts, {"accuracy": tally.accuracy})
  return spent


def _read(shard: Shard, samples: int) -> list[episode_lib.Episode]:
  """The rollouts of a file that an earlier run left.

  Raises:
    errors.UserError: it was damaged, or the task has other problems by now.
  """
  try:
    episodes = list(episode_lib.read_episodes(shard.path))
  except ValueError as e:
    raise errors.UserError(
      f"{e}, which is not as it was written; move that file away to draw it"
      " again"
    ) from e
  wanted = [p.id for p in shard.problems for _ in range(samples)]
  if [e.task_id for e in episodes] != wanted:
    raise errors.UserError(
      f"{shard.path} does not hold the rollouts of the problems that the task"
      f" has there now; move {shard.path.parent} away to start over"
    )
  return episodes


# ---------------------------------------------------------------- the record


def _made_with(
  cfg: config_lib.Config, host: wiring.HostParts, checkpoint: str
) -> dict[str, Any]:
  """Everything that a rollout depends on besides its problem and its id."""
  c, flat = cfg.collect, config_lib.flatten(cfg)
  names = ("seed", "collect.task", "collect.samples", "collect.step")
  return {
    "checkpoint": checkpoint,
    **{key: flat[key] for key in names},
    **{
      key: value
      for key, value in flat.items()
      if key.startswith(("model.", "sampling."))
    },
    "tokenizer": host.tokenizer.fingerprint,
    **{k: v for k, v in build.contents(host).items() if c.task in k},
    **records.statements(host.gin_text),
  }


@contextlib.contextmanager
def _claimed(
  folder: pathlib.Path, made_with: Mapping[str, Any]
) -> Generator[None]:
  """Keeps other processes out and makes sure that no two policies mix."""
  lock = records.lock(folder, "directory", "copy the run elsewhere")
  try:
    path = folder / _RECORD
    if any(folder.glob("*.jsonl")):
      _require_same(path, made_with)
    else:
      records.write_json(path, made_with)
    for leftover in folder.glob("*.unfinished"):
      leftover.unlink()
    yield
  finally:
    os.close(lock)


def _require_same(path: pathlib.Path, made_with: Mapping[str, Any]) -> None:
  remedy = (
    f"move {path.parent} away to start over, it is whole in itself and can be"
    " replayed from anywhere"
  )
  try:
    before = json.loads(path.read_bytes())
    defaults = config_lib.defaults(config_lib.Config())
    changed = records.differences(before, made_with, defaults)
  except (OSError, ValueError, AttributeError) as e:
    raise errors.UserError(
      f"cannot tell what drew the rollouts beside {path}, which cannot be read"
      f" ({e}); {remedy}"
    ) from None
  if changed:
    raise errors.UserError(
      f"the rollouts in {path.parent} were drawn with other settings:"
      f" {changed} differ; give the old ones again, or {remedy}"
    )
