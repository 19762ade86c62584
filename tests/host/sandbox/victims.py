"""What attacks are aimed at: a process, its sockets and its files."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator

# System calls that Python and the C library have no function for.
_NUMBERS = {
  "x86_64": "234 129 310 56 248 321 298 323 303 304",
  "aarch64": "131 138 270 220 217 280 241 282 264 265",
}
_NUMBER_NAMES = (
  *("tgkill", "sigqueue", "vm_readv", "clone", "add_key", "bpf", "perf"),
  *("userfaultfd", "to_handle", "by_handle"),
)

_VICTIM = r"""
import ctypes, json, os, selectors, signal, socket, sys
libc = ctypes.CDLL(None)
# No more privileges than a call has, which could not look into it otherwise.
libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())
os.setpgid(0, 0)
memory = ctypes.create_string_buffer(b"victim-memory")
seen = {"signals": 0, "connections": 0}
def note(*_):
  seen["signals"] += 1
signal.signal(signal.SIGUSR1, note)
tcp, udp = socket.socket(), socket.socket(type=socket.SOCK_DGRAM)
unix, abstract = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
for s in (tcp, udp):
  s.bind(("127.0.0.1", 0))
unix.bind(sys.argv[1])
os.chmod(sys.argv[1], 0o777)
name = "roc-victim-%d" % os.getpid()
abstract.bind("\0" + name)
for s in (tcp, unix, abstract):
  s.listen(64)
def look():
  for s in (tcp, unix, abstract, udp):
    s.setblocking(False)
    try:
      while True:
        s.recv(9) if s is udp else s.accept()[0].close()
        seen["connections"] += 1
    except BlockingIOError:
      pass
print(json.dumps({"pid": os.getpid(), "address": ctypes.addressof(memory),
  "tcp": tcp.getsockname()[1], "udp": udp.getsockname()[1],
  "unix": sys.argv[1], "abstract": name}), flush=True)
for line in sys.stdin:
  look()
  print(json.dumps(seen), flush=True)
"""


class Victim:
  """A process that attacks are aimed at, and files that it would mind."""

  def __init__(self, folder: str):
    self._folder = folder
    self._process = subprocess.Popen(
      [sys.executable, "-c", _VICTIM, os.path.join(folder, "socket")],
      env={"SECRET": "victim-environment"},
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
    self.facts = json.loads(self._process.stdout.readline())
    self.shm = f"/dev/shm/roc-victim-{self.facts['pid']}"

  @classmethod
  @contextlib.contextmanager
  def start(cls) -> Iterator["Victim"]:
    """Starts one; it ends with the block."""
    folder = tempfile.mkdtemp(prefix="roc-victim-")
    os.chmod(folder, 0o755)
    victim = cls(folder)
    try:
      yield victim
    finally:
      victim._process.kill()
      victim._process.communicate()
      victim._forget_shm()
      shutil.rmtree(folder)

  def _forget_shm(self) -> None:
    with contextlib.suppress(FileNotFoundError):
      os.unlink(self.shm)

  def counts(self) -> dict[str, int]:
    """Returns how many signals and connections have reached it."""
    self._process.stdin.write("count\n")
    self._process.stdin.flush()
    return json.loads(self._process.stdout.readline())

  def plant(self, root: str) -> dict:
    """Lays its files out anew, open to all; returns what a program is told."""
    folder = os.path.join(self._folder, "files")
    shutil.rmtree(folder, ignore_errors=True)
    self._forget_shm()
    os.mkdir(folder)
    for name, text in (("file", "secret"), ("tool", "#!/bin/true\n")):
      path = os.path.join(folder, name)
      with open(path, "w") as f:
        f.write(text)
      os.chmod(path, 0o777)
    os.chmod(folder, 0o777)
    numbers = _NUMBERS[os.uname().machine].split()
    return {
      **self.facts,
      **dict(zip(_NUMBER_NAMES, map(int, numbers), strict=True)),
      "dir": folder,
      "file": os.path.join(folder, "file"),
      "home": os.path.expanduser("~"),
      "root": root,
      "shm": self.shm,
    }

  def snapshot(self) -> tuple:
    """Returns all that an attack on its files could change."""
    folder = os.path.join(self._folder, "files")
    found = []
    for name in sorted(os.listdir(folder)):
      at = os.stat(os.path.join(folder, name))
      found.append((name, at.st_mode, at.st_size, at.st_mtime_ns, at.st_nlink))
    return (*found, os.path.exists(self.shm))
