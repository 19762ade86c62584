from roc import gallery
from tests import runs


def test_first_and_last_step_are_shown(tmp_path):
  for step in (3, 20, 100):
    runs.write_traces(tmp_path, step, [runs.trace(0)])
  (tmp_path / "rollouts" / "step_bad.jsonl").write_text("x")
  headings = [e.heading for e in gallery.exhibits(tmp_path / "rollouts")]
  assert headings == [
    "Step 3, the first on record",
    "Step 100, the last on record",
  ]


def test_nothing_to_show(tmp_path):
  assert gallery.exhibits(tmp_path / "rollouts") == []
  runs.write_traces(tmp_path, 1, [])
  assert gallery.exhibits(tmp_path / "rollouts") == []


def test_the_most_telling_problem_is_chosen(tmp_path):
  dull = [runs.trace(i, place=1) for i in range(4)]
  telling = [
    runs.trace(0, place=2, kept=True, p_total=0.0),
    runs.trace(1, place=2, kept=False, p_total=0.5),
    runs.trace(2, place=2, outcome="wrong", kept=True),
    runs.trace(3, place=2, outcome="wrong", kept=False),
  ]
  runs.write_traces(tmp_path, 1, dull + telling)
  (exhibit,) = gallery.exhibits(tmp_path / "rollouts")
  assert exhibit.summary == "4 rollouts drawn, 2 correct; 2 kept."
  fates = [(view.outcome, view.fate) for view in exhibit.views]
  assert fates == [
    ("correct", "kept"),
    ("correct", "dropped"),
    ("wrong", "kept"),
    ("wrong", "dropped"),
  ]
  assert exhibit.open_at == {0, 1, 2}


def test_tool_texts_carry_the_status_of_their_call(tmp_path):
  runs.write_traces(tmp_path, 1, [runs.trace(0)])
  (exhibit,) = gallery.exhibits(tmp_path / "rollouts")
  (view,) = exhibit.views
  chips = [s.chip for s in view.segments if s.role == "tool"]
  assert chips == [gallery.Chip("error", "bad"), gallery.Chip("ok", "good")]
  assert view.why == "clean"
  assert view.facts == (
    "p 0.5 · p_err 0.5 · p_format 0 · reward 1 · advantage 0.5 · turns 3"
    " · answer 6 · answered"
  )


def test_statuses_are_not_guessed_when_an_answer_left_no_text(tmp_path):
  records = runs.trace(0)["tool_records"]
  line = runs.trace(0, tool_records=records[:1])
  runs.write_traces(tmp_path, 1, [line])
  (exhibit,) = gallery.exhibits(tmp_path / "rollouts")
  (view,) = exhibit.views
  assert {s.chip for s in view.segments} == {None}
  assert [c.status for c in view.calls] == ["error"]


def test_a_run_that_is_still_writing_is_read(tmp_path):
  runs.write_traces(tmp_path, 1, [runs.trace(0, kept=None, p_total=None)])
  with (tmp_path / "rollouts" / "step_000001.jsonl").open("a") as f:
    f.write('{"place": 7, "rollo')
  (exhibit,) = gallery.exhibits(tmp_path / "rollouts")
  (view,) = exhibit.views
  assert view.fate == "not filtered"
  assert view.is_kept
