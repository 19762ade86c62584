"""Addresses are masked where the interpreter writes them, and nowhere else."""

import time

import pytest

from roc.host.sandbox import masking, source

KEPT = [
  "peak at 0xdeadbeef",
  "mapped at 0x7f0012345678, 4 bytes",
  "a < b at 0x7f0012345678>",
  "f -> x at 0x7f0012345678>",
  "<p>text</p> at 0x7f0012345678;",
  "thread 0x1234567 started 1234567890",
  "<a\nb at 0x7f0012345678>",
  "<b at 0x12>",
]
MASKED = {
  "<object object at 0x7f0012345678>": "<object object at 0x0>",
  "<bound method A.f of <A object at 0x55aa01>>": (
    "<bound method A.f of <A object at 0x0>>"
  ),
  "f -> <function <lambda> at 0x7f0012345678>, 1": (
    "f -> <function <lambda> at 0x0>, 1"
  ),
  "<weakref at 0x7f0012345678; to 'A' at 0x7f0012345679>": (
    "<weakref at 0x0; to 'A' at 0x0>"
  ),
  "<asyncio.locks.Lock object at 0x7f0012345678 [unlocked]>": (
    "<asyncio.locks.Lock object at 0x0 [unlocked]>"
  ),
  "<Thread(Thread-1, started daemon 140213377316544)>": (
    "<Thread(Thread-1, started daemon 0)>"
  ),
  "Generator(PCG64) at 0x7F00AB12CD34": "Generator(PCG64) at 0x0",
  "Thread 0x00007f0012345678 (most recent call first):": (
    "Thread 0x0 (most recent call first):"
  ),
}


@pytest.mark.parametrize("text", KEPT)
def test_what_a_program_printed_itself_is_kept(text):
  assert masking.mask_addresses(text) == text


@pytest.mark.parametrize("text, masked", MASKED.items())
def test_what_a_repr_holds_is_masked(text, masked):
  assert masking.mask_addresses(text) == masked


@pytest.mark.parametrize(
  "unit", ["<a", ">", "<a at 0x123456;", " at 0x123456>", " started ", "<a>\n"]
)
def test_no_output_of_legal_size_takes_long(unit):
  text = " 0x" + unit * (4096 // len(unit))
  best_s = float("inf")
  for _ in range(5):
    started = time.perf_counter()
    masking.mask_addresses(text)
    best_s = min(best_s, time.perf_counter() - started)
  assert best_s < 0.005


@pytest.mark.parametrize(
  "unit", ["```\n", " ", "\n", "```python\n" + " " * 99, "\t~~~", "!ls\n"]
)
def test_no_code_of_legal_size_takes_long_to_clean(unit):
  started = time.perf_counter()
  source.clean("```python\n" + unit * (65536 // len(unit)))
  assert time.perf_counter() - started < 0.5
