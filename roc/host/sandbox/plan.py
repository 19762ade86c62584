"""How calls are to be confined: one frozen plan, the ladder of plans to try.

A plan is only a wish. `selfcheck` tries it out on the machine, and the first
plan of the ladder that holds is the one that is enforced and reported.
"""

import dataclasses
import os
import platform
import typing

from roc.host.sandbox import landlock, linux, namespaces, seccomp

# What a caller may switch off, to see what is left without it.
FEATURES = (
  "seccomp",
  "landlock",
  "own_uid",
  "direct_namespaces",
  "user_namespaces",
)
_UIDS = 4096  # ids set aside for one sandbox: slots and live sessions
_FIRST_UID = 1 << 20
_N_BLOCKS = 1 << 18
_PLENTY = 1 << 31  # an id space that holds every block
_SIGNAL_SCOPE_ABI = 6  # the first Landlock that confines signals


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a zygote and its children take on.

  Attributes:
    tier: one of `contract.TIERS`.
    has_filter: seccomp deny-list.
    landlock_abi: Landlock's version in use; 0 for none.
    namespaces: "" for none; "direct" with this user's own privilege; "user"
      inside a new user namespace.
    first_uid: of the ids that calls run under, one each; None to keep the
      trainer's.
    reads_all: the call keeps the right to read files of other users, because
      the interpreter lies where only root may look. Landlock still confines.
    read_paths: beside the interpreter, what calls may read.
  """

  tier: str
  has_filter: bool = False
  landlock_abi: int = 0
  namespaces: str = ""
  first_uid: int | None = None
  reads_all: bool = False
  read_paths: tuple[str, ...] = ()

  @property
  def confines_signals(self) -> bool:
    """Whether a call cannot signal the trainer's processes."""
    return bool(
      self.namespaces
      or self.first_uid is not None
      or self.landlock_abi >= _SIGNAL_SCOPE_ABI
    )

  @property
  def confines_memory(self) -> bool:
    """Whether a call cannot open the memory of the trainer's processes.

    A filter sees no paths, so below Landlock and without namespaces
    /proc/PID/mem must be closed by the processes themselves.
    """
    return bool(self.namespaces or self.landlock_abi)

  def to_json(self) -> dict:
    """Returns the fields as a JSON-able dict, inverse of `from_json`."""
    return dict(vars(self))

  @classmethod
  def from_json(cls, fields: dict) -> "Plan":
    """Returns the plan written by `to_json`."""
    values: dict[str, typing.Any] = {**fields}
    values["read_paths"] = tuple(values["read_paths"])
    return cls(**values)


@dataclasses.dataclass(frozen=True)
class Machine:
  """What can be told of a machine without trying anything out."""

  is_root: bool
  capabilities: int
  has_filter: bool
  landlock_abi: int
  has_clone: bool
  is_interpreter_public: bool
  first_uid: int | None  # None where no ids can be set aside

  @classmethod
  def look(cls, interpreter_dirs: list[str]) -> "Machine":
    """Returns this machine, for this process."""
    held = linux.effective_capabilities()
    needed = (
      linux.CAP_SETUID | linux.CAP_SETGID | linux.CAP_CHOWN | linux.CAP_KILL
    )
    may_drop = os.getuid() == 0 and held & needed == needed
    return cls(
      is_root=os.getuid() == 0,
      capabilities=held,
      has_filter=seccomp.is_supported(),
      landlock_abi=landlock.abi(),
      has_clone=namespaces.is_supported(),
      is_interpreter_public=all(map(_is_public, interpreter_dirs)),
      first_uid=_own_block() if may_drop else None,
    )


def ladder(
  machine: Machine,
  *,
  tier: str | None = None,
  without: tuple[str, ...] = (),
  read_paths: tuple[str, ...] = (),
) -> list[Plan]:
  """Returns the plans to try, strongest first.

  Args:
    machine: where they are to hold.
    tier: the one tier that is wanted; None for any.
    without: `FEATURES` to leave aside.
    read_paths: for `Plan.read_paths`.
  """
  has_filter = machine.has_filter and "seccomp" not in without
  abi = 0 if "landlock" in without else machine.landlock_abi
  uid = None if "own_uid" in without else machine.first_uid
  reads_all = uid is not None and not machine.is_interpreter_public
  if reads_all and not machine.capabilities & linux.CAP_DAC_READ_SEARCH:
    # Another user could not start Python: stay who we are, without rights.
    uid, reads_all = None, False
  confined = Plan(
    "confined", has_filter, abi, "", uid, reads_all, tuple(read_paths)
  )
  plans = []
  if has_filter and abi:
    if machine.has_clone:
      modes = ["direct"] if machine.capabilities & linux.CAP_SYS_ADMIN else []
      for mode in [*modes, "user"]:
        if f"{mode}_namespaces" not in without:
          plans.append(
            dataclasses.replace(confined, tier="isolated", namespaces=mode)
          )
    plans.append(confined)
  if has_filter:
    plans.append(Plan("filtered", has_filter=True))
  plans.append(Plan("process"))
  return [p for p in plans if tier in (None, p.tier)]


def n_uids() -> int:
  """How many ids a plan with `first_uid` may hand out."""
  return _UIDS


def _own_block() -> int | None:
  """The first of `_UIDS` ids that no other sandbox of this machine uses.

  Sandboxes that live at the same time differ in their pid, so blocks are
  numbered by it.
  """
  with open("/proc/self/uid_map") as f:
    spaces = [tuple(map(int, line.split())) for line in f]
  if any(first == 0 and count >= _PLENTY for first, _, count in spaces):
    return _FIRST_UID + os.getpid() % _N_BLOCKS * _UIDS
  # A container with its own few ids: leave those below 10,000 to its users.
  top = max((first + count for first, _, count in spaces), default=0)
  n_blocks = (top - 10_000) // _UIDS
  if n_blocks < 1:
    return None
  return 10_000 + os.getpid() % n_blocks * _UIDS


def _is_public(path: str) -> bool:
  """Whether every user may list `path` and walk to it."""
  path = os.path.realpath(path)
  try:
    if os.stat(path).st_mode & 0o005 != 0o005:
      return False
    while path != "/":
      path = os.path.dirname(path)
      if not os.stat(path).st_mode & 0o001:
        return False
  except OSError:
    return False
  return True


def describe(plan: Plan) -> dict:
  """Returns what a run's record says of a plan."""
  return {
    "tier": plan.tier,
    "seccomp": plan.has_filter,
    "landlock_abi": plan.landlock_abi,
    "namespaces": plan.namespaces or None,
    "own_uid": plan.first_uid is not None,
    "reads_all": plan.reads_all,
    "machine": platform.machine(),
  }


def missing(machine: Machine, without: tuple[str, ...]) -> str:
  """Returns which parts the machine lacks or the caller switched off."""
  lacks = [
    name
    for name, is_there in (
      ("seccomp", machine.has_filter),
      ("Landlock", machine.landlock_abi > 0),
      ("clone(2) on this processor", machine.has_clone),
    )
    if not is_there
  ]
  parts = [f"no {name}" for name in lacks]
  parts += [f"{name} is switched off" for name in without]
  return ", ".join(parts) or "a part of it is missing"
