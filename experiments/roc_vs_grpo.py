"""Does the filter help? Four ways of choosing what to train on, three seeds.

Claim: with equal updates, resample on correct lowers the share of failing
calls in correct rollouts below that of plain GRPO (the ablation of GRPO-RoC,
arXiv 2508.20722, Fig. 9, has these two arms alone). The `uniform` arm is the
control that the paper lacks: it draws and discards as many rollouts as RoC, but
blindly.

  grpo         G drawn, G kept
  uniform      2G drawn, G kept at random
  roc_sort     2G drawn, the authors' released rule
  roc_inverse  2G drawn, the paper's rule

All arms and seeds start from one supervised policy on the quickstart's task.
The learning rate is half of the quickstart's, so that the arms stay apart for
longer before all of them are clean.

Source: GRPO-RoC, arXiv 2508.20722; the task is this project's own.
Hardware: 2 CPU cores, 25 minutes to an hour.
Result: failing calls 16.7 % (grpo), 17.8 % (uniform), 5.8 % (roc_sort), 8.1 %
(roc_inverse) from 26.5 %; accuracy the same in all arms (docs/results.md).

Command:
  make compare
or, from a supervised policy that is there already:
  python -m roc.main compare --config=experiments/roc_vs_grpo.py \
    --workdir=runs/comparison --config.init_from=runs/quickstart/sft

`--config=experiments/roc_vs_grpo.py:tiny` runs the same road in seconds.
"""

from experiments import quickstart


def get_config(variant: str = ""):
  """Returns the ConfigDict; `variant` is "" or "tiny"."""
  c = quickstart.get_config(variant)
  c.compare.seeds = 3
  c.train.steps = 30
  c.train.lr = 1e-4
  c.eval.every = 5
  c.eval.head = False
  c.log.traces_every = 20
  c.log.tensorboard = False
  c.checkpoint.every = 20
  c.checkpoint.keep = 1
  if variant == "tiny":
    c.compare.seeds = 2
    c.train.steps = 2
    c.eval.every = 1
  return c
