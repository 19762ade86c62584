"""An epoll loop's table: which function is called when a descriptor reads."""

import select
from collections.abc import Callable


class Loop:
  """Descriptors with their handlers; one thread uses it."""

  def __init__(self):
    self._epoll = select.epoll()
    self._handlers: dict[int, Callable[[], None]] = {}

  def watch(self, fd: int, handler: Callable[[], None]) -> None:
    """Calls `handler` whenever there is something to read on `fd`."""
    self._handlers[fd] = handler
    self._epoll.register(fd, select.EPOLLIN)

  def unwatch(self, fd: int) -> None:
    """Takes `watch` back, before `fd` is closed; twice is no error."""
    if self._handlers.pop(fd, None) is not None:
      self._epoll.unregister(fd)

  def also_writable(self, fd: int, is_wanted: bool) -> None:
    """Wakes the loop too, or no longer, when `fd` takes more."""
    events = select.EPOLLIN | (select.EPOLLOUT if is_wanted else 0)
    self._epoll.modify(fd, events)

  def turn(self, timeout_s: float) -> None:
    """Waits for something to read and calls who asked for it."""
    for fd, _ in self._epoll.poll(timeout_s):
      handler = self._handlers.get(fd)
      if handler is not None:  # else an earlier one of this turn removed it
        handler()

  def close(self) -> None:
    """Gives back the descriptor."""
    self._epoll.close()
