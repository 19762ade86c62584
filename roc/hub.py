"""Folders of published models: from here, an object store, or Hugging Face.

What comes from the hub is kept in its cache ($HF_HOME) and fetched once; a
download that broke off goes on where it was. $HF_TOKEN, $HF_ENDPOINT and
$HF_HUB_OFFLINE mean what they mean to every tool of the hub.
"""

import atexit
import fnmatch
import functools
import pathlib
import re
import shutil
import tempfile

from roc import errors, places
from roc.host.pretrained import TEMPLATE_FOLDER

_CHECKOUT = pathlib.Path(__file__).resolve().parent.parent
_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?")
# What a run needs of a repository: its words and, apart from them, its weights.
_SIDE_FILES = (
  *("*.json", "*.jinja", "*.tiktoken", "*.txt"),
  *("LICENSE*", "NOTICE*", "README.md"),
)
_WEIGHTS = ("*.safetensors",)


def fetch(source: str, *, weights: bool = True) -> pathlib.Path:
  """The folder of a model, downloaded if it has to be.

  Args:
    source: a folder, from here or from the checkout; or `ORG/NAME`,
      `ORG/NAME@REVISION`, with or without `hf://` before it; or one in an
      object store, `gs://BUCKET/PATH`, whose weights stay there.
    weights: whether its safetensors are needed too.

  Returns:
    A folder that holds what the model has of config, tokenizer, templates and
    if wanted weights.

  Raises:
    errors.UserError: it is nowhere, or cannot be had; says why.
  """
  if places.is_url(source):
    return _side_files(source)
  is_remote = source.startswith("hf://")
  name = source.removeprefix("hf://").removeprefix("models/")
  if (path := folder_here(source)) is not None:
    return path
  if source and pathlib.Path(source).exists():
    raise errors.UserError(f"{source} is a file; name the folder it is in")
  if not _REPOSITORY.fullmatch(name) or (not is_remote and _is_local(name)):
    raise errors.UserError(
      f"{source} does not exist; name a folder that does, or a repository of"
      " the Hugging Face hub as ORG/NAME or ORG/NAME@REVISION"
    )
  repository, _, revision = name.partition("@")
  patterns = [*_SIDE_FILES, *(_WEIGHTS if weights else ())]
  return _download(repository, revision or None, patterns)


def folder_here(source: str) -> pathlib.Path | None:
  """The folder that `source` names, from here or from the checkout, if any."""
  paths = (pathlib.Path(source), _CHECKOUT / source) if source else ()
  return next((path for path in paths if path.is_dir()), None)


def weights(source: str) -> places.Path:
  """The folder that holds the weights of a model, perhaps in an object store.

  Args:
    source: as in `fetch`.

  Raises:
    errors.UserError: it is nowhere, or cannot be had; says why.
  """
  return places.as_path(source) if places.is_url(source) else fetch(source)


@functools.cache
def _side_files(source: str) -> pathlib.Path:
  """A copy of all but the weights, until this process ends."""
  path = places.as_path(source)
  with places.reaching(path, "read"):
    if not path.is_dir():
      raise errors.UserError(f"{source} does not exist; check its name")
    folder = pathlib.Path(tempfile.mkdtemp(prefix="roc_model_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for file in path.iterdir():
      if any(fnmatch.fnmatch(file.name, x) for x in _SIDE_FILES):
        places.copy_file(file, folder / file.name)
    for file in (path / TEMPLATE_FOLDER).glob("*.jinja"):
      (folder / TEMPLATE_FOLDER).mkdir(exist_ok=True)
      places.copy_file(file, folder / TEMPLATE_FOLDER / file.name)
  return folder


def _is_local(name: str) -> bool:
  """Whether what looks like a repository is a path that was misspelt."""
  first = pathlib.PurePath(name).parts[0]
  return any((root / first).is_dir() for root in (pathlib.Path(), _CHECKOUT))


def _download(
  repository: str, revision: str | None, patterns: list[str]
) -> pathlib.Path:
  import huggingface_hub  # takes a second, and only names of the hub need it
  from huggingface_hub import errors as hub_errors

  shown = f"{repository}@{revision}" if revision else repository
  try:
    found = huggingface_hub.snapshot_download(
      repository, revision=revision, allow_patterns=patterns
    )
  except hub_errors.GatedRepoError as e:
    raise errors.UserError(
      f"{shown} is gated: accept its licence on the hub, and set HF_TOKEN to a"
      " token of that account"
    ) from e
  except hub_errors.RevisionNotFoundError as e:
    raise errors.UserError(
      f"{repository} has no revision {revision}; name a branch, a tag or a"
      " commit"
    ) from e
  except hub_errors.RepositoryNotFoundError as e:
    raise errors.UserError(
      f"the hub has no model {repository}, or it is private; check the name, or"
      " set HF_TOKEN"
    ) from e
  except (hub_errors.LocalEntryNotFoundError, hub_errors.OfflineModeIsEnabled):
    raise errors.UserError(
      f"{shown} is not in the hub's cache and the hub cannot be reached;"
      " connect (HF_HUB_OFFLINE must be unset), or name a folder"
    ) from None
  except Exception as e:  # the transport's own kinds, a full disk
    if getattr(getattr(e, "response", None), "status_code", 0) in (401, 403):
      raise errors.UserError(
        f"the hub does not give {shown} to this token, or to none; check"
        " HF_TOKEN"
      ) from e
    first = (str(e).strip().splitlines() or [type(e).__name__])[0]
    raise errors.UserError(
      f"{shown} cannot be downloaded ({first}); run the same command again to"
      " go on from what is there"
    ) from e
  return pathlib.Path(found)
