"""Finds the strongest plan that holds on this machine, by trying each out."""

import os
from collections.abc import Callable

from roc.host.sandbox import contract, fleet, plan, routing, selfcheck


class Ascent:
  """Puts one plan after the other in force until one holds.

  Args:
    fleet: whose zygotes take the plans on.
    root: the sandbox's directory.
    turn: lets the supervisor's loop go on for a moment.
    run: runs a call under the plan in force and returns its result.
  """

  def __init__(
    self,
    fleet: fleet.Fleet,
    root: str,
    turn: Callable[[], None],
    run: Callable[[dict], contract.ToolResult],
  ):
    self._fleet = fleet
    self._root = root
    self._turn = turn
    self._run = run

  def climb(self, config: dict) -> list[dict]:
    """Leaves the first plan of the ladder that holds in force.

    Args:
      config: `tier`, `without`, `read_paths`, as `plan.ladder` takes them.

    Returns:
      What was tried: tier, namespaces, and why it does not hold ("" if so).

    Raises:
      contract.SandboxError: none holds.
    """
    bare = self._fleet.images[routing.BARE]
    self._fleet.load(routing.BARE)
    while not bare.is_loaded and not bare.failure:
      self._turn()
    if bare.failure:
      raise contract.SandboxError(bare.failure)
    dirs = [d for d in self._fleet.library_dirs if os.path.isdir(d)]
    machine = plan.Machine.look(dirs)
    plans = plan.ladder(
      machine,
      tier=config["tier"],
      without=tuple(config["without"]),
      read_paths=tuple(config["read_paths"]),
    )
    tried = []
    for wish in plans:
      why_not = self._try(bare, wish)
      kind = {"tier": wish.tier, "namespaces": wish.namespaces or None}
      tried.append({**kind, "why_not": why_not})
      if not why_not:
        self._fleet.add_zygotes(bare)
        return tried
    reasons = "; ".join(f"{t['tier']}: {t['why_not']}" for t in tried)
    wanted = f"tier {config['tier']!r}" if config["tier"] else "any tier"
    reasons = reasons or plan.missing(machine, tuple(config["without"]))
    raise contract.SandboxError(f"{wanted} cannot be had here ({reasons})")

  def _try(self, bare: fleet.Image, wish: plan.Plan) -> str:
    """Puts a plan in force and attacks it; returns why it does not hold."""
    made = self._fleet.add_zygote(bare, wish)
    while not made.is_ready and made in bare.zygotes:
      self._turn()
    if not made.is_ready:
      return made.failure
    self._fleet.plan = wish
    with selfcheck.targets(self._root) as targets:
      result = self._run(selfcheck.message(targets))
      why_not = selfcheck.why_not(wish, result, targets)
    if why_not:
      self._fleet.plan = None
      self._fleet.drop(made)
    return why_not
