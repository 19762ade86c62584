"""The supervisor's parent: when that dies, nothing of it stays behind.

A supervisor may be killed, and orphans of a dead one would be handed to init
and live on. So it has a parent that adopts them. It does nothing
else but to sweep the trash: finished calls' scratch directories are renamed
into it, and deleting 10^5 files must not hold up the supervisor.
"""

import contextlib
import os
import signal
import time

from roc.host.sandbox import linux, scratch

_TICK_S = 0.25
_GRACE_S = 1.0


def split(channel_fd: int, root: str) -> None:
  """Forks: returns in the child, the future supervisor; the parent keeps watch.

  Args:
    channel_fd: the trainer's socket, which only the supervisor may hold: its
      closing tells the trainer that the supervisor is dead.
    root: directory with the subdirectories `scratch.WORK` and
      `scratch.TRASH`; deleted at the end.
  """
  trainer = os.getppid()
  linux.adopt_orphans()
  signal.signal(signal.SIGTERM, lambda *_: None)
  signal.pthread_sigmask(
    signal.SIG_BLOCK, {signal.SIGCHLD, signal.SIGTERM, signal.SIGINT}
  )
  keeper = os.getpid()
  pid = os.fork()
  if pid == 0:
    linux.die_with_parent(signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    if os.getppid() != keeper:
      os._exit(1)
    return
  try:
    linux.hide_memory()
    os.close(channel_fd)
    _watch(trainer, pid, os.path.join(root, scratch.TRASH))
    _kill_all()
    scratch.remove_directory(root)
  finally:
    os._exit(0)


def _watch(trainer: int, supervisor: int, trash: str) -> None:
  """Returns when the supervisor is dead, seeing to it if the trainer is."""
  told_at = None
  while True:
    caught = signal.sigtimedwait({signal.SIGCHLD, signal.SIGTERM}, _TICK_S)
    while True:
      try:
        pid, _ = os.waitpid(-1, os.WNOHANG)
      except ChildProcessError:
        return
      if pid == supervisor:
        return
      if pid == 0:
        break
    is_over = os.getppid() != trainer or (
      caught is not None and caught.si_signo == signal.SIGTERM
    )
    if is_over and told_at is None:
      told_at = time.monotonic()
      os.kill(supervisor, signal.SIGTERM)
    if told_at is not None and time.monotonic() > told_at + _GRACE_S:
      os.kill(supervisor, signal.SIGKILL)
    with contextlib.suppress(OSError):
      scratch.empty_directory(trash)


def _kill_all() -> None:
  """Kills all descendants: each death hands us the next generation."""
  while not linux.kill_children():
    time.sleep(0.002)
