"""Builds the host side from gin; the only file that imports gin.

gin says which task set, chat format, tools, demonstrations and sandbox a run
has and how each is built. It never sees a number that the device side uses too:
those are in `roc.config` and are passed in, so no quantity has two homes.

`host` below is the root; all that `parts` lists can be named in a gin file, and
a file may `import` a module of the user's own that registers more. One process
may build many times; each build starts from nothing.
"""

import contextlib
import dataclasses
import functools
import importlib.util  # noqa: F401 (gin uses it and does not import it)
import inspect
import logging
import pathlib
import re
import typing
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import gin

from roc import errors
from roc.host import chat as chat_lib
from roc.host import gym_score, rewards, template_chat, tools, verify
from roc.host import pretrained as pretrained_lib
from roc.host import sandbox as sandbox_lib
from roc.host import tokenizer as tokenizer_lib
from roc.host.tasks import (
  arithmetic,
  demonstrations,
  files,
  gym,
  mixture,
  problem,
)

_SCOPES = ("", "train", "eval")


@dataclasses.dataclass(frozen=True)
class HostParts:
  """The host side of a run, built but not started."""

  tokenizer: tokenizer_lib.Tokenizer
  chat: chat_lib.Chat
  train_task: problem.Task
  eval_task: problem.Task
  rates: demonstrations.MessRates
  limits: Any  # sandbox.Limits of a tool call
  make_sandbox: Callable[[], Any]  # a context manager that starts it
  make_score: Callable[[Any], rewards.Score]  # from a started sandbox
  reads_mathematics: bool  # the score needs right answers that can be parsed
  make_toolbox: Callable[[Any], tools.Toolbox]  # from a started sandbox
  gin_text: str  # every binding, for config.gin


def host(
  *,
  seed: int,
  pretrained: pathlib.Path | None = None,
  tokenizer: tokenizer_lib.Tokenizer | None = None,
  chat: Callable[..., chat_lib.Chat] | None = None,
  train_task: Callable[..., problem.Task] | None = None,
  eval_task: Callable[..., problem.Task] | None = None,
  rates: demonstrations.MessRates | None = None,
  limits: Any = None,
  sandbox: Callable[..., Any] | None = None,
  toolbox: Callable[..., tools.Toolbox] | None = None,
  score: Callable[..., rewards.Score] | None = None,
) -> HostParts:
  """The root of a gin file: `host.train_task = @train/ArithmeticTask`.

  What is not given is the quickstart's, and takes bindings all the same.

  Args:
    seed: the run's, from the ConfigDict; orders the training problems.
    pretrained: folder of `config.pretrained`: without a tokenizer its own, and
      without a chat its own template.
    tokenizer: an instance (`@quickstart_tokenizer()`).
    chat: makes the format from the tokenizer, and if it has a parameter `tools`
      from the schemas of the tools.
    train_task: makes the training problems from `seed`.
    eval_task: makes the held-out problems, the same for every seed; without it
      the held-out split of the arithmetic task.
    rates: how messy the demonstrations are.
    limits: what a tool call may use.
    sandbox: makes the sandbox from `limits` and `seed`.
    toolbox: makes the tools from a sandbox.
    score: makes what judges answers from a sandbox: `@exact_score`,
      `@math_score` or `@gym_score`.
  """
  if tokenizer is None and pretrained is not None:
    tokenizer = _part("load_tokenizer")(pretrained)
  tokenizer = tokenizer or _part("quickstart_tokenizer")()
  chat = chat or _part("TemplateChat" if pretrained else "ChatFormat")
  train_task = train_task or _part("ArithmeticTask")
  eval_task = eval_task or functools.partial(
    _part("ArithmeticTask"), split="heldout"
  )
  limits = limits or _part("Limits")()
  score = score or _part("exact_score")
  make_sandbox = functools.partial(
    _settled(sandbox or _part("Sandbox")), limits=limits, seed=seed
  )
  make_toolbox = _settled(toolbox or _part("Toolbox"))
  # Neither starts anything: a bad option is an error now, not in the first
  # rollout.
  schema = make_toolbox(make_sandbox()).schema
  offered = {"tools": [schema]} if _takes(chat, "tools") else {}
  return HostParts(
    tokenizer=tokenizer,
    chat=chat(tokenizer, **offered),
    train_task=train_task(seed=seed),
    eval_task=eval_task(),
    rates=rates or _part("MessRates")(),
    limits=limits,
    make_sandbox=make_sandbox,
    make_score=_settled(score),
    reads_mathematics=score is _part("math_score"),
    make_toolbox=make_toolbox,
    gin_text="",
  )


