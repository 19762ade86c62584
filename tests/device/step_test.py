"""The update: what carries gradient, and that splitting the batch is inert."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from roc import layout
from roc.core import losses, metrics
from roc.device import learner as learner_lib
from roc.device import sharding
from roc.device import step as step_lib

B, T, D, V = 8, 12, 6, 40
G = 2  # rows of a prompt
MODEL = int(layout.Role.MODEL)


class TablePolicy:
  """Its parameters are the hidden states themselves, one row for each token.

  So the gradient by `hidden_BTD[b, t]` is what the loss asks of the prediction
  of token t + 1 in row b, and of nothing else.
  """

  n_ids = 0
  dtype = jnp.dtype("float32")

  def hidden(self, params, tokens_BT, position_BT=None, segment_BT=None):
    assert params["hidden_BTD"].shape[:2] == tokens_BT.shape
    return params["hidden_BTD"]

  def unembedding(self, params):
    return params["head_DV"]


@pytest.fixture(scope="module")
def table():
  rng = np.random.default_rng(1)
  return {
    "hidden_BTD": rng.normal(size=(B, T, D)).astype(np.float32),
    "head_DV": rng.normal(size=(D, V)).astype(np.float32),
  }


@pytest.fixture(scope="module")
def batch():
  """Ragged rows: prompt, model, tool, template, model, padding."""
  rng = np.random.default_rng(2)
  roles_BT = np.zeros((B, T), np.int8)
  for b in range(B):
    row = [1] * 2 + [2] * (2 + b % 3) + [3] * (b % 2 + 1) + [4] + [2] * (b % 4)
    roles_BT[b, : len(row)] = row
  is_model_BT = roles_BT == MODEL
  logp_BT = -rng.exponential(1.0, (B, T))
  weight_NGT = losses.token_weights(
    is_model_BT.reshape(-1, G, T),
    "prompt",
    is_kept_NG=np.ones((B // G, G), bool),
  )
  return {
    "tokens_BT": rng.integers(1, V, (B, T)).astype(np.int32),
    "roles_BT": roles_BT,
    "logp_sampler_BT": np.where(is_model_BT, logp_BT, 0).astype(np.float32),
    "logp_old_BT": np.where(
      is_model_BT, logp_BT + 0.1 * rng.normal(size=(B, T)), 0
    ).astype(np.float32),
    "advantage_B": rng.normal(size=B).astype(np.float32),
    "weight_BT": np.asarray(weight_NGT).reshape(B, T),
  }


def loss_and_grads(loss_fn, params, *batches):
  """(loss, statistics, gradients) of each batch, by one compiled program."""
  run = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
  out = []
  for batch in batches:
    (loss, stats), grads = run(params, batch)
    out.append((loss, stats, grads))
  return out if len(out) > 1 else out[0]


VARIANTS = {
  "clip": {},
  "gspo": {"kind": "gspo"},
  "cispo": {"kind": "cispo"},
  "dual, tis, kl, entropy": {
    "dual_clip": 3.0,
    "correction": "tis",
    "kl_coef": 0.1,
    "entropy_coef": 0.1,
  },
}
SLOW_VARIANTS = {
  "icepop": {"correction": "icepop"},
  "sequence": {"correction": "sequence"},
  "geometric": {"correction": "geometric"},
  "kl": {"kl_coef": 0.1},
  "entropy": {"entropy_coef": 0.1},
}


@pytest.mark.parametrize(
  "variant",
  [
    *(pytest.param(v, id=k) for k, v in VARIANTS.items()),
    *(
      pytest.param(v, id=k, marks=pytest.mark.slow)
      for k, v in SLOW_VARIANTS.items()
    ),
  ],
)
def test_only_sampled_tokens_carry_gradient(table, batch, variant):
  config = step_lib.LossConfig(logprob_chunk=16, **variant)
  # Near the current policy, so that no correction drops all there is.
  logp_BT, _ = score(table, batch["tokens_BT"])
  is_model_BT = batch["roles_BT"] == MODEL
  rng = np.random.default_rng(3)
  near = lambda: np.where(
    is_model_BT, logp_BT + 0.01 * rng.normal(size=(B, T)), 0
  ).astype(np.float32)
  near_batch = batch | {
    "logp_old_BT": near(),
    "logp_sampler_BT": near(),
    "logp_ref_BT": near(),
  }
  # The sampler's log-probs of other tokens may hold anything.
  garbage_BT = np.where(is_model_BT, near_batch["logp_old_BT"], -50.0)
  (loss, stats, grads), (loss_again, _, _) = loss_and_grads(
    step_lib.grpo_loss(TablePolicy(), config, 1.0),
    table,
    near_batch,
    near_batch | {"logp_old_BT": garbage_BT.astype(np.float32)},
  )
  assert np.isfinite(loss)
  row = metrics.finalize(stats)
  assert all(np.isfinite(x) for x in row.values())
  assert 0 < row["mismatch_kl"] < 1e-3
  size_BT = np.abs(grads["hidden_BTD"]).sum(-1)
  # What predicts a token stands one place before it.
  is_predictor_BT = np.zeros((B, T), bool)
  is_predictor_BT[:, :-1] = is_model_BT[:, 1:]
  np.testing.assert_array_equal(size_BT[~is_predictor_BT], 0.0)
  assert np.all(size_BT[is_predictor_BT] > 0)
  np.testing.assert_allclose(loss_again, loss, rtol=1e-6)


@functools.cache
def compiled_score(chunk):
  return jax.jit(
    lambda params, tokens_BT: step_lib.score(
      TablePolicy(),
      params,
      {"tokens_BT": tokens_BT},
      chunk=chunk,
      temperature=1.0,
    )
  )


def score(table, tokens_BT, chunk=16):
  return jax.device_get(compiled_score(chunk)(table, tokens_BT))


def test_score_by_hand(table, batch):
  logits_BTV = table["hidden_BTD"].astype(np.float64) @ table["head_DV"]
  p_BTV = np.exp(logits_BTV - logits_BTV.max(-1, keepdims=True))
  p_BTV /= p_BTV.sum(-1, keepdims=True)
  logp_BT, entropy_BT = score(table, batch["tokens_BT"], chunk=7)
  np.testing.assert_array_equal(logp_BT[:, 0], 0)
  np.testing.assert_array_equal(entropy_BT[:, 0], 0)
  picked_BT = np.take_along_axis(
    p_BTV[:, :-1], batch["tokens_BT"][:, 1:, None], axis=-1
  )[..., 0]
  np.testing.assert_allclose(logp_BT[:, 1:], np.log(picked_BT), atol=1e-5)
  want_BT = -np.sum(p_BTV * np.log(p_BTV), axis=-1)[:, :-1]
  np.testing.assert_allclose(entropy_BT[:, 1:], want_BT, atol=1e-5)


def test_on_policy_gradient_is_reinforce(table, batch):
  """With new == old every ratio is 1 and nothing is clipped."""
  policy = TablePolicy()

  def reinforce(table):
    logp_BT, _ = step_lib.score(policy, table, batch, chunk=16, temperature=1.0)
    return -jnp.sum(
      batch["weight_BT"] * batch["advantage_B"][:, None] * logp_BT
    )

  want = jax.jit(jax.grad(reinforce))(table)
  logp_BT, _ = score(table, batch["tokens_BT"])
  loss, stats, grads = loss_and_grads(
    step_lib.grpo_loss(policy, step_lib.LossConfig(logprob_chunk=16), 1.0),
    table,
    batch | {"logp_old_BT": logp_BT, "logp_sampler_BT": logp_BT},
  )
  assert optax.tree.norm(want) > 0.1
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-4),
    grads,
    want,
  )
  row = metrics.finalize(stats)
  assert row["ratio"] == pytest.approx(1.0, abs=1e-5)
  assert row["clip_ratio/region"] == 0.0
  assert row["mismatch_kl"] == pytest.approx(0.0, abs=1e-9)


def test_padding_to_a_longer_bucket_is_inert(table, batch):
  pad = lambda x: np.pad(x, ((0, 0), (0, 20), (0, 0))[: x.ndim])
  longer = {k: v if v.ndim == 1 else pad(v) for k, v in batch.items()}
  longer["tokens_BT"][:, T:] = 7  # whatever ids stand there
  rng = np.random.default_rng(6)
  hidden_BTD = rng.normal(size=(B, T + 20, D)).astype(np.float32)
  hidden_BTD[:, :T] = table["hidden_BTD"]
  loss_fn = step_lib.grpo_loss(
    TablePolicy(), step_lib.LossConfig(logprob_chunk=16), 1.0
  )
  loss, stats, grads = loss_and_grads(loss_fn, table, batch)
  again, stats_again, grads_again = loss_and_grads(
    loss_fn, table | {"hidden_BTD": hidden_BTD}, longer
  )
  np.testing.assert_allclose(again, loss, rtol=1e-5)
  assert metrics.finalize(stats_again) == pytest.approx(
    metrics.finalize(stats), rel=1e-5
  )
  np.testing.assert_allclose(
    grads_again["hidden_BTD"][:, :T], grads["hidden_BTD"], atol=1e-6
  )
  np.testing.assert_array_equal(grads_again["hidden_BTD"][:, T:], 0)


# ------------------------------------------------------------------- learner


@pytest.fixture(scope="module")
def near_batch(policy, params, batch):
  """Old log-probs near the policy's own, so that few ratios are clipped."""
  logp_BT = jax.jit(
    lambda params, tokens_BT: step_lib.score(
      policy, params, {"tokens_BT": tokens_BT}, chunk=32, temperature=1.0
    )[0]
  )(params, batch["tokens_BT"])
  noise_BT = 0.2 * np.random.default_rng(4).normal(size=(B, T))
  near_BT = np.where(batch["roles_BT"] == MODEL, logp_BT + noise_BT, 0)
  near_BT = near_BT.astype(np.float32)
  return batch | {"logp_old_BT": near_BT, "logp_sampler_BT": near_BT}


