"""The client of external executors, against small servers that play them."""

import asyncio
import concurrent.futures
import contextlib
import http.server
import json
import pickle
import socket
import threading
import time

import pytest

from roc.host.sandbox import (
  backlog,
  calls,
  contract,
  exchange,
  external,
  protocols,
)
from roc.layout import ToolStatus

N_LINES_BEFORE = 44  # what code-judge puts before a program
FILE = '  File "/tmp/tmpab12cd_9/source.py", line {}, in <module>\n'


def traceback(line: int, verdict: str) -> str:
  return (
    "Traceback (most recent call last):\n"
    + FILE.format(line + N_LINES_BEFORE)
    + f"    raise\n{verdict}\n"
  )


ROWS = {
  "print(6 * 7)": {"run_success": True, "stdout": "42\n"},
  "raise ValueError(6 * 7)": {
    "run_success": False,
    "stderr": traceback(1, "ValueError: 42"),
  },
  "worker_timeout": {"run_success": False, "reason": "worker_timeout"},
  "queue_timeout": {"run_success": False, "reason": "queue_timeout"},
  "internal_error": {"run_success": False, "reason": "internal_error"},
  "invalid_input": {"run_success": False, "reason": "invalid_input"},
  "strange": {"run_success": False, "reason": "phase_of_the_moon"},
  "exit": {"run_success": False, "stderr": "bye"},
  "memory": {"run_success": False, "stderr": traceback(3, "MemoryError")},
  "long": {"run_success": True, "stdout": "é" * 3000},
  "address": {
    "run_success": True,
    "stdout": "<f at 0x7f1234567890> /tmp/tmpab12cd_9/x",
  },
  "text for a bool": {"run_success": "yes"},
  "number for a text": {"run_success": True, "stdout": 3},
  "endless cost": {"run_success": True, "stdout": "x", "cost": 10**400},
}
RUNS = {
  "print(6 * 7)": {"return_code": 0, "stdout": "42\n"},
  "raise ValueError(6 * 7)": {
    "return_code": 1,
    "stderr": traceback(1, "ValueError: 42"),
  },
  "slow": {"status": "TimeLimitExceeded", "stdout": "so far"},
  "exit 3": {"return_code": 3, "stderr": "bye"},
  "segv": {"return_code": -11},
  "shell segv": {"return_code": 139},
  "flood": {"return_code": 0, "stdout": "x" * 5000},
  "no code": {"return_code": None},
  "numeric stderr": {"return_code": 0, "stderr": 7},
}


def judge_row(submission: dict) -> dict:
  usual = {"success": True, "cost": 0.25, "reason": "", "stdout": "ok\n"}
  usual |= {"run_success": True, "stderr": "", "sub_id": submission["sub_id"]}
  return usual | ROWS.get(submission["solution"], {})


def judge(body: dict) -> dict:
  rows = [judge_row(submission) for submission in body["submissions"]]
  return {"sub_id": "a batch", "results": rows}


def fusion(body: dict) -> dict:
  if body["code"] == "broken":
    return {
      "status": "SandboxError",
      "message": "no\nspace",
      "run_result": None,
    }
  usual = {"status": "Finished", "execution_time": 0.5, "stdout": "ok\n"}
  usual |= {"return_code": 0, "stderr": ""}
  run = usual | RUNS.get(body["code"], {})
  status = "Failed" if run["return_code"] else "Success"
  return {"status": status, "message": "", "run_result": run}


