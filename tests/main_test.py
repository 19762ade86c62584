"""The command line: help, one sentence per mistake, exit codes."""

import errno
import os
import re
import subprocess
import sys
import types

import pytest

from roc import cli, config, errors, main

EXPERIMENT = """
from roc import config as config_lib


def get_config(variant=""):
  c = config_lib.default_config()
  c.train.steps = 7 if variant == "tiny" else 8
  if variant not in ("", "tiny"):
    raise ValueError(f"there is no variant {variant}")
  return c
"""


@pytest.fixture
def experiment(tmp_path):
  path = tmp_path / "mine.py"
  path.write_text(EXPERIMENT)
  return str(path)


@pytest.fixture
def runs(monkeypatch):
  """Calls of a stand-in program, as (config, workdir)."""
  calls = []
  program = types.SimpleNamespace(run=lambda *args: calls.append(args))
  monkeypatch.setattr(main, "_program", lambda name: program)
  return calls


def fails(capsys, *argv):
  """Returns the one sentence that a command line is refused with."""
  assert main.main(argv) == 2
  out, err = capsys.readouterr()
  assert out == "" and err.startswith("error: ") and err.count("\n") == 1
  return err


def test_help_lists_the_commands_one_line_each(capsys):
  assert main.main(["--help"]) == 0
  out = capsys.readouterr().out
  for name, command in main.COMMANDS.items():
    assert re.search(rf"^  {name} +{re.escape(command.summary)}$", out, re.M)
  assert all(len(line) <= 80 for line in out.splitlines())


# `sandbox` reads its flags itself: tests/sandbox_test.py
COMMANDS = [n for n, c in main.COMMANDS.items() if c.config != "own"]


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help_with_an_example(name, capsys):
  assert main.main([name, "--help"]) == 0
  out = capsys.readouterr().out
  assert f"python -m roc.main {name} --" in out
  assert "--workdir=DIRECTORY" in out
  # Listed where it does something, and refused elsewhere.
  assert ("--allow_config_change" in out) == (name in ("sft", "train"))


def test_allow_config_change_is_refused_where_it_does_nothing(capsys):
  flags = ["--config=experiments/quickstart.py", "--allow_config_change"]
  said = fails(capsys, "compare", *flags)
  assert "no flag --allow_config_change" in said


@pytest.mark.parametrize("name", COMMANDS)
def test_the_example_of_each_command_parses(name, tmp_path, monkeypatch):
  command = main.COMMANDS[name]
  argv = command.example.split()[1:]
  if command.config == "saved":
    workdir = tmp_path / "saved"
    workdir.mkdir()
    (workdir / "config.json").write_text(config.to_json(config.Config()))
    argv = [re.sub("--workdir=.*", f"--workdir={workdir}", a) for a in argv]
  values, cfg = cli.parse(name, argv, command.config)
  assert values.workdir
  assert (cfg is None) == (command.config == "none")


def test_help_needs_no_jax():
  code = (
    "import sys; from roc import main; main.main(['train', '--help']);"
    " assert 'jax' not in sys.modules"
  )
  subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_as_a_process_errors_are_one_line_and_exit_2(tmp_path):
  process = subprocess.run(
    [sys.executable, "-m", "roc.main", "trian", f"--workdir={tmp_path}"],
    capture_output=True,
    text=True,
    env={**os.environ, "PYTHONPATH": os.getcwd()},
  )
  assert process.returncode == 2 and process.stdout == ""
  assert "no command trian (did you mean train?)" in process.stderr
  assert len(process.stderr.splitlines()) == 1


def test_a_command_runs_with_its_config_and_workdir(experiment, runs, tmp_path):
  argv = ["train", f"--config={experiment}:tiny", "--config.train.lr=1e-6"]
  argv += ["--config.filter.mode=inverse", "--config.loss.scale_by_std=False"]
  argv += [f"--workdir={tmp_path / 'w'}"]
  assert main.main(argv) == 0
  ((cfg, workdir),) = runs
  assert (cfg.train.steps, cfg.train.lr) == (7, 1e-6)
  assert (cfg.filter.mode, cfg.loss.scale_by_std) == ("inverse", False)
  assert workdir == tmp_path / "w"


