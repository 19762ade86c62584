"""The pure parts: records, wire, verdict, cleaning."""

import json
import linecache
import os
import signal

import numpy as np
import pytest

from roc.host import sandbox
from roc.host.sandbox import (
  calls,
  contract,
  packages,
  report,
  running,
  scratch,
  verdict,
  wire,
)
from roc.layout import ToolStatus


def test_results_and_limits_survive_json():
  result = contract.ToolResult(
    ToolStatus.CRASH, stdout="é\ud800", signal=11, wall_ms=1.5, retries=1
  )
  assert contract.ToolResult.from_json(result.to_json()) == result
  assert json.loads(result.to_json())["status"] == "crash"
  limits = contract.Limits(wall_s=0.25)
  assert contract.Limits.from_json(limits.to_json()) == limits


@pytest.mark.parametrize(
  "fields",
  [
    {"wall_s": 0},
    {"cpu_s": float("inf")},
    {"memory_mb": 1.5},
    {"output_bytes": True},
    {"n_files": 3},
    {"output_bytes": 1 << 30},
    {"n_processes": -1},
  ],
)
def test_impossible_limits_are_named(fields):
  with pytest.raises(ValueError, match=f"Limits.{next(iter(fields))}"):
    contract.Limits(**fields)


def test_messages_survive_any_chopping():
  messages = [{"a": "é\ud800"}, {"b": [1, 2]}, {}]
  stream = b"".join(map(wire.pack, messages))
  for size in (1, 3, len(stream)):
    unpacker, got = wire.Unpacker(), []
    for i in range(0, len(stream), size):
      got += unpacker.feed(stream[i : i + size])
    assert got == messages


@pytest.mark.parametrize(
  "stream", [b"\xff\xff\xff\xff", b"\0\0\0\2{x", b"\0\0\0\2[]"]
)
def test_a_stream_that_is_no_message_is_refused(stream):
  with pytest.raises(wire.WireError):
    wire.Unpacker().feed(stream)


def exited(code: int) -> int:
  return code << 8


@pytest.mark.parametrize(
  "evidence, status, clean",
  [
    ({"wait_status": 0, "record": b"ok\0\0"}, ToolStatus.OK, True),
    ({"wait_status": 0}, ToolStatus.OK, False),
    ({"wait_status": exited(3)}, ToolStatus.EXIT, False),
    ({"wait_status": exited(3), "record": b"ok\0\0"}, ToolStatus.EXIT, True),
    ({"wait_status": 0, "record": b"exit\0\0"}, ToolStatus.OK, True),
    (
      {"wait_status": exited(1), "record": b"error\0E\0"},
      ToolStatus.ERROR,
      True,
    ),
    ({"wait_status": exited(1), "record": b"infra\0\0"}, ToolStatus.EXIT, 0),
    ({"wait_status": exited(1), "record": b"\xff" * 512}, ToolStatus.EXIT, 0),
    ({"wait_status": 11, "record": b"ok\0\0"}, ToolStatus.CRASH, False),
    ({"wait_status": signal.SIGXCPU}, ToolStatus.TIMEOUT, False),
    ({"wait_status": signal.SIGXFSZ}, ToolStatus.RESOURCE, False),
    ({"wait_status": 9, "memory_kb": 100}, ToolStatus.CRASH, False),
    (
      {"wait_status": 9, "memory_kb": 100, "max_rss_kb": 90},
      ToolStatus.MEMORY,
      False,
    ),
    ({"wait_status": 9, "cpu_s": 2.0}, ToolStatus.TIMEOUT, False),
    (
      {"wait_status": 0, "record": b"ok\0\0", "flooded": "stdout"},
      ToolStatus.OUTPUT_LIMIT,
      False,
    ),
    (
      {"wait_status": 9, "killed_for": ToolStatus.TIMEOUT},
      ToolStatus.TIMEOUT,
      False,
    ),
    (
      {"wait_status": exited(1), "setup_failure": "OSError"},
      ToolStatus.INFRA,
      False,
    ),
  ],
)
def test_the_verdict_of_each_kind_of_evidence(evidence, status, clean):
  found = verdict.judge(verdict.Evidence(**evidence))
  assert (found.status, found.clean) == (status, bool(clean))