class Server:
  """An HTTP server in a thread; `answer` may be changed while it runs.

  `answer(body)` returns what is sent as JSON, or raw bytes, or does as it
  likes with the handler when it takes two arguments (`raw`).
  """

  def __init__(self, answer, raw=None):
    self.answer, self.raw = answer, raw
    self.bodies, self.paths, self.headers = [], [], []
    self.go_on = threading.Event()
    self.go_on.set()
    outer = self

    class Handler(http.server.BaseHTTPRequestHandler):
      def do_POST(self):
        data = self.rfile.read(int(self.headers["Content-Length"]))
        body = json.loads(data)
        outer.bodies.append(body)
        outer.paths.append(self.path)
        outer.headers.append(dict(self.headers))
        outer.go_on.wait(5)
        with contextlib.suppress(ConnectionError):
          if outer.raw is not None:
            outer.raw(self)
            return
          answer = outer.answer(body)
          if isinstance(answer, int):
            self.send_error(answer)
            return
          if not isinstance(answer, bytes):
            answer = json.dumps(answer).encode()
          self.send_response(200)
          self.send_header("Content-Length", str(len(answer)))
          self.end_headers()
          self.wfile.write(answer)

      def log_message(self, *args):
        del args

    class Http(http.server.ThreadingHTTPServer):
      daemon_threads = False  # then they are joined
      request_queue_size = 64  # a full one costs a second

    self._http = Http(("127.0.0.1", 0), Handler)
    self.url = f"http://127.0.0.1:{self._http.server_port}"
    serve = lambda: self._http.serve_forever(poll_interval=0.01)
    self._thread = threading.Thread(target=serve)
    self._thread.start()

  def close(self):
    self.go_on.set()
    self._http.shutdown()
    self._http.server_close()
    self._thread.join()

  def batches(self) -> list[list[str]]:
    """Programs of each request after the two of the probe."""
    return [[s["solution"] for s in b["submissions"]] for b in self.bodies[2:]]


@pytest.fixture
def serve():
  """Starts servers that end with the test."""
  with contextlib.ExitStack() as stack:

    def start(answer, raw=None) -> Server:
      server = Server(answer, raw)
      stack.callback(server.close)
      return server

    yield start


def client(server: Server, **kw) -> external.ExternalSandbox:
  return external.ExternalSandbox(
    server.url, **{"backoff_s": 0.005, "timeout_s": 5.0, **kw}
  )


# ----------------------------------------------------------------- code-judge


@pytest.mark.parametrize(
  ("code", "status", "cause"),
  [
    ("anything", ToolStatus.OK, ""),
    ("worker_timeout", ToolStatus.TIMEOUT, "wall"),
    ("queue_timeout", ToolStatus.INFRA, "sandbox"),
    ("internal_error", ToolStatus.INFRA, "sandbox"),
    ("invalid_input", ToolStatus.REJECTED, ""),
    ("strange", ToolStatus.INFRA, "sandbox"),
    ("exit", ToolStatus.ERROR, ""),
    ("memory", ToolStatus.MEMORY, "process"),
    ("long", ToolStatus.OUTPUT_LIMIT, "stdout"),
    ("text for a bool", ToolStatus.INFRA, "sandbox"),
    ("number for a text", ToolStatus.INFRA, "sandbox"),
    ("endless cost", ToolStatus.OK, ""),
  ],
)
def test_code_judge_has_one_status_for_each_ending(serve, code, status, cause):
  with client(serve(judge), max_retries=2) as box:
    result = box.run(code)
  assert (result.status, result.cause) == (status, cause)
  assert result.tier == "external"
  assert result.retries == (2 if status == ToolStatus.INFRA else 0)


def test_code_judge_is_asked_in_its_own_words(serve):
  server = serve(judge)
  with client(server) as box:
    assert box.run("print(input())", stdin=b"\xc3\xa9\n").wall_ms == 250
  assert set(server.paths) == {"/run/long-batch"}
  body = server.bodies[-1]
  assert body["type"] == "batch"
  (submission,) = body["submissions"]
  del submission["sub_id"]
  assert submission == {
    "type": "python",
    "solution": "print(input())",
    "input": "é\n",
  }


def test_a_traceback_shows_the_programs_own_lines(serve):
  with client(serve(judge)) as box:
    result = box.run("raise ValueError(6 * 7)")
    assert box.run("memory").stderr.count('"<tool>", line 3,') == 1
    assert box.run("address").stdout == "<f at 0x0> /scratch/x"
  assert (result.status, result.error_type) == (ToolStatus.ERROR, "ValueError")
  assert '  File "<tool>", line 1, in <module>\n' in result.stderr
  assert "/tmp" not in result.stderr


def test_long_output_is_cut_between_characters(serve):
  with client(serve(judge)) as box:
    result = box.run("long", limits=contract.Limits(output_bytes=101))
  assert result.stdout == "é" * 50
  assert result.truncated_bytes == 6000 - 101


