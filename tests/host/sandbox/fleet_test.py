"""Zygotes whose death and whose name reach the supervisor in any order."""

import socket

import pytest

from roc.host.sandbox import fleet as fleet_lib
from roc.host.sandbox import loop, zygote

# Above any pid that Linux gives out: to kill them harms nobody.
DEAD, SPARE = (1 << 22) + 1, (1 << 22) + 2


@pytest.mark.parametrize("says", ["pid", "confined"])
def test_a_zygote_that_was_reaped_before_it_was_named_is_dropped(says):
  events = loop.Loop()
  fleet = fleet_lib.Fleet("/nowhere", 1, events, lambda number, why: None)
  template, at_template = socket.socketpair(
    socket.AF_UNIX, socket.SOCK_SEQPACKET
  )
  ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
  with at_template, theirs, template:
    image = fleet_lib.Image("bare", template, pid=1)
    image.is_loaded = True
    fleet.images["bare"] = image
    made = fleet_lib.Zygote("bare", ours)
    image.zygotes.append(made)
    image.unnamed.append(made)
    events.watch(ours.fileno(), lambda: None)
    answers = []
    made.asked[7] = lambda *answer: answers.append(answer)
    assert not fleet.reaped(DEAD)  # it may be a call as well
    at_template.send(zygote.FORKED + f" {DEAD}".encode())
    if says == "pid":
      fleet._hear_template(image)
    else:
      theirs.send(zygote.CONFINED + f" {SPARE} 0".encode())
      fleet._hear_zygote(image, made, plan=None)
    assert answers == [(0, 0, "the zygote died")]
    assert not image.zygotes and not made.is_ready and not image.unnamed
    assert fleet.pick("bare") is None
  events.close()
