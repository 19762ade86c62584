"""What a program finds inside, in the words that the model is told it in."""

import importlib.util

from roc.host.sandbox import routing

_NAMED = routing.IMAGES["maths"]


def is_installed(module: str) -> bool:
  """Whether a module's package is there; nothing is imported to tell."""
  return importlib.util.find_spec(module.partition(".")[0]) is not None


def surroundings() -> str:
  """Returns which packages and what network a program has, for the prompt.

  Programs run in this interpreter, so what it can import they can. Only the
  packages that a mathematical program would ask for are named: the sentence is
  the same on every machine that has them.
  """
  found = [name for name in _NAMED if is_installed(name)]
  there = "Only the standard library is"
  if found:
    there = f"The standard library and {', '.join(found)} are"
  return f"{there} installed; there is no network."
