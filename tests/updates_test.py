"""The updates of a step: their rate, and that cutting a batch is inert."""

import dataclasses
import functools
import gc
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from roc import build, config, errors, layout, parameters, updates
from roc.device import checkpoint, lora, model
from roc.device import learner as learner_lib

N, G, T, V = 4, 4, 10, 24  # rows are N * G
SHAPES = model.ModelConfig(
  vocab_size=V,
  d_model=16,
  n_layers=1,
  n_heads=2,
  n_kv_heads=2,
  head_dim=8,
  d_ff=16,
)


def settings(mesh=(1, 1, 1), rank=0, loss=None, **train):
  """Of the smallest run that can lie on eight devices."""
  changes = {"steps": 4, "prompts": N, "warmup": 0, "lr": 1e-3} | train
  cfg = config.Config(
    model=SHAPES,
    mesh=config.MeshConfig(*mesh),
    lora=config.LoraConfig(rank=rank, base_dtype="float32"),
    loss=config.LossConfig(**{"logprob_chunk": 32} | (loss or {})),
    filter=config.FilterConfig(n_drawn=2 * G, n_kept=G),
    train=config.TrainConfig(**changes),
  )
  return dataclasses.replace(
    cfg, sampling=dataclasses.replace(cfg.sampling, cache_length=T)
  )


def make_batch(seed=0, **changes):
  """Rows of N groups: a prompt of two, model tokens, padding."""
  rng = np.random.default_rng(seed)
  roles_BT = np.zeros((N * G, T), np.int8)
  for b, row in enumerate(roles_BT):
    row[:2], row[2 : 6 + b % 4] = layout.Role.PROMPT, layout.Role.MODEL
  is_model_BT = roles_BT == layout.Role.MODEL
  logp_BT = is_model_BT * (rng.normal(size=(N * G, T)) * 0.3 - math.log(V))
  return {
    "tokens_BT": rng.integers(1, V, (N * G, T)).astype(np.int32),
    "roles_BT": roles_BT,
    "logp_sampler_BT": logp_BT.astype(np.float32),
    "logp_old_BT": logp_BT.astype(np.float32),
    "advantage_B": rng.normal(size=N * G).astype(np.float32),
    "weight_BT": (is_model_BT / is_model_BT.sum()).astype(np.float32),
  } | changes


@dataclasses.dataclass
class Run:
  """A learner, what it trains, and the updates of a step."""

  learner: learner_lib.Learner
  state: object
  updates: updates.Updates


@functools.cache
def make_learner(cfg):
  policy = model.Policy(cfg.model, build.make_mesh(cfg), V, cfg.lora)
  return policy, updates.make_learner(cfg, policy)


@functools.cache
def first_params(policy):
  key = jax.random.key(0)
  params = jax.device_get(jax.jit(policy.init)(key))
  if policy.lora.rank:
    return lora.join(params, jax.device_get(policy.init_adapters(key)))
  return params


def start(cfg):
  # Schedules are no part of what is compiled.
  same = {"lr": 1.0, "warmup": 0, "schedule": "constant"}
  policy, learner = make_learner(
    dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, **same))
  )
  rng = np.random.default_rng(7)
  # Adapters begin at 0, where half of their gradients are.
  params = jax.tree.map(
    lambda x: jnp.asarray(x + 0.05 * rng.standard_normal(x.shape), x.dtype),
    first_params(policy),
  )
  state = learner.start_from(params)
  made = updates.Updates(cfg, policy, learner)
  if cfg.loss.kl_coef:
    made.set_reference(jax.tree.map(lambda x: x * 0.9, state.params))
  return Run(learner, state, made)


def leaves(tree):
  return [np.array(x) for x in jax.tree.leaves(tree)]


def two_steps(cfg):
  """Metrics of two steps, and the parameters after them."""
  run = start(cfg)
  rows = []
  for step in (1, 2):
    run.state, row = run.updates(run.state, make_batch(step), step)
    rows.append(row)
  return rows, leaves(run.state.params)


