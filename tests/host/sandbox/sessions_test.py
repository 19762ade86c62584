"""The session tool: what survives a cell, what a failed one takes back."""

import os
import random
import re
import signal
import time

import numpy as np
import pytest

from roc.host.sandbox import Limits
from roc.layout import ToolStatus

SHORT = Limits(wall_s=0.3)
NAMES = "import os\nx = [1]\nopen('kept.txt', 'w').write('before')\n"


def text_of(result):
  assert result.status == ToolStatus.OK, result
  return result.stdout


def test_names_imports_and_files_survive(any_cell):
  cell = any_cell
  assert text_of(cell("import math\nx = 6\ndef f(): return x * 7")) == ""
  assert text_of(cell("open('a.txt', 'w').write('text')")) == "4\n"
  assert text_of(cell("f() + math.floor(0.5)")) == "42\n"
  assert text_of(cell("x = 1\nprint(f(), open('a.txt').read())")) == "7 text\n"


@pytest.mark.parametrize(
  "code, shown",
  [
    ("1 + 1", "2\n"),
    ("'text'", "'text'\n"),
    ("None", ""),
    ("x = 3", ""),
    ("print('a')\n2", "a\n2\n"),
    ("1\n2", "2\n"),
    ("3;", "3\n"),
    ("if True: 4", ""),
    ("class A:\n  def __repr__(self): return 'an A'\nA()", "an A\n"),
    ("'\\ud800'", "'\\ud800'\n"),
    ("[1, 2][::-1]  # comment", "[2, 1]\n"),
    ("7\n_ + 1", ""),
  ],
)
def test_the_last_expression_is_echoed(cell, code, shown):
  result = cell(code)
  if shown:
    assert text_of(result) == shown
  else:
    assert result.stdout == ""


def test_an_underscore_names_the_last_echo(cell):
  cell("21")
  assert text_of(cell("_ * 2")) == "42\n"


@pytest.mark.parametrize(
  "body, status, kind",
  [
    ("raise ValueError('no')", ToolStatus.ERROR, "ValueError"),
    ("return 5", ToolStatus.ERROR, "TypeError"),
    ("raise SystemExit(3)", ToolStatus.EXIT, "SystemExit"),
    ("while True: pass", ToolStatus.TIMEOUT, ""),
    ("return 'x' * 10 ** 6", ToolStatus.OUTPUT_LIMIT, ""),
    ("import os; os._exit(3)", ToolStatus.EXIT, ""),
  ],
)
def test_an_echo_that_misbehaves_is_bounded(cell, body, status, kind):
  cell("x = 5")
  result = cell(
    f"class A:\n  def __repr__(self):\n    {body}\nA()", limits=SHORT
  )
  assert (result.status, result.error_type) == (status, kind)
  assert text_of(cell("x")) == "5\n"


def test_an_exception_keeps_what_was_done_before_it(cell):
  result = cell("x = 1\ny = 2\n1 / 0\nx = 3")
  assert (result.status, result.error_type) == (
    ToolStatus.ERROR,
    "ZeroDivisionError",
  )
  assert text_of(cell("x, y")) == "(1, 2)\n"


def test_tracebacks_name_the_cell(cell):
  cell("def f():\n  return 1 / 0")
  stderr = cell("f()").stderr
  assert '  File "<tool 2>", line 1, in <module>\n    f()\n' in stderr
  assert '  File "<tool>", line 2, in f\n    return 1 / 0\n' in stderr
  assert cell("x = = 1").error_type == "SyntaxError"


