"""What the model reads: short, the same every time, never too long."""

import traceback

import pytest

from roc import layout
from roc.host import calls, renderers

CALL = calls.ToolCall("python", {"code": "x"}, "{}")
STATUS = layout.ToolStatus
TRACE = (
  'Traceback (most recent call last):\n  File "<tool>", line 1, in <module>\n'
  "NameError: name 'prnt' is not defined\n"
)


@pytest.mark.parametrize(
  ("fields", "text"),
  [
    ({"stdout": " 42\n"}, "42"),
    ({"stdout": "1\n2\n", "stderr": "noise"}, "1\n2"),
    ({"stdout": "\n"}, "(no output)"),
    (
      {"status": STATUS.ERROR, "stderr": TRACE, "error_type": "NameError"},
      "NameError: name 'prnt' is not defined",
    ),
    (
      {
        "status": STATUS.ERROR,
        "stderr": "Traceback:\nValueError: a\nb\n",
        "error_type": "ValueError",
      },
      "ValueError: a",
    ),
    (
      {
        "status": STATUS.ERROR,
        "stderr": "json.decoder.JSONDecodeError: x\nmore\n",
        "error_type": "JSONDecodeError",
      },
      "json.decoder.JSONDecodeError: x",
    ),
    ({"status": STATUS.ERROR, "error_type": "KeyError"}, "KeyError"),
    ({"status": STATUS.ERROR}, "Error"),
    ({"status": STATUS.TIMEOUT, "stdout": "1"}, "Timeout"),
    ({"status": STATUS.TIMEOUT, "stderr": "Warning: w\n"}, "Timeout"),
    ({"status": STATUS.EXIT, "exit_code": 3}, "Exit code 3"),
    (
      {"status": STATUS.EXIT, "exit_code": 1, "stderr": "w\nno solution\n"},
      "Exit code 1: no solution",
    ),
    ({"status": STATUS.CRASH}, "Crash"),
    (
      {"status": STATUS.CRASH, "stderr": "x\nThe session ended; gone.\n"},
      "Crash: The session ended; gone.",
    ),
    (
      {"status": STATUS.REJECTED, "stderr": "The code was not run: NUL."},
      "Invalid call: The code was not run: NUL.",
    ),
    ({"status": STATUS.REJECTED}, "Invalid call"),
  ],
)
def test_compact_words(canned_result, fields, text):
  assert renderers.render_compact(CALL, canned_result(**fields)) == text


@pytest.mark.parametrize(
  ("raised", "text"),
  [
    (
      ExceptionGroup("many", [ValueError("a"), TypeError("b\nc"), KeyError(1)]),
      "ExceptionGroup: many (3 sub-exceptions); ValueError: a; TypeError: b;"
      " KeyError: 1",
    ),
    (
      ExceptionGroup("o", [OSError("x"), ExceptionGroup("i", [EOFError()])]),
      "ExceptionGroup: o (2 sub-exceptions); OSError: x;"
      " ExceptionGroup: i (1 sub-exception); EOFError",
    ),
  ],
)
def test_a_group_says_what_is_in_it(canned_result, raised, text):
  stderr = "".join(traceback.format_exception(raised))
  result = canned_result(
    status=STATUS.ERROR, stderr=stderr, error_type="ExceptionGroup"
  )
  assert renderers.render_compact(CALL, result) == text


@pytest.mark.parametrize("name", renderers.RENDERERS)
@pytest.mark.parametrize("status", [s for s in STATUS if s != STATUS.NONE])
def test_every_status_has_words(canned_result, name, status):
  text = renderers.RENDERERS[name](CALL, canned_result(status=status))
  assert text
  assert ("success" in text or text == "(no output)") == (status == STATUS.OK)


def test_a_rejected_call_says_why():
  bad = calls.read_call("{")
  assert renderers.render_compact(bad, None) == "Invalid call: bad JSON"
  assert renderers.render_rstar(bad, None).startswith(
    "Failed to decode tool call: bad JSON: Expecting"
  )


def test_rstar_wording(canned_result):
  ok = canned_result(stdout="42\n", stderr="hm\n")
  assert renderers.render_rstar(CALL, ok) == (
    "Tool call success\nstdout: 42\nstderr: hm"
  )
  late = canned_result(status=STATUS.TIMEOUT, stdout="1")
  assert renderers.render_rstar(CALL, late) == (
    "Tool call failure\nreason: worker_timeout\nstdout: 1"
  )


def test_cut_middle_keeps_head_and_tail():
  text = "a" * 50 + "b" * 50
  cut = renderers.cut_middle(text, 41)
  assert cut == "a" * 15 + "...(cut)..." + "b" * 15
  assert renderers.cut_middle(text, 100) == text


@pytest.mark.parametrize("limit", [1, 11, 12, 13, 99])
def test_cut_middle_never_exceeds_its_limit(limit):
  assert len(renderers.cut_middle("x" * 100, limit)) == limit
