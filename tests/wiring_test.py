"""The host side from gin: what it builds, and one sentence per mistake."""

import pathlib

import pytest

from roc import config, errors, wiring
from roc.host import sandbox, tools
from roc.host.tasks import arithmetic

ARITHMETIC = "experiments/host/arithmetic.gin"


def build(*bindings, files=(), seed=0):
  return wiring.build_host(files, bindings, seed=seed)


def test_defaults_build_the_quickstart():
  host = build()
  assert isinstance(host.train_task, arithmetic.ArithmeticTask)
  train = host.train_task.problem(0)
  heldout = host.eval_task.problem(0)
  assert train.id.startswith("train-0-") and heldout.id.startswith("heldout-0-")
  assert host.chat.prompt_ids(train.question)
  assert host.limits == sandbox.Limits()
  score = host.make_score(host.make_sandbox())
  assert score([train.answer], train.answer).is_correct


def test_the_experiment_file_binds_what_it_says():
  host = build(files=[ARITHMETIC])
  assert host.limits.wall_s == 4.0 and host.limits.memory_mb == 256
  assert host.rates.fails == 0.45
  assert type(host.limits) is sandbox.Limits
  # The checkout is searched too, whatever directory the run starts in.
  assert "Limits.memory_mb = 256" in host.gin_text