def learner(policy, *, mesh=(1, 1, 1), n_microbatches=1, optimizer=None):
  """With plain SGD the change of the parameters is the gradient itself."""
  return learner_lib.Learner(
    policy,
    optimizer or optax.sgd(1.0),
    step_lib.grpo_loss(policy, step_lib.LossConfig(logprob_chunk=32), 1.0),
    sharding.make_mesh(*mesh),
    n_microbatches=n_microbatches,
  )


def update(made, params, batch):
  """One update; returns the change of the parameters and the metrics."""
  state = made.start_from(jax.tree.map(jnp.copy, params))
  state, stats = made.update(state, made.place(batch))
  assert int(state.step) == 1
  change = jax.tree.map(
    lambda new, old: np.asarray(new) - np.asarray(old), state.params, params
  )
  return change, metrics.finalize(stats)


@pytest.fixture(scope="module")
def one_device(policy):
  return learner(policy)


@pytest.fixture(scope="module")
def reference(one_device, params, near_batch):
  return update(one_device, params, near_batch)


def assert_same(got, want):
  """Gradients to 1e-5 of their norm, metrics likewise."""
  error = jax.tree.map(lambda a, b: a - b, got[0], want[0])
  assert optax.tree.norm(error) < 1e-5 * optax.tree.norm(want[0])
  assert got[1] == pytest.approx(want[1], rel=1e-5, abs=1e-7)