def test_two_command_lines_in_one_process_share_nothing(experiment, runs):
  base = ["train", f"--config={experiment}", "--workdir=w"]
  assert main.main([*base, "--config.train.lr=1e-6"]) == 0
  assert main.main(["train", "--workdir", "w", "--config", experiment]) == 0
  assert [cfg.train.lr for cfg, _ in runs] == [1e-6, 1e-4]


def test_gin_bindings_are_text_and_add_up(experiment, runs):
  argv = ["train", f"--config={experiment}", "--workdir=w"]
  argv += ["--config.host.gin_bindings=MessRates.fails = 0.5"]
  argv += ["--config.host.gin_bindings=X.mix = {'a': 1, 'b': 2}"]
  assert main.main(argv) == 0
  assert runs[0][0].host.gin_bindings == (
    "MessRates.fails = 0.5",
    "X.mix = {'a': 1, 'b': 2}",
  )


def test_dry_run_prints_settings_and_gin_and_runs_nothing(
  experiment, runs, capsys
):
  argv = ["train", f"--config={experiment}", "--dry-run"]
  argv += ["--config.host.gin_bindings=Limits.wall_s = 2.5"]
  assert main.main(argv) == 0
  out = capsys.readouterr().out
  assert re.search(
    r"^config.train.steps = 8 +# batches of rollouts, .*$", out, re.M
  )
  assert re.search(r"^config.filter.mode = 'sort' .*\(sort \| inv", out, re.M)
  assert re.search(r"^config.model.dtype = .*\(float32 \| bfl", out, re.M)
  assert "Limits.wall_s = 2.5" in out
  assert runs == []


def test_saved_config_is_the_default_of_evaluate(runs, tmp_path):
  cfg = config.default_config()
  cfg.eval.n_problems = 33
  (tmp_path / "config.json").write_text(config.to_json(config.resolve(cfg)))
  argv = ["evaluate", f"--workdir={tmp_path}", "--config.eval.samples=4"]
  assert main.main(argv) == 0
  assert (runs[0][0].eval.n_problems, runs[0][0].eval.samples) == (33, 4)


def test_report_takes_no_config(runs, tmp_path, capsys):
  assert main.main(["report", f"--workdir={tmp_path}"]) == 0
  assert runs[0][0] is None
  assert "takes no --config" in fails(
    capsys, "report", f"--workdir={tmp_path}", "--config=x.py"
  )


@pytest.mark.parametrize(
  "flags, text",
  [
    (["--config.train.lrr=1"], "config.train.lrr .*did you mean train.lr"),
    (["--config.train.lr=fast"], "--config.train.lr=fast: could not convert"),
    (["--config.train.steps=1.5"], "--config.train.steps=1.5: invalid literal"),
    (["--config.train=1"], "config.train is a section"),
    (["--config.filter.n_kept=17"], "n_kept .17. cannot exceed"),
    (["--config.filter.mode=srt"], "did you mean sort"),
    (["--config.train.learning_rate=1"], "learning_rate .*mean train.lr..;"),
    (["--config.sft.learning_rate=1"], "did you mean sft.lr..;"),
    (["--config.sft.batch_size=1"], "did you mean sft.rows..;"),
    (["--config.train.batch_size=1"], "did you mean train.prompts..;"),
    (["--config.num_generations=1"], "did you mean filter.n_drawn..;"),
    (["--config.train.max_steps=1"], "did you mean train.steps..;"),
    (["--config.loss.clip_range=1"], "did you mean loss.eps_low..;"),
    (["--config.beta=1"], "did you mean loss.kl_coef..;"),
    (["--config.train.top_p=1"], "did you mean sampling.top_p..;"),
    (["--config.train.temperature=1"], "sampling.temperature or eval.temp"),
    (["--learning-rate=1"], "did you mean --config.train.lr."),
    (["--beta=1"], "did you mean --config.loss.kl_coef."),
    (["--wrkdir=x"], "no flag --wrkdir .did you mean workdir"),
    (["--dry_run=maybe"], "--dry_run=maybe"),
    (["stray"], "'stray' is not a flag"),
    ([], "train needs a directory to work in"),
  ],
)
def test_mistaken_flags(flags, text, experiment, runs, capsys):
  err = fails(capsys, "train", f"--config={experiment}", *flags)
  assert re.search(text, err), err
  assert runs == []


