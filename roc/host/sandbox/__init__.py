"""Runs the model's Python in a separate process, limited, and judges its end.

    with Sandbox(Limits(wall_s=2)) as box:
      result = box.run("print(2**10)")     # ToolResult(status=OK, ...)

An exec'd fork server with the common modules loaded forks one child per call;
see docs/sandbox.md for the table of statuses. Tier `process`.

Covered: wall clock, CPU, address space, output, number of processes, file size,
descriptors; background processes die with their call, and everything dies
within two seconds of the trainer; nothing of the trainer's environment, memory
or descriptors is inherited; each call has a fresh directory, RNG seeds of its
own and an interpreter that no earlier call touched; a typed status that a
program cannot turn into INFRA by what it prints, writes or returns.

NOT covered at this tier: it limits accidents and is no boundary against an
adversary. A program runs as the trainer's user and can read and write
that user's files, use the network (the metadata server of a cloud machine
among it), signal any process of that user (the server and the trainer
among them: killing the server is a way to INFRA), and write its own record of
how it ended through `ctypes`. Total memory and disk over all processes and
files of a call are bounded only by the per-process and per-file limits.
A fork bomb is killed when it is seen, some 25 ms late.
"""

from roc.host.sandbox.calls import seed_digest
from roc.host.sandbox.contract import Limits, SandboxError, ToolResult
from roc.host.sandbox.pool import Sandbox

__all__ = ["Limits", "Sandbox", "SandboxError", "ToolResult", "seed_digest"]
