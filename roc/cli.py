"""From a command line to a checked configuration, one sentence per mistake.

`--config=FILE.py[:VARIANT]` runs `get_config(VARIANT)` of that file, and
`--config.section.name=value` overrides what it returns, with the types that the
configuration already has (ml_collections' config_flags).
"""

import argparse
import dataclasses
import importlib.util
import pathlib
import re
import traceback
import typing
from collections.abc import Sequence
from typing import Literal

from absl import flags
from ml_collections import config_flags

from roc import errors, synonyms

if typing.TYPE_CHECKING:
  import ml_collections

  from roc import config as config_lib

# What --config means to a command: it must be given, it is by default the one
# that the workdir was made with, or there is none.
Source = Literal["needed", "saved", "none"]


class Parser(argparse.ArgumentParser):
  """Of commands that read their own flags; one sentence per mistake.

  A word with one dash before it is a value: `--answer -x+1`.
  """

  def __init__(self, *args: typing.Any, **options: typing.Any):
    super().__init__(*args, **options)
    # What argparse takes for a negative number, and so for no flag.
    self._negative_number_matcher = re.compile("-[^-]")

  def error(self, message: str) -> typing.NoReturn:
    raise errors.UserError(f"{self.prog.split()[-1]}: {message}")


@dataclasses.dataclass(frozen=True)
class Alias:
  """A short flag of one command that stands for a setting."""

  flag: str
  setting: str
  value: str  # what it takes, as help shows it
  about: str


def define_flags(is_run: bool = False) -> flags.FlagValues:
  """Returns the flags that every command has, and those of a run's program."""
  values = flags.FlagValues()
  flags.DEFINE_string(
    "workdir",
    "",
    "directory of the run: its record, checkpoints, metrics and traces",
    flag_values=values,
  )
  if is_run:
    flags.DEFINE_bool(
      "allow_config_change",
      False,
      "go on in a workdir that another configuration was started in",
      flag_values=values,
    )
    flags.DEFINE_integer(
      "restore_step",
      None,
      "go back to the checkpoint of this step and on from there; what came"
      " after it is set aside. Leave it out to go on afterwards",
      lower_bound=1,
      flag_values=values,
    )
  flags.DEFINE_bool(
    "dry_run",
    False,
    "print the resolved configuration and stop",
    flag_values=values,
  )
  return values


def parse(
  name: str,
  argv: list[str],
  source: Source,
  aliases: Sequence[Alias] = (),
  *,
  is_run: bool = False,
) -> tuple[flags.FlagValues, "config_lib.Config | None"]:
  """Reads the flags of a command.

  Args:
    name: of the command.
    argv: what follows it.
    source: what --config means to it.
    aliases: its short flags.
    is_run: its workdir is the run of one configuration.

  Returns:
    The flags, and the configuration unless the command has none.

  Raises:
    errors.UserError: whatever is wrong with them.
  """
  spec, argv = _take_config_path(argv)
  for alias in aliases:
    argv = _spell_out(argv, alias)
  values = define_flags(is_run)
  overrides = [arg for arg in argv if re.match(r"--?(no)?config\.", arg)]
  if source == "none":
    if spec or overrides:
      raise errors.UserError(
        f"{name} reads what the workdir holds and takes no --config"
      )
    _parse_flags(values, argv, [])
    return values, None
  from roc import config as config_lib  # slow: brings jax

  settings = list(config_lib.flatten(config_lib.Config()))
  _check_overrides(overrides, settings)
  known = [f"config.{key}" for key in settings]
  known += [alias.flag for alias in aliases]
  argv = [_as_tuple(arg) for arg in argv]
  if spec:
    config = _load_experiment(spec)
  elif source == "saved":
    # The workdir is a flag too, and its configuration comes before overrides.
    first = define_flags(is_run)
    plain = [arg for arg in argv if not re.match(r"--?(no)?config\.", arg)]
    _parse_flags(first, plain, known)
    config = _load_saved(first.workdir)
  else:
    raise errors.UserError(
      f"{name} needs a configuration, such as"
      " --config=experiments/quickstart.py"
    )
  config_flags.DEFINE_config_dict(
    "config", config, flag_values=values, sys_argv=[name, *argv]
  )
  _parse_flags(values, argv, known)
  return values, config_lib.resolve(config, is_trained=source == "needed")


def _parse_flags(
  values: flags.FlagValues, argv: list[str], known: list[str]
) -> None:
  dashed = {f"--{name.replace('_', '-')}": f"--{name}" for name in values}
  argv = [
    dashed.get(name, name) + is_set + value
    for name, is_set, value in (arg.partition("=") for arg in argv)
  ]
  try:
    rest = values(["roc", *argv])[1:]
  except flags.UnrecognizedFlagError as e:
    hint = errors.closest(e.flagname, [*values, "config", *known])
    settings = [key.removeprefix("config.") for key in known]
    if meant := synonyms.setting_of(e.flagname, settings):
      hint = f" (did you mean --config.{meant}?)"
    raise errors.UserError(f"there is no flag --{e.flagname}{hint}") from None
  except (flags.Error, TypeError, ValueError) as e:
    text = str(e).splitlines()[0].replace("flag --", "--", 1)
    raise errors.UserError(text) from None
  if rest:
    raise errors.UserError(
      f"{rest[0]!r} is not a flag; flags look like --name=value"
    )


