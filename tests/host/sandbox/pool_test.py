"""Restart, cancellation, overload, several callers, and bad set-ups."""

import asyncio
import concurrent.futures
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from roc.host import sandbox
from roc.host.sandbox import Limits, Sandbox, SandboxError, linux
from roc.host.sandbox import link as sandbox_link
from roc.layout import ToolStatus

NAP = "import time\ntime.sleep({})\nprint('slept')"


@pytest.fixture
def own_box():
  with Sandbox(n_workers=2) as box:
    yield box


@pytest.mark.parametrize("victim", ["supervisor_pid", "keeper_pid"])
def test_a_killed_supervisor_is_replaced_and_its_calls_retried(
  own_box, tools, victim
):
  futures = [own_box.submit(NAP.format(0.5)) for _ in range(5)]
  assert tools.wait_until(lambda: len(tools.survivors(own_box)) >= 2)
  old = tools.survivors(own_box)
  server = own_box._link
  os.kill(getattr(server, victim.replace("supervisor_", "")), signal.SIGKILL)
  start = time.monotonic()
  results = [f.result(10) for f in futures]
  assert [r.status for r in results] == [ToolStatus.OK] * 5
  assert max(r.retries for r in results) == 1
  assert time.monotonic() - start < 5
  assert own_box.stats()["restarts"] == 1
  assert tools.wait_until(lambda: not any(map(tools.is_alive, old)))


def test_a_daemon_does_not_outlive_a_killed_supervisor(own_box, tools):
  code = (
    "import os, time\nif os.fork() == 0:\n  os.setsid()\n"
    "  while True: time.sleep(1)\ntime.sleep(30)"
  )
  future = own_box.submit(code)
  assert tools.wait_until(lambda: len(tools.survivors(own_box)) >= 2)
  time.sleep(0.1)
  left = tools.survivors(own_box)
  os.kill(own_box.supervisor_pid, signal.SIGKILL)
  assert tools.wait_until(lambda: not any(map(tools.is_alive, left)))
  own_box.cancel(future)


def test_a_call_that_loses_two_servers_is_infra(own_box, tools):
  future = own_box.submit(NAP.format(30), limits=Limits(wall_s=60))
  for n_restarts in (0, 1):
    assert tools.wait_until(
      lambda n=n_restarts: (
        own_box.stats()["restarts"] == n
        and own_box.supervisor_pid is not None
        and tools.survivors(own_box)
      ),
      5,
    )
    os.kill(own_box.supervisor_pid, signal.SIGKILL)
  result = future.result(10)
  assert (result.status, result.retries) == (ToolStatus.INFRA, 1)
  assert own_box.run("print(1)").status == ToolStatus.OK


def test_a_server_that_hangs_is_replaced(own_box, monkeypatch):
  monkeypatch.setattr(sandbox_link, "_PING_AFTER_S", 0.2)
  monkeypatch.setattr(sandbox_link, "_DEAD_AFTER_S", 1.0)
  os.kill(own_box.supervisor_pid, signal.SIGSTOP)
  result = own_box.run("print(1)")
  assert (result.status, result.retries) == (ToolStatus.OK, 1)


def test_a_long_call_is_not_taken_for_a_hanging_server(own_box, monkeypatch):
  monkeypatch.setattr(sandbox_link, "_PING_AFTER_S", 0.2)
  monkeypatch.setattr(sandbox_link, "_DEAD_AFTER_S", 1.0)
  result = own_box.run(NAP.format(1.6))
  assert (result.status, result.retries) == (ToolStatus.OK, 0)


def marked(supervisor: int) -> list[int]:
  """Processes of calls below a supervisor."""
  below = linux.descendants(supervisor, 9999)
  return [pid for pid in below if linux.is_marked(pid)]


def test_everything_dies_with_a_killed_trainer(tools):
  trainer = subprocess.Popen(
    [
      sys.executable,
      "-c",
      textwrap.dedent("""
        import time
        from roc.host import sandbox
        box = sandbox.Sandbox(n_workers=2).start()
        daemon = ("import os, time\\nif os.fork() == 0:\\n  os.setsid()\\n"
                  "time.sleep(60)")
        limits = sandbox.Limits(wall_s=99)
        for _ in range(2): box.submit(daemon, limits=limits)
        link = box._link
        print(link.pid, link.keeper_pid, link._root, flush=True)
        time.sleep(99)
      """),
    ],
    stdout=subprocess.PIPE,
    text=True,
  )
  with trainer:
    server, keeper, root = trainer.stdout.readline().split()
    pids = [int(server), int(keeper)]
    assert tools.wait_until(lambda: len(marked(pids[0])) >= 4)
    pids += linux.descendants(pids[0], 9999)
    trainer.kill()
  assert tools.wait_until(lambda: not any(map(tools.is_alive, pids)), 2)
  assert tools.wait_until(lambda: not os.path.exists(root))


