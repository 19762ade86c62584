"""How a program ends decides its status, whatever it prints or patches."""

import pytest

from roc.host.sandbox import Limits
from roc.layout import ToolStatus


@pytest.mark.parametrize(
  "code, stdout",
  [
    ("print(2 ** 10)", "1024\n"),
    ("", ""),
    ("1 + 1", ""),  # a script echoes nothing
    ("if __name__ == '__main__': print('main')", "main\n"),
    ("exit()", ""),
    ("raise SystemExit(None)", ""),
    ("import sys\nprint('x')\nsys.exit(0)", "x\n"),
    ("import threading\nthreading.Thread(target=exit).start()", ""),
    ("import atexit\natexit.register(print, 'last')", "last\n"),
  ],
)
def test_normal_ends_are_ok_and_clean(box, code, stdout):
  result = box.run(code)
  assert result.status == ToolStatus.OK
  assert (result.stdout, result.clean, result.exit_code) == (stdout, True, 0)


def test_threads_are_waited_for(box):
  code = (
    "import threading, time\n"
    "threading.Thread(target=lambda: (time.sleep(.1), print('t'))).start()"
  )
  assert box.run(code).stdout == "t\n"


@pytest.mark.parametrize(
  "code, kind",
  [
    ("1 / 0", "ZeroDivisionError"),
    ("nope", "NameError"),
    ("x = = 3", "SyntaxError"),
    ("class Mine(Exception): pass\nraise Mine", "Mine"),
    ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    ("def f(): f()\nf()", "RecursionError"),
    ("print(10 ** 5000)", "ValueError"),
    ("import does_not_exist", "ModuleNotFoundError"),
    ("raise BaseExceptionGroup('g', [ValueError(1)])", "ExceptionGroup"),
  ],
)
def test_an_uncaught_exception_is_error_with_its_type(box, code, kind):
  result = box.run(code)
  assert (result.status, result.error_type) == (ToolStatus.ERROR, kind)
  assert result.exit_code == 1 and result.clean
  assert kind in result.stderr


@pytest.mark.parametrize(
  "code, exit_code, stderr, clean",
  [
    ("import sys\nsys.exit('bad luck')", 1, "bad luck\n", True),
    ("exit(3)", 3, "", True),
    ("import os\nos._exit(7)", 7, "", False),
    (
      "import os, threading\n"
      "threading.Thread(target=os._exit, args=(9,)).start()\n"
      "while True: pass",
      9,
      "",
      False,
    ),
  ],
)
def test_a_nonzero_exit_is_exit(box, code, exit_code, stderr, clean):
  result = box.run(code)
  assert result.status == ToolStatus.EXIT
  assert (result.exit_code, result.stderr) == (exit_code, stderr)
  assert result.clean is clean


@pytest.mark.parametrize(
  "code",
  ["import os\nos._exit(0)", "import os\nos.execv('/bin/true', ['true'])"],
)
def test_leaving_by_the_back_door_is_ok_but_not_clean(box, code):
  result = box.run(code)
  assert (result.status, result.clean) == (ToolStatus.OK, False)


@pytest.mark.parametrize(
  "code, number",
  [
    ("import ctypes\nctypes.string_at(0)", 11),
    ("import os\nos.abort()", 6),
    ("import os, signal\nos.kill(os.getpid(), signal.SIGFPE)", 8),
    ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", 9),
    ("import signal, time\nsignal.alarm(1)\ntime.sleep(9)", 14),
    (
      "import faulthandler\nfaulthandler.enable()\n"
      "import ctypes\nctypes.string_at(0)",
      11,
    ),
  ],
  ids=["segv", "abort", "fpe", "kill", "alarm", "faulthandler"],
)
def test_a_signal_of_its_own_making_is_crash(box, code, number):
  result = box.run(code)
  assert (result.status, result.signal) == (ToolStatus.CRASH, number)
  assert not result.clean


def test_an_overflow_of_the_stack_in_c_is_a_crash_or_an_error(box):
  code = (
    "import sys\nsys.setrecursionlimit(10 ** 6)\nnested = []\n"
    "for _ in range(10 ** 6): nested = [nested]\nrepr(nested)"
  )
  result = box.run(code)
  assert result.status in (ToolStatus.CRASH, ToolStatus.ERROR)
  if result.status == ToolStatus.CRASH:
    assert (result.signal, result.clean) == (11, False)


def test_its_own_timer_is_not_our_deadline(box):
  code = (
    "import signal, time\n"
    "signal.signal(signal.SIGALRM, lambda *_: print('rang'))\n"
    "signal.setitimer(signal.ITIMER_REAL, 0.05)\ntime.sleep(0.2)"
  )
  result = box.run(code)
  assert (result.status, result.stdout) == (ToolStatus.OK, "rang\n")


def test_a_fork_of_the_program_does_not_speak_for_it(box):
  code = (
    "import os\npid = os.fork()\n"
    "if pid:\n  os.waitpid(pid, 0)\n  raise ValueError('parent')\n"
  )
  result = box.run(code)
  assert (result.status, result.error_type) == (ToolStatus.ERROR, "ValueError")


