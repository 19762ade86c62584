"""Processes that do nothing but fork: a template makes zygotes, these children.

A template loads an image once and forks zygotes from it; a zygote takes on the
confinement once and forks a child per call or session. Neither ever sees what
a program did: each request is a line of JSON with descriptors, each answer a
few numbers. Few Python objects are touched between two forks, for every page
that the parent changes afterwards is a page copied.

A loop *returns* in the process it has forked, with what that process is to do;
so no frame, and no object of the loops before, lies below a program's frames.
"""

import functools
import gc
import json
import os
import signal
import socket
import typing
from collections.abc import Callable

from roc.host.sandbox import (
  child,
  confine,
  hooks,
  image,
  linux,
  namespaces,
)
from roc.host.sandbox import plan as plan_lib

MAX_REQUEST = 1 << 16
_MAX_FDS = 4
CONFINED, MAP_IDS = b"confined", b"map ids"
FORKED, REFUSED, FAILED = b"forked", b"refused", child.FAILED

Next = Callable[[], typing.Any]

_kept: list[typing.Any] = []


def template(
  sock: socket.socket, site_dirs: list[str], modules: list[str]
) -> Next | None:
  """Loads an image and forks a zygote for every socket that it is sent.

  Args:
    sock: to the supervisor; it says `ready`, or why it cannot be.
    site_dirs: where installed packages lie.
    modules: to load; those that are not installed are an error.

  Returns:
    In a zygote: what it does. In the template: nothing, when it is over.
  """
  linux.die_with_parent()
  try:
    image.load(site_dirs, modules)
  except Exception as error:
    sock.send(f"{type(error).__name__}: {error}"[:500].encode())
    return None
  image.freeze()
  base_bytes = linux.address_space_bytes()
  sock.send(b"ready")
  while True:
    data, fds = _receive(sock)
    if not data:
      return None
    pid = namespaces.bare_fork(namespaces.SIBLING)
    if pid == 0:
      sock.close()
      mine, lifeline_fd = socket.socket(fileno=fds[0]), fds[1]
      return functools.partial(
        serve, mine, json.loads(data), base_bytes, lifeline_fd
      )
    for fd in fds:
      os.close(fd)
    sock.send(b"%s %d" % (FORKED, pid))


def serve(
  sock: socket.socket, setup: dict, base_bytes: int, lifeline_fd: int
) -> Next | None:
  """Takes a plan on and forks a child for every request.

  Args:
    sock: to the supervisor. It says `confined SPARE MIDWIFE`; answers to
      requests are `forked ID PID INIT SPARE`, or `refused ID ERRNO INIT SPARE`.
      INIT is process 1 of the pid namespace that PID was born into, SPARE that
      of the next one; 0 for none. A child that cannot be prepared says `failed
      ID REASON` itself.
    setup: `plan`, `root`, `library_dirs`, `supervisor`, `guarded`, `n_tasks`.
    base_bytes: address space before a program adds to it.
    lifeline_fd: ends when the supervisor is dead.

  Returns:
    In a child: what it does. In the zygote: nothing, when it is over.
  """
  linux.die_with_parent()

  def ask_for_maps() -> None:
    sock.send(MAP_IDS)
    if not sock.recv(16):
      os._exit(1)

  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, signal.SIG_DFL)
  signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # see start_first_process
  plan = plan_lib.Plan.from_json(setup["plan"])
  nursery = None
  if plan.confines_memory:
    linux.show_memory()  # to whoever writes its id maps
  try:
    confinement = confine.Confinement(
      plan,
      setup["root"],
      setup["library_dirs"],
      setup["guarded"],
      ask_for_maps,
    )
    if plan.namespaces:
      nursery = namespaces.Nursery(plan.namespaces == "direct", lifeline_fd)
  except (OSError, ValueError) as error:
    sock.send(f"{error}"[:500].encode())
    return None
  context = child.Context.prepare(sock, confinement, setup, base_bytes)
  # What a frame frees when it returns is pages copied in a child; keep it.
  _kept.extend([sock, setup, confinement, nursery, context, ask_for_maps])
  hooks.register()
  gc.collect()
  gc.freeze()
  helpers = (nursery.spare, nursery.midwife) if nursery else (0, 0)
  sock.send(b"%s %d %d" % (CONFINED, *helpers))
  return _fork_on_request(sock, context, nursery)


def _receive(sock: socket.socket) -> tuple[bytes, list[int]]:
  """Returns a request and its descriptors; b"" when nobody asks any more."""
  try:
    data, fds, _, _ = socket.recv_fds(sock, MAX_REQUEST, _MAX_FDS)
  except ConnectionError:
    return b"", []
  return data, fds


def _fork_on_request(
  sock: socket.socket,
  context: child.Context,
  nursery: namespaces.Nursery | None,
) -> Next | None:
  while True:
    data, fds = _receive(sock)
    if not data:
      return None
    request = json.loads(data)
    init = spare = 0
    try:
      if nursery is not None:
        init = nursery.enter()
        linux.set_tag(request["tag"], init)
      pid = namespaces.bare_fork(namespaces.SIBLING)
    except OSError as error:
      pid = -(error.errno or 1)
    if pid == 0:
      return functools.partial(child.run, child.Job(context, request, fds))
    for fd in fds:
      os.close(fd)
    if nursery is not None:
      # Only now: it inherits descriptors, and must not hold a call's.
      spare = nursery.renew()
    word = FORKED if pid > 0 else REFUSED
    sock.send(b"%s %d %d %d %d" % (word, request["id"], abs(pid), init, spare))
