"""The run directory: whose it is, and the metrics that stand in it.

`claim` makes a workdir this run's own: a lock that dies with the process, a
record of the configuration, a refusal if another configuration was here first.
`MetricsLog` appends one JSON object a line and, after a restart, drops the rows
that the restored checkpoint has not seen yet, so that a run that was killed and
started again leaves the same rows as one that was not.

Knows nothing of devices: of several processes, the first alone uses it.
"""

import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import math
import os
import pathlib
import platform
import subprocess
import sys
import types
from collections.abc import Mapping
from typing import Any

import roc
from roc import errors, places, records

METRICS = "metrics.jsonl"
RECORD = "run.json"


class Run:
  """A claimed workdir; close it, or leave it as a context manager."""

  def __init__(self, workdir: pathlib.Path, lock: int, record: dict[str, Any]):
    self.workdir = workdir
    self._lock = lock
    self._record = record

  def note(self, **facts: Any) -> None:
    """Adds JSON-able facts, such as the sandbox's tier, to run.json."""
    self._record["attempts"][-1].update(facts)
    records.write_json(self.workdir / RECORD, self._record)

  def close(self) -> None:
    """Lets go of the workdir; the kernel does it too when the process ends."""
    if self._lock >= 0:
      os.close(self._lock)
      self._lock = -1

  def __enter__(self) -> "Run":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


def claim(
  workdir: str | os.PathLike[str],
  program: str,
  *,
  config_json: str,
  gin_text: str,
  identity: dict[str, Any],
  defaults: Mapping[str, Any] = types.MappingProxyType({}),
) -> Run:
  """Makes `workdir` this run's own, to start in or to go on in.

  A workdir in which no step was made yet is nobody's.

  Args:
    workdir: made if it is not there.
    program: `train`, `sft`, ...: one workdir holds the run of one program.
    config_json: text of config.json (`config.to_json`).
    gin_text: text of config.gin; statements count, comments do not.
    identity: what makes the run that run (`config.identity`).
    defaults: of settings that an older record does not have.

  Returns:
    The claim, which holds the workdir's lock until it is closed.

  Raises:
    errors.UserError: not writable, in use by a live process, or another
      configuration's or program's.
  """
  path = pathlib.Path(workdir).absolute()
  fd = records.lock(path)
  try:
    require_same(
      path, program, gin_text=gin_text, identity=identity, defaults=defaults
    )
    record = {
      "program": program,
      "identity": _full_identity(identity, gin_text),
      "attempts": [*_read_record(path).get("attempts", []), _attempt()],
    }
    records.write_text(path / "config.json", config_json)
    records.write_text(path / "config.gin", gin_text)
    records.write_json(path / RECORD, record)
  except BaseException:
    os.close(fd)
    raise
  return Run(path, fd, record)


def forget_config(workdir: str | os.PathLike[str]) -> None:
  """Lets the next `claim` bring any configuration (--allow_config_change)."""
  path = pathlib.Path(workdir).absolute()
  if not (path / RECORD).exists():
    return
  fd = records.lock(path)
  try:
    record = _read_record(path)
    earlier = [*record.pop("earlier", []), record.get("identity")]
    record |= {"identity": None, "earlier": earlier}
    records.write_json(path / RECORD, record)
  finally:
    os.close(fd)


def claim_store(
  directory: places.Path,
  program: str,
  *,
  config_json: str,
  gin_text: str,
  identity: dict[str, Any],
  defaults: Mapping[str, Any] = types.MappingProxyType({}),
  workdir: str | os.PathLike[str] = "",
) -> None:
  """Makes a place for checkpoints outside of the workdir this run's own.

  The same run may come back from another machine with a new workdir and goes on
  there. Writing the record also shows, before any work, that one can write.

  Args:
    directory: of nothing but this run's checkpoints.
    program: as in `claim`, and so on.
    config_json: likewise.
    gin_text: likewise.
    identity: likewise.
    defaults: likewise.
    workdir: that the caller has claimed. As long as there is no checkpoint, the
      place is that of whichever run is made there.

  Raises:
    errors.UserError: it cannot be written, or has another run's checkpoints.
  """
  path = directory / RECORD
  wanted: dict[str, Any] = {
    "program": program,
    "identity": _full_identity(identity, gin_text),
    "workdir": f"{platform.node()}:{pathlib.Path(workdir).absolute()}",
  }
  where = f"config.checkpoint.directory {directory}"
  with places.reaching(directory, "written"):
    old = _stored_record(path) or wanted
    if old.get("workdir") == wanted["workdir"] and not _has_steps(directory):
      old = wanted
    changed = records.differences(old["identity"], wanted["identity"], defaults)
    if old["program"] != program:
      changed = f"program ({old['program']} -> {program})"
    if changed:
      raise errors.UserError(
        f"{where} has the checkpoints of another run: {changed} differ; give"
        " another one, or --allow_config_change to go on there"
      )
    try:
      directory.mkdir(parents=True, exist_ok=True)
    except OSError as e:
      if places.is_remote(directory):
        raise
      raise errors.UserError(f"{where} cannot be written: {e.strerror}") from e
    records.write_text(directory / "config.json", config_json)
    records.write_json(path, wanted)


