"""From a `Config` to what runs it: policy, mesh, engine, agent loop."""

import contextlib
import dataclasses
import functools
import os
import pathlib
import shutil
import types
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import jax
import rich.console

from roc import config as config_lib
from roc import (
  config_checks,
  errors,
  places,
  pretrained,
  records,
  rollout,
  runlog,
  wiring,
)
from roc.device import (
  checkpoint,
  engine,
  engines,
  model,
  sampling,
  sharding,
)
from roc.host import golds, tools, traces
from roc.host.sandbox import contract
from roc.host.tasks import problem as problem_lib


def cache_directory() -> pathlib.Path:
  """Where what can be made again is kept between runs."""
  cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  return pathlib.Path(cache) / "roc"


def use_compilation_cache() -> None:
  """Keeps compiled programs between runs, so that resuming starts quickly.

  They lie under $JAX_COMPILATION_CACHE_DIR, by default in the user's cache
  directory.
  """
  if "JAX_COMPILATION_CACHE_DIR" in os.environ:
    return
  jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "xla"))


def host_parts(cfg: config_lib.Config) -> wiring.HostParts:
  """The host side that the config's gin files and bindings describe.

  Says what its tasks leave out.
  """
  host = wiring.build_host(
    cfg.host.gin_files,
    cfg.host.gin_bindings,
    seed=cfg.seed,
    pretrained=pretrained.folder(cfg) if cfg.pretrained else None,
  )
  for task in (host.train_task, host.eval_task):
    for note in getattr(task, "notes", ()):
      say(note)
  if (note := pretrained.length_note(cfg)) is not None:
    say(note)
  return host


def check_answers(host: wiring.HostParts, sandbox: Any) -> None:
  """Says which right answers the verifier cannot read, or leaves them out.

  Raises:
    errors.UserError: there are some, and the task is told to refuse them.
  """
  if not host.reads_mathematics:
    return
  find = functools.partial(
    golds.find_unreadable, sandbox=sandbox, cache=cache_directory() / "golds"
  )
  for task in (host.train_task, host.eval_task):
    if not hasattr(task, "check_answers"):
      continue
    try:
      for note in task.check_answers(find):  # pyrefly: ignore
        say(note)
    except ValueError as e:
      raise errors.UserError(str(e)) from e


def check_lengths(
  cfg: config_lib.Config,
  host: wiring.HostParts,
  tasks: Sequence[problem_lib.Task],
) -> None:
  """Finds every problem whose prompt and budget cannot fit a slot.

  Of sets without an end, `check_prompts` looks at each problem that is drawn.

  Raises:
    errors.UserError: there are some, and the task is told to refuse them.
  """
  s = cfg.sampling
  room = s.cache_length - s.max_tokens
  n_around = len(host.chat.prompt_ids(""))

  def find_overlong(questions: Sequence[str]) -> dict[int, str]:
    found = {}
    for i, question in enumerate(questions):
      # No token is less than a byte, so most need not be tokenized.
      if n_around + len(question.encode("utf-8", "surrogatepass")) <= room:
        continue
      n = len(host.chat.prompt_ids(question))
      if n > room:
        found[i] = f"{n} tokens"
    return found

  for task in tasks:
    if not hasattr(task, "check_lengths"):
      continue
    try:
      for note in task.check_lengths(find_overlong):  # pyrefly: ignore
        say(note)
    except ValueError as e:
      raise errors.UserError(
        f"{e}; with config.sampling.max_tokens={s.max_tokens} a prompt has room"
        f" for {room} of config.sampling.cache_length={s.cache_length}; raise"
        " that, or set on_overlong to drop"
      ) from e


def make_policy(cfg: config_lib.Config, host: wiring.HostParts) -> model.Policy:
  """The policy, its vocabulary taken from the tokenizer where it says 0.

  Rows of a vocabulary beyond the tokenizer's, as published models have them,
  are never drawn.

  Raises:
    errors.UserError: a vocabulary smaller than the tokenizer's.
  """
  n_ids = host.tokenizer.vocab_size
  return model.Policy(shapes(cfg, host), make_mesh(cfg), n_ids, cfg.lora)


