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
  # Bounds as wide as those of single tokens, so that no row is clipped.
  "gspo": {"kind": "gspo", "eps_low": 0.2, "eps_high": 0.28},
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
  "geometric": {
    "correction": "geometric",
    "correction_low": 0.5,
    "correction_high": 2.0,
  },
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


def poisoned(batch, is_dead_B, value):
  """The batch with rows that weigh nothing and hold `value` in all places."""
  fill = lambda x: np.where(
    is_dead_B.reshape(-1, *[1] * (x.ndim - 1)), np.float32(value), x
  )
  names = ("logp_sampler_BT", "logp_old_BT", "logp_ref_BT", "advantage_B")
  weight_BT = np.where(is_dead_B[:, None], 0, batch["weight_BT"])
  return (
    batch
    | {name: fill(batch[name]) for name in names}
    | {"weight_BT": weight_BT.astype(np.float32)}
  )


def test_rows_without_weight_add_exactly_nothing(table, batch):
  """To loss, gradients and metrics, through the log-probs and beyond."""
  config = step_lib.LossConfig(
    logprob_chunk=16,
    correction="tis",
    dual_clip=3.0,
    kl_coef=0.1,
    entropy_coef=0.1,
  )
  run = jax.jit(
    jax.value_and_grad(
      step_lib.grpo_loss(TablePolicy(), config, 1.0), has_aux=True
    )
  )
  is_dead_B = np.arange(B) % 4 == 1
  batch = batch | {"logp_ref_BT": batch["logp_old_BT"]}
  hidden_BTD = table["hidden_BTD"]
  clean = run(table, poisoned(batch, is_dead_B, -1.0))
  assert np.isfinite(clean[0][0])
  np.testing.assert_array_equal(clean[1]["hidden_BTD"][is_dead_B], 0)
  for value in (np.nan, np.inf, -np.inf, -9999.0, 1e4):
    dirty = np.where(is_dead_B[:, None, None], np.float32(value), hidden_BTD)
    got = run(table | {"hidden_BTD": dirty}, poisoned(batch, is_dead_B, value))
    jax.tree.map(np.testing.assert_array_equal, got, clean)


@pytest.mark.slow
def test_rows_that_break_the_model_do_not_break_the_update(make_policy, batch):
  """A token with an embedding that is not finite stands in dropped rows."""
  policy = make_policy(tie_embeddings=False)
  params = jax.jit(policy.init)(jax.random.key(0))
  embedding = params["embed"]["embedding"]
  broken = params | {"embed": {"embedding": embedding.at[7].set(jnp.nan)}}
  is_dead_B = np.arange(B) % 4 == 1
  batch = poisoned(
    batch | {"logp_ref_BT": batch["logp_old_BT"]}, is_dead_B, np.nan
  )
  tokens_BT = np.where(batch["tokens_BT"] == 7, 8, batch["tokens_BT"])
  batch |= {"tokens_BT": np.where(is_dead_B[:, None], 7, tokens_BT)}
  (loss, _, grads), (again, _, _) = loss_and_grads(
    step_lib.grpo_loss(policy, step_lib.LossConfig(logprob_chunk=32), 1.0),
    broken,
    batch,
    batch | {"tokens_BT": tokens_BT},
  )
  assert np.isfinite(loss) and loss == again
  assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(grads))
  assert optax.tree.norm(grads) > 1e-3


# --------------------------------------------------- bounds and corrections


@pytest.mark.parametrize(
  ("settings", "want"),
  [
    ({"kind": "clip"}, (0.2, 0.28, None, None)),
    ({"kind": "gspo"}, (3e-4, 4e-4, None, None)),
    ({"kind": "cispo"}, (1.0, 4.0, None, None)),
    ({"kind": "gspo", "eps_high": 0.1}, (3e-4, 0.1, None, None)),
    ({"correction": "tis"}, (0.2, 0.28, None, 2.0)),
    ({"correction": "icepop"}, (0.2, 0.28, 0.5, 5.0)),
    ({"correction": "sequence"}, (0.2, 0.28, 0.0, 3.0)),
    ({"correction": "geometric"}, (0.2, 0.28, 0.999, 1.001)),
    (
      {"correction": "icepop", "correction_low": 0.1},
      (0.2, 0.28, 0.1, 5.0),
    ),
  ],
)
def test_each_surrogate_and_correction_has_its_own_bounds(settings, want):
  found = step_lib.with_own_bounds(step_lib.LossConfig(**settings))
  assert want == (
    found.eps_low,
    found.eps_high,
    found.correction_low,
    found.correction_high,
  )
  assert step_lib.with_own_bounds(found) == found


