"""Length-prefixed JSON: the only thing that crosses the process border.

Neither side unpickles. A message is four big-endian bytes of length and a JSON
object of at most `MAX_BYTES`; anything else ends the connection.
"""

import json
import re
import struct

MAX_BYTES = 64 << 20
_LENGTH = struct.Struct("!I")


class WireError(ValueError):
  """The peer sent what is no message."""


def pack(message: dict) -> bytes:
  """Returns one framed message; ASCII, so lone surrogates pass."""
  body = json.dumps(message, separators=(",", ":")).encode("ascii")
  if len(body) > MAX_BYTES:
    raise WireError(
      f"a sandbox message of {len(body)} bytes exceeds {MAX_BYTES}: lower"
      " Limits.output_bytes or send less"
    )
  return _LENGTH.pack(len(body)) + body


class Unpacker:
  """Cuts a byte stream into messages, however the kernel chopped it."""

  def __init__(self):
    self._buffer = bytearray()

  def feed(self, data: bytes) -> list[dict]:
    """Takes what arrived and returns the messages that are now complete.

    Args:
      data: the next bytes of the stream, any number of them.

    Returns:
      The messages, oldest first; empty while one is still incomplete.

    Raises:
      WireError: a length above `MAX_BYTES`, or a body that is no JSON object.
    """
    self._buffer += data
    messages = []
    while len(self._buffer) >= _LENGTH.size:
      (n_bytes,) = _LENGTH.unpack_from(self._buffer)
      if n_bytes > MAX_BYTES:
        raise WireError(f"a message announces {n_bytes} bytes")
      end = _LENGTH.size + n_bytes
      if len(self._buffer) < end:
        break
      try:
        message = json.loads(bytes(self._buffer[_LENGTH.size : end]))
      except ValueError as error:
        raise WireError("a message is not JSON") from error
      if not isinstance(message, dict):
        raise WireError("a message is not a JSON object")
      del self._buffer[:end]
      messages.append(message)
    return messages


def numbers(data: bytes, word: bytes, n: int) -> list[int] | None:
  """Reads a message of one word and numbers, as processes below send them.

  Args:
    data: the message; anything at all.
    word: that it must begin with.
    n: how many numbers must follow.

  Returns:
    The numbers, each of at most ten decimal digits; None for another message.
  """
  pattern = re.escape(word) + b"( [0-9]{1,10}){%d}" % n
  if re.fullmatch(pattern, data) is None:
    return None
  return [int(digits) for digits in data.split()[-n:]]
