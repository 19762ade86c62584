# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Resample on correct, by eye and by hand
#
# | | |
# |---|---|
# | **Hardware** | two CPU cores are enough; a GPU or TPU is not needed |
# | **Minutes** | about ten, half of them training |
# | **You will see** | what the filter keeps, and a small model calling Python |

# %% [markdown]
# ## 1. Install
#
# Inside a checkout this cell only finds the repository's root. Elsewhere, as on
# Colab, it fetches the repository from the address that you set; if pip replaces packages that were loaded
# already, restart the session once and run on.

# %%
import os
import pathlib
import subprocess
import sys

REPOSITORY = os.environ.get("ROC_REPOSITORY", "")  # what `git clone` takes
root = pathlib.Path.cwd()
if not (root / "roc").is_dir():
  root = root.parent if (root.parent / "roc").is_dir() else root / "roc-repo"
if not root.is_dir():
  if not REPOSITORY:
    raise SystemExit("set REPOSITORY to the address of your copy of roc")
  subprocess.run(["git", "clone", "-q", REPOSITORY, str(root)], check=True)
  pip = [sys.executable, "-m", "pip", "install", "-q"]
  subprocess.run([*pip, "-r", str(root / "requirements.txt")], check=True)
os.chdir(root)
sys.path.insert(0, str(root))

# ROC_TINY=1 runs every cell in two minutes and learns nothing.
IS_TINY = os.environ.get("ROC_TINY", "0") == "1"

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from experiments import quickstart
from roc import config, curves, gallery, plots, report, sft, train
from roc.core import advantages, resample
from roc.layout import Outcome, ToolStatus

# %% [markdown]
# ## 2. One group of rollouts
#
# A model answered one problem eight times. It could call Python in between.
# Five answers are right, but not all of them are a good example: some stumbled
# over errors of their own making before they got there. The reward does not see
# that: right is 1, wrong is 0.

# %%
OK, ERROR, TIMEOUT = ToolStatus.OK, ToolStatus.ERROR, ToolStatus.TIMEOUT
group = [
  # how each call ended, answers given, turns taken, right?
  ([OK], 1, 2, True),
  ([ERROR, OK], 1, 3, True),
  ([ERROR, ERROR, TIMEOUT, OK], 1, 5, True),
  ([OK], 2, 2, True),
  ([OK, OK], 1, 3, True),
  ([OK], 1, 2, False),
  ([ERROR, TIMEOUT], 0, 3, False),
  ([], 1, 1, False),
]
n_drawn, n_kept = len(group), 4

# %%
# Arrays carry their axes in the name: N groups, O rollouts drawn, C calls.
status_NOC = np.full((1, n_drawn, 4), ToolStatus.NONE, np.int8)
for o, (calls, *_) in enumerate(group):
  status_NOC[0, o, : len(calls)] = calls
n_answers_NO = jnp.array([[row[1] for row in group]])
n_turns_NO = jnp.array([[row[2] for row in group]])
outcome_NO = jnp.array(
  [[Outcome.CORRECT if row[3] else Outcome.WRONG for row in group]]
)

p = resample.penalties(jnp.array(status_NOC), n_answers_NO, n_turns_NO)
print("rollout  right  p_err  p_format      p   calls")
for o, (calls, _, _, is_right) in enumerate(group):
  parts = p.p_err_NO[0, o], p.p_format_NO[0, o], p.p_total_NO[0, o]
  numbers = "  ".join(f"{float(x):6.2f}" for x in parts)
  names = " ".join(ToolStatus(c).name.lower() for c in calls) or "none"
  print(f"{o:7d}  {is_right!s:>5}  {numbers}   {names}")

# %% [markdown]
# `p_err` is the share of failed calls (0.5 without a call, so that not calling
# is no way to look clean), `p_format` asks for exactly one answer, and their
# sum `p` is what the filter goes by.
#
# ## 3. Which four go into the update?
#
# - `uniform` takes four at random;
# - `stratified` has the quotas of `sort` and takes right ones and wrong ones at
#   random;
# - `sort` takes the cleanest right ones, and wrong ones as they come;
# - `inverse` draws right ones with weight 1 / (p + eps), wrong ones at random.
#
# This is the very function that training calls. We draw with 2,000 keys and
# count how often each rollout is kept.


# %%
def keep_rates(mode, eps=0.1):
  keys = jax.random.split(jax.random.key(0), 2000)
  draw = lambda key: resample.resample(
    mode, key, outcome_NO, p.p_total_NO, n_keep=n_kept, eps=eps
  )
  return np.asarray(jax.vmap(draw)(keys)).mean(axis=0)[0]