@pytest.mark.parametrize(
  "argv, text",
  [
    (["--workdir=x"], "the command comes before its flags"),
    (["train", "--workdir=x"], "train needs a configuration"),
    (["train", "--config"], "--config needs a file"),
    (
      ["train", "--config=experiments/quikstart.py"],
      "did you mean experiments",
    ),
    (["evaluate"], "give the --workdir of a run"),
    (["evaluate", "--workdir=/nowhere"], "cannot read /nowhere/config.json"),
    (["report", "--workdir=/nowhere"], "/nowhere does not exist"),
  ],
)
def test_mistaken_command_lines(argv, text, capsys):
  assert re.search(text, fails(capsys, *argv))


@pytest.mark.parametrize(
  "old, new, text",
  [
    ("train.steps", "train.step", 'mine.py line 7: Key "step" .*mean steps'),
    (
      "train.steps",
      "train.learning_rate",
      "line 7: Key .*did you mean train.lr",
    ),
    ('7 if variant == "tiny" else 8', '"x"', "mine.py line 7: TypeError"),
    ("  return c", "", "get_config must return .* returned a NoneType"),
    ("get_config", "config", "has no function get_config"),
    ("def ", "df ", "mine.py line 5: SyntaxError: invalid syntax"),
  ],
)
def test_mistaken_experiments_name_file_and_line(
  old, new, text, experiment, capsys
):
  with open(experiment, "w") as f:
    f.write(EXPERIMENT.replace(old, new, 1))
  err = fails(capsys, "train", f"--config={experiment}", "--workdir=w")
  assert re.search(text, err), err


def test_unknown_variant(experiment, capsys):
  err = fails(capsys, "train", f"--config={experiment}:huge", "--workdir=w")
  assert "mine.py line 9: there is no variant huge" in err


def test_a_programs_user_error_and_a_bug_are_told_apart(
  experiment, monkeypatch, capsys
):
  def stop_with(e):
    def run(cfg, workdir, **_):
      raise e

    program = types.SimpleNamespace(run=run)
    monkeypatch.setattr(main, "_program", lambda name: program)

  argv = ["train", f"--config={experiment}", "--workdir=w"]
  stop_with(errors.UserError("no such file: x; give another"))
  assert fails(capsys, *argv) == "error: no such file: x; give another\n"
  stop_with(ValueError("a bug"))
  with pytest.raises(ValueError, match="a bug"):
    main.main(argv)
  for number, remedy in (
    (errno.ENOSPC, "make room"),
    (errno.EROFS, "mend its permissions"),
    (errno.EACCES, "mend its permissions"),
  ):
    stop_with(OSError(number, os.strerror(number), "w/eval.json"))
    assert fails(capsys, *argv) == (
      f"error: cannot write under w: {os.strerror(number)}; {remedy} and run"
      " the same command again\n"
    )
  stop_with(PermissionError(errno.EACCES, "Permission denied", "/elsewhere"))
  with pytest.raises(PermissionError):
    main.main(argv)
  stop_with(KeyboardInterrupt())
  assert main.main(argv) == 130
  err = capsys.readouterr().err
  assert "interrupted" in err and "python -m roc.main train --config" in err
  # It would go back once more.
  for going_back in (["--restore_step=5"], ["--restore_step", "5"]):
    assert main.main(["train", *going_back, *argv[1:]]) == 130
    err = capsys.readouterr().err
    assert err.count("restore_step") == 1
    assert "run without --restore_step again" in err


def test_going_back_is_told_to_the_program(monkeypatch, experiment):
  asked = []
  program = types.SimpleNamespace(
    run=lambda *a, **options: asked.append(options)
  )
  monkeypatch.setattr(main, "_program", lambda name: program)
  for command in ("train", "sft"):
    argv = [command, f"--config={experiment}", "--workdir=w"]
    assert main.main(argv) == main.main([*argv, "--restore_step=5"]) == 0
  assert asked == [{}, {"restore_step": 5}] * 2
