"""The supervisor's templates and zygotes: start, confine, ask, replace.

Templates are forked from the supervisor while it is still pristine, so that
none ever holds another call's code. Zygotes are forked from templates whenever
one is missing.
"""

import collections
import functools
import json
import os
import socket
import typing
from collections.abc import Callable

from roc.host.sandbox import linux, loop, namespaces, routing, wire, zygote
from roc.host.sandbox import plan as plan_lib

_REPLY_BYTES = 1 << 12
_MAX_FAILURES = 20  # in a row

# Called with the pid of what was forked, process 1 of its pid namespace (0 for
# none), and why there is nothing, if so.
OnForked = Callable[[int, int, str], None]


class Zygote:
  """A process that forks on request."""

  def __init__(self, image: str, sock: socket.socket):
    self.image = image
    self.sock = sock
    self.pid = 0
    self.is_ready = False
    self.failure = ""
    # Its resident size and address space, when it was ready.
    self.base_kb = self.space_kb = 0
    self.spare = 0  # process 1 of the pid namespace that it has ready
    self.midwife = 0  # the process that makes these, where it cannot itself
    self.asked: dict[int, OnForked] = {}

  def ask(
    self, number: int, request: dict, fds: list[int], then: OnForked
  ) -> None:
    """Asks for a fork; `then` is called in the loop when it is answered."""
    self.asked[number] = then
    data = json.dumps({**request, "id": number}).encode()
    try:
      socket.send_fds(self.sock, [data], fds)
    except OSError as error:
      del self.asked[number]
      then(0, 0, f"a zygote does not take requests: {error.strerror}")

  def fail(self, why: str) -> None:
    """Answers everything that was asked of a zygote that is gone."""
    asked, self.asked = self.asked, {}
    for then in asked.values():
      then(0, 0, why)


class Image:
  """A template, its zygotes, and what waits for it to be loaded."""

  def __init__(self, name: str, sock: socket.socket, pid: int):
    self.name = name
    self.sock = sock
    self.pid = pid
    self.is_loaded = False
    self.is_asked_to_load = False
    self.failure = ""  # why it can never be used
    self.trouble = ""  # why it cannot be used just now
    self.zygotes: list[Zygote] = []
    self.waiting: collections.deque[Callable[[], None]] = collections.deque()
    self.n_failed = 0  # zygotes in a row that died before they were ready
    self.unnamed: collections.deque[Zygote] = collections.deque()