def shapes(
  cfg: config_lib.Config, host: wiring.HostParts | None
) -> model.ModelConfig:
  """`config.model` with a vocabulary; without a host it must say its size.

  Raises:
    errors.UserError: a vocabulary smaller than the tokenizer's, or than
      config.sampling.top_k.
  """
  if host is None:
    return cfg.model
  n_tokens = host.tokenizer.vocab_size
  size = cfg.model.vocab_size or n_tokens
  if size < n_tokens and cfg.pretrained:
    raise errors.UserError(
      f"{cfg.pretrained}: vocab_size is {size} and the tokenizer has {n_tokens}"
      " tokens, so they do not belong together; give the model's own tokenizer"
    )
  if size < n_tokens:
    raise errors.UserError(
      f"config.model.vocab_size is {size} and the tokenizer has {n_tokens} "
      "tokens; set it to 0 to follow the tokenizer"
    )
  config_checks.check_vocabulary(cfg, n_tokens)
  return dataclasses.replace(cfg.model, vocab_size=size)


def make_mesh(cfg: config_lib.Config) -> jax.sharding.Mesh:
  """The mesh of `config.mesh` over this machine's devices."""
  n_devices, backend = len(jax.devices()), jax.default_backend()
  config_checks.check_devices(cfg, n_devices, backend)
  return sharding.make_mesh(cfg.mesh.data, cfg.mesh.fsdp, cfg.mesh.tensor)


def make_engine(
  policy: model.Policy,
  settings: sampling.SamplingConfig,
  host: wiring.HostParts,
) -> rollout.Sampler:
  """What samples, stopping where the host's chat format ends a turn."""
  if host.chat.find_stop is not None:
    say(
      "the tokenizer has no single token for the end of a turn, so the host"
      " looks for it after every chunk: slower, and otherwise the same"
    )
  devices = jax.local_devices()
  is_cpu = jax.default_backend() == "cpu"
  n_devices = settings.n_devices or (1 if is_cpu else len(devices))
  stop_ids, find_stop = host.chat.stop_ids, host.chat.find_stop
  if n_devices == 1:
    return engine.Engine(policy, settings, stop_ids, find_stop=find_stop)
  return engines.Engines(
    policy,
    settings,
    stop_ids,
    devices=devices[:n_devices],
    find_stop=find_stop,
  )


def make_loop(
  policy: model.Policy,
  settings: sampling.SamplingConfig,
  host: wiring.HostParts,
  toolbox: tools.Toolbox,
) -> rollout.AgentLoop:
  """An agent loop with an engine of its own.

  Raises:
    errors.UserError: answers cannot be checked here; says why.
  """
  limits = rollout.Limits(
    settings.max_turns,
    settings.max_tokens,
    settings.max_calls,
    settings.call_deadline,
    settings.rollout_deadline,
  )
  sampler = make_engine(policy, settings, host)
  try:
    score = host.make_score(toolbox.sandbox)
  except contract.SandboxError as e:
    raise errors.UserError(str(e)) from e
  return rollout.AgentLoop(
    sampler,
    host.chat,
    toolbox,
    limits,
    score=score,
    temperature=settings.temperature,
  )


@contextlib.contextmanager
def started_sandbox(
  host: wiring.HostParts,
) -> Generator[Any, None, None]:
  """The sandbox, running until the block ends.

  Raises:
    errors.UserError: it cannot start; says why.
  """
  try:
    sandbox = host.make_sandbox().__enter__()
  except contract.SandboxError as e:
    raise errors.UserError(f"the sandbox cannot start: {e}") from e
  say(f"sandbox: tier {sandbox.tier} (docs/sandbox.md says what that confines)")
  try:
    yield sandbox
  finally:
    sandbox.close()


def say(text: str) -> None:
  """Prints a line as it is: no markup, no wrapping."""
  console = rich.console.Console(highlight=False, soft_wrap=True)
  console.print(text, markup=False)


