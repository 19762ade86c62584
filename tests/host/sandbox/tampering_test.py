"""A program that turns on its runner hurts itself, and nobody after it."""

import ast
import pathlib

import pytest

from roc.host import sandbox
from roc.host.sandbox import Limits
from roc.layout import ToolStatus

SHORT = Limits(wall_s=1)
# Finds the shared page that a program's end is noted on, and the runner's
# own objects, over the frames below the program and what refers to them.
FIND = r"""
import ctypes, gc, os, sys
libc = ctypes.CDLL(None)
libc.munmap.argtypes = libc.mprotect.argtypes = None
def reach():
  frame, todo, seen = sys._getframe(), [], {}
  while frame:
    todo += [*frame.f_locals.values(), frame.f_globals]
    frame = frame.f_back
  while todo and len(seen) < 200_000:
    thing = todo.pop()
    if id(thing) not in seen:
      seen[id(thing)] = thing
      todo += gc.get_referents(thing)
  return seen.values()
things = [*reach()]
records = [t for t in things if type(t).__name__ == 'Record']
page = records[0]._address if records else 0
"""


def test_the_attack_on_the_record_finds_it(strong_box):
  """Without this the tests below would prove nothing."""
  result = strong_box.run(FIND + "print(page > 4096, len(records))")
  assert (result.status, result.stdout) == (ToolStatus.OK, "True 1\n")


@pytest.mark.parametrize(
  "scribble",
  [
    "ctypes.memmove(page, b'infra\\0\\0', 7)\nos._exit(1)",
    "ctypes.memmove(page, b'infra\\0InfraError\\0', 17)\n1 / 0",
    "ctypes.memset(page, 255, 4096)\nos._exit(1)",
    "ctypes.memset(page, 255, 4096)\n1 / 0",
    "ctypes.memmove(page, b'rejected\\0\\0', 10)\nos._exit(1)",
    "ctypes.memmove(page, b'timeout\\0a b\\n\\0', 13)\nos._exit(0)",
    "ctypes.memmove(page, b'error\\0' + b'E' * 3000 + b'\\0', 3007)\n"
    "os._exit(1)",
    "libc.munmap(ctypes.c_void_p(page), 4096)\n1 / 0",
    "libc.mprotect(ctypes.c_void_p(page), 4096, 1)\n1 / 0",
    "type(records[0]).write = lambda *a: None\n1 / 0",
    "type(records[0]).write = lambda *a: 1 / 0\n1 / 0",
    "records[0]._address = 8\n1 / 0",
    "for t in things:\n  if type(t).__name__ == 'module':\n"
    "    t.__dict__.clear()\n1 / 0",
    "for t in things:\n"
    "  if type(t) is dict and 'pack_record' in t:\n"
    "    t['pack_record'] = lambda *a: b'infra\\0\\0'\n1 / 0",
    "for t in things:\n"
    "  if type(t) is dict and t.get('__name__', '').startswith('roc'):\n"
    "    for name in [*t]: t[name] = None\n1 / 0",
    "f = sys._getframe()\nwhile f:\n  f.f_trace = lambda *a: os._exit(1)\n"
    "  f = f.f_back\nsys.settrace(lambda *a: None)\n1 / 0",
    "for i in range(100): ctypes.memmove(id(i) + 16, b'x' * 16, 16)",
    "ctypes.memset(id(BaseException), 0, 200)\n1 / 0",
  ],
)
def test_scribbling_over_the_runner_is_never_our_fault(strong_box, scribble):
  result = strong_box.run(FIND + scribble, limits=SHORT)
  excuses = (ToolStatus.INFRA, ToolStatus.REJECTED)
  assert result.status not in excuses, result
  assert result.error_type == "" or result.error_type.isidentifier()
  assert result.retries == 0


