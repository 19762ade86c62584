"""Settings by the names that other trainers give them.

The distance in letters finds misspellings and nothing else: `learning_rate` is
nearer to `minibatches` than to `lr`. So names are looked up by meaning first.
"""

from collections.abc import Collection

from roc import errors

# Names in TRL, verl, OpenRLHF, transformers and vLLM, without their section.
_MEANT = {
  "train.lr": (
    *("learning_rate", "peak_lr", "actor_learning_rate", "max_lr"),
    *("learningrate", "base_lr"),
  ),
  "train.prompts": (
    *("batch_size", "train_batch_size", "rollout_batch_size", "num_prompts"),
    *("n_prompts", "per_device_train_batch_size", "prompts_per_step"),
    *("generation_batch_size", "global_batch_size"),
  ),
  "train.microbatch_rows": (
    *("gradient_accumulation_steps", "micro_batch_size", "micro_train_batch"),
    *("micro_train_batch_size", "ppo_micro_batch_size_per_gpu"),
    *("ppo_micro_batch_size", "grad_accum_steps", "microbatch_size"),
  ),
  "train.minibatches": (
    *("mini_batch_size", "ppo_mini_batch_size", "num_mini_batches"),
    *("num_minibatches", "minibatch_size", "steps_per_generation"),
  ),
  "train.steps": (
    *("max_steps", "num_steps", "total_steps", "total_training_steps"),
    *("num_train_steps", "num_train_epochs", "total_epochs", "epochs"),
    *("num_epochs", "max_epochs", "n_steps", "iterations"),
  ),
  "train.warmup": (
    *("warmup_steps", "num_warmup_steps", "lr_warmup_steps", "warmup_ratio"),
    *("lr_warmup_ratio", "lr_warmup_steps_ratio"),
  ),
  "train.schedule": ("lr_scheduler_type", "lr_scheduler", "lr_schedule"),
  "train.grad_clip": (
    "max_grad_norm",
    "clip_grad",
    "gradient_clip",
    "max_norm",
  ),
  "train.weight_decay": ("wd", "adam_weight_decay", "l2"),
  "train.b1": ("adam_beta1", "beta1", "beta_1"),
  "train.b2": ("adam_beta2", "beta2", "beta_2"),
  "filter.n_drawn": (
    *("num_generations", "n_rollouts", "num_rollouts", "group_size", "n"),
    *("n_samples_per_prompt", "samples_per_prompt", "num_return_sequences"),
    *("rollout_n", "num_samples", "generations_per_prompt"),
  ),
  "loss.eps_low": (
    *("clip_range", "cliprange", "clip_ratio", "clip_ratio_low", "clip_eps"),
    *("epsilon", "eps_clip", "epsilon_low", "ppo_clip", "clip_epsilon"),
  ),
  "loss.eps_high": (
    *("clip_ratio_high", "epsilon_high", "eps_clip_high", "clip_range_high"),
  ),
  "loss.dual_clip": ("clip_ratio_c", "delta", "dual_clip_ratio"),
  "loss.kl_coef": (
    *("beta", "kl_coeff", "kl_beta", "kl_loss_coef", "init_kl_coef"),
    *("kl_penalty", "kl_weight", "use_kl_loss"),
  ),
  "loss.entropy_coef": ("entropy_coeff", "ent_coef", "entropy_bonus"),
  "loss.kind": ("loss_type", "policy_loss", "loss_mode"),
  "loss.normaliser": ("loss_agg_mode", "loss_reduction"),
  "loss.scale_by_std": ("scale_rewards", "norm_adv_by_std_in_grpo"),
  "sampling.max_tokens": (
    *("max_completion_length", "max_new_tokens", "response_length"),
    *("max_response_length", "generate_max_len", "max_gen_len"),
  ),
  "sampling.cache_length": (
    *("max_model_len", "max_seq_length", "max_length", "context_length"),
    *("max_seq_len", "max_prompt_length"),
  ),
  "sampling.n_slots": ("max_num_seqs", "num_slots"),
  "mesh.tensor": ("tensor_parallel_size", "tensor_model_parallel_size", "tp"),
  "mesh.data": ("num_gpus", "n_gpus", "n_devices", "num_devices"),
  "checkpoint.every": (
    "save_steps",
    "save_interval",
    "save_freq",
    "save_every",
  ),
  "checkpoint.keep": ("save_total_limit", "max_ckpt_num", "max_to_keep"),
  "eval.every": ("eval_steps", "eval_interval", "test_freq", "eval_every"),
  "pretrained": (
    *("model_name_or_path", "model_path", "model_name", "pretrain"),
    *("base_model", "pretrained_model_name_or_path"),
  ),
  "init_from": ("resume_from_checkpoint", "checkpoint_path", "load_checkpoint"),
  "lora.rank": ("lora_r", "lora_rank", "r"),
  "lora.alpha": ("lora_alpha",),
  "lora.targets": ("target_modules", "lora_target_modules"),
  "model.remat": ("gradient_checkpointing", "enable_gradient_checkpointing"),
  "model.dtype": ("bf16", "fp16", "torch_dtype", "precision"),
  "seed": ("random_seed", "random_state"),
}
_SETTING_OF = {name: key for key, names in _MEANT.items() for name in names}


def setting_of(name: str, known: Collection[str]) -> str:
  """The setting that another trainer's name means, or "".

  Args:
    name: as given, with or without its section.
    known: every setting, such as `train.lr`.
  """
  section, _, leaf = name.lower().replace("-", "_").rpartition(".")
  meant = _SETTING_OF.get(leaf, "")
  if section == "sft":
    own = "rows" if meant == "train.prompts" else meant.rpartition(".")[2]
    meant = f"sft.{own}" if f"sft.{own}" in known else meant
  return meant if meant in known else ""


def closest(name: str, known: Collection[str]) -> str:
  """Returns ` (did you mean X?)` for an unknown setting, or nothing.

  What another trainer calls so, else a setting of that name in another section,
  else the nearest in letters.

  Args:
    name: as given, with or without its section.
    known: every setting.
  """
  leaf = name.rpartition(".")[2]
  alike = [key for key in known if key.rpartition(".")[2] == leaf]
  meant = setting_of(name, known) or " or ".join(alike[:3])
  return f" (did you mean {meant}?)" if meant else errors.closest(name, known)
