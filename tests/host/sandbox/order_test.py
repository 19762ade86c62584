"""Whose turn it is, and what happens to calls whose zygote is shot."""

import asyncio
import contextlib
import os
import signal
import threading
import time

import pytest

from roc.host.sandbox import Limits, linux, routing
from roc.layout import ToolStatus

NAP = "import time\ntime.sleep({})\nprint('slept')"


def started(pid: int) -> int:
  """When a process was started, in ticks; 0 if it is gone or a call's first.

  What waits in pid namespaces of its own is process 1 of a call to come.
  """
  try:
    with open(f"/proc/{pid}/stat", "rb") as f:
      ticks = int(f.read().rpartition(b")")[2].split()[19])
    with open(f"/proc/{pid}/status") as f:
      pids = next(x.split()[1:] for x in f if x.startswith("NSpid"))
  except (OSError, StopIteration):
    return 0
  return ticks if len(pids) == 1 else 0


def forkers(box) -> tuple[list[int], list[int]]:
  """Templates and zygotes of a sandbox: its processes that run no call."""
  born = {pid: started(pid) for pid in linux.children(box.supervisor_pid)}
  mine = [p for p, at in born.items() if at and not linux.is_marked(p)]
  mine.sort(key=lambda pid: (born[pid], pid))
  n_templates = len(box.info()["images"])
  return mine[:n_templates], mine[n_templates:]


def n_zygotes(box) -> int:
  """How many a sandbox of two workers keeps when all is loaded."""
  n_images = len(set(box.info()["images"]) - routing.LAZY)
  return n_images * min(2, len(os.sched_getaffinity(0)))


def settle(box, tools):
  """Waits until everything is loaded and every zygote is there."""
  tools.warm_up(box)
  tools.wait_until(lambda: len(forkers(box)[1]) == n_zygotes(box), 0.5)


@pytest.fixture(scope="module")
def shot_box(tools):
  """A sandbox whose zygotes tests may kill."""
  with tools.Sandbox(n_workers=2) as box:
    yield box


@pytest.fixture
def own_box(shot_box, tools):
  settle(shot_box, tools)
  yield shot_box
  assert shot_box.stats()["restarts"] == 0


def test_each_image_has_its_zygotes(own_box):
  assert len(forkers(own_box)[1]) == n_zygotes(own_box)


def hold_up(box, seconds=0.3):
  """Has all workers busy, so that what is submitted now waits."""
  return [
    box.submit(NAP.format(seconds), trajectory=("nap", i)) for i in range(4)
  ]