def test_a_cancelled_call_is_killed_and_not_retried(own_box, tools):
  running = own_box.submit(NAP.format(30), limits=Limits(wall_s=60))
  assert tools.wait_until(lambda: tools.survivors(own_box))
  start = time.monotonic()
  assert own_box.cancel(running)
  result = running.result(5)
  assert (result.status, result.retries) == (ToolStatus.INFRA, 0)
  assert time.monotonic() - start < 1
  assert not own_box.cancel(running)
  assert tools.wait_until(lambda: not tools.survivors(own_box))


def test_a_queued_call_can_be_cancelled(own_box):
  naps = [own_box.submit(NAP.format(0.4)) for _ in range(6)]
  queued = own_box.submit("print('never')")
  assert own_box.cancel(queued)
  assert queued.result(0.2).status == ToolStatus.INFRA
  assert {f.result().status for f in naps} == {ToolStatus.OK}


def test_waiting_in_the_queue_is_not_counted(own_box):
  limits = Limits(wall_s=0.8)
  futures = [own_box.submit(NAP.format(0.3), limits=limits) for _ in range(10)]
  results = [f.result() for f in futures]
  assert {r.status for r in results} == {ToolStatus.OK}
  assert own_box.stats()["wait_p99_ms"] > 800


def test_a_full_queue_makes_the_caller_wait():
  with Sandbox(n_workers=1, queue_size=1) as box:
    start = time.monotonic()
    futures = [box.submit(NAP.format(0.2)) for _ in range(6)]
    # One runs, one waits at the supervisor, one in the queue.
    assert time.monotonic() - start > 0.4
    assert {f.result().status for f in futures} == {ToolStatus.OK}


def test_a_queue_that_stays_full_is_infra():
  with Sandbox(n_workers=1, queue_size=1, queue_timeout_s=0.3) as box:
    futures = [box.submit(NAP.format(1.5)) for _ in range(4)]
    results = [f.result() for f in futures]
  assert [r.status for r in results[:2]] == [ToolStatus.OK] * 2
  assert [r.status for r in results[2:]] == [ToolStatus.INFRA] * 2
  assert {r.cause for r in results[2:]} == {"queue"}


def test_closing_answers_every_open_call(tools):
  box = Sandbox(n_workers=1).start()
  futures = [box.submit(NAP.format(30)) for _ in range(4)]
  server, root = box.supervisor_pid, box._link._root
  box.close()
  assert {f.result(1).status for f in futures} == {ToolStatus.INFRA}
  assert not tools.is_alive(server) and not os.path.exists(root)
  with pytest.raises(SandboxError, match="not running"):
    box.submit("print(1)")
  box.close()


def test_two_sandboxes_do_not_meet(box, tools):
  with Sandbox(n_workers=1) as other:
    mine = box.submit(NAP.format(0.3))
    for _ in range(20):
      assert other.run("print(2)").stdout == "2\n"
    assert mine.result().stdout == "slept\n"
    other_server = other.supervisor_pid
  assert not tools.is_alive(other_server)
  assert box.run("print(1)").stdout == "1\n"


def test_many_threads_share_one_sandbox(box):
  def job(i):
    return box.run(f"print({i} * {i})", trajectory=i).stdout

  with concurrent.futures.ThreadPoolExecutor(8) as threads:
    answers = list(threads.map(job, range(40)))
  assert answers == [f"{i * i}\n" for i in range(40)]


def test_futures_can_be_awaited(box):
  async def both():
    futures = [box.submit(f"print({i})") for i in range(2)]
    return await asyncio.gather(*map(asyncio.wrap_future, futures))

  assert [r.stdout for r in asyncio.run(both())] == ["0\n", "1\n"]


def test_it_starts_from_a_thread_that_ends(tools):
  """The kernel's parent-death signal fires when a *thread* ends."""
  boxes = []
  thread = threading.Thread(
    target=lambda: boxes.append(Sandbox(n_workers=1).start())
  )
  thread.start()
  thread.join()
  time.sleep(0.6)
  with boxes[0] as box:
    assert box.run("print(1)").status == ToolStatus.OK
    assert box.stats()["restarts"] == 0


