"""What a trace says of the filter's choice, by hand."""

import numpy as np
import pytest

from roc import layout
from roc.host import episode, traces

CORRECT, WRONG, VOID = (
  layout.Outcome.CORRECT,
  layout.Outcome.WRONG,
  layout.Outcome.VOID,
)
# Outcome, p_err, chosen, in the loss.
GROUP = (
  (CORRECT, 0.0, True, True),
  (CORRECT, 0.25, True, True),
  (CORRECT, 0.25, False, False),  # loses to the one before by its id alone
  (CORRECT, 0.5, False, False),
  (WRONG, 1.0, True, False),  # a row filter
  (WRONG, 0.0, False, False),
  (VOID, 0.0, False, False),
)


def reasons(mode, group=GROUP):
  episodes = [
    episode.Episode(rollout_id=o, outcome=row[0]) for o, row in enumerate(group)
  ]
  columns = [np.array([x]) for x in zip(*group, strict=True)]
  traces.annotate(
    [episodes],
    mode=mode,
    keep_NO=columns[2],
    is_live_NO=columns[3],
    advantage_NO=np.zeros((1, len(group))),
    p_err_NO=columns[1].astype(np.float32),
    p_format_NO=np.zeros((1, len(group)), np.float32),
  )
  return [e.why for e in episodes]


def test_sort_says_whether_others_were_cleaner_or_only_came_first():
  assert reasons("sort") == [
    "kept: correct, p 0.00",
    "kept: correct, p 0.25",
    "dropped: correct, p 0.25, enough others as clean have smaller ids",
    "dropped: correct, p 0.50, enough correct ones are cleaner",
    "dropped: wrong, but a row filter left it out",
    "dropped: wrong, enough wrong ones have smaller ids",
    "outside: the environment failed",
  ]


@pytest.mark.parametrize(
  "mode", ["inverse", "stratified", "balanced", "uniform"]
)
def test_what_a_random_mode_does_not_keep_was_not_drawn(mode):
  said = reasons(mode)
  assert said[2:4] == [
    "dropped: correct, p 0.25, not drawn",
    "dropped: correct, p 0.50, not drawn",
  ]
  assert said[5] == "dropped: wrong, not drawn"


def test_a_group_that_keeps_nothing_of_a_sign_or_nothing_at_all():
  no_correct = [(CORRECT, 0.0, False, False), (WRONG, 0.0, True, True)]
  assert reasons("sort", no_correct)[0] == (
    "dropped: correct, p 0.00, the group keeps no correct one"
  )
  nothing = [(CORRECT, 0.0, False, False), (VOID, 0.0, False, False)]
  assert reasons("sort", nothing)[0] == (
    "dropped: too few rollouts of the group are left"
  )
