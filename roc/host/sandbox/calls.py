"""One call on the trainer's side, from `submit` until its future is done."""

import base64
import concurrent.futures
import dataclasses
import hashlib
import time

from roc import layout
from roc.host.sandbox import contract

Future = concurrent.futures.Future[contract.ToolResult]


@dataclasses.dataclass(eq=False)
class Call:
  """A submitted call; `retries` counts servers that it was lost with."""

  id: int
  message: dict
  future: Future
  submitted: float
  retries: int = 0
  is_cancelled: bool = False

  @classmethod
  def new(
    cls,
    call_id: int,
    code: str,
    stdin: str | bytes,
    limits: contract.Limits,
    seed: str,
    future: Future,
  ) -> "Call":
    """Returns a call and the message that asks a server to run it."""
    message = {
      "op": "call",
      "id": call_id,
      "code": code,
      "stdin": base64.b64encode(contract.stdin_bytes(stdin)).decode("ascii"),
      "limits": limits.to_json(),
      "seed": seed,
    }
    return cls(call_id, message, future, time.monotonic())

  def infra(self, why: str, tier: str) -> contract.ToolResult:
    """Returns the result of a call that the sandbox failed."""
    return contract.ToolResult(
      layout.ToolStatus.INFRA, stderr=why, tier=tier, retries=self.retries
    )


def seed_digest(
  seed: int, trajectory: contract.Trajectory, call_index: int
) -> str:
  """Returns the hex seed of one call, the same on every host and in every run.

  Args:
    seed: of the run.
    trajectory: stable id of the rollout: a string, an int or a tuple of these.
    call_index: of the call in its rollout.
  """
  text = f"{seed}\0{trajectory!r}\0{call_index}"
  return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()