PATCHES = {
  "streams": "import sys\nsys.stdout = sys.stderr = sys.stdin = None",
  "builtins": "import builtins\nbuiltins.print = builtins.open = None\n"
  "builtins.compile = builtins.__import__ = builtins.exec = None",
  "json": "import json\njson.dumps = json.loads = None",
  "exits": "import os, sys\nos._exit = sys.exit = None",
  "hooks": "import sys\nsys.excepthook = sys.displayhook = None\n"
  "sys.unraisablehook = None",
  "traceback": "import traceback, linecache\n"
  "traceback.TracebackException = linecache.cache = None",
  "main": "import sys\nsys.modules['__main__'] = None",
  "modules": "import sys\nsys.modules.clear()",
  "path": "import sys\nsys.path[:] = sys.meta_path[:] = []",
  "collector": "import gc\ngc.disable()\ngc.callbacks.append(lambda *a: 1/0)",
  "threads": "import threading\nthreading._shutdown = threading.enumerate = 0",
  "sockets": "import socket\nsocket.recv_fds = socket.socket = None",
  "ids": "import os\nos.getpid = lambda: 1\nos.getppid = lambda: 0",
  "recursion": "import sys\nsys.setrecursionlimit(30)",
  "audit": "import sys\nsys.addaudithook(lambda *a: 1 / 0)",
  "signals": "import signal\nfor s in signal.valid_signals():\n"
  "  try: signal.signal(s, lambda *a: 1 / 0)\n  except OSError: pass",
}


@pytest.mark.parametrize("patch", PATCHES.values(), ids=PATCHES.keys())
def test_a_patched_interpreter_still_tells_failure_from_success(
  strong_box, cell, patch
):
  failed = (ToolStatus.ERROR, ToolStatus.EXIT, ToolStatus.CRASH)
  assert strong_box.run(f"{patch}\nraise ValueError").status in failed
  assert cell("x = 1").status == ToolStatus.OK
  assert cell(patch + "\nraise ValueError").status in failed
  after = [cell("x == 1 or 1 / 0", limits=SHORT) for _ in "123"]
  assert ToolStatus.INFRA not in [r.status for r in after]
  assert cell("raise ValueError", limits=SHORT).status in failed


@pytest.mark.parametrize("code", [1, 2, 9, 99, 124, 137, 255, 256 + 3, -1])
def test_an_exit_code_of_ours_is_only_an_exit_code(box, code):
  result = box.run(f"import sys\nsys.exit({code})")
  assert (result.status, result.exit_code) == (ToolStatus.EXIT, code & 0xFF)
  result = box.run(f"import os\nos._exit({code})")
  assert (result.status, result.exit_code) == (ToolStatus.EXIT, code & 0xFF)


@pytest.mark.parametrize(
  "code, stdout",
  [
    ("os.dup2(1, 2)\nos.write(2, b'both')", "both"),
    ("os.dup2(2, 1)\nos.write(1, b'gone')", ""),
    ("os.close(1)\nos.open('f', os.O_CREAT | os.O_RDWR)\nprint('file')", ""),
    ("for fd in range(3, 60): os.dup2(1, fd)\nos.write(59, b'x')", "x"),
    ("os.dup2(os.open('/dev/null', 1), 1)\nprint('null')", ""),
    ("r, w = os.pipe()\nos.dup2(w, 1)\nprint('pipe')", ""),
    ("import fcntl\nfcntl.fcntl(1, 4, os.O_NONBLOCK)\nprint('y')", "y\n"),
    (
      "import fcntl\ntry: fcntl.fcntl(1, 1031, 4096)\n"
      "except OSError: pass\nprint('z')",
      "z\n",
    ),
  ],
)
def test_moving_descriptors_about_moves_only_the_output(box, code, stdout):
  result = box.run("import os\n" + code)
  assert (result.status, result.stdout) == (ToolStatus.OK, stdout)
  after = box.run("import os\n" + code + "\n1 / 0")
  assert after.status == ToolStatus.ERROR


