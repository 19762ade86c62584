"""Accuracy on held-out problems, with the tool and in the head.

As a program it evaluates the newest checkpoint of a workdir; `train` uses the
`Evaluator` between its steps. Every evaluation draws with the same random
streams, so two policies are compared on the same problems and the same noise.
"""

import collections
import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table

from roc import build, layout, parameters, pretrained, rollout, wiring
from roc import config as config_lib
from roc import progress as progress_lib
from roc.device import engine, model, sampling
from roc.host import chat as chat_lib
from roc.host import episode as episode_lib
from roc.host import rewards, tools
from roc.host.tasks import problem as problem_lib

# Of random numbers: the same for every evaluation, and nobody else's.
STREAM = 2**31 - 1
Summary = dict[str, float | None]
# Enough for the longest answer; not more, where a slot has no room for it.
_HEAD_TOKENS = 24


class Evaluator:
  """Draws held-out rollouts for given parameters and summarises them."""

  def __init__(
    self,
    cfg: config_lib.Config,
    policy: model.Policy,
    host: wiring.HostParts,
    toolbox: tools.Toolbox,
    loop: rollout.AgentLoop | None = None,
  ):
    """Builds engines; `loop` is shared when it samples as evaluation does.

    Raises:
      errors.UserError: a held-out problem's prompt does not fit.
    """
    self._cfg = cfg
    settings = dataclasses.replace(
      cfg.sampling, temperature=cfg.eval.temperature
    )
    if loop is None or settings != cfg.sampling:
      loop = build.make_loop(policy, settings, host, toolbox)
    self._loop = loop
    n_asked = cfg.eval.n_problems
    self._problems = problem_lib.distinct(host.eval_task, n_asked)
    if len(self._problems) < n_asked:
      build.say(
        f"evaluation: the set has {len(self._problems)} problems, and each is"
        f" asked once (config.eval.n_problems is {n_asked})"
      )
    build.check_prompts(loop, self._problems, settings.cache_length)
    self._head = None
    if cfg.eval.head:
      greedy = dataclasses.replace(settings, temperature=0.0)
      self._head = build.make_engine(policy, greedy, host)

  @property
  def n_rollouts(self) -> int:
    """Rollouts of an evaluation with the tool."""
    return len(self._problems) * self._cfg.eval.samples

  def run(
    self,
    params: Any,
    step: int = 0,
    *,
    on_finished: Callable[[int, int], None] | None = None,
  ) -> tuple[Summary, list[list[episode_lib.Episode]]]:
    """Evaluates parameters.

    Args:
      params: all of them.
      step: of training, that left them; only recorded.
      on_finished: see `AgentLoop.run`.

    Returns:
      Metrics `eval/...`, None where nothing could be measured, and the
      episodes, one list for each problem.
    """
    e = self._cfg.eval
    self._loop.sampler.set_params(params)
    groups, _ = self._loop.run(
      self._problems,
      e.samples,
      seed=self._cfg.seed,
      step=step,
      drawn_by="evaluate",
      stream=STREAM,
      on_finished=on_finished,
    )
    summary = summarise(groups)
    if summary["accuracy"] is None:
      reasons = collections.Counter(e.verdict for g in groups for e in g)
      build.say(
        f"the evaluation after step {step} has no accuracy: all of its"
        f" {self.n_rollouts} rollouts are void by the environment's fault"
        f" ({', '.join(f'{k}: {n}' for k, n in reasons.most_common())})"
      )
    row: Summary = {f"eval/heldout/{k}": v for k, v in summary.items()}
    if self._head is not None:
      self._head.set_params(params)
      chat = self._loop.chat
      room = self._cfg.sampling.max_tokens - len(chat.answer_prefix_ids())
      texts = draw_from_head(
        self._head,
        chat,
        self._problems,
        seed=self._cfg.seed,
        max_tokens=min(_HEAD_TOKENS, max(room, 0)),
      )
      right = [
        rewards.is_equal(text, p.answer)
        for text, p in zip(texts, self._problems, strict=True)
      ]
      row["eval/head/accuracy"] = float(np.mean(right))
    return row, groups


def draw_from_head(
  sampler: rollout.Sampler,
  chat: chat_lib.Chat,
  problems: Sequence[problem_lib.Problem],
  *,
  seed: int,
  max_tokens: int,
) -> list[str]:
  r"""What the policy answers when it may not use the tool.

  Its turn is opened with `<answer>\boxed{` already written, so that all it can
  do is to fill in the box.

  Returns:
    One text for each problem, up to the closing brace.
  """
  key_B2 = np.asarray(
    sampling.rollout_keys(
      seed,
      0,
      jnp.arange(len(problems)),
      jnp.zeros(len(problems), jnp.int32),
    )
  )
  prefix = chat.answer_prefix_ids()
  turns = draw_turns(
    sampler,
    [
      engine.Request(chat.prompt_ids(p.question) + prefix, key, max_tokens)
      for p, key in zip(problems, key_B2, strict=True)
    ],
  )
  return [chat.tokenizer.decode(ids).split("}")[0] for ids in turns]