@pytest.mark.parametrize("kind", ["gspo", "cispo"])
def test_the_loss_uses_the_bounds_of_its_surrogate(table, batch, kind):
  run = lambda **bounds: loss_and_grads(
    step_lib.grpo_loss(
      TablePolicy(),
      step_lib.LossConfig(kind=kind, logprob_chunk=16, **bounds),
      1.0,
    ),
    table,
    batch,
  )
  own = {"gspo": (3e-4, 4e-4), "cispo": (1.0, 4.0)}[kind]
  stated = run(eps_low=own[0], eps_high=own[1])
  jax.tree.map(np.testing.assert_array_equal, run(), stated)


def two_corrected_rows(correction, **settings):
  """Loss, metrics and gradient of two rows, one of them off by a factor e."""
  config = step_lib.LossConfig(
    correction=correction, logprob_chunk=16, normaliser="token", **settings
  )
  rng = np.random.default_rng(9)
  params = {
    "hidden_BTD": rng.normal(size=(2, 5, D)).astype(np.float32),
    "head_DV": rng.normal(size=(D, V)).astype(np.float32),
  }
  tokens_BT = rng.integers(1, V, (2, 5)).astype(np.int32)
  logp_BT, _ = jax.device_get(
    step_lib.score(
      TablePolicy(),
      params,
      {"tokens_BT": tokens_BT},
      chunk=16,
      temperature=1.0,
    )
  )
  # Four model tokens a row; the sampler's are off at one token of row 1.
  off_BT = np.zeros((2, 5), np.float32)
  off_BT[1, 2] = 3.0
  made = {
    "tokens_BT": tokens_BT,
    "roles_BT": np.array([[1, 2, 2, 2, 2]] * 2, np.int8),
    "logp_sampler_BT": logp_BT - off_BT,
    "logp_old_BT": logp_BT,
    "logp_ref_BT": logp_BT - 0.5,
    "advantage_B": np.array([1.0, -1.0], np.float32),
    "weight_BT": np.array([[0, 1, 1, 1, 1]] * 2, np.float32) / 8,
  }
  loss, stats, _ = loss_and_grads(
    step_lib.grpo_loss(TablePolicy(), config, 1.0), params, made
  )
  return float(loss), metrics.finalize(stats)


@pytest.mark.parametrize(
  ("correction", "weight", "tokens", "rows"),
  [
    # Ratio e^3 = 20 at one of eight tokens.
    ("tis", (7 + 2) / 8, 0.0, 0.0),
    ("icepop", 7 / 8, 1 / 8, 0.0),
    ("sequence", 4 / 8, 4 / 8, 1 / 2),
    ("geometric", 4 / 8, 4 / 8, 1 / 2),
  ],
)
def test_what_a_correction_drops_is_measured(correction, weight, tokens, rows):
  _, row = two_corrected_rows(correction)
  names = ("weight", "tokens_dropped", "rows_dropped")
  got = tuple(row[f"correction/{name}"] for name in names)
  assert got == pytest.approx((weight, tokens, rows), rel=1e-5)


def test_corrections_weigh_the_surrogate_alone():
  """Row 1 leaves the surrogate; KL and entropy are those of both rows."""
  coefficients = {"kl_coef": 0.1, "entropy_coef": 0.01}
  loss, row = two_corrected_rows("sequence", **coefficients)
  k3 = np.exp(-0.5) - 1 + 0.5
  assert row["kl"] == pytest.approx(k3, rel=1e-5)
  # The surrogate of row 0 alone: 4 of 8 tokens with ratio 1, advantage 1.
  want = -4 / 8 + 0.1 * k3 - 0.01 * row["entropy"]
  assert loss == pytest.approx(want, rel=1e-5)


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


def update(made, params, batch, n_applied=1):
  """One update; returns the change of the parameters and the metrics."""
  state = made.start_from(jax.tree.map(jnp.copy, params))
  state, stats = made.update(state, made.place(batch))
  assert int(state.step) == n_applied
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
  change, row = update(one_device, params, empty, n_applied=0)
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


def test_supervised_loss_reads_the_models_own_tokens_alone(table, batch):
  is_predictor_BT = np.zeros((B, T), bool)
  is_predictor_BT[:, :-1] = batch["roles_BT"][:, 1:] == MODEL
  run = jax.jit(
    jax.value_and_grad(step_lib.sft_loss(TablePolicy(), 16), has_aux=True)
  )
  batch = batch | {"weight_BT": step_lib.sft_weights(batch["roles_BT"])}
  hidden_BTD = table["hidden_BTD"]
  clean = run(table, batch)
  for value in (np.nan, np.inf):
    dirty = np.where(is_predictor_BT[..., None], hidden_BTD, np.float32(value))
    got = run(table | {"hidden_BTD": dirty}, batch)
    jax.tree.map(np.testing.assert_array_equal, got, clean)


def test_no_tokens_to_learn_weigh_nothing():
  roles_BT = np.ones((2, 3), np.int8)
  np.testing.assert_array_equal(step_lib.sft_weights(roles_BT), 0.0)


def test_config_is_hashable():
  """It is closed over by jitted functions, and compared between runs."""
  a = step_lib.LossConfig()
  assert hash(a) == hash(dataclasses.replace(a))
