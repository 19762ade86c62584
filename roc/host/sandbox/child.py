"""What runs in the forked child: take on limits, run the program, note its end.

Below the program's frames lie only this file's and the entry point's, with none
of the zygote's state. The program may still patch anything it can reach;
therefore the end is written defensively and every failure of it falls back to
the plain exit code, which the supervisor reads anyway.
"""

import dataclasses
import functools
import importlib.machinery
import os
import random
import resource
import signal
import socket
import sys
import types
import typing
from collections.abc import Callable

from roc.host.sandbox import (
  confine,
  linux,
  payload,
  repl,
  report,
  script,
  source,
)

# Bound now: the program may replace the originals.
_exit = os._exit
FAILED = b"failed"  # followed by the request's number and why
CHANNEL_FD = 3  # of a session; a script has the three standard ones alone
_OWN_TASKS = 48  # threads that a call may have beside its processes
_MOST_FILES = 512  # that any cell of a session may open, or its first one's
_SPARE_TASKS = 1024  # the same where the kernel counts the whole user
_KINDS = (
  resource.RLIMIT_CORE,
  resource.RLIMIT_CPU,
  resource.RLIMIT_FSIZE,
  resource.RLIMIT_NOFILE,
  resource.RLIMIT_NPROC,
  resource.RLIMIT_AS,
)
# Hard bounds that a zygote takes on for all of its children: no priority above
# the supervisor's, and few timers and signals, which are kernel memory.
_BOUNDS = (
  (resource.RLIMIT_NICE, 0),
  (resource.RLIMIT_RTPRIO, 0),
  (resource.RLIMIT_SIGPENDING, 4096),
)


@dataclasses.dataclass(frozen=True)
class Context:
  """What a zygote prepares for all of its children.

  Attributes:
    sock: to the supervisor, for a child that cannot be prepared.
    confinement: the plan, half of it taken on.
    supervisor: process id of the children's parent.
    n_tasks: tasks of this user when the sandbox started.
    base_bytes: address space before a program adds to it.
    ceilings: hard resource limits of the zygote, by kind.
    reporter: writes tracebacks.
    main: the module that programs run in.
  """

  sock: socket.socket
  confinement: confine.Confinement
  supervisor: int
  n_tasks: int
  base_bytes: int
  ceilings: dict[int, int]
  reporter: report.Reporter
  main: types.ModuleType

  @classmethod
  def prepare(
    cls,
    sock: socket.socket,
    confinement: confine.Confinement,
    setup: dict,
    base_bytes: int,
  ) -> "Context":
    """Does in a zygote what does not depend on the call.

    A child copies each page that it changes, so whatever is done here once
    makes every call cheaper.
    """
    reporter = report.Reporter(setup["library_dirs"])
    reporter.install()
    for kind, most in _BOUNDS:
      hard = resource.getrlimit(kind)[1]
      most = most if hard == resource.RLIM_INFINITY else min(hard, most)
      resource.setrlimit(kind, (most, most))
    sys.argv = [report.TOOL_FILE]
    sys.path.insert(0, "")
    if confinement.box:
      _live_in(confinement.box, reporter)
    return cls(
      sock=sock,
      confinement=confinement,
      supervisor=setup["supervisor"],
      n_tasks=setup["n_tasks"],
      base_bytes=base_bytes,
      ceilings={kind: resource.getrlimit(kind)[1] for kind in _KINDS},
      reporter=reporter,
      main=script.main_module(),
    )


@dataclasses.dataclass(frozen=True)
class Job:
  """One call or session, as a zygote hands it to the child that runs it.

  Attributes:
    context: the zygote's.
    request: `tool`, `limits`, `seed`, `tag`, `scratch`, `uid`.
    fds: stdout, stderr, then for `python` the job file and perhaps stdin, for
      `session` the channel.
  """

  context: Context
  request: dict
  fds: list[int]


def run(job: Job) -> typing.NoReturn:
  """Runs what is asked for in this process and ends the process."""
  code = 1
  try:
    try:
      main = _prepare(job)
    except BaseException as error:
      reason = f"{type(error).__name__}: {error}"[:300]
      told = f" {job.request['id']} {reason}".encode("utf-8", "replace")
      job.context.sock.send(FAILED + told)
      _exit(1)
    code = main()
  finally:
    _exit(code)
  raise AssertionError("unreachable")


