"""Paths on this machine, and in object stores such as `gs://bucket/run`.

etils opens what is in a store, through fsspec and the package of that store
(gcsfs, s3fs). Orbax and tensorstore read and write beside it, so that listings
must not be remembered.
"""

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Generator

import fsspec.config
import fsspec.core
from etils import epath

from roc import errors

# A local path, or one of etils' for what is not local.
Path = pathlib.Path | epath.Path
_PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}
_LOCAL = "file://"
_BLOCK = 16 << 20  # bytes
# Mistakes of ours: these are shown as they are.
_BUGS = (TypeError, AttributeError, NameError, LookupError, AssertionError)


def is_url(name: str | os.PathLike[str]) -> bool:
  """Whether a name is of an object store."""
  return _scheme(os.fspath(name)) in _PACKAGES


def _scheme(name: str) -> str:
  scheme, is_there, _ = name.partition("://")
  return scheme if is_there else ""


def as_path(name: str | os.PathLike[str]) -> Path:
  """A path here or in an object store.

  Raises:
    errors.UserError: it is of another kind of store.
  """
  text = os.fspath(name).removeprefix(_LOCAL)
  scheme = _scheme(text)
  if not scheme:
    return pathlib.Path(text)
  if scheme not in _PACKAGES:
    stores = ", ".join(f"{x}://" for x in _PACKAGES)
    raise errors.UserError(
      f"{text} is in no store that is known; give a local path or one of"
      f" {stores}"
    )
  settings = fsspec.config.conf.setdefault(scheme, {})
  settings.setdefault("use_listings_cache", False)
  return epath.Path(text)


def absolute(path: Path) -> Path:
  """The path that does not depend on where this process is."""
  return path.absolute() if isinstance(path, pathlib.Path) else path


def is_remote(path: Path) -> bool:
  """Whether it is in an object store, where nothing can be renamed."""
  return not isinstance(path, pathlib.Path)


@contextlib.contextmanager
def reaching(path: Path, what: str) -> Generator[None, None, None]:
  """What fails in an object store in this block becomes one sentence.

  The libraries in between have dozens of kinds of errors. Those of a local path
  pass, and so do mistakes of ours.

  Args:
    path: that is read or written.
    what: "read" or "written".

  Raises:
    errors.UserError: the store cannot be reached, or refuses.
  """
  try:
    yield
  except (errors.UserError, *_BUGS):
    raise
  except Exception as e:
    if not is_remote(path):
      raise
    first = (str(e).strip().splitlines() or [type(e).__name__])[0]
    package = _PACKAGES[_scheme(str(path))]
    remedy = (
      f"install the package {package}"
      if isinstance(e, ImportError)
      else "check the name, the credentials and the connection"
    )
    raise errors.UserError(
      f"{path} cannot be {what} ({first}); {remedy}"
    ) from e


@contextlib.contextmanager
def local(path: Path) -> Generator[pathlib.Path, None, None]:
  """A file on this machine: itself, or a copy until the block ends.

  Raises:
    errors.UserError: it cannot be copied from where it is.
  """
  if isinstance(path, pathlib.Path):
    yield path
    return
  with tempfile.TemporaryDirectory(prefix="roc_") as scratch:
    copy = pathlib.Path(scratch) / path.name
    with reaching(path, "read"):
      copy_file(path, copy)
    yield copy


@contextlib.contextmanager
def made_here(path: Path) -> Generator[pathlib.Path, None, None]:
  """Where to write a file that is to be at `path` when the block ends."""
  if isinstance(path, pathlib.Path):
    yield path
    return
  with tempfile.TemporaryDirectory(prefix="roc_") as scratch:
    made = pathlib.Path(scratch) / path.name
    yield made
    copy_file(made, path)


def remove(directory: Path) -> None:
  """Deletes a directory and what is in it, if it is there."""
  if isinstance(directory, pathlib.Path):
    shutil.rmtree(directory, ignore_errors=True)
  elif directory.exists():
    directory.rmtree()


def copy_file(source: Path, target: Path) -> None:
  """Copies the bytes of a file, some at a time."""
  with source.open("rb") as read, target.open("wb") as write:
    shutil.copyfileobj(read, write, _BLOCK)


def sizes(directory: Path) -> dict[str, int]:
  """Bytes of every file below a directory, by its name relative to it.

  In an object store that is one request, however many files there are.
  """
  if isinstance(directory, pathlib.Path):
    return {
      path.relative_to(directory).as_posix(): path.stat().st_size
      for path in directory.rglob("*")
      if path.is_file()
    }
  system, root = fsspec.core.url_to_fs(str(directory))
  system.invalidate_cache()
  return {
    name.removeprefix(root).lstrip("/"): found["size"]
    for name, found in system.find(root, detail=True).items()
  }
