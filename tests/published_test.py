"""From a Hugging Face folder to a run and back, with Qwen3's own tokenizer.

A model of two layers and random weights first learns a few tool calls by heart,
so that the runs behind it have calls to make; then every stage of the recipe
runs as it stands in experiments/.
"""

import json

import optax
import pytest

from experiments import qwen3_0p6b_gsm8k, rlinf_7b
from experiments.rstar2 import sft as sft_stage
from experiments.rstar2 import stage1, stage2, stage3
from roc import (
  build,
  collect,
  config,
  evaluate,
  export,
  main,
  pretrained,
  sft,
  train,
  updates,
)

# Learnt by heart: a call of the tool, and an answer that is wrong mostly.
CONVERSATION = {
  "messages": [
    {"role": "user", "content": "What is 1 + 1?"},
    {
      "role": "assistant",
      "content": "",
      "tool_calls": [
        {
          "type": "function",
          "function": {"name": "python", "arguments": {"code": "print(1)"}},
        }
      ],
    },
    {"role": "tool", "content": "1"},
    {"role": "assistant", "content": r"<answer>\boxed{1}</answer>"},
  ]
}

pytestmark = pytest.mark.slow


def tiny(module, **changes):
  c = module.get_config("tiny")
  c.log.progress = False
  c.log.tensorboard = False
  for name, value in changes.items():
    section, _, key = name.rpartition("__")
    setattr(getattr(c, section) if section else c, key, value)
  return config.resolve(c)


def rows_of(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def assert_trained(workdir, learns=True):
  """Rollouts, filter, update; returns the calls of the first step."""
  metrics = rows_of(workdir / "metrics.jsonl")
  assert [row["step"] for row in metrics] == [0, 1, 2]
  assert not learns or all(row["grad_norm"] > 0 for row in metrics[1:])
  assert all(row["mismatch_kl"] < 1e-6 for row in metrics[1:])
  assert all(row["time/text"] < row["time/step"] for row in metrics[1:])
  rollouts = rows_of(workdir / "rollouts" / "step_000001.jsonl")
  assert len({r["task_index"] for r in rollouts}) == 2 and len(rollouts) == 8
  assert sum(r["kept"] for r in rollouts) == 4
  return [record for r in rollouts for record in r["tool_records"]]


def updates_of(cfg, workdir):
  """By the count of the optimizer."""
  cfg = pretrained.settle(cfg)
  policy = build.make_policy(cfg, build.host_parts(cfg))
  learner = updates.make_learner(cfg, policy)
  restored = build.checkpoints(cfg, workdir).restore(learner.abstract_state)
  (adam,) = optax.tree.get_all_with_path(restored.state.opt_state, "count")[:1]
  return int(adam[1])


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
  """A supervised policy that calls the tool."""
  path = tmp_path_factory.mktemp("learnt")
  (path / "one.jsonl").write_text(json.dumps(CONVERSATION))
  cfg = tiny(
    sft_stage,
    sft__data=(str(path / "one.jsonl"),),
    sft__steps=70,
    sft__rows=1,
    sft__length=384,
    sft__lr=1e-2,
  )
  sft.run(cfg, path / "sft")
  losses = [row["loss"] for row in rows_of(path / "sft" / "metrics.jsonl")]
  assert losses[-1] < 0.5 * losses[0]
  return path / "sft"


@pytest.fixture(scope="module")
def staged(learnt, tmp_path_factory):
  """The three stages, each from the one before, on what was learnt."""
  path, source, calls = tmp_path_factory.mktemp("staged"), learnt, []
  question = CONVERSATION["messages"][0]["content"]
  problems = [
    {"id": f"p{i}", "prompt": question, "answer": 1 + i % 2} for i in range(6)
  ]
  text = "\n".join(map(json.dumps, problems))
  (path / "problems.jsonl").write_text(text)
  bindings = (
    "Toolbox.tool = 'python'",
    f"train_data = '{path}/problems.jsonl'",
  )
  for module in (stage1, stage2):
    name = module.__name__.rpartition(".")[2]
    cfg = tiny(
      module,
      init_from=str(source),
      train__keep_optimizer=module is stage2,
      host__gin_bindings=bindings,
    )
    train.run(cfg, path / name)
    calls += assert_trained(path / name)
    source = path / name
  assert updates_of(cfg, source) == 4  # those of stage 1 count
  chosen = tiny(
    stage2,
    collect__task="train",
    collect__n_problems=6,
    collect__samples=2,
    host__gin_bindings=bindings,
  )
  collect.run(chosen, source)
  last = tiny(
    stage3,
    init_from=str(source),
    host__gin_bindings=(
      *bindings,
      f"train/FileTask.rollouts = '{source}/rollouts/collect_train'",
      "train/FileTask.max_pass_rate = 1.0",
    ),
  )
  train.run(last, path / "stage3")
  calls += assert_trained(path / "stage3")
  assert "ok" in {call["status"] for call in calls}
  return path / "stage3"


def test_what_was_learnt_calls_the_real_tool(learnt, tmp_path, capsys):
  """From a run to a folder to a call in the sandbox, by its own greedy ids."""
  cfg = pretrained.settle(export.read_config(learnt))
  export.export(cfg, learnt, tmp_path / "model", dtype="float32")
  capsys.readouterr()
  argv = ["generate", f"--model={tmp_path}/model", "--template=rstar2"]
  argv += ["--prompt=What is 1 + 1?", "--tool=python", "--max_tokens=96"]
  assert main.main([*argv, "--json"]) == 0
  found = json.loads(capsys.readouterr().out)
  assert [(c["status"], c["text"]) for c in found["calls"]] == [("ok", "1")]


def test_the_recipe_from_the_first_stage_to_a_folder(staged, tmp_path, capsys):
  """And the folder starts a run of its own, which can be judged."""
  cfg = pretrained.settle(export.read_config(staged))
  export.export(cfg, staged, tmp_path / "model", dtype="float32")
  again = tiny(stage1, pretrained=str(tmp_path / "model"), init_from="")
  train.run(again, tmp_path / "again")
  evaluate.run(again, tmp_path / "again")
  assert "eval/heldout/accuracy" in json.loads(
    (tmp_path / "again" / "eval.json").read_text()
  )


@pytest.mark.parametrize("module", [rlinf_7b, qwen3_0p6b_gsm8k])
def test_the_smaller_recipes(module, tmp_path):
  """From random weights, with the tokenizer and template of the folder."""
  train.run(tiny(module), tmp_path / "run")
  # Nothing but rollouts of full length: none is better than another.
  assert_trained(tmp_path / "run", learns=False)
