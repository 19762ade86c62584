"""The words that the device side and the host side share; imports nothing.

Axis letters, the fields of a trajectory, what each token is, how a tool call
ended and why a rollout stopped. `roc.core.trajectories` builds the pytree from
this table and `roc.host.pack` fills it, so the two cannot drift apart.
"""

import enum
import typing

# Arrays carry their axes in the name: `tokens_BT`, `keep_NO`. Booleans say what
# True means. One letter, one meaning, everywhere.
AXES = {
  "N": "prompts (groups)",
  "O": "rollouts drawn per group",
  "G": "rollouts kept per group",
  "B": "rows of a training batch (N * G)",
  "T": "tokens",
  "U": "turns",
  "C": "tool calls",
  "V": "vocabulary",
  "D": "model width",
  "F": "feed-forward width",
  "H": "query heads",
  "K": "key/value heads",
  "E": "head dimension",
  "L": "layers",
  "S": "slots: rollouts that are decoded at once",
  "R": "rows of one prefill or extension",
  "P": "pages of the key/value cache",
  "J": "pages of one row, in order",
  "Z": "tokens of a page",
  "M": "queries that share keys (query heads of a key head x tokens)",
}


class Role(enum.IntEnum):
  """Who put a token there. Only MODEL tokens ever carry loss."""

  PAD = 0
  PROMPT = 1  # system text, question, first generation header
  MODEL = 2  # sampled by the policy, its end-of-turn token included
  TOOL = 3  # what a tool answered
  TEMPLATE = 4  # turn tags and headers re-added around tool answers


class ToolStatus(enum.IntEnum):
  """How one tool call ended; exactly one per call, never read off text."""

  NONE = -1  # no such call: padding of the C axis
  OK = 0
  ERROR = 1  # uncaught exception
  TIMEOUT = 2  # wall-clock or CPU limit
  MEMORY = 3
  OUTPUT_LIMIT = 4
  CRASH = 5  # killed by a signal of its own making
  EXIT = 6  # non-zero exit
  RESOURCE = 7  # processes, files, disk
  REJECTED = 8  # never ran: unparseable call, unknown tool, bad arguments
  INFRA = 9  # the sandbox's fault, not the model's


# A call that counts in p_err's denominator: the sandbox did its part.
JUDGED_STATUSES = frozenset(
  s for s in ToolStatus if s not in (ToolStatus.NONE, ToolStatus.INFRA)
)
# A call that counts in p_err's numerator too: the model's fault.
FAILED_STATUSES = frozenset(JUDGED_STATUSES - {ToolStatus.OK})


class Outcome(enum.IntEnum):
  """Three outcomes, not two: the environment's fault is no wrong answer."""

  WRONG = 0
  CORRECT = 1
  VOID = 2  # environment's fault: outside the group, its baseline and RoC


class StopReason(enum.IntEnum):
  """Why a rollout ended."""

  ANSWERED = 0  # the last turn called no tool
  MAX_TURNS = 1
  MAX_TOKENS = 2  # budget spent in the middle of a turn
  TOOL_OVERFLOW = 3  # the tool's answer did not fit the budget
  CANCELLED = 4
  INFRA = 5  # the sandbox failed, retries included
  DEADLINE = 6  # given up by the clock
  LOGITS = 7  # the model's numbers were not finite


class VoidReason(enum.IntEnum):
  """What of the environment failed a rollout that is VOID."""

  DEADLINE = 0  # the clock gave it up
  VERIFIER = 1  # the check of its answer came to no end
  GOLD = 2  # the right answer cannot be read
  LOGITS = 3  # the model's numbers were not finite
  SANDBOX = 4  # a tool or a check failed to run, retries included
  CANCELLED = 5


# The environment's fault: such a rollout is VOID, not wrong.
VOID_STOPS = {
  StopReason.CANCELLED: VoidReason.CANCELLED,
  StopReason.INFRA: VoidReason.SANDBOX,
  StopReason.LOGITS: VoidReason.LOGITS,
  StopReason.DEADLINE: VoidReason.DEADLINE,
}
TRUNCATED_REASONS = frozenset(
  {StopReason.MAX_TURNS, StopReason.MAX_TOKENS, StopReason.TOOL_OVERFLOW}
)


class Field(typing.NamedTuple):
  """One field of `Trajectories`: numpy dtype name, axes, meaning."""

  dtype: str
  axes: str
  doc: str


TRAJECTORY_FIELDS = {
  "tokens": Field("int32", "NOT", "token ids, 0 where role is PAD"),
  "roles": Field("int8", "NOT", "`Role` of each token"),
  "logp_sampler": Field(
    "float32", "NOT", "log-prob at sampling; 0 unless role is MODEL"
  ),
  "tool_status": Field("int8", "NOC", "`ToolStatus` of each call in order"),
  "n_turns": Field("int32", "NO", "turns that the model took"),
  "n_answers": Field("int32", "NO", "well-formed answers it wrote"),
  "has_void_turn": Field(
    "bool", "NO", "some turn holds neither a complete call nor an answer"
  ),
  "is_truncated": Field("bool", "NO", "stopped by a turn or token limit"),
  "outcome": Field("int8", "NO", "`Outcome`: raw correctness"),
  "reward": Field("float32", "NO", "scalar reward, shaping included"),
  "rollout_id": Field(
    "int32", "NO", "stable index 0..O-1 in the group, not completion order"
  ),
  "place": Field("int32", "N", "place of the problem in the run's order"),
}
