"""The tokenizer of a Hugging Face folder, with its chat template.

`tokenizer.json` is read as it is. Folders that have the ranks of a `.tiktoken`
file instead (Qwen) get the same tokenizer from them: a byte-pair vocabulary in
order of rank says which two parts each of its entries was merged from.
"""

import base64
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import (
  decoders,
  models,
  normalizers,
  pre_tokenizers,
)

from roc.host import tokenizer as tokenizer_lib

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
OLD_TEMPLATE_FILE = "chat_template.json"
TEMPLATE_FOLDER = "additional_chat_templates"
SPECIALS_FILE = "special_tokens_map.json"
GENERATION_FILE = "generation_config.json"
MODEL_FILE = "config.json"
# What else an exported folder takes along, so that it reads like the first.
FILES = (
  *(TOKENIZER_FILE, CONFIG_FILE, TEMPLATE_FILE, OLD_TEMPLATE_FILE),
  *(GENERATION_FILE, SPECIALS_FILE, "added_tokens.json"),
  *("vocab.json", "merges.txt", TEMPLATE_FOLDER),
)
RANKS = "*.tiktoken"

# How Qwen cuts text before merging (Qwen2Tokenizer, tokenization_qwen.py).
_QWEN_PATTERN = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")
_DEFAULT = "default"


def load_tokenizer(path: str | pathlib.Path) -> tokenizer_lib.Tokenizer:
  """Reads the tokenizer of a folder, or a `tokenizer.json` alone.

  Args:
    path: a folder with `tokenizer.json` or a `.tiktoken` file, and what else
      there is of `FILES`; or the first of these files.

  Raises:
    ValueError: there is no tokenizer, or a file cannot be read; names it.
  """
  path = pathlib.Path(path)
  if path.is_file():
    return tokenizer_lib.Tokenizer.load(path)
  if not path.is_dir():
    raise ValueError(f"{path} does not exist; a tokenizer's folder is needed")
  config = _read_json(path / CONFIG_FILE)
  published = tokenizer_lib.Published(
    templates=_templates(path, config),
    named_tokens=_named_tokens(path, config),
    eos_ids=eos_ids(path),
  )
  ranks = sorted(path.glob(RANKS))
  if (path / TOKENIZER_FILE).exists() or not ranks:
    if not (path / TOKENIZER_FILE).exists():
      raise ValueError(
        f"{path} holds no tokenizer: neither {TOKENIZER_FILE} nor {RANKS}"
      )
    return tokenizer_lib.Tokenizer.load(path / TOKENIZER_FILE, published)
  if len(ranks) > 1:
    names = ", ".join(p.name for p in ranks)
    raise ValueError(f"{path} holds several files of ranks ({names}); keep one")
  return tokenizer_lib.Tokenizer(_from_ranks(ranks[0], config), published)


# ------------------------------------------------------------ side files


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  """An object from a file; an empty one if there is no such file."""
  try:
    found = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    return {}
  except OSError as e:
    raise ValueError(f"{path} cannot be read ({e.strerror})") from e
  except ValueError as e:
    raise ValueError(f"{path} is not JSON: {e}") from e
  if not isinstance(found, dict):
    raise ValueError(f"{path} holds no JSON object")
  return found


def _templates(
  folder: pathlib.Path, config: Mapping[str, Any]
) -> dict[str, str]:
  """Chat templates by name, as transformers finds them.

  Files of their own hide what tokenizer_config.json says. `chat_template.json`,
  which processors have, counts where there is nothing else.
  """
  others = sorted(folder.glob(f"{TEMPLATE_FOLDER}/*.jinja"))
  files = {path.stem: path for path in others}
  if (folder / TEMPLATE_FILE).exists():
    files[_DEFAULT] = folder / TEMPLATE_FILE
  found = {name: _read_text(path) for name, path in files.items()}
  if _DEFAULT in found:
    return found
  for name, fields in (
    (CONFIG_FILE, config),
    (OLD_TEMPLATE_FILE, _read_json(folder / OLD_TEMPLATE_FILE)),
  ):
    if fields.get("chat_template") is not None:
      return _named_templates(fields["chat_template"], folder / name) | found
  return found


def _named_templates(found: Any, path: pathlib.Path) -> dict[str, str]:
  """Text, or a list of names and templates, or an object of them."""
  if isinstance(found, str):
    return {_DEFAULT: found}
  named: list[tuple[Any, Any]] = [(None, None)]
  if isinstance(found, dict):
    named = list(found.items())
  elif isinstance(found, list) and all(isinstance(x, dict) for x in found):
    named = [(x.get("name"), x.get("template")) for x in found]
  if not all(isinstance(x, str) for pair in named for x in pair):
    raise ValueError(
      f"{path}: chat_template must be text, or a list of names and templates"
    )
  return dict(named)


def _read_text(path: pathlib.Path) -> str:
  try:
    return path.read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError) as e:
    raise ValueError(f"{path} cannot be read: {e}") from e


