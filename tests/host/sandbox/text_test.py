"""What the model reads is bytes for bytes what its program did, and no more."""

import os
import sys

import pytest

from roc.host import sandbox
from roc.layout import ToolStatus


def test_input_without_stdin_is_eof(box):
  result = box.run("input()")
  assert (result.status, result.error_type) == (ToolStatus.ERROR, "EOFError")


def test_stdin_bytes_arrive_exactly(box):
  data = b"a\r\nb\xff\x00\xfe\n" + bytes(range(256))
  code = "import sys\nprint(sys.stdin.buffer.read().hex())"
  assert box.run(code, stdin=data).stdout == data.hex() + "\n"


def test_stdin_text_is_read_by_input(box):
  result = box.run("print(int(input()) + int(input()))", stdin="4\n5\n")
  assert result.stdout == "9\n"


def test_unread_stdin_of_ten_megabytes_blocks_nothing(box):
  result = box.run("print('done')", stdin=b"x" * (10 << 20))
  assert (result.status, result.stdout) == (ToolStatus.OK, "done\n")


@pytest.mark.parametrize(
  "code, stdout",
  [
    ("print('\\ud800')", "\\ud800\n"),
    ("import os\nos.write(1, b'\\xff\\xfe')", "\ufffd\ufffd"),
    ("print('no newline', end='')", "no newline"),
    ("print('a\\rb\\x1b[31mc\\0d')", "a\rb\x1b[31mc\0d\n"),
    ("print('é∑🙂')", "é∑🙂\n"),
    ("π = 3; print(π)", "3\n"),
  ],
)
def test_odd_output_is_kept_or_replaced(box, code, stdout):
  result = box.run(code)
  assert (result.status, result.stdout) == (ToolStatus.OK, stdout)


@pytest.mark.parametrize(
  "code, word",
  [
    ("print(1)\nx\0y", "NUL"),
    ("print('\ud800')", "UTF-8"),
    ("#" * 70000, "65536"),
    (17, "string"),
  ],
)
def test_code_that_cannot_run_is_rejected_with_advice(box, code, word):
  result = box.run(code)
  assert result.status == ToolStatus.REJECTED
  assert word in result.stderr and not result.clean
  assert result.exit_code is None and result.wall_ms == 0


def test_a_traceback_shows_the_programs_own_frames(box):
  code = "import json\ndef f(text):\n  return json.loads(text)\nf('{')"
  result = box.run(code)
  # Which marks stand below a line differs between versions of Python.
  lines = result.stderr.splitlines(keepends=True)
  unmarked = "".join(line for line in lines if line.strip(" ~^\n"))
  assert unmarked == (
    "Traceback (most recent call last):\n"
    '  File "<tool>", line 4, in <module>\n'
    "    f('{')\n"
    '  File "<tool>", line 3, in f\n'
    "    return json.loads(text)\n"
    "json.decoder.JSONDecodeError: Expecting property name enclosed in double"
    " quotes: line 1 column 2 (char 1)\n"
  )


@pytest.mark.parametrize(
  "code",
  [
    "import json\njson.loads('{')",
    "from json import nope",
    "from math import nope",
    "x = = 1",
    "try:\n  1 / 0\nexcept Exception as e:\n  raise ValueError from e",
    "open('missing')",
    "open('mod.py', 'w').write('1 / 0')\nimport mod",
    "import threading\nthreading.Thread(target=lambda: 1 / 0).start()",
    "class A:\n  def __del__(self): 1 / 0\na = A()\ndel a",
    "import warnings\nwarnings.warn('w')",
    "import re\nre.compile('(')",
    "exec('1 / 0')",
    "import subprocess\nsubprocess.run(['no-such-program'])",
  ],
)
def test_no_host_path_pid_or_address_is_shown(box, code):
  result = box.run(code)
  text = result.stdout + result.stderr
  assert text
  for secret in ("/home/", "/tmp/", "/usr/", "/lib/", '.py", line', "0x"):
    if secret == '.py", line':
      text = text.replace('File "mod.py", line', "")
    assert secret not in text
  assert sys.prefix not in text and sys.base_prefix not in text
  assert box.run(code).stderr == result.stderr


