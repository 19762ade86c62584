"""The trainer's side: a bounded queue of calls, futures, and a server to spare.

`submit` never blocks on a program and `run` never raises for one: whatever a
program does comes back as a `ToolResult`. A fault of the sandbox itself is
INFRA, after one more try on a new server.
"""

import base64
import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import itertools
import os
import platform
import sys
import threading
import time

from roc import layout
from roc.host.sandbox import contract, link

Future = concurrent.futures.Future[contract.ToolResult]
Trajectory = str | int | tuple

_DEFAULT_LIMITS = contract.Limits()
_PING_AFTER_S = 2.0
_DEAD_AFTER_S = 20.0
_RESTART_PAUSES_S = (0.0, 0.2, 1.0)


@dataclasses.dataclass
class _Call:
  """A submitted call until its future has its result."""

  id: int
  message: dict
  future: Future
  submitted: float
  sent: float = 0.0
  retries: int = 0
  is_cancelled: bool = False


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
    self._queue: collections.deque[_Call] = collections.deque()
    self._sent: dict[int, _Call] = {}
    self._link: link.Link | None = None
    self._pump: threading.Thread | None = None
    self._is_closing = False
    self._down_reason = ""
    self._counts: collections.Counter[str] = collections.Counter()
    self._restarts = 0
    self._wall_ms: collections.deque[float] = collections.deque(maxlen=4096)
    self._wait_ms: collections.deque[float] = collections.deque(maxlen=4096)

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
    self._forget_figures()
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
      calls = [*self._queue, *self._sent.values()]
      self._queue.clear()
      self._sent.clear()
    self._fail(calls, "the sandbox was closed")
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
    trajectory: Trajectory = "",
    call_index: int = 0,
    limits: contract.Limits | None = None,
  ) -> Future:
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
      REJECTED with a sentence for the model; a full queue is INFRA.

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
    future: Future = concurrent.futures.Future()
    why = contract.rejection(code, stdin, limits)
    if why is not None:
      self._resolve(
        future,
        contract.ToolResult(
          layout.ToolStatus.REJECTED, stderr=why, tier=self.tier
        ),
      )
      return future
    data = base64.b64encode(contract.stdin_bytes(stdin)).decode("ascii")
    call_id = next(self._ids)
    message = {
      "op": "call",
      "id": call_id,
      "code": code,
      "stdin": data,
      "limits": limits.to_json(),
      "seed": seed_digest(self._seed, trajectory, call_index),
    }
    call = _Call(call_id, message, future, time.monotonic())
    with self._lock:
      refusal = self._down_reason
      if not refusal and len(self._queue) >= self._queue_size:
        refusal = f"the sandbox's queue is full ({self._queue_size} calls)"
      if not refusal:
        self._queue.append(call)
        self._dispatch()
    if refusal:
      self._fail([call], refusal)
    return future

  def run(self, code: str, **kw) -> contract.ToolResult:
    """Runs one program and returns its result; arguments as for `submit`."""
    return self.submit(code, **kw).result()

  def cancel(self, future: Future) -> bool:
    """Kills the call behind a future; its result becomes INFRA.

    Args:
      future: one that `submit` returned.

    Returns:
      True when the call was queued or running, False when it was over.
    """
    with self._lock:
      for call in self._queue:
        if call.future is future:
          self._queue.remove(call)
          queued = call
          break
      else:
        queued = None
        for call in self._sent.values():
          if call.future is future and self._link is not None:
            call.is_cancelled = True
            with contextlib.suppress(OSError):
              self._link.send({"op": "cancel", "id": call.id})
            return True
    if queued is None:
      return False
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
    """Returns counters since the start; percentiles over the last 4,096 calls.

    `calls`, `status` (name -> how many), `p50_ms` and `p99_ms` in the child,
    `wait_p50_ms` and `wait_p99_ms` from submission to result less that,
    `restarts`, `queued`, `running`.
    """
    with self._lock:
      wall, wait = sorted(self._wall_ms), sorted(self._wait_ms)
      return {
        "calls": sum(self._counts.values()),
        "status": dict(self._counts),
        "p50_ms": _quantile(wall, 0.5),
        "p99_ms": _quantile(wall, 0.99),
        "wait_p50_ms": _quantile(wait, 0.5),
        "wait_p99_ms": _quantile(wait, 0.99),
        "restarts": self._restarts,
        "queued": len(self._queue),
        "running": len(self._sent),
      }

  def _forget_figures(self) -> None:
    with self._lock:
      self._counts.clear()
      self._wall_ms.clear()
      self._wait_ms.clear()

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
    while self._queue and len(self._sent) < 2 * self._n_workers:
      call = self._queue.popleft()
      is_first = call.retries == 0
      if is_first and not call.future.set_running_or_notify_cancel():
        continue
      call.sent = time.monotonic()
      self._sent[call.id] = call
      # A broken socket is seen, and the call sent again, by the pump.
      with contextlib.suppress(OSError):
        if self._link is not None:
          self._link.send(call.message)

  def _pump_results(self) -> None:
    """Thread: takes results; when the server dies, starts another one."""
    server = self._link
    while server is not None:
      self._serve_until_end(server)
      if self._is_closing:
        return
      server.close()
      server = self._restart()

  def _serve_until_end(self, server: link.Link) -> None:
    heard = pinged = time.monotonic()
    while not self._is_closing:
      messages = server.receive(0.5)
      now = time.monotonic()
      if messages is None:
        return
      if messages or not self._sent:
        heard = now
      elif now > heard + _DEAD_AFTER_S:
        server.kill()
        return
      elif now > max(heard, pinged) + _PING_AFTER_S:
        pinged = now
        with self._lock, contextlib.suppress(OSError):
          server.send({"op": "ping"})
      for message in messages:
        if message.get("op") == "result":
          self._take(message)

  def _take(self, message: dict) -> None:
    result = contract.ToolResult.from_json(message["result"])
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
      calls = list(self._queue)
      self._queue.clear()
    self._fail(calls, reason)
    return None

  def _fail(self, calls: list[_Call], why: str) -> None:
    for call in calls:
      self._resolve(
        call.future,
        contract.ToolResult(
          layout.ToolStatus.INFRA,
          stderr=why,
          tier=self.tier,
          retries=call.retries,
        ),
      )

  def _resolve(
    self, future: Future, result: contract.ToolResult, waited_ms: float = 0.0
  ) -> None:
    """Counts and delivers a result; never under the lock (callbacks run)."""
    with self._lock:
      self._counts[result.status.name.lower()] += 1
      if result.wall_ms:
        self._wall_ms.append(result.wall_ms)
        self._wait_ms.append(max(0.0, waited_ms))
    # A future cancelled by its holder is done already.
    with contextlib.suppress(concurrent.futures.InvalidStateError):
      future.set_result(result)


def seed_digest(seed: int, trajectory: Trajectory, call_index: int) -> str:
  """Returns the hex seed of one call, the same on every host and in every run.

  Args:
    seed: of the run.
    trajectory: stable id of the rollout: a string, an int or a tuple of these.
    call_index: of the call in its rollout.
  """
  text = f"{seed}\0{trajectory!r}\0{call_index}"
  return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()


def _is_linux() -> bool:
  return sys.platform.startswith("linux")


def _quantile(ordered: list[float], q: float) -> float:
  """Returns the q-quantile of a sorted list, 0.0 for an empty one."""
  return ordered[int(q * (len(ordered) - 1))] if ordered else 0.0
