"""The exec'd entry point: `python -s -S -P boot.py CHANNEL_FD SCRATCH_ROOT`.

Run by path, so that it works from a checkout and from an installed package
alike and imports nothing but this directory and `roc.layout`: the packages
above are stood up empty, their `__init__` never runs.
"""

import os
import sys
import types


def _stand_up_packages() -> None:
  here = os.path.dirname(os.path.abspath(__file__))
  host = os.path.dirname(here)
  for name, path in (
    ("roc", os.path.dirname(host)),
    ("roc.host", host),
    ("roc.host.sandbox", here),
  ):
    package = types.ModuleType(name)
    package.__path__ = [path]
    sys.modules[name] = package


def main(argv: list[str]) -> None:
  """Starts keeper and supervisor; in what is forked later, runs its job.

  Each loop returns in the process that it has forked what is to be done there,
  and returns nothing where it is over; see `zygote`.
  """
  _stand_up_packages()
  from roc.host.sandbox import hooks

  hooks.hold_back()
  from roc.host.sandbox import keeper, supervisor

  # A trainer with many files open hands over a high number: take a low one,
  # so that a small limit on descriptors is enough.
  channel_fd, root = os.dup(int(argv[1])), argv[2]
  os.close(int(argv[1]))
  keeper.split(channel_fd, root)  # the parent stays in there to its end
  go = supervisor.serve(channel_fd, root)
  kept = []  # what is freed here is pages copied in every child
  while go is not None:
    kept.append(go)
    go = go()


if __name__ == "__main__":
  main(sys.argv)
