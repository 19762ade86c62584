"""The policy of a run as a Hugging Face folder.

    python -m roc.main export --workdir=runs/mine --output=models/mine

The folder holds weights, config and tokenizer; it loads in transformers, in
other engines, and here as `config.pretrained`. Everything runs on the host's
processor: no accelerator has to be free.
"""

import argparse
import json
import pathlib
import shutil
import tempfile
from collections.abc import Sequence
from typing import Any

import jax

from roc import build, cli, errors, parameters, places, pretrained, wiring
from roc import config as config_lib
from roc.device import families, model, sharding, weights
from roc.host import chat as chat_lib
from roc.host import pretrained as tokenizers_lib


def main(argv: Sequence[str]) -> int:
  """Runs `export ...`; returns the exit code.

  Raises:
    errors.UserError: bad flags, no whole checkpoint, or an output that exists
      or cannot be written.
  """
  values = make_parser().parse_args(argv)
  jax.config.update("jax_platforms", "cpu")
  workdir, output = pathlib.Path(values.workdir), places.as_path(values.output)
  with places.reaching(output, "written"):
    if output.exists():
      raise errors.UserError(f"{output} exists; name a new folder")
  cfg = pretrained.settle(read_config(workdir))
  name = export(cfg, workdir, output, step=values.step, dtype=values.dtype)
  with places.reaching(output, "read"):
    n_bytes = sum(places.sizes(output).values())
  found = {
    "output": str(output),
    "checkpoint": name,
    "dtype": values.dtype,
    "bytes": n_bytes,
  }
  if values.json:
    print(json.dumps(found))
  else:
    size = found["bytes"] / 2**20
    print(f"{output}: {name}, {values.dtype}, {size:.1f} MiB")
  return 0


def make_parser() -> argparse.ArgumentParser:
  """The flags of the command."""
  parser = cli.Parser(
    prog="python -m roc.main export",
    description="Writes the policy of a run as a Hugging Face folder: weights,"
    " config and tokenizer.",
    epilog="example: python -m roc.main export --workdir=runs/quickstart"
    " --output=models/quickstart",
  )
  parser.add_argument(
    "--workdir", required=True, metavar="DIR", help="of a run of train or sft"
  )
  parser.add_argument(
    "--output",
    required=True,
    metavar="DIR",
    help="a folder that is not there; also gs://BUCKET/PATH",
  )
  parser.add_argument(
    "--step",
    type=int,
    metavar="N",
    help="of the checkpoint; by default the newest whole one",
  )
  parser.add_argument(
    "--dtype",
    default="bfloat16",
    choices=("bfloat16", "float16", "float32"),
    help="of the weights; bfloat16",
  )
  parser.add_argument(
    "--json", action="store_true", help="one line of JSON instead of text"
  )
  return parser


def read_config(workdir: pathlib.Path) -> config_lib.Config:
  """The configuration that a run was made with.

  Raises:
    errors.UserError: there is none.
  """
  path = workdir / "config.json"
  try:
    text = path.read_text()
  except OSError as e:
    raise errors.UserError(
      f"cannot read {path}: {e.strerror}; give the --workdir of a run"
    ) from None
  return config_lib.from_json(text, str(path))


def export(
  cfg: config_lib.Config,
  workdir: pathlib.Path,
  output: places.Path,
  *,
  step: int | None = None,
  dtype: str = "bfloat16",
) -> str:
  """Writes a checkpoint of a run as a folder that appears when it is whole.

  Args:
    cfg: of the run, settled.
    workdir: of the run.
    output: a folder that must not exist yet.
    step: of the checkpoint; None: the newest whole one.
    dtype: float32, float16 or bfloat16.

  Returns:
    The checkpoint's step and checksum, for people.

  Raises:
    errors.UserError: no whole checkpoint, or the output cannot be written.
  """
  has_own_tokenizer = "host.tokenizer" in wiring.read_gin(
    cfg.host.gin_files, cfg.host.gin_bindings
  )
  source = pretrained.folder(cfg) if cfg.pretrained else None
  # The data that the run was trained on need not be there any more.
  is_published = source is not None and not has_own_tokenizer
  host = None if is_published else build.host_parts(cfg)
  mesh = sharding.make_mesh(1, 1, 1)
  policy = model.Policy(build.shapes(cfg, host), adapters=cfg.lora)
  loaded = parameters.load_policy(cfg, workdir, policy, mesh, step)
  params = policy.merged(loaded.params)
  with tempfile.TemporaryDirectory(prefix="roc_export_") as scratch:
    side = pathlib.Path(scratch)
    if host is not None:
      _write_tokenizer(host, side)
    elif source is not None:
      copy_side_files(cfg, source, side)
    weights.export(
      params,
      policy.config,
      output,
      dtype=dtype,
      fields=None if source is None else _published_fields(source, dtype),
      side_files=sorted(side.iterdir()),
    )
  return loaded.name


