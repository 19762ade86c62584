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

from roc.host.sandbox import child, confine, image, linux, namespaces
from roc.host.sandbox import plan as plan_lib

MAX_REQUEST = 1 << 16
_MAX_FDS = 4
CONFINED, MAP_IDS = b"confined", b"map ids"

Next = Callable[[], typing.Any]


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
    pid = namespaces.clone(namespaces.SIBLING)
    if pid == 0:
      sock.close()
      mine = socket.socket(fileno=fds[0])
      return functools.partial(serve, mine, json.loads(data), base_bytes)
    for fd in fds:
      os.close(fd)
    sock.send(b"%d" % pid)


def serve(sock: socket.socket, setup: dict, base_bytes: int) -> Next | None:
  """Takes a plan on and forks a child for every request.

  Args:
    sock: to the supervisor. Answers to requests are `ID PID`, `ID -ERRNO`; a
      child that cannot be prepared says `!ID REASON` itself.
    setup: `plan`, `root`, `library_dirs`, `supervisor`, `n_tasks`.
    base_bytes: address space before a program adds to it.

  Returns:
    In a child: what it does. In the zygote: nothing, when it is over.
  """
  linux.die_with_parent()

  def ask_for_maps() -> None:
    sock.send(MAP_IDS)
    if not sock.recv(16):
      os._exit(1)

  try:
    confinement = confine.Confinement(
      plan_lib.Plan.from_json(setup["plan"]),
      setup["root"],
      setup["library_dirs"],
      ask_for_maps,
    )
  except (OSError, ValueError) as error:
    sock.send(f"{error}"[:500].encode())
    return None
  context = child.Context(
    sock=sock,
    confinement=confinement,
    supervisor=setup["supervisor"],
    n_tasks=setup["n_tasks"],
    base_bytes=base_bytes,
    library_dirs=setup["library_dirs"],
  )
  signal.signal(signal.SIGTERM, signal.SIG_DFL)
  gc.collect()
  gc.freeze()
  sock.send(CONFINED)
  return _fork_on_request(sock, context)


def _receive(sock: socket.socket) -> tuple[bytes, list[int]]:
  """Returns a request and its descriptors; b"" when nobody asks any more."""
  try:
    data, fds, _, _ = socket.recv_fds(sock, MAX_REQUEST, _MAX_FDS)
  except ConnectionError:
    return b"", []
  return data, fds


def _fork_on_request(
  sock: socket.socket, context: child.Context
) -> Next | None:
  births = (
    namespaces.PidNamespaces() if context.confinement.plan.namespaces else None
  )
  while True:
    data, fds = _receive(sock)
    if not data:
      return None
    request = json.loads(data)
    is_first = request["op"] == "init"
    try:
      if births is not None:
        if is_first:
          births.leave()
        else:
          births.enter(request["init"])
      flags = namespaces.NEWPID if is_first else 0
      pid = namespaces.clone(namespaces.SIBLING | flags)
    except OSError as error:
      pid = -(error.errno or 1)
    if pid == 0:
      if is_first:
        return functools.partial(confine.be_first_process, request["tag"])
      return functools.partial(child.run, child.Job(context, request, fds))
    for fd in fds:
      os.close(fd)
    sock.send(b"%d %d" % (request["id"], pid))
