"""A tiny policy learns to use a Python tool, on two CPU cores.

Claim: a 0.8 M-parameter transformer, trained from nothing on demonstrations of
which a stated share is messy (`experiments/host/arithmetic.gin`), learns with
GRPO-RoC to solve arithmetic that it cannot do in its head, and to do so with
clean calls. Targets on held-out problems: under 5 % without the tool; with it
15 points above the supervised policy or above 95 %; failing calls per call in
correct rollouts down three-fold.

Source: GRPO-RoC, arXiv 2508.20722; the task is this project's own.
Hardware: 2 CPU cores, under 15 minutes in all.
Result: 71.1 % to 98.4 % with the tool, 0 % without; failing calls 26.2 % to
2.4 % (docs/results.md).

Command:
  make quickstart
or step by step:
  python -m roc.main sft --config=experiments/quickstart.py \
    --workdir=runs/quickstart/sft
  python -m roc.main train --config=experiments/quickstart.py \
    --workdir=runs/quickstart --config.init_from=runs/quickstart/sft
  python -m roc.main report --workdir=runs/quickstart

`--config=experiments/quickstart.py:tiny` runs the same road in seconds.
"""

from roc import config as config_lib


def get_config(variant: str = ""):
  """Returns the ConfigDict; `variant` is "" or "tiny"."""
  c = config_lib.default_config()
  c.host.gin_files = ("experiments/host/arithmetic.gin",)

  # ---------------------------------------------------------------- model
  c.model.d_model = 128
  c.model.n_layers = 4
  c.model.n_heads = 4
  c.model.n_kv_heads = 2
  c.model.head_dim = 32
  c.model.d_ff = 384

  # ------------------------------------------------------------- sampling
  c.sampling.n_slots = 64
  c.sampling.chunk = 8
  c.sampling.extend_chunk = 16
  c.sampling.cache_length = 160
  c.sampling.max_tokens = 128
  c.sampling.max_turns = 6
  c.sampling.max_calls = 6

  # ------------------------------------------------- supervised training
  c.sft.n_demos = 5000
  c.sft.steps = 800
  c.sft.rows = 16
  c.sft.microbatch_rows = 4  # small: page faults of large arrays cost the most
  c.sft.length = 192
  c.sft.lr = 2e-3
  c.sft.warmup = 30

  # --------------------------------------------------------------- GRPO-RoC
  c.filter.mode = "sort"
  c.filter.n_drawn = 16
  c.filter.n_kept = 8
  c.train.steps = 40
  c.train.prompts = 16
  c.train.microbatch_rows = 16
  c.train.lr = 2e-4
  c.train.warmup = 3
  c.train.buckets = (96, 112, 128, 160)
  c.eval.every = 10
  c.eval.n_problems = 256

  if variant == "tiny":
    shrink(c)
  elif variant:
    raise ValueError(f"unknown variant {variant!r}; there is only `tiny`")
  return c


def shrink(c) -> None:
  """Makes the same road seconds long: a test of the wiring, not of learning."""
  c.model.d_model = 32
  c.model.n_layers = 2
  c.model.n_heads = 2
  c.model.n_kv_heads = 1
  c.model.head_dim = 16
  c.model.d_ff = 64
  c.sampling.n_slots = 16
  c.sampling.max_tokens = 64
  c.sampling.cache_length = 128
  c.sft.n_demos = 32
  c.sft.steps = 4
  c.sft.rows = 8
  c.sft.microbatch_rows = 0
  c.sft.warmup = 1
  c.filter.n_drawn = 4
  c.filter.n_kept = 2
  c.train.steps = 4
  c.train.prompts = 2
  c.train.microbatch_rows = 0
  c.train.warmup = 1
  c.train.buckets = (128,)
  c.eval.every = 2
  c.eval.n_problems = 8
  c.checkpoint.every = 1