def test_the_server_of_a_jax_process_inherits_nothing_of_it(box):
  import jax

  jax.devices()
  with Sandbox(n_workers=1) as fresh:
    with open(f"/proc/{fresh.supervisor_pid}/maps") as f:
      maps = f.read()
    fds = os.listdir(f"/proc/{fresh.supervisor_pid}/fd")
    targets = {
      os.readlink(f"/proc/{fresh.supervisor_pid}/fd/{fd}") for fd in fds
    }
  assert "jaxlib" not in maps and "libtpu" not in maps
  kinds = {t.split(":")[0] for t in targets}
  own = {t for t in targets if t.endswith(("(deleted)", "/children"))}
  assert kinds <= {"/dev/null", "socket", "pipe", "anon_inode"} | own


def test_an_unreachable_tier_refuses_to_start():
  with pytest.raises(SandboxError, match="doctor"):
    Sandbox(min_tier="isolated", without=("landlock",)).start()
  with pytest.raises(SandboxError, match="confined"):
    Sandbox(tier="confined", without=("seccomp",)).start()


def test_a_module_that_cannot_be_preloaded_is_named():
  with pytest.raises(SandboxError, match="no_such_module"):
    Sandbox(preload=("no_such_module",)).start()


def test_an_interpreter_that_does_not_start_is_named(monkeypatch):
  monkeypatch.setattr(sys, "executable", "/no/such/python")
  with pytest.raises(SandboxError, match="/no/such/python"):
    Sandbox().start()


@pytest.mark.parametrize(
  "kw, word",
  [
    ({"n_workers": 0}, "n_workers"),
    ({"queue_size": 0}, "queue_size"),
    ({"min_tier": "strong"}, "strong"),
    ({"tier": "external"}, "ExternalSandbox"),
  ],
)
def test_impossible_arguments_are_refused(kw, word):
  with pytest.raises(ValueError, match=word):
    Sandbox(**kw)


def test_an_unknown_tool_is_rejected(box):
  result = box.submit("1", tool="calculator").result(1)
  assert result.status == ToolStatus.REJECTED
  assert "calculator" in result.stderr and "python" in result.stderr


def test_a_sandbox_must_be_started():
  with pytest.raises(SandboxError, match="start"):
    Sandbox().run("print(1)")


def test_the_record_and_the_counters(own_box):
  own_box.run("print(1)")
  own_box.run("1 / 0")
  stats, info = own_box.stats(), own_box.info()
  assert stats["calls"] == 2 and stats["status"] == {"ok": 1, "error": 1}
  assert 0 < stats["p50_ms"] <= stats["p99_ms"]
  assert info["tier"] == own_box.tier == info["plan"]["tier"]
  assert info["limits"]["wall_s"] == sandbox.Limits().wall_s


@pytest.mark.slow
def test_two_thousand_mixed_calls_leave_nothing_behind(tools):
  programs = [
    ("print(1)", ToolStatus.OK),
    ("1 / 0", ToolStatus.ERROR),
    ("print('x' * 9999)", ToolStatus.OUTPUT_LIMIT),
    ("open('f', 'w').write('x')", ToolStatus.OK),
    ("import os\nos.fork() or os.setsid()", ToolStatus.OK),
    ("import os\nos.abort()", ToolStatus.CRASH),
  ]

  def figures(box):
    pid = box.supervisor_pid
    with open(f"/proc/{pid}/statm") as f:
      rss_mb = int(f.read().split()[1]) * 4096 / 2**20
    ours = len(os.listdir("/proc/self/fd"))
    return len(os.listdir(f"/proc/{pid}/fd")), ours, rss_mb

  with Sandbox(n_workers=2) as box:
    for n_calls in (200, 2000):
      futures = [
        (box.submit(code, trajectory=i), status)
        for i in range(n_calls // len(programs))
        for code, status in programs
      ]
      assert all(f.result().status == status for f, status in futures)
      time.sleep(0.5)
      if n_calls == 200:
        before = figures(box)
    after = figures(box)
    assert not tools.survivors(box)
    assert after[:2] == before[:2]
    assert after[2] < before[2] + 3
    assert len(os.listdir(os.path.join(box._link._root, "work"))) == 0


def test_a_task_that_is_cancelled_while_the_queue_is_full_never_runs(tools):
  with tools.Sandbox(n_workers=1, queue_size=1) as box:

    async def main():
      nap = "import time\ntime.sleep(0.6)"
      # One worker, one more sent ahead, one in the queue.
      full = [box.submit(nap, trajectory=i) for i in range(3)]
      late = asyncio.ensure_future(box.arun("print('ran')"))
      await asyncio.sleep(0.2)
      assert not late.done()
      late.cancel()
      with pytest.raises(asyncio.CancelledError):
        await late
      return [await asyncio.wrap_future(f) for f in full]

    results = asyncio.run(main())
    assert {r.status for r in results} == {ToolStatus.OK}
    assert box.run("print('next')").stdout == "next\n"
    status = box.stats()["status"]
    assert status == {"ok": 4, "infra": 1}