@pytest.mark.parametrize(
  "code, status",
  [
    ("while True: pass", ToolStatus.TIMEOUT),
    ("10 ** 10 ** 8", ToolStatus.TIMEOUT),
    (
      "import signal\nfor s in set(signal.Signals) - {9, 19}:\n"
      "  signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
      ToolStatus.TIMEOUT,
    ),
    ("os.kill(os.getpid(), 19)", ToolStatus.TIMEOUT),
    ("import ctypes\nctypes.string_at(0)", ToolStatus.CRASH),
    ("os.abort()", ToolStatus.CRASH),
    ("os.kill(os.getpid(), 9)", ToolStatus.CRASH),
    ("os._exit(5)", ToolStatus.EXIT),
    ("os._exit(0)", ToolStatus.OK),
    ("os.execv('/bin/true', ['true'])", ToolStatus.OK),
    ("while True: print('x' * 1000)", ToolStatus.OUTPUT_LIMIT),
    (
      "import time\nfor i in range(30):\n  if os.fork() == 0: break\n"
      "time.sleep(9)",
      ToolStatus.RESOURCE,
    ),
    (
      "for i in range(9):\n  if os.fork() == 0: break\n"
      "kept = bytearray(b'x') * (50 << 20)\nimport time\ntime.sleep(9)",
      ToolStatus.MEMORY,
    ),
  ],
  ids=[
    *("loop", "C loop", "deaf", "stopped", "segv", "abort", "kill", "exit"),
    *("exit 0", "exec", "flood", "forks", "sum of memory"),
  ],
)
def test_a_cell_that_has_to_be_killed_is_undone(any_cell, code, status):
  cell = any_cell
  cell(NAMES)
  done = "x.append(2)\nnew = 1\n" + code
  wall_s = 0.5 if status == ToolStatus.TIMEOUT else 5
  limits = Limits(wall_s=wall_s, total_memory_mb=256)
  result = cell(done, limits=limits)
  assert result.status == status, result
  assert text_of(cell("x")) == "[1]\n"  # and nothing was replayed
  assert cell("new").error_type == "NameError"
  assert text_of(cell("open('kept.txt').read()")) == "'before'\n"
  assert text_of(cell("x.append(3)\nx")) == "[1, 3]\n"


def test_a_cell_out_of_memory_keeps_its_state(cell):
  result = cell("x = 1\ny = bytearray(8 << 30)")
  assert (result.status, result.error_type) == (
    ToolStatus.MEMORY,
    "MemoryError",
  )
  assert text_of(cell("x")) == "1\n"


def test_nothing_is_run_twice(any_cell):
  cell = any_cell
  cell("open('log', 'a').write('first ')\nx = 1")
  cell("open('log', 'a').write('second ')\nwhile True: pass", limits=SHORT)
  cell("open('log', 'a').write('third ')\n1 / 0")
  assert text_of(cell("print(open('log').read())")) == "first second third \n"


def test_what_fails_first_opens_the_session_all_the_same(cell):
  assert cell("while True: pass", limits=SHORT).status == ToolStatus.TIMEOUT
  assert text_of(cell("x = 4\nx")) == "4\n"
  assert cell("import os\nos.abort()").status == ToolStatus.CRASH
  assert text_of(cell("x")) == "4\n"


def test_each_cell_has_its_own_input(cell):
  assert text_of(cell("input()", stdin="one\ntwo\n")) == "'one'\n"
  assert cell("input()").error_type == "EOFError"
  code = "import sys\nsys.stdin.buffer.read()"
  assert text_of(cell(code, stdin=b"a\r\n\xff")) == "b'a\\r\\n\\xff'\n"


def test_each_cell_has_its_own_output_even_after_a_flood(cell):
  cell("import os\nos.write(1, b'x' * 60_000)", limits=Limits(output_bytes=9))
  assert text_of(cell("print('clean')")) == "clean\n"
  cell("import sys\nsys.stdout = sys.stderr = None")
  code = "import os\nn = os.write(1, b'by hand')"
  assert text_of(cell(code)) == "by hand"


def test_threads_of_a_cell_are_joined_and_daemons_are_left_behind(any_cell):
  cell = any_cell
  code = (
    "import threading, time\nseen = []\n"
    "def late():\n  time.sleep(0.1)\n  seen.append('joined')\n"
    "def daemon():\n  while True:\n    time.sleep(0.01)\n    print('d')\n"
    "threading.Thread(target=late).start()\n"
    "threading.Thread(target=daemon, daemon=True).start()"
  )
  assert cell(code).status == ToolStatus.OK
  assert text_of(cell("time.sleep(0.1)\nseen")) == "['joined']\n"
  assert text_of(cell("threading.active_count()")) == "1\n"


