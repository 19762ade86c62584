"""Chunked log-probs are those of full logits, gradients included."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from roc.core import logprobs

B, T, D, V = 3, 7, 8, 37


def inputs(dtype=jnp.float32, scale=1.0):
  keys = jax.random.split(jax.random.key(0), 3)
  hidden = scale * jax.random.normal(keys[0], (B, T, D))
  unembed = jax.random.normal(keys[1], (D, V))
  target = jax.random.randint(keys[2], (B, T), 0, V)
  return hidden.astype(dtype), unembed.astype(dtype), target


def full(hidden, unembed, target, temperature=1.0):
  logits = jnp.einsum(
    "btd,dv->btv", hidden, unembed, preferred_element_type=jnp.float32
  )
  logp = jax.nn.log_softmax(logits / temperature)
  at_target = jnp.take_along_axis(logp, target[:, :, None], axis=-1)[:, :, 0]
  return at_target, -jnp.sum(jnp.exp(logp) * logp, axis=-1)


CHUNKED = functools.partial(logprobs.token_logprobs, chunk=6)
JITTED = jax.jit(CHUNKED)


def scalar(function, hidden, unembed, target):
  """Some mixture in which every output has its own weight."""
  logp, entropy = function(hidden, unembed, target)
  weight = jnp.cos(jnp.arange(B * T, dtype=jnp.float32)).reshape(B, T)
  return jnp.sum(weight * logp + 0.5 * weight[::-1] * entropy)


GRADIENT = jax.jit(jax.grad(functools.partial(scalar, CHUNKED), argnums=(0, 1)))


# One chunk for all, an even split, a ragged one, one position at a time.
@pytest.mark.parametrize(
  ("chunk", "temperature"), [(1000, 1.0), (21, 0.6), (6, 0.6), (1, 1.0)]
)
def test_values_and_gradients_equal_full_logits(chunk, temperature):
  args = inputs()
  ours = functools.partial(
    logprobs.token_logprobs, chunk=chunk, temperature=temperature
  )
  peer = functools.partial(full, temperature=temperature)

  @functools.partial(jax.jit, static_argnums=0)
  def values_and_gradients(f, hidden, unembed, target):
    grad = jax.grad(functools.partial(scalar, f), argnums=(0, 1))
    return f(hidden, unembed, target), grad(hidden, unembed, target)

  values, grads = values_and_gradients(ours, *args)
  peer_values, peer_grads = values_and_gradients(peer, *args)
  for a, b in zip(values, peer_values, strict=True):
    assert a.dtype == jnp.float32
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
  for a, b in zip(grads, peer_grads, strict=True):
    # 1e-5 of the largest entry: gradients here are sums of up to 21 terms.
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * jnp.abs(b).max())


def test_masked_ids_are_as_good_as_absent():
  """Values and gradients are those of a vocabulary without them."""
  hidden, unembed, target = inputs()
  n_ids = 30
  target = target % n_ids

  @functools.partial(jax.jit, static_argnums=0)
  def values_and_gradients(f, unembed):
    grad = jax.grad(functools.partial(scalar, f), argnums=(0, 1))
    return f(hidden, unembed, target), grad(hidden, unembed, target)

  masked = functools.partial(CHUNKED, n_ids=n_ids)
  values, grads = values_and_gradients(masked, unembed)
  want, (want_hidden, want_unembed) = values_and_gradients(
    full, unembed[:, :n_ids]
  )
  want_unembed = jnp.pad(want_unembed, ((0, 0), (0, V - n_ids)))
  for a, b in zip(values, want, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
  for a, b in zip(grads, (want_hidden, want_unembed), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * jnp.abs(b).max())
  assert not np.any(grads[1][:, n_ids:])


def test_jit_equals_eager():
  args = inputs()
  for a, b in zip(CHUNKED(*args), JITTED(*args), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_gradients_against_finite_differences():
  hidden, unembed, target = inputs()
  loss = jax.jit(functools.partial(scalar, CHUNKED))
  g_hidden, g_unembed = GRADIENT(hidden, unembed, target)
  step = 1e-2
  d_hidden = jax.random.normal(jax.random.key(5), hidden.shape)
  d_unembed = jax.random.normal(jax.random.key(6), unembed.shape)
  numeric = (
    loss(hidden + step * d_hidden, unembed + step * d_unembed, target)
    - loss(hidden - step * d_hidden, unembed - step * d_unembed, target)
  ) / (2 * step)
  along = jnp.sum(g_hidden * d_hidden) + jnp.sum(g_unembed * d_unembed)
  np.testing.assert_allclose(along, numeric, rtol=1e-2)


def test_without_entropy_it_is_none_and_gradients_stay():
  args = inputs()
  f = functools.partial(logprobs.token_logprobs, chunk=6, with_entropy=False)
  logp, entropy = f(*args)
  assert entropy is None
  np.testing.assert_allclose(logp, full(*args)[0], rtol=1e-5, atol=1e-5)
  grad = lambda f: jax.jit(
    jax.grad(lambda h: jnp.sum(jnp.sin(f(h, *args[1:])[0])))
  )
  np.testing.assert_allclose(
    grad(f)(args[0]), grad(full)(args[0]), rtol=1e-4, atol=1e-5
  )


def test_bfloat16_inputs_accumulate_in_float32():
  args = inputs(jnp.bfloat16)
  logp, entropy = JITTED(*args)
  exact, exact_entropy = full(
    args[0].astype(jnp.float32), args[1].astype(jnp.float32), args[2]
  )
  # Products of bfloat16 are exact in float32: no bfloat16 error remains.
  np.testing.assert_allclose(logp, exact, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(entropy, exact_entropy, rtol=1e-5, atol=1e-5)
  f = functools.partial(logprobs.token_logprobs, chunk=6)
  g_hidden, g_unembed = jax.grad(functools.partial(scalar, f), argnums=(0, 1))(
    *args
  )
  assert g_hidden.dtype == g_unembed.dtype == jnp.bfloat16
  exact_grad = jax.grad(functools.partial(scalar, full))(
    args[0].astype(jnp.float32), args[1].astype(jnp.float32), args[2]
  )
  # One rounding of each logit's gradient to bfloat16: 2 ** -8 relative.
  np.testing.assert_allclose(
    g_hidden.astype(jnp.float32),
    exact_grad,
    atol=0.02 * float(jnp.abs(exact_grad).max()),
  )


def test_peaked_distributions_stay_finite():
  args = inputs(scale=1e4)
  logp, entropy = JITTED(*args)
  assert np.isfinite(logp).all()
  assert (np.asarray(logp) <= 0).all()
  np.testing.assert_allclose(entropy, 0.0, atol=1e-6)
  for grad in GRADIENT(*args):
    assert np.isfinite(grad).all()


def test_uniform_distribution_has_entropy_log_v():
  _, unembed, target = inputs()
  logp, entropy = JITTED(jnp.zeros((B, T, D)), unembed, target)
  np.testing.assert_allclose(logp, -np.log(V), rtol=1e-6)
  np.testing.assert_allclose(entropy, np.log(V), rtol=1e-6)


def test_each_token_depends_on_its_own_hidden_state_alone():
  hidden, unembed, target = inputs()
  jacobian = jax.jacrev(lambda h: JITTED(h, unembed, target)[0])(hidden)
  reach = np.abs(np.asarray(jacobian)).sum(-1).reshape(B * T, B * T) > 0
  np.testing.assert_array_equal(reach, np.eye(B * T, dtype=bool))


@pytest.mark.parametrize("garbage", [jnp.nan, jnp.inf, -jnp.inf])
def test_tokens_without_weight_may_have_any_hidden_state(garbage):
  """0 * NaN is NaN, in the gradient of the unembedding above all."""
  hidden, unembed, target = inputs()
  is_used = jnp.array([[True] * 5 + [False] * 2, [False] * T, [True] * T])

  @jax.jit
  @functools.partial(jax.value_and_grad, argnums=(0, 1))
  def total(hidden, unembed):
    both = CHUNKED(hidden, unembed, target)
    return sum(jnp.sum(jnp.where(is_used, x, 0.0)) for x in both)

  value, grads = total(hidden, unembed)
  dirty = jnp.where(is_used[:, :, None], hidden, garbage)
  value_again, grads_again = total(dirty, unembed)
  assert float(value) == float(value_again)
  jax.tree.map(np.testing.assert_array_equal, grads_again, grads)
  np.testing.assert_array_equal(np.asarray(grads[0])[~np.asarray(is_used)], 0.0)


def test_log_ratio_is_bounded_and_constant_off_used_tokens():
  used = jnp.array([[True, True, True, False]])
  new = jnp.array([[-1.0, -1.0, 30.0, jnp.nan]])
  old = jnp.array([[-1.5, jnp.inf, 0.0, -jnp.inf]])
  run = lambda new, old: jnp.sum(logprobs.log_ratio(new, old, used))
  bound = logprobs.LOG_RATIO_BOUND
  np.testing.assert_array_equal(
    logprobs.log_ratio(new, old, used), [[0.5, -bound, bound, 0.0]]
  )
  by_new, by_old = jax.grad(run, argnums=(0, 1))(new, old)
  np.testing.assert_array_equal(by_new, [[1.0, 0.0, 0.0, 0.0]])
  np.testing.assert_array_equal(by_old, 0.0)


def test_no_array_of_all_logits_exists():
  """The compiled backward pass holds less than one [B, T, V] array."""
  b, t, d, v = 4, 256, 16, 4096
  spec = (
    jax.ShapeDtypeStruct((b, t, d), jnp.float32),
    jax.ShapeDtypeStruct((d, v), jnp.float32),
    jax.ShapeDtypeStruct((b, t), jnp.int32),
  )

  def temp_bytes(f):
    loss = lambda h, u, y: sum(jnp.sum(x) for x in f(h, u, y))
    step = jax.jit(jax.grad(loss, argnums=(0, 1)))
    return step.lower(*spec).compile().memory_analysis().temp_size_in_bytes

  ours = temp_bytes(functools.partial(logprobs.token_logprobs, chunk=64))
  assert ours < 4 * b * t * v / 4
  assert ours < temp_bytes(full) / 10


def test_eight_devices_equal_one():
  keys = jax.random.split(jax.random.key(1), 3)
  args = (
    jax.random.normal(keys[0], (8, 5, D)),
    jax.random.normal(keys[1], (D, V)),
    jax.random.randint(keys[2], (8, 5), 0, V),
  )

  def loss(hidden, unembed, target):
    logp, entropy = logprobs.token_logprobs(hidden, unembed, target, chunk=16)
    return jnp.sum(jnp.sin(logp) + entropy)

  f = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
  value, grads = f(*args)
  mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
  named = lambda *axes: jax.sharding.NamedSharding(
    mesh, jax.sharding.PartitionSpec(*axes)
  )
  split = jax.device_put(args, (named("data"), named(), named("data")))
  value_8, grads_8 = f(*split)
  np.testing.assert_allclose(value_8, value, rtol=1e-5)
  for a, b in zip(grads_8, grads, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [({"chunk": 0}, "chunk is 0"), ({"temperature": 0.0}, "temperature is 0.0")],
)
def test_refuses_what_is_not_positive(kwargs, message):
  with pytest.raises(ValueError, match=message):
    logprobs.token_logprobs(*inputs(), **kwargs)
