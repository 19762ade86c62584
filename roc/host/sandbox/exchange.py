"""HTTP POSTs with an end: a deadline, a cap on the answer, an abort.

A connection serves one request. Keeping it would save a handshake of a fraction
of a millisecond and cost the case of a server that closes it in between.
"""

import contextlib
import dataclasses
import http.client
import pathlib
import socket
import threading
import time
import urllib.parse
from collections.abc import Mapping

from roc.host.sandbox import contract

ANSWER_BYTES = 16 << 20
LATE = "the executor did not answer in time"
_CONNECT_S = 5.0
_CHUNK = 1 << 16


class ExchangeError(Exception):
  """No answer; the text is a sentence that says what happened instead."""


@dataclasses.dataclass(frozen=True)
class Address:
  """Where to POST to."""

  scheme: str
  host: str
  port: int
  path: str

  @classmethod
  def parse(cls, url: str, path: str) -> "Address":
    """Returns the address of `path` below a server's URL.

    Args:
      url: `http://host:port` or `https://...`, with a path before the server's
        own where it stands behind a proxy.
      path: of the protocol, which the URL may end with already.

    Raises:
      ValueError: not such a URL; or one with a name and password, a query or a
        fragment. Credentials would end up in the run's record.
    """
    advice = "give one like 'http://host:8088'"
    try:
      parts = urllib.parse.urlsplit(url)
      port = parts.port
    except ValueError as error:
      raise ValueError(f"url {url!r} is malformed: {error}; {advice}") from None
    if "@" in parts.netloc:
      raise ValueError("url must hold no credentials: use token_file")
    if parts.scheme not in ("http", "https") or not parts.hostname:
      raise ValueError(f"url {url!r} is not of http or https; {advice}")
    if parts.query or parts.fragment or not url.isprintable() or " " in url:
      raise ValueError(f"url {url!r} holds more than a server; {advice}")
    prefix = parts.path.rstrip("/").removesuffix(path)
    usual = 443 if parts.scheme == "https" else 80
    return cls(parts.scheme, parts.hostname, port or usual, prefix + path)

  def __str__(self) -> str:
    host = f"[{self.host}]" if ":" in self.host else self.host
    return f"{self.scheme}://{host}:{self.port}{self.path}"


class Exchange:
  """A POST of JSON and its answer; `run` once.

  Args:
    address: where to.
    body: what is sent.
    headers: beside the type of the content.
    timeout_s: from now to the last byte of the answer. Only single reads are
      bound to it; who made the exchange aborts it at its `deadline`.
  """

  def __init__(
    self,
    address: Address,
    body: bytes,
    headers: dict[str, str],
    timeout_s: float,
  ):
    self.deadline = time.monotonic() + timeout_s
    self._address = address
    self._body = body
    self._headers = {
      **headers,
      "Content-Type": "application/json",
      "Connection": "close",
    }
    self._timeout_s = timeout_s
    self._lock = threading.Lock()
    self._socket: socket.socket | None = None
    self._aborted_for = ""

  def run(self) -> bytes:
    """Sends the request and returns the body of the answer.

    Raises:
      ExchangeError: no connection, no answer in time, an answer of another
        status than 200 or above `ANSWER_BYTES`, or aborted.
    """
    kind = (
      http.client.HTTPSConnection
      if self._address.scheme == "https"
      else http.client.HTTPConnection
    )
    connection = kind(
      self._address.host,
      self._address.port,
      timeout=min(self._timeout_s, _CONNECT_S),
    )
    try:
      return self._run(connection)
    except (OSError, http.client.HTTPException, ValueError) as error:
      why = self._aborted_for or _sentence(error)
      raise ExchangeError(why) from error
    finally:
      with self._lock:
        self._socket = None
      connection.close()

  def _run(self, connection: http.client.HTTPConnection) -> bytes:
    try:
      connection.connect()
    except TimeoutError as error:
      raise ExchangeError("the executor cannot be reached in time") from error
    except OSError as error:
      reason = error.strerror or type(error).__name__
      raise ExchangeError(
        f"the executor cannot be reached: {reason}"
      ) from error
    with self._lock:
      self._socket = connection.sock
      self._raise_if_aborted()
    connection.sock.settimeout(self._timeout_s)
    connection.request(
      "POST", self._address.path, body=self._body, headers=self._headers
    )
    with connection.getresponse() as response:
      data = self._read(response)
    self._raise_if_aborted()
    return data

  def _raise_if_aborted(self) -> None:
    if self._aborted_for:
      raise ExchangeError(self._aborted_for)

  def _read(self, response: http.client.HTTPResponse) -> bytes:
    if response.status != 200:
      raise ExchangeError(f"the executor answered with HTTP {response.status}")
    data = bytearray()
    length = response.length or 0
    while length <= ANSWER_BYTES and (chunk := response.read1(_CHUNK)):
      data += chunk
      length = len(data)
    if length > ANSWER_BYTES:
      raise ExchangeError(
        f"the executor's answer is longer than {ANSWER_BYTES} bytes"
      )
    return bytes(data)

  def abort(self, why: str) -> None:
    """Makes `run` in another thread raise, with the sentence `why`."""
    with self._lock:
      self._aborted_for = self._aborted_for or why
      if self._socket is None:
        return
      # The base class': TLS's own would drop state that the reader uses. It
      # raises where the other side was faster.
      with contextlib.suppress(OSError):
        socket.socket.shutdown(self._socket, socket.SHUT_RDWR)


