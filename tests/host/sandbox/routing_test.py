"""A glance at the imports finds the image; the queue is fair."""

import time

import pytest

from roc.host.sandbox import calls, contract, routing, waiting


@pytest.mark.parametrize(
  "code, image",
  [
    ("print(1)", "bare"),
    ("import math, json", "bare"),
    ("import numpy", "maths"),
    ("import numpy as np, os", "maths"),
    ("import os, sympy", "maths"),
    ("from sympy import *", "maths"),
    ("from scipy.optimize import brentq", "maths"),
    ("def f():\n  import mpmath\nf()", "maths"),
    ("if 1: import numpy", "maths"),
    ("x = 1; import numpy", "maths"),
    ("__import__('numpy')", "maths"),
    ("import importlib\nimportlib.import_module('sympy')", "maths"),
    ("import math_verify, numpy", "verify"),
    ("print('numpy')", "bare"),
    ("# numpy is not imported here", "bare"),
    ("numpyish = 1", "bare"),
    ("import", "bare"),
    ("from . import numpy", "bare"),
    ("", "bare"),
  ],
)
def test_imports_choose_the_image(code, image):
  assert routing.image_for(code) == image


def test_a_long_program_is_glanced_at_quickly():
  code = "import numpy\n" * 5000
  start = time.process_time()
  assert routing.image_for(code) == "maths"
  assert time.process_time() - start < 0.5


def call(number, trajectory="t", tool="python"):
  return calls.Call.new(
    number, "pass", b"", tool, trajectory, contract.Limits(), "00"
  )


def test_trajectories_take_turns():
  queue = waiting.FairQueue(99)
  for i in range(4):
    queue.push(call(i, "many"))
  queue.push(call(9, "one"))
  order = [queue.pop(set()).id for _ in range(5)]
  assert order == [0, 9, 1, 2, 3]
  assert queue.pop(set()) is None and len(queue) == 0


def test_cells_of_a_busy_session_wait_and_others_go_on():
  queue = waiting.FairQueue(99)
  first, other = call(1, "a", "session"), call(2, "b", "session")
  queue.push(first)
  queue.push(other)
  assert queue.pop({first.session}) is other
  assert queue.pop({first.session}) is None
  assert queue.pop(set()) is first


def test_what_is_run_again_comes_first_and_what_is_late_is_taken_out():
  queue = waiting.FairQueue(2)
  early, again = call(1, "a"), call(2, "b")
  queue.push(early)
  queue.push_first(again)
  assert queue.is_full
  early.submitted -= 60
  assert queue.take_late(30) == [early]
  assert queue.pop(set()) is again