def test_an_update_moves(reference):
  change, row = reference
  assert float(optax.tree.norm(change)) == pytest.approx(
    row["grad_norm"], rel=1e-4
  )
  assert row["grad_norm"] > 0.01
  assert 0 < row["clip_ratio/region"] < 0.3


def test_microbatches_are_inert(policy, params, near_batch, reference):
  made = learner(policy, n_microbatches=4)
  assert_same(update(made, params, near_batch), reference)


def test_eight_devices_equal_one(policy, params, near_batch, reference):
  made = learner(policy, mesh=(2, 2, 2))
  assert_same(update(made, params, near_batch), reference)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(8, 1, 1), (1, 8, 1), (1, 1, 2), (1, 4, 2)])
def test_other_meshes_equal_one(policy, params, near_batch, reference, mesh):
  made = learner(policy, mesh=mesh, n_microbatches=1 if mesh[0] == 8 else 2)
  if mesh[1] == 8:
    made = learner(policy, mesh=mesh)
  assert_same(update(made, params, near_batch), reference)


def test_order_of_rows_is_irrelevant(one_device, params, near_batch, reference):
  order_B = np.random.default_rng(5).permutation(B)
  shuffled = {k: v[order_B] for k, v in near_batch.items()}
  assert_same(update(one_device, params, shuffled), reference)


