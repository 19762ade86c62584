"""A client of somebody else's executor, with the interface of `Sandbox`.

    with ExternalSandbox("http://judge:8088", protocol="code-judge") as box:
      result = box.run("print(2**10)")     # ToolResult(status=OK, ...)

For a laboratory that has a fleet of executors already. `protocol` names the
server: `code-judge` (rStar2-Agent's, `POST /run/long-batch`) or
`sandbox-fusion` (`POST /run_code`, one program a request).

What the tier `external` means: **nothing here confines anything.** Isolation is
whatever the operator has put around the server. The program and its input are
sent as they are; neither protocol can ask for less memory, fewer processes or
no network, so of `Limits` only `output_bytes` and `code_bytes` hold, and
`wall_s` with `sandbox-fusion`. With `code-judge` the time limit is the
server's, and so is a silent cut of the output at 1,000 characters.

The code is not altered, so no random generator is seeded there: what draws
random numbers differs from run to run. `seed` is only noted in `info()`.

A status is as good as what the server tells. Where code-judge takes a program's
fault for its own (`internal_error` for output that is not UTF-8 or that holds
its end mark `@@E`, `queue_timeout` for a worker that a program blocks) the call
is INFRA after its retries: a way for a model to have its calls excluded.

There is no `session`: neither server keeps state. To run all earlier cells
again before each new one, as rStar2's client does, repeats side effects.
"""

import asyncio
import concurrent.futures
import contextlib
import itertools
import math
import threading
import time
import uuid
from collections.abc import Callable, Mapping

from roc.host.sandbox import backlog, calls, contract, exchange, figures
from roc.host.sandbox import protocols as protocols_lib

_DEFAULT_LIMITS = contract.Limits()
_NO_SESSION = (
  "The call was not run: this sandbox keeps no state between calls and so has"
  " no tool 'session'; use 'python' and send the whole program."
)


