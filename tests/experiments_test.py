"""Experiments are records: what each one runs is written down and compared.

To accept a change that was meant:
  PYTHONPATH=. .venv/bin/python tests/experiments_test.py
"""

import ast
import difflib
import importlib
import os
import pathlib
import re
import shlex

import pytest

from roc import config, hub, main, pretrained, wiring

ROOT = pathlib.Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
# Names such as quickstart and rstar2/stage1.
EXPERIMENTS = sorted(
  p.relative_to(ROOT / "experiments").with_suffix("").as_posix()
  for p in (ROOT / "experiments").rglob("*.py")
  if "\ndef get_config(" in p.read_text()
)
VARIANTS = ("", "tiny")
EVERY_EXPERIMENT = pytest.mark.parametrize("name", EXPERIMENTS)
EVERY_VARIANT = pytest.mark.parametrize("variant", VARIANTS)


def module_of(name):
  return importlib.import_module(f"experiments.{name}".replace("/", "."))


def golden_of(name):
  return GOLDEN / f"{name.replace('/', '.')}.txt"


def resolved(name, variant):
  return config.resolve(module_of(name).get_config(variant))


def written_down(name):
  """All settings, the difference of `:tiny`, and what gin builds."""
  cfg, tiny = (resolved(name, variant) for variant in VARIANTS)
  gin_text = wiring.read_gin(cfg.host.gin_files, cfg.host.gin_bindings)
  lines = [f"{k} = {v!r}" for k, v in config.flatten(cfg).items()]
  statements = [
    line
    for line in gin_text.splitlines()
    if line.strip() and not line.startswith("#")
  ]
  sections = ["# settings", *lines, "", "# :tiny", *config.diff(cfg, tiny)]
  return "\n".join([*sections, "", "# gin", *statements, ""])


@EVERY_EXPERIMENT
def test_nothing_has_changed_unseen(name):
  path = golden_of(name)
  want = path.read_text() if path.exists() else ""
  got = written_down(name)
  changes = difflib.unified_diff(
    want.splitlines(), got.splitlines(), path.name, "now", n=0, lineterm=""
  )
  assert got == want, (
    "\n".join(changes) + "\nif that was meant, write it down with"
    " `PYTHONPATH=. .venv/bin/python tests/experiments_test.py`"
  )


def test_no_record_is_left_over():
  assert set(GOLDEN.glob("*.txt")) == set(map(golden_of, EXPERIMENTS))


@EVERY_EXPERIMENT
def test_it_says_what_it_is_for(name):
  source = (ROOT / "experiments" / f"{name}.py").read_text()
  text = ast.get_docstring(ast.parse(source))
  for heading in ("Claim", "Source", "Hardware", "Result", "Command"):
    assert re.search(rf"^{heading}:", text, re.MULTILINE), heading
  assert f"--config=experiments/{name}.py:tiny" in text


def commands_in(name):
  """Command lines of the docstring, as lists of arguments."""
  source = (ROOT / "experiments" / f"{name}.py").read_text()
  text = ast.get_docstring(ast.parse(source)).replace("\\\n", " ")
  found = re.findall(r"^\s*python -m roc\.main (.*)$", text, re.MULTILINE)
  return [shlex.split(line) for line in found]


@EVERY_EXPERIMENT
def test_its_commands_are_understood(name, capsys, monkeypatch):
  """Each command of the docstring resolves; nothing is run."""
  monkeypatch.chdir(ROOT)
  commands = commands_in(name)
  assert any(f"--config=experiments/{name}.py" in c for c in commands)
  for argv in commands:
    if main.COMMANDS[argv[0]].config == "own":
      importlib.import_module(f"roc.{argv[0]}").make_parser().parse_args(
        argv[1:]
      )
      continue
    assert main.main([*argv, "--dry_run"]) == 0, capsys.readouterr().err
    assert capsys.readouterr().err == ""


@EVERY_EXPERIMENT
@EVERY_VARIANT
def test_dry_run_prints_every_setting(name, variant, capsys, monkeypatch):
  monkeypatch.chdir(ROOT)
  spec = f"experiments/{name}.py" + (f":{variant}" if variant else "")
  assert main.main(["train", f"--config={spec}", "--dry_run"]) == 0
  out, err = capsys.readouterr()
  assert err == ""
  cfg = resolved(name, variant)
  if hub.folder_here(cfg.pretrained):
    cfg = pretrained.settle(cfg)
  for key, value in config.flatten(cfg).items():
    assert f"config.{key} = {value!r}" in out
  assert "host.train_task = @train/" in out


@EVERY_EXPERIMENT
def test_there_is_no_other_variant(name):
  with pytest.raises(ValueError, match="huge"):
    module_of(name).get_config("huge")


@EVERY_EXPERIMENT
def test_tiny_is_tiny(name):
  cfg = pretrained.settle(resolved(name, "tiny"))
  assert cfg.model.d_model <= 64 and cfg.model.n_layers <= 2
  assert cfg.train.steps <= 4 and cfg.sft.steps <= 10


def refresh():
  """Writes down what the experiments are now."""
  os.chdir(ROOT)
  GOLDEN.mkdir(exist_ok=True)
  for path in GOLDEN.glob("*.txt"):
    path.unlink()
  for name in EXPERIMENTS:
    golden_of(name).write_text(written_down(name))


if __name__ == "__main__":
  refresh()