@pytest.mark.parametrize(
  "code",
  [
    "import json, traceback\ntry:\n  json.loads('{')\n"
    "except ValueError:\n  traceback.print_exc()",
    "import json, logging\ntry:\n  json.loads('{')\n"
    "except ValueError:\n  logging.exception('failed')",
    "import traceback\ntraceback.print_stack()",
    "import inspect\nprint([f.filename for f in inspect.stack()])",
    "import faulthandler\nfaulthandler.dump_traceback()",
    "import json\nprint(json, json.__file__)",
  ],
  ids=["print_exc", "logging", "stack", "inspect", "faulthandler", "module"],
)
@pytest.mark.parametrize("tool", ["python", "session"])
def test_what_a_program_prints_of_its_own_stack_names_no_host(
  strong_box, code, tool
):
  result = strong_box.run(code, tool=tool, trajectory="stack")
  strong_box.end_trajectory("stack")
  text = result.stdout + result.stderr
  assert text and result.status == ToolStatus.OK
  package = os.path.dirname(sandbox.__file__)
  for secret in (sys.prefix, sys.base_prefix, package):
    assert secret not in text
  assert "0x0000" not in text  # the number of a thread


def test_the_environment_is_an_allowlist(box, monkeypatch):
  monkeypatch.setenv("ROC_CANARY", "secret")
  with sandbox.Sandbox(n_workers=1, tier="filtered") as fresh:
    result = fresh.run(
      "import os\nprint(sorted(os.environ), 'secret' in str(os.environ))\n"
      "print(b'secret' in open('/proc/self/environ', 'rb').read())"
    )
  names = result.stdout.split("]")[0]
  assert "ROC_CANARY" not in names and "HOME" in names
  assert result.stdout.count("False") == 2


def test_each_call_starts_in_its_own_empty_directory(box):
  code = (
    "import os\nprint(os.listdir(), os.getcwd() == os.environ['HOME'])\n"
    "open('left.txt', 'w').write('x')\nprint(os.listdir())"
  )
  for _ in range(2):
    assert box.run(code).stdout == "[] True\n['left.txt']\n"


def test_one_call_leaves_nothing_in_the_next(box):
  box.run("import math, builtins\nmath.pi = 3\nbuiltins.leak = 1")
  result = box.run("import math\nprint(math.pi)\nleak")
  assert result.stdout == "3.141592653589793\n"
  assert result.error_type == "NameError"


RANDOM = "import random\nprint(random.random(), hash('text'))"


def test_random_numbers_follow_run_trajectory_and_call(box):
  def draw(**kw):
    return box.run(RANDOM, **kw).stdout

  first = draw(trajectory=(3, 1), call_index=0)
  assert first == draw(trajectory=(3, 1), call_index=0)
  assert first != draw(trajectory=(3, 1), call_index=1)
  assert first != draw(trajectory=(3, 2), call_index=0)
  with sandbox.Sandbox(n_workers=1, seed=7) as same:
    assert same.run(RANDOM, trajectory=(3, 1)).stdout == first
  with sandbox.Sandbox(n_workers=1, seed=8) as other:
    assert other.run(RANDOM, trajectory=(3, 1)).stdout != first


def test_numpy_is_seeded_too_when_it_comes_late(box):
  code = "import numpy\nprint(numpy.random.rand())"
  first = box.run(code, trajectory="a")
  assert first.status == ToolStatus.OK, first.stderr
  assert first.stdout == box.run(code, trajectory="a").stdout
  assert first.stdout != box.run(code, trajectory="b").stdout


def test_preloaded_numpy_draws_the_same_numbers(box):
  code = "import numpy\nprint(numpy.random.rand())"
  with sandbox.Sandbox(n_workers=1, seed=7, preload=("numpy",)) as warm:
    result = warm.run(code, trajectory="a")
    assert result.stdout == box.run(code, trajectory="a").stdout
    assert warm.info()["images"]["bare"] == ["numpy"]


def test_the_clock_is_utc(box):
  assert box.run("import time\nprint(time.tzname[0])").stdout == "UTC\n"


def test_the_program_sees_no_module_of_ours(box):
  code = "import sys\nprint([m for m in sys.modules if 'roc' == m[:3]])"
  assert box.run(code).stdout == "[]\n"
  assert os.environ.get("HOME") != ""


def test_the_frames_below_the_program_hold_no_server(box):
  code = (
    "import sys\nframe, names = sys._getframe(), []\n"
    "while frame:\n  names.append(frame.f_code.co_name)\n"
    "  frame = frame.f_back\nprint(names)"
  )
  names = box.run(code).stdout
  assert "loop" not in names and "_fork" not in names