class Fleet:
  """All images of a supervisor.

  Args:
    root: the sandbox's directory.
    n_zygotes: of each image, when it is used.
    events: the supervisor's loop.
    on_setup_failure: called with a request's number and why the child that it
      asked for could not be prepared.
  """

  def __init__(
    self,
    root: str,
    n_zygotes: int,
    events: loop.Loop,
    on_setup_failure: Callable[[int, str], None],
  ):
    self.images: dict[str, Image] = {}
    self.plan: plan_lib.Plan | None = None
    self.library_dirs: list[str] = []
    self._root = root
    self._n_zygotes = n_zygotes
    self._events = events
    self._on_setup_failure = on_setup_failure
    self._n_tasks = linux.tasks_of_user()
    self._guarded = _ancestry()
    self._turn = 0
    # Reaped while a template's answer was due, which may name them yet.
    self._gone: set[int] = set()
    # Nobody writes into it. Only the supervisor holds the writing end, so that
    # the reading end tells when it is dead.
    self._lifeline = (-1, -1)

  # -------------------------------------------------------------- templates

  def fork_templates(
    self, modules: dict[str, list[str]], site_dirs: list[str]
  ) -> zygote.Next | None:
    """Forks a template for each image; none loads before `load`.

    Args:
      modules: what each image is to hold.
      site_dirs: where installed packages lie.

    Returns:
      In a template: what it does. In the supervisor: None.
    """
    for name, wanted in modules.items():
      ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
      pid = os.fork()
      if pid == 0:
        ours.close()
        for image in self.images.values():
          image.sock.close()
        return functools.partial(_load_when_told, theirs, site_dirs, wanted)
      theirs.close()
      ours.setblocking(False)
      self.images[name] = Image(name, ours, pid)
    self._lifeline = os.pipe()
    return None

  def load(self, name: str) -> None:
    """Has a template load its image; asking again does nothing."""
    image = self.images[name]
    if not image.is_asked_to_load:
      image.is_asked_to_load = True
      image.sock.send(b"load")
      self._events.watch(
        image.sock.fileno(), functools.partial(self._hear_template, image)
      )

  def _hear_template(self, image: Image) -> None:
    data = _receive(image.sock)
    if data is None:
      return
    if image.is_loaded and data:
      self._name(image, data)
      return
    if data == b"ready":
      image.is_loaded = True
      if self.plan is not None:
        self.add_zygotes(image)
    else:
      told = data.decode("utf-8", "replace")
      image.failure = image.failure or told or "its template died"
      self._events.unwatch(image.sock.fileno())
    self._release_waiting(image)

  def _release_waiting(self, image: Image) -> None:
    # Whoever finds it not ready yet waits again, in a new queue.
    waiting, image.waiting = image.waiting, collections.deque()
    for then in waiting:
      then()

  # ---------------------------------------------------------------- zygotes

  def add_zygotes(self, image: Image) -> None:
    """Brings an image up to its number of zygotes, under the chosen plan."""
    assert self.plan is not None
    while len(image.zygotes) < self._n_zygotes and not image.failure:
      self.add_zygote(image, self.plan)

  def add_zygote(self, image: Image, plan: plan_lib.Plan) -> Zygote:
    """Has a template fork one zygote, which then takes on `plan`."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    setup = {
      "plan": plan.to_json(),
      "root": self._root,
      "library_dirs": self.library_dirs,
      "supervisor": os.getpid(),
      "guarded": [*self._guarded, *(i.pid for i in self.images.values())],
      "n_tasks": self._n_tasks,
    }
    ours.setblocking(False)
    made = Zygote(image.name, ours)
    with theirs:
      fds = [theirs.fileno(), self._lifeline[0]]
      socket.send_fds(image.sock, [json.dumps(setup).encode()], fds)
    image.unnamed.append(made)
    image.zygotes.append(made)
    hear = functools.partial(self._hear_zygote, image, made, plan)
    self._events.watch(ours.fileno(), hear)
    return made

  def _hear_zygote(
    self, image: Image, made: Zygote, plan: plan_lib.Plan
  ) -> None:
    data = _receive(made.sock)
    if data is None:
      return
    if made.is_ready and data:
      if not self._take_answer(made, data):
        self.drop(made)
    elif helpers := wire.numbers(data, zygote.CONFINED, 2):
      made.spare, made.midwife = helpers
      if pid := self._pid_of(made):
        made.is_ready, image.n_failed = True, 0
        made.space_kb, made.base_kb = linux.memory_kb(pid)
        self._release_waiting(image)
    elif data == zygote.MAP_IDS:
      self._map_ids(made, plan)
    else:
      if not made.is_ready:
        made.failure = data.decode("utf-8", "replace") or "a zygote died"
      self.drop(made)

  def _take_answer(self, made: Zygote, data: bytes) -> bool:
    """Passes an answer on; False when it is none that a zygote gives."""
    head, why = data.split(b" ", 2)[:2], data.split(b" ", 2)[2:]
    if failed := wire.numbers(b" ".join(head), zygote.FAILED, 1):
      told = b" ".join(why).decode("utf-8", "replace")
      self._on_setup_failure(failed[0], told)
      return True
    pid = error = 0
    if forked := wire.numbers(data, zygote.FORKED, 4):
      number, pid, init_pid, spare = forked
    elif refused := wire.numbers(data, zygote.REFUSED, 4):
      number, error, init_pid, spare = refused
    else:
      return False
    then = made.asked.pop(number, None)
    if then is None:
      return False
    made.spare = spare
    if error:
      linux.kill_marked(init_pid)
      then(0, 0, f"no process could be started: {os.strerror(error)}")
    else:
      then(pid, init_pid, "")
    return True

  def _map_ids(self, made: Zygote, plan: plan_lib.Plan) -> None:
    pid = self._pid_of(made)
    if not pid:
      return
    if plan.first_uid is None:
      uids, gids = [[os.getuid(), 1]], [[os.getgid(), 1]]
    else:
      uids = gids = [[0, 1], [plan.first_uid, plan_lib.n_uids()]]
    try:
      namespaces.write_id_maps(pid, uids, gids, plan.first_uid is not None)
    except OSError as error:
      made.failure = f"id maps: {error.strerror}"
      self.drop(made)
      return
    made.sock.send(b"go")

  def _pid_of(self, made: Zygote) -> int:
    """Returns its pid, or 0 if it was dead already and is dropped now."""
    image = self.images[made.image]
    while made in image.unnamed:  # its template's answer is on the way
      image.sock.setblocking(True)
      try:
        data = image.sock.recv(_REPLY_BYTES)
      finally:
        image.sock.setblocking(False)
      self._name(image, data)
    return made.pid

  def _name(self, image: Image, data: bytes) -> None:
    """Takes a template's answer: the pid of the zygote that it forked last.

    One that was reaped before has nobody to say so again: what it forked may
    hold its socket open.
    """
    named = wire.numbers(data, zygote.FORKED, 1)
    if named is None or not image.unnamed:
      raise EOFError("a template died")
    made = image.unnamed.popleft()
    made.pid = named[0]
    if made.pid in self._gone:
      made.pid = 0
      self.drop(made)
    if not any(i.unnamed for i in self.images.values()):
      self._gone.clear()

  def drop(self, made: Zygote) -> None:
    """Forgets a zygote that is dead, or is to be; its calls live on."""
    image = self.images[made.image]
    if made not in image.zygotes:
      return
    image.zygotes.remove(made)
    self._events.unwatch(made.sock.fileno())
    made.sock.close()
    for pid in (made.pid, made.midwife, made.spare):
      if pid:
        linux.kill_quietly(pid)
    made.fail("the zygote died")
    if self.plan is None:
      return
    image.n_failed += not made.is_ready
    if image.n_failed > _MAX_FAILURES:
      # Whoever waits is told, and may try again.
      image.n_failed = 0
      image.trouble = made.failure or "zygotes die before they are ready"
      self._release_waiting(image)
      image.trouble = ""
    self.add_zygotes(image)

  def pick(self, name: str) -> Zygote | None:
    """Returns the zygote of an image that has least to do.

    Returns:
      None when the image is not ready; `when_ready` says when it is.
    """
    ready = [z for z in self.images[name].zygotes if z.is_ready]
    if not ready:
      return None
    self._turn += 1
    start = self._turn % len(ready)
    return min(ready[start:] + ready[:start], key=lambda z: len(z.asked))

  def best_image(self, name: str) -> str:
    """Returns `name`, or the bare image where that one cannot be loaded."""
    usable = name in self.images and not self.images[name].failure
    return name if usable else routing.BARE

  def when_ready(self, name: str, then: Callable[[], None]) -> None:
    """Calls `then` when the image may have a zygote, loading it if need be."""
    self.load(name)
    self.images[name].waiting.append(then)

  def pids(self) -> set[int]:
    """Returns the pids of templates, zygotes and what these have ready."""
    images = self.images.values()
    return {i.pid for i in images} | {
      pid
      for i in images
      for z in i.zygotes
      for pid in (z.pid, z.spare, z.midwife)
    }

  def reaped(self, pid: int) -> bool:
    """Replaces a zygote that died; False where `pid` was none.

    What it forked holds copies of its socket, whose end says nothing.

    Raises:
      EOFError: it was a template: only a new supervisor can make new ones.
    """
    for image in self.images.values():
      if pid == image.pid:
        raise EOFError("a template died")
      for made in image.zygotes:
        if pid == made.pid:
          made.pid = 0
          self.drop(made)
          return True
    if any(image.unnamed for image in self.images.values()):
      self._gone.add(pid)
    return False


def _ancestry() -> list[int]:
  """Returns supervisor, keeper and trainer, and their process groups.

  With any of these other calls would end than the one that signals it.
  """
  supervisor, keeper = os.getpid(), os.getppid()
  pids = [supervisor, keeper, linux.parent(keeper)]
  return sorted({*pids, *(os.getpgid(pid) for pid in pids if pid)} - {0})


def _load_when_told(
  sock: socket.socket, site_dirs: list[str], modules: list[str]
) -> typing.Any:
  linux.die_with_parent()
  if not sock.recv(16):
    return None
  return functools.partial(zygote.template, sock, site_dirs, modules)


def _receive(sock: socket.socket) -> bytes | None:
  """Returns one message, b"" at the end, None when there is nothing now."""
  try:
    return sock.recv(_REPLY_BYTES)
  except BlockingIOError:
    return None
  except OSError:
    return b""
