"""Each limit ends the program that breaks it, in time, with its own status."""

import ast
import time

import pytest

from roc.host.sandbox import Limits, Sandbox
from roc.layout import ToolStatus

SHORT = Limits(wall_s=0.5)


def test_one_huge_allocation_is_memory(box):
  result = box.run("bytearray(8 << 30)")
  assert result.status == ToolStatus.MEMORY
  assert result.error_type == "MemoryError"
  assert result.stderr.endswith("MemoryError\n")


def test_gradual_growth_is_memory(box):
  code = "kept = []\nwhile True:\n  kept.append(bytearray(1 << 20))"
  result = box.run(code, limits=Limits(memory_mb=64))
  assert result.status == ToolStatus.MEMORY
  assert result.max_rss_kb < (64 + 64) * 1024


def test_what_fits_the_memory_is_ok(box):
  result = box.run(
    "print(len(bytearray(48 << 20)))", limits=Limits(memory_mb=64)
  )
  assert (result.status, result.stdout) == (ToolStatus.OK, f"{48 << 20}\n")


@pytest.mark.parametrize(
  "code",
  [
    "while True: pass",
    "10 ** 10 ** 8",
    "import re\nre.match('(a+)+$', 'a' * 40 + 'b')",
    "import time\ntime.sleep(60)",
    "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)",
  ],
  ids=["loop", "C loop", "regex", "sleep", "stopped"],
)
def test_a_program_without_end_is_timeout(box, code):
  start = time.monotonic()
  result = box.run(code, limits=SHORT)
  assert result.status == ToolStatus.TIMEOUT
  assert time.monotonic() - start < SHORT.wall_s + 1


def test_ignoring_every_signal_does_not_help(box):
  code = (
    "import signal\n"
    "for s in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:\n"
    "  signal.signal(s, signal.SIG_IGN)\n"
    "while True: pass"
  )
  assert box.run(code, limits=SHORT).status == ToolStatus.TIMEOUT


def test_cpu_time_has_a_limit_of_its_own(box):
  limits = Limits(wall_s=8, cpu_s=0.3)
  result = box.run("while True: pass", limits=limits)
  assert result.status == ToolStatus.TIMEOUT
  assert result.wall_ms < 6000
  assert 250 < result.cpu_ms < 1500


def test_sleeping_costs_no_cpu_time(box):
  limits = Limits(wall_s=5, cpu_s=0.3)
  result = box.run("import time\ntime.sleep(0.6)", limits=limits)
  assert result.status == ToolStatus.OK


@pytest.mark.parametrize(
  "sleep_s, status",
  [(0.7, ToolStatus.OK), (1.3, ToolStatus.TIMEOUT)],
)
def test_wall_clock_is_kept_on_both_sides(box, sleep_s, status):
  code = f"import time\ntime.sleep({sleep_s})"
  assert box.run(code, limits=Limits(wall_s=1)).status == status


def test_a_flood_without_newline_keeps_exactly_the_cap(box):
  code = "import os\nwhile True: os.write(1, b'x' * 1000)"
  result = box.run(code, limits=Limits(output_bytes=1500))
  assert result.status == ToolStatus.OUTPUT_LIMIT
  assert result.stdout == "x" * 1500
  assert result.truncated_bytes > 0


def test_the_cap_never_cuts_a_character(box):
  result = box.run("print('é' * 50)", limits=Limits(output_bytes=11))
  assert result.status == ToolStatus.OUTPUT_LIMIT
  assert result.stdout == "é" * 5


def test_output_of_exactly_the_cap_is_ok(box):
  code = "import sys\nsys.stdout.write('x' * 64)"
  result = box.run(code, limits=Limits(output_bytes=64))
  assert (result.status, result.stdout) == (ToolStatus.OK, "x" * 64)
  assert result.truncated_bytes == 0


def test_one_byte_more_is_output_limit_even_after_a_good_end(box):
  code = "import sys\nsys.stdout.write('x' * 65)"
  result = box.run(code, limits=Limits(output_bytes=64))
  assert (result.status, result.stdout) == (ToolStatus.OUTPUT_LIMIT, "x" * 64)


def test_one_huge_print_is_output_limit(box):
  result = box.run("print('y' * 50_000_000)")
  assert result.status == ToolStatus.OUTPUT_LIMIT
  assert result.stdout == "y" * Limits().output_bytes


