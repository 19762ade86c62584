"""Conversations as a model's chat template writes them: text and ids.

    python -m roc.main render --model DIR --input FILE

To see what a model reads, and whether it is what it was trained with.
"""

import argparse
import json
from collections.abc import Sequence

from roc import cli, errors, hub, lines
from roc.host import pretrained, templates

_EXAMPLE = '{"messages": [{"role": "user", "content": "Hello"}]}'


def main(argv: Sequence[str]) -> int:
  """Runs `render ...`; returns the exit code.

  Raises:
    errors.UserError: bad flags, a folder or a line that cannot be used.
  """
  values = make_parser().parse_args(argv)
  try:
    tokenizer = pretrained.load_tokenizer(
      hub.fetch(values.model, weights=False)
    )
    made = {
      has_tools: templates.read(values.template, tokenizer, has_tools=has_tools)
      for has_tools in (False, True)
    }
  except ValueError as e:
    raise errors.UserError(str(e)) from e
  for where, fields in lines.read_objects(values.input, _EXAMPLE):
    messages, tools, arguments = _parts(where, fields)
    try:
      text, ids = made[bool(tools)].render(messages, tools, **arguments)
    except ValueError as e:
      raise errors.UserError(f"{where}: {e}") from e
    if values.json:
      print(json.dumps({"text": text, "ids": ids}), flush=True)
    else:
      lines.show(f"{text}\n\n({len(ids)} tokens)")
  return 0


def _parts(where, fields):
  """Messages, tools and the template's other variables of a line."""
  arguments = dict(fields)
  messages = arguments.pop("messages", None)
  tools = arguments.pop("tools", None)
  tools = [] if tools is None else tools
  for name, value in (("messages", messages), ("tools", tools)):
    is_list = isinstance(value, list)
    if not is_list or not all(isinstance(x, dict) for x in value):
      raise errors.UserError(
        f"{where}: field {name!r} must be a list of objects, as in {_EXAMPLE}"
      )
  if not messages:
    raise errors.UserError(f"{where}: field 'messages' is empty")
  return messages, tools, arguments


def make_parser() -> argparse.ArgumentParser:
  """The flags of the command."""
  parser = cli.Parser(
    prog="python -m roc.main render",
    description="Writes conversations with a model's chat template. Every field"
    " of a line beside messages and tools is a variable of the template, such"
    " as add_generation_prompt or enable_thinking. Tags that a user, a tool or"
    " a system text spells are text, never tokens.",
    epilog=f"example: echo '{_EXAMPLE}' | python -m roc.main render"
    " --model=experiments/tiny_qwen3 --json",
  )
  parser.add_argument(
    "--model",
    required=True,
    metavar="MODEL",
    help="folder, or ORG/NAME on the hub; a tokenizer there is enough",
  )
  parser.add_argument(
    "--input",
    default=lines.STDIN,
    metavar="FILE",
    help='lines of JSON with "messages"; by default this command\'s own input',
  )
  parser.add_argument(
    "--template",
    default="",
    metavar="NAME",
    help=f"another template: {', '.join(templates.NAMED)}, or a file",
  )
  parser.add_argument(
    "--json",
    action="store_true",
    help='a line of JSON for each: "text" and "ids"',
  )
  return parser
