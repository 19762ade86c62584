"""Log-probs and entropies of given tokens under a model in a folder.

    python -m roc.main score --model DIR --input FILE

To see whether a model that was loaded here is the model that it was elsewhere.
"""

import argparse
import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from roc import cli, errors, hub, lines, places
from roc.core import logprobs
from roc.device import families, model, network, sharding, weights

_ROUND = 64  # lengths are rounded up to multiples, so that few are compiled
_EXAMPLE = '{"ids": [1, 2]}'
_TOKENS = 1 << 14  # of a batch, padding included


def main(argv: Sequence[str]) -> int:
  """Runs `score ...`; returns the exit code.

  Raises:
    errors.UserError: bad flags, a folder or a line that cannot be used.
  """
  values = make_parser().parse_args(argv)
  rows = read_rows(values.input)
  policy, params = load(hub.weights(values.model), values.dtype)
  check_ids(rows, policy.config.vocab_size, lines.shown(values.input))
  for i, found in enumerate(score(policy, params, rows), 1):
    print(json.dumps(found) if values.json else _shown(i, found), flush=True)
  return 0


def make_parser() -> argparse.ArgumentParser:
  """The flags of the command."""
  parser = cli.Parser(
    prog="python -m roc.main score",
    description="Log-prob of each token given those before it, and the entropy"
    " behind it, in nats.",
    epilog="example: echo '{\"ids\": [1, 5, 9]}' |"
    " python -m roc.main score --model=DIR --json",
  )
  parser.add_argument(
    "--model",
    required=True,
    metavar="MODEL",
    help="folder (or ORG/NAME on the hub) with config.json and safetensors",
  )
  parser.add_argument(
    "--input",
    default="-",
    metavar="FILE",
    help='lines of JSON with "ids"; by default this command\'s own input',
  )
  parser.add_argument(
    "--dtype",
    default="float32",
    choices=("float32", "bfloat16"),
    help="of the computation; float32",
  )
  parser.add_argument(
    "--json",
    action="store_true",
    help='a line of JSON for each: "logprobs", the first null, and "entropy"',
  )
  return parser


def read_rows(name: str) -> list[list[int]]:
  """The ids of every line of a file; "-" is standard input.

  Raises:
    errors.UserError: it cannot be read, or a line holds no ids; names it.
  """
  return [
    _ids_of(fields, where)
    for where, fields in lines.read_objects(name, _EXAMPLE)
  ]


def _ids_of(fields: dict[str, Any], where: str) -> list[int]:
  ids = fields.get("ids")
  is_list = isinstance(ids, list) and bool(ids)
  if not is_list or not all(type(i) is int for i in ids):
    raise errors.UserError(
      f"{where}: expected a JSON object such as {_EXAMPLE}, with at least one"
      " id"
    )
  return ids


def check_ids(rows: Sequence[Sequence[int]], size: int, name: str) -> None:
  """Raises a UserError if an id is none of a vocabulary of `size`."""
  for ids in rows:
    for i in ids:
      if not 0 <= i < size:
        raise errors.UserError(
          f"{name} holds id {i}, and the model's vocabulary has {size}"
        )


def load(
  folder: places.Path, dtype: network.Dtype
) -> tuple[model.Policy, model.Params]:
  """A policy and its weights, on the first device."""
  config = families.read(folder)
  policy = model.Policy(dataclasses.replace(config, dtype=dtype))
  return policy, weights.load(folder, policy, sharding.make_mesh(1, 1, 1))


def score(
  policy: model.Policy,
  params: model.Params,
  rows: Sequence[Sequence[int]],
) -> Iterator[dict[str, list]]:
  """Scores rows in their order.

  Args:
    policy: the model.
    params: of it.
    rows: ids, at least one in each.

  Yields:
    for each row "logprobs", the first None, and "entropy" behind each token.
  """

  @jax.jit
  def run(params, ids_BT, next_BT):
    hidden_BTD = policy.hidden(params, ids_BT)
    return logprobs.token_logprobs(
      hidden_BTD, policy.unembedding(params), next_BT, dtype=policy.dtype
    )

  start = 0
  while start < len(rows):
    T = -(-len(rows[start]) // _ROUND) * _ROUND
    n = max(1, _TOKENS // T)
    end = start + 1
    while end < min(start + n, len(rows)) and len(rows[end]) <= T:
      end += 1
    ids_BT = np.zeros((n, T), np.int32)
    for i, ids in enumerate(rows[start:end]):
      ids_BT[i, : len(ids)] = ids
    next_BT = np.roll(ids_BT, -1, axis=1)
    logp_BT, entropy_BT = jax.device_get(run(params, ids_BT, next_BT))
    for i, ids in enumerate(rows[start:end]):
      yield {
        "logprobs": [None, *logp_BT[i, : len(ids) - 1].tolist()],
        "entropy": entropy_BT[i, : len(ids)].tolist(),
      }
    start = end


def _shown(number: int, found: dict[str, list]) -> str:
  logps = found["logprobs"][1:]
  mean = f"{np.mean(logps):.4f}" if logps else "-"
  return (
    f"{number:>6}  {len(found['entropy']):>6} tokens  mean log-prob {mean}"
    f"  mean entropy {np.mean(found['entropy']):.4f}"
  )
