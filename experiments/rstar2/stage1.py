"""rStar2-Agent, RL stage 1: responses of 8K tokens on 42K problems.

Claim: GRPO-RoC takes the supervised 14B policy from AIME 2024/2025 of 3.3/0 to
72.1/64.2 in 300 steps.

Source: arXiv 2508.20722, section on training; hyper-parameters as in
experiments/rstar2/recipe.py.
Hardware: 64 chips with 95 GB (v5p-128); the paper's 64 MI300X took about four
days. Runs of several hosts are not possible yet, so this is a record of the
recipe, and `:tiny` is what can be run.
Result: not yet run. The 42K problems (integer answers; DAPO-17K, AoPS of
OpenMathReasoning, Project Euler; kept if Qwen3-32B solves them twice of 16
times) were not released; %train_data is any file of problems.

Command:
  python -m roc.main train --config=experiments/rstar2/stage1.py \
    --workdir=runs/rstar2/stage1 --config.init_from=runs/rstar2/sft
  python -m roc.main evaluate --config=experiments/rstar2/stage1.py \
    --workdir=runs/rstar2/stage1 --config.sampling.cache_length=34000 \
    --config.train.buckets='(34000,)' --config.sampling.max_tokens=30000 \
    --config.sampling.max_turns=30

`--config=experiments/rstar2/stage1.py:tiny` runs the same road in seconds.
"""

from experiments.rstar2 import recipe


def get_config(variant: str = ""):
  """Returns the ConfigDict; `variant` is "" or "tiny"."""
  c = recipe.base(variant)
  recipe.limit(c, response_tokens=8192, turns=10)  # paper
  c.train.steps = 300  # paper
  c.host.gin_bindings = recipe.DATA
  return recipe.finish(c, variant)
