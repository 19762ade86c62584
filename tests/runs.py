"""Invented runs for the tests of everything that reads a workdir."""

import json
import math
import pathlib
from typing import Any


def write_metrics(
  workdir: pathlib.Path,
  *,
  n_steps: int = 20,
  every: int = 10,
  rate: float = 0.1,
  drawn: int = 256,
  offset: float = 0.0,
) -> None:
  """Writes metrics.jsonl of a run whose policy improves at a given rate."""
  rows = []
  for step in range(n_steps + 1):
    left = math.exp(-rate * step)
    row: dict[str, Any] = {"step": step}
    if step:
      row |= {
        "reward": 0.95 - 0.35 * left,
        "completions/mean_length": 70 + 20 * left,
        "roc/err_ratio_pos_before": 0.3 * left,
        "roc/err_ratio_pos_after": 0.1 * left,
        "time/generate": 2.0,
        "time/tools": 0.5,
        "time/score": 0.0,
        "time/update": 1.5,
        "rollouts_drawn": drawn * step,
        "tokens_sampled": 50 * drawn * step,
        "loss": float("nan"),
      }
    if step % every == 0:
      row |= {
        "eval/heldout/accuracy": 0.97 - 0.4 * left + offset,
        "eval/heldout/failure_frequency_correct": 0.3 * left,
        "eval/heldout/call_frequency": 1.5,
        "eval/heldout/mean_length": 80.0,
        "eval/heldout/num_turns": 2.5,
        "eval/heldout/n_problems": 100.0,
        "eval/head/accuracy": 0.01,
      }
    rows.append(row)
  workdir.mkdir(parents=True, exist_ok=True)
  text = "".join(json.dumps(row) + "\n" for row in rows)
  (workdir / "metrics.jsonl").write_text(text)


def trace(rollout_id: int, **changes: Any) -> dict[str, Any]:
  """One line of a trace file: one failing call, one good one, an answer."""
  return {
    "place": 7,
    "rollout_id": rollout_id,
    "question": "What is 2 * 3?",
    "gold": "6",
    "messages": [
      {"role": "prompt", "text": "What is 2 * 3?"},
      {"role": "model", "text": "<tool_call>prnt(2*3)</tool_call>"},
      {"role": "template", "text": "<tool_response>"},
      {"role": "tool", "text": "NameError: name 'prnt' is not defined"},
      {"role": "template", "text": "</tool_response>"},
      {"role": "model", "text": "<tool_call>print(2*3)</tool_call>"},
      {"role": "tool", "text": "6"},
      {"role": "model", "text": "<answer>\\boxed{6}</answer>"},
    ],
    "tool_records": [
      {"status": "error", "name": "python", "code": "prnt(2*3)", "text": ""},
      {"status": "ok", "name": "python", "code": "print(2*3)", "text": "6"},
    ],
    "outcome": "correct",
    "reward": 1.0,
    "kept": True,
    "advantage": 0.5,
    "p_err": 0.5,
    "p_format": 0.0,
    "p_total": 0.5,
    "why": "kept: clean",
    "n_turns": 3,
    "answer": "6",
    "stop_reason": "answered",
  } | changes


def write_traces(
  workdir: pathlib.Path, step: int, traces: list[dict[str, Any]]
) -> None:
  """Writes rollouts/step_<n>.jsonl."""
  folder = workdir / "rollouts"
  folder.mkdir(parents=True, exist_ok=True)
  text = "".join(json.dumps(line) + "\n" for line in traces)
  (folder / f"step_{step:06d}.jsonl").write_text(text)
