"""Paths on this machine, and in object stores such as `gs://bucket/run`."""

import os
import pathlib

from etils import epath

from roc import errors

# A local path, or one of etils' for what is not local.
Path = pathlib.Path | epath.Path
SCHEMES = ("gs://", "s3://")
_LOCAL = "file://"


def is_url(name: str | os.PathLike[str]) -> bool:
  """Whether a name is of an object store."""
  return os.fspath(name).startswith(SCHEMES)


def as_path(name: str | os.PathLike[str]) -> Path:
  """An absolute path, or one of an object store.

  Raises:
    errors.UserError: it is of another kind of store.
  """
  text = os.fspath(name)
  if is_url(text):
    return epath.Path(text)
  text = text.removeprefix(_LOCAL)
  if "://" in text:
    raise errors.UserError(
      f"{text} is in no store that is known; give a local path or one of"
      f" {', '.join(SCHEMES)}"
    )
  return pathlib.Path(text).absolute()


def is_remote(path: Path) -> bool:
  """Whether it is in an object store, where nothing can be renamed."""
  return not isinstance(path, pathlib.Path)
