"""What a model in a Hugging Face folder writes, with the tool or without.

    python -m roc.main generate --model DIR --prompt 'What is 12 * 13?'

It runs what training runs: the engine, and with a tool the agent loop and the
sandbox.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from roc import cli, errors, hub, layout, lines, rollout
from roc.device import engine, families, model, sampling, sharding, weights
from roc.host import episode as episode_lib
from roc.host import pretrained, sandbox, template_chat, tools
from roc.host import tokenizer as tokenizer_lib
from roc.host.sandbox import packages
from roc.host.tasks import problem

_PAGE = 64


class _Asked(NamedTuple):
  """What the model goes on from."""

  prompt: str
  ids: Sequence[int]
  stop_ids: Sequence[int]
  tokenizer: tokenizer_lib.Tokenizer | None  # None: ids are all there is
  chat: template_chat.TemplateChat | None  # None: no turns


def main(argv: Sequence[str]) -> int:
  """Runs `generate ...`; returns the exit code.

  Raises:
    errors.UserError: bad flags, or a folder or prompt that cannot be used.
  """
  values = make_parser().parse_args(argv)
  _check(values)
  values.weights = hub.weights(values.model)
  values.model = hub.fetch(values.model, weights=False)
  asked = _read_ids(values) if values.ids else _read_prompt(values)
  sampler = make_sampler(values, asked)
  if values.tool and asked.chat is not None:
    found = _with_tool(values, asked.chat, sampler, asked.prompt)
  else:
    found = _without(values, sampler, asked)
  for i, one in enumerate(found):
    if values.json:
      print(json.dumps(one), flush=True)
    else:
      heading = f"--- {i + 1} of {values.n}\n" if values.n > 1 else ""
      lines.show(f"{heading}{one.get('text', one['ids'])}")
  return 0


def _read_ids(values: argparse.Namespace) -> _Asked:
  try:
    ids = [int(word) for word in values.ids.replace(",", " ").split()]
    stop_ids = pretrained.eos_ids(values.model)
  except ValueError as e:
    raise errors.UserError(f"generate: --ids: {e}") from e
  size = families.read(values.model).vocab_size
  if not ids or not all(0 <= i < size for i in ids):
    raise errors.UserError(
      f"generate: --ids must be numbers from 0 to {size - 1}"
    )
  return _Asked("", ids, stop_ids, None, None)


def _read_prompt(values: argparse.Namespace) -> _Asked:
  prompt = values.prompt
  if prompt is None:
    prompt = lines.read_text(lines.STDIN).removesuffix("\n")
  if not prompt:
    raise errors.UserError("the prompt is empty; give --prompt or an input")
  try:
    tokenizer = pretrained.load_tokenizer(values.model)
  except ValueError as e:
    raise errors.UserError(str(e)) from e
  if values.raw:
    ids = tokenizer.encode_trusted(prompt)
    return _Asked(prompt, ids, tokenizer.published.eos_ids, tokenizer, None)
  try:
    chat = template_chat.TemplateChat(
      tokenizer,
      tools=[schema_of(values.tool)] if values.tool else [],
      template=values.template,
      system=values.system,
    )
  except ValueError as e:
    raise errors.UserError(
      f"{values.model}: {e}; --raw goes on from the prompt as it is"
    ) from e
  ids = chat.prompt_ids(prompt)
  return _Asked(prompt, ids, chat.stop_ids, tokenizer, chat)


def _check(values: argparse.Namespace) -> None:
  for name, holds, wanted in (
    (
      "temperature",
      values.temperature == 0 or 1e-4 <= values.temperature < math.inf,
      "0 (greedy), or at least 0.0001 and finite",
    ),
    ("top_p", 0 < values.top_p <= 1, "above 0 and at most 1"),
    ("top_k", values.top_k >= 0, "at least 0"),
    ("max_tokens", 1 <= values.max_tokens <= 2**20, "from 1 to 2**20"),
    ("n", values.n >= 1, "at least 1"),
    ("max_turns", values.max_turns >= 1, "at least 1"),
    ("seed", 0 <= values.seed < 2**32, "from 0 to 2**32 - 1"),
  ):
    if not holds:
      raise errors.UserError(f"generate: --{name} must be {wanted}")
  if (values.raw or values.ids) and values.tool:
    raise errors.UserError(
      "generate: with --raw or --ids there are no turns that could call a tool;"
      " leave out one"
    )


def schema_of(tool: str) -> dict[str, Any]:
  """The schema of one of `tools.TOOLS`."""
  spec, function = tools.TOOLS[tool]
  return tools.tool_schema(function, spec.name, packages.surroundings())


def make_sampler(values: argparse.Namespace, asked: _Asked) -> engine.Engine:
  """An engine that holds the folder's weights.

  Raises:
    errors.UserError: the folder holds no weights, or others than it says.
  """
  shapes = dataclasses.replace(families.read(values.model), dtype=values.dtype)
  n_ids = asked.tokenizer.vocab_size if asked.tokenizer else 0
  if shapes.vocab_size < n_ids:
    raise errors.UserError(
      f"{values.model}: vocab_size is {shapes.vocab_size} and the tokenizer has"
      f" {n_ids} tokens, so they do not belong together"
    )
  if values.top_k > (n_ids or shapes.vocab_size):
    raise errors.UserError(
      f"generate: --top_k ({values.top_k}) exceeds the vocabulary of"
      f" {n_ids or shapes.vocab_size} tokens; lower it, or set it to 0"
    )
  policy = model.Policy(shapes, n_ids=n_ids)
  params = weights.load(values.weights, policy, sharding.make_mesh(1, 1, 1))
  length = len(asked.ids) + values.max_tokens + 1
  settings = sampling.SamplingConfig(
    n_slots=min(values.n, 32),
    chunk=16,
    cache_length=-(-length // _PAGE) * _PAGE,
    page=_PAGE,
    temperature=values.temperature,
    top_k=values.top_k,
    top_p=values.top_p,
    max_tokens=values.max_tokens,
  )
  find_stop = asked.chat.find_stop if asked.chat else None
  try:
    made = engine.Engine(policy, settings, asked.stop_ids, find_stop=find_stop)
  except jax.errors.JaxRuntimeError as e:
    if "RESOURCE_EXHAUSTED" not in str(e):
      raise
    raise errors.UserError(
      f"generate: room for {settings.n_slots} times {length:,} tokens is more"
      " than the memory holds; lower --max_tokens or --n"
    ) from e
  made.set_params(params)
  return made


def _without(
  values: argparse.Namespace, sampler: engine.Engine, asked: _Asked
) -> Iterator[dict[str, Any]]:
  """One turn for each sample, in order, as soon as it is written."""
  key_B2 = np.asarray(
    sampling.rollout_keys(
      values.seed, 0, jnp.zeros(values.n, jnp.int32), jnp.arange(values.n)
    )
  )
  handles = sampler.submit(
    [engine.Request(asked.ids, key, values.max_tokens) for key in key_B2]
  )
  drawn: dict[int, list[int]] = {handle: [] for handle in handles}
  finished = set()
  while chunks := sampler.decode():
    for handle, chunk in chunks.items():
      drawn[handle] += chunk.tokens
      if chunk.is_broken:
        raise errors.UserError(
          f"{values.model}: the logits are not finite; are the weights whole?"
        )
      if chunk.is_stopped:
        sampler.release([handle])
        finished.add(handle)
    while handles and handles[0] in finished:
      yield _turn(drawn.pop(handles.pop(0)), asked)


def _turn(ids: list[int], asked: _Asked) -> dict[str, Any]:
  is_ended = bool(ids) and ids[-1] in asked.stop_ids
  shown = ids[:-1] if is_ended else ids
  text = asked.tokenizer.decode(shown) if asked.tokenizer else None
  if asked.chat is not None and text is not None and not is_ended:
    # An end that is spelt out, as it is no token of the vocabulary.
    is_ended = asked.chat.is_whole(ids)
    end = asked.chat.tokenizer.decode(asked.chat.turn_end_ids)
    text = text.partition(end)[0] if is_ended else text
  found = {"ids": ids, "stop": "end of turn" if is_ended else "max tokens"}
  return found if text is None else {"text": text} | found


def _with_tool(
  values: argparse.Namespace,
  chat: template_chat.TemplateChat,
  sampler: engine.Engine,
  prompt: str,
) -> Iterator[dict[str, Any]]:
  """Whole conversations, calls run in the sandbox."""
  limits = rollout.Limits(
    values.max_turns, values.max_tokens, max_calls=4 * values.max_turns
  )
  asked = problem.Problem("prompt", 0, prompt, "")
  try:
    with sandbox.Sandbox(sandbox.Limits()) as started:
      toolbox = tools.Toolbox(
        started, tool=values.tool, renderer=values.renderer, max_chars=4096
      )
      loop = rollout.AgentLoop(
        sampler, chat, toolbox, limits, temperature=values.temperature
      )
      (group,), _ = loop.run([asked], values.n, seed=values.seed, step=0)
  except sandbox.SandboxError as e:
    raise errors.UserError(f"the tool cannot run: {e}") from e
  for episode in group:
    yield _as_json(episode, chat.tokenizer)


def _as_json(
  episode: episode_lib.Episode, tokenizer: tokenizer_lib.Tokenizer
) -> dict[str, Any]:
  n_prompt = episode.roles.count(layout.Role.PROMPT)
  ids = episode.token_ids[n_prompt:]
  stop = episode.stop_reason
  return {
    "text": tokenizer.decode(ids),
    "ids": ids,
    "stop": None if stop is None else stop.name.lower().replace("_", " "),
    "calls": [
      {
        "name": record.name,
        "status": record.status.name.lower(),
        "code": record.code,
        "text": record.text,
      }
      for record in episode.tool_records
    ],
  }


def make_parser() -> argparse.ArgumentParser:
  """The flags of the command."""
  parser = cli.Parser(
    prog="python -m roc.main generate",
    description="Lets a model write: the most likely text, or samples. With"
    " --tool its calls run in the sandbox and it goes on with their results.",
    epilog="example: python -m roc.main generate --model=DIR"
    " --prompt='What is 12 * 13?' --tool=python --temperature=0.6 --n=4",
  )
  add = parser.add_argument
  add(
    "--model",
    required=True,
    metavar="MODEL",
    help="Hugging Face folder, or ORG/NAME on the hub",
  )
  add("--prompt", help="the user's words; by default this command's own input")
  add("--ids", metavar="IDS", help="go on from these ids; no tokenizer needed")
  add("--system", default="", help="words of a system turn")
  add(
    "--template",
    default="",
    metavar="NAME",
    help="another chat template: rstar2, or a file",
  )
  add(
    "--raw",
    action="store_true",
    help="no chat: the model goes on from the prompt as it is; tags in it are"
    " tokens",
  )
  add(
    "--tool",
    default="",
    choices=("", *tools.TOOLS),
    help="that the model may call; none by default",
  )
  add(
    "--renderer",
    default="compact",
    choices=("compact", "rstar"),
    help="how the tool's results are worded; compact",
  )
  add("--max_turns", type=int, default=8, help="of the model with a tool; 8")
  add("--max_tokens", type=int, default=512, help="behind the prompt; 512")
  how = parser.add_mutually_exclusive_group()
  how.add_argument(
    "--greedy",
    action="store_true",
    help="the likeliest token each time; so it is without --temperature",
  )
  how.add_argument(
    "--temperature", type=float, default=0.0, help="above 0: draw; 0"
  )
  add("--top_k", type=int, default=0, help="keep the k likeliest; 0: all")
  add("--top_p", type=float, default=1.0, help="keep the likeliest up to; 1")
  add("--n", type=int, default=1, help="samples; 1")
  add("--seed", type=int, default=0, help="of the samples; 0")
  add(
    "--dtype",
    default="float32",
    choices=("float32", "bfloat16"),
    help="of the computation; float32",
  )
  add(
    "--json",
    action="store_true",
    help='a line of JSON for each: "text", "ids", "stop", with a tool "calls"',
  )
  return parser
