"""Cells that turn on the processes which hold their session."""

import pytest

from roc.host.sandbox import Limits
from roc.layout import ToolStatus

ATTACKS = {
  "kill the guardian": "os.kill(os.getppid(), 9)\ntime.sleep(0.2)",
  "stop the guardian": "os.kill(os.getppid(), 19)",
  "stop the guardian and die": "os.kill(os.getppid(), 19)\nos._exit(0)",
  "kill all of the session": "if os.getpid() < 300: os.kill(1, 9)\n"
  "os.killpg(0, 9)",
  "close all": "os.closerange(3, 5000)",
  "close all and more": "os.closerange(0, 5000)",
  "hello": "send(b'hello')",
  "hello from a child": "os.fork() or (send(b'hello'), time.sleep(9))",
  "done": "send(b'done 0')\ntime.sleep(0.2)",
  "done from a child": "os.fork() or (send(b'done 0'), os._exit(0))",
  "done and die": "send(b'done 0')\nos._exit(3)",
  "died": "send(b'died 0 0 0')\nsend(b'died 9 1e300 -5')\ntime.sleep(0.2)",
  "noise": "for w in (b'', b'x', b'done', b'done x', b'died nan nan nan',"
  " b'done 99999999999999999999', b'\\xff' * 4000): send(w)",
  "flood": "while True: send(b'hello')",
  "deaf": "import socket\nsocket.socket(fileno=3).shutdown(2)",
  "steal": "os.fork() or (os.setsid(), os.read(3, 9999))",
  "fork on": "os.fork()",
  "own guardian": "os.fork() and os._exit(0)",
  "trace": "sys.settrace(lambda *a: 1 / 0)\nsys.setprofile(lambda *a: 1 / 0)",
  "patch": "import builtins, json, socket, threading\n"
  "os._exit = os.fork = os.wait4 = os.close = json.loads = None\n"
  "socket.recv_fds = threading.enumerate = None\n"
  "builtins.compile = builtins.exec = builtins.len = None",
  "clear": "sys.modules.clear()",
  "limits": "import resource\nresource.setrlimit(7, (4, 4))\n"
  "resource.setrlimit(9, (1, 1))",
}
SEND = (
  "import os, sys, time\ndef send(data):\n  try:\n    os.write(3, data)\n"
  "  except OSError: pass\n"
)


@pytest.mark.parametrize("code", ATTACKS.values(), ids=ATTACKS.keys())
def test_attacks_on_the_session_cost_at_most_the_session(any_cell, code):
  """Never INFRA, and whoever lost it is told; otherwise it goes on."""
  cell = any_cell
  assert cell(SEND + "x = 1").status == ToolStatus.OK
  results = [cell(code, limits=Limits(wall_s=0.5))]
  results += [cell("print('alive')", limits=Limits(wall_s=1)) for _ in "12"]
  is_told = any("variables are gone" in r.stderr for r in results)
  results.append(cell("x", limits=Limits(wall_s=1)))
  assert ToolStatus.INFRA not in [r.status for r in results], results
  assert results[-1].stdout in ("1\n", "") or is_told, results
  if results[-1].error_type == "NameError":
    assert is_told, results


def test_a_forged_end_does_not_make_a_failure_good(cell):
  cell(SEND)
  result = cell("send(b'done 0')\nos._exit(3)")
  assert result.status in (ToolStatus.EXIT, ToolStatus.OK)
  assert not result.clean