rates = {
  "uniform": keep_rates("uniform"),
  "stratified": keep_rates("stratified"),
  "inverse, eps 0.5": keep_rates("inverse", 0.5),
  "inverse, eps 0.05": keep_rates("inverse", 0.05),
  "sort": keep_rates("sort"),
}

# %%
fig, axes = plt.subplots(1, 5, figsize=(15, 3), sharey=True)
colours = [plots.light("green" if row[3] else "orange") for row in group]
for ax, (name, rate) in zip(axes, rates.items(), strict=True):
  ax.bar(range(n_drawn), rate, color=colours)
  ax.set_title(name)
  ax.set_xlabel("rollout")
axes[0].set_ylabel("how often it is kept")
fig.suptitle("right (green), wrong (orange)")
fig.tight_layout()

# %% [markdown]
# `uniform` keeps every rollout half of the time, the one with three failures
# (number 2) as gladly as the clean ones, and `stratified` does so among the right
# ones. `inverse` leans towards the clean ones,
# the more the smaller `eps` is; `sort` takes nothing else. Among the wrong ones
# neither looks at the mess: the model still has to see all the ways to fail.
# (5 right of 8, times 4 to keep, is 2.5: `sort` rounds to 2 right and 2 wrong,
# as its authors' code does, and `inverse` to 3 and 1, as the paper says.)
#
# The kept ones become a GRPO group. Advantages are computed over them alone:

# %%
keep_NO = resample.resample(
  "sort", None, outcome_NO, p.p_total_NO, n_keep=n_kept
)
reward_NO = (outcome_NO == Outcome.CORRECT).astype(jnp.float32)
print(np.round(advantages.group_advantages(reward_NO, keep_NO), 2))

# %% [markdown]
# ## 4. A short training
#
# First a small transformer learns the format from scripted demonstrations, a
# stated share of which is messy. Then GRPO-RoC takes over: rollouts with real
# Python calls in a separate, limited process. This is `make quickstart` with a
# shorter schedule, so expect less than its numbers.

# %%
c = quickstart.get_config("tiny" if IS_TINY else "")
if not IS_TINY:
  c.sft.n_demos, c.sft.steps = 3000, 400
  c.train.steps, c.eval.every, c.eval.n_problems = 20, 5, 128
folder = "runs/colab_quickstart" + "_tiny" * IS_TINY
runs = pathlib.Path(os.environ.get("ROC_RUNS", folder))
sft.run(config.resolve(c), runs / "sft")

# %%
c.init_from = str(runs / "sft")
train.run(config.resolve(c), runs / "rl")

# %% [markdown]
# ## 5. What it learned

# %%
report.run(None, runs / "rl")

# %%
rows = curves.read(runs / "rl" / "metrics.jsonl")
fig, axes = plt.subplots(1, 3, figsize=(14, 3.2))
lines = [
  (0, curves.ACCURACY, "with the tool", "green"),
  (0, report.HEAD, "in the head", "grey"),
  (1, "roc/err_ratio_pos_before", "as drawn", "blue"),
  (1, "roc/err_ratio_pos_after", "as kept", "orange"),
  (2, "tools/call_frequency", "tool calls", "orange"),
  (2, "num_turns/mean", "turns", "blue"),
]
for i, metric, label, colour in lines:
  steps, values = curves.series(rows, metric)
  plots.curve(axes[i], steps, values, label=label, colour=colour)
plots.finish(axes[0], "Held-out accuracy", is_percent=True)
plots.finish(axes[1], "Failing calls, correct rollouts", is_percent=True)
plots.finish(axes[2], "Per rollout")
fig.tight_layout()

# %% [markdown]
# The gap between the two lines in the middle is the filter at work: what is
# trained on is cleaner than what was drawn.
#
# And one problem as the filter saw it, at the first and at the last step:

# %%
for exhibit in gallery.exhibits(runs / "rl" / "rollouts"):
  print(f"\n== {exhibit.heading}: {exhibit.question}  ({exhibit.summary})")
  for view in exhibit.views[:6]:
    calls = " ".join(chip.status for chip in view.calls) or "no call"
    print(f"  {view.outcome:8}{view.fate:10}{calls:22}{view.why}")

# %% [markdown]
# ## 6. What to try next
#
# - `c.filter.mode = "stratified"`: the control. Does the filter do anything
#   that throwing away as many of each outcome at random does not?
# - `c.filter.eps` from 0.01 to 1 in mode `inverse`.
# - `c.host.gin_bindings = ("mess = 0.8",)`: a messier start.
# - `make quickstart` for the whole schedule, `make compare` for seven arms over
#   five seeds, and `docs/` for what every number means.
