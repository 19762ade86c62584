"""Takes a plan on: what a zygote does once, and what each child does.

The order matters. Namespaces and mounts need privileges, Landlock forbids
mounting, a change of user drops the rest, and the filter comes last because it
denies what the steps before it call.
"""

import contextlib
import os
import sys
from collections.abc import Callable

from roc.host.sandbox import landlock, linux, namespaces, seccomp
from roc.host.sandbox import plan as plan_lib

HOSTNAME = "sandbox"
BOX = "box"  # under the sandbox's root: where an isolated call's disk is
_SHARED = (
  namespaces.NEWNS | namespaces.NEWNET | namespaces.NEWIPC | namespaces.NEWUTS
)


class Confinement:
  """A plan that a zygote has taken on and that its children complete.

  Args:
    plan: the wish.
    root: the sandbox's directory.
    library_dirs: where the interpreter's modules lie.
    guarded: processes and groups that a call must not signal, for plans under
      which it could.
    ask_for_maps: called inside a new user namespace; returns when a process
      outside has written its id maps.

  Raises:
    OSError: the machine does not allow it.
  """

  def __init__(
    self,
    plan: plan_lib.Plan,
    root: str,
    library_dirs: list[str],
    guarded: list[int],
    ask_for_maps: Callable[[], None],
  ):
    self.plan = plan
    self.box = os.path.join(root, BOX) if plan.namespaces else ""
    self._has_safe_mounts = False
    if plan.namespaces:
      self._enter_namespaces(ask_for_maps)
    self._filter = self._rules = None
    if plan.has_filter:
      self._filter = seccomp.Filter.prepare(
        may_change_metadata=self._may_change_metadata,
        landlock_abi=plan.landlock_abi,
        guarded=() if plan.confines_signals else (*guarded, os.getpid()),
      )
    if plan.landlock_abi:
      # A virtual environment's interpreter finds its modules by this file.
      folder = os.path.dirname(os.path.dirname(sys.executable))
      dirs = [os.path.join(folder, "pyvenv.cfg"), *filter(None, library_dirs)]
      self._rules = landlock.Ruleset.prepare(
        [*landlock.default_read_paths(dirs), *plan.read_paths],
        landlock.default_device_paths(),
      )

  @property
  def _may_change_metadata(self) -> bool:
    """Whether modes, owners and times of others' files are safe anyway."""
    return self._has_safe_mounts or self.plan.first_uid is not None

  def _enter_namespaces(self, ask_for_maps: Callable[[], None]) -> None:
    flags = _SHARED
    if self.plan.namespaces == "user":
      flags |= namespaces.NEWUSER
    namespaces.unshare(flags)
    if self.plan.namespaces == "user":
      ask_for_maps()
    namespaces.keep_mounts_private()
    with contextlib.suppress(OSError):  # before Linux 5.12
      namespaces.make_mounts_read_only()
      self._has_safe_mounts = True
    namespaces.set_hostname(HOSTNAME)

  def enter_scratch(
    self, scratch: str, n_bytes: int, n_entries: int, uid: int | None
  ) -> str:
    """Makes the call's directory the current one; returns its path.

    Args:
      scratch: the directory that the supervisor made.
      n_bytes: size of the directory, if it is one in memory.
      n_entries: files in it, if it is one in memory.
      uid: that the call will run under.
    """
    if self.plan.namespaces:
      namespaces.unshare(namespaces.NEWNS)
      namespaces.mount_tmpfs(self.box, n_bytes, n_entries, uid)
      scratch = self.box
    os.chdir(scratch)
    return scratch

  def lock(self, scratch: str, uid: int | None, apply: Callable) -> None:
    """Gives up everything for good, in a child; `apply` sets its limits.

    Args:
      scratch: the one place that may be written to.
      uid: to run under from now on; None to stay.
      apply: called when privileges are gone and system calls are still free.
    """
    if self._rules is not None:
      self._rules.restrict(scratch)
    kept = linux.CAP_DAC_READ_SEARCH if self.plan.reads_all else 0
    if uid is not None:
      linux.become(uid, kept)
      linux.show_memory()
    elif self.plan.landlock_abi:
      linux.hold_capabilities(0)
    else:  # root without a boundary: what it may read and write, it may
      linux.hold_capabilities(
        linux.CAP_DAC_OVERRIDE | linux.CAP_DAC_READ_SEARCH
      )
    linux.die_with_parent()  # a change of user forgets this
    apply()
    if not self.plan.confines_memory:
      linux.show_memory()  # the zygote's is hidden; the supervisor reads sizes
    if self._filter is not None:
      self._filter.install()
