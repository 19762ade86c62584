"""What modules want done at a fork, held back until a program may fork.

`threading` and `random` renew themselves after every fork. A process with one
thread that seeds anyway needs neither, and each copies pages in every child.
"""

import os
import typing

_register = os.register_at_fork
_held: list[dict[str, typing.Any]] = []


def hold_back() -> None:
  """Collects what is registered from now on; call it before other imports."""
  os.register_at_fork = lambda **hooks: _held.append(hooks)


def register() -> None:
  """Registers it all, for the forks of programs."""
  os.register_at_fork = _register
  while _held:
    _register(**_held.pop(0))