def test_nothing_to_learn_changes_nothing(one_device, params, near_batch):
  empty = near_batch | {"weight_BT": np.zeros((B, T), np.float32)}
  change, row = update(one_device, params, empty)
  assert all(np.all(x == 0) for x in jax.tree.leaves(change))
  assert row["grad_norm"] == 0.0 and "loss" not in row
  assert all(np.isfinite(x) for x in row.values())


def test_state_lies_where_it_should(policy, params):
  made = learner(policy, mesh=(2, 2, 2), optimizer=optax.adam(1e-2))
  state = made.start_from(params)
  for leaf, want in zip(
    jax.tree.leaves(state), jax.tree.leaves(made.shardings), strict=True
  ):
    assert leaf.sharding == want
  kernel = state.params["layers"]["gate_proj"]["kernel"]
  # Split over fsdp and tensor, so a device holds a quarter.
  assert kernel.addressable_shards[0].data.size * 4 == kernel.size
  abstract = made.abstract_state
  assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == jax.tree.map(
    lambda x: (x.shape, x.dtype), state
  )


# -------------------------------------------------------------- supervised


def test_supervised_loss_is_cross_entropy(table, batch):
  weights_BT = step_lib.sft_weights(batch["roles_BT"])
  is_model_BT = batch["roles_BT"] == MODEL
  n = is_model_BT.sum()
  np.testing.assert_allclose(weights_BT, is_model_BT / n, rtol=1e-6)
  loss, stats, grads = loss_and_grads(
    step_lib.sft_loss(TablePolicy(), 16),
    table,
    batch | {"weight_BT": weights_BT},
  )
  logp_BT, entropy_BT = score(table, batch["tokens_BT"])
  row = metrics.finalize(stats)
  want = -logp_BT[is_model_BT].mean()
  assert float(loss) == pytest.approx(want, rel=1e-5)
  assert row["loss"] == pytest.approx(want, rel=1e-5)
  assert row["entropy"] == pytest.approx(
    entropy_BT[is_model_BT].mean(), rel=1e-5
  )
  size_BT = np.abs(grads["hidden_BTD"]).sum(-1)
  np.testing.assert_array_equal(size_BT[:, :-1] > 0, is_model_BT[:, 1:])
  np.testing.assert_array_equal(size_BT[:, -1], 0)


def test_no_tokens_to_learn_weigh_nothing():
  roles_BT = np.ones((2, 3), np.int8)
  np.testing.assert_array_equal(step_lib.sft_weights(roles_BT), 0.0)


def test_config_is_hashable():
  """It is closed over by jitted functions, and compared between runs."""
  a = step_lib.LossConfig()
  assert hash(a) == hash(dataclasses.replace(a))
