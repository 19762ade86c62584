"""An ordinary program reads the same at every tier and with both tools."""

import subprocess
import sys

import pytest

from roc.host.sandbox import Limits
from roc.layout import ToolStatus

# Programs as models write them; none ends with a bare value, which only the
# session echoes.
PROGRAMS = {
  "sum": "print(sum(range(101)))",
  "float": "print(0.1 + 0.2, 1e300 * 1e10, -0.0, 2 ** 0.5)",
  "fractions": "from fractions import Fraction as F\nprint(F(1, 3) + F(1, 6))",
  "decimal": "from decimal import *\ngetcontext().prec = 30\n"
  "print(Decimal(1) / 7)",
  "combinatorics": "import itertools, math\n"
  "print(math.comb(40, 20), len([*itertools.permutations(range(6))]))",
  "sieve": "n = 10_000\ns = bytearray([1]) * n\n"
  "for i in range(2, 100):\n  s[i * i::i] = bytes(len(s[i * i::i]))\n"
  "print(sum(s[2:]))",
  "recursion": "def f(n): return n if n < 2 else f(n - 1) + f(n - 2)\n"
  "print(f(15))",
  "text": "print('é∑🙂'.encode(), 'a\\tb', repr('\\x00\\ud800'), sep='|')",
  "format": "print(f'{3.14159:.2f} {10**9:,} {255:#x} {\"x\":>5}|')",
  "no newline": "print('a', end='')",
  "carriage return": "print('10%\\r20%')",
  "unicode names": "π = 3\nprint(π)",
  "sets": "print(sorted({3, 1, 2}), {'b': 1, 'a': 2}, hash('text'))",
  "set order": "print({'x', 'y', 'zz', 'w'})",
  "regex": "import re\nprint(re.findall(r'\\d+', 'a1b22'))",
  "json": "import json\nprint(json.dumps({'a': [1, None]}, indent=1))",
  "dates": "import datetime\nprint(datetime.date(2024, 2, 29).isoformat())",
  "dataclass": "from dataclasses import dataclass\n@dataclass\nclass P:\n"
  "  x: int\n  y: int = 2\nprint(P(1))",
  "enum": "import enum\nclass C(enum.Enum):\n  A = 1\nprint(C.A, list(C))",
  "collections": "from collections import *\n"
  "print(Counter('abca').most_common(1), deque([1], 3))",
  "object": "print(object())\nprint(print, len)\nclass A: pass\nprint(A())",
  "local function": "def f(): pass\nprint(f)\nprint(lambda: 0)",
  "main": "if __name__ == '__main__':\n  print(__name__)",
  "stdin": "a, b = map(int, input().split())\nprint(a + b, input())",
  "end of stdin": "print(input(), input(), input())",
  "stderr": "import sys\nprint('out')\nprint('err', file=sys.stderr)",
  "logging": "import logging\nlogging.warning('careful')",
  "warning": "import warnings\nwarnings.warn('old', stacklevel=1)\nprint(1)",
  "deprecation": "import re\nprint(re.compile('a', 0).flags)\nx = '\\d'\n",
  "asyncio": "import asyncio\nasync def f(): await asyncio.sleep(0)\n"
  "asyncio.run(f())\nprint('ran')",
  "threads": "from concurrent.futures import ThreadPoolExecutor as T\n"
  "with T(4) as t: print(list(t.map(abs, range(-3, 0))))",
  "thread error": "import threading\n"
  "t = threading.Thread(target=lambda: 1 / 0)\nt.start()\nt.join()",
  "echo": "import subprocess\nprint(subprocess.run(['echo', 'hi'],"
  " capture_output=True, text=True).stdout)",
  "shell": "import os\nstatus = os.system('echo from the shell; exit 3')\n"
  "print(status)",
  "tempfile": "import tempfile\nwith tempfile.TemporaryFile('w+') as f:\n"
  "  f.write('x')\n  f.seek(0)\n  print(f.read())",
  "temporary name": "import os, tempfile\n"
  "with tempfile.TemporaryDirectory() as d: print(os.path.dirname(d))",
  "place": "import os\nprint(os.getcwd(), os.environ['HOME'], os.listdir())",
  "files": "open('a.txt', 'w').write('x\\n')\nprint(open('a.txt').read())",
  "arguments": "import sys\nprint(sys.argv, sys.stdin.encoding)",
  "random": "import random\nprint(random.random(), random.choice('abc'))",
  "time": "import time\nprint(time.tzname, time.gmtime(0).tm_year)",
  "numpy": "import numpy as np\nprint(np.linalg.det([[1., 2], [3, 4]]))\n"
  "print(np.fft.fft([1, 0, 0, 0]), np.random.rand())\n"
  "print(np.array([1, 2]) / 0)",
  "sympy": "from sympy import *\nx = symbols('x')\n"
  "print(solve(x**2 - 2), integrate(sin(x), x), factor(x**3 - 1))",
  "sympy shown": "from sympy import *\nx, y = symbols('x y')\n"
  "pprint(expand((x + y)**3))\nprint(latex(Integral(x, (x, 0, 1))))",
  "zero": "x = 1\nprint('before')\nprint(x / 0)",
  "deep error": "def f(n):\n  if n: return f(n - 1)\n  return {}['k']\nf(3)",
  "chained": "try:\n  int('x')\nexcept ValueError as e:\n"
  "  raise RuntimeError('no') from e",
  "library error": "import json\njson.loads('{')",
  "assertion": "assert 1 == 2, 'wrong'",
  "endless recursion": "def f(): return f()\nf()",
  "syntax": "print('a'\nx = 1",
  "indentation": "if True:\nprint(1)",
  "tab": "def f():\n\tif 1:\n        pass",
  "future": "from __future__ import annotations\nprint(1 <> 2)",
  "name": "print(undefined_name)",
  "group": "raise ExceptionGroup('g', [ValueError(1), TypeError('t')])",
  "keyboard": "raise KeyboardInterrupt",
  "exit 0": "import sys\nprint('x')\nsys.exit()",
  "exit 3": "import sys\nsys.exit(3)",
  "exit text": "import sys\nsys.exit('bad')",
  "quit": "quit(4)",
  "missing module": "import does_not_exist",
  "missing file": "open('missing.txt')",
  "denied": "import os\nos.kill(os.getpid(), 'x')",
  "memory": "x = bytearray(8 << 30)",
  "long output": "print('x' * 100_000)",
  "loop": "while True: pass",
}
LIMITS = Limits(wall_s=20, cpu_s=10)
LOOP = Limits(wall_s=0.3)
STDIN = "3 4\nlast\n"
# What a plain interpreter says differently, for a reason.
OURS = {"place", "temporary name", "arguments", "object", "local function"}
OURS |= {"random", "numpy", "memory", "loop", "long output"}


