"""rStar2-Agent, RL stage 3: the problems that are not always solved.

Claim: 125 steps on the harder 17.3K problems take AIME 2024/2025 from 77.0/64.8
to 80.6/69.8; beyond step 510 in all, policy and reward collapse.

Source: arXiv 2508.20722, section on training; hyper-parameters as in
experiments/rstar2/recipe.py.
Hardware: as stage 1.
Result: not yet run.

The problems are measured first: the policy of stage 2 draws 8 rollouts of each,
and those it solves 8 times of 8 are left out.

Command:
  python -m roc.main rollout --config=experiments/rstar2/stage2.py \
    --workdir=runs/rstar2/stage2 --config.collect.task=train \
    --config.collect.n_problems=42000 --config.collect.samples=8
  python -m roc.main train --config=experiments/rstar2/stage3.py \
    --workdir=runs/rstar2/stage3 --config.init_from=runs/rstar2/stage2

`--config=experiments/rstar2/stage3.py:tiny` runs the same road in seconds.
"""

from experiments.rstar2 import recipe

ROLLOUTS = "runs/rstar2/stage2/rollouts/collect_train"


def get_config(variant: str = ""):
  """Returns the ConfigDict; `variant` is "" or "tiny"."""
  c = recipe.base(variant)
  recipe.limit(c, response_tokens=12_288, turns=15)  # paper
  c.train.steps = 125  # paper; the optimizer's state is reset
  c.host.gin_bindings = (
    *recipe.DATA,
    f"train/FileTask.rollouts = {ROLLOUTS!r}",
    "train/FileTask.max_pass_rate = 0.99",  # paper: solved 8 times of 8 is out
  )
  return recipe.finish(c, variant)
