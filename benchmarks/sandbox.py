"""Tool calls in the sandbox against a fresh interpreter per call.

Ours and the peers run batches in turns, from as many client threads as the
sandbox has workers, and medians over batches are compared: processor time
first, wall time beside it. Ours is all that is spent below this process and in
it: keeper, supervisor, templates, zygotes, calls, process 1 of their pid
namespaces, and this process' threads. A peer is charged its processes and this
process' threads. It is `python -I -c` in a fresh process, under our limits: set
from outside by prlimit(2) while it starts, they cost it nothing. Where `bwrap`
works the program is also run under it, without limits; process 1 of its pid
namespace is adopted and reaped here, so that its time counts too.

Rows named `target` hold a figure beside its bound: their ratio is at most 1
where the bound is kept.

  python -m benchmarks.sandbox [--json] [--sessions 512] [--burst 2000]
"""

import collections
import contextlib
import dataclasses
import os
import resource
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures

from benchmarks import common
from roc import layout
from roc.host.sandbox import contract, link, linux, pool

TRIVIAL = "print(1 + 1)"
MATHS_LOADED = "import numpy, sympy; print(1 + 1)"
MATHS = """import numpy, sympy
x = sympy.Symbol("x")
print(sympy.factor(x**4 - 5*x**2 + 4), numpy.arange(4).sum())
"""
_CLIENTS = len(os.sched_getaffinity(0))
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
_LIMITS = contract.Limits()


def row(
  case: str, ours: float, unit: str, peer=None, peer_name=""
) -> common.Row:
  """Returns a row of this benchmark."""
  return common.Row("sandbox", case, ours, peer, peer_name, unit)


def target(case: str, ours: float, unit: str, bound: float) -> common.Row:
  """Returns a row that holds a figure against a bound."""
  return row(f"{case}, target", ours, unit, bound, "at most")


def own_cpu_s() -> float:
  """CPU seconds of this process' threads."""
  return sum(resource.getrusage(resource.RUSAGE_SELF)[:2])


def peer_cpu_s() -> float:
  """The same and those of this process' children, orphans of theirs reaped."""
  time.sleep(0.02)
  with contextlib.suppress(ChildProcessError):
    while os.waitpid(-1, os.WNOHANG) != (0, 0):
      pass
  return own_cpu_s() + sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])


def sandbox_cpu_s(box: pool.Sandbox) -> float:
  """CPU seconds of this process' threads and of all that a sandbox is."""
  supervisor = box.supervisor_pid
  assert supervisor is not None
  with open(f"/proc/{supervisor}/stat", "rb") as f:
    fields = f.read().rpartition(b")")[2].split()
  reaped_s = (int(fields[13]) + int(fields[14])) * _TICK_S
  below = linux.descendants(supervisor, 1 << 20)
  living = [linux.parent(supervisor), supervisor, *below]
  return own_cpu_s() + reaped_s + sum(map(linux.cpu_seconds, living))


@dataclasses.dataclass
class Side:
  """One way of running a program, timed in batches.

  Attributes:
    call: runs the program once and checks that it printed something.
    cpu_s: clock that its processor time is read from.
    n_calls: in a batch.
    cpu_ms: per call, one entry a batch.
    wall_ms: the same of wall time.
  """

  call: Callable[[], None]
  cpu_s: Callable[[], float]
  n_calls: int
  cpu_ms: list[float] = dataclasses.field(default_factory=list)
  wall_ms: list[float] = dataclasses.field(default_factory=list)

  def run_batch(self, is_timed: bool = True) -> None:
    """Runs one batch in a closed loop."""
    cpu, wall = self.cpu_s(), time.perf_counter()
    in_parallel(self.call, self.n_calls)
    wall, cpu = time.perf_counter() - wall, self.cpu_s() - cpu
    if is_timed:
      self.cpu_ms.append(cpu / self.n_calls * 1e3)
      self.wall_ms.append(wall / self.n_calls * 1e3)


def in_parallel(call: Callable[[], None], n_calls: int) -> None:
  """Makes calls from all clients, a share each."""

  def go(n_mine: int) -> None:
    for _ in range(n_mine):
      call()

  with futures.ThreadPoolExecutor(_CLIENTS) as clients:
    shares = [len(range(i, n_calls, _CLIENTS)) for i in range(_CLIENTS)]
    list(clients.map(go, shares))


