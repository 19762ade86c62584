"""The trainer's side: a bounded queue of calls, futures, and a server to spare.

`submit` never blocks on a program and `run` never raises for one: whatever a
program does comes back as a `ToolResult`. A fault of the sandbox itself is
INFRA, after one more try on a new server.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import itertools
import os
import platform
import sys
import threading
import time
from collections.abc import Iterable

from roc import layout
from roc.host.sandbox import calls, contract, figures, link

_DEFAULT_LIMITS = contract.Limits()
_RESTART_PAUSES_S = (0.0, 0.2, 1.0)


class Sandbox:
  """Runs programs in a separate, limited process; use as a context manager.

  Thread-safe. The confinement reached is `tier`; see the package's docstring
  for what that covers and what it does not.

  Args:
    limits: of every call that brings none of its own.
    n_workers: calls that run at a time; default one per usable core.
    min_tier: the weakest confinement that is acceptable.
    seed: of the run; with trajectory and call index it seeds each call's RNG.
    queue_size: calls that may wait; one more is answered INFRA at once.
    preload: further modules to load before forking (`numpy`, `sympy`): calls
      that import them become much cheaper and all others somewhat dearer.
    start_timeout_s: for the server to be ready.

  Raises:
    ValueError: an argument that cannot be.
  """

  def __init__(
    self,
    limits: contract.Limits = _DEFAULT_LIMITS,
    n_workers: int | None = None,
    min_tier: str = "process",
    seed: int = 0,
    queue_size: int = 16384,
    preload: tuple[str, ...] = (),
    start_timeout_s: float = 60.0,
  ):
    if min_tier not in contract.TIERS:
      raise ValueError(
        f"Sandbox: min_tier {min_tier!r} is none of {contract.TIERS}"
      )
    if n_workers is None:
      n_workers = len(os.sched_getaffinity(0)) if _is_linux() else 1
    for name, value in (("n_workers", n_workers), ("queue_size", queue_size)):
      if value < 1:
        raise ValueError(f"Sandbox: {name} must be at least 1, found {value}")
    self._limits = limits
    self._n_workers = n_workers
    self._min_tier = min_tier
    self._seed = seed
    self._queue_size = queue_size
    self._preload = tuple(preload)
    self._start_timeout_s = start_timeout_s
    self._lock = threading.Lock()
    self._ids = itertools.count()
    self._queue: collections.deque[calls.Call] = collections.deque()
    self._sent: dict[int, calls.Call] = {}
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
    if contract.TIERS.index(self._min_tier) > contract.TIERS.index(self.tier):
      raise contract.SandboxError(
        f"the sandbox reaches tier {self.tier!r} here but min_tier is"
        f" {self._min_tier!r}: lower min_tier, or run on a machine that allows"
        " stronger confinement"
      )
    self._is_closing = False
    self._down_reason = ""
    self._link = self._new_link()
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
      open_calls = [*self._queue, *self._sent.values()]
      self._queue.clear()
      self._sent.clear()
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

    Args:
      code: Python source, run as a script.
      stdin: what it reads; default nothing.
      tool: which tool; `python` is the one there is.
      trajectory: stable id of the rollout, part of the RNG seed.
      call_index: of this call in its rollout, part of the RNG seed.
      limits: instead of the sandbox's own.

    Returns:
      A future that never holds an exception. Code that cannot run at all is
      REJECTED with a sentence for the model; a full queue is INFRA. Its
      callbacks run on the sandbox's own thread and must not wait for a call.

    Raises:
      ValueError: unknown tool.
      contract.SandboxError: not started, or closed.
    """
    if tool not in contract.TOOLS:
      raise ValueError(
        f"Sandbox.submit: tool {tool!r} is none of {contract.TOOLS}"
      )
    if self._pump is None or self._is_closing:
      raise contract.SandboxError(
        "the sandbox is not running: use `with Sandbox() as box:` or start()"
      )
    limits = limits or self._limits
    future: calls.Future = concurrent.futures.Future()
    why = contract.rejection(code, stdin, limits)
    if why is not None:
      self._resolve(
        future,
        contract.ToolResult(
          layout.ToolStatus.REJECTED, stderr=why, tier=self.tier
        ),
      )
      return future
    seed = calls.seed_digest(self._seed, trajectory, call_index)
    new = calls.Call.new(next(self._ids), code, stdin, limits, seed, future)
    with self._lock:
      refusal = "the sandbox was closed" if self._is_closing else ""
      refusal = refusal or self._down_reason
      if not refusal and len(self._queue) >= self._queue_size:
        refusal = f"the sandbox's queue is full ({self._queue_size} calls)"
      if not refusal:
        self._queue.append(new)
        self._dispatch()
    if refusal:
      self._fail([new], refusal)
    return future

  def run(self, code: str, **kw) -> contract.ToolResult:
    """Runs one program and returns its result; arguments as for `submit`."""
    return self.submit(code, **kw).result()

  def cancel(self, future: calls.Future) -> bool:
    """Kills the call behind a future; its result becomes INFRA.

    Args:
      future: one that `submit` returned.

    Returns:
      True when the call was queued or running, False when it was over.
    """
    with self._lock:
      queued = _find(self._queue, future)
      if queued is None:
        running = _find(self._sent.values(), future)
        if running is None:
          return False
        running.is_cancelled = True
        with contextlib.suppress(OSError):
          if self._link is not None:
            self._link.send({"op": "cancel", "id": running.id})
        return True
      self._queue.remove(queued)
    self._fail([queued], "cancelled")
    return True

  # ------------------------------------------------------------------ figures

  @property
  def tier(self) -> str:
    """Confinement that is enforced, one of `contract.TIERS`."""
    return "process"

  def info(self) -> dict:
    """Returns what a run's record should say of its sandbox."""
    facts = self._link.facts if self._link is not None else {}
    return {
      "tier": self.tier,
      "min_tier": self._min_tier,
      "n_workers": self._n_workers,
      "limits": self._limits.to_json(),
      "preload": list(self._preload),
      "seed": self._seed,
      "python": facts.get("python"),
      "base_mb": facts.get("base_mb"),
      "kernel": platform.release(),
      "is_root": os.getuid() == 0,
    }

  @property
  def server_pid(self) -> int | None:
    """Process id of the fork server, None when there is none."""
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
    return link.Link.start(
      self._n_workers, self._preload, self._start_timeout_s
    )

  def _dispatch(self) -> None:
    """Sends what the server may hold; the lock is held.

    Twice the workers: the next call is there when a worker gets free, and a
    dying server takes few calls with it.
    """
    server = self._link  # None while a dead one is being replaced
    while server and self._queue and len(self._sent) < 2 * self._n_workers:
      call = self._queue.popleft()
      is_first = call.retries == 0
      if is_first and not call.future.set_running_or_notify_cancel():
        continue
      self._sent[call.id] = call
      # A broken socket is seen, and the call sent again, by the pump.
      with contextlib.suppress(OSError):
        server.send(call.message)

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
    return None if self._is_closing else bool(self._sent)

  def _take(self, message: dict) -> None:
    result = contract.ToolResult.from_fields(message["result"])
    with self._lock:
      call = self._sent.pop(message["id"], None)
      if call is None:
        return
      is_fault = result.status == layout.ToolStatus.INFRA
      if is_fault and call.retries == 0 and not call.is_cancelled:
        call.retries = 1
        self._queue.appendleft(call)
        call = None
      self._dispatch()
    if call is not None:
      result = dataclasses.replace(result, tier=self.tier, retries=call.retries)
      waited = (time.monotonic() - call.submitted) * 1e3 - result.wall_ms
      self._resolve(call.future, result, waited)

  def _restart(self) -> link.Link | None:
    """Starts another server; calls lost twice, and all if it fails, fail."""
    with self._lock:
      lost = list(self._sent.values())
      self._sent.clear()
      self._restarts += 1
      again = [c for c in lost if c.retries == 0 and not c.is_cancelled]
      for call in again:
        call.retries = 1
      self._queue.extendleft(reversed(again))
      self._link = None
    self._fail([c for c in lost if c not in again], "the sandbox server died")
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
      left = list(self._queue)
      self._queue.clear()
    self._fail(left, reason)
    return None

  def _fail(self, failed: list[calls.Call], why: str) -> None:
    for call in failed:
      self._resolve(call.future, call.infra(why, self.tier))

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
