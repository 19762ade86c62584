"""The trainer's side: a fair queue of calls, futures, a supervisor to spare.

`run` never raises for a program: whatever a program does comes back as a
`ToolResult`. A fault of the sandbox itself is INFRA, after one more try.
"""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import importlib.util
import itertools
import os
import platform
import sys
import threading
import time
from collections.abc import Iterable

from roc import layout
from roc.host.sandbox import calls, contract, figures, link, routing
from roc.host.sandbox import queue as queue_lib

_DEFAULT_LIMITS = contract.Limits()
_RESTART_PAUSES_S = (0.0, 0.2, 1.0)


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
    self._limits = limits
    self._tier = contract.tier_name(tier) if tier else None
    self._min_tier = contract.tier_name(min_tier)
    if self._tier == contract.TIERS[-1]:
      raise ValueError(
        "Sandbox: tier 'external' is another class, ExternalSandbox"
      )
    self._seed = seed
    self._queue_timeout_s = queue_timeout_s
    self._start_timeout_s = start_timeout_s
    self._config = {
      "n_workers": n_workers,
      "n_sessions": max_sessions,
      "images": _images(preload),
      "tier": self._tier,
      "without": list(without),
      "read_paths": list(read_paths),
    }
    self._lock = threading.Lock()
    self._has_room = threading.Condition(self._lock)
    self._ids = itertools.count()
    self._queue = queue_lib.FairQueue(queue_size)
    self._sent: dict[int, calls.Call] = {}
    self._busy: set[str] = set()  # sessions with a cell at the supervisor
    self._used: set[str] = set()  # sessions that hold something
    self._lost: set[str] = set()  # sessions that the sandbox lost
    self._link: link.Link | None = None
    self._pump: threading.Thread | None = None
    self._is_closing = False
    self._down_reason = ""
    self._figures = figures.Figures()
    self._restarts = 0

  # ---------------------------------------------------------------- lifecycle

  def __enter__(self) -> "Sandbox":
    return self.start()

  def __exit__(self, *exc) -> None:
    self.close()

  def start(self) -> "Sandbox":
    """Starts the server and checks it with one call; returns self.

    Raises:
      contract.SandboxError: not Linux, `min_tier` out of reach, or the server
        cannot start.
    """
    if self._pump is not None:
      return self
    if not _is_linux():
      raise contract.SandboxError(
        f"the sandbox needs Linux, found {sys.platform}: run it in a Linux"
        " container or virtual machine"
      )
    self._is_closing = False
    self._down_reason = ""
    self._link = self._new_link()
    if contract.TIERS.index(self._min_tier) > contract.TIERS.index(self.tier):
      reached = self.tier
      self.close()
      raise contract.SandboxError(
        f"the sandbox reaches tier {reached!r} here but min_tier is"
        f" {self._min_tier!r}: `python -m roc.main sandbox doctor` shows what"
        " is missing; or lower min_tier"
      )
    self._pump = threading.Thread(
      target=self._pump_results, name="roc-sandbox", daemon=True
    )
    self._pump.start()
    result = self.run("print(6 * 7)", limits=contract.Limits())
    self._figures = figures.Figures()  # the first call is nobody's
    if result.stdout != "42\n":
      self.close()
      raise contract.SandboxError(
        f"the sandbox cannot run a first program: {result.status.name.lower()}"
        f" {result.stderr[-300:].strip()}; check free memory and processes"
      )
    return self

  def close(self) -> None:
    """Ends the server and every call; open futures become INFRA. Idempotent."""
    with self._lock:
      self._is_closing = True
      pump, server = self._pump, self._link
      open_calls = [*self._queue.take_all(), *self._sent.values()]
      self._sent.clear()
      self._forget_sessions()
      self._has_room.notify_all()
    self._fail(open_calls, "the sandbox was closed")
    if server is not None:
      server.close()
    if pump is not None and pump is not threading.current_thread():
      pump.join()
    self._pump = self._link = None

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
      self._enqueue(call, time.monotonic() + self._queue_timeout_s)
    return call.future

  async def arun(self, code: str, **kw) -> contract.ToolResult:
    """`run` for asyncio; a task that is cancelled kills its program."""
    call = self._new_call(code, **_call_arguments(kw))
    if not call.future.done() and not self._enqueue(call, 0.0, is_final=False):
      deadline = time.monotonic() + self._queue_timeout_s
      await asyncio.to_thread(self._enqueue, call, deadline)
    try:
      return await asyncio.wrap_future(call.future)
    except asyncio.CancelledError:
      self._cancel_call(call)
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
    if self._pump is None or self._is_closing:
      raise contract.SandboxError(
        "the sandbox is not running: use `with Sandbox() as box:` or start()"
      )
    limits = limits or self._limits
    why = contract.rejection(code, stdin, limits, tool)
    if why is not None:
      code, stdin, tool = "", b"", contract.TOOLS[0]
    seed = calls.seed_digest(self._seed, trajectory, call_index)
    call = calls.Call.new(
      next(self._ids), code, stdin, tool, trajectory, limits, seed
    )
    if why is not None:
      self._resolve(
        call.future,
        contract.ToolResult(
          layout.ToolStatus.REJECTED, stderr=why, tier=self.tier
        ),
      )
    return call

  def _enqueue(
    self, call: calls.Call, deadline: float, is_final: bool = True
  ) -> bool:
    """Queues a call when there is room; at the deadline, if final, fails it."""
    refusal, cause = "", "sandbox"
    with self._lock:
      while self._queue.is_full and not self._is_closing:
        left = deadline - time.monotonic()
        if left <= 0 and not is_final:
          return False
        if left <= 0 or not self._has_room.wait(left):
          refusal, cause = "the sandbox's queue stayed full", "queue"
          break
      if self._is_closing:
        refusal = "the sandbox was closed"
      elif call.session in self._lost:
        refusal, cause = "the session was lost by the sandbox", "session"
      refusal = refusal or self._down_reason
      if not refusal:
        self._queue.push(call)
        self._dispatch()
    if refusal:
      self._fail([call], refusal, cause)
    return True

  def cancel(self, future: calls.Future) -> bool:
    """Kills the call behind a future; its result becomes INFRA.

    Args:
      future: one that `submit` returned.

    Returns:
      True when the call was queued or running, False when it was over.
    """
    with self._lock:
      found = _find([*self._queue, *self._sent.values()], future)
    return found is not None and self._cancel_call(found)

  def _cancel_call(self, call: calls.Call) -> bool:
    with self._lock:
      if call.id in self._sent:
        call.is_cancelled = True
        self._tell({"op": "cancel", "id": call.id})
        return True
      if call not in self._queue:
        return False
      self._queue.remove(call)
      self._has_room.notify()
    self._fail([call], "cancelled", "cancelled")
    return True

  def end_trajectory(self, trajectory: contract.Trajectory) -> None:
    """Cancels what a trajectory has queued or running and ends its session.

    A rollout that is over calls it, so that its session's memory is free.
    """
    name = calls.session_name(trajectory)
    with self._lock:
      queued = [c for c in self._queue if c.trajectory == trajectory]
      for call in queued:
        self._queue.remove(call)
      running = [c for c in self._sent.values() if c.trajectory == trajectory]
      for call in running:
        call.is_cancelled = True
        self._tell({"op": "cancel", "id": call.id})
      if name in self._used or name in self._busy:
        self._tell({"op": "end", "session": name})
      self._used.discard(name)
      self._lost.discard(name)
      self._has_room.notify_all()
    self._fail(queued, "cancelled", "cancelled")

  def _tell(self, message: dict) -> None:
    """Sends to the supervisor; one that is gone needs no telling."""
    with contextlib.suppress(OSError):
      if self._link is not None:
        self._link.send(message)

  # ------------------------------------------------------------------ figures

  @property
  def tier(self) -> str:
    """Confinement that is enforced, one of `contract.TIERS`; "" before start."""
    return self._plan.get("tier", "")

  @property
  def _plan(self) -> dict:
    return self._link.facts["plan"] if self._link is not None else {}

  def info(self) -> dict:
    """Returns what a run's record should say of its sandbox."""
    facts = self._link.facts if self._link is not None else {}
    return {
      "tier": self.tier,
      "min_tier": self._min_tier,
      "plan": self._plan,
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
    """Returns the counters since the start, see `figures.Figures.snapshot`.

    Beside them `restarts`, `queued` and `running`.
    """
    with self._lock:
      return {
        **self._figures.snapshot(),
        "restarts": self._restarts,
        "queued": len(self._queue),
        "running": len(self._sent),
      }

  # ----------------------------------------------------------------- internal

  def _new_link(self) -> link.Link:
    return link.Link.start(self._config, self._start_timeout_s)

  def _dispatch(self) -> None:
    """Sends what the supervisor may hold; the lock is held.

    Twice the workers: the next call is there when a worker gets free, and a
    dying supervisor takes few calls with it.
    """
    while self._link and len(self._sent) < 2 * self._config["n_workers"]:
      call = self._queue.pop(self._busy)
      if call is None:
        return
      self._has_room.notify()
      is_first = call.retries == 0
      if is_first and not call.future.set_running_or_notify_cancel():
        continue
      self._sent[call.id] = call
      if call.session:
        self._busy.add(call.session)
      # A broken socket is seen, and the call sent again, by the pump.
      self._tell(call.message)

  def _pump_results(self) -> None:
    """Thread: takes results; when the server dies, starts another one."""
    server = self._link
    while server is not None:
      for message in server.results(self._is_waiting):
        self._take(message)
      if self._is_closing:
        return
      server.close()
      server = self._restart()

  def _is_waiting(self) -> bool | None:
    """True while calls are out, None when the sandbox is being closed."""
    with self._lock:
      late = self._queue.take_late(self._queue_timeout_s)
      self._has_room.notify_all()
    self._fail(late, "the call waited too long in the queue", "queue")
    return None if self._is_closing else bool(self._sent)

  def _take(self, message: dict) -> None:
    result = contract.ToolResult.from_fields(message["result"])
    with self._lock:
      call = self._sent.pop(message["id"], None)
      if call is None:
        return
      self._busy.discard(call.session)
      is_fault = result.status == layout.ToolStatus.INFRA
      if is_fault and self._may_retry(call):
        call.retries = 1
        self._queue.push_first(call)
        self._dispatch()
        return
      if call.session:
        (self._lost if is_fault else self._used).add(call.session)
      self._dispatch()
    result = dataclasses.replace(result, tier=self.tier, retries=call.retries)
    waited = (time.monotonic() - call.submitted) * 1e3 - result.wall_ms
    self._resolve(call.future, result, waited)

  def _may_retry(self, call: calls.Call) -> bool:
    """Once, and a cell only where nothing before it can be missing."""
    is_whole = call.session not in self._used
    return call.retries == 0 and not call.is_cancelled and is_whole

  def _forget_sessions(self) -> None:
    """Notes that every session is gone with its supervisor."""
    self._lost |= self._used
    self._used.clear()
    self._busy.clear()

  def _restart(self) -> link.Link | None:
    """Starts another supervisor; calls lost twice, and all if not, fail."""
    with self._lock:
      lost = list(self._sent.values())
      self._sent.clear()
      self._restarts += 1
      again = [c for c in lost if self._may_retry(c)]
      self._forget_sessions()
      for call in reversed(again):
        call.retries = 1
        self._queue.push_first(call)
      orphaned = [c for c in self._queue if c.session in self._lost]
      for call in orphaned:
        self._queue.remove(call)
      self._link = None
    gone = [c for c in lost if c not in again]
    self._fail(gone, "the sandbox's supervisor died")
    self._fail(orphaned, "the session was lost by the sandbox", "session")
    reason = ""
    for pause_s in _RESTART_PAUSES_S:
      time.sleep(pause_s)
      if self._is_closing:
        return None
      try:
        server = self._new_link()
      except contract.SandboxError as error:
        reason = str(error)
        continue
      with self._lock:
        if not self._is_closing:
          self._link = server
          self._dispatch()
          return server
      server.close()
      return None
    with self._lock:
      self._down_reason = reason
      left = self._queue.take_all()
      self._has_room.notify_all()
    self._fail(left, reason)
    return None

  def _fail(
    self, failed: list[calls.Call], why: str, cause: str = "sandbox"
  ) -> None:
    for call in failed:
      self._resolve(call.future, call.infra(why, self.tier, cause))

  def _resolve(
    self,
    future: calls.Future,
    result: contract.ToolResult,
    waited_ms: float = 0.0,
  ) -> None:
    """Counts and delivers a result; never under the lock (callbacks run)."""
    with self._lock:
      self._figures.add(result, waited_ms)
    # A future cancelled by its holder is done already.
    with contextlib.suppress(concurrent.futures.InvalidStateError):
      future.set_result(result)


def _is_linux() -> bool:
  return sys.platform.startswith("linux")


def _find(
  among: Iterable[calls.Call], future: calls.Future
) -> calls.Call | None:
  return next((call for call in among if call.future is future), None)


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
    name: [m for m in modules if importlib.util.find_spec(m) is not None]
    for name, modules in routing.IMAGES.items()
  }
  found = {n: m for n, m in found.items() if m or n == routing.BARE}
  return {**found, routing.BARE: list(preload)}