def alternate(sides: Iterable[Side], n_rounds: int) -> None:
  """Runs batches of all sides in turns, after one that is not timed."""
  for round_ in range(n_rounds + 1):
    for side in sides:
      side.run_batch(is_timed=round_ > 0)


def ours(box: pool.Sandbox, code: str, n_calls: int) -> Side:
  """Returns the side that runs a program in the sandbox."""

  def call() -> None:
    result = box.run(code)
    if result.status != layout.ToolStatus.OK or not result.stdout:
      raise RuntimeError(f"{code!r} ended with {result}")

  return Side(call, lambda: sandbox_cpu_s(box), n_calls)


def fresh(code: str, n_calls: int, prefix: tuple[str, ...] = ()) -> Side:
  """Returns the side that runs a program in a process of its own.

  With a `prefix`, a program that runs the interpreter, no limits are set.
  """
  limits = {
    resource.RLIMIT_CPU: int(_LIMITS.cpu_s),
    resource.RLIMIT_FSIZE: _LIMITS.file_mb << 20,
    resource.RLIMIT_NOFILE: _LIMITS.n_files,
    resource.RLIMIT_NPROC: 4096,
    resource.RLIMIT_AS: _LIMITS.memory_mb << 20,
  }
  command = [*prefix, sys.executable, "-I", "-c", code]
  pipe, null = subprocess.PIPE, subprocess.DEVNULL

  def call() -> None:
    with subprocess.Popen(
      command, stdin=null, stdout=pipe, stderr=pipe, env=link.ENVIRONMENT
    ) as process:
      for kind, value in {} if prefix else limits.items():
        with contextlib.suppress(ProcessLookupError):
          resource.prlimit(process.pid, kind, (value, value))
      output, errors = process.communicate()
    if process.returncode != 0 or not output:
      raise RuntimeError(f"python ended with {process.returncode}: {errors}")

  return Side(call, peer_cpu_s, n_calls)


def bubblewrap() -> tuple[str, ...]:
  """Command line of a `bwrap` that works here, or ()."""
  path = shutil.which("bwrap") or ""
  line = (path, "--unshare-all", "--ro-bind", "/", "/", "--tmpfs", "/tmp")
  with contextlib.suppress(OSError, subprocess.CalledProcessError):
    subprocess.run([*line, "true"], capture_output=True, check=True)
    return line
  return ()


def compared(
  case: str, ours: Side, peer: Side, name: str, bound: float | None = None
) -> Iterator[common.Row]:
  """Yields CPU and wall time of a pair, and a bound on the ratio of CPU."""
  for clock in ("cpu_ms", "wall_ms"):
    pair = [statistics.median(getattr(side, clock)) for side in (ours, peer)]
    yield row(f"{case}, {clock[:-3]}", pair[0], "ms/call", pair[1], name)
  if bound is not None:
    pairs = zip(ours.cpu_ms, peer.cpu_ms, strict=True)
    ratio = statistics.median(a / b for a, b in pairs)
    yield target(f"{case}, cpu ratio", ratio, "ours/peer", bound)


