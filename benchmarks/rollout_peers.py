"""The peers of `benchmarks.rollout`, each served by a process of its own.

They need packages that roc must never need, so they live in another virtual
environment. `Worker` starts this module under its interpreter as a server: one
JSON command a line comes in, one JSON answer a line goes out, and in between
the server sleeps and takes no time from what it is compared with.

Tunix is driven at the level of its vanilla rollout, log-probs returned, as its
trainers do. Hugging Face is `generate` of transformers on torch.
"""

import argparse
import dataclasses
import importlib
import json
import logging
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import rollout_work

# -------------------------------------------------------------------- the peers


class Words:
  """A tokenizer whose texts are ids with spaces between; 0 pads, no BOS."""

  def encode(self, text: str, **_: Any) -> list[int]:
    return [int(word) for word in text.split()]

  def decode(self, ids: Sequence[int], **_: Any) -> str:
    return " ".join(str(int(i)) for i in ids)

  def bos_id(self) -> int:
    return 0

  def eos_id(self) -> int:
    return 1

  def pad_id(self) -> int:
    return 0


class Tunix:
  """google-tunix 0.1.7: static batches, a cache of one size for a row."""

  def __init__(self, shape: rollout_work.Shape = rollout_work.SHAPE) -> None:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    logging.disable(logging.WARNING)
    nnx = importlib.import_module("flax.nnx")
    jnp = importlib.import_module("jax.numpy")
    qwen3 = importlib.import_module("tunix.models.qwen3.model")
    self._base = importlib.import_module("tunix.rl.rollout.base_rollout")
    self._vanilla = importlib.import_module("tunix.rl.rollout.vanilla_rollout")
    s = self._shape = shape
    config = qwen3.ModelConfig(
      num_layers=s.n_layers,
      vocab_size=s.vocab,
      embed_dim=s.d_model,
      hidden_dim=s.d_ff,
      num_heads=s.n_heads,
      head_dim=s.head_dim,
      num_kv_heads=s.n_kv_heads,
      rope_theta=int(s.rope_theta),
      norm_eps=1e-6,
      use_tied_embedding=True,
      dtype=jnp.float32,
      param_dtype=jnp.float32,
    )
    self._model = qwen3.Qwen3(config, rngs=nnx.Rngs(0))
    self._rollouts: dict[int, Any] = {}
    self._n_calls = 0

  def _draw(
    self, rows: Sequence[list[int]], n_new: int, cache: int
  ) -> list[list[int]]:
    """Draws so many tokens behind rows of one length."""
    if cache not in self._rollouts:
      size = self._base.CacheConfig(
        cache_size=cache,
        num_layers=self._shape.n_layers,
        num_kv_heads=self._shape.n_kv_heads,
        head_dim=self._shape.head_dim,
      )
      self._rollouts[cache] = self._vanilla.VanillaRollout(
        self._model, Words(), size
      )
    self._n_calls += 1
    config = self._base.RolloutConfig(
      max_tokens_to_generate=n_new,
      max_prompt_length=len(rows[0]),
      kv_cache_size=cache,
      temperature=1.0,
      top_p=1.0,
      top_k=None,
      seed=self._n_calls,
      eos_tokens=[rollout_work.NO_STOP],
      return_logprobs=True,
    )
    texts = [" ".join(map(str, row)) for row in rows]
    drawn = self._rollouts[cache].generate(texts, config).tokens
    if any(len(ids) != n_new for ids in drawn):
      raise RuntimeError("a row is shorter than it must be")
    return [ids.tolist() for ids in drawn]

  def generate(
    self, n: int, n_prompt: int, n_new: int, cache: int, repeat: int = 1
  ) -> int:
    """Rows of one length, each prompt repeated; returns tokens drawn."""
    rows = [
      row for row in rollout_work.prompts(n, n_prompt) for _ in range(repeat)
    ]
    return sum(map(len, self._draw(rows, n_new, cache)))

  def ragged(
    self, lengths: list[int], batch: int, n_prompt: int, cache: int
  ) -> int:
    """Batches that last as long as their longest row; returns useful tokens."""
    rows = rollout_work.prompts(len(lengths), n_prompt)
    for start in range(0, len(lengths), batch):
      end = start + batch
      self._draw(rows[start:end], max(lengths[start:end]), cache)
    return sum(lengths)

  def talk(self, how: str, cache: int, setting: dict[str, Any]) -> int:
    """Conversations in batches or in threads; returns their number."""
    generate: rollout_work.Generate = lambda rows, n: self._draw(rows, n, cache)
    run = {
      "batches": rollout_work.talk_in_batches,
      "threads": rollout_work.talk_in_threads,
    }[how]
    return run(generate, rollout_work.Talk(**setting))