def test_a_flood_on_stderr_counts_too(box):
  code = "import sys\nwhile True: sys.stderr.write('e' * 100)"
  result = box.run(code, limits=Limits(output_bytes=300))
  assert result.status == ToolStatus.OUTPUT_LIMIT
  assert (result.stdout, result.stderr) == ("", "e" * 300)


def test_a_slow_drip_is_kept_when_time_is_up(box):
  code = (
    "import time\nfor i in range(99):\n"
    "  print(i % 10, end='')\n  time.sleep(0.05)"
  )
  result = box.run(code, limits=SHORT)
  assert result.status == ToolStatus.TIMEOUT
  assert "0123456789".startswith(result.stdout[:10]) and result.stdout


def test_one_file_cannot_grow_past_its_limit(box):
  code = "open('big', 'wb').write(bytes(3 << 20))"
  result = box.run(code, limits=Limits(file_mb=2))
  assert (result.status, result.error_type) == (ToolStatus.RESOURCE, "OSError")


def test_too_many_open_files_is_resource(box):
  code = "kept = [open('/dev/null') for _ in range(10_000)]"
  assert box.run(code).status == ToolStatus.RESOURCE


@pytest.mark.parametrize(
  "body",
  ["import time\n  time.sleep(60)", "os.setsid()\n  while True: pass"],
  ids=["same session", "own sessions"],
)
def test_too_many_processes_is_resource(box, body):
  code = (
    "import os, time\n"
    "for _ in range(12):\n  if os.fork() == 0:\n    break\n"
    f"else:\n  time.sleep(60)\nif True:\n  {body}"
  )
  limits = Limits(n_processes=4, wall_s=3)
  assert box.run(code, limits=limits).status == ToolStatus.RESOURCE


def test_a_fork_bomb_ends(box):
  code = (
    "import os\nwhile True:\n  try:\n    os.fork()\n  except OSError:\n    pass"
  )
  result = box.run(code, limits=Limits(wall_s=2))
  assert result.status in (ToolStatus.RESOURCE, ToolStatus.TIMEOUT)


def test_a_few_processes_are_allowed(box):
  code = (
    "import subprocess\n"
    "print(subprocess.run(['echo', 'hi'], capture_output=True).stdout)"
  )
  result = box.run(code)
  assert (result.status, result.stdout) == (ToolStatus.OK, "b'hi\\n'\n")


def test_threads_work_until_there_are_too_many(box):
  code = (
    "import threading, time\n"
    "for i in range({n}):\n"
    "  threading.Thread(target=time.sleep, args=({s},), daemon=True).start()\n"
    "print('all')"
  )
  few = box.run(code.format(n=8, s=0.01))
  assert (few.status, few.stdout) == (ToolStatus.OK, "all\n")
  many = box.run(code.format(n=5000, s=9))
  assert many.status == ToolStatus.RESOURCE


@pytest.mark.parametrize(
  "name", ["CPU", "AS", "FSIZE", "NOFILE", "NPROC", "CORE"]
)
def test_limits_cannot_be_raised(box, name):
  code = (
    f"import resource as r\nhard = r.getrlimit(r.RLIMIT_{name})[1]\n"
    f"assert hard != -1\nr.setrlimit(r.RLIMIT_{name}, (hard + 1, hard + 1))"
  )
  result = box.run(code)
  assert (result.status, result.error_type) == (ToolStatus.ERROR, "ValueError")


def test_root_keeps_no_capability_but_on_files():
  code = (
    "import subprocess\n"
    "print([l.split()[1] for l in open('/proc/self/status')"
    " if l.startswith(('CapEff', 'CapPrm', 'CapInh', 'NoNewPrivs'))])\n"
    "print(subprocess.run(['grep', 'CapEff', '/proc/self/status'],"
    " capture_output=True, text=True).stdout.split()[1])"
  )
  with Sandbox(n_workers=1, tier="process") as box:
    lines = box.run(code).stdout.splitlines()
  inherited, permitted, effective, no_new = ast.literal_eval(lines[0])
  assert int(inherited, 16) == 0 and no_new == "1"
  for held in (permitted, effective, lines[1]):  # the last after an exec
    assert int(held, 16) & ~0b110 == 0