def _stored_record(path: places.Path) -> dict[str, Any] | None:
  if not path.exists():
    return None
  try:
    record = json.loads(path.read_bytes())
    named = {key: record[key] for key in ("program", "identity")}
    return named | {"workdir": record.get("workdir")}
  except (ValueError, KeyError, TypeError) as e:
    raise errors.UserError(
      f"{path} is no record of a run; mend it, or give another"
      " config.checkpoint.directory"
    ) from e


def forget_store(directory: places.Path) -> None:
  """Lets the next `claim_store` bring any configuration."""
  with places.reaching(directory, "written"):
    (directory / RECORD).unlink(missing_ok=True)


class MetricsLog:
  """Appends rows to metrics.jsonl and, if wanted, TensorBoard event files."""

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    *,
    restored_step: int | None = None,
    tensorboard: bool = True,
  ):
    """Opens the log for what comes after `restored_step`.

    Args:
      workdir: a claimed run directory.
      restored_step: step of the checkpoint that the run goes on from; rows of
        later steps and a half-written last line go. None: all rows go.
      tensorboard: write event files under logs/, if tensorboardX is installed.

    Raises:
      errors.UserError: the file cannot be opened or a line in its middle
        cannot be read.
    """
    workdir = pathlib.Path(workdir)
    self.path = workdir / METRICS
    kept = _bytes_up_to(self.path, restored_step)
    try:
      self._fd = os.open(
        self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666
      )
      os.ftruncate(self._fd, kept)
    except OSError as e:
      raise records.unwritable(self.path, e) from e
    self._writer = None
    if tensorboard and importlib.util.find_spec("tensorboardX"):
      import tensorboardX

      self._writer = tensorboardX.SummaryWriter(
        str(workdir / "logs"),
        purge_step=None if restored_step is None else restored_step + 1,
      )

  def write(self, step: int, metrics: dict[str, Any]) -> None:
    """Appends a row and returns when it is on disk.

    Write the row of a step before its checkpoint is saved: a restart keeps the
    rows up to the checkpoint and cannot make up one that was never written.

    Args:
      step: rows come in rising order of it; one step may have several.
      metrics: numbers (numpy scalars too); what is not finite becomes null.
    """
    row = {"step": step} | {k: _number(v) for k, v in metrics.items()}
    line = (json.dumps(row, allow_nan=False) + "\n").encode()
    end = os.fstat(self._fd).st_size
    try:
      written = os.write(self._fd, line)
      if written != len(line):
        os.write(self._fd, line[written:])
      os.fsync(self._fd)
    except OSError as e:
      with contextlib.suppress(OSError):
        os.ftruncate(self._fd, end)
      raise records.unwritable(self.path, e) from e
    if self._writer is not None:
      for key, value in row.items():
        if key != "step" and isinstance(value, int | float):
          self._writer.add_scalar(key, value, step)

  def close(self) -> None:
    """Closes the files."""
    if self._fd >= 0:
      os.close(self._fd)
      self._fd = -1
      if self._writer is not None:
        self._writer.close()

  def __enter__(self) -> "MetricsLog":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """Returns the rows of a metrics.jsonl; a half-written last line is left out.

  Raises:
    errors.UserError: no such file, or an unreadable line before the last.
  """
  try:
    data = pathlib.Path(path).read_bytes()
  except OSError as e:
    raise errors.UserError(
      f"cannot read {path}: {e.strerror}; is its directory a workdir?"
    ) from None
  return [row for row, _ in _rows(data, path)]


# ------------------------------------------------------------------ metrics


def _rows(data: bytes, path: Any) -> list[tuple[dict[str, Any], int]]:
  """Returns each row and the offset of its end."""
  rows, end = [], 0
  lines = data.splitlines(keepends=True)
  for number, line in enumerate(lines, start=1):
    end += len(line)
    try:
      row = json.loads(line)
      if not isinstance(row["step"], int) or not line.endswith(b"\n"):
        raise ValueError("not a row")
    except (ValueError, KeyError, TypeError):
      if number == len(lines):
        break
      raise errors.UserError(
        f'{path} line {number}: not a JSON object with an integer "step"; mend'
        " that line, or restore the file"
      ) from None
    rows.append((row, end))
  return rows