def _takes(factory: Callable[..., Any], name: str) -> bool:
  """Whether it has a parameter of that name."""
  # gin makes classes whose own signature says nothing.
  made_by = factory.__init__ if inspect.isclass(factory) else factory
  return name in inspect.signature(made_by).parameters


def _part(name: str) -> Callable[..., Any]:
  return gin.get_configurable(name)


def _settled(factory: Callable[..., Any]) -> Callable[..., Any]:
  """Gives a factory that is called later the bindings of this build for good.

  gin looks bindings up at each call; by then another run of the same process
  may have been built with others.
  """
  settled = {}
  for name, parameters in parts().items():
    if _part(name) is factory:
      for key, parameter in parameters.items():
        if parameter.default is not parameter.empty:
          settled[key] = parameter.default
      settled |= gin.get_bindings(name)
  return functools.partial(factory, **settled)


@functools.cache
def parts() -> dict[str, dict[str, inspect.Parameter]]:
  """Registers what a gin file may name.

  Returns:
    Each name with the parameters that can be bound; those that are passed in
    cannot.
  """
  bindable = {}
  for part, name, *passed_in in (
    (host, "host", "seed", "pretrained"),
    (tokenizer_lib.quickstart_tokenizer, "quickstart_tokenizer"),
    (pretrained_lib.load_tokenizer, "load_tokenizer"),
    (chat_lib.ChatFormat, "ChatFormat", "tokenizer"),
    (template_chat.TemplateChat, "TemplateChat", "tokenizer", "tools"),
    (arithmetic.ArithmeticTask, "ArithmeticTask", "seed"),
    (files.FileTask, "FileTask", "seed"),
    (mixture.MixedTask, "MixedTask", "seed"),
    (gym.GymTask, "GymTask", "seed"),
    (demonstrations.MessRates, "MessRates"),
    (sandbox_lib.Limits, "Limits"),
    (sandbox_lib.Sandbox, "Sandbox", "limits", "seed"),
    (sandbox_lib.ExternalSandbox, "ExternalSandbox", "limits", "seed"),
    (tools.Toolbox, "Toolbox", "sandbox"),
    (rewards.exact_score, "exact_score", "sandbox"),
    (verify.math_score, "math_score", "sandbox"),
    (gym_score.gym_score, "gym_score", "sandbox"),
  ):
    gin.external_configurable(part, name, denylist=passed_in)
    parameters = inspect.signature(part).parameters
    bindable[name] = {
      key: parameter
      for key, parameter in parameters.items()
      if key not in passed_in
    }
  return bindable


def build_host(
  gin_files: Sequence[str] = (),
  gin_bindings: Sequence[str] = (),
  *,
  seed: int,
  pretrained: pathlib.Path | None = None,
) -> HostParts:
  """Reads gin files, then bindings, and builds the host side from them.

  Args:
    gin_files: paths, relative to the working directory or to the checkout.
    gin_bindings: statements such as `Limits.wall_s = 2.0`; these win.
    seed: the run's seed.
    pretrained: the published model's folder, see `host`.

  Returns:
    The parts, with nothing started yet.

  Raises:
    errors.UserError: a missing file, an unknown name or parameter, a bad value,
      or a part that cannot be built; one sentence that says where.
  """
  gin_text = read_gin(gin_files, gin_bindings)
  with _one_sentence("gin"):
    built = gin.get_configurable("host")(seed=seed, pretrained=pretrained)
  _check_used(gin_files, gin_bindings)
  return dataclasses.replace(built, gin_text=gin_text)


