"""Adapters: what they start as, what is trained, and that all sides agree."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from roc import layout
from roc.device import engine as engine_lib
from roc.device import learner as learner_lib
from roc.device import lora, model, sampling, sharding
from roc.device import step as step_lib

B, T = 8, 12
CONFIG = lora.LoraConfig(rank=3, alpha=6.0, base_dtype="float32")
SOME = dataclasses.replace(CONFIG, targets=("k_proj", "up_proj", "o_proj"))


@pytest.fixture(scope="session")
def make_adapted(model_config):
  def make(config=CONFIG, **changes):
    shapes = dataclasses.replace(model_config, **changes)
    return model.Policy(shapes, adapters=config)

  return make


def some_adapters(policy, seed=1):
  """As after some training: B is not zero."""
  fresh = policy.init_adapters(jax.random.key(seed))
  rng = np.random.default_rng(seed)
  draw = lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.2, jnp.float32)
  return jax.tree.map(draw, fresh)


@pytest.fixture(scope="module")
def tokens_BT():
  return np.random.default_rng(0).integers(0, 40, (B, T)).astype(np.int32)


def hidden(policy, params, tokens_BT):
  return np.asarray(jax.jit(policy.hidden)(params, tokens_BT))


# ------------------------------------------------------------ what they compute


def projected(policy, params, name, h_BTD):
  """What a projection of the first layer makes of its input, op by op."""
  layers = policy._module(params).layers
  graph, state = nnx.split(layers)
  first = nnx.merge(graph, jax.tree.map(lambda x: x[0], state))
  return np.asarray(getattr(first, name)(h_BTD))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fresh_adapters_change_no_bit(
  make_adapted, make_policy, params, tokens_BT, dtype
):
  adapted, plain = make_adapted(dtype=dtype), make_policy(dtype=dtype)
  fresh = adapted.init_adapters(jax.random.key(0))
  assert all(jnp.any(x[lora.A] != 0) for x in fresh["layers"].values())
  joined = adapted.join(params, fresh)
  for form, base in (
    (joined, params),
    (adapted.fuse(joined), plain.fuse(params)),
  ):
    for name, leaf in form["layers"].items():
      if lora.A in leaf:
        shape = (2, 3, leaf[lora.A].shape[1])
        h_BTD = jax.random.normal(jax.random.key(1), shape)
        np.testing.assert_array_equal(
          projected(adapted, form, name, h_BTD),
          projected(plain, base, name, h_BTD),
        )
  jax.tree.map(np.testing.assert_array_equal, adapted.merged(joined), params)
  # Another program, so other last bits; of bfloat16 none, but for borders.
  got = hidden(adapted, joined, tokens_BT)
  want = hidden(plain, params, tokens_BT)
  atol = 1e-5 if dtype == "float32" else 1e-2
  np.testing.assert_allclose(got, want, atol=atol)
  # The base is what the same key gives without adapters.
  jax.tree.map(
    np.testing.assert_array_equal,
    adapted.init(jax.random.key(5)),
    plain.init(jax.random.key(5)),
  )


@pytest.mark.parametrize("config", [CONFIG, SOME], ids=["all", "some"])
def test_apart_fused_and_merged_are_the_same(
  make_adapted, policy, params, tokens_BT, config
):
  adapted = make_adapted(config)
  adapters = some_adapters(adapted)
  assert set(adapters["layers"]) == set(config.targets)
  joined = adapted.join(params, adapters)
  apart = hidden(adapted, joined, tokens_BT)
  assert np.abs(apart - hidden(policy, params, tokens_BT)).max() > 0.1
  merged = adapted.merged(joined)
  assert jax.tree.structure(merged) == jax.tree.structure(params)
  for form, who in (
    (merged, policy),
    (adapted.fuse(joined), adapted),
    (adapted.join(policy.fuse(params), adapters), adapted),
    (adapted.hold(adapted.join(policy.fuse(params), adapters)), adapted),
  ):
    np.testing.assert_allclose(hidden(who, form, tokens_BT), apart, atol=2e-5)


def test_merged_by_hand(make_adapted, params):
  adapted = make_adapted(SOME)
  adapters = some_adapters(adapted)
  merged = adapted.merged(adapted.join(params, adapters))
  for name, leaf in params["layers"].items():
    got = jax.tree.map(np.asarray, merged["layers"][name])
    if name not in SOME.targets:
      jax.tree.map(np.testing.assert_array_equal, got, leaf)
      continue
    a, b = adapters["layers"][name][lora.A], adapters["layers"][name][lora.B]
    for i in range(2):
      want = leaf["kernel"][i] + 2.0 * a[i] @ b[i]
      np.testing.assert_allclose(got["kernel"][i], want, atol=1e-5)
  base, apart = lora.split(adapted.join(params, adapters))
  jax.tree.map(np.testing.assert_array_equal, base, params)
  jax.tree.map(np.testing.assert_array_equal, apart, adapters)


# -------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def batch(tokens_BT):
  rng = np.random.default_rng(2)
  roles_BT = np.where(np.arange(T)[None] < 4, 1, 2) * np.ones((B, 1), np.int8)
  is_model_BT = roles_BT == layout.Role.MODEL
  logp_BT = np.where(is_model_BT, -rng.exponential(3.0, (B, T)), 0)
  return {
    "tokens_BT": tokens_BT,
    "roles_BT": roles_BT.astype(np.int8),
    "logp_sampler_BT": logp_BT.astype(np.float32),
    "logp_old_BT": logp_BT.astype(np.float32),
    "advantage_B": rng.normal(size=B).astype(np.float32),
    "weight_BT": (is_model_BT / is_model_BT.sum()).astype(np.float32),
  }


def make_learner(policy, *, mesh=(1, 1, 1), optimizer=None, **settings):
  """With plain SGD the change of what is trained is the gradient itself."""
  loss = step_lib.LossConfig(kind="cispo", eps_high=4.0, logprob_chunk=32)
  return learner_lib.Learner(
    policy,
    optimizer or optax.sgd(1.0),
    step_lib.grpo_loss(policy, loss, 1.0),
    sharding.make_mesh(*mesh),
    **settings,
  )


def change(learner, params, batch):
  """What one update adds to what is trained."""
  state = learner.start_from(jax.tree.map(jnp.copy, params))
  before = jax.tree.map(np.asarray, state.params)
  state, _ = learner.update(state, learner.place(batch))
  return jax.tree.map(
    lambda new, old: np.asarray(new) - old, state.params, before
  )


@pytest.fixture(scope="module")
def adapted(make_adapted):
  return make_adapted()


@pytest.fixture(scope="module")
def joined(adapted, params):
  return adapted.join(params, some_adapters(adapted))


@pytest.fixture(scope="module")
def reference(adapted, joined, batch):
  return change(make_learner(adapted), joined, batch)


def assert_close(got, want):
  error = jax.tree.map(lambda a, b: a - b, got, want)
  assert optax.tree.norm(error) < 2e-5 * optax.tree.norm(want)


@pytest.mark.slow
def test_gradients_follow_from_those_of_all_weights(
  adapted, policy, params, joined, batch, reference
):
  """d/dA = scale * dW B^T and d/dB = scale * A^T dW, at the merged weights."""
  whole = change(make_learner(policy), adapted.merged(joined), batch)
  adapters = lora.split(joined)[1]["layers"]
  times = lambda s, x, y: CONFIG.scale * np.einsum(s, x, y)
  want = {}
  for name, leaf in adapters.items():
    g = whole["layers"][name]["kernel"]
    want[name] = {
      lora.A: times("lio,lro->lir", g, leaf[lora.B]),
      lora.B: times("lir,lio->lro", leaf[lora.A], g),
    }
  assert optax.tree.norm(want) > 0.1
  assert_close(reference, {"layers": want})


@pytest.mark.slow
def test_microbatches_are_inert(adapted, joined, batch, reference):
  made = make_learner(adapted, n_microbatches=4)
  assert_close(change(made, joined, batch), reference)


@pytest.mark.slow
def test_eight_devices_equal_one(adapted, joined, batch, reference):
  made = make_learner(adapted, mesh=(2, 2, 2), n_microbatches=2)
  assert_close(change(made, joined, batch), reference)


@pytest.mark.slow
def test_only_adapters_are_in_the_state(make_adapted, params, batch):
  adapted = make_adapted(dataclasses.replace(CONFIG, base_dtype="bfloat16"))
  made = make_learner(adapted, mesh=(2, 2, 2), optimizer=optax.adam(1e-2))
  state = made.start_from(params, jax.random.key(3))
  n_adapters = sum(
    x.size
    for x in jax.tree.leaves(
      jax.eval_shape(adapted.init_adapters, jax.random.key(0))
    )
  )
  sizes = sum(x.size for x in jax.tree.leaves(state))
  # Adapters, two moments of each, two counters and two numbers of the base.
  assert sizes == 3 * n_adapters + 2 + 2
  describe = lambda x: (x.shape, x.dtype, x.sharding)
  assert jax.tree.map(describe, made.abstract_state) == jax.tree.map(
    describe, state
  )
  before = jax.tree.map(np.asarray, made.params(state.params))
  state, _ = made.update(state, made.place(batch))
  after = made.params(state.params)
  assert jax.tree.map(describe, lora.split(after)[0]) == jax.tree.map(
    describe, made.abstract_base
  )
  assert after["embed"]["embedding"].dtype == jnp.bfloat16
  assert after["final_norm"]["scale"].dtype == jnp.float32
  for (path, x), y in zip(
    jax.tree_util.tree_leaves_with_path(before),
    jax.tree.leaves(after),
    strict=True,
  ):
    # Where B is zero, A has no gradient.
    is_trained = path[-1].key == lora.B
    assert np.any(np.asarray(x) != np.asarray(y)) == is_trained, path


def test_no_update_without_a_base(adapted, batch):
  made = make_learner(adapted)
  state = made.start_from(adapted.init(jax.random.key(0)))
  other = make_learner(adapted)
  with pytest.raises(RuntimeError, match="start_from comes before"):
    other.update(state, other.place(batch))


# ------------------------------------------------------------------ fingerprint


@pytest.mark.slow
def test_fingerprint_knows_the_base(adapted, params):
  low = dataclasses.replace(CONFIG, base_dtype="bfloat16")
  seal = lambda params, config=low: tuple(
    np.asarray(jax.jit(lambda x: lora.sealed(x, config)[1])(params))
  )
  here = seal(params)
  mesh = sharding.make_mesh(2, 2, 2)
  spread = jax.device_put(params, sharding.param_shardings(mesh, params))
  assert here == seal(spread)
  assert here != seal(params, CONFIG)
  scale = params["final_norm"]["scale"]
  embedding = params["embed"]["embedding"]
  with_ = lambda embedding, scale=scale: (
    params
    | {
      "embed": {"embedding": embedding},
      "final_norm": {"scale": scale},
    }
  )
  # What is lost in bfloat16 is lost in the base as well.
  rounded = embedding.astype(jnp.bfloat16).astype(jnp.float32)
  assert seal(with_(rounded)) == here
  assert seal(with_(embedding.at[3, 4].multiply(1.01))) != here
  assert seal(with_(embedding[::-1])) != here
  assert seal(with_(embedding, scale.at[0].add(1e-6))) != here
  state = make_learner(adapted).start_from(params)
  assert tuple(np.asarray(state.base)) == seal(params, CONFIG)


# --------------------------------------------------------------------- sampling

SAMPLING = sampling.SamplingConfig(
  n_slots=4, chunk=5, cache_length=48, page=8, extend_chunk=8, extend_rows=2
)


def drawn(policy, params):
  """Ids of some rollouts and the engine's log-probs of those drawn."""
  engine = engine_lib.Engine(policy, SAMPLING, [40])
  engine.set_params(params)
  key_B2 = sampling.rollout_keys(0, 1, jnp.arange(4), jnp.zeros(4, int))
  prompts = np.random.default_rng(7).integers(0, 40, (4, 8)).astype(np.int32)
  requests = [
    engine_lib.Request(ids.tolist(), np.asarray(key), 30)
    for ids, key in zip(prompts, key_B2, strict=True)
  ]
  handles = engine.submit(requests)
  ids = {h: p.tolist() for h, p in zip(handles, prompts, strict=True)}
  logps = {h: [] for h in handles}
  while chunks := engine.decode():
    for handle, chunk in chunks.items():
      ids[handle] += chunk.tokens
      logps[handle] += chunk.logps
      if chunk.is_stopped:
        engine.release([handle])
  return np.array([*ids.values()]), np.array([*logps.values()]), engine


