"""One entry point: `python -m roc.main COMMAND [--flags]`.

Reads the command line, resolves the configuration, and calls the command's
program: `run(cfg, workdir)` in the module of its name, or in the one that the
command gives. Whatever a user can get wrong ends here as one sentence and exit
code 2; programs are imported only when they run, so that `--help` is quick.
"""

import dataclasses
import errno
import importlib
import os
import pathlib
import re
import shlex
import sys
import textwrap
import typing
from collections.abc import Sequence
from types import ModuleType
from typing import Any, Literal

from absl import flags

from roc import cli, errors

if typing.TYPE_CHECKING:
  from roc import config as config_lib


@dataclasses.dataclass(frozen=True)
class Command:
  """A program and what `--help` says of it."""

  summary: str
  about: str
  example: str
  config: cli.Source | Literal["own"] = "needed"  # own: it reads its flags
  module: str = ""  # of roc, with the program; by default the command's name
  aliases: tuple[cli.Alias, ...] = ()
  is_run: bool = False  # makes the workdir the run of one configuration
  goes_on: bool = True  # where it was stopped, if it is given again


COMMANDS = {
  "sft": Command(
    "teach a model to call the tool, from conversations or demonstrations",
    "Trains on the conversations of config.sft.data. Without any it runs"
    " scripted demonstrations through the real sandbox and trains on those."
    " Start it again to go on from the last checkpoint.",
    "sft --config=experiments/quickstart.py --workdir=runs/quickstart/sft",
    is_run=True,
  ),
  "train": Command(
    "reinforcement learning with resample on correct",
    "Draws rollouts that call the tool, keeps the ones worth learning from and"
    " updates the policy. Start it again to go on from the last checkpoint.",
    "train --config=experiments/quickstart.py --workdir=runs/quickstart"
    " --config.init_from=runs/quickstart/sft",
    is_run=True,
    aliases=(
      cli.Alias(
        "replay",
        "train.replay",
        "DIRECTORY",
        "train on the rollouts saved there instead of drawing any; short for"
        " --config.train.replay",
      ),
    ),
  ),
  "evaluate": Command(
    "accuracy of a checkpoint on held-out problems",
    "Evaluates the newest checkpoint of a workdir, with the tool and without.",
    "evaluate --workdir=runs/quickstart --config.eval.n_problems=512",
    "saved",
  ),
  "rollout": Command(
    "save rollouts of a checkpoint, to read or to train on",
    "Draws rollouts with the newest checkpoint of a workdir into"
    " WORKDIR/rollouts/collect_TASK/, one line of JSON each; the settings"
    " config.collect.* say of which problems and how many. Start it again to go"
    " on: files that are there are not drawn again. Training may go on in the"
    " workdir meanwhile.",
    "rollout --workdir=runs/quickstart --config.collect.n_problems=64"
    " --config.collect.samples=8",
    "saved",
    module="collect",
  ),
  "report": Command(
    "write report.html and print the table of a finished or running run",
    "Reads the metrics and traces of a workdir and writes one page that needs"
    " nothing else.",
    "report --workdir=runs/quickstart",
    "none",
  ),
  "compare": Command(
    "train plain GRPO, controls and both RoC filters over seeds",
    "Trains a policy from demonstrations for each seed (or starts from"
    " config.init_from), trains each arm from it and draws them together; what"
    " is finished already is not trained again.",
    "compare --config=experiments/roc_vs_grpo.py --workdir=runs/comparison",
  ),
  "export": Command(
    "write the policy of a run as a Hugging Face folder",
    "Its own --help tells more.",
    "export --workdir=runs/quickstart --output=models/quickstart",
    "own",
    goes_on=False,
  ),
  "filter": Command(
    "apply resample on correct to rollouts in files; show what it keeps",
    "Its own --help tells more.",
    "filter runs/quickstart/rollouts/step_000001.jsonl --all",
    "own",
    goes_on=False,
  ),
  "render": Command(
    "write conversations with a model's chat template, as text and ids",
    "Its own --help tells more.",
    "render --model=DIR --input=FILE.jsonl",
    "own",
    goes_on=False,
  ),
  "parse": Command(
    "find the tool calls in a turn of a model",
    "Its own --help tells more.",
    "parse --input=FILE.txt",
    "own",
    goes_on=False,
  ),
  "verify": Command(
    "compare an answer with the right one, as the reward does",
    "Its own --help tells more.",
    "verify --gold=1/2 --answer=0.5",
    "own",
    goes_on=False,
  ),
  "generate": Command(
    "let a Hugging Face model write, with the tool or without",
    "Its own --help tells more.",
    "generate --model=DIR --prompt='What is 12 * 13?' --tool=python",
    "own",
    goes_on=False,
  ),
  "score": Command(
    "log-probs and entropies of given tokens under a Hugging Face model",
    "Its own --help tells more.",
    "score --model=DIR --input=FILE.jsonl",
    "own",
    goes_on=False,
  ),
  "convert": Command(
    "solutions of a data set as conversations that call the tool",
    "Its own --help tells more.",
    "convert gsm8k --input=FILE.jsonl --output=FILE.jsonl",
    "own",
  ),
  "sandbox": Command(
    "run a program as a model's tool call would; show what confines it",
    "Its own --help tells more.",
    "sandbox run FILE.py",
    "own",
    goes_on=False,
  ),
}