# ---------------------------------------------- meshes, parts of a batch, terms


def loss_of(is_recomputed, has_kl):
  return {
    **({"old_logprobs": "recompute"} if is_recomputed else {}),
    **({"kl_coef": 0.1} if has_kl else {}),
  }


@functools.cache
def on_one_device(minibatches, is_recomputed, has_kl, rank):
  loss = loss_of(is_recomputed, has_kl)
  return two_steps(settings(loss=loss, rank=rank, minibatches=minibatches))


def assert_as_one_device(mesh, minibatches, is_recomputed, has_kl, rank, micro):
  rows, params = two_steps(
    settings(
      mesh,
      loss=loss_of(is_recomputed, has_kl),
      rank=rank,
      minibatches=minibatches,
      microbatch_rows=micro,
    )
  )
  want_rows, want = on_one_device(minibatches, is_recomputed, has_kl, rank)
  for row, want_row in zip(rows, want_rows, strict=True):
    assert row == pytest.approx(want_row, rel=1e-5, abs=1e-6)
  for x, y in zip(params, want, strict=True):
    np.testing.assert_allclose(x, y, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_minibatches_on_a_mesh_equal_one_device():
  assert_as_one_device((2, 2, 2), 2, True, True, 2, micro=0)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(1, 1, 2), (4, 1, 2), (8, 1, 1)], ids=str)
def test_more_meshes_equal_one_device(mesh):
  for rank in (0, 2):
    assert_as_one_device(mesh, 2, True, True, rank, micro=0)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(2, 1, 1), (1, 2, 1), (2, 2, 2)], ids=str)
def test_every_mesh_equals_one_device(mesh):
  """With every choice of minibatches, old log-probs, KL term and adapters."""
  shards = mesh[0] * mesh[1]
  for minibatches, *terms, rank in itertools.product(
    (1, 2), (False, True), (False, True), (0, 2)
  ):
    micro = shards if shards > 1 and minibatches == 2 else 0
    assert_as_one_device(mesh, minibatches, *terms, rank, micro=micro)


# ----------------------------------------------------------------------- memory


def test_scoring_needs_no_more_than_a_microbatch():
  """As compiled; and its rows come in the order in which they went in."""
  wide = dataclasses.replace(SHAPES, d_ff=2048)
  sizes, scores = [], []
  for train in ({}, {"minibatches": 2, "microbatch_rows": 2}):
    run = start(dataclasses.replace(settings(**train), model=wide))
    args = run.learner.params(run.state.params), run.learner.place(make_batch())
    compiled = run.updates.score.lower(*args).compile()
    sizes.append(compiled.memory_analysis().temp_size_in_bytes)
    scores.append(compiled(*args))
  assert sizes[1] < 0.3 * sizes[0]
  np.testing.assert_allclose(scores[0], scores[1], atol=1e-6)


def test_a_resumed_run_builds_no_second_state(tmp_path, monkeypatch):
  """What lives is the restored state, and nothing was made beside it."""
  cfg = settings()
  run = start(cfg)
  saved = checkpoint.Checkpoints(tmp_path)
  saved.save(1, run.state, {})
  live = lambda: sum(x.nbytes for x in jax.live_arrays())
  size = sum(x.nbytes for x in jax.tree.leaves(run.state))
  for name in ("init", "start_from", "take"):
    monkeypatch.delattr(learner_lib.Learner, name)
  gc.collect()
  before = live()
  restored = saved.restore(run.learner.abstract_state)
  state = parameters.go_on(cfg, run.learner, restored)
  gc.collect()
  assert size <= live() - before < 1.1 * size
  assert state is restored.state


# ---------------------------------------------------------------- learning rate


