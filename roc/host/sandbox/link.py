"""One supervisor as the trainer sees it: exec, handshake, frames, end.

The supervisor is started by exec, never by a bare fork: the trainer is a JAX
process, full of threads whose locks a forked copy could never release.
"""

import contextlib
import os
import select
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from roc.host.sandbox import confine, contract, linux, scratch, wire

_SEND_TIMEOUT_S = 20
_CLOSE_TIMEOUT_S = 8.0
_PING_AFTER_S = 2.0
_DEAD_AFTER_S = 20.0
_BOOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "boot.py")

# All that a program finds in its environment; HOME and TMPDIR come per call.
ENVIRONMENT = {
  "PATH": "/usr/local/bin:/usr/bin:/bin",
  "LANG": "C.UTF-8",
  "TZ": "UTC",
  "PYTHONHASHSEED": "0",
  "MPLBACKEND": "Agg",
  "TQDM_DISABLE": "1",  # its bars say how fast the machine is
  "OMP_NUM_THREADS": "1",
  "OPENBLAS_NUM_THREADS": "1",
  "MKL_NUM_THREADS": "1",
  "NUMEXPR_NUM_THREADS": "1",
  "VECLIB_MAXIMUM_THREADS": "1",
  # Each thread would otherwise reserve 64 MB of its RLIMIT_AS.
  "MALLOC_ARENA_MAX": "2",
}