def test_answers_without_ids_are_read_in_order(serve):
  def answer(body):
    rows = [judge_row(s) for s in body["submissions"]]
    for row in rows:
      del row["sub_id"]
    return {"results": rows}

  with client(serve(answer)) as box:
    assert box.run("exit").status == ToolStatus.ERROR


def test_answers_with_ids_may_come_in_any_order(serve):
  def answer(body):
    return {"results": judge(body)["results"][::-1]}

  server = serve(answer)
  with client(server, concurrency=1) as box:
    server.go_on.clear()
    codes = ["first", "exit", "long", "worker_timeout"]
    futures = [box.submit(code) for code in codes]
    server.go_on.set()
    statuses = [future.result(2).status for future in futures]
  assert statuses == [
    ToolStatus.OK,
    ToolStatus.ERROR,
    ToolStatus.OUTPUT_LIMIT,
    ToolStatus.TIMEOUT,
  ]


def test_what_waits_goes_in_batches_and_the_first_does_not_wait(serve):
  server = serve(judge)
  with client(server, concurrency=1, max_batch=32) as box:
    server.go_on.clear()
    first = box.submit("0")
    while not server.batches():
      time.sleep(0.002)
    rest = [box.submit(str(i)) for i in range(1, 71)]
    server.go_on.set()
    assert all(f.result(2).status == ToolStatus.OK for f in [first, *rest])
  batches = server.batches()
  assert [len(batch) for batch in batches] == [1, 32, 32, 6]
  assert sum(batches, []) == [str(i) for i in range(71)]


@pytest.mark.parametrize("broken", ["missing", "null", "a text"])
def test_a_missing_item_fails_alone(serve, broken):
  def answer(body):
    results = []
    for submission in body["submissions"]:
      if submission["solution"] != "lost":
        results.append(judge_row(submission))
      elif broken != "missing":
        results.append(None if broken == "null" else "row")
    return {"results": results}

  server = serve(answer)
  with client(server, concurrency=1, max_retries=2) as box:
    server.go_on.clear()
    futures = [box.submit(code) for code in ("a", "b", "lost", "c", "d")]
    server.go_on.set()
    results = [future.result(2) for future in futures]
  assert [r.retries for r in results] == [0, 0, 2, 0, 0]
  lost = results.pop(2)
  assert (lost.status, lost.cause) == (ToolStatus.INFRA, "sandbox")
  assert all(r.status == ToolStatus.OK for r in results)


def test_a_program_that_breaks_its_batch_is_soon_alone(serve):
  server = serve(judge)
  codes = [str(i) for i in range(40)] + ["poison"]
  with client(server, concurrency=1) as box:
    server.answer = lambda body: (
      500
      if any(s["solution"] == "poison" for s in body["submissions"])
      else judge(body)
    )
    server.go_on.clear()
    futures = [box.submit(code) for code in codes]
    server.go_on.set()
    results = [future.result(2) for future in futures]
  assert results[-1].status == ToolStatus.INFRA
  assert {r.status for r in results[:-1]} == {ToolStatus.OK}


def test_retries_go_in_smaller_batches():
  log = backlog.Backlog(
    capacity=99, max_wait_s=9, max_batch=32, max_retries=4, backoff_s=1e-4
  )
  log.open()
  for i in range(64):
    program = protocols.Program(str(i), "x", "", contract.Limits())
    message = {"session": "", "program": program}
    future = concurrent.futures.Future()
    call = calls.Call(i, "", message, future, time.monotonic())
    assert log.put(call, 0.0) == ""
  sizes = []
  over = []
  while log.counts()["queued"]:
    batch = log.next_batch()
    sizes.append(len(batch))
    over += log.settle(batch, [protocols.fault("no")] * len(batch))
    if sum(sizes) % 64 == 0:
      time.sleep(0.003)
      assert log.tick() == []
  assert sizes == [32] * 2 + [8] * 8 + [2] * 32 + [1] * 128
  assert {result.retries for _, result in over} == {4}
  assert len(over) == 64