class HuggingFace:
  """`generate` of transformers: float32 on a processor, bfloat16 on a GPU."""

  def __init__(self, shape: rollout_work.Shape = rollout_work.SHAPE) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    self._torch = importlib.import_module("torch")
    transformers = importlib.import_module("transformers")
    transformers.logging.set_verbosity_error()
    self._torch.set_num_threads(len(os.sched_getaffinity(0)))
    self._torch.manual_seed(0)
    is_on_gpu = self._torch.cuda.is_available()
    self._device = "cuda" if is_on_gpu else "cpu"
    dtype = self._torch.bfloat16 if is_on_gpu else self._torch.float32
    s = shape
    config = transformers.Qwen3Config(
      vocab_size=s.vocab,
      hidden_size=s.d_model,
      intermediate_size=s.d_ff,
      num_hidden_layers=s.n_layers,
      num_attention_heads=s.n_heads,
      num_key_value_heads=s.n_kv_heads,
      head_dim=s.head_dim,
      rope_theta=s.rope_theta,
      max_position_embeddings=4096,
      tie_word_embeddings=True,
      bos_token_id=None,
      eos_token_id=None,
      pad_token_id=0,
    )
    model = transformers.Qwen3ForCausalLM(config).eval()
    self._model = model.to(self._device, dtype)

  def generate(self, n: int, n_prompt: int, n_new: int) -> int:
    """Rows of one length; returns tokens drawn."""
    ids_BT = self._torch.tensor(
      rollout_work.prompts(n, n_prompt), device=self._device
    )
    with self._torch.no_grad():
      out_BT = self._model.generate(
        ids_BT,
        attention_mask=self._torch.ones_like(ids_BT),
        max_new_tokens=n_new,
        min_new_tokens=n_new,
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        pad_token_id=0,
      )
    if out_BT.shape != (n, n_prompt + n_new):
      raise RuntimeError(f"generate gave {tuple(out_BT.shape)}")
    return n * n_new


PEERS: dict[str, Callable[[rollout_work.Shape], Any]] = {
  "tunix": Tunix,
  "hf": HuggingFace,
}


# ------------------------------------------------------------ server and client


@dataclasses.dataclass(frozen=True)
class Took:
  """What one run of one side cost and gave."""

  wall: float
  cpu: float  # of all threads
  n: int  # tokens or conversations


def clock(run: Callable[[], int]) -> Took:
  """Runs and times something that counts what it does."""
  wall, cpu = time.perf_counter(), time.process_time()
  n = run()
  wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
  return Took(wall, cpu, n)


class Worker:
  """A peer in a process of its own; used as a context manager."""

  def __init__(self, python: str, peer: str, *, shape: str = "small"):
    root = str(pathlib.Path(__file__).resolve().parents[1])
    command = [python, "-m", "benchmarks.rollout_peers", "--serve", peer]
    command += ["--shape", shape]
    self._process = subprocess.Popen(
      command,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      cwd=root,
      env=os.environ | {"PYTHONPATH": root},
    )
    self.peer = peer

  def __enter__(self) -> "Worker":
    return self

  def __exit__(self, kind: object, *_: object) -> None:
    if kind is not None:
      self._process.kill()
    with self._process:  # closes its input, which ends it
      pass

  def __call__(self, verb: str, **arguments: Any) -> Took:
    """Has a method of the peer run; raises RuntimeError if it cannot."""
    assert self._process.stdin is not None and self._process.stdout is not None
    self._process.stdin.write(json.dumps([verb, arguments]) + "\n")
    self._process.stdin.flush()
    answer = self._process.stdout.readline()
    if not answer:
      raise RuntimeError(f"{self.peer} ended; its reason stands above")
    return Took(**json.loads(answer))


def _serve(peer: str, shape: rollout_work.Shape) -> None:
  """Answers commands until there are no more."""
  answers = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)  # what libraries print is no answer
  side = PEERS[peer](shape)
  for line in sys.stdin:
    verb, arguments = json.loads(line)
    took = clock(lambda v=verb, a=arguments: getattr(side, v)(**a))
    answers.write(json.dumps(dataclasses.asdict(took)) + "\n")
    answers.flush()


def main() -> None:
  """Serves one peer; without `--serve` there is nothing to do."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--serve", choices=PEERS)
  parser.add_argument("--shape", choices=rollout_work.SHAPES, default="small")
  arguments, _ = parser.parse_known_args()
  if arguments.serve:
    _serve(arguments.serve, rollout_work.SHAPES[arguments.shape])


if __name__ == "__main__":
  main()
