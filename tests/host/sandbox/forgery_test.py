"""Messages that no honest process sends cost the call that they come from."""

import random
import socket

import pytest

from roc import layout
from roc.host.sandbox import Limits, fleet, loop, running, verdict, wire
from roc.layout import ToolStatus

PRELUDE = """
import os, sys, time
def send(data):
  try: os.write(3, data)
  except OSError: pass
frame = sys._getframe()
while 'DIED' not in frame.f_globals: frame = frame.f_back
runner = frame.f_globals  # names of the process that holds the session
"""
NUMBERS = [
  b"1.5",
  b"1e3",
  b"-1",
  b"+1",
  b"0x1",
  b"1_0",
  b"nan",
  b"inf",
  b"",
  b" ",
]
NUMBERS += [
  b"9" * 11,
  b"9" * 4000,
  "٣".encode(),
  b"1\n",
  b"\x001",
  b"1 1",
  b"00",
]


def forged(seed: int, n: int) -> list[bytes]:
  """Structured, mutated and random messages."""
  draw = random.Random(seed)
  words = [b"hello", b"done", b"died", b"forked", b"failed", b"infra", b""]
  messages = []
  for _ in range(n):
    chosen = [
      draw.choice(NUMBERS + [b"0"] * 9) for _ in range(draw.randrange(5))
    ]
    data = bytearray(b" ".join([draw.choice(words), *chosen]))
    for _ in range(draw.choice((0, 0, 1, 3))):
      at = draw.randrange(len(data) + 1)
      data[at : at + draw.randrange(2)] = draw.randbytes(draw.randrange(3))
    messages.append(bytes(data))
  return messages


def attack(box, codes: list[str], name: str) -> list:
  """Runs each code as a cell between two honest cells of its own session."""
  results = []
  for i, code in enumerate(codes):
    run = lambda code, i=i: box.run(
      code, tool="session", trajectory=(name, i), limits=Limits(wall_s=1)
    )
    run(PRELUDE)
    results += [run(code), run("1"), run("os.abort()"), run("2")]
    box.end_trajectory((name, i))
  return results


def assert_only_its_own(box, codes: list[str], name: str) -> None:
  pid = box.supervisor_pid
  slow = [
    box.submit(
      "x = 0\nwhile x < 200_000: x += 1\nprint(x)",
      trajectory=f"neighbour {i}",
      limits=Limits(wall_s=30, cpu_s=20),
    )
    for i in range(9)
  ]
  results = attack(box, codes, name)
  assert ToolStatus.INFRA not in {r.status for r in results}, results
  assert {f.result().stdout for f in slow} == {"200000\n"}
  assert box.supervisor_pid == pid and box.stats()["restarts"] == 0


KNOWN = [
  "send(b'hello 1.5')",
  "send(b'done 1e3')",
  "send(b'died 9 1e300 -5')",
  # The guardian after this cell says of the next runner whatever is wished.
  "wait = runner['_wait4']\n"
  "runner['_wait4'] = lambda *a: (wait(*a)[0], 10 ** 30, os.times())",
  "class Usage: ru_utime, ru_stime, ru_maxrss = 1e300, 0, 10 ** 30\n"
  "wait = runner['_wait4']\n"
  "runner['_wait4'] = lambda *a: (*wait(*a)[:2], Usage)",
  "wait = runner['_wait4']\n"
  "def forge(*a):\n  pid, status, usage = wait(*a)\n"
  "  return pid, 0x7f, usage\nrunner['_wait4'] = forge",
  "runner['DIED'] = b'died 1 1 1 1'\nrunner['DONE'] = b'done 7\\nhello'",
  "runner['HELLO'] = b'hello 1.5'",
]


def test_forged_messages_cost_the_session_and_nobody_else(strong_box):
  codes = [*KNOWN, *(f"send({data!r})" for data in forged(1, 6))]
  assert_only_its_own(strong_box, codes, "forged")


@pytest.mark.slow
def test_many_forged_messages_cost_the_session_and_nobody_else(box):
  codes = [*KNOWN, *(f"send({data!r})" for data in forged(2, 20))]
  assert_only_its_own(box, codes, "forged often")


def test_a_number_is_a_few_decimal_digits():
  assert wire.numbers(b"done 0", b"done", 1) == [0]
  assert wire.numbers(b"died 9 120 4096", b"died", 3) == [9, 120, 4096]
  for number in NUMBERS:
    if number != b"00":
      assert wire.numbers(b"done " + number, b"done", 1) is None, number
  for data in forged(3, 20_000):
    got = wire.numbers(data, b"died", 3)
    assert got is None or max(got) < 10**10


def test_no_record_and_no_wait_status_is_infra():
  """Whatever the page holds, and whatever is said to be the wait status."""
  draw = random.Random(4)
  words = [b"ok", b"error", b"memory", b"resource", b"exit", b"infra", b"crash"]
  for i in range(5000):
    record = bytearray(512)
    note = verdict.pack_record(draw.choice(words), "E" * draw.randrange(600))
    record[: len(note)] = note
    for _ in range(draw.randrange(4)):
      record[draw.randrange(512)] = draw.randrange(256)
    found = verdict.judge(
      verdict.Evidence(
        wait_status=draw.randrange(1 << 16),
        record=bytes(record if i % 2 else draw.randbytes(draw.randrange(600))),
      )
    )
    assert found.status in layout.JUDGED_STATUSES
    assert found.error_type == "" or found.error_type.isidentifier()


def test_a_zygote_that_says_anything_else_is_replaced():
  for data in [*forged(5, 300), b"!1 x", b"7 7 7 7", b"forked 9 1 1 1"]:
    events = loop.Loop()
    told = []
    boxes = fleet.Fleet("/nowhere", 1, events, lambda *a, t=told: t.append(a))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    template, at_template = socket.socketpair()
    image = fleet.Image("bare", template, pid=1)
    boxes.images["bare"] = image
    made = fleet.Zygote("bare", ours)
    made.is_ready = True
    image.zygotes.append(made)
    events.watch(ours.fileno(), lambda: None)
    answers = []
    made.asked[7] = lambda *answer, a=answers: a.append(answer)
    theirs.send(data)
    boxes._hear_zygote(image, made, plan=None)
    assert answers in ([], [(0, 0, "the zygote died")]), data
    assert bool(told) == (made in image.zygotes), data
    for end in (ours, theirs, template, at_template):
      end.close()
    events.close()


def test_whatever_is_raised_about_a_call_costs_that_call(capsys):
  given_up = []
  running.contain(lambda: 1 // 0, lambda: given_up.append(1))
  assert given_up == [1]
  assert "ZeroDivisionError" in capsys.readouterr().err

  def interrupted():
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    running.contain(interrupted, lambda: given_up.append(2))
  assert given_up == [1]
