"""rStar2-Agent, before RL: a base model learns to call the tool, not to reason.

Claim: three epochs over function calls, instructions and chat leave AIME
2024/2025 at 3.3/0 and teach Qwen3-14B-Base the format, so that RL starts from
short answers of about 1K tokens.

Source: arXiv 2508.20722, section on the cold start: 165K function calls
(ToolACE-11K, APIGen-MT-5K, Glaive-v2-101K, and 48K of Magicoder rewritten as
calls), 30K of Tulu3 instructions, 27K of Llama-Nemotron chat rewritten by
o4-mini.
Hardware: 64 chips with 95 GB (v5p-128); runs of several hosts are not possible
yet, so this is a record of the recipe, and `:tiny` is what can be run.
Result: not yet run; neither the conversations nor the checkpoint were released.

Command:
  python -m roc.main sft --config=experiments/rstar2/sft.py \
    --workdir=runs/rstar2/sft

`--config=experiments/rstar2/sft.py:tiny` runs the same road in seconds.
"""

from experiments.rstar2 import recipe

N_CONVERSATIONS = 165_000 + 30_000 + 27_000  # paper
EPOCHS = 3  # paper
BATCH = 128  # paper: conversations
STEPS = EPOCHS * N_CONVERSATIONS // BATCH


def get_config(variant: str = ""):
  """Returns the ConfigDict; `variant` is "" or "tiny"."""
  c = recipe.base(variant)
  recipe.limit(c, response_tokens=8192, turns=10)
  c.sft.data = ("data/rstar2_sft.jsonl",)
  c.sft.overlong = "drop"  # ours
  # ours: rows are packed. 64 of 4,096 tokens hold 128 conversations of 2,048;
  # the paper gives no lengths.
  c.sft.rows = 64
  c.sft.length = 4096
  c.sft.steps = STEPS
  c.sft.lr = 5e-6  # paper
  c.sft.warmup = STEPS * 4 // 100  # paper: 4 %
  c.sft.schedule = "cosine"  # paper
  c.sft.weight_decay = 0.01  # code: verl's default
  c.sft.b1, c.sft.b2 = 0.9, 0.999  # code: AdamW's defaults
  return recipe.finish(c, variant)
