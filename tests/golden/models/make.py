"""Makes the small models beside this file, and what they compute.

Each is a random model of a family as Hugging Face saves it, with the outputs of
transformers in float32 on a CPU: log-probs of given tokens and entropies of
left- and of right-padded rows, and 24 greedy tokens behind each row. What lies
here was made with transformers 5.12.1 (yarn: 5.24.0), torch 2.13.0, numpy 2.4.

  python tests/golden/models/make.py [NAMES]   (in an environment with these)
"""

import pathlib
import sys

import numpy as np
import torch
import transformers

HERE = pathlib.Path(__file__).parent
N_GREEDY = 24
SHARED = {
  "vocab_size": 96,
  "hidden_size": 32,
  "intermediate_size": 56,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "max_position_embeddings": 256,
  "bos_token_id": None,
  "eos_token_id": None,
  "pad_token_id": 0,
}
LLAMA_SCALING = {
  "rope_type": "llama3",
  "rope_theta": 1e4,
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 32,
}
YARN = {
  "rope_type": "yarn",
  "rope_theta": 1e6,
  "factor": 4.0,
  "original_max_position_embeddings": 16,
}
MODELS = {
  "qwen2": transformers.Qwen2Config(
    **SHARED, tie_word_embeddings=False, rope_theta=1e6
  ),
  "qwen3": transformers.Qwen3Config(
    **SHARED, tie_word_embeddings=True, head_dim=16, rope_theta=1e6
  ),
  "llama": transformers.LlamaConfig(
    **SHARED, tie_word_embeddings=True, rope_parameters=LLAMA_SCALING
  ),
  "yarn": transformers.Qwen3Config(
    **SHARED, tie_word_embeddings=True, head_dim=16, rope_parameters=YARN
  ),
}


def randomise(model: torch.nn.Module) -> None:
  """Numbers of a size at which every parameter matters."""
  torch.manual_seed(0)
  for name, x in model.named_parameters():
    noise = torch.randn_like(x)
    if "norm" in name:
      x.data = 1 + 0.2 * noise
    elif x.ndim == 1:
      x.data = 0.3 * noise
    else:
      x.data = 1.4 * noise / x.shape[-1] ** 0.5


def scores(model, ids_BT, mask_BT) -> tuple[np.ndarray, np.ndarray]:
  """Log-prob of each token given those before it, and entropy behind it."""
  position_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)
  logits_BTV = model(
    ids_BT, attention_mask=mask_BT, position_ids=position_BT
  ).logits
  logp_BTV = torch.log_softmax(logits_BTV.float(), -1)
  entropy_BT = -(logp_BTV.exp() * logp_BTV).sum(-1)
  logp_BT = logp_BTV[:, :-1].gather(-1, ids_BT[:, 1:, None])[..., 0]
  return logp_BT.numpy(), entropy_BT.numpy()


def make(name: str, config: transformers.PretrainedConfig) -> None:
  """Writes one model and its outputs."""
  model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
  randomise(model)
  model.save_pretrained(HERE / name)
  (HERE / name / "generation_config.json").unlink(missing_ok=True)
  lengths = [14, 9, 4]
  T = max(lengths)
  rng = np.random.default_rng(0)
  rows = [rng.integers(1, config.vocab_size, n) for n in lengths]
  found = {"length": np.array(lengths)}
  for side in ("left", "right"):
    ids_BT = torch.zeros((len(rows), T), dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    for i, row in enumerate(rows):
      part = slice(T - len(row), T) if side == "left" else slice(0, len(row))
      ids_BT[i, part], mask_BT[i, part] = torch.tensor(row), 1
    logp_BT, entropy_BT = scores(model, ids_BT, mask_BT)
    found |= {
      f"{side}_ids": ids_BT.numpy().astype(np.int32),
      f"{side}_mask": mask_BT.numpy().astype(np.int32),
      f"{side}_logp": logp_BT,
      f"{side}_entropy": entropy_BT,
    }
  greedy = []
  for row in rows:
    ids = list(row)
    for _ in range(N_GREEDY):
      ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    greedy.append(ids[-N_GREEDY:])
  np.savez_compressed(HERE / name / "golden.npz", greedy=greedy, **found)


if __name__ == "__main__":
  with torch.no_grad():
    for name in sys.argv[1:] or MODELS:
      make(name, MODELS[name])
