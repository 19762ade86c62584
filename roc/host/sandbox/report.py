"""What a failing program's stderr says: the model's own frames, nothing else.

The text becomes tokens of a trajectory, so it must be the same on every host:
no path of the interpreter or of the scratch directory, no frame of the runner
or of a library. The program's file is called `<tool>`.
"""

import inspect
import io
import linecache
import os
import re
import sys
import threading
import traceback
import typing
import warnings

TOOL_FILE = "<tool>"

_getfile = inspect.getfile
_TracebackException = traceback.TracebackException


def show_source(file: str, code: str) -> None:
  """Lets tracebacks and `inspect` quote the lines of `file`, such as `<tool>`.

  Lines end where Python ends them: not at the other characters at which
  `str.splitlines` does.
  """
  lines = io.StringIO(code).readlines()
  linecache.cache[file] = (len(code), None, lines, file)


def find_file(object: typing.Any) -> str:
  """`inspect.getfile` that finds the programs' own classes too.

  The original asks for the file of a class' module, and all cells are one. So
  the newest cell is taken that defines such a class; from Python 3.13 on, which
  notes its line, one that does so there.
  """
  if isinstance(object, type) and object.__module__ == "__main__":
    line = getattr(object, "__firstlineno__", None)
    opening = rf"[ \t]*class {re.escape(object.__name__)}\b"
    found = (
      re.compile(rf"(?m)^{opening}").search
      if line is None
      else re.compile(rf"(?:[ \t]*@.*\n)*{opening}").match
    )
    files = [file for file in linecache.cache if file.startswith("<tool")]
    for file in reversed(files):
      if found("".join(linecache.getlines(file)[(line or 1) - 1 :])):
        return file
  return _getfile(object)


class Reporter:
  """Formats exceptions for one call; knows which paths to hide."""

  def __init__(self, library_dirs: list[str]):
    """Args: library_dirs, of which the longest match wins."""
    self.scratch = "\0"  # no path
    self._scratch = self.scratch
    dirs = sorted((d for d in library_dirs if d), key=len, reverse=True)
    self._library_dirs = [os.path.join(d, "") for d in dirs]

  def hide(self, scratch: str) -> None:
    """Has `scratch`, the call's directory, left out of what is shown."""
    self.scratch = scratch
    self._scratch = os.path.join(scratch, "")

  def install(self) -> None:
    """Makes all the interpreter's own reports go through this object."""
    sys.excepthook = self._excepthook
    threading.excepthook = lambda args: self.write(args.exc_value)
    sys.unraisablehook = lambda args: self.write(args.exc_value)
    warnings.formatwarning = self._format_warning
    inspect.getfile = find_file

  def text(self, error: BaseException) -> str:
    """Returns the traceback of `error`, chained causes included."""
    report = _TracebackException(type(error), error, error.__traceback__)
    self._prune(report, 0)
    return self.scrub("".join(report.format()))

  def scrub(self, text: str) -> str:
    """Returns `text` with paths of the scratch directory and libraries cut."""
    text = text.replace(self._scratch, "")
    for prefix in self._library_dirs:
      text = text.replace(prefix, "")
    return text

  def write(self, error: BaseException | None) -> None:
    """Writes the traceback of `error` to stderr."""
    if error is None or isinstance(error, SystemExit):
      return
    stream = sys.stderr if sys.stderr is not None else io.StringIO()
    stream.write(self.text(error))
    stream.flush()

  def _excepthook(self, kind, error, tb) -> None:
    del kind, tb
    self.write(error)

  def _format_warning(self, message, category, filename, lineno, line=None):
    del line
    shown = self._shown(filename)
    where = f"{shown}:{lineno}: " if shown is not None else ""
    return self.scrub(f"{where}{category.__name__}: {message}\n")

  def _shown(self, filename: str) -> str | None:
    """The name a frame's file goes by, or None to hide the frame."""
    if filename.startswith("<") and not filename.startswith("<frozen "):
      return filename  # `<tool>`, and what it compiles by exec: `<string>`
    if filename.startswith(self._scratch):
      return filename[len(self._scratch) :]
    return None

  def _prune(self, report, depth: int) -> None:
    if depth > 50:
      return
    stack = []
    for frame in report.stack:
      shown = self._shown(frame.filename)
      if shown is not None:
        frame.filename = shown
        stack.append(frame)
    # CPython prints no "Traceback" header above a bare SyntaxError.
    report.stack = traceback.StackSummary.from_list(stack) if stack else None
    below = [report.__cause__, report.__context__]
    below.extend(getattr(report, "exceptions", None) or ())
    for other in below:
      if other is not None:
        self._prune(other, depth + 1)
