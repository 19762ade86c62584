"""A list of a directory's files with their checksums, written last.

What has no manifest was never finished; what does not match it was damaged
afterwards. Sizes and CRC-32 find cut files and flipped bits, which is what
killed processes and bad disks do; they are no defence against forgery. In an
object store, which keeps checksums of its own, sizes are all that is recorded.
"""

import json
import os
import zlib
from typing import Any

from roc import places

NAME = "manifest.json"


class Broken(Exception):
  """The directory does not hold what its manifest says; the text says how."""


def write(directory: places.Path, body: dict[str, Any]) -> None:
  """Records every file under `directory` and forces all of it to the disk.

  Args:
    directory: complete but for the manifest.
    body: JSON-able, returned by `verify`; `files` is added to it.
  """
  is_remote = places.is_remote(directory)
  files = {
    name: [size, None]
    if is_remote
    else _checksum(directory / name, sync_too=True)
    for name, size in sorted(places.sizes(directory).items())
    if name != NAME
  }
  body = {**body, "files": files}
  if is_remote:
    text = json.dumps({"crc32": _crc_of(body), "body": body})
    (directory / NAME).write_text(text)
    return
  with open(directory / NAME, "w") as f:
    json.dump({"crc32": _crc_of(body), "body": body}, f)
    f.flush()
    os.fsync(f.fileno())
  for path in (directory, *directory.rglob("*")):
    if path.is_dir():
      sync(path)


def verify(directory: places.Path) -> dict[str, Any]:
  """Returns the manifest's body if every file is as it was written.

  Raises:
    Broken: a file is missing or changed, the manifest itself included.
  """
  try:
    manifest = json.loads((directory / NAME).read_bytes())
    body, crc = manifest["body"], manifest["crc32"]
  except FileNotFoundError:
    raise Broken(f"{NAME} is missing") from None
  except (ValueError, KeyError, TypeError):
    raise Broken(f"{NAME} cannot be read") from None
  if crc != _crc_of(body):
    raise Broken(f"{NAME} does not match its own checksum")
  found = places.sizes(directory)
  for name, expected in body["files"].items():
    try:
      if name not in found:
        raise Broken(f"{name} is missing")
      if found[name] != expected[0]:
        raise Broken(f"{name} has {found[name]} bytes and had {expected[0]}")
      is_summed = expected[1] is not None
      if is_summed and _checksum(directory / name) != expected:
        raise Broken(f"{name} does not match its checksum")
    except OSError as e:
      raise Broken(f"{name}: {e.strerror}") from None
  return body


def fingerprint(directory: places.Path) -> str:
  """Returns 8 hex digits that tell contents apart; verifies nothing."""
  return f"{zlib.crc32((directory / NAME).read_bytes()):08x}"


def remove(directory: places.Path) -> None:
  """Deletes `directory`, manifest first: half a deletion never looks whole."""
  (directory / NAME).unlink(missing_ok=True)
  places.remove(directory)


def sync(directory: places.Path) -> None:
  """Forces the names in `directory` to the disk."""
  fd = os.open(directory, os.O_RDONLY)
  try:
    os.fsync(fd)
  finally:
    os.close(fd)


def _crc_of(body: Any) -> int:
  return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def _checksum(path: places.Path, *, sync_too: bool = False) -> list[int]:
  """Returns [size, CRC-32]."""
  size = crc = 0
  with path.open("rb") as f:
    while block := f.read(1 << 22):
      size += len(block)
      crc = zlib.crc32(block, crc)
    if sync_too:
      os.fsync(f.fileno())
  return [size, crc]