@pytest.mark.parametrize(
  "dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"]
)
@pytest.mark.slow
def test_engine_and_train_step_agree(make_adapted, params, dtype):
  config = dataclasses.replace(CONFIG, base_dtype=dtype)
  adapted = make_adapted(config, dtype=dtype)
  learner = make_learner(adapted)
  state = learner.start_from(adapted.join(params, some_adapters(adapted)))
  held = learner.params(state.params)
  ids_BT, logp_BT, engine = drawn(adapted, held)
  score = jax.jit(
    lambda params: step_lib.score(
      adapted, params, {"tokens_BT": ids_BT}, chunk=64, temperature=1.0
    )[0]
  )
  scored_BT = np.asarray(score(held))
  atol = 1e-5 if dtype == "float32" else 1e-3
  np.testing.assert_allclose(logp_BT, scored_BT[:, 8:], atol=atol)
  assert logp_BT.std() > 0.5
  # One base for both: the engine has no copy of what is frozen.
  for name in ("embed", "head", "final_norm"):
    for x, y in zip(
      jax.tree.leaves(held[name]),
      jax.tree.leaves(engine._params[name]),
      strict=True,
    ):
      assert x.unsafe_buffer_pointer() == y.unsafe_buffer_pointer()


@pytest.mark.slow
def test_steps_too_small_for_a_weight_are_not_lost(
  make_adapted, params, tokens_BT
):
  """Added to a bfloat16 matrix they would be rounded away."""
  config = dataclasses.replace(CONFIG, base_dtype="bfloat16")
  adapted = make_adapted(config, dtype="bfloat16")
  fused = adapted.fuse(lora.frozen(params, config))
  fresh = adapted.init_adapters(jax.random.key(0))
  step = lambda x: 2e-5 * jnp.sign(jnp.cos(jnp.arange(x.size))).reshape(x.shape)
  tiny = jax.tree.map(lambda x: x + step(x), fresh)
  merged = adapted.merged(adapted.join(lora.frozen(params, config), tiny))
  kernel = np.asarray(merged["layers"]["o_proj"]["kernel"])
  base = np.asarray(fused["layers"]["o_proj"]["kernel"])
  assert np.mean(kernel.astype(base.dtype) != base) < 0.1
  run = jax.jit(adapted.hidden)
  before, after = (
    np.asarray(run(adapted.hold(adapted.join(fused, x)), tokens_BT))
    for x in (fresh, tiny)
  )
  assert np.mean(before != after) > 0.5


def test_rank_of_fused_projections():
  assert SOME.rank_of("qkv_proj") == 3 and SOME.rank_of("gate_up_proj") == 3
  assert SOME.rank_of("o_proj") == 3 and SOME.rank_of("down_proj") == 0
  assert CONFIG.rank_of("qkv_proj") == 9 and CONFIG.scale == 2.0
  assert lora.LoraConfig().rank_of("qkv_proj") == 0
