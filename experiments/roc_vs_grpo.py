"""Does the filter help? Seven ways of choosing what to train on, five seeds.

Claim: with equal updates, resample on correct lowers the share of failing
calls in correct rollouts below that of plain GRPO (the ablation of GRPO-RoC,
arXiv 2508.20722, Fig. 9, has `grpo` and RoC alone). The other arms are controls
that the paper lacks; `stratified` differs from RoC in nothing but its
preference for clean correct rollouts.

  grpo         G drawn, G kept
  grpo_2g      2G drawn, 2G kept: an update sees twice the rows
  uniform      2G drawn, G kept at random, blind to outcome
  stratified   2G drawn, RoC's quotas, at random among correct and among wrong
  balanced     2G drawn, half correct, half wrong (PODS), at random within each
  roc_sort     2G drawn, the authors' released rule
  roc_inverse  2G drawn, the paper's rule

All arms of a seed start from one policy, supervised with that seed on the
quickstart's task. The learning rate is half of the quickstart's, so that the
arms stay apart for longer before all of them are clean.

Source: GRPO-RoC, arXiv 2508.20722; PODS, arXiv 2504.13818; the task is this
project's own.
Hardware: 2 CPU cores, about 2 hours.
Result: not yet run with all arms (docs/results.md).

Command:
  make compare
which is
  python -m roc.main compare --config=experiments/roc_vs_grpo.py \
    --workdir=runs/comparison

`--config=experiments/roc_vs_grpo.py:tiny` runs the same road in seconds.
"""

from experiments import quickstart


def get_config(variant: str = ""):
  """Returns the ConfigDict; `variant` is "" or "tiny"."""
  c = quickstart.get_config(variant)
  c.compare.seeds = 5
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
