"""No program takes the supervisor more than a moment of its processor time.

It has one thread, which every other call waits for. Measured is the CPU time of
its process, which does not depend on what else the machine does.
"""

import statistics
import time

import pytest

from roc.host.sandbox import Limits, linux, routing
from roc.layout import ToolStatus

MOST_S = 0.005
SLOW = pytest.mark.slow
WEAKER = [pytest.param(t, marks=SLOW) for t in ("confined", "process")]


@pytest.fixture(scope="session", params=["isolated", *WEAKER])
def shared_box(request, boxes):
  return boxes(request.param)


def cost_s(box, code: str, **kw) -> float:
  """Least CPU time of the supervisor for a call, of five."""
  costs = []
  for _ in range(5):
    start = linux.cpu_seconds(box.supervisor_pid)
    result = box.run(code, **kw)
    costs.append(linux.cpu_seconds(box.supervisor_pid) - start)
    assert result.status != ToolStatus.INFRA, result
  return min(costs)


N = 1 << 16  # the longest code by default
CODES = {
  "empty lines": "\n" * 40_000 + "numpy",
  "blanks": "numpy" + " " * (N - 5),
  "tabs after a colon": "numpy:" + "\t" * (N - 6),
  "separators": "numpy" + ";" * (N - 5),
  "brackets": "numpy" + "([" * (N // 2 - 3),
  "imports": "numpy" + "import " * (N // 7 - 1),
  "imports in lines": "numpy" + "\nimport " * (N // 8 - 1),
  "commas": "import numpy" + "," * (N - 12),
  "names": "import " + "numpy," * (N // 6 - 2),
  "dots": "import numpy" + "." * (N - 12),
  "calls": "numpy" + "__import__(" * (N // 11 - 1),
  "calls and lines": "numpy" + "__import__\n" * (N // 11 - 1),
  "a call and lines": "numpy__import__(" + "\n" * (N - 16),
  "from": "numpy" + "from\n" * (N // 5 - 1),
  "quotes": "numpy" + "'" * (N - 5),
}


@pytest.mark.parametrize("code", CODES.values(), ids=CODES.keys())
def test_routing_is_linear(code):
  """Twice the code takes twice the time, or the bound is not far anyway."""
  start = time.thread_time()
  routing.image_for(code)
  assert time.thread_time() - start < 0.05
  assert len(code) <= N


def test_no_code_is_a_burden(strong_box):
  """A syntax error each, so that the call itself is short."""
  costs = {name: cost_s(strong_box, code) for name, code in CODES.items()}
  assert max(costs.values()) < MOST_S, costs
  limits = Limits(code_bytes=2 << 20, wall_s=20, cpu_s=20)
  longest = "?\n" + ("é" * 999 + "\n") * 1040
  assert cost_s(strong_box, longest, limits=limits) < MOST_S


def test_no_input_is_a_burden(strong_box):
  assert cost_s(strong_box, "1", stdin=b"\0" * (16 << 20)) < MOST_S
  assert cost_s(strong_box, "1", stdin="\ud800" * (5 << 20)) < MOST_S


WORDS = ["x", "é", "\\0", "\\ud800", " at 0x", "thread 0x1", "/", "/scratch"]
WORDS += [
  "'",
  "\\x1b",
  "<a at 0x7f0000000000>",
  "\\U0001f642",
  "\\n",
  "site/",
  "<a",
  "<a 0x",
]


@pytest.mark.parametrize("tool", ["python", "session"])
def test_no_output_is_a_burden(box, tool):
  limits = Limits(output_bytes=1 << 15)
  costs = {}
  for word in WORDS:
    code = (
      "import sys\nfor s in (sys.stdout, sys.stderr):\n"
      f"  s.buffer.write(('{word}' * 32768).encode(errors='surrogatepass')"
      "[:1 << 15])"
    )
    name = ("burden", word)
    call = {"tool": tool, "trajectory": name, "limits": limits}
    costs[word] = cost_s(box, code, **call) - cost_s(box, "1", **call)
    box.end_trajectory(name)
  assert max(costs.values()) < MOST_S, costs


def test_a_call_among_many_bounds_is_looked_at_briefly(box):
  """Looks at processes, threads, memory and files, as long as it runs."""
  programs = {
    "processes": "for _ in range(14):\n  if os.fork() == 0: break",
    "threads": "import threading\nfor _ in range(40):\n"
    "  threading.Thread(target=time.sleep, args=(1,)).start()",
    "shared pages": "kept = bytearray(b'x') * (90 << 20)\n"
    "for _ in range(14):\n  if os.fork() == 0: break",
    "files": "for i in range(3000): open(f'f{i}', 'w').close()",
    "zombies": "for _ in range(40):\n  if os.fork() == 0: os._exit(0)",
    "maps": "import mmap\nkept = [mmap.mmap(-1, 4096) for _ in range(9000)]",
  }
  shares = {}
  for name, code in programs.items():
    limits = Limits(total_memory_mb=512, n_processes=16)
    start, cpu = time.monotonic(), linux.cpu_seconds(box.supervisor_pid)
    result = box.run(f"import os, time\n{code}\ntime.sleep(1)", limits=limits)
    used = linux.cpu_seconds(box.supervisor_pid) - cpu
    shares[name] = used / (time.monotonic() - start)
    assert result.status == ToolStatus.OK, (name, result)
  assert max(shares.values()) < 0.25, shares


def test_a_flood_of_messages_is_no_burden(cells, strong_box):
  """It ends with the first that no honest cell would send."""
  run = cells()
  run("import os")
  costs = []
  for _ in range(3):
    start = linux.cpu_seconds(strong_box.supervisor_pid)
    run("import os\nwhile True: os.write(3, b'hello 1')")
    costs.append(linux.cpu_seconds(strong_box.supervisor_pid) - start)
  assert statistics.median(costs) < 4 * MOST_S
