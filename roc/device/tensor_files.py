"""Safetensors: what the files of a folder hold, and their numbers in turn.

A file is the length of its header (8 bytes), the header (JSON: name to type,
shape and place) and the numbers, without a gap
(https://github.com/huggingface/safetensors#format). All headers are read and
checked before any number is. Then a tensor is mapped, one at a time, so that
only the tensor in hand counts as memory of this process. Of a folder in an
object store one file at a time is copied to this machine.
"""

import collections
import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from roc import errors, places

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_MAX_HEADER = 100_000_000  # as the format's own library has it
_METADATA = "__metadata__"
_N_NAMED = 5  # names in a message
_FILE = re.compile(r"[^/\\\0]+\.safetensors")
_ITEM_BYTES = {
  **{"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1},
  **{"F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1},
  **{"I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4},
  **{"I64": 8, "U64": 8, "F64": 8, "C64": 8},
}
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Tensor:
  """Where a tensor is.

  Attributes:
    file: name of its file in the folder.
    kind: its type, as the format spells it.
    shape: of it.
    start: of its numbers in the file, in bytes.
  """

  file: str
  kind: str
  shape: tuple[int, ...]
  start: int


class Folder:
  """The tensors of a folder with `model.safetensors`, or several and an index.

  Attributes:
    path: of the folder.
    tensors: all of them, by name.
  """

  def __init__(self, path: places.Path):
    """Reads the headers.

    Raises:
      errors.UserError: a file is missing, cannot be read or is not whole, two
        hold the same tensor, or the index says what is not so.
    """
    self.path = path
    self.tensors: dict[str, Tensor] = {}
    with places.reaching(path, "read"):
      self._read_headers()

  def _read_headers(self) -> None:
    path = self.path
    index = self._index()
    self._check_one_set(set(index.values()) or {SINGLE_FILE})
    for file in sorted(set(index.values())) if index else [SINGLE_FILE]:
      for name, tensor in _read_header(path / file).items():
        other = self.tensors.setdefault(name, tensor)
        if other is not tensor:
          raise errors.UserError(
            f"{path}: {name} is in both {other.file} and {file}; move"
            " the file away that does not belong there"
          )
    for name, file in index.items():
      if name not in self.tensors or self.tensors[name].file != file:
        raise errors.UserError(
          f"{path / INDEX_FILE} says that {name} is in {file}, which does not"
          " hold it; fetch both again"
        )

  def _check_one_set(self, files: set[str]) -> None:
    """Raises a UserError where there are weights beside those of the model."""
    others = sorted(
      path.name
      for path in self.path.glob("model*.safetensors")
      if path.name not in files
    )
    if others:
      listed = ", ".join(others[:_N_NAMED])
      more = f" and {len(others) - _N_NAMED} more" * (len(others) > _N_NAMED)
      raise errors.UserError(
        f"{self.path} holds two sets of weights: {listed}{more} beside those of"
        f" {INDEX_FILE if (self.path / INDEX_FILE).exists() else SINGLE_FILE};"
        " move one set away"
      )

  def _index(self) -> dict[str, str]:
    """The file of every tensor, or nothing where there is a single file."""
    path = self.path / INDEX_FILE
    try:
      index = json.loads(path.read_bytes())["weight_map"]
      files = set(index.values())
      # No path, which would lead out of the folder.
      if not files or not all(_FILE.fullmatch(x) for x in files):
        raise ValueError("no names of files")
      return index
    except FileNotFoundError:
      if not (self.path / SINGLE_FILE).exists():
        raise errors.UserError(
          f"{self.path} holds neither {SINGLE_FILE} nor {INDEX_FILE}"
        ) from None
      return {}
    except OSError as e:
      if places.is_remote(path):
        raise
      raise errors.UserError(f"{path} cannot be read: {e.strerror}") from e
    except (ValueError, KeyError, AttributeError, TypeError) as e:
      raise errors.UserError(f"{path} is no index of safetensors") from e

  def read(self, names: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Tensors in the order in which they lie, each mapped when its turn comes.

    Args:
      names: of the tensors, each of a type in `DTYPES`.

    Yields:
      Name and numbers; let go of them before asking for the next.
    """
    of_file = collections.defaultdict(list)
    for name in names:
      of_file[self.tensors[name].file].append(name)
    for file in sorted(of_file):
      with places.local(self.path / file) as path:
        for name in sorted(of_file[file], key=lambda x: self.tensors[x].start):
          yield name, _map(path, self.tensors[name])


def _map(path: pathlib.Path, tensor: Tensor) -> np.ndarray:
  mapped = np.memmap(
    path,
    DTYPES[tensor.kind],
    mode="r",
    offset=tensor.start,
    shape=tensor.shape,
  )
  return np.require(np.asarray(mapped), requirements="A")


def _read_header(path: places.Path) -> dict[str, Tensor]:
  try:
    with path.open("rb") as f:
      n_file = f.seek(0, 2)
      f.seek(0)
      n_header = int.from_bytes(f.read(8), "little")
      if n_file < 8 or n_header > min(_MAX_HEADER, n_file - 8):
        raise ValueError("its header is cut off")
      header = json.loads(f.read(n_header), object_pairs_hook=_unique)
    return _parse(path.name, header, 8 + n_header, n_file)
  except FileNotFoundError as e:
    raise errors.UserError(f"{path} is missing") from e
  except OSError as e:
    if places.is_remote(path):
      raise
    raise errors.UserError(f"{path} cannot be read: {e.strerror}") from e
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
    why = e if type(e) is ValueError else "its header cannot be read"
    raise errors.UserError(
      f"{path} is no whole safetensors file ({why}); fetch it again"
    ) from e


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  found = dict(pairs)
  if len(found) < len(pairs):
    raise ValueError("its header names a tensor twice")
  return found


def _parse(
  file: str, header: dict[str, Any], first: int, n_file: int
) -> dict[str, Tensor]:
  """The tensors of a file, which must fill it without gap or overlap."""
  tensors, places = {}, []
  for name, entry in header.items():
    if name == _METADATA:
      continue
    kind, shape = entry["dtype"], tuple(entry["shape"])
    start, end = entry["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, start, end)):
      raise ValueError(f"{name} has no place")
    if kind not in _ITEM_BYTES:
      raise ValueError(f"{name} is of an unknown type")
    if end - start != math.prod(shape) * _ITEM_BYTES[kind]:
      raise ValueError(f"{name} does not fit its place")
    tensors[name] = Tensor(file, kind, shape, first + start)
    places.append((start, end))
  last = 0
  for start, end in sorted(places):
    if start != last:
      raise ValueError("its tensors overlap or leave gaps")
    last = end
  if first + last != n_file:
    raise ValueError(f"it has {n_file} bytes and should have {first + last}")
  return tensors