def _bytes_up_to(path: pathlib.Path, step: int | None) -> int:
  if step is None or not path.exists():
    return 0
  kept = 0
  for row, end in _rows(path.read_bytes(), path):
    if row["step"] > step:
      break
    kept = end
  return kept


def _number(value: Any) -> Any:
  if isinstance(value, str | bool | int | None):
    return value
  value = value.item() if hasattr(value, "item") else value
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


# ------------------------------------------------------------------- record


def _read_record(workdir: pathlib.Path) -> dict[str, Any]:
  path = workdir / RECORD
  try:
    record = json.loads(path.read_bytes())
    if isinstance(record, dict):
      return record
    cause = "not a JSON object"
  except FileNotFoundError:
    leftovers = [n for n in (METRICS, "checkpoints") if (workdir / n).exists()]
    if not leftovers:
      return {}
    cause = f"missing, yet there is a {leftovers[0]}"
  except (OSError, ValueError) as e:
    cause = str(e)
  raise errors.UserError(
    f"cannot tell whose run is in {workdir}, {RECORD} is unreadable ({cause});"
    " restore that file or give another --workdir"
  )


def _has_begun(workdir: pathlib.Path) -> bool:
  """Whether a step was made: there is a row, a trace or a checkpoint of one."""
  if _has_steps(workdir / "checkpoints"):
    return True
  if any((workdir / "rollouts").glob("step_*.jsonl")):
    return True
  path = workdir / METRICS
  if not path.exists():
    return False
  return any(row["step"] > 0 for row, _ in _rows(path.read_bytes(), path))


def _has_steps(directory: places.Path) -> bool:
  return directory.is_dir() and any(
    path.name.startswith("step_") for path in directory.iterdir()
  )


def require_same(
  workdir: pathlib.Path,
  program: str,
  *,
  gin_text: str,
  identity: dict[str, Any],
  defaults: Mapping[str, Any] = types.MappingProxyType({}),
  remedy: str = "give another --workdir, or --allow_config_change to go on here"
  " with the new one",
) -> None:
  """Refuses a workdir that holds another run than this one.

  Args:
    workdir: empty, or of a run.
    program: as in `claim`.
    gin_text: likewise.
    identity: likewise.
    defaults: likewise.
    remedy: what the user may do about another configuration.

  Raises:
    errors.UserError: says what differs.
  """
  record = _read_record(workdir)
  if record.get("identity") is None or not _has_begun(workdir):
    return
  if record["program"] != program:
    raise errors.UserError(
      f"workdir {workdir} holds a run of `{record['program']}`, not of"
      f" `{program}`; give another --workdir"
    )
  wanted = _full_identity(identity, gin_text)
  changed = records.differences(record["identity"], wanted, defaults)
  if changed:
    raise errors.UserError(
      f"workdir {workdir} belongs to another configuration: {changed} differ;"
      f" {remedy}"
    )


def _full_identity(identity: dict[str, Any], gin_text: str) -> dict[str, Any]:
  """What run.json holds: a run's settings as JSON and its gin statements."""
  return json.loads(json.dumps(identity)) | records.statements(gin_text)


def _attempt() -> dict[str, Any]:
  packages = ("jax", "jaxlib", "flax", "optax", "numpy", "orbax-checkpoint")
  versions = {"python": platform.python_version()}
  for package in packages:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      versions[package] = importlib.metadata.version(package)
  now = datetime.datetime.now(datetime.UTC)
  return {
    "started": now.isoformat(timespec="seconds"),
    "command": sys.argv,
    "host": {
      "name": platform.node(),
      "machine": platform.machine(),
      "system": platform.platform(),
      "cpus": os.cpu_count(),
    },
    "roc": {"version": roc.__version__, **_commit()},
    "versions": versions,
  }


def _commit() -> dict[str, Any]:
  """The commit of the checkout that runs; empty where it is no checkout."""
  checkout = pathlib.Path(roc.__file__).resolve().parents[1]

  def git(*words: str) -> str:
    done = subprocess.run(
      ["git", "-C", str(checkout), *words],
      capture_output=True, text=True, timeout=10, check=True,
    )  # fmt: skip
    return done.stdout.strip()

  try:
    top = git("rev-parse", "--show-toplevel")
    if pathlib.Path(top).resolve() != checkout:
      return {}  # it lies in the checkout of something else
    return {
      "commit": git("rev-parse", "HEAD"),
      "is_changed": bool(git("status", "--porcelain", "-uno")),
    }
  except (OSError, subprocess.SubprocessError):
    return {}
