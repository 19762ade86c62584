"""Landlock rules: what a restricted process can and cannot reach."""

import ctypes
import errno
import os
import pathlib
import socket
import subprocess
import sys
import sysconfig
import textwrap

import pytest

from roc.host.sandbox import landlock

ROOT = pathlib.Path(__file__).parents[3]
ABI = landlock.abi()
needs_landlock = pytest.mark.skipif(
  ABI == 0, reason="this kernel has no Landlock, or it is not enabled"
)
PRELUDE = """
import ctypes, errno, os, socket, subprocess, sys
from roc.host.sandbox import landlock
libraries = {libraries!r}
rules = landlock.Ruleset.prepare(
  landlock.default_read_paths(libraries), landlock.default_device_paths()
)
def refused(call, *arguments):
  try:
    call(*arguments)
  except PermissionError:
    return True
  return False
ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)  # no_new_privs
"""


def interpreter_dirs() -> list[str]:
  names = ("stdlib", "platstdlib", "purelib", "platlib")
  return [
    *(sysconfig.get_path(name) for name in names),
    *(sys.prefix, sys.base_prefix, os.path.realpath(sys.executable)),
  ]


def confined(code: str, cwd: pathlib.Path, restrict: bool = True) -> str:
  """Runs code under the rules in a fresh interpreter; returns its output."""
  prelude = PRELUDE.format(libraries=[*interpreter_dirs(), str(ROOT / "roc")])
  if restrict:
    prelude += f"rules.restrict({str(cwd)!r})\n"
  done = subprocess.run(
    [sys.executable, "-c", prelude + textwrap.dedent(code)],
    cwd=cwd,
    env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "TMPDIR": str(cwd)},
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


def test_the_paths_to_read_hold_no_secret():
  paths = landlock.default_read_paths(["/opt/python"])
  assert "/opt/python" in paths and "/usr" in paths
  assert not {"/", "/etc", "/proc", "/sys", "/dev", "/tmp"} & set(paths)
  assert set(landlock.default_device_paths()) <= {
    f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom")
  }


def test_nested_missing_and_linked_paths_are_dropped(tmp_path):
  for name in ("a/b/c", "a-b", "d"):
    (tmp_path / name).mkdir(parents=True)
  (tmp_path / "link").symlink_to("a/b")
  given = ["a/b/c", "a-b", "link", "a", "a", "none", "d/"]
  kept = landlock._without_nested([f"{tmp_path}/{name}" for name in given])
  root = os.path.realpath(tmp_path)
  assert kept == [f"{root}/a", f"{root}/a-b", f"{root}/d"]


@needs_landlock
def test_scratch_is_the_only_place_to_write(tmp_path):
  scratch, other = tmp_path / "scratch", tmp_path / "other"
  scratch.mkdir()
  other.mkdir()
  (other / "file").write_text("kept")
  out = confined(
    f"""
    other = {str(other)!r}
    import tempfile
    os.makedirs("a/b")
    with open("a/b/f", "w") as f:
      f.write("text")
    with open("a/b/f", "r+") as f:
      assert f.read() == "text"
      f.truncate(1)
    os.truncate("a/b/f", 0)
    os.rename("a/b/f", "a/b/g")
    os.symlink("g", "a/b/h")
    os.link("a/b/g", "a/b/i")
    with tempfile.NamedTemporaryFile() as f:
      f.write(b"x")
    with open("run.sh", "w") as f:
      f.write("#!/bin/sh\\necho ran\\n")
    os.chmod("run.sh", 0o700)
    assert subprocess.check_output(["./run.sh"]) == b"ran\\n"
    if {ABI} >= 2:
      os.rename("a/b/g", "g")
    for folder in (other, "/tmp", "/etc", "/usr"):
      assert refused(open, folder + "/roc_new", "w"), folder
    for path in (other + "/file", "/etc/passwd"):
      assert refused(open, path), path
      assert refused(open, path, "a"), path
    for folder in (other, "/etc", "/proc", "/sys", "/dev", "/", "/tmp", ".."):
      assert refused(os.listdir, folder), folder
    assert refused(os.unlink, other + "/file")
    assert refused(os.rmdir, other)
    assert refused(os.mkdir, other + "/d")
    assert refused(os.symlink, "x", other + "/s")
    os.symlink(other + "/file", "way_out")
    assert refused(open, "way_out")
    try:
      os.link(other + "/file", "stolen")
    except OSError as error:
      assert error.errno in (errno.EXDEV, errno.EACCES, errno.EPERM)
    else:
      raise AssertionError("link")
    if {ABI} >= 3:
      assert refused(os.truncate, other + "/file", 0)
    assert refused(open, "/proc/self/environ")
    assert refused(open, f"/proc/{{os.getppid()}}/environ")
    try:
      os.mknod("disk", 0o060600, os.makedev(8, 0))
    except PermissionError:
      print("held")
    """,
    scratch,
  )
  assert out == "held\n"
  assert (other / "file").read_text() == "kept"
  assert os.listdir(other) == ["file"]


