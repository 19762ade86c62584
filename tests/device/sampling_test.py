"""Draws follow the softmax, each from its own stream."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from roc.device import sampling

V = 8
B = 20_000
# The value that chi-square with 7 degrees of freedom exceeds once in 10,000.
CHI2_7 = 29.88

LOGITS_V = np.array([2.0, 1.0, 0.5, 0.0, -0.5, -1.0, 1.5, -2.0], np.float32)


@pytest.fixture(scope="module")
def keys_B2():
  return sampling.rollout_keys(3, 1, jnp.arange(B) % 50, jnp.arange(B) // 50)


def draw(keys_B2, index=0, **how):
  run = jax.jit(functools.partial(sampling.sample, **how))
  n = len(keys_B2)
  u_B = sampling.uniforms(keys_B2, jnp.full((n, 1), index))[:, 0]
  token_B, logp_B, raw_logp_B = run(
    jnp.broadcast_to(LOGITS_V[None], (n, V)), u_B
  )
  assert token_B.dtype == jnp.int32 and logp_B.dtype == jnp.float32
  # Of the model's own distribution, however it was drawn from.
  np.testing.assert_allclose(
    raw_logp_B, np.log(softmax(LOGITS_V))[token_B], atol=1e-5
  )
  return np.asarray(token_B), np.asarray(logp_B)


def softmax(x):
  p = np.exp(x - x.max())
  return p / p.sum()


def chi_square(token_B, p_V):
  expected_V = p_V * len(token_B)
  counts_V = np.bincount(token_B, minlength=len(p_V))
  return np.sum((counts_V - expected_V) ** 2 / expected_V)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_frequencies_and_logps(keys_B2, temperature):
  p_V = softmax(LOGITS_V / temperature)
  token_B, logp_B = draw(keys_B2, temperature=temperature)
  assert chi_square(token_B, p_V) < CHI2_7
  # The test has power: another temperature's distribution fails it.
  assert chi_square(token_B, softmax(LOGITS_V / (temperature * 1.2))) > 60
  np.testing.assert_allclose(logp_B, np.log(p_V)[token_B], atol=1e-5)


def test_positions_draw_independently(keys_B2):
  """The same rollout at two positions: joint frequencies are the product."""
  a_B, _ = draw(keys_B2, index=4, temperature=1.0)
  b_B, _ = draw(keys_B2, index=5, temperature=1.0)
  p_V = softmax(LOGITS_V)
  expected_VV = np.outer(p_V, p_V) * B
  counts_VV = np.zeros((V, V))
  np.add.at(counts_VV, (a_B, b_B), 1)
  chi2 = np.sum((counts_VV - expected_VV) ** 2 / expected_VV)
  assert chi2 < 111.0  # 63 degrees of freedom, once in 10,000


def test_greedy_takes_the_likeliest(keys_B2):
  token_B, logp_B = draw(keys_B2[:5], temperature=0.0)
  np.testing.assert_array_equal(token_B, 0)
  np.testing.assert_allclose(logp_B, np.log(softmax(LOGITS_V)[0]), rtol=1e-6)


@pytest.mark.parametrize(
  ("how", "kept"),
  [
    ({"top_k": 1}, {0}),
    ({"top_k": 3}, {0, 6, 1}),
    # Sorted shares: .44 .27 .16 .10 ...: .44 < .6 <= .71.
    ({"top_p": 0.4}, {0}),
    ({"top_p": 0.6}, {0, 6}),
    ({"top_p": 0.72}, {0, 6, 1}),
    ({"top_k": 2, "top_p": 0.99}, {0, 6}),
    ({"top_p": 1e-9}, {0}),
    ({"top_k": V, "top_p": 1.0}, set(range(V))),
    # As shares of the likeliest: 1, .61, .37, .22, ...
    ({"min_p": 0.6}, {0, 6}),
    ({"min_p": 0.37}, {0, 6}),
    ({"min_p": 0.36}, {0, 6, 1}),
    ({"min_p": 1.0}, {0}),
    ({"top_k": 2, "min_p": 0.3}, {0, 6}),
  ],
)
def test_restriction(keys_B2, how, kept):
  token_B, logp_B = draw(keys_B2[:4000], temperature=1.0, **how)
  assert set(token_B.tolist()) == kept
  kept = sorted(kept)
  p = np.zeros(V)
  p[kept] = softmax(LOGITS_V[kept])
  np.testing.assert_allclose(logp_B, np.log(p[token_B]), atol=1e-5)


def test_rows_are_restricted_apart():
  logits_BV = np.stack([LOGITS_V, LOGITS_V[::-1]])
  got_BV = np.asarray(sampling.restrict(jnp.asarray(logits_BV), 2, 1.0))
  np.testing.assert_array_equal(got_BV > -1e29, logits_BV >= 1.5)


def test_keys_are_distinct_and_stable():
  task_B, rollout_B = (
    jnp.repeat(jnp.arange(40), 40),
    jnp.tile(jnp.arange(40), 40),
  )
  seen = set()
  for seed, step in ((0, 1), (0, 2), (1, 1)):
    keys_B2 = np.asarray(sampling.rollout_keys(seed, step, task_B, rollout_B))
    assert keys_B2.dtype == np.uint32 and keys_B2.shape == (1600, 2)
    seen |= {tuple(k) for k in keys_B2.tolist()}
  assert len(seen) == 3 * 1600
  # A rollout's key does not know who else is in its batch.
  alone = sampling.rollout_keys(1, 1, task_B[777:778], rollout_B[777:778])
  np.testing.assert_array_equal(alone[0], keys_B2[777])


def test_stream_is_pinned():
  """Changing how keys are folded would change every run that is resumed."""
  keys_B2 = sampling.rollout_keys(7, 3, jnp.array([11]), jnp.array([5]))
  key = jax.random.key(7)
  for part in (3, 11, 5):
    key = jax.random.fold_in(key, part)
  np.testing.assert_array_equal(keys_B2[0], jax.random.key_data(key))


@pytest.mark.parametrize("n_ids", [1, 7, 512, 1300])
def test_invert_takes_the_id_where_the_mass_passes_the_share(n_ids):
  rng = np.random.default_rng(n_ids)
  n = 400
  mass_BV = rng.random((n, n_ids), np.float32) ** 8
  mass_BV[rng.random((n, n_ids)) < 0.5] = 0.0
  mass_BV[:, n_ids // 2] += 1e-3
  u_B = rng.random(n, np.float32)
  u_B[:2] = 0.0, np.float32(1 - 2**-24)  # the least and the largest
  got_B = np.asarray(sampling.invert(jnp.asarray(mass_BV), jnp.asarray(u_B)))
  sum_BV = np.cumsum(mass_BV.astype(np.float64), axis=-1)
  goal_B = u_B * sum_BV[:, -1]
  row_B = np.arange(n)
  before_B = sum_BV[row_B, got_B] - mass_BV[row_B, got_B]
  slack_B = 1e-6 * sum_BV[:, -1]
  assert np.all(mass_BV[row_B, got_B] > 0)
  assert np.all(before_B <= goal_B + slack_B)
  assert np.all(goal_B <= sum_BV[row_B, got_B] + slack_B)


def border_draws(mass_V, n_ulps):
  """Shares at and around the cumulated mass of every id, and the two ends."""
  sum_V = np.cumsum(mass_V.astype(np.float64))
  share = (sum_V[mass_V > 0] / sum_V[-1]).astype(np.float32)
  steps = np.arange(-n_ulps, n_ulps + 1, dtype=np.float32)[:, None] * 2.0**-24
  last = np.float32(1 - 2**-24)
  u_B = np.clip((share * (1 + steps)).ravel(), 0, last).astype(np.float32)
  return np.concatenate([[0, last], u_B]).astype(np.float32)


@pytest.mark.parametrize(
  "how", [(20, 1.0, 0.0), (0, 0.8, 0.0), (0, 1.0, 0.05), (40, 0.95, 0.001)]
)
def test_what_is_left_out_is_never_drawn(how):
  """The sums of ids without mass wobble in the last bit, where borders lie."""
  invert = jax.jit(sampling.invert)
  rng = np.random.default_rng(0)
  for _ in range(6):
    logits_BV = 3 * rng.normal(size=(1, 1200)).astype(np.float32)
    kept_BV = sampling.restrict(jnp.asarray(logits_BV), *how)
    mass_V = np.asarray(sampling._mass(kept_BV)[1][0])
    assert 2 <= np.sum(mass_V > 0) <= 200
    u_B = border_draws(mass_V, n_ulps=20)
    # One shape, one compiled program: rows are repeated, not left out.
    u_B = np.resize(u_B, -(-len(u_B) // 4096) * 4096)
    for part_B in np.split(u_B, len(u_B) // 4096):
      mass_BV = jnp.broadcast_to(mass_V, (4096, 1200))
      got_B = np.asarray(invert(mass_BV, jnp.asarray(part_B)))
      assert np.all(mass_V[got_B] > 0)


def test_sums_that_are_not_monotone_draw_no_id_without_mass(monkeypatch):
  """The same whatever order this machine adds in: sums wobble by design."""
  cumsum = jnp.cumsum

  def wobbling(x, axis):
    sign = 1 - 2 * (jnp.arange(x.shape[axis]) % 2)
    return cumsum(x, axis=axis) * (1 + 1e-6 * sign[None])

  rng = np.random.default_rng(1)
  mass_V = np.where(rng.random(1300) < 0.01, rng.random(1300), 0)
  mass_V = mass_V.astype(np.float32)
  u_B = border_draws(mass_V, n_ulps=30)
  monkeypatch.setattr(jnp, "cumsum", wobbling)
  mass_BV = jnp.broadcast_to(mass_V, (len(u_B), 1300))
  invert = jax.jit(lambda *args: sampling.invert(*args))  # traced anew
  got_B = np.asarray(invert(mass_BV, jnp.asarray(u_B)))
  assert np.all(mass_V[got_B] > 0)
  assert set(got_B) == set(np.flatnonzero(mass_V))
  assert got_B[0] == got_B.min() and got_B[1] == got_B.max()


@pytest.mark.parametrize("n_ids", [5, 700])
def test_a_single_id_with_mass_is_always_drawn(n_ids):
  u_B = jnp.array([0.0, 0.5, 1 - 2**-24], jnp.float32)
  invert = jax.jit(sampling.invert)
  for at in (0, n_ids // 2, n_ids - 1):
    mass_BV = jnp.zeros((3, n_ids)).at[:, at].set(1e-30)
    np.testing.assert_array_equal(invert(mass_BV, u_B), at)


def test_large_vocabularies_are_drawn_from_as_they_should_be(keys_B2):
  """More ids than a block has: the whole range, by blocks, in proportion."""
  n_ids = 1300
  logits_V = np.linspace(0.0, 3.0, n_ids, dtype=np.float32)
  logits_V[::3] = -np.inf
  u_B = sampling.uniforms(keys_B2, jnp.zeros((B, 1), jnp.int32))[:, 0]
  token_B, logp_B, _ = jax.jit(
    functools.partial(sampling.sample, temperature=1.0)
  )(jnp.broadcast_to(logits_V[None], (B, n_ids)), u_B)
  p_V = softmax(logits_V.astype(np.float64))
  np.testing.assert_allclose(logp_B, np.log(p_V[token_B]), atol=1e-5)
  parts = np.array_split(np.arange(n_ids), 8)
  part_of_V = np.repeat(np.arange(8), [len(part) for part in parts])
  share_8 = np.array([p_V[part].sum() for part in parts])
  assert chi_square(part_of_V[token_B], share_8) < CHI2_7
