"""How a call or a session comes to life: ids, a pid namespace, a fork.

A birth that finds no zygote ready waits for one; its clock has not started.
"""

import dataclasses
import os
import typing
from collections.abc import Callable

from roc.host.sandbox import fleet as fleet_lib
from roc.host.sandbox import linux
from roc.host.sandbox import plan as plan_lib

# A program cannot do it: process 1 hears no signal from inside its namespace.
SHOT = "process 1 of the call was killed from outside"


@dataclasses.dataclass(frozen=True)
class Born:
  """What came of a birth.

  Attributes:
    pid: of the main process; 0 when there is none.
    init_pid: process 1 of its pid namespace; 0 without one.
    base_kb: resident size of what it was forked from.
    space_kb: address space of what it was forked from.
    why_not: why there is no main process.
  """

  pid: int = 0
  init_pid: int = 0
  base_kb: int = 0
  space_kb: int = 0
  why_not: str = ""


class Births:
  """Gives out tags and user ids, and asks zygotes for processes."""

  def __init__(self, fleet: fleet_lib.Fleet):
    self.fleet = fleet
    self._next_tag = linux.first_tag()
    self._free_uids: list[int] = []
    self._number = 0
    self._on_failure: dict[int, Callable[[str], None]] = {}
    self.n_open = 0  # requests whose answer is due
    self.inits: set[int] = set()  # alive, or dead and not yet reaped

  @property
  def plan(self) -> plan_lib.Plan:
    """The plan in force."""
    assert self.fleet.plan is not None
    return self.fleet.plan

  def open_uids(self) -> None:
    """Sets the user ids of the plan in force aside."""
    self._free_uids = []
    first = self.plan.first_uid
    if first is not None:
      self._free_uids = list(range(first, first + plan_lib.n_uids()))[::-1]

  def take_uid(self) -> int | None:
    """Returns an id that nothing else runs under; None where none are used."""
    return self._free_uids.pop() if self._free_uids else None

  def give_uid(self, uid: int | None) -> None:
    """Takes an id back, of which no process is left.

    It goes to the other end, so that it is not soon used again.
    """
    if uid is not None:
      self._free_uids.insert(0, uid)

  def new_tag(self) -> int:
    """Returns the next tag, see `linux.set_tag`."""
    self._next_tag -= 1
    return self._next_tag

  def begin(
    self,
    image: str,
    request: dict,
    fds: list[int],
    on_failure: Callable[[str], None],
    then: Callable[[Born], None],
  ) -> int:
    """Starts a process; `then` is told of it later, in the loop.

    Args:
      image: what it is to be forked from.
      request: what `child.Job` reads, without `id` and `init`.
      fds: that go with it; closed here, now or later.
      on_failure: told if the child cannot be prepared.
      then: told of the birth.

    Returns:
      A number for `forget`.
    """
    self._number += 1
    self._on_failure[self._number] = on_failure
    self.n_open += 1
    _Birth(self, self._number, image, request, fds, then).go_on()
    return self._number

  def forget(self, number: int) -> None:
    """Ends the interest in a birth's failure."""
    self._on_failure.pop(number, None)

  def fail(self, number: int, why: str) -> None:
    """Passes on why a child could not be prepared."""
    told = self._on_failure.get(number)
    if told is not None:
      told(why)

  def end_init(self, pid: int) -> None:
    """Kills a pid namespace with everything in it."""
    if pid in self.inits:
      linux.kill_quietly(pid)


class _Birth:
  """One birth, on its way."""

  def __init__(
    self,
    births: Births,
    number: int,
    image: str,
    request: dict,
    fds: list[int],
    then: Callable[[Born], None],
  ):
    self._births = births
    self._number = number
    self._image = image
    self._request = request
    self._fds = fds
    self._then = then
    self._base = 0, 0

  def go_on(self) -> None:
    """Asks a zygote, or waits for one."""
    try:
      self._ask()
    except OSError as error:  # a template that has just died
      self._end(Born(why_not=f"no zygote can be had: {error.strerror}"))

  def _ask(self) -> None:
    fleet = self._births.fleet
    image = fleet.best_image(self._image)
    why_not = fleet.images[image].failure or fleet.images[image].trouble
    if why_not:
      self._end(Born(why_not=why_not))
      return
    zygote = fleet.pick(image)
    if zygote is None:
      fleet.when_ready(image, self.go_on)
      return
    self._base = zygote.base_kb, zygote.space_kb
    zygote.ask(self._number, self._request, self._fds, self._got)

  def _got(self, pid: int, init_pid: int, why_not: str) -> None:
    if init_pid:
      self._births.inits.add(init_pid)
    self._end(Born(pid, init_pid, *self._base, why_not))

  def _end(self, born: Born) -> None:
    for fd in self._fds:
      os.close(fd)
    self._births.n_open -= 1
    self._then(born)


def request_for(
  tool: str,
  limits: dict,
  seed: str,
  tag: int,
  scratch: str,
  uid: int | None,
) -> dict[str, typing.Any]:
  """Returns what a child must know, as `Births.begin` takes it."""
  return {
    "tool": tool,
    "limits": limits,
    "seed": seed,
    "tag": tag,
    "scratch": scratch,
    "uid": uid,
  }