@needs_landlock
def test_programs_still_live(tmp_path):
  out = confined(
    """
    import asyncio, json, locale, mimetypes, random, threading
    import sqlite3, ssl, unicodedata, zoneinfo
    assert os.stat("/etc").st_mode and os.path.exists("/etc/passwd")
    assert os.path.isdir(os.path.dirname(os.getcwd()))
    mimetypes.init()
    assert len(os.urandom(8)) == 8
    for name in ("null", "zero", "full", "random", "urandom"):
      open(f"/dev/{name}", "rb").close()
    with open("/dev/null", "w") as f:
      f.write("x")
    done = subprocess.run(
      "echo hello 2>/dev/null | cat < /dev/stdin",
      shell=True, capture_output=True, text=True, stdin=subprocess.DEVNULL,
    )
    code = "import json, decimal; print(json.dumps(1))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert done.stdout == b"1\\n" and done.stderr == b"", done.stderr
    assert subprocess.check_output("echo a | tr a b", shell=True) == b"b\\n"
    async def nothing():
      await asyncio.sleep(0)
    asyncio.run(nothing())
    thread = threading.Thread(target=nothing().close)
    thread.start()
    thread.join()
    print("lived")
    """,
    tmp_path,
  )
  assert out == "lived\n"


@needs_landlock
@pytest.mark.skipif(ABI < 4, reason="TCP is covered from version 4 on")
def test_tcp_is_refused(tmp_path):
  with socket.create_server(("127.0.0.1", 0)) as listener:
    out = confined(
      f"""
      with socket.socket() as s:
        assert refused(s.connect, {listener.getsockname()!r})
        assert refused(s.bind, ("127.0.0.1", 0))
      print("held")
      """,
      tmp_path,
    )
  assert out == "held\n"


@needs_landlock
@pytest.mark.skipif(ABI < 6, reason="signals are covered from version 6 on")
def test_the_outside_is_out_of_reach_for_signals_and_sockets(tmp_path):
  with socket.socket(socket.AF_UNIX) as listener:
    listener.bind("")  # Linux picks a free abstract name
    listener.listen()
    out = confined(
      f"""
      with socket.socket(socket.AF_UNIX) as s:
        assert refused(s.connect, {listener.getsockname()!r})
      assert refused(os.kill, os.getppid(), 0)
      assert refused(os.kill, 1, 0)
      os.kill(os.getpid(), 0)
      child = subprocess.Popen(["sleep", "60"])
      child.kill()
      assert child.wait() == -9
      print("held")
      """,
      tmp_path,
    )
  assert out == "held\n"


@needs_landlock
def test_each_child_gets_its_own_scratch(tmp_path):
  for name in ("one", "two"):
    (tmp_path / name).mkdir()
  out = confined(
    f"""
    root = {str(tmp_path)!r}
    for mine, theirs in (("one", "two"), ("two", "one")):
      pid = os.fork()
      if pid == 0:
        free = os.dup(0)
        os.close(free)
        rules.restrict(f"{{root}}/{{mine}}")
        assert os.dup(0) == free  # nothing is left open
        open(f"{{root}}/{{mine}}/file", "w").close()
        fine = refused(open, f"{{root}}/{{theirs}}/file", "w")
        fine &= refused(os.listdir, root)
        os._exit(0 if fine else 1)
      assert os.waitpid(pid, 0)[1] == 0
    os.listdir(root)  # the parent is free
    n_open = len(os.listdir("/proc/self/fd"))
    n_rules = len(rules._rules)
    rules.close()
    assert len(os.listdir("/proc/self/fd")) == n_open - n_rules
    print("held")
    """,
    tmp_path,
    restrict=False,
  )
  assert out == "held\n"


@needs_landlock
def test_failures_are_errors(tmp_path):
  out = confined(
    f"""
    try:
      rules.restrict({str(tmp_path / "missing")!r})
    except FileNotFoundError:
      print("no directory")
    """,
    tmp_path,
    restrict=False,
  )
  assert out == "no directory\n"


def test_a_missing_preparation_is_named(monkeypatch):
  """As the kernel answers all but root: root needs no preparation."""

  def call(*_):
    ctypes.set_errno(errno.EPERM)
    return -1

  monkeypatch.setattr(landlock, "_syscall", call)
  with pytest.raises(PermissionError, match="no_new_privs is not set"):
    landlock._checked(landlock._RESTRICT_SELF, 3, 0, 0)


def test_no_landlock_is_an_error(monkeypatch):
  monkeypatch.setattr(landlock, "abi", lambda: 0)
  with pytest.raises(OSError, match="Landlock is not available"):
    landlock.Ruleset.prepare([], [])


@pytest.mark.parametrize("version", range(1, 12))
def test_each_version_is_asked_only_for_what_it_knows(version):
  attributes = landlock.Ruleset(version, [])._attributes
  known = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16, 6: 16, 7: 16, 8: 16}
  assert attributes.files == (1 << known.get(version, 17)) - 1
  assert attributes.network == (3 if version >= 4 else 0)
  assert attributes.scopes == (3 if version >= 6 else 0)


@needs_landlock
@pytest.mark.parametrize("version", range(1, ABI + 1))
def test_older_versions_hold_too(version, tmp_path):
  """A newer kernel takes the requests that an older one would get."""
  out = confined(
    f"""
    landlock.abi = lambda: {version}
    rules = landlock.Ruleset.prepare(landlock.default_read_paths([]), [])
    rules.restrict({str(tmp_path)!r})
    open("file", "w").close()
    assert refused(open, "/etc/passwd")
    assert refused(open, "/dev/null", "w")
    print("held")
    """,
    tmp_path,
    restrict=False,
  )
  assert out == "held\n"