def _prepare(job: Job) -> Callable[[], int]:
  """Takes on all that confines the call; returns what is left to do.

  When it returns, no descriptor but the call's own is open: from then on
  nobody can claim that the preparation failed.
  """
  request, context, reporter = job.request, job.context, job.context.reporter
  limits, uid = request["limits"], request["uid"]
  os.setsid()
  linux.die_with_parent()
  # In a pid namespace of its own the parent is out of sight, and 0.
  if os.getppid() not in (0, context.supervisor):
    raise OSError("the supervisor died while it forked")
  signal.signal(signal.SIGCHLD, signal.SIG_DFL)
  scratch = context.confinement.enter_scratch(
    request["scratch"], limits["disk_mb"] << 20, limits["n_entries"], uid
  )
  if not context.confinement.box:
    _live_in(scratch, reporter)
  linux.set_tag(request["tag"])
  reseed(request["seed"])
  stdout, stderr, *others = job.fds
  _own_stdin(others[1] if len(others) > 1 else None)
  os.dup2(stdout, 1)
  os.dup2(stderr, 2)
  lock = functools.partial(
    context.confinement.lock,
    scratch,
    uid,
    lambda: _set_limits(
      limits, context, uid is not None, request["tool"] == "session"
    ),
  )
  ceiling = context.ceilings[resource.RLIMIT_NOFILE]
  if request["tool"] == "session":
    lock()
    channel = socket.socket(fileno=os.dup2(others[0], CHANNEL_FD, False))
    os.closerange(CHANNEL_FD + 1, ceiling)
    # No frame of its own, so that a cell is as deep in the stack as a script.
    limit = functools.partial(
      _set_limits, context=context, has_own_uid=uid is not None, is_soft=True
    )
    return functools.partial(repl.serve, channel, context.main, reporter, limit)
  code = source.clean(payload.read_code(others[0]))
  record = payload.Record(others[0])
  report.show_source(report.TOOL_FILE, code)
  lock()
  os.closerange(3, ceiling)
  return lambda: script.run(code, context.main, record, reporter)


def _own_stdin(fd: int | None) -> None:
  """Puts the call's input at descriptor 0, by default an empty one of its own.

  The zygote's would be shared by all calls, and with it locks, offset and
  flags: what one call left there the next would find.
  """
  if fd is not None:
    os.dup2(fd, 0)
    return
  os.close(0)
  os.open(os.devnull, os.O_RDONLY)  # takes the lowest number, which is 0


def _live_in(scratch: str, reporter: report.Reporter) -> None:
  os.environ["HOME"] = os.environ["TMPDIR"] = scratch
  reporter.hide(scratch)


def _set_limits(
  limits: dict, context: Context, has_own_uid: bool, is_soft: bool
) -> None:
  """Sets resource limits.

  Args:
    limits: the fields of `contract.Limits`.
    context: the zygote's.
    has_own_uid: whether the call is its user's only one.
    is_soft: a later cell may have others, and a hard limit that was lowered
      could not be raised for it. A cell that raises its own again meets the
      supervisor, which looks at time, memory, processes and disk itself.
  """
  space = context.base_bytes + (limits["memory_mb"] << 20)
  cpu = -int(-limits["cpu_s"] // 1)
  n_bytes = limits["file_mb"] << 20
  # The kernel counts every task of the user: threads too, the trainer's too if
  # the user is the same, and nothing at all for uid 0. The exact bound is the
  # supervisor's count; this one stops a bomb between two of its looks.
  n_tasks = limits["n_processes"]
  n_tasks += _OWN_TASKS if has_own_uid else context.n_tasks + _SPARE_TASKS
  for kind, soft, hard in (
    (resource.RLIMIT_CORE, 0, 0),
    (resource.RLIMIT_CPU, cpu, cpu + 1),
    (resource.RLIMIT_FSIZE, n_bytes, n_bytes),
    (resource.RLIMIT_NOFILE, limits["n_files"], limits["n_files"]),
    (resource.RLIMIT_NPROC, n_tasks, n_tasks),
    (resource.RLIMIT_AS, space, space + script.HEADROOM_BYTES),
  ):
    ceiling = context.ceilings[kind]
    if ceiling != resource.RLIM_INFINITY:
      soft, hard = min(soft, ceiling), min(hard, ceiling)
    if is_soft:
      hard = resource.getrlimit(kind)[1]  # a cell may have lowered it
      if kind == resource.RLIMIT_NOFILE:
        most = max(soft, _MOST_FILES)
        hard = most if hard == resource.RLIM_INFINITY else min(hard, most)
      soft = soft if hard == resource.RLIM_INFINITY else min(soft, hard)
    resource.setrlimit(kind, (soft, hard))


def reseed(seed: str) -> None:
  """Sets the global generators of `random` and numpy from a hex digest.

  numpy that is not loaded yet is seeded when the program imports it. Generators
  that a program makes itself without a seed draw from the kernel, as ever.
  """
  digest = bytes.fromhex(seed)
  random.seed(int.from_bytes(digest, "big"))
  numpy_random = sys.modules.get("numpy.random")
  if numpy_random is not None:
    _seed_numpy(numpy_random, digest)
  else:
    sys.meta_path.insert(0, _SeedOnImport(digest))


def _seed_numpy(numpy_random: typing.Any, digest: bytes) -> None:
  words = [int.from_bytes(digest[i : i + 4], "big") for i in range(0, 32, 4)]
  numpy_random.seed(words)


class _SeedOnImport:
  """Import hook that seeds `numpy.random` right after its first import."""

  def __init__(self, digest: bytes):
    self._digest = digest

  def find_spec(self, name, path=None, target=None):
    del target
    if name != "numpy.random":
      return None
    sys.meta_path.remove(self)
    spec = importlib.machinery.PathFinder.find_spec(name, path)
    loader: typing.Any = spec.loader if spec is not None else None
    if loader is not None:
      load = loader.exec_module

      def load_and_seed(module):
        load(module)
        _seed_numpy(module, self._digest)

      loader.exec_module = load_and_seed
    return spec
