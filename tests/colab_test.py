import os
import pathlib
import subprocess
import sys

import jupytext
import pytest

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "colab").glob("*.py"))


def _name(path):
  return path.stem


def test_there_are_notebooks():
  assert SCRIPTS


@pytest.mark.parametrize("script", SCRIPTS, ids=_name)
def test_notebook_and_script_are_in_step(script):
  pair = [
    jupytext.read(path) for path in (script, script.with_suffix(".ipynb"))
  ]
  texts = [[(c.cell_type, c.source) for c in nb.cells] for nb in pair]
  assert texts[0] == texts[1], "run `make notebook-sync`"


@pytest.mark.parametrize("script", SCRIPTS, ids=_name)
def test_notebook_is_small_and_holds_no_output(script):
  notebook = script.with_suffix(".ipynb")
  cells = jupytext.read(notebook).cells
  assert len(cells) <= 40
  assert notebook.stat().st_size <= 64 * 1024
  for cell in cells:
    assert not cell.get("outputs")
    assert cell.get("execution_count") is None


@pytest.mark.parametrize("script", SCRIPTS, ids=_name)
def test_notebook_calls_the_library_and_defines_little(script):
  lines = script.read_text().split("\n")
  for i, line in enumerate(lines):
    if line.startswith("def "):
      body = lines[i:]
      n = next(j for j, text in enumerate(body) if j and not text.strip())
      assert n <= 10, line


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=_name)
def test_notebook_runs_from_top_to_bottom(script, tmp_path):
  environment = {
    **os.environ,
    "ROC_TINY": "1",
    "MPLBACKEND": "Agg",
    "JAX_PLATFORMS": "cpu",
    "ROC_RUNS": str(tmp_path / "runs"),
  }
  done = subprocess.run(
    [sys.executable, str(script)],
    cwd=ROOT,
    env=environment,
    capture_output=True,
    text=True,
    timeout=600,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  assert "accuracy with the tool" in done.stdout
  assert "the last on record" in done.stdout