POISON = r"""
import builtins, math, os, random, sys, site, numpy, sympy
x = sympy.Symbol('x')
sympy.sin = sympy.cos
sympy.pi = sympy.Integer(3)
type(x).__str__ = lambda self: 'poisoned'
for name in ('CACHE', 'cache'):
  cached = getattr(sympy.core.cache, name, None)
  if isinstance(cached, list | dict): cached.clear()
sympy.Integer.__add__ = lambda a, b: sympy.Integer(7)
numpy.pi = numpy.e = 3.0
numpy.linalg.solve = numpy.add = lambda *a: 0
numpy.random.seed(5); random.seed(5)
math.pi = 3
builtins.sum = builtins.abs = lambda *a: 0
os.environ['PYTHONPATH'] = os.environ['PATH'] = '.'
sys.setrecursionlimit(99)
"""
PROBE = r"""
import math, os, sys, numpy, sympy
x = sympy.Symbol('x')
print(sympy.sin(x), sympy.pi.evalf(5), sympy.Integer(2) + 3, numpy.pi)
print(numpy.linalg.solve([[2.0]], [4.0]), numpy.add(1, 1), math.pi)
print(sum([1, 2]), abs(-3))
print('PYTHONPATH' in os.environ)
print(numpy.random.rand())
"""


def test_poisoned_modules_are_the_poisoners_own(strong_box, cells):
  clean = strong_box.run(PROBE)
  assert clean.status == ToolStatus.OK
  assert "sin(x) 3.1416 5 3.14159" in clean.stdout
  assert strong_box.run(POISON).status == ToolStatus.OK
  first, second = cells(), cells()
  assert first(POISON).status == ToolStatus.OK
  for _ in range(4):  # each of the zygotes
    assert strong_box.run(PROBE).stdout == clean.stdout
  of_session = second(PROBE).stdout
  assert of_session.splitlines()[:-1] == clean.stdout.splitlines()[:-1]
  assert "poisoned" in first("print(x)").stdout


def test_what_python_runs_at_its_start_cannot_be_planted(strong_box):
  plant = r"""
import os, site, sys
places = [p for p in sys.path if p] + [site.getusersitepackages()]
places += [os.path.expanduser('~'), os.getcwd(), '/tmp', sys.prefix]
lib = os.path.dirname(os.__file__)
places += [lib, lib + '/__pycache__']
n = 0
for place in places:
  for name in ('sitecustomize.py', 'usercustomize.py', 'evil.pth', 'json.py',
               'pyvenv.cfg', 'os.cpython-311.pyc', 'random.py'):
    try:
      os.makedirs(place, exist_ok=True)
      with open(os.path.join(place, name), 'w') as f:
        f.write('import sys; sys.stdout.write("planted")')
      n += not os.path.join(place, '').startswith(os.getcwd())
    except OSError:
      pass
print(n)
"""
  planted = strong_box.run(plant)
  assert (planted.status, planted.stdout) == (ToolStatus.OK, "0\n")
  code = "import json, random, sitecustomize"
  result = strong_box.run(code)
  assert "planted" not in result.stdout + result.stderr
  child = "import subprocess, sys\nsubprocess.run([sys.executable, '-c', '0'])"
  assert "planted" not in strong_box.run(child).stdout


def test_a_program_of_a_later_call_finds_no_file_of_an_earlier(box):
  code = (
    "import os\nprint(sorted(os.listdir()))\n"
    "for name in ('sitecustomize.py', 'json.py', 'numpy.py'):\n"
    "  open(name, 'w').write('print(1)')"
  )
  assert [box.run(code).stdout for _ in range(3)] == ["[]\n"] * 3


def test_nothing_that_a_program_wrote_is_unpickled():
  folder = pathlib.Path(sandbox.__file__).parent
  for path in folder.glob("*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      aliases = getattr(node, "names", [])
      names = [getattr(alias, "name", alias) for alias in aliases]
      names.append(getattr(node, "module", None) or "")
      assert not {"pickle", "marshal", "shelve", "dill"} & set(names), path


def test_odd_names_of_exceptions_are_told_or_left_out(box):
  code = "E = type({!r}, (Exception,), {{}})\nraise E('x')"
  assert box.run(code.format("Good")).error_type == "Good"
  for name in ("a b", "x" * 999, "infra\0\0", "\n", "😀"):
    result = box.run(code.format(name))
    assert result.status in (ToolStatus.ERROR,), result
    assert result.error_type == "" or result.error_type.isidentifier()