def test_files_are_found_from_another_directory(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert build(files=[ARITHMETIC]).limits.memory_mb == 256


def test_bindings_win_over_files_and_macros_reach():
  host = build("wall_s = 2.5", "Limits.memory_mb = 99", files=[ARITHMETIC])
  assert (host.limits.wall_s, host.limits.memory_mb) == (2.5, 99)


def test_bindings_reach_parts_that_no_file_names():
  host = build("Limits.wall_s = 3.0", "MessRates.fails = 0.25")
  assert host.limits.wall_s == 3.0 and host.rates.fails == 0.25


def test_each_build_starts_from_nothing():
  build("Limits.wall_s = 3.0")
  host = build()
  assert host.limits == sandbox.Limits()
  assert "wall_s" not in host.gin_text


def test_an_earlier_build_keeps_its_bindings():
  first = build("Toolbox.tool_name = 'calculator'")
  plain = build()
  build("Toolbox.tool_name = 'other'")
  unstarted = plain.make_sandbox()
  assert first.make_toolbox(unstarted).tool_name == "calculator"
  assert plain.make_toolbox(unstarted).tool_name == "python"
  assert isinstance(plain.make_toolbox(unstarted), tools.Toolbox)


def test_the_scorer_is_chosen_in_gin():
  host = build("host.score = @math_score", "math_score.cpu_s = 7.5")
  build("host.score = @math_score", "math_score.cpu_s = 1.5")
  assert host.make_score.func.__name__ == "math_score"
  assert host.make_score.keywords == {
    "cpu_s": 7.5,
    "wall_s": 30.0,
    "memory_mb": 1024,
  }
  # It is tried before it is used.
  with pytest.raises(sandbox.SandboxError, match="cannot be checked"):
    host.make_score(host.make_sandbox())


def test_gin_text_builds_the_same_host_again(tmp_path):
  host = build("mess = 0.125", files=[ARITHMETIC])
  (tmp_path / "config.gin").write_text(host.gin_text)
  again = build(files=[str(tmp_path / "config.gin")])
  assert again.gin_text == host.gin_text
  assert (again.rates, again.limits) == (host.rates, host.limits)
  assert again.rates.fails == 0.125


def test_the_runs_seed_orders_training_and_not_evaluation():
  a, b = build(seed=1), build(seed=2)
  assert a.train_task.problem(0) != b.train_task.problem(0)
  assert a.eval_task.problem(0) == b.eval_task.problem(0)


@pytest.mark.parametrize(
  "binding, text",
  [
    ("Limits.wal_s = 2", r"parameter named 'wal_s' \(did you mean wall_s\?\)"),
    ("Limit.wall_s = 2", r"matching 'Limit' \(did you mean Limits\?\)"),
    ("host.limits = @Limit()", r"'@Limit\(\)' \(did you mean Limits\?\)"),
    ("Limits.wall_s = 'x'", "Limits.wall_s must be float, got 'x'"),
    ("Limits.n_files = True", "Limits.n_files must be int, got True"),
    ("Limits.wall_s = -1", "gin: Limits: .*wall_s must be positive"),
    ("Limits.wall_s = %unset", "macro %unset is used and never set"),
    ("Toolbox.renderer = 'x'", "gin: Toolbox: tool renderer 'x' is unknown"),
    ("Sandbox.n_workers = 0", "n_workers must be at least 1"),
    ("math_score.cpu_s = 'x'", "math_score.cpu_s must be float, got 'x'"),
    ("host.score = @maths_score", r"did you mean math_score\?"),
    ("ArithmeticTask.seed = 3", "denylisted kwarg 'seed'"),
    ("host.train_task = @FileTask", "missing 1 required .* 'path'"),
    ("mees = 0.9", r"binding mees: nothing uses the macro %mees$"),
    (
      "evl/ArithmeticTask.split = 'train'",
      "evl/ArithmeticTask.split: nothing in this run takes it; it builds",
    ),
    ("TemplateChat.template = 'x'", "it; it builds .*ChatFormat"),
    (
      "math_score.cpu_s = 3.0",
      "math_score.cpu_s: nothing in this run takes it",
    ),
    ("Sandbox.wall_s = nan", r"`: the value is no literal .* in quotes$"),
    ("w = 'x'\nLimits.wall_s = %w", "Limits.wall_s must be float, got 'x'"),
    ("half a statement", "`half a statement`: Couldn't parse"),
    ("import no_such_module", "No module named 'no_such_module'"),
  ],
)
def test_mistakes_are_one_sentence(binding, text):
  with pytest.raises(errors.UserError, match=text) as e:
    build(binding)
  assert "\n" not in str(e.value)


def test_a_binding_that_nothing_takes_names_the_nearest():
  with pytest.raises(errors.UserError, match=r"%mees \(did you mean mess\?\)"):
    build("mees = 0.9", files=[ARITHMETIC])
  with pytest.raises(errors.UserError, match=r"did you mean eval\?"):
    build("evl/ArithmeticTask.split = 'heldout'", files=[ARITHMETIC])


def test_bindings_that_are_taken_late_or_through_others():
  taken = (
    ("Toolbox.tool_name = %name", "name = 'c'"),
    ("host.score = @math_score", "math_score.cpu_s = %cpu", "cpu = 3.0"),
    ("host.score = @strict/math_score", "strict/math_score.cpu_s = 3.0"),
  )
  for bindings in taken:
    assert all(b.split(" =")[0] in build(*bindings).gin_text for b in bindings)
  # The file scopes both of its tasks; a plain binding is behind theirs.
  late = build("ArithmeticTask.split = 'heldout'", files=[ARITHMETIC])
  assert "ArithmeticTask.split = 'heldout'" in late.gin_text


def test_a_part_put_in_place_of_a_files_own_leaves_the_files_bindings_over(
  tmp_path,
):
  path = tmp_path / "mine.gin"
  path.write_text("host.score = @math_score\nmath_score.cpu_s = 3.0\n")
  build(files=[str(path)])
  build("host.score = @exact_score", files=[str(path)])
  path.write_text("math_score.cpu_s = 3.0\n")
  with pytest.raises(errors.UserError, match="math_score.cpu_s"):
    build(files=[str(path)])


def test_a_subclass_has_bindings_of_its_own(tmp_path, monkeypatch):
  (tmp_path / "my_own_task.py").write_text(
    "import gin\nfrom roc.host.tasks import arithmetic\n"
    "@gin.register\nclass OwnTask(arithmetic.ArithmeticTask):\n  pass\n"
  )
  monkeypatch.syspath_prepend(tmp_path)
  own = ("import my_own_task", "host.train_task = @OwnTask")
  assert build(*own, "OwnTask.split = 'heldout'").train_task.split == "heldout"
  with pytest.raises(errors.UserError, match="bind OwnTask, the subclass"):
    build(*own, "host.eval_task = @OwnTask", "ArithmeticTask.split = 'heldout'")


def test_a_missing_task_file_is_named(tmp_path):
  path = str(tmp_path / "rows.jsonl")
  with pytest.raises(errors.UserError, match="rows.jsonl"):
    build("host.train_task = @FileTask", f"FileTask.path = {path!r}")


def test_a_directory_of_tasks_is_told_from_a_missing_file(tmp_path):
  with pytest.raises(errors.UserError, match=r"is a directory; .*\*\.jsonl"):
    build("host.train_task = @FileTask", f"FileTask.path = '{tmp_path}'")


@pytest.mark.parametrize(
  "line, text",
  [
    (b'{"question": "1+2?"', "not JSON"),
    (b'{"question": "\xff", "answer": "3"}', "UTF-8"),
    (b"[1]", "object"),
  ],
)
def test_a_bad_line_of_a_task_file_is_one_sentence(tmp_path, line, text):
  path = tmp_path / "rows.jsonl"
  path.write_bytes(b'{"question": "1+1?", "answer": "2"}\n' + line + b"\n")
  with pytest.raises(
    errors.UserError, match=f"rows.jsonl line 2: .*{text}"
  ) as e:
    build("host.train_task = @FileTask", f"FileTask.path = '{path}'")
  assert "\n" not in str(e.value)


def test_gin_does_not_log_what_it_raises(caplog):
  with pytest.raises(errors.UserError, match=r"Unable to open file: no\.gin"):
    build('include "no.gin"')
  assert not caplog.records


def test_mistakes_in_files_name_the_line(tmp_path):
  path = tmp_path / "mine.gin"
  path.write_text("host.limits = @Limits()\n\nLimits.wal_s = 2\n")
  with pytest.raises(errors.UserError, match="mine.gin line 3: .*wall_s"):
    build(files=[str(path)])
  path.write_text("\nhost.limits =\n")
  with pytest.raises(errors.UserError, match="mine.gin line 2: "):
    build(files=[str(path)])


def test_missing_gin_file_suggests_the_nearest():
  with pytest.raises(errors.UserError, match=r"did you mean arithmetic\.gin\?"):
    build(files=["experiments/host/arithmetik.gin"])


def test_no_quantity_has_two_homes():
  leaves = {key.rpartition(".")[2] for key in config.flatten(config.Config())}
  bound = {key for parameters in wiring.parts().values() for key in parameters}
  assert len(leaves) > 60 and len(bound) > 20
  assert not leaves & bound


def test_only_wiring_imports_gin():
  imports = [
    path.name
    for path in pathlib.Path("roc").rglob("*.py")
    if "import gin" in path.read_text().split("\n\n\n")[0]
  ]
  assert imports == ["wiring.py"]