class Client:
  """Posts to one address; all that is open can be ended. Thread-safe.

  Args:
    address: where to.
    headers: of every request.
    token_file: holds a token, sent as `Authorization: Bearer ...`.

  Raises:
    ValueError: a header that HTTP cannot carry.
  """

  def __init__(
    self,
    address: Address,
    headers: Mapping[str, str],
    token_file: str | None = None,
  ):
    for name, value in headers.items():
      text = f"{name}{value}"
      if not (isinstance(value, str) and text.isascii() and text.isprintable()):
        raise ValueError(f"the header {name!r} must be one line of ASCII")
    self._address = address
    self._given = dict(headers)
    self._token_file = token_file
    self._headers: dict[str, str] = {}
    self._lock = threading.Lock()
    self._open: set[Exchange] = set()
    self._closed_for = ""
    self.n_requests = 0

  @property
  def header_names(self) -> list[str]:
    """Names of what is sent beside the usual; never the values."""
    return sorted(self._headers)

  def open(self) -> None:
    """Reads the token; allows requests from now on.

    Raises:
      contract.SandboxError: the token cannot be read, or is not one line.
    """
    self._headers = dict(self._given)
    if self._token_file is not None:
      token = _read_token(self._token_file)
      self._headers["Authorization"] = f"Bearer {token}"
    self._closed_for = ""

  def close(self, why: str) -> None:
    """Ends all requests, those that come later too, with the sentence `why`."""
    with self._lock:
      self._closed_for = why
      still_open = list(self._open)
    for request in still_open:
      request.abort(why)

  def post(self, body: bytes, timeout_s: float) -> bytes:
    """Returns the answer to a request.

    Raises:
      ExchangeError: there is none; see `Exchange.run`.
    """
    request = Exchange(self._address, body, self._headers, timeout_s)
    with self._lock:
      if self._closed_for:
        raise ExchangeError(self._closed_for)
      self.n_requests += 1
      self._open.add(request)
    try:
      return request.run()
    finally:
      with self._lock:
        self._open.discard(request)

  def end_late(self) -> None:
    """Ends the requests that are past their deadline; call it regularly."""
    now = time.monotonic()
    with self._lock:
      late = [request for request in self._open if request.deadline <= now]
    for request in late:
      request.abort(LATE)


def _read_token(path: str) -> str:
  try:
    token = pathlib.Path(path).read_text("utf-8").strip()
  except (OSError, UnicodeDecodeError) as error:
    raise contract.SandboxError(
      f"the token file {path} cannot be read: {type(error).__name__}"
    ) from error
  if not token or not token.isascii() or not token.isprintable():
    raise contract.SandboxError(
      f"the token file {path} must hold one line of plain characters"
    )
  return token


def _sentence(error: Exception) -> str:
  if isinstance(error, TimeoutError):
    return LATE
  if isinstance(error, ConnectionError):
    return "the executor closed the connection without an answer"
  return f"the executor's answer is not HTTP: {type(error).__name__}"
