"""What a run shows, on a terminal and elsewhere."""

import io

import pytest
import rich.console

from roc import progress


def shown(is_terminal, **kwargs):
  file = io.StringIO()
  console = rich.console.Console(
    file=file, force_terminal=is_terminal, width=200, highlight=False
  )
  with progress.Progress("train", 3, console=console, **kwargs) as bar:
    for step in (1, 2, 3):
      bar.phase("update")
      bar.update(
        step,
        {
          "reward": 0.25 * step,
          "tools/failure_frequency": 0.125,
          "tokens_sampled": 1000 * step,
        },
      )
    bar.note("see [report]")
  return file.getvalue()


def test_plain_lines_when_not_a_terminal():
  lines = shown(False, every_s=0.0).splitlines()
  assert len(lines) == 4
  # One step, which compiled, is no pace to foretell the rest by.
  assert lines[0] == "train  1/3  reward 0.250  fail 0.125"
  assert lines[1].endswith(" left") and "tok/s" in lines[1]
  assert lines[2].startswith("train  3/3  reward 0.750")
  assert lines[3] == "see [report]"


def test_first_and_last_lines_whatever_the_interval():
  lines = shown(False, every_s=1e9).splitlines()
  assert [line.split()[1] for line in lines[:2]] == ["1/3", "3/3"]


def test_bar_on_a_terminal():
  text = shown(True)
  assert "3/3" in text and "reward 0.750" in text and "see [report]" in text


def test_nothing_when_not_wanted():
  assert shown(False, is_shown=False) == ""
  assert shown(True, is_shown=False) == ""


@pytest.mark.parametrize(
  "seconds, text", [(0, "0:00"), (59.6, "1:00"), (3725, "1:02:05")]
)
def test_clock(seconds, text):
  assert progress._clock(seconds) == text
