"""The toolbox: what runs, what is rejected at once, what the model reads."""

import json
import time
from concurrent import futures

import pytest

from roc import layout
from roc.host import calls, sandbox, tools

STATUS = layout.ToolStatus


def _call(code: str) -> calls.ToolCall:
  return calls.ToolCall("python", {"code": code}, "{}")


def test_a_good_call_runs_with_its_seed_names(canned_sandbox, canned_result):
  sandbox = canned_sandbox({"print(1)": canned_result(stdout="1\n")})
  box = tools.Toolbox(sandbox)
  done = box.submit(_call("print(1)"), trajectory=(3, 1), call_index=2)
  outcome = done.result(timeout=5)
  assert (outcome.status, outcome.text) == (STATUS.OK, "1")
  assert sandbox.asked == [("print(1)", (3, 1), 2)]


def test_a_malformed_call_never_reaches_the_sandbox(canned_sandbox):
  sandbox = canned_sandbox()
  done = tools.Toolbox(sandbox).submit(calls.read_call("{"))
  assert done.done()
  outcome = done.result()
  assert outcome.status == STATUS.REJECTED
  assert outcome.text == "Invalid call: bad JSON"
  assert sandbox.asked == []


def test_long_output_is_cut_in_the_middle(canned_sandbox, canned_result):
  sandbox = canned_sandbox({"x": canned_result(stdout="a" * 500 + "z")})
  box = tools.Toolbox(sandbox, max_chars=40)
  text = box.submit(_call("x")).result(timeout=5).text
  assert len(text) == 40
  assert text.startswith("aaa") and text.endswith("z")


def test_renderer_by_name_or_function(canned_sandbox, canned_result):
  sandbox = canned_sandbox({"x": canned_result(stdout="5")})
  by_name = tools.Toolbox(sandbox, renderer="rstar")
  assert by_name.submit(_call("x")).result(timeout=5).text == (
    "Tool call success\nstdout: 5"
  )
  own = tools.Toolbox(sandbox, renderer=lambda call, result: "!" + call.name)
  assert own.submit(_call("x")).result(timeout=5).text == "!python"


class _OneFuture:
  def __init__(self, future):
    self._future = future

  def submit(self, code, *, trajectory="", call_index=0):
    return self._future


def test_the_sandboxs_exception_and_cancellation_reach_the_waiter():
  broken = futures.Future()
  broken.set_exception(OSError("gone"))
  done = tools.Toolbox(_OneFuture(broken)).submit(_call("x"))
  with pytest.raises(OSError, match="gone"):
    done.result(timeout=5)
  pending = futures.Future()
  done = tools.Toolbox(_OneFuture(pending)).submit(_call("x"))
  assert not done.done()
  pending.cancel()
  with pytest.raises(futures.CancelledError):
    done.result(timeout=5)