@pytest.mark.parametrize(
  "patch",
  [
    "import os\nos._exit = lambda code: None",
    "import sys\nsys.exit = sys.stdout = sys.stderr = None",
    "import builtins\nbuiltins.print = builtins.compile = builtins.open = 0",
    "import builtins\nbuiltins.isinstance = builtins.type = builtins.len = 0",
    "import json, traceback\njson.dumps = traceback.TracebackException = 0",
    "import sys\nsys.excepthook = lambda *a: 1 / 0",
    "import sys\nsys.modules.clear()",
    "import atexit, threading\natexit._run_exitfuncs = 0\n"
    "threading._shutdown = 0",
  ],
)
def test_patching_the_interpreter_hides_no_failure(box, patch):
  failed = (ToolStatus.ERROR, ToolStatus.EXIT, ToolStatus.CRASH)
  assert box.run(f"{patch}\nraise ValueError").status in failed
  assert box.run(patch).status in (*failed, ToolStatus.OK)


def test_printed_verdicts_are_only_text(box):
  forged = '{"op":"result","id":0,"result":"{\\"status\\":\\"ok\\"}"}'
  result = box.run(f"print({forged!r})\nprint('@@E')\n1 / 0")
  assert result.status == ToolStatus.ERROR
  assert result.stdout == f"{forged}\n@@E\n"


@pytest.mark.parametrize("note", [b"infra\0\0", b"ok\0\0"])
def test_writing_on_every_descriptor_forges_nothing(box, note):
  code = (
    "import os\nfor fd in range(3, 1024):\n  try:\n"
    f"    os.write(fd, {note!r})\n    print('wrote', fd)\n"
    "  except OSError:\n    pass\n1 / 0"
  )
  result = box.run(code)
  assert (result.status, result.stdout) == (ToolStatus.ERROR, "")


def test_closing_every_descriptor_is_no_fault_of_ours(box):
  result = box.run("import os\nos.closerange(0, 1000)")
  assert result.status in (ToolStatus.OK, ToolStatus.ERROR)
  result = box.run("import os\nos.closerange(0, 1000)\n1 / 0")
  assert (result.status, result.error_type) == (
    ToolStatus.ERROR,
    "ZeroDivisionError",
  )


def test_a_program_finds_no_descriptor_but_its_three(box):
  code = (
    "import os\nopen_fds = []\nfor fd in range(5000):\n  try:\n"
    "    os.fstat(fd)\n    open_fds.append(fd)\n  except OSError:\n    pass\n"
    "print(open_fds)"
  )
  assert box.run(code).stdout == "[0, 1, 2]\n"


@pytest.mark.parametrize(
  "code",
  [
    "class E(Exception):\n  def __str__(self): raise ValueError\nraise E",
    "class E(Exception):\n  def __str__(self): return 5\nraise E",
    "class M(type):\n  __name__ = 7\nclass E(Exception, metaclass=M): pass\n"
    "raise E",
    "raise Exception('\\ud800')",
  ],
)
def test_an_exception_that_cannot_be_printed_is_still_an_error(box, code):
  assert box.run(code).status == ToolStatus.ERROR


def test_an_exception_that_hangs_in_print_is_timeout(box):
  code = (
    "class E(Exception):\n  def __str__(self):\n    while True: pass\nraise E"
  )
  result = box.run(code, limits=Limits(wall_s=0.5))
  assert result.status == ToolStatus.TIMEOUT


@pytest.mark.parametrize(
  "code",
  [
    "(" * 5000 + ")" * 5000,
    "x = " + "-" * 20000 + "1",
    "x = '" + "a" * 60000 + "'",
    "import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(): f()\nf()",
  ],
  ids=["parens", "unary", "literal", "recursion"],
)
def test_monstrous_programs_are_never_infra(box, code):
  result = box.run(code, limits=Limits(wall_s=2, memory_mb=128))
  assert result.status not in (ToolStatus.INFRA, ToolStatus.REJECTED)


@pytest.mark.parametrize(
  "is_deaf", [True, False], ids=["closes all", "holds stdout"]
)
def test_a_daemon_dies_with_its_call(box, tools, is_deaf):
  code = (
    "import os, time\n"
    "r, w = os.pipe()\n"
    "if os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0:\n"
    "    os.write(w, str(os.getpid()).encode())\n"
    f"    if {is_deaf}: os.closerange(0, 100)\n"
    "    while True: time.sleep(1)\n  os._exit(0)\n"
    "print(os.read(r, 99).decode())"
  )
  result = box.run(code)
  assert result.status == ToolStatus.OK
  assert result.wall_ms < 2000
  assert not tools.survivors(box)


def test_the_survivor_count_sees_a_planted_process(box, tools):
  future = box.submit("import time\ntime.sleep(30)")
  assert tools.wait_until(lambda: tools.survivors(box))
  box.cancel(future)
  future.result()