@pytest.mark.parametrize(
  ("stderr", "name"),
  [
    ("", None),
    ("bye\n", None),
    ("Error: no traceback\n", None),
    (traceback(1, "ValueError: 42"), "ValueError"),
    (traceback(1, "KeyboardInterrupt"), "KeyboardInterrupt"),
    (traceback(1, "sympy.core.SympifyError: x\ny: z"), "SympifyError"),
    (traceback(1, "A: 1") + "During ...\n" + traceback(2, "B"), "B"),
    (traceback(1, "not a name"), ""),
    (traceback(1, "ZeroDivisionErr")[:-1], ""),
    (traceback(1, "")[:-20], ""),
    ('  File "x.py", line 1\n    (\n    ^\nSyntaxError: no\n', "SyntaxError"),
  ],
)
def test_the_exception_is_read_off_the_traceback(stderr, name):
  assert protocols.exception_name(stderr) == name


# -------------------------------------------------------------- SandboxFusion


@pytest.mark.parametrize(
  ("code", "status", "fields"),
  [
    ("anything", ToolStatus.OK, {"exit_code": 0, "stdout": "ok\n"}),
    ("slow", ToolStatus.TIMEOUT, {"cause": "wall", "stdout": "so far"}),
    ("exit 3", ToolStatus.EXIT, {"exit_code": 3, "stderr": "bye"}),
    ("segv", ToolStatus.CRASH, {"signal": 11, "exit_code": None}),
    ("shell segv", ToolStatus.CRASH, {"signal": 11, "exit_code": None}),
    ("flood", ToolStatus.OUTPUT_LIMIT, {"stdout": "x" * 4096}),
    (
      "raise ValueError(6 * 7)",
      ToolStatus.ERROR,
      {"error_type": "ValueError", "exit_code": 1},
    ),
    ("broken", ToolStatus.INFRA, {"retries": 2, "cause": "sandbox"}),
    ("no code", ToolStatus.INFRA, {"retries": 2}),
    ("numeric stderr", ToolStatus.INFRA, {"retries": 2}),
  ],
)
def test_sandbox_fusion_has_one_status_for_each_ending(
  serve, code, status, fields
):
  server = serve(fusion)
  with client(server, protocol="sandbox-fusion", max_retries=2) as box:
    result = box.run(code)
  assert result.status == status
  assert {name: getattr(result, name) for name in fields} == fields
  assert "\n" not in (result.stderr if status == ToolStatus.INFRA else "")


def test_sandbox_fusion_is_asked_in_its_own_words(serve):
  server = serve(fusion)
  with client(server, protocol="sandbox-fusion") as box:
    result = box.run("c", stdin="i", limits=contract.Limits(wall_s=1.5))
  assert result.wall_ms == 500
  assert set(server.paths) == {"/run_code"}
  assert server.bodies[-1] == {
    "language": "python",
    "code": "c",
    "stdin": "i",
    "compile_timeout": 1.5,
    "run_timeout": 1.5,
    "memory_limit_MB": -1,
  }


# ------------------------------------------------------------ broken servers


def test_errors_that_pass_are_retried(serve):
  server = serve(judge)
  with client(server) as box:
    left = [503, 500]
    server.answer = lambda body: left.pop() if left else judge(body)
    result = box.run("x")
    assert (result.status, result.retries) == (ToolStatus.OK, 2)
    assert box.stats()["status"] == {"ok": 1}


def test_retries_come_later_and_later(serve):
  server = serve(judge)
  with client(server, max_retries=3, backoff_s=0.04) as box:
    times = []
    server.answer = lambda body: times.append(time.monotonic()) or 500
    assert box.run("x").retries == 3
  assert len(times) == 4
  for i in range(3):
    assert times[i + 1] - times[i] >= 0.75 * 0.04 * 2**i


def test_the_programs_own_failures_are_not_retried(serve):
  server = serve(judge)
  with client(server) as box:
    for code in ("worker_timeout", "exit", "invalid_input"):
      assert box.run(code).retries == 0
  assert len(server.batches()) == 3


@pytest.mark.parametrize(
  ("answer", "why"),
  [
    (500, "HTTP 500"),
    (302, "HTTP 302"),
    (b'{"results": [{"run_suc', "not JSON"),
    (b"", "not JSON"),
    (b"\xff\xfe", "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b'{"results": ' + b"9" * 5000 + b"}", "not JSON"),
    (pickle.dumps({"results": []}), "not JSON"),
    ([], "no list of results"),
    ({"results": {"0": {}}}, "no list of results"),
    ({"results": []}, "leaves this call out"),
    ({"results": [{}]}, "wrong type"),
    ({"results": [[], []]}, "leaves this call out"),
  ],
)
def test_an_answer_that_is_none_is_infra(serve, answer, why):
  server = serve(judge)
  with client(server, max_retries=1) as box:
    server.answer = lambda body: answer
    result = box.run("x")
    server.answer = judge
    assert box.run("x").status == ToolStatus.OK  # nothing is stuck
  assert (result.status, result.cause) == (ToolStatus.INFRA, "sandbox")
  assert why in result.stderr
  assert "\n" not in result.stderr
  assert result.retries == 1


