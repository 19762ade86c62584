"""The TPU kernels inside whole programs, compiled for TPUs that are not there.

libtpu compiles for a described machine, and refuses what does not fit its
memory; nothing runs. It comes with requirements-tpu.txt, not with the lock
file: without it everything here is skipped.
"""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import topologies

from benchmarks import memory as memory_lib
from roc.device import decoding, model, sampling, sharding
from roc.device import learner as learner_lib
from roc.device import step as step_lib

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs libtpu to compile for TPU (requirements-tpu.txt)",
  ),
]

MACHINES = {"v5p": "v5:2x2x1", "v6e": "v6e:2x2"}  # 4 chips each
# The shape of Qwen3-0.6B.
CONFIG = model.ModelConfig(
  vocab_size=151_936,
  d_model=1024,
  n_layers=28,
  n_heads=16,
  n_kv_heads=8,
  head_dim=128,
  d_ff=3072,
  rope_theta=1e6,
  dtype="bfloat16",
  remat="full",
  attention="pallas",
)
SAMPLING = sampling.SamplingConfig(
  n_slots=64,
  extend_chunk=256,
  extend_rows=16,
  cache_length=4096,
  cache_tokens=65_536,
  max_tokens=3072,
)
N_PAGES = SAMPLING.cache_tokens // SAMPLING.page
# Keys and values of 8 heads of 128 in bfloat16, in 28 layers.
POOL_BYTES = SAMPLING.cache_tokens * 28 * 2 * 8 * 128 * 2
KERNEL = "tpu_custom_call"  # what a Pallas kernel is in compiled text


@pytest.fixture(scope="module", params=MACHINES)
def devices(request):
  # A lock keeps two processes off one TPU, even where there is none.
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    patch.setenv("TPU_SKIP_MDS_QUERY", "1")
    topology = topologies.get_topology_desc(
      platform="tpu", topology_name=MACHINES[request.param]
    )
  return np.array(topology.devices)


def mesh_of(devices, data, fsdp, tensor):
  n = data * fsdp * tensor
  return jax.sharding.Mesh(
    devices[:n].reshape(data, fsdp, tensor),
    sharding.MESH_AXES,
    axis_types=(jax.sharding.AxisType.Auto,) * 3,
  )


def on(mesh, tree):
  """Shapes of arrays as placed on every device of the mesh."""
  whole = sharding.replicated(mesh)
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), tree
  )


def compile_for(mesh, jitted, *args, **options):
  # A kernel asks its mesh for the kind of device, else the local machine.
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    compiled = jitted.lower(*args).compile(options)
  return compiled, compiled.memory_analysis()


def engine_programs(mesh):
  """The engine's programs, with shapes of their weights and pool."""
  policy = model.Policy(CONFIG)
  programs = decoding.Programs(policy, SAMPLING, stop_ids=[151_645])
  params = jax.eval_shape(policy.fuse, policy.abstract_params)
  pool = jax.eval_shape(lambda: policy.empty_pool(N_PAGES, SAMPLING.page))
  return programs, on(mesh, params), on(mesh, pool)


def ints(mesh, *shape):
  return on(mesh, jax.ShapeDtypeStruct(shape, jnp.int32))


def assert_no_second_pool(memory):
  """The pool is updated in place: it comes out where it went in."""
  assert memory.alias_size_in_bytes >= POOL_BYTES
  assert memory.temp_size_in_bytes < POOL_BYTES / 4


def test_drawing_compiles(devices):
  mesh = mesh_of(devices, 1, 1, 1)
  programs, params, pool = engine_programs(mesh)
  S, J = SAMPLING.n_slots, SAMPLING.cache_length // SAMPLING.page
  rows = decoding.Rows(
    ints(mesh, S, J),
    *(ints(mesh, S) for _ in range(3)),
    on(mesh, jax.ShapeDtypeStruct((S, 2), jnp.uint32)),
  )
  compiled, memory = compile_for(
    mesh, programs.draw, params, pool, rows, ints(mesh)
  )
  print(report(memory))
  assert KERNEL in compiled.as_text()
  assert_no_second_pool(memory)


def test_feeding_compiles(devices):
  mesh = mesh_of(devices, 1, 1, 1)
  programs, params, pool = engine_programs(mesh)
  R, T = SAMPLING.extend_rows, SAMPLING.extend_chunk
  J = SAMPLING.cache_length // SAMPLING.page
  compiled, memory = compile_for(
    mesh,
    programs.feed,
    *(params, pool, ints(mesh, R, J), ints(mesh, R), ints(mesh, R)),
    ints(mesh, R, T),
  )
  print(report(memory))
  assert KERNEL in compiled.as_text()
  assert_no_second_pool(memory)


def test_copying_and_clearing_compile(devices):
  mesh = mesh_of(devices, 1, 1, 1)
  programs, _, pool = engine_programs(mesh)
  page_R = ints(mesh, SAMPLING.extend_rows)
  for jitted, args in (
    (programs.copy, (page_R, page_R)),
    (programs.clear, (page_R,)),
  ):
    _, memory = compile_for(mesh, jitted, pool, *args)
    print(report(memory))
    assert_no_second_pool(memory)


def test_the_update_compiles(devices):
  """Rows over 2 chips, heads over 2; 8 rows of 4096 tokens."""
  mesh = mesh_of(devices, 1, 2, 2)
  policy = model.Policy(CONFIG, mesh)
  learner = learner_lib.Learner(
    policy,
    optax.adamw(1e-6),
    step_lib.grpo_loss(policy, step_lib.LossConfig(), 1.0),
    mesh,
  )
  shape, rows = (8, 4096), sharding.batch_sharding(mesh)
  batch = {
    name: jax.ShapeDtypeStruct(shape, dtype, sharding=rows)
    for name, dtype in (
      *(("tokens_BT", jnp.int32), ("roles_BT", jnp.int8)),
      *(("logp_sampler_BT", jnp.float32), ("logp_old_BT", jnp.float32)),
      ("weight_BT", jnp.float32),
    )
  }
  batch["advantage_B"] = jax.ShapeDtypeStruct(
    shape[:1], jnp.float32, sharding=rows
  )
  rate = jax.ShapeDtypeStruct(
    (), jnp.float32, sharding=sharding.replicated(mesh)
  )
  compiled, memory = compile_for(
    *(mesh, learner.jitted, learner.abstract_state, {}, batch, rate),
    optimization_level=19,  # O1: a third of the time
  )
  print(report(memory))
  assert KERNEL in compiled.as_text()


def test_adapters_of_1_7b_fit_16_gb(monkeypatch):
  """State, base, cache and the update together, on one chip of v5e."""
  monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  found = list(memory_lib.measure(memory_lib.parse(["--machine=v5e"])))
  print(*(f"{row.case} {row.ours:.2f} {row.unit}" for row in found), sep="\n")
  held = sum(row.ours for row in found if row.peer is None)
  most = next(row for row in found if row.peer is not None)
  # All the parts are there: the base alone is 3.4 GB, the cache 3.8.
  assert 7.5 < most.ours < 13.0 <= most.peer
  assert most.ours < held + 0.1


def report(memory):
  """A line for those who read the test's output."""
  gb = lambda n: f"{n / 1e9:.3f} GB"
  return ", ".join(
    f"{name} {gb(getattr(memory, f'{name}_size_in_bytes'))}"
    for name in ("argument", "output", "alias", "temp", "generated_code")
  )