def _named_tokens(
  folder: pathlib.Path, config: Mapping[str, Any]
) -> dict[str, str]:
  """`bos_token` and the like: text, or an object that describes the token.

  Older folders have them in special_tokens_map.json, which transformers reads
  where tokenizer_config.json does not describe the tokens that were added.
  """
  fields = dict(config)
  if "added_tokens_decoder" not in config:
    fields |= _read_json(folder / SPECIALS_FILE)
  found = {}
  for name in _NAMED:
    value = fields.get(name)
    value = value.get("content") if isinstance(value, dict) else value
    if isinstance(value, str):
      found[name] = value
  return found


def eos_ids(folder: str | pathlib.Path) -> tuple[int, ...]:
  """Ids that end a text: of the generation config, else of the model's.

  Raises:
    ValueError: a file cannot be read, or names no ids.
  """
  folder = pathlib.Path(folder)
  for name in (GENERATION_FILE, MODEL_FILE):
    value = _read_json(folder / name).get("eos_token_id")
    if value is not None:
      ids = value if isinstance(value, list) else [value]
      if not all(type(i) is int and i >= 0 for i in ids):
        raise ValueError(f"{folder / name}: eos_token_id is {value!r}, no id")
      return tuple(ids)
  return ()


# ----------------------------------------------------------------- ranks


def _from_ranks(
  path: pathlib.Path, config: Mapping[str, Any]
) -> tokenizers.Tokenizer:
  """Builds what Qwen's `tokenizer.json` would say."""
  ranks = _read_ranks(path)
  name_of = tokenizer_lib.byte_names()
  named = lambda token: "".join(name_of[byte] for byte in token)
  merges = [
    tuple(map(named, _parts(token, ranks)))
    for token in sorted(ranks, key=ranks.__getitem__)
    if len(token) > 1
  ]
  backend = tokenizers.Tokenizer(
    models.BPE(
      vocab={named(token): rank for token, rank in ranks.items()},
      merges=merges,
    )
  )
  backend.normalizer = normalizers.NFC()
  backend.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(_QWEN_PATTERN), "isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  backend.decoder = decoders.ByteLevel()
  backend.add_tokens(_added_tokens(path, config, len(ranks)))
  return backend


def _read_ranks(path: pathlib.Path) -> dict[bytes, int]:
  ranks: dict[bytes, int] = {}
  try:
    lines = path.read_bytes().splitlines()
  except OSError as e:
    raise ValueError(f"{path} cannot be read ({e.strerror})") from e
  for number, line in enumerate(lines, 1):
    try:
      token, rank = line.split()
      ranks[base64.b64decode(token, validate=True)] = int(rank)
    except ValueError as e:
      raise ValueError(
        f"{path} line {number} is not a token in base64 and its rank"
      ) from e
  whole = all(bytes([byte]) in ranks for byte in range(256))
  if not whole or sorted(ranks.values()) != list(range(len(lines))):
    raise ValueError(
      f"{path} is no whole vocabulary: it needs every byte, and each rank from"
      f" 0 to {len(lines) - 1} once"
    )
  return ranks


def _parts(token: bytes, ranks: Mapping[bytes, int]) -> list[bytes]:
  """The two entries that a token was merged from: what merging leaves of it.

  Raises:
    ValueError: it cannot be reached by merging, so the file is damaged.
  """
  none = len(ranks)
  parts = [token[i : i + 1] for i in range(len(token))]
  pairs = zip(parts, parts[1:], strict=False)
  found = [ranks.get(a + b, none) for a, b in pairs]  # of neighbours
  while len(parts) > 2:
    rank = min(found)
    if rank == none:
      raise ValueError(f"no merges lead to the token {token!r} of the ranks")
    at = found.index(rank)
    parts[at : at + 2] = [parts[at] + parts[at + 1]]
    del found[at]
    for i in (at - 1, at):
      if 0 <= i < len(found):
        found[i] = ranks.get(parts[i] + parts[i + 1], none)
  return parts


def _added_tokens(
  path: pathlib.Path, config: Mapping[str, Any], n_ranks: int
) -> list[tokenizers.AddedToken]:
  """Tokens behind the ranks, in order of id, as tokenizer_config.json has them.

  Raises:
    ValueError: it has none, or their ids are not those that follow.
  """
  where = path.with_name(CONFIG_FILE)
  try:
    found = sorted(
      (int(i), token) for i, token in config["added_tokens_decoder"].items()
    )
    added = [
      tokenizers.AddedToken(
        token["content"],
        special=token.get("special", False),
        normalized=token.get("normalized", False),
        lstrip=token.get("lstrip", False),
        rstrip=token.get("rstrip", False),
        single_word=token.get("single_word", False),
      )
      for _, token in found
    ]
  except (KeyError, TypeError, ValueError, AttributeError) as e:
    raise ValueError(
      f"{where} must say with added_tokens_decoder which special tokens follow"
      f" the ranks of {path.name}"
    ) from e
  ids = [i for i, _ in found]
  if ids != list(range(n_ranks, n_ranks + len(ids))):
    raise ValueError(
      f"{where}: the ids of added_tokens_decoder must follow the {n_ranks}"
      f" ranks of {path.name} without a gap"
    )
  return added