def build_chat(
  gin_files: Sequence[str],
  gin_bindings: Sequence[str],
  pretrained: pathlib.Path,
) -> chat_lib.Chat:
  """The chat format of `build_host` alone, for a folder's own tokenizer.

  Needs nothing of the run's data.

  Raises:
    errors.UserError: as `build_host`.
  """
  read_gin(gin_files, gin_bindings)
  with _one_sentence("gin"):
    bound = gin.get_bindings("host")
    chat = bound.get("chat") or _part("TemplateChat")
    toolbox = bound.get("toolbox") or _part("Toolbox")
    offered = {}
    if _takes(chat, "tools"):
      offered["tools"] = [toolbox(None).schema]  # no sandbox: nothing is run
    return chat(_part("load_tokenizer")(pretrained), **offered)


def read_gin(
  gin_files: Sequence[str] = (), gin_bindings: Sequence[str] = ()
) -> str:
  """Reads gin files, then bindings, as far as that goes without building.

  Returns:
    Every binding, as config.gin has it.

  Raises:
    errors.UserError: as `build_host`, but of what only building shows.
  """
  parts()
  gin.clear_config()
  for name in gin_files:
    with _one_sentence(name):
      gin.parse_config_file(str(_find(name)))
  for binding in gin_bindings:
    with _one_sentence(f"gin binding `{binding}`"):
      gin.parse_config(binding)
  _check_types()
  with _one_sentence("gin"):
    gin.finalize()
    return gin.config_str()


def _find(name: str) -> pathlib.Path:
  here = pathlib.Path(name)
  checkout = pathlib.Path(__file__).resolve().parent.parent / name
  for path in (here, checkout):
    if path.is_file():
      return path
  folder = here.parent if here.parent.is_dir() else checkout.parent
  others = [p.name for p in folder.glob("*.gin")] if folder.is_dir() else []
  raise errors.UserError(
    f"gin file {name!r} does not exist{errors.closest(here.name, others)}; give"
    " --config.host.gin_files a path from here or from the checkout"
  )


@contextlib.contextmanager
def _one_sentence(where: str) -> Generator[None]:
  """Makes one sentence of what gin or a part of the host objects to."""
  root = logging.getLogger()
  root.addFilter(_is_not_of_gin)
  try:
    yield
  except errors.UserError as e:
    # gin adds lines that say which of its calls this passed through.
    said, added, _ = str(e).partition("\n  In call to configurable")
    if not added:
      raise
    raise errors.UserError(said) from e
  except Exception as e:
    text = str(e)
    said = e.msg if isinstance(e, SyntaxError) else text
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    first = lines[0].rstrip(".") if lines else repr(e)
    if first.startswith("malformed node or string"):  # ends in an address
      first = "the value is no literal of Python; put text in quotes"
    unset = re.match(r"No bindings specified for '(.*)/gin.macro'", first)
    if unset:
      first = f"the macro %{unset[1]} is used and never set"
    line = re.search(r"\bline (\d+)", text)
    made = re.search(r"In call to configurable '(\w+)'", text)
    if made:  # whose own words may name a line, of a file of problems
      where = f"gin: {made[1]}"
    elif line and not where.startswith("gin binding"):
      where += f" line {line[1]}"
    raise errors.UserError(f"{where}: {first}{_hint(first)}") from e
  finally:
    root.removeFilter(_is_not_of_gin)


def _is_not_of_gin(record: logging.LogRecord) -> bool:
  """What gin logs of a missing file, it raises as well."""
  of_gin = pathlib.Path(gin.config.__file__).parent
  return pathlib.Path(record.pathname).parent != of_gin


def _hint(sentence: str) -> str:
  """Returns a suggestion for a misspelt name or parameter."""
  quoted = re.findall(r"'@?([\w./]+)(?:\(\))?'", sentence)
  if "parameter named" in sentence and len(quoted) == 2:
    name = quoted[0].rpartition(".")[2]
    return errors.closest(quoted[1], parts().get(name, {}))
  if sentence.startswith("No configurable matching") and quoted:
    return errors.closest(quoted[0].rpartition("/")[2], parts())
  return ""