def visible(box, name, tool="python"):
  result = box.run(
    PROGRAMS[name],
    stdin=STDIN,
    tool=tool,
    trajectory=("equal", name),
    limits=LOOP if name == "loop" else LIMITS,
  )
  box.end_trajectory(("equal", name))
  return (
    result.status,
    result.stdout,
    result.stderr,
    result.error_type,
    result.exit_code,
    result.signal,
  )


@pytest.fixture(scope="module")
def references(boxes):
  """What each program shows with the plain tool at the strongest tier."""
  known = {}

  def get(name):
    if name not in known:
      known[name] = visible(boxes(None), name)
    return known[name]

  return get


@pytest.mark.parametrize("name", PROGRAMS)
def test_each_tier_shows_the_same(box, references, name):
  assert visible(box, name) == references(name)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_first_cell_shows_the_same_as_a_script(strong_box, references, name):
  assert visible(strong_box, name, "session") == references(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(PROGRAMS) - OURS))
def test_a_plain_interpreter_prints_the_same(references, tmp_path, name):
  (tmp_path / "program.py").write_text(PROGRAMS[name], "utf-8")
  done = subprocess.run(
    [sys.executable, "-s", "program.py"],
    cwd=tmp_path,
    input=STDIN.encode(),
    capture_output=True,
    env={"PYTHONHASHSEED": "0", "LANG": "C.UTF-8", "TZ": "UTC"},
  )
  status, stdout, stderr, _, exit_code, _ = references(name)
  assert stdout == done.stdout.decode("utf-8", "backslashreplace")
  if name != "keyboard":  # ends by a signal there
    assert exit_code == done.returncode
  assert (status == ToolStatus.OK) == (done.returncode == 0)
  last = lambda text: text.strip().splitlines()[-1:]
  if name not in ("missing module", "warning", "deprecation"):
    assert last(stderr) == last(done.stderr.decode())


