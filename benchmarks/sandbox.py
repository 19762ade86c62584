"""Tool calls in the sandbox against a fresh interpreter per call.

Ours and the peers run batches in turns, with as many client threads as the
sandbox has workers, and medians over the batches are compared. Processor time
comes first, wall time beside it. Ours is all that is spent below the trainer
and in it: keeper, supervisor, templates, zygotes, every call and process 1 of
every pid namespace, and this process' own threads. The peer is charged its
processes and this process' threads.

The peer is `python -I -c` in a fresh process with our limits on address space,
CPU, files and processes. The limits are set from outside by prlimit(2) once the
process runs, which costs it nothing. Where `bwrap` is installed the same
program is also run under it; process 1 of its pid namespace is adopted and
reaped here, so that its time counts too.

A row whose case ends in `ratio` or `target` puts a bound beside the figure:
its own ratio is at most 1 where the bound is kept.

  python -m benchmarks.sandbox [--json] [--sessions 512] [--burst 2000]
"""

import collections
import contextlib
import os
import resource
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator

from benchmarks import common
from roc import layout
from roc.host.sandbox import contract, link, linux, pool

BENCH = "sandbox"
TRIVIAL = "print(1 + 1)"
MATHS_LOADED = "import numpy, sympy; print(1 + 1)"
MATHS = """import numpy, sympy
x = sympy.Symbol("x")
print(sympy.factor(x**4 - 5*x**2 + 4), numpy.arange(4).sum())
"""
FRESH = "fresh python -I"
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
_LIMITS = contract.Limits()


# ------------------------------------------------------------------ the clocks


def own_cpu_s() -> float:
  """CPU seconds of this process' threads."""
  return sum(resource.getrusage(resource.RUSAGE_SELF)[:2])


def peer_cpu_s() -> float:
  """CPU seconds of this process' threads and of its reaped children."""
  return own_cpu_s() + sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])


def _reaped_s(pid: int) -> float:
  """CPU seconds of the children that a process has reaped."""
  with open(f"/proc/{pid}/stat", "rb") as f:
    fields = f.read().rpartition(b")")[2].split()
  return (int(fields[13]) + int(fields[14])) * _TICK_S


def sandbox_cpu_s(box: pool.Sandbox) -> float:
  """CPU seconds of this process' threads and of all that a sandbox is."""
  supervisor = box.supervisor_pid
  assert supervisor is not None
  living = [linux.parent(supervisor), supervisor, *linux.children(supervisor)]
  return (
    own_cpu_s() + sum(map(linux.cpu_seconds, living)) + _reaped_s(supervisor)
  )


# ------------------------------------------------------------------- the sides


class Side:
  """One way of running a program, timed in batches.

  Args:
    call: runs the program once and checks what it printed.
    cpu_s: clock that its processor time is read from.
    n_calls: in a batch.
    n_clients: threads that make them.
  """

  def __init__(
    self,
    call: Callable[[], None],
    cpu_s: Callable[[], float],
    n_calls: int,
    n_clients: int,
  ):
    self._call = call
    self._cpu_s = cpu_s
    self._n_calls = n_calls
    self._n_clients = n_clients
    self.cpu_ms: list[float] = []  # per call, one entry a batch
    self.wall_ms: list[float] = []

  def run_batch(self, is_timed: bool = True) -> None:
    """Runs one batch in a closed loop."""
    cpu, wall = self._cpu_s(), time.perf_counter()
    in_parallel(self._call, self._n_calls, self._n_clients)
    cpu, wall = self._cpu_s() - cpu, time.perf_counter() - wall
    if is_timed:
      self.cpu_ms.append(cpu / self._n_calls * 1e3)
      self.wall_ms.append(wall / self._n_calls * 1e3)