def draw_turns(
  sampler: rollout.Sampler, requests: Sequence[engine.Request]
) -> list[list[int]]:
  """What is drawn for each request until its turn ends or its budget is spent.

  Returns:
    Ids, those of the end included; in the order of the requests.
  """
  handles = sampler.submit(requests)
  turns: dict[int, list[int]] = {handle: [] for handle in handles}
  running = set(handles)
  try:
    while drawn := sampler.decode():
      for handle, chunk in drawn.items():
        turns[handle] += chunk.tokens
        if chunk.is_stopped:
          running.remove(handle)
          sampler.release([handle])
  finally:  # nobody has the word, or somebody interrupted
    sampler.release(sorted(running))
  return list(turns.values())


def summarise(
  groups: Sequence[Sequence[episode_lib.Episode]],
) -> Summary:
  """Accuracy, its standard error, and how the rollouts went.

  Rollouts of outcome VOID are outside of all of it, and so is a problem that
  has no other. Accuracy is the mean over problems of each one's share of
  correct rollouts; the standard error is that of this mean. With k > 1 samples
  a problem, also avg@k, which is the accuracy, and the unbiased pass@j for
  powers of two (arXiv 2107.03374).

  Args:
    groups: finished rollouts, one list for each problem.

  Returns:
    Plain numbers, None for what is asked of no rollout at all; a share of
    nothing (failing calls of correct rollouts, when none is correct) is left
    out.
  """
  judged = [_judged(g) for g in groups]
  live = [e for g in judged for e in g]
  is_correct = [e.outcome == layout.Outcome.CORRECT for e in live]
  means = [_n_correct(g) / len(g) for g in judged if g]
  row: Summary = {
    "accuracy": float(np.mean(means)) if means else None,
    "accuracy_stderr": (
      float(np.std(means) / math.sqrt(len(means))) if means else None
    ),
    "n_problems": float(len(groups)),
    "void": float(sum(map(len, groups)) - len(live)),
  }
  for name, subset in (
    ("correct", [e for e, ok in zip(live, is_correct, strict=True) if ok]),
    ("wrong", [e for e, ok in zip(live, is_correct, strict=True) if not ok]),
  ):
    n_calls = sum(e.n_judged_calls for e in subset)
    if n_calls:
      n_failed = sum(e.n_failed_calls for e in subset)
      row[f"failure_frequency_{name}"] = n_failed / n_calls
  if live:
    row |= {
      "call_frequency": float(np.mean([e.n_judged_calls for e in live])),
      "num_turns": float(np.mean([e.n_turns for e in live])),
      "mean_length": float(
        np.mean([len(e) - e.roles.count(layout.Role.PROMPT) for e in live])
      ),
      "one_answer": float(np.mean([e.n_answers == 1 for e in live])),
      "truncated": float(np.mean([e.is_truncated for e in live])),
    }
  k = min((len(g) for g in groups), default=0)
  if k > 1:
    row[f"avg@{k}"] = row["accuracy"]
    row |= {f"pass@{j}": pass_at(groups, j) for j in _powers_of_two(k)}
  return row


def pass_at(
  groups: Sequence[Sequence[episode_lib.Episode]], k: int
) -> float | None:
  """Mean over problems of 1 - C(n - c, k) / C(n, k), c correct of n judged.

  A problem with fewer than k judged rollouts says nothing of it; None where
  there is no other.
  """
  shares = []
  for g in map(_judged, groups):
    if len(g) >= k:
      n, c = len(g), _n_correct(g)
      shares.append(1.0 - math.comb(n - c, k) / math.comb(n, k))
  return float(np.mean(shares)) if shares else None


def _judged(group: Sequence[episode_lib.Episode]) -> list[episode_lib.Episode]:
  """Without the rollouts that the environment failed."""
  return [e for e in group if e.outcome != layout.Outcome.VOID]


def _n_correct(group: Sequence[episode_lib.Episode]) -> int:
  return sum(e.outcome == layout.Outcome.CORRECT for e in group)


def _powers_of_two(n: int) -> list[int]:
  return [2**i for i in range(n.bit_length()) if 2**i <= n]


def run(cfg: config_lib.Config, workdir: pathlib.Path) -> None:
  """Evaluates the newest checkpoint under `workdir` and writes eval.json.

  Raises:
    errors.UserError: no checkpoint there, or one of another model.
  """
  cfg = pretrained.settle(cfg)
  host = build.host_parts(cfg)
  build.check_lengths(cfg, host, [host.eval_task])
  policy = build.make_policy(cfg, host)
  loaded = parameters.load_policy(cfg, workdir, policy, build.make_mesh(cfg))
  build.say(loaded.where)
  with build.started_sandbox(host) as sandbox:
    build.check_answers(host, sandbox)
    evaluator = Evaluator(cfg, policy, host, host.make_toolbox(sandbox))
    with progress_lib.Progress(
      "evaluate", evaluator.n_rollouts, is_shown=cfg.log.progress
    ) as bar:
      row, groups = evaluator.run(
        loaded.params, loaded.step, on_finished=lambda n, _: bar.update(n)
      )
  table = rich.table.Table("metric", "value")
  for name, value in row.items():
    table.add_row(name, "–" if value is None else f"{value:.4g}")
  rich.console.Console(highlight=False).print(table)
  # Shown first: a workdir that cannot be written must not lose the numbers.
  text = json.dumps(row, indent=1, allow_nan=False)
  (workdir / "eval.json").write_text(text + "\n")
  with (workdir / "eval_rollouts.jsonl").open("w") as out:
    for e in (e for g in groups for e in g):
      out.write(e.to_json(host.tokenizer) + "\n")
  build.say(f"written: {workdir / 'eval.json'}")
