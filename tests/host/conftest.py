"""Fixtures of the host side: tokenizer, chat format, a canned sandbox."""

import dataclasses
from concurrent import futures

import pytest

from roc import layout
from roc.host import chat as chat_lib
from roc.host import tokenizer as tokenizer_lib


@dataclasses.dataclass(frozen=True)
class CannedResult:
  """The part of a sandbox's result that the text side reads."""

  status: layout.ToolStatus = layout.ToolStatus.OK
  stdout: str = ""
  stderr: str = ""
  error_type: str = ""
  exit_code: int | None = 0


class CannedSandbox:
  """Answers each program from a table and notes what was asked."""

  def __init__(self, results=None):
    self.results = results or {}
    self.asked = []

  def submit(self, code, *, trajectory="", call_index=0):
    self.asked.append((code, trajectory, call_index))
    future = futures.Future()
    future.set_result(self.results.get(code, CannedResult()))
    return future


@pytest.fixture(scope="session")
def tokenizer():
  return tokenizer_lib.quickstart_tokenizer()


@pytest.fixture(scope="session")
def chat(tokenizer):
  return chat_lib.ChatFormat(tokenizer)


@pytest.fixture
def canned_result():
  return CannedResult


@pytest.fixture
def canned_sandbox():
  return CannedSandbox