CONTROLS = {
  "linear algebra": "import numpy as np\na = np.random.rand(200, 200)\n"
  "assert np.allclose(a @ np.linalg.inv(a), np.eye(200))",
  "sympy": "from sympy import *\nx = Symbol('x')\n"
  "assert integrate(exp(-x**2), (x, -oo, oo)) == sqrt(pi)\n"
  "assert factor(x**4 - 1) and solve(x**3 - 1)\n"
  "assert simplify(sin(x)**2 + cos(x)**2) == 1",
  "itertools": "from itertools import *\n"
  "assert sum(1 for _ in product(range(10), repeat=5)) == 10**5",
  "process pool is refused or works": "import multiprocessing as m\ntry:\n"
  "  with m.Pool(2) as p: p.map(abs, [1])\nexcept OSError: pass",
  "temporary file": "import tempfile\n"
  "with tempfile.NamedTemporaryFile() as f: f.write(b'x')",
  "sqlite": "import sqlite3\nd = sqlite3.connect('a.db')\n"
  "d.execute('create table t(x)')\nd.commit()",
  "compression": "import gzip, zipfile\ngzip.open('a.gz', 'wb').write(b'x')\n"
  "zipfile.ZipFile('a.zip', 'w').writestr('b', 'c')",
  "asyncio": "import asyncio\nasync def f(i):\n  await asyncio.sleep(0.01)\n"
  "  return i\nasync def g(): return await asyncio.gather(*map(f, range(9)))\n"
  "assert asyncio.run(g()) == [*range(9)]",
  "child python": "import subprocess, sys\n"
  "assert subprocess.run([sys.executable, '-c', 'print(1)'],"
  " capture_output=True).stdout == b'1\\n'",
  "pipe of processes": "import subprocess\n"
  'assert subprocess.check_output(\'echo b a | tr " " "\\n" | sort\','
  " shell=True) == b'a\\nb\\n'",
  "signals of its own": "import os, signal\n"
  "signal.signal(signal.SIGUSR1, lambda *a: print('got'))\n"
  "os.kill(os.getpid(), signal.SIGUSR1)",
  "own mode": "import os\nfd = os.open('x', os.O_CREAT, 0o700)\nos.close(fd)\n"
  "assert os.access('x', os.X_OK)",
  "shared memory map": "import mmap\nm = mmap.mmap(-1, 4096)\nm[0] = 1",
}


@pytest.mark.parametrize("code", CONTROLS.values(), ids=CONTROLS.keys())
def test_what_programs_need_works(box, cells, code):
  result = box.run(code, limits=LIMITS)
  assert result.status == ToolStatus.OK, result.stderr
  if box.tier == cells().box.tier:
    assert cells()(code, limits=LIMITS).status == ToolStatus.OK


@pytest.mark.slow
def test_matplotlib_draws_where_it_is_installed(strong_box):
  pytest.importorskip("matplotlib")
  code = (
    "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.savefig('a.png')\n"
    "print(open('a.png', 'rb').read(4))"
  )
  result = strong_box.run(code, limits=Limits(wall_s=60, cpu_s=60))
  assert result.stdout == "b'\\x89PNG'\n", result.stderr