def _check_types() -> None:
  """gin takes any literal for any parameter; numbers must be numbers here."""
  for name, key, parameter, value in _bound_literals():
    allowed = typing.get_args(parameter.annotation) or (parameter.annotation,)
    if not all(kind in (bool, int, float, str, type(None)) for kind in allowed):
      continue
    kinds = (*allowed, int) if float in allowed else allowed
    is_bool_for_number = isinstance(value, bool) and bool not in allowed
    if is_bool_for_number or not isinstance(value, kinds):
      wanted = " or ".join(kind.__name__ for kind in allowed)
      raise errors.UserError(
        f"gin binding {name}.{key} must be {wanted}, got {value!r}"
      )


def _check_used(gin_files: Sequence[str], gin_bindings: Sequence[str]) -> None:
  """Refuses a binding that nothing of what was built takes.

  Bindings of a file may be left over where one of the command line puts another
  part in place of the file's.

  Raises:
    errors.UserError: names the first such binding and the nearest that is used.
  """
  used = _used()
  unused = [key for key in _bound() if not _is_used(key, used)]
  if not unused:
    return
  replaces = any(re.search(r"=\s*[^'\"#]*@", text) for text in gin_bindings)
  if replaces and gin_files:
    read_gin(gin_files)
    of_files = set(_bound())
    read_gin(gin_files, gin_bindings)
    unused = [key for key in unused if key not in of_files]
  for scope, selector, parameter in unused:
    if selector == _MACRO:
      known = {s for s, other in used if other == _MACRO}
      raise errors.UserError(
        f"gin binding {scope}: nothing uses the macro"
        f" %{scope}{errors.closest(scope, known)}"
      )
    name = selector.rpartition(".")[2]
    shown = f"{scope}/{name}" if scope else name
    raise errors.UserError(
      f"gin binding {shown}.{parameter}: nothing in this run takes"
      f" it{_nearest(scope, selector, used)}"
    )


_MACRO = "gin.macro"
_Key = tuple[str, str, str]  # scope, configurable, parameter


def _bound() -> list[_Key]:
  return [
    (scope, selector, parameter)
    for (scope, selector), parameters in gin.config._CONFIG.items()
    for parameter in parameters
  ]


def _used() -> set[tuple[str, str]]:
  """Scopes and names of what was built, and of what that refers to."""
  used = set(gin.config._OPERATIVE_CONFIG)
  size = -1
  while len(used) > size:
    size = len(used)
    for (scope, selector), parameters in gin.config._CONFIG.items():
      if _is_used((scope, selector, ""), used):
        for reference in gin.config.iterate_references(parameters):
          used.add(reference.config_key)
  return used


def _is_used(key: _Key, used: set[tuple[str, str]]) -> bool:
  scope, selector, _ = key
  return any(
    other == selector and f"{inner}/".startswith(f"{scope}/" if scope else "")
    for inner, other in used
  )


def _nearest(scope: str, selector: str, used: set[tuple[str, str]]) -> str:
  """Says what is built instead of a part that is not."""
  name = selector.rpartition(".")[2]
  scopes = sorted({s for s, other in used if other == selector})
  if scopes:
    near = errors.closest(scope, scopes)
    return near or f"; it builds {', '.join(f'{s}/{name}' for s in scopes)}"
  found: Any = gin.config._REGISTRY.get_match(selector)
  bound = found.wrapped
  names = []
  for other in sorted({other for _, other in used} - {_MACRO}):
    names.append(other.rpartition(".")[2])
    built = _part(other)
    both = inspect.isclass(built) and inspect.isclass(bound)
    if both and issubclass(built, bound):
      return f"; bind {names[-1]}, the subclass of it that is built"
  return errors.closest(name, names) or f"; it builds {', '.join(names)}"


def _bound_literals() -> Iterator[tuple[str, str, inspect.Parameter, Any]]:
  for name, parameters in parts().items():
    for scope in _SCOPES:
      with gin.config_scope(scope or None):
        bound = gin.get_bindings(name, resolve_references=False)
      for key, value in bound.items():
        if isinstance(value, gin.config.ConfigurableReference):
          scope_and_name = value.config_key
          if scope_and_name[1] == _MACRO:
            macro = gin.config._CONFIG.get(scope_and_name, {})
            value = macro.get("value")
        if isinstance(value, bool | int | float | str):
          yield name, key, parameters[key], value
