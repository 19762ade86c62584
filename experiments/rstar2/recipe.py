"""What the four stages of rStar2-Agent have in common.

Where a number comes from stands beside it:

  paper  arXiv 2508.20722v1
  code   microsoft/rStar at ecbfb94, with its fork of verl at d0dc976
  ours   a choice that the sources leave open, or that fits our engine

Prompt, tool and answer format are in experiments/host/rstar2.gin.
"""

from experiments.shrink import shrink
from roc import config as config_lib

GIN = "experiments/host/rstar2.gin"
# The 42K problems of the paper were not released: any file of problems.
DATA = (
  "train_data = 'data/rstar2_42k.jsonl'",
  "eval_data = ['data/aime_2024.jsonl', 'data/aime_2025.jsonl']",
)
PROMPT_TOKENS = 2048  # code: max_prompt_length


def base(variant: str):
  """Returns the ConfigDict of an unnamed stage; `finish` completes it."""
  if variant not in ("", "tiny"):
    raise ValueError(f"unknown variant {variant!r}; there is only `tiny`")
  c = config_lib.default_config()
  c.pretrained = "Qwen/Qwen3-14B-Base"  # paper
  c.host.gin_files = (GIN,)

  # ---------------------------------------------------------------- model
  c.model.dtype = "bfloat16"  # code; master weights stay float32
  c.model.remat = "full"  # code: gradient checkpointing
  c.mesh.fsdp = 64  # ours: 64 chips, as many as the paper's GPUs

  # ------------------------------------------------------------- sampling
  c.sampling.temperature = 1.0  # paper
  c.sampling.n_slots = 32  # ours
  c.sampling.cache_tokens = 262_144  # ours: 43 GB a chip, 164 kB a token
  c.sampling.page = 128  # ours
  c.sampling.chunk = 32  # ours
  c.sampling.extend_chunk = 256  # ours

  # ----------------------------------------------------- filter and loss
  c.filter.mode = "sort"  # code; the paper's own draw is "inverse"
  c.filter.n_drawn = 32  # paper: 2G
  c.filter.n_kept = 16  # paper: G
  c.filter.min_pos = 2  # code: its script
  c.filter.min_neg = 2  # code: its script
  c.filter.drop_equal_reward = True  # code: reject_equal_reward
  c.filter.overlong = "keep"  # paper: truncated ones stay, with reward 0
  c.loss.kind = "clip"
  c.loss.eps_low = 0.2  # paper
  c.loss.eps_high = 0.28  # paper: clip-higher
  c.loss.normaliser = "prompt"  # paper, Eq. 6
  c.loss.ddof = 1  # code: torch.std
  c.loss.kl_coef = 0.0  # paper
  c.loss.entropy_coef = 0.0  # paper
  c.loss.old_logprobs = "recompute"  # code

  # ---------------------------------------------------------------- update
  c.train.prompts = 512  # paper
  c.train.lr = 1e-6  # paper
  c.train.schedule = "constant"  # paper
  c.train.warmup = 20  # paper
  c.train.minibatches = 1  # code: one update a batch
  c.train.microbatch_rows = 64  # ours: a row a chip
  c.train.weight_decay = 0.01  # code: verl's default
  c.train.b1, c.train.b2 = 0.9, 0.999  # code: AdamW's defaults
  c.train.grad_clip = 1.0  # code: verl's default

  # ----------------------------------------------------------- evaluation
  c.eval.every = 10  # ours
  c.eval.n_problems = 60  # AIME 2024 and 2025
  c.eval.samples = 16  # paper
  c.eval.temperature = 0.6  # paper
  c.eval.head = False
  return c


def limit(c, response_tokens: int, turns: int) -> None:
  """Sets how long a rollout may get."""
  length = PROMPT_TOKENS + response_tokens
  c.sampling.max_tokens = response_tokens
  c.sampling.cache_length = length
  c.sampling.max_turns = turns
  c.sampling.max_calls = 4 * turns  # ours: a turn may call several times
  c.train.buckets = tuple(range(2048, length, 2048)) + (length,)  # ours


def finish(c, variant: str):
  """Returns the stage, made small if the variant is `tiny`."""
  if variant == "tiny":
    shrink(c)
    # The problems and demonstrations that are here; those call `python`.
    c.host.gin_bindings = ("Toolbox.tool = 'python'",)
  return c