def test_every_update_of_a_step_has_its_rate():
  """A cosine ends with the run, whatever an update is; the rate is logged."""
  for minibatches in (1, 2):
    run = start(
      settings(
        schedule="cosine", warmup=1, weight_decay=0.1, minibatches=minibatches
      )
    )
    rates = []
    for step in range(1, 5):
      run.state, row = run.updates(run.state, make_batch(step), step)
      rates.append(row["lr"])
      assert row["updates"] == step * minibatches
    want = [1.0, *(0.5 * (1 + math.cos(math.pi * i / 3)) for i in range(3))]
    assert rates == pytest.approx([1e-3 * x for x in want], rel=1e-5)


def test_the_rate_that_is_logged_is_the_one_applied():
  """Without decay, Adam's first update moves by the rate."""
  cfg = settings(schedule="cosine", warmup=2)
  for step in (1, 3):
    run = start(cfg)
    before = leaves(run.state.params)
    run.state, row = run.updates(run.state, make_batch(), step)
    change = [
      np.abs(x - y)
      for x, y in zip(leaves(run.state.params), before, strict=True)
    ]
    assert max(x.max() for x in change) == pytest.approx(row["lr"], rel=1e-3)


# ---------------------------------------------------- updates that are not made


def spoilt(name, value, row=0):
  """A batch with one bad number, at a model token of a row."""
  array = make_batch()[name].copy()
  array[(row, 3)[: array.ndim]] = value
  return {name: array}


@pytest.mark.parametrize("minibatches", [1, 2])
def test_without_a_live_row_nothing_moves(minibatches):
  """Moments, counts, weight decay: all as before, to the bit."""
  run = start(settings(weight_decay=0.1, minibatches=minibatches))
  run.state, row = run.updates(run.state, make_batch(1), 1)
  assert row["updates_skipped"] == 0 and row["updates"] == minibatches
  before = leaves(run.state)
  empty = {"weight_BT": np.zeros((N * G, T), np.float32)}
  run.state, row = run.updates(run.state, make_batch(2, **empty), 2)
  assert row["updates_skipped"] == minibatches == row["updates"]
  assert row["grad_norm"] == 0.0 and row["updates_not_finite"] == 0
  for x, y in zip(leaves(run.state), before, strict=True):
    assert x.tobytes() == y.tobytes()


def test_of_two_minibatches_one_has_live_rows():
  run = start(settings(weight_decay=0.1, minibatches=2))
  half_BT = make_batch()["weight_BT"].copy()
  half_BT[: N * G // 2] = 0
  run.state, row = run.updates(run.state, make_batch(weight_BT=half_BT), 1)
  assert row["updates_skipped"] == 1 == row["updates"]


@pytest.mark.parametrize(
  ("changes", "train"),
  [
    (spoilt("advantage_B", np.nan), {}),
    (spoilt("weight_BT", 1e38), {}),  # the norm's square is not finite
    ({}, {"lr": 3e38, "weight_decay": 100.0}),  # nor are the new parameters
  ],
  ids=["nan", "norm", "parameters"],
)
def test_an_update_that_is_not_finite_is_not_made(changes, train, tmp_path):
  run = start(settings(**train))
  before = leaves(run.state)
  run.state, row = run.updates(run.state, make_batch(**changes), 1)
  assert row["updates_not_finite"] == 1 and row["updates"] == 0
  for x, y in zip(leaves(run.state), before, strict=True):
    assert x.tobytes() == y.tobytes()
  saved = checkpoint.Checkpoints(tmp_path)
  with pytest.raises(errors.UserError, match="no checkpoint was saved"):
    updates.check_finite(dict(row), 1, saved, "train")
  saved.save(3, {"x": np.zeros(2)}, {})
  saved.save(6, {"x": np.zeros(2)}, {})
  (saved.path(6) / "extra.json").write_text("")  # so it is not whole
  with pytest.raises(errors.UserError, match="gradient norm") as caught:
    updates.check_finite(row, 7, saved, "train")
  said = str(caught.value)
  assert said.startswith("step 7: ") and "checkpoint is that of step 3" in said
  assert "config.train.lr" in said and "--restore_step" in said
  assert saved.steps() == [3, 6]