def in_parallel(call: Callable[[], None], n_calls: int, n: int) -> None:
  """Makes `n_calls` calls from `n` threads; raises what one of them raised."""
  failures: list[BaseException] = []

  def go(n_mine: int) -> None:
    try:
      for _ in range(n_mine):
        call()
    except BaseException as error:
      failures.append(error)

  shares = [n_calls // n + (i < n_calls % n) for i in range(n)]
  threads = [threading.Thread(target=go, args=(share,)) for share in shares]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  if failures:
    raise failures[0]


def alternate(sides: dict[str, Side], n_rounds: int) -> None:
  """Runs batches of all sides in turns, after one that is not timed."""
  for round_ in range(n_rounds + 1):
    for side in sides.values():
      side.run_batch(is_timed=round_ > 0)


def sandboxed(box: pool.Sandbox, code: str) -> Callable[[], None]:
  """Returns what runs a program in the sandbox."""

  def call() -> None:
    result = box.run(code)
    if result.status != layout.ToolStatus.OK or not result.stdout:
      raise RuntimeError(f"{code!r} ended with {result}")

  return call


def in_fresh_process(command: list[str], limit: bool) -> Callable[[], None]:
  """Returns what runs a command in a process of its own."""
  n_bytes = _LIMITS.memory_mb << 20
  limits = {
    resource.RLIMIT_CORE: 0,
    resource.RLIMIT_CPU: int(_LIMITS.cpu_s),
    resource.RLIMIT_FSIZE: _LIMITS.file_mb << 20,
    resource.RLIMIT_NOFILE: _LIMITS.n_files,
    resource.RLIMIT_NPROC: 4096,
    resource.RLIMIT_AS: n_bytes,
  }

  def call() -> None:
    with subprocess.Popen(
      command,
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      env=link.ENVIRONMENT,
    ) as process:
      for kind, value in limits.items() if limit else ():
        with contextlib.suppress(ProcessLookupError):
          resource.prlimit(process.pid, kind, (value, value))
      output, _ = process.communicate()
    if process.returncode != 0 or not output:
      raise RuntimeError(f"{command} ended with {process.returncode}: {output}")

  return call


def _bubblewrap() -> str | None:
  """Path of a `bwrap` that works here, or None."""
  path = shutil.which("bwrap")
  if path is None:
    return None
  linux.adopt_orphans()  # its process 1 outlives it by a moment
  done = subprocess.run(_wrapped(path, "print(1)"), capture_output=True)
  return path if done.returncode == 0 else None


def _wrapped(bwrap: str, code: str) -> list[str]:
  options = ["--unshare-all", "--ro-bind", "/", "/", "--tmpfs", "/tmp"]
  return [bwrap, *options, sys.executable, "-I", "-c", code]


def _wrapped_cpu_s() -> float:
  """`peer_cpu_s` with the orphans of bubblewrap reaped."""
  supervisors = set(linux.children(os.getpid()))
  deadline = time.monotonic() + 1.0
  while time.monotonic() < deadline:
    dead = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if dead is not None:
      os.waitpid(dead.si_pid, 0)
      continue
    if not _names(supervisors) & {"bwrap"}:
      break
    time.sleep(0.005)
    supervisors = set(linux.children(os.getpid()))
  return peer_cpu_s()


def _names(pids: Iterable[int]) -> set[str]:
  names = set()
  for pid in pids:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/comm") as f:
      names.add(f.read().strip())
  return names


# -------------------------------------------------------------------- the rows


def row(case: str, ours: float, peer, peer_name: str, unit: str) -> common.Row:
  """Returns a row of this benchmark."""
  return common.Row(BENCH, case, ours, peer, peer_name, unit)


def compared(
  case: str, ours: Side, peer: Side, peer_name: str, bound: float | None
) -> list[common.Row]:
  """CPU and wall of a pair, and the bound on the ratio of CPU."""
  cpu, peer_cpu = map(statistics.median, (ours.cpu_ms, peer.cpu_ms))
  wall, peer_wall = map(statistics.median, (ours.wall_ms, peer.wall_ms))
  rows = [
    row(f"{case}, cpu", cpu, peer_cpu, peer_name, "ms/call"),
    row(f"{case}, wall", wall, peer_wall, peer_name, "ms/call"),
  ]
  if bound is not None:
    pairs = zip(ours.cpu_ms, peer.cpu_ms, strict=True)
    ratio = statistics.median(a / b for a, b in pairs)
    name = "target: at most"
    rows.insert(1, row(f"{case}, cpu ratio", ratio, bound, name, "ours/peer"))
  return rows


def measure_calls(n_clients: int, n_rounds: int) -> Iterator[common.Row]:
  """Trivial and mathematical programs against fresh processes."""
  python = [sys.executable, "-I", "-c"]
  bwrap = _bubblewrap()
  with pool.Sandbox(n_workers=n_clients) as box:
    ours = lambda code, n: Side(
      sandboxed(box, code), lambda: sandbox_cpu_s(box), n, n_clients
    )
    fresh = lambda code, n: Side(
      in_fresh_process([*python, code], True), peer_cpu_s, n, n_clients
    )
    sides = {
      "bare": ours(TRIVIAL, 200),
      "loaded": ours(MATHS_LOADED, 120),
      "fresh": fresh(TRIVIAL, 40),
    }
    if bwrap is not None:
      call = in_fresh_process(_wrapped(bwrap, TRIVIAL), False)
      sides["bwrap"] = Side(call, _wrapped_cpu_s, 20, n_clients)
    alternate(sides, n_rounds)
    print_, tier = f"`{TRIVIAL}`", box.tier
    bare, loaded = f"{print_}, bare, {tier}", f"{print_}, maths loaded, {tier}"
    yield from compared(bare, sides["bare"], sides["fresh"], FRESH, 1 / 4)
    yield from compared(loaded, sides["loaded"], sides["fresh"], FRESH, 1 / 2)
    if bwrap is None:
      yield row(
        f"{bare}, cpu", statistics.median(sides["bare"].cpu_ms), None,
        "bwrap: not installed, or it does not work here", "ms/call",
      )  # fmt: skip
    else:
      name = "bwrap + python -I"
      yield from compared(bare, sides["bare"], sides["bwrap"], name, None)
    sides = {"ours": ours(MATHS, 40), "fresh": fresh(MATHS, 4)}
    alternate(sides, max(2, n_rounds // 2))
    case = f"factor with sympy, {tier}"
    yield from compared(case, sides["ours"], sides["fresh"], FRESH, 1 / 12)


def measure_tiers(n_clients: int, n_rounds: int) -> Iterator[common.Row]:
  """The trivial call under each tier that holds here."""
  with contextlib.ExitStack() as open_boxes:
    sides = {}
    for tier in contract.TIERS[:-1]:
      box = pool.Sandbox(n_workers=n_clients, tier=tier)
      try:
        open_boxes.enter_context(box)
      except contract.SandboxError:
        continue
      clock = lambda box=box: sandbox_cpu_s(box)
      sides[tier] = Side(sandboxed(box, TRIVIAL), clock, 100, n_clients)
      box.run(MATHS_LOADED)  # the images load beside the first calls
    alternate(sides, n_rounds)
    weakest = next(iter(sides))
    base = statistics.median(sides[weakest].cpu_ms)
    for tier, side in sides.items():
      cpu = statistics.median(side.cpu_ms)
      case = f"`{TRIVIAL}`, {tier}, cpu"
      yield row(case, cpu, base, f"tier {weakest}", "ms/call")


def round_trips(
  box: pool.Sandbox, names: list[str], first: str, n: int, pause_s: float
) -> list[float]:
  """Sorted milliseconds of cells sent in turns to sessions."""
  for name in names:
    box.run(first, tool="session", trajectory=name)
  took = []
  for i in range(n):
    time.sleep(pause_s)
    began = time.perf_counter()
    result = box.run(TRIVIAL, tool="session", trajectory=names[i % len(names)])
    took.append((time.perf_counter() - began) * 1e3)
    if result.stdout != "2\n":
      raise RuntimeError(f"a cell ended with {result}")
  for name in names:
    box.end_trajectory(name)
  return sorted(took)


def measure_sessions(n: int) -> Iterator[common.Row]:
  """Round trips of trivial cells; the target is on the median."""
  one, many = ["s"], [f"s{i}" for i in range(16)]
  maths = "import numpy, sympy"
  cases = {
    "bare": (one, "x = 1", n, 0.0),
    "maths": (one, maths, n, 0.0),
    "bare, 16 in turns": (many, "x = 1", n, 0.0),
    "maths, 16 in turns": (many, maths, n, 0.0),
    "bare, 5 ms between cells": (one, "x = 1", n // 4, 0.005),
    "maths, 5 ms between cells": (one, maths, n // 4, 0.005),
  }
  with pool.Sandbox() as box:
    box.run(MATHS_LOADED)
    for case, arguments in cases.items():
      took = round_trips(box, *arguments)
      for q, bound in ((0.5, 0.5), (0.99, None)):
        ms = took[int(q * (len(took) - 1))]
        name = f"session round trip, {case}, p{q * 100:g}"
        what = "target: at most" if bound else ""
        yield row(name + (" target" if bound else ""), ms, bound, what, "ms")


def _memory_of_machine() -> dict[str, int]:
  """Kilobytes of /proc/meminfo by name."""
  with open("/proc/meminfo") as f:
    lines = (line.split() for line in f)
    return {words[0].rstrip(":"): int(words[1]) for words in lines}


def _kilobytes(pid: int, file: str, names: tuple[str, ...]) -> int:
  """Sum of the named lines of a file in /proc/PID; 0 when it is gone."""
  try:
    with open(f"/proc/{pid}/{file}") as f:
      lines = [line.split() for line in f]
  except OSError:
    return 0
  return sum(int(x[1]) for x in lines if x and x[0].rstrip(":") in names)


def _processes_by_tag(supervisor: int) -> dict[int, list[int]]:
  """Processes of each session: guardian, runner, process 1."""
  own = linux.read_tag(supervisor)
  found = collections.defaultdict(list)
  for pid in linux.descendants(supervisor, 1 << 20):
    tag = linux.read_tag(pid)
    if tag not in (None, own):
      found[tag].append(pid)
  return found


def measure_memory(n_sessions: int) -> Iterator[common.Row]:
  """What an idle session holds; the machine's own figures as a check."""
  for name, first in (("bare", "x = 1"), ("maths", "import numpy, sympy; x=1")):
    with pool.Sandbox(max_sessions=n_sessions) as box:
      box.run(MATHS_LOADED)
      before = _memory_of_machine()
      futures = [
        box.submit(first, tool="session", trajectory=i)
        for i in range(n_sessions)
      ]
      ended = collections.Counter(f.result().status.name for f in futures)
      if set(ended) != {"OK"}:
        raise RuntimeError(f"sessions ended with {ended}")
      time.sleep(1.0)  # the last runners are forked after the answers
      after = _memory_of_machine()
      assert box.supervisor_pid is not None
      sessions = _processes_by_tag(box.supervisor_pid).values()
      private = ("Private_Clean", "Private_Dirty")
      total = lambda file, names, s=sessions: [
        sum(_kilobytes(pid, file, names) for pid in pids) / 1024 for pids in s
      ]
      kb = total("smaps_rollup", private)
      tables = total("status", ("VmPTE",))
    case = f"{len(sessions)} live sessions, {name}, each:"
    grown = lambda k, a=after, b=before: (a[k] - b[k]) / n_sessions / 1024
    at_most = "target: at most"
    yield row(f"{case} private target", statistics.mean(kb), 20, at_most, "MiB")
    yield row(f"{case} private of the largest", max(kb), None, "", "MiB")
    yield row(f"{case} page tables", statistics.mean(tables), None, "", "MiB")
    yield row(
      f"{case} anonymous memory of the machine (what guardian and runner"
      " share is private to neither)",
      grown("AnonPages"), None, "", "MiB",
    )  # fmt: skip


def run_burst(box: pool.Sandbox, n: int) -> tuple[float, list[float], int]:
  """Queues `n` calls at once; returns calls/s, sorted waits in s, faults."""
  waits: list[float] = []
  n_faults = 0
  began = time.perf_counter()

  def note(future) -> None:
    nonlocal n_faults
    result = future.result()
    waits.append(time.perf_counter() - began - result.wall_ms / 1e3)
    n_faults += result.status == layout.ToolStatus.INFRA

  futures = []
  for i in range(n):
    future = box.submit(TRIVIAL, trajectory=i % 200, call_index=i // 200)
    future.add_done_callback(note)
    futures.append(future)
  for future in futures:
    future.result()
  rate = n / (time.perf_counter() - began)
  while len(waits) < n:
    time.sleep(0.001)
  return rate, sorted(waits), n_faults


def measure_burst(n_clients: int, n: int, rounds: int) -> Iterator[common.Row]:
  """A burst against a closed loop of as many clients as there are workers."""
  with pool.Sandbox(n_workers=n_clients) as box:
    box.run(MATHS_LOADED)
    loop = Side(sandboxed(box, TRIVIAL), own_cpu_s, n // 2, n_clients)
    loop.run_batch(is_timed=False)
    rates, spreads, faults = [], [], 0
    for _ in range(rounds):
      loop.run_batch()
      rate, waits, n_faults = run_burst(box, n)
      rates.append(rate)
      spreads.append(waits[-1] / statistics.median(waits))
      faults += n_faults
  closed = 1e3 / statistics.median(loop.wall_ms)
  burst = statistics.median(rates)
  case = f"{n} calls of 200 trajectories at once:"
  yield row(f"{case} rate", burst, closed, "closed loop", "calls/s")
  lost = max(0.0, 1 - burst / closed)
  at_most = "target: at most"
  yield row(f"{case} rate lost target", lost, 0.1, at_most, "share")
  spread = statistics.median(spreads)
  yield row(f"{case} longest/median wait target", spread, 3, at_most, "ratio")
  yield row(f"{case} INFRA (target: none)", faults, None, "", "calls")


def measure(args) -> Iterator[common.Row]:
  """All rows that were asked for."""
  load = lambda: os.getloadavg()[0]
  clients = len(os.sched_getaffinity(0))
  yield row("load average at the start", load(), None, "", "")
  parts: dict[str, Callable[[], Iterator[common.Row]]] = {
    "calls": lambda: measure_calls(clients, args.rounds),
    "tiers": lambda: measure_tiers(clients, args.rounds),
    "trips": lambda: measure_sessions(args.cells),
    "burst": lambda: measure_burst(clients, args.burst, 3),
    "memory": lambda: measure_memory(args.sessions),
  }
  for name in args.parts.split(",") if args.parts else parts:
    yield from parts[name]()
  yield row("load average at the end", load(), None, "", "")


def main() -> None:
  """Parses flags, measures, prints."""
  parser = common.parser(__doc__.splitlines()[0])
  parser.add_argument("--rounds", type=int, default=7)
  parser.add_argument("--cells", type=int, default=1000)
  parser.add_argument("--burst", type=int, default=2000)
  parser.add_argument("--sessions", type=int, default=512)
  parser.add_argument(
    "--parts", default="", help="some of calls,tiers,trips,burst,memory"
  )
  args = parser.parse_args()
  common.emit(measure(args), args.json)


if __name__ == "__main__":
  main()