def test_processes_that_a_cell_leaves_die_with_it(any_cell, tools):
  cell = any_cell
  code = (
    "import os, time\nfor deaf in (0, 1):\n  if os.fork() == 0:\n"
    "    os.setsid()\n    if os.fork(): os._exit(0)\n"
    "    if deaf: os.closerange(0, 100)\n"
    "    while True:\n      time.sleep(0.02)\n"
    "      try: os.write(1, b'late')\n      except OSError: pass\n'left'"
  )
  alive = lambda: [*filter(tools.is_alive, tools.survivors(cell.box))]
  cell("pass")
  # A guardian, a runner, and process 1 of a namespace.
  kept = 2 + bool(cell.box.info()["plan"]["namespaces"])
  assert tools.wait_until(lambda: len(alive()) == kept), alive()
  result = cell(code)
  assert result.status == ToolStatus.OK
  # One that writes before it is killed is heard.
  assert result.stdout.startswith("'left'\n")
  assert tools.wait_until(lambda: len(alive()) == kept), alive()
  assert text_of(cell("time.sleep(0.1)\nprint('mine')")) == "mine\n"


def test_children_that_nobody_waits_for_do_not_add_up(any_cell):
  cell = any_cell
  cell("import os")
  for _ in range(3 * Limits().n_processes):
    result = cell("pid = os.fork()\nif not pid: os._exit(0)")
    assert result.status == ToolStatus.OK, result
  cell("import time")
  assert text_of(cell("time.sleep(0.1)\nprint('well')")) == "well\n"


def test_a_cell_after_one_that_had_to_be_undone_is_not_hurt(cells):
  """The guardian's next runner must not be taken for a leftover."""
  for _ in range(8):
    cell = cells()
    cell("import os\nx = 1")
    for _ in range(6):
      assert cell("os._exit(7)").status == ToolStatus.EXIT
      assert text_of(cell("x")) == "1\n"


def test_a_timer_of_one_cell_does_not_ring_in_the_next(cell):
  cell("import signal, time\nsignal.setitimer(signal.ITIMER_REAL, 0.05)")
  assert text_of(cell("time.sleep(0.15)\nprint('quiet')")) == "quiet\n"


def test_cells_of_a_trajectory_run_in_order(cell):
  box, name = cell.box, cell.trajectory
  submit = lambda code: box.submit(code, tool="session", trajectory=name)
  futures = [submit("x = []")]
  futures += [submit(f"x.append({i})\nx[-1]") for i in range(40)]
  assert [f.result().stdout for f in futures[1:]] == [
    f"{i}\n" for i in range(40)
  ]
  assert text_of(cell("x == sorted(x)")) == "True\n"


def test_many_sessions_at_once_do_not_meet(cells):
  opened = [cells() for _ in range(24)]
  box = opened[0].box
  submit = lambda code, run: box.submit(
    code, tool="session", trajectory=run.trajectory
  )
  for i, run in enumerate(opened):
    submit(f"x = {i}", run)
  futures = [submit("x += 100\nx", run) for run in opened]
  assert [f.result().stdout for f in futures] == [
    f"{100 + i}\n" for i in range(24)
  ]


def test_the_end_of_a_trajectory_frees_everything(cells, tools):
  run = cells()
  box = run.box
  before = tools.n_descriptors(box.supervisor_pid)
  run("x = bytearray(50 << 20)\nopen('f', 'w').write('x')")
  assert tools.survivors(box)
  box.end_trajectory(run.trajectory)
  assert tools.wait_until(lambda: not tools.survivors(box))
  assert tools.wait_until(
    lambda: tools.n_descriptors(box.supervisor_pid) <= before
  )
  assert tools.wait_until(lambda: not tools.scratch_left(box))
  assert run("x").error_type == "NameError"  # a new one


def test_the_end_of_a_trajectory_cancels_its_cells(cells):
  run = cells()
  submit = lambda code: run.box.submit(
    code, tool="session", trajectory=run.trajectory, limits=Limits(wall_s=30)
  )
  futures = [submit("import time\ntime.sleep(20)") for _ in range(3)]
  time.sleep(0.1)
  start = time.monotonic()
  run.box.end_trajectory(run.trajectory)
  results = [f.result() for f in futures]
  assert {r.status for r in results} == {ToolStatus.INFRA}
  assert {r.cause for r in results} == {"cancelled"}
  assert time.monotonic() - start < 1


