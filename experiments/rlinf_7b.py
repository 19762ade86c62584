"""GRPO-RoC on Qwen2.5-7B in 150 steps: the cheap calibration target.

Claim: 150 steps on DAPO-Math-17K take Qwen2.5-7B-Instruct to 33.65 / 24.11 /
79.60 on AIME 2024 / AIME 2025 / MATH-500 (the recipe in verl, by the same
account: 31.77 / 25.94 / 76.20).

Source: RLinf pull request 522, RLinf at a3816b5, an independent reproduction of
arXiv 2508.20722; what it does not state is as in experiments/rstar2/recipe.py.
Hardware: one host with 8 accelerators of 80 GB, as the 8 H100 of the source.
Result: not yet run.

Command:
  python -m roc.main train --config=experiments/rlinf_7b.py \
    --workdir=runs/rlinf_7b

`--config=experiments/rlinf_7b.py:tiny` runs the same road in seconds.
"""

from experiments.rstar2 import recipe


def get_config(variant: str = ""):
  """Returns the ConfigDict; `variant` is "" or "tiny"."""
  c = recipe.base(variant)
  c.pretrained = "Qwen/Qwen2.5-7B-Instruct"
  recipe.limit(c, response_tokens=8192, turns=5)
  c.train.steps = 150
  c.train.prompts = 128  # each 32 drawn, 16 kept
  c.loss.old_logprobs = "sampler"  # its recompute_logprobs is off
  c.mesh.fsdp = 8
  c.sampling.cache_tokens = 393_216  # 23 GB a device, 57 kB a token
  c.sampling.n_slots = 64
  c.train.microbatch_rows = 16
  c.host.gin_bindings = (
    "train_data = 'data/dapo_math_17k.parquet'",
    "eval_data = ['data/aime_2024.jsonl', 'data/aime_2025.jsonl',"
    " 'data/math_500.jsonl']",
  )
  return recipe.finish(c, variant)