def measure_calls(n_rounds: int) -> Iterator[common.Row]:
  """Trivial and mathematical programs against fresh processes."""
  linux.adopt_orphans()  # bubblewrap's process 1 outlives it by a moment
  wrapper, name = bubblewrap(), "fresh python -I"
  with pool.Sandbox(n_workers=_CLIENTS) as box:
    bare, loaded = ours(box, TRIVIAL, 200), ours(box, MATHS_LOADED, 120)
    peer, wrapped = fresh(TRIVIAL, 40), fresh(TRIVIAL, 20, wrapper)
    alternate([bare, loaded, peer, *([wrapped] if wrapper else [])], n_rounds)
    maths, peer_maths = ours(box, MATHS, 40), fresh(MATHS, 4)
    alternate([maths, peer_maths], max(2, n_rounds // 2))
    tier = box.tier
  case = f"`{TRIVIAL}`, bare, {tier}"
  yield from compared(case, bare, peer, name, 1 / 4)
  if wrapper:
    yield from compared(case, bare, wrapped, "bwrap + python -I")
  else:
    yield row(f"{case} (bwrap does not work here)", 0, "")
  case = f"`{TRIVIAL}`, maths loaded, {tier}"
  yield from compared(case, loaded, peer, name, 1 / 2)
  case = f"factor with sympy, {tier}"
  yield from compared(case, maths, peer_maths, name, 1 / 12)


def measure_tiers(n_rounds: int) -> Iterator[common.Row]:
  """The trivial call under each tier that holds here."""
  sides: dict[str, Side] = {}
  with contextlib.ExitStack() as boxes:
    for tier in contract.TIERS[:-1]:
      with contextlib.suppress(contract.SandboxError):
        box = pool.Sandbox(n_workers=_CLIENTS, tier=tier)
        boxes.enter_context(box)
        box.run(MATHS_LOADED)  # images load beside the first calls
        sides[tier] = ours(box, TRIVIAL, 100)
    alternate(sides.values(), n_rounds)
  weakest = next(iter(sides))
  for tier, side in sides.items():
    case, name = f"`{TRIVIAL}`, bare, tier {tier}", f"tier {weakest}"
    yield from compared(case, side, sides[weakest], name)


def round_trips(
  box: pool.Sandbox, n_sessions: int, first: str, n: int, pause_s: float
) -> list[float]:
  """Returns sorted milliseconds of cells sent in turns to sessions."""
  for i in range(n_sessions):
    box.run(first, tool="session", trajectory=i)
  took = []
  for i in range(n):
    time.sleep(pause_s)
    began = time.perf_counter()
    result = box.run(TRIVIAL, tool="session", trajectory=i % n_sessions)
    took.append((time.perf_counter() - began) * 1e3)
    if result.stdout != "2\n":
      raise RuntimeError(f"a cell ended with {result}")
  for i in range(n_sessions):
    box.end_trajectory(i)
  return sorted(took)


def measure_trips(n: int) -> Iterator[common.Row]:
  """Round trips of trivial cells; the target is on the median."""
  cases = {"closed loop": (1, 0), "16 in turns": (16, 0), "5 ms apart": (1, 5)}
  images = {"bare": "x = 1", "maths": "import numpy, sympy"}
  with pool.Sandbox(n_workers=_CLIENTS) as box:
    box.run(MATHS_LOADED)
    for how, (n_sessions, pause_ms) in cases.items():
      for image, first in images.items():
        took = round_trips(box, n_sessions, first, n, pause_ms / 1e3)
        case = f"session round trip, {image}, {how}"
        yield target(f"{case}, p50", took[n // 2], "ms", 0.5)
        yield row(f"{case}, p99", took[int(n * 0.99)], "ms")


def _sum_mb(paths: Iterable[str], *names: str) -> float:
  """Sum of the named lines of files in /proc, in MiB; missing files add 0."""
  total = 0
  for path in paths:
    with contextlib.suppress(OSError), open(path) as f:
      lines = (line.partition(":") for line in f)
      total += sum(int(x.split()[0]) for name, _, x in lines if name in names)
  return total / 1024


def measure_memory(n_sessions: int) -> Iterator[common.Row]:
  """What an idle session's processes hold; the machine's figure as a check."""
  images = {"bare": "x = 1", "maths": "import numpy, sympy; x = 1"}
  for image, first in images.items():
    with pool.Sandbox(max_sessions=n_sessions) as box:
      box.run(MATHS_LOADED)
      before = _sum_mb(["/proc/meminfo"], "AnonPages")
      numbers = range(n_sessions)
      cells = [box.submit(first, tool="session", trajectory=i) for i in numbers]
      ended = {cell.result().status for cell in cells}
      time.sleep(1.0)  # the last runners are forked after the answers
      grown = _sum_mb(["/proc/meminfo"], "AnonPages") - before
      private, tables = _held(box)
    if ended != {layout.ToolStatus.OK} or len(private) != n_sessions:
      raise RuntimeError(f"{len(private)} sessions, cells ended as {ended}")
    case = f"{n_sessions} sessions, {image}, each:"
    yield target(f"{case} private", statistics.mean(private), "MiB", 20)
    yield row(f"{case} private, the largest", max(private), "MiB")
    yield row(f"{case} page tables", statistics.mean(tables), "MiB")
    yield row(f"{case} anonymous, by /proc/meminfo", grown / n_sessions, "MiB")


def _held(box: pool.Sandbox) -> tuple[list[float], list[float]]:
  """MiB of private memory and of page tables of each session."""
  supervisor = box.supervisor_pid
  assert supervisor is not None
  own = linux.read_tag(supervisor)
  by_tag = collections.defaultdict(list)
  for pid in linux.descendants(supervisor, 1 << 20):
    tag = linux.read_tag(pid)
    # Process 1 of a pid namespace has its zygote's memory and none of its own.
    if tag not in (own, None) and not _is_first_process(pid):
      by_tag[tag].append(f"/proc/{pid}/")
  private, tables = [], []
  for found in by_tag.values():
    names = ("Private_Clean", "Private_Dirty")
    private.append(_sum_mb([p + "smaps_rollup" for p in found], *names))
    tables.append(_sum_mb([p + "status" for p in found], "VmPTE"))
  return private, tables


def _is_first_process(pid: int) -> bool:
  with contextlib.suppress(OSError), open(f"/proc/{pid}/status") as f:
    return any(x.startswith("NSpid:") and x.split()[-1] == "1" for x in f)
  return True  # gone


def run_burst(box: pool.Sandbox, n: int) -> tuple[float, list[float], int]:
  """Queues calls at once; returns calls/s, sorted waits in s, faults."""
  waits: list[float] = []
  all_done = threading.Event()
  began = time.perf_counter()

  def note(future) -> None:
    result = future.result()
    waits.append(time.perf_counter() - began - result.wall_ms / 1e3)
    if len(waits) == n:
      all_done.set()

  calls = [
    box.submit(TRIVIAL, trajectory=i % 200, call_index=i // 200)
    for i in range(n)
  ]
  for call in calls:
    call.add_done_callback(note)
  all_done.wait()
  rate = n / (time.perf_counter() - began)
  faults = [c.result().status == layout.ToolStatus.INFRA for c in calls]
  return rate, sorted(waits), sum(faults)


def measure_burst(n: int, n_rounds: int) -> Iterator[common.Row]:
  """A burst against a closed loop of as many clients as there are workers."""
  rates, spreads, n_faults = [], [], 0
  with pool.Sandbox(n_workers=_CLIENTS) as box:
    box.run(MATHS_LOADED)
    loop = ours(box, TRIVIAL, n // 2)
    loop.run_batch(is_timed=False)
    for _ in range(n_rounds):
      loop.run_batch()
      rate, waits, faults = run_burst(box, n)
      rates.append(rate)
      spreads.append(waits[-1] / statistics.median(waits))
      n_faults += faults
  closed = 1e3 / statistics.median(loop.wall_ms)
  rate, case = (
    statistics.median(rates),
    f"{n} calls of 200 trajectories at once",
  )
  yield row(f"{case}, rate", rate, "calls/s", closed, "closed loop")
  yield target(f"{case}, rate lost", max(0.0, 1 - rate / closed), "share", 0.1)
  spread = statistics.median(spreads)
  yield target(f"{case}, longest/median wait", spread, "ratio", 3)
  yield row(f"{case}, INFRA (target: none)", n_faults, "calls")


def main() -> None:
  """Parses flags, measures, prints."""
  parser = common.parser(__doc__.splitlines()[0])
  parser.add_argument("--rounds", type=int, default=7)
  parser.add_argument("--cells", type=int, default=500)
  parser.add_argument("--burst", type=int, default=2000)
  parser.add_argument("--sessions", type=int, default=512)
  parser.add_argument("--parts", default="calls,tiers,trips,burst,memory")
  args = parser.parse_args()
  parts: dict[str, Callable[[], Iterator[common.Row]]] = {
    "calls": lambda: measure_calls(args.rounds),
    "tiers": lambda: measure_tiers(args.rounds),
    "trips": lambda: measure_trips(args.cells),
    "burst": lambda: measure_burst(args.burst, 3),
    "memory": lambda: measure_memory(args.sessions),
  }
  rows = [row("load average before", os.getloadavg()[0], "")]
  for name in args.parts.split(","):
    rows += parts[name]()
  rows.append(row("load average after", os.getloadavg()[0], ""))
  common.emit(rows, args.json)


if __name__ == "__main__":
  main()