def test_a_cancelled_cell_leaves_its_session_as_it_was(any_cell):
  cell = any_cell
  cell("x = 1")
  future = cell.box.submit(
    "x = 2\nwhile True: pass", tool="session", trajectory=cell.trajectory
  )
  time.sleep(0.1)
  assert cell.box.cancel(future)
  assert future.result().cause == "cancelled"
  assert text_of(cell("x")) == "1\n"


def test_a_session_that_the_sandbox_lost_is_never_silently_new(tools):
  with tools.Sandbox(n_workers=1) as box:
    run = lambda code, name="a": box.run(code, tool="session", trajectory=name)
    run("x = 1")
    old = box.supervisor_pid
    os.kill(old, signal.SIGKILL)
    assert tools.wait_until(
      lambda: box.supervisor_pid not in (None, old) and box.stats()["restarts"]
    )
    for _ in range(2):
      lost = run("x = 2\nprint('ran')")
      assert (lost.status, lost.cause) == (ToolStatus.INFRA, "session")
      assert lost.stdout == ""
    assert run("print(1)", "b").stdout == "1\n"
    box.end_trajectory("a")
    assert run("x").error_type == "NameError"


def test_a_cell_in_its_first_session_is_retried_and_a_later_one_not(tools):
  with tools.Sandbox(n_workers=2) as box:
    box.run("x = 1", tool="session", trajectory="old")
    nap = "import time\ntime.sleep(0.5)\nprint('slept')"
    new, old = (
      box.submit(nap, tool="session", trajectory=name)
      for name in ("new", "old")
    )
    time.sleep(0.2)
    os.kill(box.supervisor_pid, signal.SIGKILL)
    assert (new.result().stdout, new.result().retries) == ("slept\n", 1)
    assert (old.result().status, old.result().stdout) == (ToolStatus.INFRA, "")


def test_more_sessions_than_allowed_are_infra(tools):
  with tools.Sandbox(n_workers=1, max_sessions=2) as box:
    run = lambda name: box.run("1", tool="session", trajectory=name)
    assert [run(name).status for name in "abc"] == [
      ToolStatus.OK,
      ToolStatus.OK,
      ToolStatus.INFRA,
    ]
    box.end_trajectory("a")
    assert tools.wait_until(lambda: run("d").status == ToolStatus.OK)


def test_random_numbers_depend_on_run_trajectory_and_first_call(cells):
  code = "import random\nrandom.random()"
  first, second = cells(), cells()
  drawn = [run(code, call_index=3).stdout for run in (first, second)]
  assert drawn[0] != drawn[1]
  assert first(code).stdout not in drawn  # the generator goes on
  first.box.end_trajectory(first.trajectory)
  assert first(code, call_index=3).stdout == drawn[0]
  first.box.end_trajectory(first.trajectory)
  assert first(code, call_index=4).stdout != drawn[0]


def test_a_generator_that_a_cell_seeds_goes_on_in_the_next(cell):
  assert cell("import random\nrandom.seed(1)").status == ToolStatus.OK
  draws = [text_of(cell("random.random()")) for _ in range(2)]
  here = random.Random(1)
  assert draws == [f"{here.random()}\n" for _ in range(2)]


def test_no_address_or_path_reaches_the_model(cell):
  text = cell("import os\nobject(), os.getcwd(), open").stdout
  assert re.fullmatch(
    r"\(<object object at 0x0>, '/scratch', <built-in function open>\)\n", text
  )


def test_a_numpy_integer_names_the_session_of_the_plain_one(strong_box):
  name = ("numpy", np.int64(3))
  first = strong_box.run("x = 1", tool="session", trajectory=("numpy", 3))
  second = strong_box.run("x", tool="session", trajectory=name)
  strong_box.end_trajectory(name)
  third = strong_box.run("x", tool="session", trajectory=("numpy", 3))
  strong_box.end_trajectory(("numpy", 3))
  assert first.status == ToolStatus.OK
  assert (second.stdout, third.error_type) == ("1\n", "NameError")