def test_a_record_names_only_identifiers():
  def name_of(record):
    return verdict.judge(verdict.Evidence(exited(1), record=record)).error_type

  assert name_of(verdict.pack_record(b"error", "ValueError")) == "ValueError"
  assert name_of(b"error\0a\nb: c\0") == ""
  assert len(verdict.pack_record(b"error", "E" * 9999)) <= verdict.RECORD_BYTES


@pytest.mark.parametrize(
  "data, kept",
  [
    (b"abc", b"abc"),
    ("é".encode()[:1], b""),
    ("a€".encode()[:3], b"a"),
    ("🙂".encode(), "🙂".encode()),
    ("🙂".encode()[:3], b""),
    (b"\x80\x80\x80\x80", b"\x80\x80\x80\x80"),
    (b"a\xff", b"a\xff"),
    (b"", b""),
  ],
)
def test_cutting_leaves_whole_characters(data, kept):
  assert running.cut_utf8(data) == kept


def test_cleaning_follows_no_link(tmp_path):
  canary = tmp_path / "canary"
  canary.mkdir()
  (canary / "file").write_text("x")
  trash = tmp_path / "trash"
  (trash / "call").mkdir(parents=True)
  (trash / "call" / "dir_link").symlink_to(canary)
  (trash / "call" / "file_link").symlink_to(canary / "file")
  (trash / "loop").symlink_to(trash)
  os.link(canary / "file", trash / "call" / "hard")
  assert scratch.empty_directory(str(trash)) == 0
  assert os.listdir(trash) == []
  assert (canary / "file").read_text() == "x"


def test_cleaning_copes_with_depth_numbers_and_locked_directories(tmp_path):
  trash = tmp_path / "trash"
  trash.mkdir()
  fd = os.open(trash, os.O_RDONLY)
  name = "d" * 200
  for _ in range(1050):  # far past any path length and recursion limit
    os.mkdir(name, dir_fd=fd)
    deeper = os.open(name, os.O_RDONLY, dir_fd=fd)
    os.close(fd)
    fd = deeper
  os.close(fd)
  for i in range(300):
    (trash / f"f{i}").touch()
  locked = trash / "locked"
  (locked / "inner").mkdir(parents=True)
  (locked / "inner").chmod(0)
  locked.chmod(0)
  scratch.remove_directory(str(trash))
  assert not trash.exists()


def test_numpy_integers_name_the_same_rollout():
  plain, numpys = (3, ("a", 4)), (np.int64(3), (np.str_("a"), np.int32(4)))
  assert repr(calls.canonical(numpys)) == repr(plain)
  assert repr(calls.canonical(np.uint8(3))) == "3"
  digests = {
    sandbox.seed_digest(seed, name, index)
    for seed in (7, np.int64(7))
    for name in (plain, numpys)
    for index in (2, np.int64(2))
  }
  assert len(digests) == 1
  for odd in (3.0, None, [1], (1, b"x")):
    with pytest.raises(ValueError, match="a string, an integer or a tuple"):
      calls.canonical(odd)


def test_the_model_is_told_what_is_installed(monkeypatch):
  assert packages.surroundings() == (
    "The standard library and numpy, sympy, scipy, mpmath are installed; there"
    " is no network."
  )
  monkeypatch.setattr(packages, "is_installed", lambda name: name == "numpy")
  assert "library and numpy are installed" in packages.surroundings()
  monkeypatch.setattr(packages, "is_installed", lambda name: False)
  assert packages.surroundings().startswith("Only the standard library is")


def test_a_class_is_found_in_its_cell_by_the_line_that_newer_pythons_note(
  monkeypatch,
):
  monkeypatch.setattr(linecache, "cache", {})
  report.show_source("<tool>", "x = 1\n\n@mark\nclass A:\n  y = 2\n")
  report.show_source("<tool 2>", "class A:\n  y = 3\n\nclass AB: pass\n")
  report.show_source("<tool 3>", "text = 'class B'\n")
  made = type("A", (), {"__module__": "__main__"})
  assert report.find_file(made) == "<tool 2>"
  made.__firstlineno__ = 3
  assert report.find_file(made) == "<tool>"
  made.__firstlineno__ = 1
  assert report.find_file(made) == "<tool 2>"