@pytest.mark.parametrize("tells_length", [True, False])
def test_an_answer_of_50_mb_is_not_read_to_its_end(serve, tells_length):
  n_sent = 0

  def flood(handler):
    nonlocal n_sent
    handler.send_response(200)
    if tells_length:
      handler.send_header("Content-Length", str(50 << 20))
    handler.end_headers()
    for _ in range(50):
      handler.wfile.write(b" " * (1 << 20))
      n_sent += 1

  server = serve(judge)
  with client(server, max_retries=0) as box:
    server.raw = flood
    result = box.run("x")
  assert result.status == ToolStatus.INFRA
  assert str(exchange.ANSWER_BYTES) in result.stderr
  assert n_sent < 40


def say_nothing(handler):
  handler.close_connection = True


def drip(handler):
  handler.send_response(200)
  handler.end_headers()
  for _ in range(300):
    handler.wfile.write(b" ")
    time.sleep(0.01)


def babble(handler):
  handler.wfile.write(b"220 mail.example ESMTP\r\n")
  handler.close_connection = True


def stop_half_way(handler):
  handler.send_response(200)
  handler.send_header("Content-Length", "1000")
  handler.end_headers()
  handler.wfile.write(b'{"results": [')
  handler.close_connection = True


@pytest.mark.parametrize(
  ("raw", "why"),
  [
    (say_nothing, "closed the connection"),
    (drip, "in time"),
    (babble, "not HTTP"),
    (stop_half_way, "not JSON"),
  ],
)
def test_a_connection_that_fails_is_infra(serve, raw, why):
  server = serve(judge)
  limits = contract.Limits(wall_s=0.05)
  with client(server, max_retries=0, timeout_s=0.2, limits=limits) as box:
    server.raw = raw
    result = box.run("x")
  assert result.status == ToolStatus.INFRA
  assert why in result.stderr


def test_a_server_that_hangs_is_given_up_at_the_timeout(serve):
  server = serve(judge)
  limits = contract.Limits(wall_s=0.05)
  with client(server, max_retries=1, timeout_s=0.1, limits=limits) as box:
    server.go_on.clear()
    start = time.monotonic()
    result = box.run("x")
    assert 0.25 < time.monotonic() - start < 1.5
    server.go_on.set()
  assert (result.status, result.retries) == (ToolStatus.INFRA, 1)
  assert "in time" in result.stderr


def test_a_server_that_dies_is_infra(serve):
  server = serve(judge)
  with client(server, max_retries=1) as box:
    server.close()
    result = box.run("x")
  assert result.status == ToolStatus.INFRA
  assert "cannot be reached" in result.stderr


# ----------------------------------------------------------- start and close


def test_start_refuses_a_port_without_server():
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))  # bound, but nobody listens
    url = f"http://127.0.0.1:{free.getsockname()[1]}"
    box = external.ExternalSandbox(url, backoff_s=0.005)
    with pytest.raises(contract.SandboxError, match="cannot be reached") as e:
      box.start()
  assert "\n" not in str(e.value)
  with pytest.raises(contract.SandboxError, match="not running"):
    box.run("x")


@pytest.mark.parametrize(
  ("row", "why"),
  [
    ({"stdout": "43\n"}, "instead of ok and 42"),
    ({"run_success": False}, "with error instead"),
    ({"run_success": True, "stdout": "42\n"}, "instead of error"),
    ({"reason": "queue_timeout"}, "queue_timeout"),
  ],
)
def test_start_refuses_a_server_that_answers_wrongly(serve, row, why):
  def answer(body):
    rows = [{**judge_row(s), **row} for s in body["submissions"]]
    return {"results": rows}

  with pytest.raises(contract.SandboxError, match=why):
    client(serve(answer)).start()


