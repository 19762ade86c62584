"""The tool calls in a turn of a model.

    python -m roc.main parse < turn.txt

To see which calls a run would make of it, and which it would reject and why.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

from roc import cli, errors, hub, lines
from roc.host import calls, dialects, pretrained, template_chat, tools
from roc.host import tokenizer as tokenizer_lib


def main(argv: Sequence[str]) -> int:
  """Runs `parse ...`; returns the exit code.

  Raises:
    errors.UserError: bad flags, or an input or folder that cannot be used.
  """
  values = make_parser().parse_args(argv)
  text = lines.read_text(values.input)
  spec = tools.TOOLS[values.tool][0] if values.tool else None
  if values.model:
    try:
      tokenizer = pretrained.load_tokenizer(
        hub.fetch(values.model, weights=False)
      )
    except ValueError as e:
      raise errors.UserError(str(e)) from e
    ids = tokenizer.encode_trusted(text)
    turn = calls.parse_turn(
      ids,
      tokenizer,
      tool=spec,
      max_calls=None,
      dialect=_dialect(values, tokenizer),
    )
  else:
    turn = calls.parse_text(text, tool=spec, dialect=_dialect(values))
  found = as_json(turn)
  if values.json:
    print(json.dumps(found))
    return 0
  lines.show(f"content: {found['content']}")
  for call in found["calls"]:
    if "rejected" in call:
      lines.show(f"rejected: {call['rejected']}")
    else:
      lines.show(f"call: {call['name']} {json.dumps(call['arguments'])}")
  return 0


def _dialect(
  values: argparse.Namespace,
  tokenizer: tokenizer_lib.Tokenizer | None = None,
) -> dialects.Dialect:
  """The dialect asked for; else that of the model's template; else Hermes."""
  if values.dialect:
    return dialects.DIALECTS[values.dialect]
  if tokenizer is None or not tokenizer.published.templates:
    return dialects.HERMES
  spec, function = tools.TOOLS[values.tool or "python"]
  schema = tools.tool_schema(function, spec.name)
  try:
    return template_chat.TemplateChat(tokenizer, tools=[schema]).dialect
  except ValueError as e:
    raise errors.UserError(f"{values.model}: {e}; or give --dialect") from e


def as_json(turn: calls.ParsedTurn) -> dict[str, Any]:
  """The turn as the command prints it."""
  return {
    "content": turn.content,
    "calls": [_call(call) for call in turn.calls],
  }


def _call(call: calls.ToolCall) -> Mapping[str, Any]:
  if call.error is not None:
    return {"rejected": f"{call.error}: {call.detail}"}
  return {"name": call.name, "arguments": dict(call.arguments)}


def make_parser() -> argparse.ArgumentParser:
  """The flags of the command."""
  parser = cli.Parser(
    prog="python -m roc.main parse",
    description="Finds the calls in one turn of a model, by the policy in"
    " docs/chat.md.",
    epilog="example: echo 'Let me see. <tool_call>"
    '{"name": "python", "arguments": {"code": "print(1)"}}</tool_call>\''
    " | python -m roc.main parse --json",
  )
  parser.add_argument(
    "--input",
    default=lines.STDIN,
    metavar="FILE",
    help="text of the turn; by default this command's own input",
  )
  parser.add_argument(
    "--tool",
    default="",
    choices=("", *tools.TOOLS),
    help="reject calls of another tool than this one, and other arguments than"
    " it takes; by default any name and any arguments are let through",
  )
  parser.add_argument(
    "--model",
    default="",
    metavar="MODEL",
    help="folder, or ORG/NAME on the hub, with a tokenizer: read the turn as"
    " its tokens, as a run does",
  )
  parser.add_argument(
    "--dialect",
    default="",
    choices=("", *dialects.DIALECTS),
    help="in which calls are written; by default that of the model's chat"
    " template, and without one hermes",
  )
  parser.add_argument(
    "--json",
    action="store_true",
    help='one line of JSON: "content" and "calls", each with "name" and'
    ' "arguments" or with "rejected"',
  )
  return parser
