"""Runs the model's Python confined and judges its end by what it saw.

    with Sandbox(Limits(wall_s=2)) as box:
      result = box.run("print(2**10)")     # ToolResult(status=OK, ...)
      box.run("x = 5", tool="session", trajectory=3)
      box.run("x + 1", tool="session", trajectory=3)

A supervisor, started by exec, has warm zygotes fork one confined child per call
or session. What confines a child is the strongest *tier* that holds on the
machine, which programs that attack it find out at the start; `Sandbox.tier`,
`Sandbox.info` and the run's record name it. docs/sandbox.md is the manual.

Covered at every tier: wall clock, CPU, memory per process and in total, output,
processes, files, disk; background processes die with their call and everything
dies within two seconds of the trainer; nothing of the trainer's environment,
memory or descriptors is inherited; each call has a fresh directory, seeds and
an interpreter that no earlier call touched; a typed status that a program
cannot turn into INFRA by what it prints, writes or returns.

Covered from tier `filtered` on: no network, no debugging, no namespaces. From
`confined` on: no file but the interpreter's and the system's can be read, none
but the call's own written. At `isolated`: no process outside is in sight, none
escapes its end, the disk is memory of a fixed size.

NOT covered, at any tier: faults of the kernel; timing of shared processors; the
note that a program writes about its own end, which through `ctypes` can call an
error a success, as catching it would have. At tier `process` a program runs as
the trainer's user and can do what that user can, killing this sandbox included.
"""

from roc.host.sandbox.calls import seed_digest
from roc.host.sandbox.contract import Limits, SandboxError, ToolResult
from roc.host.sandbox.external import ExternalSandbox
from roc.host.sandbox.pool import Sandbox

__all__ = [
  "ExternalSandbox",
  "Limits",
  "Sandbox",
  "SandboxError",
  "ToolResult",
  "seed_digest",
]