def _take_config_path(argv: list[str]) -> tuple[str, list[str]]:
  """Splits `--config=PATH` or `--config PATH` off the other flags."""
  spec, rest = "", []
  remaining = iter(argv)
  for arg in remaining:
    if arg in ("--config", "-config"):
      spec = next(remaining, "")
    elif match := re.match(r"--?config=(.*)", arg):
      spec = match[1]
    else:
      rest.append(arg)
      continue
    if not spec:
      raise errors.UserError(
        "--config needs a file, as in --config=experiments/quickstart.py"
      )
  return spec, rest


def _spell_out(argv: list[str], alias: Alias) -> list[str]:
  """Writes `--flag=VALUE` and `--flag VALUE` as the setting's own flag."""
  spelt = []
  remaining = iter(argv)
  for arg in remaining:
    flag, has_value, value = arg.lstrip("-").partition("=")
    if not arg.startswith("-") or flag != alias.flag:
      spelt.append(arg)
      continue
    if not has_value:
      value = next(remaining, "--")
      if value.startswith("--"):
        raise errors.UserError(
          f"--{flag} needs a value, as in --{flag}={alias.value}"
        )
    spelt.append(f"--config.{alias.setting}={value}")
  return spelt


def _check_overrides(overrides: list[str], known: list[str]) -> None:
  for override in overrides:
    match = re.match(r"--?(?:no)?config\.([^=]*)", override)
    key = match[1] if match else ""
    if key in known:
      continue
    within = [k for k in known if k.startswith(f"{key}.")]
    if within:
      raise errors.UserError(
        f"config.{key} is a section; set one of its settings, such as"
        f" --config.{within[0]}=..."
      )
    raise errors.UserError(
      f"config.{key} does not exist{synonyms.closest(key, known)}; `--dry_run`"
      " prints every setting"
    )


def _as_tuple(arg: str) -> str:
  """A path, and a gin binding with `=`, spaces and commas, is no literal."""
  names = r"(--?config\.(?:host\.gin_\w+|sft\.data))"
  match = re.match(names + r"=(?!\()(.*)", arg, re.DOTALL)
  return f"{match[1]}={(match[2],)!r}" if match else arg


# ------------------------------------------------------------- configurations


def _load_saved(workdir: str) -> "ml_collections.ConfigDict":
  """Returns the configuration that a workdir was made with."""
  from roc import config as config_lib

  if not workdir:
    raise errors.UserError("give the --workdir of a run, or a --config")
  path = pathlib.Path(workdir) / "config.json"
  try:
    text = path.read_text()
  except OSError as e:
    raise errors.UserError(
      f"cannot read {path}: {e.strerror}; give the --workdir of a run, or a"
      " --config"
    ) from None
  config = config_lib.default_config()
  config.update(dataclasses.asdict(config_lib.from_json(text, str(path))))
  return config


def _load_experiment(spec: str) -> "ml_collections.ConfigDict":
  """Returns `get_config()` of a file, or `get_config("tiny")` for file:tiny."""
  import ml_collections

  name, _, variant = spec.partition(":")
  path = pathlib.Path(name)
  if not path.is_file():
    near = path.parent if path.parent.is_dir() else pathlib.Path("experiments")
    others = [str(p) for p in near.glob("*.py")]
    raise errors.UserError(
      f"config file {name} does not exist{errors.closest(name, others)}"
    )
  module_spec = importlib.util.spec_from_file_location(path.stem, path)
  try:
    if module_spec is None or module_spec.loader is None:
      raise ValueError("not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
      raise errors.UserError(f"{path} has no function get_config")
    config = module.get_config(*([variant] if variant else []))
  except errors.UserError:
    raise
  except Exception as e:
    raise errors.UserError(f"{_where(e, path)}: {_first_line(e)}") from e
  if not isinstance(config, ml_collections.ConfigDict):
    raise errors.UserError(
      f"{path}: get_config must return roc.config.default_config(), changed;"
      f" it returned a {type(config).__name__}"
    )
  return config


def _where(e: BaseException, path: pathlib.Path) -> str:
  if isinstance(e, SyntaxError) and e.filename == str(path.absolute()):
    return f"{path} line {e.lineno}"
  frames = traceback.extract_tb(e.__traceback__)
  numbers = [
    f.lineno for f in frames if pathlib.Path(f.filename).name == path.name
  ]
  return f"{path} line {numbers[-1]}" if numbers else str(path)


def _first_line(e: BaseException) -> str:
  # ConfigDict lists every field that there is, then what was meant.
  text = e.msg if isinstance(e, SyntaxError) else str(e)
  if text[:1] == text[-1:] and text[:1] in ("'", '"'):
    text = text[1:-1].replace("\\n", "\n")
  meant = re.search(r"Did you mean \\?\"(\w+)\\?\"", text)
  missing = re.search(r"Key \\?\"(\w+)\\?\" does not exist", text)
  first = re.sub(
    r" Other fields present:.*", "", (text or repr(e)).splitlines()[0]
  )
  first = first.replace('\\"', '"').rstrip(".")
  name = meant[1] if meant else ""
  if missing:
    from roc import config as config_lib

    settings = config_lib.flatten(config_lib.Config())
    name = synonyms.setting_of(missing[1], settings) or name
  hint = f" (did you mean {name}?)" if name else ""
  kind = "" if isinstance(e, AttributeError | ValueError) else type(e).__name__
  return f"{kind}: {first}{hint}" if kind else first + hint
