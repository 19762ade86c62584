"""Names of places, here and elsewhere."""

import pathlib

import pytest

from roc import errors, places


def test_names_of_object_stores_are_kept():
  path = places.as_path("gs://bucket/run/checkpoints")
  assert str(path / "step_1") == "gs://bucket/run/checkpoints/step_1"
  assert places.is_remote(path) and places.is_url(path)


@pytest.mark.parametrize("name", ["a", "file:///a", pathlib.Path("/a")])
def test_other_names_are_local(name):
  path = places.as_path(name)
  assert path.name == "a" and isinstance(path, pathlib.Path)
  assert not places.is_remote(path) and not places.is_url(path)


def test_other_stores_are_refused():
  with pytest.raises(errors.UserError, match="ftp://x is in no store"):
    places.as_path("ftp://x")
