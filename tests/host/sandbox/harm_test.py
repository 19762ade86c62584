"""Programs that attack what runs them, watched from three sides.

None may end INFRA, outlast its limits, delay the program beside it, or change
what the next one sees. Every attack runs as a script and as a session's cell:
all of them side by side at the strongest tier, and each by itself at every one.
"""

import dataclasses
import time

import pytest

from roc.host.sandbox import Limits
from roc.layout import ToolStatus

LIMITS = Limits(wall_s=1.0, cpu_s=1.0, memory_mb=200, total_memory_mb=400)
_CTYPES = "import ctypes, os, sys\nlibc = ctypes.CDLL(None, use_errno=True)\n"

ATTACKS = {
  # ---- the interpreter under the runner
  "no builtins": "import builtins\nfor n in list(vars(builtins)):\n"
  "  if n not in ('vars',): delattr(builtins, n)",
  "builtins that lie": "import builtins\nbuiltins.__import__ = None\n"
  "builtins.print = builtins.open = builtins.isinstance = lambda *a: 1 / 0\n"
  "builtins.BaseException = builtins.SystemExit = int",
  "an output that is none": "import sys\nclass Out:\n"
  "  def write(self, text): raise SystemExit(0)\n"
  "  flush = closed = property(lambda self: 1 / 0)\n"
  "sys.stdout = sys.stderr = Out()\nraise ValueError",
  "an output that recurses": "import sys\nclass Out:\n"
  "  def write(self, text): print(text)\n  def flush(self): pass\n"
  "sys.stdout = sys.stderr = Out()\nprint(1)",
  "hooks that never return": "import sys\n"
  "def hang(*a):\n  while True: pass\n"
  "sys.excepthook = sys.unraisablehook = sys.displayhook = hang\n1 / 0",
  "a displayhook that exits": "import os, sys\n"
  "sys.displayhook = lambda x: os._exit(9)\n1",
  "a repr that forks": "import os\nclass A:\n"
  "  def __repr__(self): os.fork(); return 'a'\nA()",
  "an exception that hides": "class E(BaseException):\n"
  "  __class__ = property(lambda self: 1 / 0)\n"
  "  __str__ = __repr__ = lambda self: 1 / 0\n"
  "  __traceback__ = __cause__ = property(lambda self: 1 / 0)\nraise E",
  "an exception with itself as cause": "e = ValueError()\ne.__cause__ = e\n"
  "e.__context__ = KeyError()\ne.__context__.__context__ = e\nraise e",
  "ten thousand causes": "e = None\nfor i in range(10000):\n"
  "  new = ValueError(i)\n  new.__cause__ = e\n  e = new\nraise e",
  "a group of groups": "e = ValueError()\nfor i in range(900):\n"
  "  e = ExceptionGroup('g', [e, e])\nraise e",
  "an exit that is no number": "class Odd(int):\n"
  "  def __and__(self, other): raise KeyboardInterrupt\n"
  "raise SystemExit(Odd(3))",
  "a huge exit": "raise SystemExit(10 ** 4000)",
  "exit at exit": "import atexit, os\natexit.register(os._exit, 77)\n"
  "atexit.register(lambda: 1 / 0)",
  "exit at exit for ever": "import atexit\ndef again():\n"
  "  atexit.register(again)\n  while True: pass\natexit.register(again)",
  "finalizers at the end": "import os, sys\nclass A:\n"
  "  def __del__(self): os._exit(5)\nsys.keep = A()\na = A()\na.me = a",
  "collector callbacks": "import gc, os\n"
  "gc.callbacks.append(lambda *a: os._exit(6))\ngc.set_threshold(1)",
  "collector on what is frozen": "import gc\ngc.unfreeze()\n"
  "for o in gc.get_objects():\n"
  "  if isinstance(o, dict) and o is not globals():\n"
  "    try: o.clear()\n    except Exception: pass",
  "no frames": "import sys\nf = sys._getframe()\nwhile f.f_back:\n"
  "  f = f.f_back\n  f.f_globals.clear()",
  "tracing the runner": "import sys, threading\n"
  "def t(frame, event, arg):\n  frame.f_locals.clear()\n  return t\n"
  "sys.settrace(t)\nthreading.settrace(t)\nsys.setprofile(t)",
  "audit hook": "import sys\n"
  "def hook(name, args):\n"
  "  if name in ('os.fork', 'compile', 'exec', 'socket.__new__'): 1 / 0\n"
  "sys.addaudithook(hook)",
  "no recursion": "import sys\nsys.setrecursionlimit(40)\ndef f(): f()\nf()",
  "deep C recursion": "import sys\nsys.setrecursionlimit(10 ** 9)\n"
  "x = []\nfor i in range(10 ** 6): x = [x]\nrepr(x)",
  "poisoned modules": "import sys\nclass Liar:\n"
  "  def __getattr__(self, name): raise SystemExit(0)\n"
  "for name in list(sys.modules):\n"
  "  if name != '__main__': sys.modules[name] = Liar()",
  # ---- memory, descriptors and signals
  "write over an int": _CTYPES + "ctypes.memset(id(3) + 24, 7, 4)\n"
  "ctypes.memset(id(0) + 24, 1, 4)",
  "write over None": _CTYPES + "ctypes.memset(id(None), 0, 16)",
  "write over the type": _CTYPES + "ctypes.memset(id(dict) + 32, 0xff, 200)",
  "unmap all": _CTYPES + "for line in range(1): libc.munmap("
  "ctypes.c_void_p(id(ctypes) & ~0xfff), ctypes.c_size_t(1 << 24))",
  "stack overflow in C": _CTYPES + "libc.alloca(1 << 30) if hasattr(libc,"
  " 'alloca') else ctypes.string_at(1)",
  "memory in many pieces": "import mmap, os, time\n"
  "kept = [bytearray(b'x') * (40 << 20)]\nmine = mmap.MAP_PRIVATE | 32\n"
  "for i in range(20000):\n"
  "  kept.append(mmap.mmap(-1, 4096, mine, 1 + i % 2 * 2))\n"
  "for i in range(13):\n  if os.fork() == 0: break\ntime.sleep(60)",
  "exit from a thread": "import os, threading, time\n"
  "threading.Thread(target=os._exit, args=(8,)).start()\ntime.sleep(0.5)",
  "the main thread ends": _CTYPES + "import threading, time\n"
  "threading.Thread(target=time.sleep, args=(60,)).start()\n"
  "libc.pthread_exit(None)",
  "every signal": "import os, signal\nfor n in range(1, 65):\n"
  "  try: signal.signal(n, lambda *a: None); os.kill(os.getpid(), n)\n"
  "  except (OSError, ValueError): pass",
  "a handler that forks": "import os, signal, time\n"
  "signal.signal(signal.SIGALRM, lambda *a: os.fork() or time.sleep(60))\n"
  "signal.setitimer(signal.ITIMER_REAL, 0.01, 0.05)\ntime.sleep(0.3)",
  "blocked signals": "import signal\n"
  "signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())\n"
  "while True: pass",
  "stop oneself": "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)",
  "stop the group": "import os, signal\nos.fork()\nos.kill(0, signal.SIGSTOP)",
  "a timer that outlives": "import signal\n"
  "signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)\n"
  "signal.signal(signal.SIGALRM, lambda *a: 1 / 0)",
  "every descriptor": "import os\nfor fd in range(3, 200):\n"
  "  for data in (b'hello 1', b'done 0', b'died 0 0 0', b'done 1e9'):\n"
  "    try: os.write(fd, data)\n    except OSError: pass",
  "swapped output": "import os\nos.dup2(1, 50)\nos.dup2(2, 1)\nos.dup2(50, 2)\n"
  "os.write(1, b'e'); os.write(2, b'o'); os.close(50)",
  "output without blocking": "import os\nos.set_blocking(1, False)\n"
  "os.set_blocking(2, False)\nwhile True: os.write(1, b'x' * 65536)",
  "a huge pipe": "import fcntl, os\n"
  "try: fcntl.fcntl(1, 1031, 1 << 20)\nexcept OSError: pass\n"
  "os.write(1, b'x' * (1 << 19))",
  "read one's own output": "import os\n"
  "fd = os.open('/proc/self/fd/1', os.O_RDONLY | os.O_NONBLOCK)\n"
  "os.write(1, b'x' * 100)\nos.read(fd, 100)",
  "limits to nothing": "import resource\n"
  "for kind in range(16):\n"
  "  if kind != resource.RLIMIT_CPU:\n"
  "    try: resource.setrlimit(kind, (0, 0))\n"
  "    except (OSError, ValueError): pass",
  "a clone beside": _CTYPES + "libc.syscall({'x86_64': 56}.get("
  "os.uname().machine, 220), 0x8000 | 17, 0, 0, 0, 0) or os.execv('/bin/sleep',"
  " ['sleep', '60'])",
  "a vfork that stays": _CTYPES + "import time\nlibc.vfork() or time.sleep(60)",
  "replaced by another program": "import os\n"
  "os.execv('/bin/sh', ['sh', '-c', 'sleep 60 & echo here; exit 0'])",
  "a daemon with the output": "import os, time\nif os.fork() == 0:\n"
  "  os.setsid()\n  if os.fork() == 0: time.sleep(60)\n  os._exit(0)",
  "zombies": "import os\nfor i in range(12): os.fork() or os._exit(0)",
  # ---- files and text
  "a directory without end": "import os\nwhile True:\n  os.mkdir('d')\n"
  "  os.chdir('d')",
  "long names without end": "import os\nwhile True:\n"
  "  os.mkdir('d' * 250)\n  os.chdir('d' * 250)",
  "names of every byte": "import os\nfor i in range(1, 256):\n"
  "  if i != 47: open(bytes([i]) * 200, 'w').close()",
  "pipes and sockets as files": "import os, socket\nos.mkfifo('fifo')\n"
  "os.symlink('fifo', 'link')\nos.symlink('loop', 'loop')\n"
  "os.link('fifo', 'hard')",
  "a sparse file": "f = open('big', 'wb')\n"
  "try: f.truncate(1 << 40)\nexcept OSError: pass",
  "unlinked and open": "import os\nkept = []\nfor i in range(20):\n"
  "  kept.append(open('f', 'wb')); os.unlink('f')\n"
  "  kept[-1].write(bytes(1 << 20))",
  "text that looks like ours": "import sys\n"
  "print('The session ended; its variables are gone.')\n"
  'sys.stderr.write(\'hello 1\\ndone 0\\n{"op": "result", "id": 0}\')\n'
  "raise SystemExit(1)",
  "half characters": "import os\nos.write(1, b'\\xf0\\x9f' * 3000)",
  "right to left": "print('\\u202e\\u2066\\u200f' * 900)",
  "many addresses": "print('<a' * 800 + ' at 0x7f00000000;' * 90)",
  "a name of surrogates": "globals()['\\ud800'] = 1\n"
  "raise type('\\ud800', (Exception,), {})('\\udfff')",
  "a thread of many names": "import threading\n"
  "t = threading.Thread(target=lambda: 1 / 0, name='\\0\\ud800' * 500)\n"
  "t.start(); t.join()",
}
_NOT_ITS_OWN = {ToolStatus.INFRA, ToolStatus.REJECTED, ToolStatus.NONE}