def test_a_renderers_bug_does_not_hang_the_waiter(canned_sandbox):
  box = tools.Toolbox(canned_sandbox(), renderer=lambda call, result: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    box.submit(_call("x")).result(timeout=5)


def test_bad_settings_are_errors(canned_sandbox):
  with pytest.raises(ValueError, match="'loud' is unknown"):
    tools.Toolbox(canned_sandbox(), renderer="loud")
  with pytest.raises(ValueError, match="max_chars"):
    tools.Toolbox(canned_sandbox(), max_chars=0)


def test_schema_of_the_python_tool():
  schema = tools.tool_schema(name="run")
  assert schema == {
    "type": "function",
    "function": {
      "name": "run",
      "description": "Runs Python code in a fresh interpreter.",
      "parameters": {
        "type": "object",
        "properties": {
          "code": {
            "type": "string",
            "description": "a complete program; what it prints is the answer.",
          },
          "stdin": {
            "type": "string",
            "description": "what the program reads from its standard input.",
          },
        },
        "required": ["code"],
      },
    },
  }
  assert '"name": "run"' in tools.system_text([schema])


def test_schema_types_defaults_and_missing_descriptions():
  def good(n: int, flag: bool = False):
    """Does it.

    Args:
      n: how many.
      flag: whether.
    """

  def bad(n: int):
    """Says nothing of its argument."""

  parameters = tools.tool_schema(good)["function"]["parameters"]
  assert parameters["required"] == ["n"]
  assert parameters["properties"]["flag"]["type"] == "boolean"
  with pytest.raises(ValueError, match="'n' needs a type"):
    tools.tool_schema(bad)


class _Recorder:
  def __init__(self):
    self.asked, self.ended = [], []

  def submit(self, code, **kw):
    self.asked.append((code, kw))
    return futures.Future()

  def end_trajectory(self, trajectory):
    self.ended.append(trajectory)


def _ask(tool, arguments, name=""):
  sandbox = _Recorder()
  box = tools.Toolbox(sandbox, tool=tool)
  body = json.dumps({"name": name or box.tool_name, "arguments": arguments})
  call = calls.read_call(body, box.spec)
  box.submit(call, trajectory="t")
  box.end_trajectory("t")
  return call.error, sandbox


def test_a_program_may_bring_its_input():
  error, sandbox = _ask("python", {"code": "x", "stdin": "5\n"})
  assert error is None
  ((code, kw),) = sandbox.asked
  assert (code, kw["stdin"]) == ("x", "5\n") and "tool" not in kw
  assert sandbox.ended == []


@pytest.mark.parametrize("tool", ["session", "jupyter_code"])
def test_a_cell_goes_to_the_session_that_ends_with_its_rollout(tool):
  error, sandbox = _ask(tool, {"code": "x"})
  assert error is None
  assert sandbox.asked[0][1]["tool"] == "session"
  assert sandbox.ended == ["t"]


def test_the_released_tool_wants_code_and_input():
  name = "python_code_with_standard_io"
  error, sandbox = _ask(name, {"code": "x", "input": "5"})
  assert (error, sandbox.asked[0][1]["stdin"]) == (None, "5")
  schema = tools.Toolbox(sandbox, tool=name).schema["function"]
  assert schema["name"] == name
  assert schema["parameters"]["required"] == ["code", "input"]
  for arguments in ({"code": "x"}, {"code": "x", "input": 5}):
    error, sandbox = _ask(name, arguments)
    assert (error, sandbox.asked) == ("bad arguments", [])


def test_an_unknown_tool_is_named():
  with pytest.raises(ValueError, match="'calculator' is unknown"):
    tools.Toolbox(_Recorder(), tool="calculator")


@pytest.mark.parametrize("tool", tools.TOOLS)
def test_the_description_says_what_there_is_and_that_there_is_no_network(tool):
  schema = tools.Toolbox(sandbox.Sandbox(), tool=tool).schema["function"]
  assert "numpy, sympy, scipy, mpmath are installed" in schema["description"]
  assert schema["description"].endswith("there is no network.")
  unsaid = tools.Toolbox(_Recorder(), tool=tool).schema["function"]
  assert "installed" not in unsaid["description"]


def test_what_is_said_to_be_installed_is():
  with sandbox.Sandbox(n_workers=1) as box:
    result = box.run(
      "import numpy, sympy, scipy, mpmath, os\n"
      "print(os.environ['TQDM_DISABLE'])"
    )
  assert result.stdout == "1\n", result


def test_a_late_call_is_the_models_fault_where_its_program_was_running():
  nap = "print('before', flush=True)\nimport time\ntime.sleep(9)"
  limits = sandbox.Limits(wall_s=20)
  with sandbox.Sandbox(limits, n_workers=1) as runner:
    box = tools.Toolbox(runner)
    quick = box.submit(_call("print(1)"), trajectory=1)
    assert quick.result(timeout=20).text == "1"
    running = box.submit(_call(nap), trajectory=1)
    behind = box.submit(_call("print(2)"), trajectory=2)
    time.sleep(0.3)
    # What waits for another rollout's program has not run.
    assert box.give_up([behind]) is None
    outcomes = box.give_up([quick, running])
    assert [o.status for o in outcomes] == [STATUS.OK, STATUS.TIMEOUT]
    assert outcomes[1].text == "Timeout"
    # Cells of one turn wait for each other.
    cells = tools.Toolbox(runner, tool="session")
    both = [cells.submit(_call(nap), trajectory=3) for _ in "12"]
    time.sleep(0.3)
    assert {o.status for o in cells.give_up(both)} == {STATUS.TIMEOUT}