def main(argv: Sequence[str] | None = None) -> int:
  """Runs a command line and returns the exit code.

  Args:
    argv: what follows the program's name; by default the process's own.

  Returns:
    0 done, 2 the user's error (one sentence on stderr), 130 interrupted.
  """
  argv = list(sys.argv[1:] if argv is None else argv)
  try:
    code = _dispatch(argv)
    sys.stdout.flush()  # here and not at exit, where nobody hears of a failure
    return code
  except errors.UserError as e:
    print(f"error: {e}", file=sys.stderr)
    return 2
  except BrokenPipeError:
    # Whoever read the output has enough, as in `... | head`.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
  except KeyboardInterrupt:
    if not argv or argv[0] not in COMMANDS or not COMMANDS[argv[0]].goes_on:
      print("\ninterrupted", file=sys.stderr)
      return 130
    rest = _without_going_back(argv)
    again = shlex.join(["python", "-m", "roc.main", *rest])
    which = "the same command" if rest == argv else "without --restore_step"
    print(
      f"\ninterrupted; to go on where it was, run {which} again: {again}",
      file=sys.stderr,
    )
    return 130


def _without_going_back(argv: list[str]) -> list[str]:
  """A command line that goes on from the newest checkpoint."""
  rest, remaining = [], iter(argv)
  for arg in remaining:
    if re.fullmatch(r"--?restore_step", arg):
      next(remaining, None)
    elif not re.match(r"--?restore_step=", arg):
      rest.append(arg)
  return rest


def _dispatch(argv: list[str]) -> int:
  if not argv or argv[0] in ("--help", "-h", "help", "--helpfull"):
    print(_overview())
    return 0 if argv else 2
  name, *rest = argv
  if name not in COMMANDS:
    if name.startswith("-"):
      raise errors.UserError(
        f"the command comes before its flags, as in `python -m roc.main train"
        f" {name}`; `python -m roc.main --help` lists the commands"
      )
    raise errors.UserError(
      f"there is no command {name}{errors.closest(name, COMMANDS)};"
      " `python -m roc.main --help` lists them"
    )
  command = COMMANDS[name]
  if command.config == "own":
    return _program(name).main(rest)
  if any(arg in ("--help", "-h", "--helpfull") for arg in rest):
    print(_help(name, command))
    return 0
  values, config = cli.parse(
    name, rest, command.config, command.aliases, is_run=command.is_run
  )
  if values.dry_run:
    print(_dry_run(config, name), end="")
    return 0
  _run(name, command, config, values)
  return 0


def _run(
  name: str,
  command: Command,
  config: "config_lib.Config | None",
  values: flags.FlagValues,
) -> None:
  if not values.workdir:
    raise errors.UserError(
      f"{name} needs a directory to work in, as in --workdir=runs/mine"
    )
  if "://" in values.workdir:
    raise errors.UserError(
      f"--workdir={values.workdir} must be a directory of this machine; where"
      " checkpoints go is --config.checkpoint.directory"
    )
  workdir = pathlib.Path(values.workdir)
  if command.config != "needed" and not workdir.is_dir():
    raise errors.UserError(
      f"workdir {workdir} does not exist; give the --workdir of a run"
    )
  program = _program(command.module or name)
  if command.config != "none":
    from roc import build

    build.use_compilation_cache()
  if command.is_run and values.allow_config_change:
    from roc import places, runlog

    runlog.forget_config(workdir)
    if config is not None and config.checkpoint.directory:
      runlog.forget_store(places.as_path(config.checkpoint.directory))
  try:
    if command.is_run and values.restore_step is not None:
      program.run(config, workdir, restore_step=values.restore_step)
    else:
      program.run(config, workdir)
  except OSError as e:
    if e.errno in (errno.ENOSPC, errno.EDQUOT):
      remedy = "make room"
    elif e.errno == errno.EROFS or _is_forbidden(e, workdir):
      remedy = "mend its permissions"
    else:
      raise
    raise errors.UserError(
      f"cannot write under {workdir}: {e.strerror}; {remedy} and run the same"
      " command again"
    ) from e
  except RuntimeError as e:
    from roc.host import sandbox

    if isinstance(e, sandbox.SandboxError):
      raise errors.UserError(str(e)) from e
    raise