class Link:
  """A running supervisor; `start` is the constructor."""

  def __init__(self, process: subprocess.Popen, sock: socket.socket, root: str):
    self._process = process
    self._socket = sock
    self._root = root
    self._unpacker = wire.Unpacker()
    self._send_lock = threading.Lock()
    self._poll = select.poll()
    self._poll.register(sock, select.POLLIN)
    self.facts: dict = {}

  @classmethod
  def start(cls, config: dict, timeout_s: float) -> "Link":
    """Starts a supervisor and waits until it is ready.

    Args:
      config: `n_workers`, `n_sessions`, `images`, `tier`, `without`,
        `read_paths`, as `supervisor.Supervisor.configure` reads them.
      timeout_s: to wait for `ready`.

    Returns:
      The link, its `facts` filled with what it says of itself.

    Raises:
      contract.SandboxError: it could not be started; says why.
    """
    try:
      root = tempfile.mkdtemp(prefix="roc-sandbox-")
      os.chmod(root, 0o711)  # calls with ids of their own walk through it
      for name in (scratch.WORK, scratch.TRASH, confine.BOX):
        os.mkdir(os.path.join(root, name))
        os.chmod(os.path.join(root, name), 0o711)
    except OSError as error:
      raise contract.SandboxError(
        f"the sandbox found no directory to work in ({error}): set TMPDIR to"
        " a writable one"
      ) from error
    ours, theirs = socket.socketpair()
    # A supervisor that reads nothing for this long must not hang the trainer.
    ours.setsockopt(
      socket.SOL_SOCKET,
      socket.SO_SNDTIMEO,
      struct.pack("ll", _SEND_TIMEOUT_S, 0),
    )
    try:
      with theirs, tempfile.TemporaryFile() as log:
        link = cls(_spawn(theirs, root, log), ours, root)
        theirs.close()
        link.send({**config, "site_dirs": _site_dirs()})
        link._await_ready(timeout_s, log)
        return link
    except BaseException:
      ours.close()
      scratch.remove_directory(root)
      raise

  def _await_ready(self, timeout_s: float, log) -> None:
    deadline = time.monotonic() + timeout_s
    messages: list[dict] = []
    why = f"it was not ready within {timeout_s:g} s"
    while not messages and time.monotonic() < deadline:
      received = self.receive(0.1)
      if received is None:
        log.seek(0)
        tail = log.read()[-500:].decode("utf-8", "replace").strip()
        why = f"it ended at once: {tail or 'no message'}"
        break
      messages = received
    if messages and messages[0].get("op") == "ready":
      self.facts = messages[0]
      if self.facts["plan"]["tier"] == contract.TIERS[1]:
        # Nothing else keeps a call of the same user from /proc/PID/mem.
        linux.hide_memory()
      return
    if messages:
      why = str(messages[0].get("why"))
    self.close()
    raise contract.SandboxError(
      f"the sandbox ({sys.executable}) cannot start: {why}; `python -m roc.main"
      " sandbox doctor` shows what this machine allows"
    )

  @property
  def pid(self) -> int:
    """Process id of the supervisor (not of its keeper)."""
    return int(self.facts["pid"])

  @property
  def keeper_pid(self) -> int:
    """Process id of the supervisor's parent, which is this process' child."""
    return self._process.pid

  def send(self, message: dict, fds: Sequence[int] = ()) -> None:
    """Sends one message, with descriptors that stay the caller's.

    Raises:
      OSError: the supervisor is gone or has not read for many seconds.
    """
    data = wire.pack({**message, "n_fds": len(fds)})
    with self._send_lock:
      n_sent = socket.send_fds(self._socket, [data], fds) if fds else 0
      self._socket.sendall(data[n_sent:])

  def receive(self, timeout_s: float) -> list[dict] | None:
    """Returns the messages that came, [] after the timeout, None at the end."""
    if not self._poll.poll(timeout_s * 1e3):
      return []
    try:
      data = self._socket.recv(1 << 18)
      return self._unpacker.feed(data) if data else None
    except (OSError, wire.WireError):
      return None

  def results(self, is_waiting: Callable[[], bool | None]) -> Iterator[dict]:
    """Yields results until the supervisor is gone, or silent for too long.

    Args:
      is_waiting: True while a result is due, so that silence means something;
        None to end.
    """
    heard = pinged = time.monotonic()
    while (is_due := is_waiting()) is not None:
      messages = self.receive(0.5)
      now = time.monotonic()
      if messages is None:
        return
      if messages or not is_due:
        heard = now
      elif now > heard + _DEAD_AFTER_S:
        self.kill()
        return
      elif now > max(heard, pinged) + _PING_AFTER_S:
        pinged = now
        with contextlib.suppress(OSError):
          self.send({"op": "ping"})
      yield from (m for m in messages if m.get("op") == "result")

  def close(self) -> None:
    """Ends the supervisor and everything below it; returns when it is over."""
    with contextlib.suppress(OSError):
      self._socket.shutdown(socket.SHUT_RDWR)
    try:
      self._process.wait(_CLOSE_TIMEOUT_S)
    except subprocess.TimeoutExpired:
      self._process.kill()
      self._process.wait()
    self._socket.close()
    scratch.remove_directory(self._root)

  def kill(self) -> None:
    """Kills a supervisor that no longer answers; `receive` then says so."""
    self._process.terminate()  # the keeper kills the supervisor, then all else
    with contextlib.suppress(OSError):
      self._socket.shutdown(socket.SHUT_RDWR)


def _spawn(theirs: socket.socket, root: str, log) -> subprocess.Popen:
  try:
    return subprocess.Popen(
      [
        sys.executable,
        # No site, no user site, no script directory on the path, no .pyc: the
        # environment below is the only thing that reaches it.
        *("-s", "-S", "-P", "-B", _BOOT, str(theirs.fileno()), root),
      ],
      stdin=subprocess.DEVNULL,
      stdout=subprocess.DEVNULL,
      stderr=log,
      pass_fds=(theirs.fileno(),),
      env=ENVIRONMENT,
      cwd="/",
      start_new_session=True,  # the terminal's Ctrl-C is the trainer's
    )
  except OSError as error:
    raise contract.SandboxError(
      f"the sandbox cannot start {sys.executable} ({error}): run it from a"
      " working Python"
    ) from error


def _site_dirs() -> list[str]:
  """Where this interpreter finds installed packages."""
  names = ("site-packages", "dist-packages")
  return [p for p in sys.path if os.path.basename(p) in names]