def test_start_does_not_wait_for_ever(serve):
  server = serve(judge)
  server.go_on.clear()
  with pytest.raises(contract.SandboxError, match="no answer within 0.1 s"):
    client(server, start_timeout_s=0.1).start()


def test_close_ends_what_is_open_and_a_second_start_works(serve):
  n_threads = threading.active_count()
  server = serve(judge)
  box = client(server, concurrency=1).start()
  server.go_on.clear()
  futures = [box.submit(str(i)) for i in range(5)]
  while not server.batches():
    time.sleep(0.002)
  start = time.monotonic()
  box.close()
  box.close()
  assert time.monotonic() - start < 1
  for future in futures:
    result = future.result(0)
    assert (result.status, result.cause) == (ToolStatus.INFRA, "sandbox")
    assert result.stderr == "the sandbox was closed"
  with pytest.raises(contract.SandboxError, match="not running"):
    box.submit("x")
  server.go_on.set()
  with box:
    assert box.run("x").status == ToolStatus.OK
    assert box.stats()["calls"] == 1
  names = [thread.name for thread in threading.enumerate()]
  assert "roc-external" not in names
  server.close()
  assert threading.active_count() == n_threads


# ------------------------------------------------------- the queue, and calls


def test_what_cannot_run_is_rejected_unsent(serve):
  server = serve(judge)
  with client(server) as box:
    for kw in (
      {"code": "x = 1", "tool": "session"},
      {"code": "x", "tool": "perl"},
      {"code": "a\0b"},
      {"code": 3},
      {"code": "\ud800"},
      {"code": "x" * 11, "limits": contract.Limits(code_bytes=10)},
      {"code": "x", "stdin": b"\xff"},
    ):
      result = box.run(**kw)
      assert (result.status, result.tier) == (ToolStatus.REJECTED, "external")
      assert result.stderr.endswith(".")
    assert "'python'" in box.run("x = 1", tool="session").stderr
  assert server.batches() == []


def test_submit_blocks_while_the_queue_is_full_then_is_infra(serve):
  server = serve(judge)
  with client(server, concurrency=1, queue_size=2, queue_timeout_s=0.3) as box:
    server.go_on.clear()
    sent = box.submit("sent")
    while not server.batches():
      time.sleep(0.002)
    waiting = [box.submit("waits"), box.submit("waits")]
    start = time.monotonic()
    full = box.submit("one too many")
    assert time.monotonic() - start > 0.2
    for future in [full, *waiting]:
      result = future.result(2)
      assert (result.status, result.cause) == (ToolStatus.INFRA, "queue")
    server.go_on.set()
    assert sent.result(2).status == ToolStatus.OK


def test_submit_goes_on_when_the_queue_has_room(serve):
  server = serve(judge)
  with client(server, concurrency=1, queue_size=1, queue_timeout_s=5) as box:
    server.go_on.clear()
    timer = threading.Timer(0.1, server.go_on.set)
    timer.start()
    futures = [box.submit(str(i)) for i in range(6)]
    assert all(f.result(2).status == ToolStatus.OK for f in futures)
    timer.join()


def test_a_call_that_is_given_up_makes_room(serve):
  server = serve(judge)
  with client(server, concurrency=1, queue_size=1, queue_timeout_s=5) as box:
    server.go_on.clear()
    box.submit("sent")
    while not server.batches():
      time.sleep(0.002)
    queued = box.submit("queued")
    timer = threading.Timer(0.05, box.cancel, [queued])
    timer.start()
    start = time.monotonic()
    box.submit("next")
    assert time.monotonic() - start < 2
    assert queued.result(0).cause == "cancelled"
    timer.join()


def test_calls_that_are_given_up_are_infra(serve):
  server = serve(judge)
  with client(server, concurrency=1) as box:
    server.go_on.clear()
    sent = box.submit("sent", trajectory="a")
    while not server.batches():
      time.sleep(0.002)
    queued = box.submit("queued", trajectory="a")
    ended = box.submit("ended", trajectory=(1, 2))
    kept = box.submit("kept", trajectory="a")
    assert box.stats()["queued"] == 3
    assert box.stats()["running"] == 1
    assert box.cancel(sent)
    assert box.cancel(queued)
    assert not box.cancel(queued)
    box.end_trajectory((1, 2))
    for future in (sent, queued, ended):
      result = future.result(0)
      assert (result.status, result.cause) == (ToolStatus.INFRA, "cancelled")
    server.go_on.set()
    assert kept.result(2).status == ToolStatus.OK
    assert box.stats()["status"] == {"infra": 3, "ok": 1}
  assert server.batches() == [["sent"], ["kept"]]