def _is_forbidden(e: OSError, workdir: pathlib.Path) -> bool:
  """Whether it is about the rights to a path in the workdir."""
  if e.errno not in (errno.EACCES, errno.EPERM) or e.filename is None:
    return False
  path = pathlib.Path(os.path.abspath(os.fsdecode(e.filename)))
  return path.is_relative_to(os.path.abspath(workdir))


def _program(name: str) -> ModuleType:
  try:
    return importlib.import_module(f"roc.{name}")
  except ModuleNotFoundError as e:
    # An accelerator's image may lack what the lock file has.
    if e.name == f"roc.{name}":
      raise
    raise errors.UserError(
      f"{name} needs the package {e.name}, which is not installed; run"
      " `make setup` or `pip install -r requirements.txt`"
    ) from e


def _dry_run(config: Any, name: str) -> str:
  if config is None:
    return f"{name} has no configuration\n"
  from roc import build, hub, pretrained, wiring
  from roc import config as config_lib

  texts = config_lib.help_texts()
  shown = []
  if (folder := hub.folder_here(config.pretrained)) is not None:
    config = pretrained.settle(config)
  elif config.pretrained:
    shown += [f"# config.model and the tokenizer: see {config.pretrained}"]
  for key, words in config_lib.choices().items():
    texts[key] = f"{texts[key]} ({' | '.join(words)})".lstrip()
  shown += [
    f"{f'config.{key} = {value!r}':<40}  # {texts[key]}".rstrip(" #")
    for key, value in config_lib.flatten(config).items()
  ]
  gin_text = wiring.read_gin(config.host.gin_files, config.host.gin_bindings)
  if folder is not None or not config.pretrained:
    host = wiring.build_host(
      config.host.gin_files,
      config.host.gin_bindings,
      seed=config.seed,
      pretrained=folder,
    )
    build.shapes(config, host)
  return "\n".join([*shown, "", gin_text.rstrip(), ""])


# ---------------------------------------------------------------------- help


def _overview() -> str:
  width = max(map(len, COMMANDS))
  lines = [f"  {n:<{width}}  {c.summary}" for n, c in COMMANDS.items()]
  return "\n".join(
    [
      "usage: python -m roc.main COMMAND [--flags]",
      "",
      *lines,
      "",
      "`python -m roc.main COMMAND --help` shows a command's flags.",
    ]
  )


def _help(name: str, command: Command) -> str:
  shown = {
    "--config=FILE.py[:VARIANT]": "the experiment, such as"
    " experiments/quickstart.py or experiments/quickstart.py:tiny",
    "--config.SECTION.NAME=VALUE": "another value for one setting; --dry_run"
    " lists them with their meaning",
  }
  if command.config == "saved":
    shown["--config=FILE.py[:VARIANT]"] += "; by default the workdir's own"
  if command.config == "none":
    shown = {}
  for alias in command.aliases:
    shown[f"--{alias.flag}={alias.value}"] = alias.about
  values = cli.define_flags(command.is_run)
  for flag in sorted(values):
    if command.config == "none" and flag != "workdir":
      continue
    text = "--workdir=DIRECTORY" if flag == "workdir" else f"--{flag}"
    shown[text] = values[flag].help
  lines = [f"usage: python -m roc.main {name} [--flags]", ""]
  lines += [*textwrap.wrap(command.about, 78), "", "flags:"]
  for flag, text in shown.items():
    lines.append(f"  {flag}")
    lines += [" " * 6 + line for line in textwrap.wrap(text, 72)]
  lines += ["", "example:", f"  python -m roc.main {command.example}"]
  return "\n".join(lines)


if __name__ == "__main__":
  sys.exit(main())
