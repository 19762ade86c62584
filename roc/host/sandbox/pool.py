"""The sandbox as a trainer uses it: start it, submit programs, read results.

`run` never raises for a program: whatever a program does comes back as a
`ToolResult`. A fault of the sandbox itself is INFRA, after one more try.
"""

import asyncio
import itertools
import operator
import os
import platform
import sys

from roc import layout
from roc.host.sandbox import (
  calls,
  contract,
  dispatch,
  link,
  packages,
  plan,
  routing,
)

_DEFAULT_LIMITS = contract.Limits()


class Sandbox:
  """Runs programs in separate, confined processes; use as a context manager.

  Thread-safe. The confinement reached is `tier`; see docs/sandbox.md for what
  each tier covers and what it does not.

  Args:
    limits: of every call that brings none of its own.
    n_workers: calls that run at a time; default one per usable core.
    tier: the confinement to use; None for the strongest that holds here.
    min_tier: the weakest confinement that is acceptable.
    seed: of the run; with trajectory and call index it seeds each call's RNG.
    queue_size: calls that may wait; `submit` blocks while there are as many.
    queue_timeout_s: after which a call that still waits is INFRA.
    max_sessions: live sessions; a cell that would open one more is INFRA.
    preload: further modules for the image that most calls are forked from.
    read_paths: further files and directories that programs may read.
    without: parts of the confinement to leave aside, see `plan.FEATURES`.
    start_timeout_s: for the supervisor to be ready.

  Raises:
    ValueError: an argument that cannot be.
  """

  def __init__(
    self,
    limits: contract.Limits = _DEFAULT_LIMITS,
    n_workers: int | None = None,
    tier: str | None = None,
    min_tier: str = "process",
    seed: int = 0,
    queue_size: int = 16384,
    queue_timeout_s: float = 600.0,
    max_sessions: int = 1024,
    preload: tuple[str, ...] = (),
    read_paths: tuple[str, ...] = (),
    without: tuple[str, ...] = (),
    start_timeout_s: float = 60.0,
  ):
    if n_workers is None:
      n_workers = len(os.sched_getaffinity(0)) if _is_linux() else 1
    for name, value in (
      ("n_workers", n_workers),
      ("queue_size", queue_size),
      ("max_sessions", max_sessions),
    ):
      if value < 1:
        raise ValueError(f"Sandbox: {name} must be at least 1, found {value}")
    unknown = [part for part in without if part not in plan.FEATURES]
    if unknown:
      raise ValueError(
        f"Sandbox: there is no part {unknown[0]!r} to leave aside; there are"
        f" {', '.join(plan.FEATURES)}"
      )
    self._limits = limits
    self._tier = contract.tier_name(tier) if tier else None
    self._min_tier = contract.tier_name(min_tier)
    if self._tier == contract.TIERS[-1]:
      raise ValueError(
        "Sandbox: tier 'external' is another class, ExternalSandbox"
      )
    self._seed = operator.index(seed)  # numpy's integers too
    self._config = {
      "n_workers": n_workers,
      "n_sessions": max_sessions,
      "images": _images(preload),
      "tier": self._tier,
      "without": list(without),
      "read_paths": list(read_paths),
    }
    self._ids = itertools.count()
    self._dispatcher = dispatch.Dispatcher(
      lambda: link.Link.start(self._config, start_timeout_s),
      n_workers,
      queue_size,
      queue_timeout_s,
    )

  # ---------------------------------------------------------------- lifecycle

  def __enter__(self) -> "Sandbox":
    return self.start()

  def __exit__(self, *exc) -> None:
    self.close()

  def start(self) -> "Sandbox":
    """Starts the processes and checks them with one call; returns self.

    Raises:
      contract.SandboxError: not Linux, `min_tier` out of reach, or no
        supervisor can be started.
    """
    if self._dispatcher.is_open:
      return self
    if not _is_linux():
      raise contract.SandboxError(
        f"the sandbox needs Linux, found {sys.platform}: run it in a Linux"
        " container or virtual machine"
      )
    self._dispatcher.open()
    if contract.TIERS.index(self._min_tier) > contract.TIERS.index(self.tier):
      reached = self.tier
      self.close()
      raise contract.SandboxError(
        f"the sandbox reaches tier {reached!r} here but min_tier is"
        f" {self._min_tier!r}: `python -m roc.main sandbox doctor` shows what"
        " is missing; or lower min_tier"
      )
    result = self.run("print(6 * 7)", limits=contract.Limits())
    self._dispatcher.reset_figures()  # the first call is nobody's
    if result.stdout != "42\n":
      self.close()
      raise contract.SandboxError(
        f"the sandbox cannot run a first program: {result.status.name.lower()}"
        f" {result.stderr[-300:].strip()}; check free memory and processes"
      )
    return self

  def close(self) -> None:
    """Ends all processes; open futures become INFRA. Idempotent."""
    self._dispatcher.close()

  # -------------------------------------------------------------------- calls

  def submit(
    self,
    code: str,
    *,
    stdin: bytes | str = b"",
    tool: str = "python",
    trajectory: contract.Trajectory = "",
    call_index: int = 0,
    limits: contract.Limits | None = None,
  ) -> calls.Future:
    """Queues one program; returns the future of its result.

    Blocks while the queue is full, at most for `queue_timeout_s`.

    Args:
      code: Python source: a script, or with `session` a cell.
      stdin: what it reads; default nothing.
      tool: `python` for a script of its own; `session` for a cell in the
        namespace of its trajectory, which the first cell opens.
      trajectory: stable id of the rollout: names the session, is part of the
        RNG seed, and takes turns with others in the queue.
      call_index: of this call in its rollout, part of the RNG seed.
      limits: instead of the sandbox's own.

    Returns:
      A future that never holds an exception. Code that cannot run at all is
      REJECTED with a sentence for the model; a queue that stays full is INFRA.
      Its callbacks run on the sandbox's own thread and must not wait for a
      call.

    Raises:
      contract.SandboxError: not started, or closed.
    """
    call = self._new_call(code, stdin, tool, trajectory, call_index, limits)
    if not call.future.done():
      self._dispatcher.put(call)
    return call.future

  async def arun(self, code: str, **kw) -> contract.ToolResult:
    """`run` for asyncio; a task that is cancelled kills its program."""
    call = self._new_call(code, **_call_arguments(kw))
    put = self._dispatcher.put
    try:
      if not call.future.done() and not put(call, 0.0, final=False):
        await asyncio.to_thread(put, call)
      return await asyncio.wrap_future(call.future)
    except asyncio.CancelledError:
      self._dispatcher.cancel(call)
      raise

  def run(self, code: str, **kw) -> contract.ToolResult:
    """Runs one program and returns its result; arguments as for `submit`."""
    return self.submit(code, **kw).result()

  def _new_call(
    self,
    code: str,
    stdin: bytes | str,
    tool: str,
    trajectory: contract.Trajectory,
    call_index: int,
    limits: contract.Limits | None,
  ) -> calls.Call:
    if not self._dispatcher.is_open:
      raise contract.SandboxError(
        "the sandbox is not running: use `with Sandbox() as box:` or start()"
      )
    limits = limits or self._limits
    why = contract.rejection(code, stdin, limits, tool)
    if why is not None:
      code, stdin, tool = "", b"", contract.TOOLS[0]
    trajectory = calls.canonical(trajectory)
    seed = calls.seed_digest(self._seed, trajectory, call_index)
    call = calls.Call.new(
      next(self._ids), code, stdin, tool, trajectory, limits, seed
    )
    if why is not None:
      self._dispatcher.resolve(
        call.future,
        contract.ToolResult(
          layout.ToolStatus.REJECTED, stderr=why, tier=self.tier
        ),
      )
    return call

  def cancel(self, future: calls.Future) -> bool:
    """Kills the call behind a future; its result becomes INFRA.

    A session is then as it was before the cell.

    Args:
      future: one that `submit` returned.

    Returns:
      True when the call was queued or running, False when it was over.
    """
    found = self._dispatcher.find(future)
    return found is not None and self._dispatcher.cancel(found)

  def end_trajectory(self, trajectory: contract.Trajectory) -> None:
    """Cancels what a trajectory has queued or running and ends its session.

    A rollout that is over calls it, so that its session's memory is free.
    """
    self._dispatcher.end_trajectory(calls.canonical(trajectory))

  # ------------------------------------------------------------------ figures

  @property
  def surroundings(self) -> str:
    """What a program finds inside, a sentence for the prompt."""
    return packages.surroundings()

  @property
  def tier(self) -> str:
    """Confinement that is enforced, of `contract.TIERS`; "" before start."""
    return self._dispatcher.tier

  @property
  def _link(self) -> link.Link | None:
    return self._dispatcher.link

  def info(self) -> dict:
    """Returns what a run's record should say of its sandbox."""
    facts = self._link.facts if self._link is not None else {}
    return {
      "tier": self.tier,
      "min_tier": self._min_tier,
      "plan": facts.get("plan", {}),
      **facts.get("protection", {}),
      "tried": facts.get("tried", []),
      "n_workers": self._config["n_workers"],
      "limits": self._limits.to_json(),
      "images": self._config["images"],
      "seed": self._seed,
      "python": facts.get("python"),
      "kernel": platform.release(),
      "is_root": os.getuid() == 0,
    }

  @property
  def supervisor_pid(self) -> int | None:
    """Process id of the supervisor, None when there is none."""
    return self._link.pid if self._link is not None else None

  def stats(self) -> dict:
    """Returns the counters since the start, see `Dispatcher.stats`."""
    return self._dispatcher.stats()


def _is_linux() -> bool:
  return sys.platform.startswith("linux")


def _call_arguments(given: dict) -> dict:
  """Returns all arguments of a call, those that were not given by default."""
  return {
    "stdin": b"",
    "tool": contract.TOOLS[0],
    "trajectory": "",
    "call_index": 0,
    "limits": None,
    **given,
  }


def _images(preload: tuple[str, ...]) -> dict[str, list[str]]:
  """Returns what each image is to hold, of what is installed."""
  found = {
    name: [module for module in modules if packages.is_installed(module)]
    for name, modules in routing.IMAGES.items()
  }
  found = {n: m for n, m in found.items() if m or n == routing.BARE}
  return {**found, routing.BARE: list(preload)}
