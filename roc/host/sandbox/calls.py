"""One call on the trainer's side, from `submit` until its future is done."""

import concurrent.futures
import dataclasses
import hashlib
import operator
import time

from roc import layout
from roc.host.sandbox import contract, payload, routing

Future = concurrent.futures.Future[contract.ToolResult]


@dataclasses.dataclass(eq=False)
class Call:
  """A submitted call; `retries` counts supervisors that it was lost with.

  `message` asks a supervisor to run it; code and input go with it in files.
  """

  id: int
  trajectory: contract.Trajectory
  message: dict
  future: Future
  submitted: float
  code: str = ""
  stdin: bytes = b""
  retries: int = 0
  is_cancelled: bool = False

  @property
  def session(self) -> str:
    """Name of the session it belongs to; "" for none."""
    return self.message["session"]

  @classmethod
  def new(
    cls,
    call_id: int,
    code: str,
    stdin: str | bytes,
    tool: str,
    trajectory: contract.Trajectory,
    limits: contract.Limits,
    seed: str,
  ) -> "Call":
    """Returns a call and the message that asks a supervisor to run it."""
    message = {
      "op": "call",
      "id": call_id,
      "tool": tool,
      "session": session_name(trajectory) if tool == "session" else "",
      "image": routing.image_for(code),
      "limits": limits.to_json(),
      "seed": seed,
    }
    future: Future = concurrent.futures.Future()
    data = contract.stdin_bytes(stdin)
    start = time.monotonic()
    return cls(call_id, trajectory, message, future, start, code, data)

  def program(self) -> payload.Program:
    """Returns code and input as files in memory, which are the caller's.

    The supervisor passes them on without a look: no length of either costs it
    time that other calls wait for.

    Raises:
      OSError: there are too many open files, or no memory.
    """
    return payload.Program.pack(self.code, self.stdin)

  def infra(
    self, why: str, tier: str, cause: str = "sandbox"
  ) -> contract.ToolResult:
    """Returns the result of a call that the sandbox failed."""
    return contract.ToolResult(
      layout.ToolStatus.INFRA,
      stderr=why,
      cause=cause,
      tier=tier,
      retries=self.retries,
    )


def canonical(trajectory: contract.Trajectory) -> contract.Trajectory:
  """Returns the plain form of a rollout's name: equal names are written alike.

  A numpy integer becomes an int and a numpy string a str, at any depth.

  Raises:
    ValueError: it is no string, integer or tuple of these.
  """
  if isinstance(trajectory, tuple):
    return tuple(map(canonical, trajectory))
  if isinstance(trajectory, str):
    return str(trajectory)
  try:
    return int(operator.index(trajectory))  # True is 1
  except TypeError:
    raise ValueError(
      "Sandbox: a trajectory is a string, an integer or a tuple of these, found"
      f" {trajectory!r:.80}"
    ) from None


def session_name(trajectory: contract.Trajectory) -> str:
  """Returns the name of a trajectory's session, never empty."""
  return f"={trajectory!r}"


def seed_digest(
  seed: int, trajectory: contract.Trajectory, call_index: int
) -> str:
  """Returns the hex seed of one call, the same on every host and in every run.

  Args:
    seed: of the run.
    trajectory: stable id of the rollout: a string, an int or a tuple of these.
    call_index: of the call in its rollout.
  """
  text = f"{seed}\0{canonical(trajectory)!r}\0{call_index}"
  return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()
