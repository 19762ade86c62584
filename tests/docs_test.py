"""The documents name only what exists, and all that a run writes."""

import pathlib
import re

import jax.numpy as jnp
import pytest

from roc import layout, main
from roc.core import losses, trajectories
from roc.device import selection
from roc.device import step as step_lib

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def _name(path):
  return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_lead_somewhere(page):
  targets = re.findall(r"\]\(([^)#\s]+)", page.read_text())
  local = [t for t in targets if "://" not in t]
  missing = [t for t in local if not (page.parent / t).exists()]
  assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_commands_exist(page):
  text = page.read_text()
  commands = set(re.findall(r"python -m roc\.main (\w+)", text))
  assert commands <= set(main.COMMANDS)
  makefile = (ROOT / "Makefile").read_text()
  targets = set(re.findall(r"^([a-z-]+):.*##", makefile, re.MULTILINE))
  assert (
    set(re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE)) <= targets
  )


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_files_in_backquotes_exist(page):
  pattern = r"`((?:roc|experiments|benchmarks|colab|docs|tests)/[\w./]+\.\w+)`"
  named = re.findall(pattern, page.read_text())
  assert [name for name in named if not (ROOT / name).exists()] == []


def test_file_structure_of_the_readme_is_that_of_the_repository():
  text = (ROOT / "README.md").read_text()
  listing = text.split("## File structure")[1].split("```")[1]
  for line in listing.strip().splitlines():
    assert (ROOT / line.split()[0]).exists(), line
  named = set(re.findall(r"\b(\w+\.py)\b", listing))
  modules = {path.name for path in (ROOT / "roc").glob("*.py")}
  assert modules - named - {"__init__.py", "errors.py"} == set()


def test_every_metric_of_a_step_is_documented():
  sizes = {"N": 2, "O": 4, "T": 8, "C": 2}
  fields = {
    name: jnp.zeros([sizes[axis] for axis in field.axes], field.dtype)
    for name, field in layout.TRAJECTORY_FIELDS.items()
  }
  traj = trajectories.Trajectories(**fields)
  keep_NO = jnp.ones((2, 4), bool)
  names = set(selection.rollout_metrics(traj))
  names |= set(selection.filter_metrics(traj, keep_NO, keep_NO))
  one_BT = jnp.ones((1, 1))
  names |= set(
    losses.clipped_surrogate(
      one_BT, one_BT, jnp.ones(1), one_BT > 0, dual_clip=3.0
    )[1]
  )
  names |= set(step_lib.correction_stats(one_BT, one_BT > 0))
  documented = set(
    re.findall(r"`([\w/@]+)`", (ROOT / "docs" / "metrics.md").read_text())
  )
  assert names - documented == set()


def test_bounds_on_the_page_are_those_of_the_losses():
  page = (ROOT / "docs" / "how-it-works.md").read_text()
  rows = re.findall(r"^\| `(\w+)` \| ([\d.]*) ?\| ([\d.]+) \|", page, re.M)
  written = {
    name: (float(low) if low else None, float(high)) for name, low, high in rows
  }
  stated = {}
  for kind in step_lib.SURROGATES:
    c = step_lib.with_own_bounds(step_lib.LossConfig(kind=kind))
    stated[kind] = (c.eps_low, c.eps_high)
  for name in step_lib.CORRECTIONS:
    c = step_lib.with_own_bounds(step_lib.LossConfig(correction=name))
    stated[name] = (c.correction_low, c.correction_high)
  assert written == stated
