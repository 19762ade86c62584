"""Programs that mean no harm get what a user of Python or Jupyter expects."""

import pytest

from roc.host.sandbox import Limits
from roc.layout import ToolStatus

FENCE = "```"


def shown(result):
  assert result.status == ToolStatus.OK, result
  return result.stdout


def test_an_executor_that_is_not_shut_down_serves_the_next_cell(any_cell):
  first = any_cell(
    "import os, time\nfrom concurrent.futures import ThreadPoolExecutor\n"
    "pool = ThreadPoolExecutor(2)\n"
    "def work(i): time.sleep(0.05); os.write(1, b'1\\n'); return i\n"
    "later = [pool.submit(work, i) for i in (1, 1, 1)]\nNone"
  )
  assert shown(first) == "1\n1\n1\n"  # the cell waits for what it has begun
  assert shown(any_cell("[f.result() for f in later]")) == "[1, 1, 1]\n"
  assert shown(any_cell("list(pool.map(str, range(5)))")) == (
    "['0', '1', '2', '3', '4']\n"
  )
  assert shown(any_cell("pool.shutdown()\nlen(pool._threads)")) == "0\n"
  again = any_cell("pool.submit(str)")
  assert again.error_type == "RuntimeError"
  assert shown(any_cell("ThreadPoolExecutor().submit(str, 3).result()"))


def test_an_executors_endless_work_is_a_timeout(any_cell):
  result = any_cell(
    "import time\nfrom concurrent.futures import ThreadPoolExecutor\n"
    "f = ThreadPoolExecutor(1).submit(time.sleep, 60)",
    limits=Limits(wall_s=0.5),
  )
  assert result.status == ToolStatus.TIMEOUT


USED_UP = {
  "descriptors": "kept = []\ntry:\n"
  "  while True: kept.append(open('/dev/null'))\n"
  "except OSError: pass",
  "sockets": "import socket\nkept = []\ntry:\n"
  "  while True: kept += socket.socketpair()\nexcept OSError: pass",
  "memory": "kept = []\nsize = 1 << 28\nwhile size >= 64:\n"
  "  try: kept.append(bytearray(size))\n  except MemoryError: size //= 2",
  "depth": "import sys\nsys.setrecursionlimit(60)",
  "output": "import sys\nsys.stdout.close()\nsys.stderr.close()",
}


@pytest.mark.parametrize("code", USED_UP.values(), ids=USED_UP.keys())
def test_a_cell_runs_after_one_that_used_up_everything(any_cell, code):
  limits = Limits(memory_mb=200)
  assert any_cell("kept = None", limits=limits).status == ToolStatus.OK
  assert any_cell(code, limits=limits).status == ToolStatus.OK
  assert shown(any_cell("print('here')", limits=limits)) == "here\n"
  assert any_cell("1 / 0", limits=limits).error_type == "ZeroDivisionError"
  assert shown(any_cell("kept = None\nsum(range(9))", limits=limits)) == "36\n"


def test_limits_hold_again_while_a_cell_runs(any_cell):
  limits = Limits(memory_mb=200, n_files=32)
  code = (
    "import resource, sys\n"
    "kinds = (resource.RLIMIT_NOFILE, resource.RLIMIT_AS)\n"
    "[resource.getrlimit(kind)[0] for kind in kinds], sys.getrecursionlimit()"
  )
  first = shown(any_cell(code, limits=limits))
  assert first.startswith("([32, ")
  assert shown(any_cell(code, limits=limits)) == first
  assert shown(any_cell("sys.setrecursionlimit(321)", limits=limits)) == ""
  assert shown(any_cell(code, limits=limits)).endswith("], 321)\n")


def test_a_memory_error_takes_back_nothing(any_cell):
  assert any_cell("x = 1").status == ToolStatus.OK
  failed = any_cell("x = 2\ny = bytearray(8 << 30)")
  assert failed.status == ToolStatus.MEMORY
  assert shown(any_cell("x")) == "2\n"


@pytest.mark.parametrize("tool", ["python", "session"])
def test_numbers_are_shown_as_they_were_printed(box, tool):
  result = box.run(
    "print('peak at', hex(0xdeadbeef), '<', 'thread 0x1234567')\n"
    "print('mapped at 0x7f0012345678, size 4')\n"
    "print('a<b at 0xdeadbeef')\n"
    "print(object(), [print], object.__init__, lambda: 0)\n"
    "import threading\nprint(threading.main_thread())",
    tool=tool,
    trajectory="hex",
  )
  box.end_trajectory("hex")
  assert shown(result) == (
    "peak at 0xdeadbeef < thread 0x1234567\n"
    "mapped at 0x7f0012345678, size 4\n"
    "a<b at 0xdeadbeef\n"
    "<object object at 0x0> [<built-in function print>]"
    " <slot wrapper '__init__' of 'object' objects>"
    " <function <lambda> at 0x0>\n"
    "<_MainThread(MainThread, started 0)>\n"
  )


