"""The error that is the user's to mend; imports nothing."""


class UserError(Exception):
  """Bad input: one sentence that names the place and the remedy.

  `roc.main` prints it as `error: ...` without a traceback and exits with 2.
  Raise it for what a user wrote (a flag, a file, a field), never for a bug.
  """


def closest(name: str, known) -> str:
  """Returns ` (did you mean X?)` for the nearest known name, or nothing."""
  import difflib

  found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
  return f" (did you mean {found[0]}?)" if found else ""
