"""`roc.main sandbox`: what a user types and what comes out."""

import json
import os
import subprocess
import sys

import pytest

from roc import main


@pytest.fixture
def write(tmp_path):
  def write(name, content):
    path = tmp_path / name
    path.write_bytes(
      content if isinstance(content, bytes) else content.encode()
    )
    return str(path)

  return write


def run_json(capsys, *argv):
  assert main.main(["sandbox", "run", *argv, "--json"]) == 0
  return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_files_are_calls_of_their_own(capsys, write):
  one, two = write("one.py", "x = 1\nprint(x)"), write("two.py", "print(x)")
  first, second = run_json(capsys, one, two)
  assert (first["file"], first["status"], first["stdout"]) == (one, "ok", "1\n")
  assert (second["status"], second["error_type"]) == ("error", "NameError")


def test_files_are_cells_of_one_session(capsys, write):
  one, two = write("one.py", "x = 20"), write("two.py", "x + 1")
  results = run_json(capsys, one, two, "--tool=session")
  assert [r["stdout"] for r in results] == ["", "21\n"]


def test_input_comes_from_a_file_bytes_unchanged(capsys, write):
  data = write("data", b"a\r\n\xff\x00")
  code = "import sys\nprint(sys.stdin.buffer.read().hex())"
  (result,) = run_json(capsys, write("p.py", code), "--stdin", data)
  assert result["stdout"] == "610d0aff00\n"


def test_tier_and_limits_are_taken(capsys, write):
  loop = write("loop.py", "while True: pass")
  (result,) = run_json(capsys, loop, "--tier=T0", "--wall_s=0.3")
  assert (result["status"], result["cause"]) == ("timeout", "wall")
  assert result["tier"] == "process"


def test_code_that_is_no_text_is_rejected(capsys, write):
  (result,) = run_json(capsys, write("bad.py", b"print('\xff')"))
  assert result["status"] == "rejected" and "UTF-8" in result["stderr"]


def test_a_reader_sees_the_result_and_no_escape_sequence(capsys, write):
  path = write("p.py", "print('\\x1b[31mred')\n1 / 0")
  assert main.main(["sandbox", "run", path]) == 0
  out = capsys.readouterr().out
  assert "error ZeroDivisionError" in out and "tier " in out
  assert "\\x1b[31mred" in out and "\x1b" not in out


def test_code_and_input_can_be_piped(tmp_path):
  process = subprocess.run(
    [sys.executable, "-m", "roc.main", "sandbox", "run", "-", "--json"],
    input="print(6 * 7)",
    capture_output=True,
    text=True,
    env={**os.environ, "PYTHONPATH": os.getcwd()},
  )
  assert json.loads(process.stdout)["stdout"] == "42\n"


@pytest.mark.parametrize(
  "argv, word",
  [
    (["run"], "name a file"),
    (["run", "no-such-file.py"], "no-such-file.py"),
    (["run", "x.py", "--tool=sesion"], "did you mean session?"),
    (["run", "-", "--stdin"], "only one"),
    (["run", "{file}", "--tier=T9"], "T9"),
    (["run", "{file}", "--tier=external"], "ExternalSandbox"),
    (["run", "{file}", "--wall_s=-1"], "wall_s"),
    (["run", "{file}", "--without=locks"], "locks"),
    (["run", "{file}", "--tier=T2", "--without=seccomp"], "seccomp"),
    (["run", "{file}", "--cpu_s=fast"], "cpu_s"),
    (["stroll"], "stroll"),
    (["doctor", "--tier=T0", "--min_tier=T1"], "filtered"),
  ],
)
def test_mistakes_are_one_sentence(capsys, write, argv, word):
  path = write("p.py", "print(1)")
  argv = [arg.replace("{file}", path) for arg in argv]
  assert main.main(["sandbox", *argv]) == 2
  err = capsys.readouterr().err
  assert err.startswith("error: ") and len(err.splitlines()) == 1
  assert word in err


def test_the_doctor_names_every_tier_and_what_it_is_worth(capsys):
  assert main.main(["sandbox", "doctor"]) == 0
  out = capsys.readouterr().out
  for word in ("T3 isolated", "T0 process", "chosen: ", "does not protect"):
    assert word in out


def test_the_doctor_speaks_json(capsys):
  argv = ["sandbox", "doctor", "--json", "--without=seccomp"]
  assert main.main(argv) == 0
  rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  held = {row["tier"]: row["holds"] for row in rows if row["probe"] == "tier"}
  assert held == {
    "isolated": False,
    "confined": False,
    "filtered": False,
    "process": True,
  }
  assert rows[-1] == {"probe": "chosen", "tier": "process"}


def test_help_tells_of_files_and_limits(capsys):
  with pytest.raises(SystemExit) as stop:
    main.main(["sandbox", "run", "--help"])
  assert stop.value.code == 0
  out = capsys.readouterr().out
  assert "FILE" in out and "--wall_s" in out and "example" in out
