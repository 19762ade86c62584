"""Attacks a plan with a program that runs under it, before any is trusted.

Not what the kernel says it has, but what it does decides: a user namespace can
be made on some machines and is powerless, a Landlock version can be listed and
switched off. The program is forked exactly as every call will be.
"""

import contextlib
import json
import os
import socket
import tempfile
from collections.abc import Iterator

from roc import layout
from roc.host.sandbox import contract, payload, routing
from roc.host.sandbox import plan as plan_lib

_LIMITS = contract.Limits(wall_s=20, cpu_s=10, output_bytes=1 << 15)
_DISK_BYTES = _LIMITS.disk_mb << 20

# Each attack prints whether it got through. `scratch` and `modules` are no
# attacks: they must.
PROGRAM = r"""
import ctypes, json, os, socket, sys
targets = json.load(sys.stdin)
libc = ctypes.CDLL(None, use_errno=True)
def tried(attack):
  try:
    return bool(attack())
  except Exception:
    return False
def wrote(path):
  with open(path, "w") as f:
    f.write("x")
  return open(path).read() == "x"
def connected():
  with socket.create_connection(("127.0.0.1", targets["port"]), 1):
    return True
def privileged():
  words = (ctypes.c_uint32 * 6)()
  libc.capget((ctypes.c_uint32 * 2)(0x20080522, 0), words)
  return (words[0] | words[1]) & ~0b110 or words[3] | words[4]
def modules():
  import colorsys, wave, ctypes.util
  return True
got = {
  "has privileges": privileged(),  # a new namespace would give some
  "connects": tried(connected),
  "opens sockets": tried(lambda: socket.socket()),
  "reads files": tried(lambda: open(targets["canary"]).read()),
  "writes files": tried(lambda: wrote(targets["canary"] + ".planted")),
  "changes metadata":
    tried(lambda: os.utime(targets["canary"], (1, 1)) is None),
  "signals": tried(lambda: os.kill(targets["pid"], 0) is None),
  "opens the sandbox's memory": any(
    tried(lambda: open(f"/proc/{pid}/mem", "r+b")) for pid in targets["pids"]),
  "makes namespaces": libc.unshare(0x10000000) == 0,
  "sees processes": os.getpid() > 64,
  "has a large disk":
    (lambda s: s.f_blocks * s.f_frsize)(os.statvfs(".")) > targets["disk"],
  "scratch": tried(lambda: wrote("own.txt")),
  "modules": tried(modules),
}
print(json.dumps(got))
"""

# What must not get through from a tier on, in a word that also tells a user
# what the tier protects from.
_FORBIDDEN = {
  "filtered": (
    "connects",
    "opens sockets",
    "makes namespaces",
    "opens the sandbox's memory",
  ),
  "confined": ("reads files", "writes files", "changes metadata"),
  "isolated": ("sees processes", "has a large disk"),
}
_NEEDED = ("scratch", "modules")

_SAFE_FROM = {
  "filtered": [
    "the network, the metadata server of a cloud machine included",
    "debugging other processes, and opening the memory of the trainer",
    "new namespaces, mounts, kernel modules, keys, System V IPC",
  ],
  "confined": [
    "reading files but the interpreter's and the system's libraries",
    "writing anywhere but the call's own directory",
  ],
  "isolated": [
    "processes that hide from the supervisor: the kernel ends all of a call",
    "seeing any process outside the call",
    "filling the disk: the call's directory is memory of a fixed size",
  ],
}
_OTHERS_MEMORY = "opening the memory of the user's other processes"
_NO_SIGNALS = "signalling the trainer, the supervisor and other calls"
_OWN_UID = "other calls' processes: each call has a user id of its own"


@contextlib.contextmanager
def targets(root: str) -> Iterator[dict]:
  """Plants what the program is to attack; yields where it is."""
  with (
    tempfile.NamedTemporaryFile("w", dir=root, prefix="canary-") as canary,
    socket.socket() as listener,
  ):
    canary.write("secret")
    canary.flush()
    os.chmod(canary.name, 0o644)
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    yield {
      "canary": canary.name,
      "pid": os.getpid(),
      "pids": [os.getpid(), os.getppid()],
      "port": listener.getsockname()[1],
      "disk": _DISK_BYTES,
    }


CALL_ID = -1


def message(targets: dict) -> dict:
  """Returns the call that attacks `targets`."""
  return {
    "op": "call",
    "id": CALL_ID,
    "tool": "python",
    "session": "",
    "image": routing.BARE,
    "program": payload.Program.pack(PROGRAM, json.dumps(targets).encode()),
    "limits": _LIMITS.to_json(),
    "seed": "00" * 32,
  }


def why_not(
  plan: plan_lib.Plan, result: contract.ToolResult, targets: dict
) -> str:
  """Returns why a plan does not hold, "" if it does.

  Args:
    plan: under which the program ran.
    result: how it ended.
    targets: what it attacked; the files are looked at again from outside.
  """
  if result.status != layout.ToolStatus.OK:
    said = result.stderr.strip().splitlines()[-1:] or ["no message"]
    return f"a first program ended as {result.status.name.lower()}: {said[0]}"
  got = json.loads(result.stdout)
  for word in _NEEDED:
    if not got[word]:
      return f"a program lacks its {word}"
  for word in _forbidden(plan):
    if got[word]:
      return f"a program still {word}"
  if os.path.exists(targets["canary"] + ".planted"):
    os.unlink(targets["canary"] + ".planted")
    if "writes files" in _forbidden(plan):
      return "a program still writes files"
  return ""


def _forbidden(plan: plan_lib.Plan) -> list[str]:
  rank = contract.TIERS.index(plan.tier)
  words = [
    word
    for tier, attacks in _FORBIDDEN.items()
    if contract.TIERS.index(tier) <= rank
    for word in attacks
  ]
  words.append("has privileges")
  if plan.confines_signals:
    words.append("signals")
  return words


def protection(plan: plan_lib.Plan) -> dict[str, list[str]]:
  """Returns what a plan that holds protects from, and what it does not."""
  rank = contract.TIERS.index(plan.tier)
  safe, open_ = ["limits on time, memory, output, processes and files"], []
  for tier, sentences in _SAFE_FROM.items():
    at = safe if contract.TIERS.index(tier) <= rank else open_
    at.extend(sentences)
  (safe if plan.confines_signals else open_).append(_NO_SIGNALS)
  # A privileged trainer's processes are beyond calls, which hold less.
  is_closed = plan.confines_memory or os.getuid() == 0
  (safe if is_closed else open_).append(_OTHERS_MEMORY)
  if plan.tier != "isolated":
    (safe if plan.first_uid is not None else open_).append(_OWN_UID)
  open_.append("faults of the kernel: all calls share it with the trainer")
  open_.append("using the processor's caches and timing to look at other work")
  return {"protects_from": safe, "does_not_protect_from": open_}