def test_a_burst_of_many_trajectories_is_served_fairly(strong_box):
  """A hundred times what fits: in turns, and waiting costs nobody his time."""
  n_trajectories, n_calls = 120, 5
  limits = Limits(wall_s=0.7)
  order, futures = [], []
  naps = hold_up(strong_box, 0.6)
  start = time.monotonic()
  for trajectory in range(n_trajectories):  # one brings all its calls at once
    for i in range(n_calls):
      future = strong_box.submit(
        f"print({trajectory}, {i})", trajectory=trajectory, limits=limits
      )
      future.add_done_callback(
        lambda _, t=trajectory: order.append((t, time.monotonic() - start))
      )
      futures.append((f"{trajectory} {i}\n", future))
  is_late = any(nap.done() for nap in naps)
  results = [(text, future.result()) for text, future in futures]
  assert all(r.status == ToolStatus.OK for _, r in results)
  odd = [(text, r) for text, r in results if r.stdout != text or r.retries]
  assert odd == []
  waits = sorted(wait for _, wait in order)
  assert waits[-1] > limits.wall_s  # or it proves nothing
  assert waits[-1] <= 3 * waits[len(waits) // 2]
  # Nobody is served a third time before everybody was served once.
  served = dict.fromkeys(range(n_trajectories), 0)
  for trajectory, _ in order:
    served[trajectory] += 1
    assert is_late or max(served.values()) - min(served.values()) <= 2
  assert {nap.result().status for nap in naps} == {ToolStatus.OK}


def test_a_late_comer_with_one_call_does_not_wait_for_a_crowd(strong_box):
  naps = hold_up(strong_box)
  crowd = [strong_box.submit("print(1)", trajectory="big") for _ in range(100)]
  single = strong_box.submit("print(2)", trajectory="small")
  assert single.result().stdout == "2\n"
  assert sum(f.done() for f in crowd) < 50
  assert {f.result().status for f in naps + crowd} == {ToolStatus.OK}


def test_the_end_of_a_trajectory_kills_its_programs(strong_box, tools):
  limits = Limits(wall_s=40)
  mine = [
    strong_box.submit(NAP.format(30), trajectory=3, limits=limits)
    for _ in range(6)
  ]
  other = strong_box.submit("print('other')", trajectory=4)
  assert tools.wait_until(lambda: tools.survivors(strong_box))
  start = time.monotonic()
  strong_box.end_trajectory(3)
  assert {f.result().cause for f in mine} == {"cancelled"}
  assert {f.result().status for f in mine} == {ToolStatus.INFRA}
  assert {f.result().retries for f in mine} == {0}
  assert other.result().stdout == "other\n"
  assert time.monotonic() - start < 1


def test_a_cancelled_task_kills_its_program(strong_box, tools):
  async def job():
    task = asyncio.create_task(
      strong_box.arun(NAP.format(30), limits=Limits(wall_s=40))
    )
    while not tools.survivors(strong_box):
      await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
      await task

  asyncio.run(job())
  assert tools.wait_until(lambda: not tools.survivors(strong_box))


@pytest.mark.parametrize("tool", ["python", "session"])
def test_running_calls_survive_their_zygotes(own_box, tools, tool):
  futures = [
    own_box.submit(NAP.format(0.5), tool=tool, trajectory=i) for i in range(2)
  ]
  assert tools.wait_until(lambda: len(tools.survivors(own_box)) >= 2)
  time.sleep(0.2)
  _, zygotes = forkers(own_box)
  assert zygotes
  for pid in zygotes:
    os.kill(pid, signal.SIGKILL)
  assert [f.result().stdout for f in futures] == ["slept\n"] * 2
  assert {f.result().retries for f in futures} == {0}
  for i in range(2):
    own_box.end_trajectory(i)
  assert tools.wait_until(lambda: not tools.survivors(own_box))


def test_shot_zygotes_are_back_within_two_seconds(own_box, tools):
  templates, zygotes = forkers(own_box)
  futures = [own_box.submit(f"print({i})") for i in range(100)]
  for pid in zygotes:
    os.kill(pid, signal.SIGKILL)
  start = time.monotonic()
  after = own_box.run("import numpy\nprint('after')", trajectory="after")
  assert after.stdout == "after\n" and time.monotonic() - start < 2
  results = [f.result() for f in futures]
  assert [r.stdout for r in results] == [f"{i}\n" for i in range(100)]
  assert max(r.retries for r in results) <= 1
  full = lambda: len(forkers(own_box)[1]) == n_zygotes(own_box)
  assert tools.wait_until(full), forkers(own_box)
  assert forkers(own_box)[0] == templates
  assert not set(forkers(own_box)[1]) & set(zygotes)


def test_a_stopped_zygote_is_no_end(own_box, tools):
  """What is asked of it waits; the trainer's own patience ends that."""
  _, zygotes = forkers(own_box)
  for pid in zygotes:
    os.kill(pid, signal.SIGSTOP)
  future = own_box.submit("print('late')")
  time.sleep(0.3)
  assert not future.done()
  for pid in zygotes:
    os.kill(pid, signal.SIGCONT)
  assert future.result(5).stdout == "late\n"


@pytest.mark.slow
def test_a_zygote_that_is_shot_again_and_again_is_infra_at_worst(
  own_box, tools
):
  stop = threading.Event()

  def shoot():
    while not stop.is_set():
      for pid in forkers(own_box)[1]:
        with contextlib.suppress(ProcessLookupError):
          os.kill(pid, signal.SIGKILL)
      time.sleep(0.02)

  shooter = threading.Thread(target=shoot)
  shooter.start()
  try:
    results = [
      own_box.submit(f"print({i})", trajectory=i).result(8) for i in range(60)
    ]
  finally:
    stop.set()
    shooter.join()
  for i, result in enumerate(results):
    assert result.status in (ToolStatus.OK, ToolStatus.INFRA), result
    assert result.status == ToolStatus.INFRA or result.stdout == f"{i}\n"
  assert own_box.run("print('again')").stdout == "again\n"
  assert tools.wait_until(lambda: not tools.survivors(own_box))
  # Templates, zygotes, and for each of these a process 1 in reserve.
  at_most = len(own_box.info()["images"]) + 2 * n_zygotes(own_box)
  below = lambda: linux.children(own_box.supervisor_pid)
  assert tools.wait_until(lambda: len(below()) <= at_most), below()


def test_a_lost_template_is_replaced_with_its_supervisor(tools):
  with tools.Sandbox(n_workers=1) as box:
    templates, _ = forkers(box)
    old = box.supervisor_pid
    future = box.submit(NAP.format(0.4))
    assert tools.wait_until(lambda: tools.survivors(box))
    os.kill(templates[0], signal.SIGKILL)
    result = future.result(10)
    assert (result.status, result.retries) == (ToolStatus.OK, 1)
    assert box.supervisor_pid != old and box.stats()["restarts"] == 1


def test_each_call_draws_its_own_numbers_whatever_zygote_it_has(own_box):
  code = "import random, numpy\nprint(random.random(), numpy.random.rand())"
  draw = lambda i: own_box.submit(code, trajectory="t", call_index=i)
  first = [f.result().stdout for f in [draw(i) for i in range(30)]]
  again = [f.result().stdout for f in [draw(i) for i in range(30)]]
  assert first == again and len(set(first)) == 30