def contents(host: wiring.HostParts) -> dict[str, str]:
  """Digests of the problems that come from files, for `identity`."""
  tasks = {"train_task": host.train_task, "eval_task": host.eval_task}
  return {
    f"{records.CONTENTS}{name}": task.digest
    for name, task in tasks.items()
    if hasattr(task, "digest")
  }


def identity(
  cfg: config_lib.Config,
  program: str,
  data: Mapping[str, str] = types.MappingProxyType({}),
) -> dict[str, Any]:
  """What makes a run that run: settings, and digests of what it reads."""
  return config_lib.identity(cfg, program) | dict(data)


def claim(
  cfg: config_lib.Config,
  host: wiring.HostParts,
  workdir: pathlib.Path,
  program: str,
  data: Mapping[str, str] = types.MappingProxyType({}),
) -> runlog.Run:
  """Makes `workdir` and `config.checkpoint.directory` this run's own.

  Args:
    cfg: its configuration.
    host: its host side.
    workdir: its directory.
    program: its name.
    data: what else makes the run that run, such as a digest of its input.
  """
  facts: dict[str, Any] = {
    "config_json": config_lib.to_json(cfg),
    "gin_text": host.gin_text,
    "identity": identity(cfg, program, data),
    "defaults": config_lib.defaults(cfg),
  }
  run = runlog.claim(workdir, program, **facts)
  try:
    if cfg.checkpoint.directory:
      store = places.as_path(cfg.checkpoint.directory)
      runlog.claim_store(store, program, workdir=workdir, **facts)
    devices = jax.devices()
    run.note(
      devices={
        "kind": devices[0].device_kind,
        "platform": devices[0].platform,
        "count": len(devices),
        "processes": jax.process_count(),
      }
    )
  except BaseException:
    run.close()
    raise
  return run


def checkpoints(
  cfg: config_lib.Config, workdir: pathlib.Path
) -> checkpoint.Checkpoints:
  """The checkpoints of a run, in its workdir or where `config` says."""
  directory = cfg.checkpoint.directory or workdir / "checkpoints"
  return checkpoint.Checkpoints(directory, keep=cfg.checkpoint.keep)


def go_back(
  checkpoints: checkpoint.Checkpoints, workdir: pathlib.Path, step: int
) -> None:
  """Sets aside what a run did after a step that it is to go on from again.

  Newer checkpoints, rollouts, and a copy of metrics.jsonl go to
  WORKDIR/set_aside_N; the rows of the metrics themselves go when the log is
  opened.
  """
  n = 0
  while (aside := workdir / f"set_aside_{n}").exists():
    n += 1
  newer = checkpoints.set_aside(step, aside / "checkpoints")
  later = traces.later_than(workdir, step)
  if not newer and not later:
    return
  (aside / "rollouts").mkdir(parents=True, exist_ok=True)
  if (workdir / runlog.METRICS).exists():
    shutil.copy(workdir / runlog.METRICS, aside)
  for path in later:
    path.rename(aside / "rollouts" / path.name)
  steps = ", ".join(map(str, newer)) or "none"
  what = (
    "deleted" if places.is_remote(checkpoints.directory) else "in there too"
  )
  say(
    f"going back to step {step}: metrics and rollouts of later steps are in"
    f" {aside}; later checkpoints (of steps: {steps}) are {what}"
  )


def check_prompts(
  loop: rollout.AgentLoop,
  problems: Sequence[problem_lib.Problem],
  cache_length: int,
) -> None:
  """Refuses problems whose prompt and budget cannot fit a slot.

  Raises:
    errors.UserError: names the first such problem.
  """
  for p in problems:
    n = len(loop.chat.prompt_ids(p.question, loop.system))
    if n + loop.limits.max_tokens > cache_length:
      raise errors.UserError(
        f"problem {p.id!r} has a prompt of {n} tokens, which with "
        f"config.sampling.max_tokens={loop.limits.max_tokens} exceeds "
        f"config.sampling.cache_length={cache_length}; raise cache_length or "
        "leave the problem out"
      )