class ExternalSandbox:
  """Runs programs on an HTTP executor; use as a context manager.

  Thread-safe. Faults of the executor are retried, each time later and in
  smaller batches, so that a program that breaks its batch soon runs alone.

  Args:
    url: of the server, `http://host:port`.
    protocol: `code-judge` or `sandbox-fusion`.
    limits: of every call that brings none of its own; see the module.
    seed: of the run; only noted.
    max_batch: programs in one request. What is there is sent at once, spread
      over the free senders: a batch is answered when its slowest program is.
    concurrency: requests that are open at a time.
    timeout_s: for an answer, on top of its calls' `wall_s`.
    max_retries: further tries of a call that the executor failed.
    backoff_s: before the first of them; doubles from one to the next.
    queue_size: calls that may wait; `submit` blocks while there are as many.
    queue_timeout_s: after which a call that waits, retries included, is INFRA.
    start_timeout_s: for the server to answer the first calls.
    token_file: holds a token, sent as `Authorization: Bearer ...`.
    headers: further ones of every request; only their names are recorded.

  Raises:
    ValueError: an argument that cannot be.
  """

  def __init__(
    self,
    url: str,
    *,
    protocol: str = "code-judge",
    limits: contract.Limits = _DEFAULT_LIMITS,
    seed: int = 0,
    max_batch: int = 32,
    concurrency: int = 8,
    timeout_s: float = 60.0,
    max_retries: int = 4,
    backoff_s: float = 0.5,
    queue_size: int = 16384,
    queue_timeout_s: float = 600.0,
    start_timeout_s: float = 60.0,
    token_file: str | None = None,
    headers: Mapping[str, str] | None = None,
  ):
    if protocol not in protocols_lib.PROTOCOLS:
      raise ValueError(
        f"ExternalSandbox: there is no protocol {protocol!r}: choose one of "
        + ", ".join(protocols_lib.PROTOCOLS)
      )
    _check_least(
      1, max_batch=max_batch, concurrency=concurrency, queue_size=queue_size
    )
    _check_least(0, max_retries=max_retries)
    _check_least(1e-3, timeout_s=timeout_s, backoff_s=backoff_s)
    _check_least(
      1e-3, queue_timeout_s=queue_timeout_s, start_timeout_s=start_timeout_s
    )
    self._protocol_name = protocol
    self._protocol = protocols_lib.PROTOCOLS[protocol]
    self._address = exchange.Address.parse(url, self._protocol.path)
    self._limits = limits
    self._seed = seed
    self._max_batch = min(max_batch, self._protocol.max_batch)
    self._concurrency = concurrency
    self._timeout_s = timeout_s
    self._queue_timeout_s = queue_timeout_s
    self._start_timeout_s = start_timeout_s
    self._tick_s = min(0.25, timeout_s / 4, queue_timeout_s / 4, backoff_s / 2)
    self._client = exchange.Client(self._address, headers or {}, token_file)
    self._name = uuid.uuid4().hex[:12]
    self._ids = itertools.count()
    self._line_offset = 0
    self._backlog = backlog.Backlog(
      capacity=queue_size,
      max_wait_s=queue_timeout_s,
      max_batch=self._max_batch,
      max_retries=max_retries,
      backoff_s=backoff_s,
    )
    self._is_closing = False
    self._threads: list[threading.Thread] = []
    self._lock = threading.Lock()  # of the figures
    self._figures = figures.Figures()

  # ---------------------------------------------------------------- lifecycle

  def __enter__(self) -> "ExternalSandbox":
    return self.start()

  def __exit__(self, *exc) -> None:
    self.close()

  def start(self) -> "ExternalSandbox":
    """Starts the senders and checks the server with two calls; returns self.

    Raises:
      contract.SandboxError: the token cannot be read, nobody is there, or what
        is there is no such executor.
    """
    if self._threads:
      return self
    self._client.open()
    self._is_closing = False
    self._backlog.open()
    jobs = [self._keep_time, *[self._send_batches] * self._concurrency]
    self._threads = [
      threading.Thread(target=job, name="roc-external", daemon=True)
      for job in jobs
    ]
    for thread in self._threads:
      thread.start()
    self._line_offset = 0
    try:
      self._line_offset = protocols_lib.probe(self._try, str(self._address))
    except BaseException:
      self.close()
      raise
    with self._lock:
      self._figures = figures.Figures()  # the first calls are nobody's
    return self

  def _try(self, code: str) -> contract.ToolResult:
    try:
      future = self.submit(code, limits=contract.Limits())
      return future.result(self._start_timeout_s)
    except TimeoutError:
      return protocols_lib.fault(f"no answer within {self._start_timeout_s} s")

  def close(self) -> None:
    """Ends every request; open futures become INFRA. Idempotent.

    What the server is running by then runs to its end there.
    """
    self._is_closing = True
    threads, self._threads = self._threads, []
    self._client.close(backlog.CLOSED)
    self._fail(self._backlog.close(), backlog.CLOSED)
    for thread in threads:
      if thread is not threading.current_thread():
        thread.join()

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
      code: Python source of a script.
      stdin: what it reads; UTF-8 text, which is all that the protocols carry.
      tool: `python`; `session` is REJECTED, see the module.
      trajectory: stable id of the rollout; rollouts take turns in the queue.
      call_index: of this call in its rollout; unused, as nothing is seeded.
      limits: instead of the sandbox's own.

    Returns:
      A future that never holds an exception. Code that cannot run at all is
      REJECTED with a sentence for the model; a queue that stays full is INFRA.
      Its callbacks run on a thread of the sandbox's and must not wait for a
      call.

    Raises:
      contract.SandboxError: not started, or closed.
    """
    call = self._new_call(code, stdin, tool, trajectory, call_index, limits)
    if not call.future.done():
      self._put(call, self._queue_timeout_s)
    return call.future

  async def arun(self, code: str, **kw) -> contract.ToolResult:
    """`run` for asyncio; a task that is cancelled gives its call up."""
    call = self._new_call(code, **kw)
    if not call.future.done():
      # Only a queue that is full is worth a thread.
      why = self._backlog.put(call, 0.0)
      if why == backlog.FULL:
        await asyncio.to_thread(self._put, call, self._queue_timeout_s)
      elif why:
        self._fail([call], why)
    try:
      return await asyncio.wrap_future(call.future)
    except asyncio.CancelledError:
      self._give_up(lambda other: other is call)
      raise

  def run(self, code: str, **kw) -> contract.ToolResult:
    """Runs one program and returns its result; arguments as for `submit`."""
    return self.submit(code, **kw).result()

  def cancel(self, future: calls.Future) -> bool:
    """Gives up the call behind a future; its result becomes INFRA.

    A program that the server has already runs to its end there: neither
    protocol can ask for less. Returns True when the call was queued or sent,
    False when it was over.
    """
    return self._give_up(lambda call: call.future is future)

  def end_trajectory(self, trajectory: contract.Trajectory) -> None:
    """Gives up what a trajectory has queued or sent."""
    self._give_up(lambda call: call.trajectory == trajectory)

  def _give_up(self, is_meant: Callable[[calls.Call], bool]) -> bool:
    found = self._backlog.remove(is_meant)
    self._fail(found, "cancelled", "cancelled")
    return bool(found)

  def _new_call(
    self,
    code: str,
    stdin: bytes | str = b"",
    tool: str = "python",
    trajectory: contract.Trajectory = "",
    call_index: int = 0,
    limits: contract.Limits | None = None,
  ) -> calls.Call:
    del call_index
    if not self._threads:
      raise contract.SandboxError(
        "the sandbox is not running: use `with ExternalSandbox(...) as box:`"
        " or start()"
      )
    limits = limits or self._limits
    why, text = contract.rejection(code, stdin, limits, tool), ""
    if why is None and tool == "session":
      why = _NO_SESSION
    if why is None:
      try:
        text = contract.stdin_bytes(stdin).decode("utf-8")
      except UnicodeDecodeError:
        why = "The call was not run: stdin must be UTF-8 text."
    number = next(self._ids)
    program = protocols_lib.Program(
      f"{self._name}-{number}", code, text, limits
    )
    message = {"session": "", "program": program}
    future: calls.Future = concurrent.futures.Future()
    call = calls.Call(number, trajectory, message, future, time.monotonic())
    if why is not None:
      self._resolve(call, protocols_lib.rejected(why))
    return call

  def _put(self, call: calls.Call, wait_s: float) -> None:
    """Queues a call, or fails it."""
    why = self._backlog.put(call, wait_s)
    if why:
      cause = "queue" if why == backlog.FULL else "sandbox"
      self._fail([call], why, cause)

  # ------------------------------------------------------------------ figures

  @property
  def tier(self) -> str:
    """Always `external`: isolation is the operator's affair."""
    return protocols_lib.TIER

  def info(self) -> dict:
    """Returns what a run's record should say of its sandbox; no secrets."""
    return {
      "tier": self.tier,
      "protocol": self._protocol_name,
      "url": str(self._address),
      "headers": self._client.header_names,
      "max_batch": self._max_batch,
      "concurrency": self._concurrency,
      "timeout_s": self._timeout_s,
      "limits": self._limits.to_json(),
      "line_offset": self._line_offset,
      "seed": self._seed,
    }

  def stats(self) -> dict:
    """Returns the counters since the start, see `figures.Figures.snapshot`.

    Beside them `requests`, `queued` and `running`.
    """
    with self._lock:
      counted = self._figures.snapshot()
    counted["requests"] = self._client.n_requests
    return {**counted, **self._backlog.counts()}

  # ----------------------------------------------------------------- internal

  def _send_batches(self) -> None:
    """Thread: one request at a time, until the sandbox is closed."""
    while (batch := self._backlog.next_batch()) is not None:
      results = self._ask([call.message["program"] for call in batch])
      for call, result in self._backlog.settle(batch, results):
        self._resolve(call, result)

  def _ask(
    self, programs: list[protocols_lib.Program]
  ) -> list[contract.ToolResult]:
    """Sends one request and returns as many results, INFRA without answer."""
    wall_s = max(program.limits.wall_s for program in programs)
    try:
      body = self._protocol.request(programs)
      answer = self._client.post(body, self._timeout_s + wall_s)
      results = self._protocol.results(answer, programs)
    except exchange.ExchangeError as error:
      results = [protocols_lib.fault(str(error))] * len(programs)
    except Exception as error:  # a sender that dies would hang its calls
      why = f"the answer broke the client: {type(error).__name__}"
      results = [protocols_lib.fault(why)] * len(programs)
    return [protocols_lib.tidy(r, self._line_offset) for r in results]

  def _keep_time(self) -> None:
    """Thread: ends what is late, and queues the retries that are due."""
    while not self._is_closing:
      late = self._backlog.tick()
      self._fail(late, "the call waited too long in the queue", "queue")
      self._client.end_late()
      time.sleep(self._tick_s)

  def _fail(
    self, failed: list[calls.Call], why: str, cause: str = "sandbox"
  ) -> None:
    for call in failed:
      self._resolve(call, call.infra(why, self.tier, cause))

  def _resolve(self, call: calls.Call, result: contract.ToolResult) -> None:
    """Counts and delivers a result; never under the lock (callbacks run)."""
    waited_ms = (time.monotonic() - call.submitted) * 1e3 - result.wall_ms
    with self._lock:
      self._figures.add(result, waited_ms)
    # A future cancelled by its holder is done already.
    with contextlib.suppress(concurrent.futures.InvalidStateError):
      call.future.set_result(result)


def _check_least(least: float, **values: float) -> None:
  for name, value in values.items():
    if not least <= value < math.inf:
      raise ValueError(
        f"ExternalSandbox: {name} must be at least {least} and finite, found"
        f" {value}"
      )