@pytest.mark.parametrize("tool", ["python", "session"])
def test_the_directory_can_be_named_as_it_is_shown(box, tool):
  cells = [
    "import os\nopen('a.txt', 'w').write('text')\nprint(os.getcwd())",
    "print(open('/scratch/a.txt').read(), os.listdir('/scratch'))\n"
    "print(open(b'/scratch/a.txt').read(), f'/scratch/{1}', '/scratches')\n"
    "print(os.path.exists('/scratch'), '/scratch' == os.getcwd())",
  ]
  if tool == "python":
    cells = ["\n".join(cells)]
  text = "".join(
    shown(box.run(cell, tool=tool, trajectory="path")) for cell in cells
  )
  box.end_trajectory("path")
  lines = [line for line in text.splitlines() if line != "4"]
  assert lines == [
    "/scratch",
    "text ['a.txt']",
    "text /scratch/1 /scratches",
    "True True",
  ]


def test_a_cell_may_await(any_cell):
  code = (
    "import asyncio\nasync def f(x):\n  await asyncio.sleep(0)\n  return x\n"
  )
  assert shown(
    any_cell(code + "task = asyncio.create_task(f(3))\nawait task")
  ) == ("3\n")
  assert shown(any_cell("y = await f(4)\n[await f(i) for i in (y, 5)]")) == (
    "[4, 5]\n"
  )
  assert shown(any_cell("asyncio.run(f(6))")) == "6\n"
  failed = any_cell("await f(1)\nawait f(1 / 0)")
  lines = [li for li in failed.stderr.splitlines() if "^" not in li]
  assert lines == [
    "Traceback (most recent call last):",
    '  File "<tool 4>", line 2, in <module>',
    "    await f(1 / 0)",
    "ZeroDivisionError: division by zero",
  ]


def test_a_script_that_awaits_is_told_what_to_do(box):
  result = box.run("import asyncio\nawait asyncio.sleep(0)")
  assert "asyncio.run(main())" in result.stderr
  assert result.error_type == "SyntaxError"


def test_the_source_of_classes_can_be_had(any_cell):
  first = any_cell(
    "import inspect\nclass A:\n  x = 1\n\n"
    "class B(A):\n  def f(self): return 1\n"
    "print(inspect.getsource(A), inspect.getsource(B.f), sep='')"
  )
  assert shown(first) == "class A:\n  x = 1\n  def f(self): return 1\n\n"
  second = any_cell("class C:\n  y = 2\nprint(inspect.getsource(C), end='')")
  assert shown(second) == "class C:\n  y = 2\n"
  third = any_cell("z = 1\nprint(inspect.getsource(B), end='')")
  assert shown(third) == "class B(A):\n  def f(self): return 1\n"


@pytest.mark.parametrize("tool", ["python", "session"])
@pytest.mark.parametrize(
  "code",
  [
    "\ufeffprint(1)",
    "x = 1\r\nif x:\r\n  print(x)\r\n",
    "x = 1\rprint(x)",
    f"{FENCE}python\nprint(1)\n{FENCE}",
    f"\n{FENCE}py\r\nprint(1)\r\n{FENCE}\r\n",
    f"{FENCE}\nprint(1)",
    f"\ufeff{FENCE}python3\nprint(1)\n  {FENCE}  \n\n",
    "~~~\nprint(1)\n~~~",
  ],
)
def test_what_is_around_the_code_is_taken_off(strong_box, code, tool):
  result = strong_box.run(code, tool=tool, trajectory="around")
  strong_box.end_trajectory("around")
  assert shown(result) == "1\n"


def test_a_fence_within_the_code_is_the_codes_own(strong_box):
  code = f"print('''\n{FENCE}python\nx\n{FENCE}\n''')"
  assert shown(strong_box.run(code)) == f"\n{FENCE}python\nx\n{FENCE}\n\n"


def test_lines_are_numbered_as_they_were_sent(strong_box):
  result = strong_box.run(f"{FENCE}python\nx = '\x0c\u2028'\n1 / 0\n{FENCE}")
  assert '"<tool>", line 3, in <module>\n    1 / 0\n' in result.stderr


@pytest.mark.parametrize("tool", ["python", "session"])
@pytest.mark.parametrize(
  "code, words",
  [
    ("!pip install numpy", "`!pip` is a notebook's shell command"),
    ("x = 1\nfiles = !ls", "`!ls` is a notebook's shell command"),
    ("%matplotlib inline\nprint(1)", "`%matplotlib` is a notebook's magic"),
    ("%%time\nprint(1)", "`%%time` is a notebook's magic"),
    ("t = %timeit -o f()", "`%timeit` is a notebook's magic"),
    ("print?", "`?` is a notebook's help"),
    ("?print", "`?` is a notebook's help"),
    (f"So:\n{FENCE}python\nprint(1)\n{FENCE}", "send Python alone"),
    (f"{FENCE}\n1\n{FENCE}\nand\n{FENCE}\n2\n{FENCE}", "send Python alone"),
  ],
)
def test_what_only_notebooks_know_is_named(strong_box, code, words, tool):
  result = strong_box.run(code, tool=tool, trajectory="magic")
  strong_box.end_trajectory("magic")
  assert (result.status, result.error_type) == (ToolStatus.ERROR, "SyntaxError")
  assert words in result.stderr and "invalid syntax" not in result.stderr


def test_python_that_looks_like_a_magic_is_python(strong_box):
  code = "x = 7\ny = 4\nz = (x\n% y)\nprint(z, '%d' % z, x != y)"
  assert shown(strong_box.run(code)) == "3 3 True\n"
  plain = strong_box.run("x = = 1")
  assert "invalid syntax" in plain.stderr