def _published_fields(source: pathlib.Path, dtype: str) -> dict[str, Any]:
  """Config of the published model: it says more than we need, such as lengths.

  What is written has its head, though it may have been published without.
  transformers 5 calls the field of the type `dtype`, older ones `torch_dtype`.
  """
  fields = json.loads((source / families.CONFIG_FILE).read_text("utf-8"))
  key = "dtype" if "dtype" in fields else "torch_dtype"
  family = families.FAMILIES[fields["model_type"]]
  return fields | {key: dtype, "architectures": [family.architecture]}


def copy_side_files(
  cfg: config_lib.Config, source: pathlib.Path, folder: pathlib.Path
) -> None:
  """Copies what a published folder says beside its weights.

  Args:
    cfg: of the run, whose chat format says what ends a turn by now.
    source: the published folder.
    folder: that is to have the files.
  """
  _copy_tokenizer(source, folder)
  _write_stops(_published_chat(cfg, source), source, folder)


def _published_chat(
  cfg: config_lib.Config, source: pathlib.Path
) -> chat_lib.Chat | None:
  """The chat format that the run had; None where it cannot be built here."""
  try:
    return wiring.build_chat(cfg.host.gin_files, cfg.host.gin_bindings, source)
  except errors.UserError as e:
    build.say(f"the ids that end a turn are those of {source} ({e})")
    return None


def _write_stops(
  chat: chat_lib.Chat | None, source: pathlib.Path, folder: pathlib.Path
) -> None:
  """Adds the ids that end a turn of the run to those that end a text.

  A base model stops at the end of a text alone; the run taught it to end its
  turns, and other engines read here at which ids to stop.
  """
  if chat is None:
    return
  path = folder / tokenizers_lib.GENERATION_FILE
  fields = json.loads(path.read_text("utf-8")) if path.exists() else {}
  known = tokenizers_lib.eos_ids(source)
  ids = list(dict.fromkeys([*known, *chat.stop_ids]))
  if ids == list(known) and path.exists():
    return
  fields = {"pad_token_id": chat.pad_id} | fields | {"eos_token_id": ids}
  path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _copy_tokenizer(source: pathlib.Path, folder: pathlib.Path) -> None:
  for name in tokenizers_lib.FILES:
    if (source / name).is_dir():
      shutil.copytree(source / name, folder / name)
    elif (source / name).exists():
      shutil.copyfile(source / name, folder / name)
  if not (folder / tokenizers_lib.TOKENIZER_FILE).exists():
    # Only ranks: others read what we made of them.
    tokenizer = tokenizers_lib.load_tokenizer(source)
    tokenizer.save(folder / tokenizers_lib.TOKENIZER_FILE)


def _write_tokenizer(host: wiring.HostParts, folder: pathlib.Path) -> None:
  """A tokenizer of our own, and which ids end a turn."""
  host.tokenizer.save(folder / tokenizers_lib.TOKENIZER_FILE)
  side = {
    "eos_token_id": list(host.chat.stop_ids),
    "pad_token_id": host.chat.pad_id,
  }
  path = folder / tokenizers_lib.GENERATION_FILE
  path.write_text(json.dumps(side, indent=2) + "\n", encoding="utf-8")
