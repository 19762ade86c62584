"""Executors that a cell leaves open: their work ends with it, they do not.

An idle worker of a `ThreadPoolExecutor` waits for ever, and Python sends it
home only when the interpreter ends. A session's interpreter does not end, and
threads do not survive the fork that makes its next checkpoint. So the workers
are sent home after each cell, and the executor is put back to how it was before
its first task: the next cell may go on using it.
"""

import contextlib
import gc
import queue
import sys
import threading
import typing


def finish() -> None:
  """Waits for all work that was handed to executors, and ends their threads."""
  threads: typing.Any = sys.modules.get("concurrent.futures.thread")
  if threads is not None and threads._threads_queues:
    pools = [
      each
      for each in gc.get_objects()
      if issubclass(type(each), threads.ThreadPoolExecutor)
      and not each._shutdown
    ]
    try:
      threads._python_exit()
    finally:
      threads._shutdown = False
    for pool in pools:
      _renew(pool)
  processes: typing.Any = sys.modules.get("concurrent.futures.process")
  if processes is not None and processes._threads_wakeups:
    try:
      processes._python_exit()
    finally:
      processes._global_shutdown = False


def _renew(pool: typing.Any) -> None:
  """Makes an executor whose workers are gone start new ones when asked."""
  with contextlib.suppress(queue.Empty):
    while True:
      pool._work_queue.get_nowait()  # what woke the workers up
  pool._threads.clear()
  pool._idle_semaphore = threading.Semaphore(0)
  pool._shutdown = False
