"""What every child starts with: the image that a template loads and freezes."""

import atexit
import gc
import importlib
import io
import os
import site
import sys
import typing

from roc.host.sandbox import linux

# What programs of this kind import: forked warm, they cost nothing.
PRELOAD = (
  *("math", "cmath", "numbers", "fractions", "decimal", "random"),
  *("statistics", "itertools", "functools", "operator", "collections"),
  *("heapq", "bisect", "json", "re", "string", "textwrap", "datetime"),
  *("copy", "dataclasses", "typing", "traceback"),
)
# One use of each fills the caches that every first use would fill again.
_WARM_UP = {
  "numpy": "import numpy; numpy.linalg.solve(numpy.eye(2), numpy.ones(2))",
  "sympy": (
    "import sympy; x = sympy.Symbol('x'); sympy.factor(x**2 - 1);"
    " sympy.solve(x**2 - 2, x); sympy.simplify((x**2 - 1) / (x - 1))"
  ),
  "math_verify": (
    "from math_verify import parse, verify;"
    " verify(parse(r'$\\frac{x}{2}+1$'), parse('$0.5x+1$'))"
  ),
}


def load(site_dirs: list[str], preload: list[str]) -> None:
  """Makes this interpreter one that a program can be forked into.

  Args:
    site_dirs: where installed packages lie; `-S` left them out.
    preload: modules to load beside `PRELOAD`.

  Raises:
    ImportError: a module of `preload` is not there.
  """
  _open_streams()
  sys.path.extend(site_dirs)
  for name in (*PRELOAD, *preload):
    importlib.import_module(name)
    exec(_WARM_UP.get(name, ""), {})
  site.setquit()  # `exit()`, as in a plain script; `-S` left it out
  site.sethelper()


def freeze() -> None:
  """Last step before serving: children share what is loaded now."""
  atexit._clear()  # a child runs its own handlers, not ours
  # Programs do not see the sandbox's own modules by importing them.
  for name in [n for n in sys.modules if n.split(".")[0] == "roc"]:
    del sys.modules[name]
  gc.collect()
  gc.freeze()
  linux.collapse_memory()


def library_dirs() -> list[str]:
  """Returns the directories whose names a traceback must not show."""
  dirs = [p for p in sys.path if os.path.isabs(p)]
  return [*dirs, sys.prefix, sys.base_prefix]


def _open_streams() -> None:
  """Makes the standard streams that every child inherits.

  A child only puts its pipes under them: building them anew in every child
  would copy some ninety pages. A stream remembers whether it can seek, so fds 1
  and 2 are pipes while they are made.
  """
  log = os.dup(2)
  read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
  os.dup2(write_fd, 1)
  os.dup2(write_fd, 2)
  _open_over_standard_fds()
  os.dup2(log, 1)
  os.dup2(log, 2)
  for fd in (log, read_fd, write_fd):
    os.close(fd)


def _open_over_standard_fds() -> None:
  sys.stdin = sys.__stdin__ = io.TextIOWrapper(
    io.BufferedReader(io.FileIO(0, closefd=False)),
    encoding="utf-8",
    errors="surrogateescape",
  )
  for fd, name in ((1, "stdout"), (2, "stderr")):
    stream = open_output(fd)
    setattr(sys, name, stream)
    setattr(sys, f"__{name}__", stream)


def open_output(fd: int) -> io.TextIOWrapper:
  """Returns a stream over a descriptor, unbuffered like those of `python -u`.

  What a killed program printed is not lost.
  """
  return io.TextIOWrapper(
    typing.cast(typing.BinaryIO, io.FileIO(fd, "w", closefd=False)),
    encoding="utf-8",
    errors="backslashreplace",
    newline="\n",
    write_through=True,
  )
