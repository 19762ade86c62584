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
# # Qwen3-0.6B, a Python tool and GSM8K
#
# | | |
# |---|---|
# | **Hardware** | one accelerator with 16 GB; bfloat16 wants an L4, an A100 or a TPU |
# | **Minutes** | not yet measured on such a machine; plan an evening for 200 steps |
# | **You will see** | what a published model reads and writes, what the filter keeps of it, and the trained model as a folder |

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

# ROC_TINY=1 takes two layers of random weights in the place of Qwen3-0.6B, with
# its tokenizer and template: every cell runs in minutes and learns nothing.
IS_TINY = os.environ.get("ROC_TINY", "0") == "1"

# %%
import jax
import matplotlib.pyplot as plt

from experiments import qwen3_0p6b_gsm8k
from roc import (
  build,
  config,
  curves,
  export,
  gallery,
  plots,
  pretrained,
  report,
  train,
)
from roc.layout import Role

print(jax.devices())

# %% [markdown]
# ## 2. A published model as a policy
#
# `config.pretrained` names a folder or a repository on the Hugging Face hub. The
# network's shapes, the tokenizer, the chat template and the first weights come
# from there; what is left to say is how to train. The experiment says that:

# %%
c = qwen3_0p6b_gsm8k.get_config("tiny" if IS_TINY else "")
if not IS_TINY:
  c.train.steps, c.eval.every, c.eval.n_problems = 40, 10, 128
cfg = pretrained.settle(config.resolve(c))
print(cfg.pretrained, "->", cfg.model)

# %% [markdown]
# What the model reads first: the system turn with the tool's schema and the
# question, as its own template writes them.

# %%
host = build.host_parts(cfg)
problem = host.train_task.problem(0)
prompt = host.chat.prompt_ids(problem.question)
print(host.tokenizer.decode(prompt))
print(f"\n{len(prompt)} tokens; the answer is {problem.answer}")

# %% [markdown]
# The conversation is never rendered again. When a tool answers, what the
# template writes around the answer is appended as ids, behind the very ids that
# the model drew: what was sampled is what is trained on. Only what the model drew
# carries loss, and every token knows whose it is:

# %%
ids, roles = host.chat.tool_suffix(["42"])
for i, role in zip(ids, roles, strict=True):
  print(f"{i:7d}  {Role(role).name:9} {host.tokenizer.decode([i])!r}")

# %% [markdown]
# ## 3. Train
#
# Each step draws twice as many rollouts as it needs, runs their calls in the
# sandbox, judges their answers, keeps the clean ones of the right and a plain
# sample of the wrong, and updates the policy. Stop it and run the cell again: it
# goes on from the last checkpoint.

# %%
folder = "runs/colab_qwen3_gsm8k" + "_tiny" * IS_TINY
runs = pathlib.Path(os.environ.get("ROC_RUNS", folder))
train.run(cfg, runs / "rl")

# %%
report.run(None, runs / "rl")

# %%
rows = curves.read(runs / "rl" / "metrics.jsonl")
fig, axes = plt.subplots(1, 3, figsize=(14, 3.2))
lines = [
  (0, curves.ACCURACY, "with the tool", "green"),
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
# ## 4. What the filter kept
#
# One problem at the first and at the last step: how each call of a rollout ended,
# whether it was kept, and why.

# %%
for exhibit in gallery.exhibits(runs / "rl" / "rollouts"):
  print(f"\n== {exhibit.heading}: {exhibit.question}  ({exhibit.summary})")
  for view in exhibit.views[:6]:
    calls = " ".join(chip.status for chip in view.calls) or "no call"
    print(f"  {view.outcome:8}{view.fate:10}{calls:22}{view.why}")

# %% [markdown]
# ## 5. Take it along
#
# The policy as a Hugging Face folder: it loads in transformers and in other
# engines, and here as the `config.pretrained` of the next run.

# %%
model = runs / "model"
print(export.export(cfg, runs / "rl", model))
for path in sorted(model.iterdir()):
  print(f"{path.stat().st_size / 1024:12,.1f} KiB  {path.name}")

# %% [markdown]
# ## 6. What to try next
#
# - `c.filter.mode = "stratified"`: the control. Does the filter do anything
#   that throwing away as many of each outcome at random does not?
# - another set of problems: `docs/tasks.md`; another model: `docs/models.md`.
# - `experiments/rlinf_7b.py`, the smallest published run of this algorithm.
