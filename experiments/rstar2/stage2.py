"""rStar2-Agent, RL stage 2: responses of 12K tokens on the same problems.

Claim: 85 more steps with more room take AIME 2024/2025 from 72.1/64.2 to
77.0/64.8.

Source: arXiv 2508.20722, section on training; hyper-parameters as in
experiments/rstar2/recipe.py.
Hardware: as stage 1.
Result: not yet run.

Command:
  python -m roc.main train --config=experiments/rstar2/stage2.py \
    --workdir=runs/rstar2/stage2 --config.init_from=runs/rstar2/stage1

`--config=experiments/rstar2/stage2.py:tiny` runs the same road in seconds.
"""

from experiments.rstar2 import recipe


def get_config(variant: str = ""):
  """Returns the ConfigDict; `variant` is "" or "tiny"."""
  c = recipe.base(variant)
  recipe.limit(c, response_tokens=12_288, turns=10)  # paper
  c.train.steps = 85  # paper
  c.train.keep_optimizer = True  # paper: it is reset before stage 3 only
  c.train.warmup = 0  # moments that are warm need none
  c.host.gin_bindings = recipe.DATA
  return recipe.finish(c, variant)