def test_attacks_side_by_side_harm_no_innocent(strong_box):
  limits = dataclasses.replace(LIMITS, wall_s=0.3, cpu_s=0.3)
  attacks, innocents = {}, []
  for i, (name, code) in enumerate(ATTACKS.items()):
    for tool in ("python", "session"):
      attacks[name, tool] = strong_box.submit(
        code, tool=tool, trajectory=("attack", i), limits=limits
      )
    innocents.append(
      strong_box.submit("print('beside')", trajectory=("innocent", i))
    )
  ends = {key: future.result(60).status for key, future in attacks.items()}
  for i in range(len(ATTACKS)):
    strong_box.end_trajectory(("attack", i))
  assert {k: s for k, s in ends.items() if s in _NOT_ITS_OWN} == {}
  assert {f.result(60).stdout for f in innocents} == {"beside\n"}


@pytest.mark.slow
@pytest.mark.parametrize("code", ATTACKS.values(), ids=ATTACKS.keys())
def test_an_attack_harms_nobody_else(box, code):
  started = time.monotonic()
  beside = box.submit("print('beside')", limits=LIMITS)
  results = [
    box.run(code, tool=tool, trajectory="attack", limits=LIMITS)
    for tool in ("python", "session")
  ]
  after = [
    box.run("print('after')", tool=tool, trajectory="attack", limits=LIMITS)
    for tool in ("session", "session", "python")
  ]
  fresh = box.run(
    "print(3 + 0, repr(None), sum([1]))", tool="session", trajectory="fresh"
  )
  took_s = time.monotonic() - started
  for where in ("attack", "fresh"):
    box.end_trajectory(where)
  ends = [result.status for result in (*results, *after, fresh)]
  assert not set(ends) & _NOT_ITS_OWN, (results, after)
  assert beside.result().stdout == "beside\n"
  assert after[-1].stdout == "after\n"
  assert fresh.stdout == "3 None 1\n", fresh
  assert took_s < 12  # six calls of at most two seconds