def test_a_call_that_waits_for_its_retry_can_be_given_up(serve):
  server = serve(judge)
  with client(server, backoff_s=30) as box:
    server.answer = lambda body: 500
    future = box.submit("x")
    while not server.batches() or box.stats()["queued"] == 0:
      time.sleep(0.002)
    assert box.cancel(future)
    assert future.result(0).cause == "cancelled"
    assert box.stats()["queued"] == 0


def test_a_future_that_its_holder_cancels_is_not_sent(serve):
  server = serve(judge)
  with client(server, concurrency=1) as box:
    server.go_on.clear()
    first = box.submit("first")
    while not server.batches():
      time.sleep(0.002)
    future = box.submit("never")
    assert future.cancel()
    server.go_on.set()
    assert first.result(2).status == ToolStatus.OK
    assert box.run("last").status == ToolStatus.OK
  assert server.batches() == [["first"], ["last"]]


def test_arun_runs_many_and_a_cancelled_task_gives_its_call_up(serve):
  server = serve(judge)

  async def use(box):
    results = await asyncio.gather(*[box.arun(str(i)) for i in range(20)])
    assert all(r.status == ToolStatus.OK for r in results)
    assert (await box.arun("x", tool="session")).status == ToolStatus.REJECTED
    server.go_on.clear()
    task = asyncio.create_task(box.arun("given up"))
    while box.stats()["running"] == 0:
      await asyncio.sleep(0.002)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
      await task
    assert box.stats()["running"] == 0
    server.go_on.set()

  with client(server, queue_size=4) as box:
    asyncio.run(use(box))


# ----------------------------------------------------- record and arguments


def test_the_record_names_the_server_and_no_secret(serve, tmp_path):
  (tmp_path / "token").write_text("hush\n")
  server = serve(judge)
  box = client(
    server,
    token_file=str(tmp_path / "token"),
    headers={"X-Team": "secret"},
    seed=5,
  )
  assert box.tier == "external"
  with box:
    info = box.info()
    stats = box.stats()
  assert server.headers[0]["Authorization"] == "Bearer hush"
  assert server.headers[0]["X-Team"] == "secret"
  text = json.dumps(info)
  assert "hush" not in text
  assert "secret" not in text
  assert info["headers"] == ["Authorization", "X-Team"]
  assert info["url"] == server.url + "/run/long-batch"
  assert (info["tier"], info["seed"]) == ("external", 5)
  assert info["line_offset"] == N_LINES_BEFORE
  assert {"calls", "status", "requests", "queued", "running"} <= set(stats)


@pytest.mark.parametrize(
  ("kw", "why"),
  [
    ({"url": "127.0.0.1:8088"}, "http or https"),
    ({"url": "ftp://h"}, "http or https"),
    ({"url": "http://u:p@h"}, "no credentials"),
    ({"url": "http://h/?q=1"}, "more than a server"),
    ({"url": "http://h:x"}, "malformed"),
    ({"protocol": "smtp"}, "code-judge, sandbox-fusion"),
    ({"max_batch": 0}, "max_batch"),
    ({"concurrency": 0}, "concurrency"),
    ({"queue_size": 0}, "queue_size"),
    ({"max_retries": -1}, "max_retries"),
    ({"timeout_s": float("nan")}, "timeout_s"),
    ({"queue_timeout_s": float("inf")}, "queue_timeout_s"),
    ({"headers": {"X": "a\r\nY: b"}}, "one line"),
  ],
)
def test_impossible_arguments_are_named(kw, why):
  with pytest.raises(ValueError, match=why):
    external.ExternalSandbox(**{"url": "http://h:1", **kw})


def test_a_token_that_cannot_be_read_is_named(tmp_path):
  box = external.ExternalSandbox(
    "http://127.0.0.1:1", token_file=str(tmp_path / "none")
  )
  with pytest.raises(contract.SandboxError, match="cannot be read"):
    box.start()
