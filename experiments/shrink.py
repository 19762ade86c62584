"""The `:tiny` form of the experiments with published models.

The same road with two layers, a few rollouts and a few steps: a test of the
wiring, not of learning. Tokenizer, vocabulary and chat template are the real
ones of Qwen3, and the problems are real ones of GSM8K.
"""

from roc import pretrained

PRETRAINED = "experiments/tiny_qwen3"


def shrink(c) -> None:
  """Makes an experiment with a published model seconds long."""
  c.pretrained = PRETRAINED
  c.init_from = pretrained.RANDOM  # the folder holds no weights
  c.model.dtype = "float32"
  c.model.remat = "none"
  c.mesh.data = c.mesh.fsdp = c.mesh.tensor = 1
  c.loss.logprob_chunk = 128  # of 151,936 logits each
  c.sampling.n_slots = 8
  c.sampling.chunk = 16
  c.sampling.extend_chunk = 64
  c.sampling.extend_rows = 4
  c.sampling.page = 64
  c.sampling.cache_tokens = 0
  c.sampling.cache_length = 768
  c.sampling.max_tokens = 128
  c.sft.data = ("experiments/data/gsm8k/calls.jsonl",)
  c.sft.overlong = "drop"
  c.sft.heldout = 0.0
  c.sft.steps = 4
  c.sft.rows = 4
  c.sft.microbatch_rows = 0
  c.sft.length = 1024
  c.sft.warmup = 1
  c.sft.lr = 1e-3
  c.filter.n_drawn = 4
  c.filter.n_kept = 2
  c.filter.min_pos = c.filter.min_neg = 1
  # Hardly any answer is right at this size; without these two no rollout would
  # have an advantage, and the update nothing to do.
  c.filter.drop_equal_reward = False
  c.filter.overlong = "soft"
  c.filter.overlong_buffer = 128
  c.train.steps = 2
  c.train.prompts = 2
  c.train.microbatch_rows = 0
  c.train.warmup = 1
  c.train.keep_optimizer = False  # there need be no run to go on from
  c.train.buckets = (768,)
  c.eval.every = 0
  c.eval.n_problems = 2
  c.eval.samples = 1
  c.checkpoint.every = 1
