"""Qwen3-0.6B learns to solve GSM8K with a Python tool, on one accelerator.

Claim: with adapters of rank 32 and 16 GB, GRPO-RoC raises the accuracy of
Qwen3-0.6B on the test problems of GSM8K and lowers the share of failing calls
in its correct rollouts; there is no published figure to reach.

Source: GRPO-RoC, arXiv 2508.20722; problems of Cobbe et al., arXiv 2110.14168.
Hardware: one accelerator of 16 GB (a v5e chip, a T4 with float32 computing);
with 40 GB and more set --config.lora.rank=0 to train all parameters.
Result: not yet run.

Command:
  python -m roc.main train --config=experiments/qwen3_0p6b_gsm8k.py \
    --workdir=runs/qwen3_0p6b
  python -m roc.main export --workdir=runs/qwen3_0p6b \
    --output=models/qwen3_0p6b_gsm8k

`--config=experiments/qwen3_0p6b_gsm8k.py:tiny` runs the same road in seconds.
"""

from experiments.shrink import shrink
from roc import config as config_lib

DATA = "hf://datasets/openai/gsm8k/main"


def get_config(variant: str = ""):
  """Returns the ConfigDict; `variant` is "" or "tiny"."""
  if variant not in ("", "tiny"):
    raise ValueError(f"unknown variant {variant!r}; there is only `tiny`")
  c = config_lib.default_config()
  c.pretrained = "Qwen/Qwen3-0.6B"
  c.host.gin_files = ("experiments/host/gsm8k.gin",)
  c.host.gin_bindings = (
    f"train_data = '{DATA}/train-00000-of-00001.parquet'",
    f"eval_data = '{DATA}/test-00000-of-00001.parquet'",
  )

  # ---------------------------------------------------------------- model
  c.model.dtype = "bfloat16"
  c.model.remat = "full"
  c.lora.rank = 32
  c.lora.alpha = 64.0

  # ------------------------------------------------------------- sampling
  c.sampling.n_slots = 64
  c.sampling.page = 128
  c.sampling.chunk = 32
  c.sampling.extend_chunk = 128
  c.sampling.cache_tokens = 32_768  # 3.8 GB: 115 kB a token
  c.sampling.cache_length = 1536  # the longest prompt has about 500 tokens
  c.sampling.max_tokens = 1024
  c.sampling.max_turns = 4
  c.sampling.max_calls = 8

  # --------------------------------------------------------------- GRPO-RoC
  c.filter.mode = "sort"
  c.filter.n_drawn = 16
  c.filter.n_kept = 8
  c.train.steps = 200
  c.train.prompts = 32
  c.train.microbatch_rows = 8
  c.train.lr = 1e-5
  c.train.warmup = 10
  c.train.buckets = (512, 768, 1024, 1536)
  c.eval.every = 20
  c.eval.n_problems = 256
  c.eval.head = False
  c.checkpoint.every = 10

  if variant == "tiny":
    shrink(c)
    c.host.gin_bindings = ()  # the rows that are here
  return c
