"""What supervised training learns from: conversations, or demonstrations.

`config.sft.data` names JSONL files of conversations. Without it demonstrations
are scripted, run against the real tool once and kept in the workdir.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from roc import build, errors, jsonl, layout, runlog, wiring
from roc import config as config_lib
from roc import progress as progress_lib
from roc.host import conversations, corpus, pack
from roc.host import episode as episode_lib
from roc.host.tasks import demonstrations

DEMONSTRATIONS = "demonstrations.jsonl"
_CHECKOUT = pathlib.Path(__file__).resolve().parent.parent
_SPLIT = 0x5E1D  # a stream of random numbers of its own
_SAY_EVERY = 1000  # conversations


@dataclasses.dataclass(frozen=True)
class Lessons:
  """Lessons to learn, and others to measure on; every one fits a row."""

  learnt: list[pack.Compact]
  heldout: list[pack.Compact]


def paths(cfg: config_lib.Config) -> list[pathlib.Path]:
  """Files of `config.sft.data`, from here or from the checkout.

  Raises:
    errors.UserError: one does not exist.
  """
  found = []
  for name in cfg.sft.data:
    places = [jsonl.find(name), jsonl.find(_CHECKOUT / name)]
    files = next((x for x in places if x and x[0].is_file()), [])
    if not files:
      raise errors.UserError(
        f"config.sft.data: {name} does not exist; give paths of JSONL files,"
        " from here or from the checkout"
      )
    found += files
  return found


def identity(cfg: config_lib.Config) -> dict[str, str]:
  """What the files hold, as a part of what makes a run that run."""
  if not cfg.sft.data:
    return {}
  try:
    return {"sft.data": conversations.digest(paths(cfg))}
  except ValueError as e:
    raise errors.UserError(str(e)) from e


def read(
  cfg: config_lib.Config,
  host: wiring.HostParts,
  workdir: pathlib.Path,
  claim: runlog.Run,
) -> Lessons:
  """Reads all lessons, and says how many there are.

  Raises:
    errors.UserError: a bad file or line, a task without scripts, a lesson that
      is too long, or none left.
  """
  try:
    if cfg.sft.data:
      found = _conversations(cfg, host)
    else:
      found = _demonstrations(cfg, host, workdir, claim)
    lessons = _fit(cfg, [pack.Compact.of(episode) for episode in found])
  except ValueError as e:
    what = "" if cfg.sft.data else "demonstrations: "
    raise errors.UserError(f"{what}{e}") from e
  n_heldout = 0
  if cfg.sft.heldout:
    n_heldout = max(round(cfg.sft.heldout * len(lessons)), 1)
  if n_heldout >= len(lessons):
    raise errors.UserError(
      f"{len(lessons)} lessons with config.sft.heldout={cfg.sft.heldout} leave"
      " nothing to learn from; lower it or give more of them"
    )
  order = np.random.default_rng([cfg.seed, _SPLIT]).permutation(len(lessons))
  apart = set(order[:n_heldout].tolist())
  learnt = [x for i, x in enumerate(lessons) if i not in apart]
  heldout = [x for i, x in enumerate(lessons) if i in apart]
  if cfg.sft.data:
    n_tokens = sum(len(x.token_ids) for x in lessons)
    build.say(
      f"{len(learnt)} conversations to learn and {n_heldout} held out,"
      f" {n_tokens:,} tokens"
    )
  return Lessons(learnt, heldout)


def _fit(
  cfg: config_lib.Config, lessons: Sequence[pack.Compact]
) -> list[pack.Compact]:
  """Treats what is longer than a row as `config.sft.overlong` says.

  Raises:
    ValueError: there is something, and it is to be an error; or nothing is
      left.
  """
  length, rule = cfg.sft.length, cfg.sft.overlong
  long = [x for x in lessons if len(x.token_ids) > length]
  if not long:
    return list(lessons)
  longest = max(long, key=lambda x: len(x.token_ids))
  what = (
    f"{len(long)} of {len(lessons)} lessons are longer than"
    f" config.sft.length={length} (the longest, {longest.task_id}, has"
    f" {len(longest.token_ids)} tokens)"
  )
  if rule == "error":
    raise ValueError(
      f"{what}; raise it, or set config.sft.overlong to drop or truncate"
    )
  fitting = [
    pack.Compact.of(x, length)
    for x in lessons
    if rule == "truncate" or len(x.token_ids) <= length
  ]
  kept = [x for x in fitting if np.any(x.roles == layout.Role.MODEL)]
  n_empty = len(fitting) - len(kept)
  done = "cut off there" if rule == "truncate" else "left out"
  also = f"; {n_empty} with nothing to learn by then left out" * bool(n_empty)
  build.say(f"{what}: {done}{also}")
  if not kept:
    raise ValueError(f"{what}, and nothing is left; raise it")
  return kept


def _conversations(
  cfg: config_lib.Config, host: wiring.HostParts
) -> Iterator[episode_lib.Episode]:
  """Conversations of the files, written down in the run's chat format."""
  files = paths(cfg)
  n_bytes = max(sum(path.stat().st_size for path in files), 1)
  # Nothing is run: it says which tool there is.
  writer = corpus.Writer(host.chat, host.make_toolbox(host.make_sandbox()))
  with progress_lib.Progress(
    "reading", n_bytes, is_shown=cfg.log.progress and n_bytes > 1 << 20
  ) as bar:
    for n, found in enumerate(conversations.read(files), start=1):
      yield writer.episode(found)
      if n % _SAY_EVERY == 0:
        bar.update(found.n_read)


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
