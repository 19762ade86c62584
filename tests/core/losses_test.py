"""Losses by hand, against numpy, and where their gradients must be zero."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from roc.core import advantages, corrections, logprobs, losses

LOSSES = {
  "clip": losses.clipped_surrogate,
  "dual": functools.partial(losses.clipped_surrogate, dual_clip=3.0),
  "gspo": functools.partial(losses.gspo, eps_low=0.1, eps_high=0.2),
  "cispo": functools.partial(losses.cispo, eps_low=0.2, eps_high=0.28),
}
EVERY_LOSS = pytest.mark.parametrize("name", list(LOSSES))


def batch(seed=0, n_rows=6, n_tokens=9, spread=0.5):
  """New and old log-probs, advantages and a ragged choice of tokens."""
  rng = np.random.default_rng(seed)
  old = -rng.exponential(1.0, (n_rows, n_tokens)).astype(np.float32)
  new = old + spread * rng.normal(size=old.shape).astype(np.float32)
  adv = rng.normal(size=n_rows).astype(np.float32)
  is_model = rng.uniform(size=old.shape) < 0.6
  is_model[:, 0], is_model[:, 1] = True, False
  return tuple(jnp.array(x) for x in (new, old, adv, is_model))


def slow_loss(name, new, old, adv, is_model):
  """The four losses, one token at a time, in float64."""
  new, old, adv = (np.asarray(x, np.float64) for x in (new, old, adv))
  loss = np.zeros(new.shape)
  for b, t in np.argwhere(np.asarray(is_model)):
    ratio, a = np.exp(new[b, t] - old[b, t]), adv[b]
    if name == "gspo":
      ratio = np.exp((new - old)[b, np.asarray(is_model)[b]].mean())
      loss[b, t] = -min(ratio * a, np.clip(ratio, 0.9, 1.2) * a)
    elif name == "cispo":
      loss[b, t] = -np.clip(ratio, 0.8, 1.28) * a * new[b, t]
    else:
      loss[b, t] = -min(ratio * a, np.clip(ratio, 0.8, 1.28) * a)
      if name == "dual" and a < 0:
        loss[b, t] = min(loss[b, t], -3.0 * a)
  return loss


@EVERY_LOSS
def test_agrees_with_a_slow_reference_jitted_or_not(name):
  args = batch(spread=1.0)
  expected = slow_loss(name, *args)
  for f in (LOSSES[name], jax.jit(LOSSES[name])):
    loss, stats = f(*args)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-6)
    assert float(stats["ratio"].den) == float(args[3].sum())


def test_clip_stats_by_hand():
  log = jnp.log(jnp.array([[0.5, 1.5, 1.0, 0.5]] * 2))
  is_model = jnp.array([[True, True, True, False]] * 2)
  _, stats = losses.clipped_surrogate(
    log, jnp.zeros((2, 4)), jnp.array([1.0, -1.0]), is_model
  )
  # Advantage +1 clips 1.5 only, advantage -1 clips 0.5 only.
  assert (float(stats["clip_ratio/high"].num), 6.0) == (1.0, 6.0)
  assert float(stats["clip_ratio/low"].num) == 1.0
  assert float(stats["clip_ratio/region"].num) == 2.0
  assert float(stats["clip_ratio/region"].den) == 6.0
  np.testing.assert_allclose(stats["ratio"].num, 6.0)


@pytest.mark.parametrize(
  ("ratio", "adv", "loss", "slope"),
  [
    (1.20, 1.0, -1.20, -1.20),
    (1.30, 1.0, -1.28, 0.0),
    (0.50, 1.0, -0.50, -0.50),
    (0.90, -1.0, 0.90, 0.90),
    (0.70, -1.0, 0.80, 0.0),
    (2.00, -1.0, 2.00, 2.00),
    (4.00, -1.0, 3.00, 0.0),  # the dual clip at 3
  ],
)
def test_clip_boundaries_by_hand(ratio, adv, loss, slope):
  def f(new):
    one = jnp.ones((1, 1), bool)
    out, _ = losses.clipped_surrogate(
      new, jnp.zeros((1, 1)), jnp.array([adv]), one, dual_clip=3.0
    )
    return out[0, 0]

  value, grad = jax.value_and_grad(f)(jnp.log(jnp.full((1, 1), ratio)))
  np.testing.assert_allclose(value, loss, rtol=1e-6)
  np.testing.assert_allclose(grad[0, 0], slope, rtol=1e-6)


@EVERY_LOSS
def test_tokens_of_others_have_exactly_zero_loss_and_gradient(name):
  new, old, adv, is_model = batch(seed=1)
  # Whatever stands there: minus infinity, NaN, huge numbers.
  garbage = jnp.resize(jnp.array([-jnp.inf, jnp.nan, 1e30]), new.shape)
  dirty_new = jnp.where(is_model, new, garbage)
  dirty_old = jnp.where(is_model, old, garbage)

  def total(new, old):
    return jnp.sum(LOSSES[name](new, old, adv, is_model)[0])

  value, grad = jax.value_and_grad(total)(dirty_new, dirty_old)
  clean_value, clean_grad = jax.value_and_grad(total)(new, old)
  assert float(value) == float(clean_value)
  np.testing.assert_array_equal(grad, clean_grad)
  np.testing.assert_array_equal(np.asarray(grad)[~np.asarray(is_model)], 0.0)


@EVERY_LOSS
def test_a_batch_without_model_tokens_is_zero_not_nan(name):
  new, old, adv, _ = batch(seed=2)
  nothing = jnp.zeros(new.shape, bool)
  weight = losses.token_weights(
    nothing[None], "prompt", is_kept_NG=jnp.ones((1, 6), bool)
  )[0]

  def total(new):
    return jnp.sum(weight * LOSSES[name](new, old, adv, nothing)[0])

  value, grad = jax.value_and_grad(total)(new)
  assert float(value) == 0.0
  np.testing.assert_array_equal(grad, 0.0)


@pytest.mark.parametrize("name", ["clip", "dual", "cispo", "gspo"])
def test_on_policy_gradient_is_reinforce_with_group_baseline(name):
  _, old, _, is_model = batch(seed=3)
  reward = jnp.array([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
  adv = advantages.group_advantages(reward, jnp.ones((2, 3), bool))
  weight = losses.token_weights(
    is_model.reshape(2, 3, -1), "prompt", is_kept_NG=jnp.ones((2, 3), bool)
  ).reshape(old.shape)

  def surrogate(new):
    out, _ = LOSSES[name](new, old, adv.reshape(-1), is_model)
    return jnp.sum(weight * out)

  def reinforce(new):
    return -jnp.sum(weight * adv.reshape(-1, 1) * new)

  np.testing.assert_allclose(
    jax.grad(surrogate)(old), jax.grad(reinforce)(old), rtol=1e-6
  )


def test_gspo_is_exact_under_sequence_weights():
  new, old, adv, is_model = batch(seed=4, spread=0.1)
  kept = jnp.ones((1, 6), bool)
  weight = losses.token_weights(is_model[None], "sequence", is_kept_NG=kept)[0]

  def per_token(new):
    return jnp.sum(weight * LOSSES["gspo"](new, old, adv, is_model)[0])

  def per_sequence(new):
    log_ratio = jnp.where(is_model, new - old, 0.0)
    s = jnp.exp(log_ratio.sum(-1) / is_model.sum(-1))
    return -jnp.mean(jnp.minimum(s * adv, jnp.clip(s, 0.9, 1.2) * adv))

  a, grad_a = jax.value_and_grad(per_token)(new)
  b, grad_b = jax.value_and_grad(per_sequence)(new)
  np.testing.assert_allclose(a, b, rtol=1e-5)
  np.testing.assert_allclose(grad_a, grad_b, rtol=1e-4, atol=1e-7)


def test_cispo_keeps_a_gradient_where_ppo_clips():
  new, old = jnp.log(jnp.array([[8.0]])), jnp.zeros((1, 1))
  adv, one = jnp.ones(1), jnp.ones((1, 1), bool)
  grad = lambda f: float(
    jax.grad(lambda new: f(new, old, adv, one)[0].sum())(new)[0, 0]
  )
  assert grad(losses.clipped_surrogate) == 0.0
  assert grad(losses.cispo) == -5.0


def test_dual_clip_must_exceed_one():
  with pytest.raises(ValueError, match="above 1"):
    losses.clipped_surrogate(*batch(), dual_clip=1.0)


FAR = np.exp(logprobs.LOG_RATIO_BOUND)


@pytest.mark.parametrize("old", [-89.0, -120.0, -1e4, -np.inf])
@pytest.mark.parametrize(
  ("name", "adv", "loss"),
  [
    ("clip", 2.0, -2.56),
    ("clip", 0.0, 0.0),
    ("clip", -2.0, 2.0 * FAR),
    ("dual", 2.0, -2.56),
    ("dual", 0.0, 0.0),
    ("dual", -2.0, 6.0),
    ("gspo", 2.0, -2.4),
    ("gspo", 0.0, 0.0),
    ("gspo", -2.0, 2.0 * FAR),
  ],
)
def test_ratios_out_of_all_bounds_are_clipped_without_gradient(
  name, adv, loss, old
):
  def total(new):
    one = jnp.ones((1, 1), bool)
    return LOSSES[name](new, jnp.full((1, 1), old), jnp.array([adv]), one)[0][
      0, 0
    ]

  value, grad = jax.value_and_grad(total)(jnp.zeros((1, 1)))
  np.testing.assert_allclose(value, loss, rtol=1e-6)
  assert float(grad[0, 0]) == 0.0


@pytest.mark.parametrize("old", [-89.0, -1e4, -np.inf])
def test_far_ratios_reach_cispos_cap_and_keep_its_gradient(old):
  def total(new):
    one = jnp.ones((1, 1), bool)
    args = new, jnp.full((1, 1), old), jnp.array([2.0]), one
    return losses.cispo(*args)[0][0, 0]

  value, grad = jax.value_and_grad(total)(jnp.full((1, 1), -0.5))
  assert (float(value), float(grad[0, 0])) == (5.0, -10.0)


@pytest.mark.parametrize("gap", [89.0, 1e4, np.inf, -89.0, -1e4, -np.inf])
def test_kl_of_far_policies_is_finite(gap):
  one = jnp.ones((1, 1), bool)
  for f in KLS.values():
    value, grad = jax.value_and_grad(
      lambda x, f=f: f(x, x * 0 - gap, one)[0, 0]
    )(jnp.zeros((1, 1)))
    assert np.isfinite(value) and float(grad[0, 0]) == 0.0


CORRECTIONS = {
  "none": lambda *_: 1.0,
  "tis": corrections.token_tis,
  "icepop": corrections.icepop,
  "sequence": corrections.sequence_mask,
  "geometric": functools.partial(corrections.geometric_mask, low=0.5, high=2.0),
}
KLS = {"k1": losses.kl_k1, "k2": losses.kl_k2, "k3": losses.kl_k3}


@jax.jit
def every_objective(new, other, adv, is_model, weight):
  """Value, gradient and metrics of each surrogate under each correction."""
  old, sampler, ref = other
  is_live = is_model & (weight > 0)

  def by_parts(new):
    out = {k: jnp.sum(weight * f(new, ref, is_live)) for k, f in KLS.items()}
    stats = {"mismatch": corrections.mismatch_kl(new, sampler, is_live)}
    for name, surrogate in LOSSES.items():
      loss, stats[name] = surrogate(new, old, adv, is_live)
      for correction, f in CORRECTIONS.items():
        factor = f(old, sampler, is_live)
        out[f"{name} {correction}"] = jnp.sum(weight * factor * loss)
    return out, stats

  out, stats = by_parts(new)
  return out, jax.jacrev(lambda new: by_parts(new)[0])(new), stats


@pytest.mark.parametrize("kind", losses.WEIGHT_KINDS)
def test_rows_without_weight_add_exactly_nothing(kind):
  """Whatever they hold: overflowing ratios, NaN, the filler of other tools."""
  rng = np.random.default_rng(8)
  new, old, adv, is_model = batch(seed=7)
  near = lambda: old + 0.05 * rng.normal(size=old.shape).astype(np.float32)
  other = (old, near(), near())
  is_dead_B = np.array([False, True, False, False, True, False])
  weight = losses.token_weights(
    is_model.reshape(2, 3, -1),
    kind,
    is_kept_NG=jnp.array(~is_dead_B).reshape(2, 3),
    max_length=9,
  ).reshape(old.shape)
  clean = every_objective(new, other, adv, is_model, weight)
  assert all(np.any(grad != 0) for grad in clean[1].values())
  for grad in clean[1].values():
    np.testing.assert_array_equal(np.asarray(grad)[is_dead_B], 0.0)
  for garbage in (1e4, -1e4, -9999.0, np.inf, -np.inf, np.nan):
    fill = lambda x, g=garbage: jnp.where(
      is_dead_B.reshape(-1, *[1] * (x.ndim - 1)), g, x
    )
    for dirty in (
      (fill(new), other),
      (new, tuple(map(fill, other))),
      (fill(new), tuple(fill(x, -garbage) for x in other)),
    ):
      got = every_objective(*dirty, fill(adv), is_model, weight)
      jax.tree.map(np.testing.assert_array_equal, got, clean)


# Weights -------------------------------------------------------------------

# Two prompts, three rows each: 2, 4, 0 and 1, 3, 2 sampled tokens of 4.
LENGTHS = np.array([[2, 4, 0], [1, 3, 2]])
IS_MODEL = jnp.array(np.arange(4) < LENGTHS[:, :, None])
KEPT = jnp.array([[True, True, True], [True, False, True]])


@pytest.mark.parametrize(
  ("kind", "per_row"),
  [
    ("prompt", [[1 / 12, 1 / 12, 0], [1 / 6, 0, 1 / 6]]),
    ("token", [[1 / 9, 1 / 9, 0], [1 / 9, 0, 1 / 9]]),
    ("sequence", [[1 / 8, 1 / 16, 0], [1 / 4, 0, 1 / 8]]),
    ("dr_grpo", [[1 / 40, 1 / 40, 0], [1 / 40, 0, 1 / 40]]),
  ],
)
def test_weights_by_hand(kind, per_row):
  weight = losses.token_weights(IS_MODEL, kind, is_kept_NG=KEPT, max_length=10)
  expected = np.array(per_row)[:, :, None] * np.asarray(IS_MODEL)
  np.testing.assert_allclose(weight, expected, rtol=1e-6)
  if kind != "dr_grpo":
    np.testing.assert_allclose(weight.sum(), 1.0, rtol=1e-6)


def test_prompt_weights_average_over_live_prompts_only():
  padded = jnp.concatenate([IS_MODEL, jnp.zeros_like(IS_MODEL)])
  kept = jnp.concatenate([KEPT, ~jnp.zeros_like(KEPT)])
  weight = losses.token_weights(padded, "prompt", is_kept_NG=kept)
  alone = losses.token_weights(IS_MODEL, "prompt", is_kept_NG=KEPT)
  np.testing.assert_array_equal(weight[:2], alone)
  np.testing.assert_array_equal(weight[2:], 0.0)


@pytest.mark.parametrize("kind", losses.WEIGHT_KINDS)
def test_nothing_kept_weighs_nothing(kind):
  weight = losses.token_weights(
    IS_MODEL, kind, is_kept_NG=jnp.zeros_like(KEPT), max_length=4
  )
  np.testing.assert_array_equal(weight, 0.0)


def test_padding_tokens_is_inert():
  wide = jnp.pad(IS_MODEL, ((0, 0), (0, 0), (0, 5)))
  for kind in losses.WEIGHT_KINDS:
    ask = functools.partial(
      losses.token_weights, kind=kind, is_kept_NG=KEPT, max_length=4
    )
    np.testing.assert_array_equal(ask(wide)[:, :, :4], ask(IS_MODEL))


def test_weights_refuse_what_they_do_not_know():
  with pytest.raises(ValueError, match="Unknown normaliser 'mean'"):
    losses.token_weights(IS_MODEL, "mean", is_kept_NG=KEPT)
  with pytest.raises(ValueError, match="positive max_length, not None"):
    losses.token_weights(IS_MODEL, "dr_grpo", is_kept_NG=KEPT)


# The whole objective -------------------------------------------------------


def objective(name, new, old, adv, is_model, weight):
  return jnp.sum(weight * LOSSES[name](new, old, adv, is_model)[0])


@pytest.mark.parametrize(
  ("kind", "name"),
  [*((kind, "clip") for kind in losses.WEIGHT_KINDS)]
  + [*(("prompt", name) for name in LOSSES if name != "clip")],
)
def test_invariant_to_group_order_and_microbatches(kind, name):
  new, old, adv, is_model = batch(seed=5, n_rows=12)
  kept = jnp.array(np.random.default_rng(0).uniform(size=(4, 3)) < 0.8)
  ask = jax.jit(
    lambda is_model, kept: losses.token_weights(
      is_model.reshape(4, 3, -1), kind, is_kept_NG=kept, max_length=9
    ).reshape(12, -1)
  )
  weight = ask(is_model, kept)
  f = jax.jit(jax.value_and_grad(functools.partial(objective, name)))
  whole, grad = f(new, old, adv, is_model, weight)

  order = np.array([2, 0, 3, 1])
  rows = (order[:, None] * 3 + np.arange(3)).reshape(-1)
  weight_2 = ask(is_model[rows], kept[order])
  other, other_grad = f(
    new[rows], old[rows], adv[rows], is_model[rows], weight_2
  )
  np.testing.assert_allclose(other, whole, rtol=1e-5, atol=1e-7)
  np.testing.assert_allclose(other_grad, grad[rows], rtol=1e-6)

  parts, part_grads = [], []
  for start in (0, 3, 6, 9):
    part = (x[start : start + 3] for x in (new, old, adv, is_model, weight))
    value, part_grad = f(*part)
    parts.append(value)
    part_grads.append(part_grad)
  np.testing.assert_allclose(sum(parts), whole, rtol=1e-5, atol=1e-7)
  np.testing.assert_allclose(np.concatenate(part_grads), grad, rtol=1e-6)


@EVERY_LOSS
def test_eight_devices_equal_one(name):
  new, old, adv, is_model = batch(seed=6, n_rows=16)
  weight = losses.token_weights(
    is_model.reshape(4, 4, -1), "prompt", is_kept_NG=jnp.ones((4, 4), bool)
  ).reshape(16, -1)
  f = jax.jit(jax.value_and_grad(functools.partial(objective, name)))
  args = (new, old, adv, is_model, weight)
  one, grad = f(*args)
  mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
  split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
  eight, spread = f(*jax.device_put(args, split))
  assert len(spread.sharding.device_set) == 8
  np.testing.assert_allclose(eight, one, rtol=1e-5, atol=1e-7)
  np.testing.assert_allclose(spread, grad, rtol=1e-6)


# Optional terms ------------------------------------------------------------


def test_kl_estimators_by_hand():
  new = jnp.log(jnp.array([[0.5, 0.5]]))
  ref = jnp.log(jnp.array([[0.25, 1.0]]))
  is_model = jnp.array([[True, False]])
  log2 = np.log(2.0)
  for f, expected in (
    (losses.kl_k1, log2),
    (losses.kl_k2, log2**2 / 2),
    (losses.kl_k3, 0.5 - 1 + log2),
  ):
    np.testing.assert_allclose(
      f(new, ref, is_model), [[expected, 0.0]], rtol=1e-5
    )


def test_kl_estimators_meet_the_true_divergence():
  """In expectation over new: values of k1 and k3, the gradient of k2."""
  logits = jnp.array([[0.3, -0.2, 0.5, 0.0]])
  ref = jax.nn.log_softmax(jnp.array([[0.0, 0.4, 0.1, -0.3]]))
  everywhere = jnp.ones((1, 4), bool)
  sampled_from = jax.nn.softmax(logits)

  def true_kl(logits):
    new = jax.nn.log_softmax(logits)
    return jnp.sum(jnp.exp(new) * (new - ref))

  def expected(logits, f):
    # Every token once, weighted by how often it would be sampled.
    return jnp.sum(
      sampled_from * f(jax.nn.log_softmax(logits), ref, everywhere)
    )

  for f in (losses.kl_k1, losses.kl_k3):
    np.testing.assert_allclose(expected(logits, f), true_kl(logits), rtol=1e-4)
  true_grad = jax.grad(true_kl)(logits)
  assert float(jnp.max(jnp.abs(true_grad))) > 0.05
  np.testing.assert_allclose(
    jax.grad(expected)(logits, losses.kl_k2), true_grad, atol=1e-6
  )
  # k1 as a loss pushes nowhere: its expected gradient is zero.
  np.testing.assert_allclose(
    jax.grad(expected)(logits, losses.kl_k1), 0.0, atol=1e-6
  )


def test_regularizers_add_and_vanish_at_zero():
  loss, is_model = jnp.ones((1, 2)), jnp.array([[True, False]])
  kl, entropy = jnp.full((1, 2), 3.0), jnp.full((1, 2), 2.0)
  both = losses.with_regularizers(
    loss,
    is_model,
    kl_BT=kl,
    kl_coef=0.1,
    entropy_BT=entropy,
    entropy_coef=0.01,
  )
  np.testing.assert_allclose(both, [[1.0 + 0.3 - 0.02, 1.0]])
  assert losses.with_regularizers(loss, is_model, kl_BT=kl) is loss
  with pytest.raises(ValueError, match="kl_coef is 0.1 but kl_BT"):
    losses.with_regularizers(loss, is_model, kl_coef=0.1)
