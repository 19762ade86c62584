"""Bit-exact round trips, and what is left after cuts, flips and kill -9."""

import errno
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from roc import errors
from roc.device import checkpoint, manifest, saved_arrays
from tests import stores


def make_state(n=0):
  key = jax.random.key(n)
  return {
    "params": {
      "w": jax.random.normal(key, (16, 8)),
      "half": jax.random.normal(key, (5,)).astype(jnp.bfloat16),
    },
    "opt": (jnp.arange(7) + n, {"none": None, "empty": jnp.zeros((0, 3))}),
    "step": jnp.int32(n),
    "keys": {"one": key, "rows": jax.random.split(key, 4)},
    "counts": np.arange(3, dtype=np.int64) + n,
  }


def bits(x):
  if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
    x = jax.random.key_data(x)
  return np.asarray(x).tobytes()


def assert_equal_bits(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype and x.shape == y.shape
    assert bits(x) == bits(y)


def saved_steps(tmp_path, *steps, keep=3):
  checkpoints = checkpoint.Checkpoints(tmp_path / "c", keep=keep)
  for step in steps:
    checkpoints.save(step, make_state(step), {"cursor": step})
  return checkpoints


def data_files(path):
  return sorted(p for p in (path / "arrays").rglob("d/*") if p.is_file())


def test_round_trip_is_bit_exact(tmp_path):
  state = make_state(3)
  state["params"]["w"] = state["params"]["w"].at[0, 0].set(jnp.nan)
  state["params"]["w"] = state["params"]["w"].at[0, 1].set(-0.0)
  extra = {"cursor": 11, "shares": [0.1, 1e-300], "name": "é"}
  checkpoints = checkpoint.Checkpoints(tmp_path / "c")
  checkpoints.save(3, state, extra)
  restored = checkpoints.restore(make_state(0))
  assert restored.step == 3 and restored.extra == extra
  assert restored.notes == []
  assert_equal_bits(restored.state, state)
  assert isinstance(restored.state["counts"], np.ndarray)
  # The restored key draws what the saved one would have drawn.
  drawn = jax.random.uniform(restored.state["keys"]["one"], (3,))
  assert bits(drawn) == bits(jax.random.uniform(state["keys"]["one"], (3,)))


def test_nothing_saved_is_none(tmp_path):
  checkpoints = checkpoint.Checkpoints(tmp_path / "c")
  assert checkpoints.latest_step() is None
  assert checkpoints.restore(make_state()) is None
  assert not (tmp_path / "c").exists()


def test_keeps_the_newest(tmp_path):
  checkpoints = saved_steps(tmp_path, 1, 2, 10, 11, keep=2)
  assert checkpoints.steps() == [10, 11]
  assert checkpoints.latest_step() == 11
  assert len(list((tmp_path / "c").iterdir())) == 2
  assert checkpoints.restore(make_state(), step=10).extra == {"cursor": 10}


def test_newer_ones_are_set_aside(tmp_path):
  """Else they would be restored, and what is saved next removed as old."""
  checkpoints = saved_steps(tmp_path, 5, 10, 15, keep=2)
  aside = tmp_path / "aside"
  assert checkpoints.set_aside(15, aside) == [] and not aside.exists()
  assert checkpoints.set_aside(10, aside) == [15]
  assert checkpoints.steps() == [10]
  assert checkpoint.Checkpoints(aside).restore(make_state()).step == 15
  checkpoints.save(11, make_state(11), {})
  assert checkpoints.steps() == [10, 11]
  assert checkpoints.newest_whole_step() == 11
  flip(checkpoints.path(11) / "manifest.json")
  assert checkpoints.newest_whole_step() == 10


def test_the_count_of_an_older_schedule_is_not_missed(tmp_path):
  """It was saved beside Adam's; nothing reads it any more."""
  count, mu = jnp.int32(4), jnp.ones(3)
  state = {
    "opt_state": [{}, [{"count": count, "mu": mu}, {}, {"count": count}]]
  }
  checkpoints = checkpoint.Checkpoints(tmp_path)
  checkpoints.save(1, state, {})
  wanted = {"opt_state": [{}, [{"count": count, "mu": mu}, {}, {}]]}
  assert_equal_bits(checkpoints.restore(wanted).state, wanted)
  del wanted["opt_state"][1][0]["mu"]
  with pytest.raises(errors.UserError, match="mu is .* should not be there"):
    checkpoints.restore(wanted)


def test_saving_a_step_again_replaces_it(tmp_path):
  checkpoints = saved_steps(tmp_path, 4)
  checkpoints.save(4, make_state(9), {"cursor": "again"})
  restored = checkpoints.restore(make_state())
  assert restored.extra == {"cursor": "again"}
  assert_equal_bits(restored.state, make_state(9))
  assert [p.name for p in (tmp_path / "c").iterdir()] == ["step_00000004"]


@pytest.mark.bits
def test_restores_onto_another_mesh(tmp_path):
  def sharded(shape, names, spec):
    mesh = jax.make_mesh(
      shape, names, axis_types=(jax.sharding.AxisType.Auto,) * len(names)
    )
    return jax.sharding.NamedSharding(mesh, spec)

  spec = jax.sharding.PartitionSpec
  w = jax.random.normal(jax.random.key(1), (16, 8))
  on_8 = sharded((4, 2), ("fsdp", "tensor"), spec("fsdp", "tensor"))
  key = jax.device_put(jax.random.key(7), sharded((8,), ("x",), spec()))
  checkpoints = checkpoint.Checkpoints(tmp_path / "c")
  checkpoints.save(1, {"w": jax.device_put(w, on_8), "key": key}, {})
  for new in (
    sharded((2, 4), ("data", "fsdp"), spec(None, "fsdp")),
    jax.sharding.SingleDeviceSharding(jax.devices()[3]),
  ):
    abstract = {
      "w": jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=new),
      "key": jax.ShapeDtypeStruct((), key.dtype),
    }
    state = checkpoints.restore(abstract).state
    assert state["w"].sharding == new
    assert bits(state["w"]) == bits(w)
    assert bits(state["key"]) == bits(key)


def test_partial_restore_reads_some_arrays(tmp_path):
  checkpoints = saved_steps(tmp_path, 2)
  wanted = {"params": make_state(0)["params"]}
  restored = checkpoints.restore(wanted, is_partial=True)
  assert_equal_bits(restored.state, {"params": make_state(2)["params"]})


def flip(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 4
  path.write_bytes(data)


def cut(path):
  path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("harm", [flip, cut, pathlib.Path.unlink])
@pytest.mark.parametrize("which", ["arrays", "extra.json", "manifest.json"])
def test_harm_falls_back_to_the_newest_whole_one(tmp_path, harm, which):
  checkpoints = saved_steps(tmp_path, 5, 10)
  newest = checkpoints.path(10)
  harm(data_files(newest)[0] if which == "arrays" else newest / which)
  restored = checkpoints.restore(make_state())
  assert restored.step == 5
  assert_equal_bits(restored.state, make_state(5))
  assert len(restored.notes) == 1 and str(newest) in restored.notes[0]
  assert newest.exists()


def test_every_data_file_is_watched(tmp_path):
  checkpoints = saved_steps(tmp_path, 5)
  files = [
    p
    for p in checkpoints.path(5).rglob("*")
    if p.is_file() and p.stat().st_size
  ]
  assert len(files) > 4
  for path in files:
    original = path.read_bytes()
    flip(path)
    with pytest.raises(manifest.Broken):
      manifest.verify(checkpoints.path(5))
    path.write_bytes(original)
  manifest.verify(checkpoints.path(5))


def test_no_whole_one_is_an_error_that_names_them(tmp_path):
  checkpoints = saved_steps(tmp_path, 5, 10)
  for step in (5, 10):
    cut(checkpoints.path(step) / "extra.json")
  with pytest.raises(errors.UserError, match="step_00000010.*step_00000005"):
    checkpoints.restore(make_state())


def test_a_step_that_is_not_there(tmp_path):
  """Nothing is wrong with the directory, so nothing is to be moved."""
  checkpoints = saved_steps(tmp_path, 35, 40)
  with pytest.raises(errors.UserError) as e:
    checkpoints.restore(make_state(), step=20)
  assert "there is no checkpoint of step 20 under" in str(e.value)
  assert "there is 35, 40" in str(e.value) and "move" not in str(e.value)
  cut(checkpoints.path(40) / "extra.json")
  with pytest.raises(errors.UserError, match="step 40 .*is not whole") as e:
    checkpoints.restore(make_state(), step=40)
  assert "there is 35" in str(e.value) and "move" not in str(e.value)


def test_a_broken_one_is_set_aside_when_its_step_comes_again(tmp_path):
  checkpoints = saved_steps(tmp_path, 5, 10)
  cut(checkpoints.path(10) / "extra.json")
  checkpoints.save(10, make_state(10), {})
  assert checkpoints.restore(make_state()).step == 10
  assert (tmp_path / "c" / "broken_step_00000010_0").is_dir()


@pytest.mark.parametrize(
  "change, text",
  [
    (lambda s: s["params"].update(w=jnp.zeros((4, 4))), r"float32\[4,4\]"),
    (lambda s: s.update(step=jnp.float32(0)), r"step is int32\[\]"),
    (lambda s: s.pop("step"), "should not be there"),
    (lambda s: s.update(new=jnp.zeros(2)), "new is not in it"),
  ],
)
def test_another_shape_dtype_or_tree_is_no_fallback(tmp_path, change, text):
  checkpoints = saved_steps(tmp_path, 5, 10)
  abstract = make_state()
  change(abstract)
  with pytest.raises(errors.UserError, match=text) as e:
    checkpoints.restore(abstract)
  assert "step_00000010" in str(e.value)


# ------------------------------------------------------- where nothing renames


@pytest.fixture
def store(monkeypatch):
  with stores.serving(monkeypatch) as store:
    yield store


def remote(keep=3):
  return checkpoint.Checkpoints("gs://bucket/run/checkpoints", keep=keep)


def test_an_object_store_holds_the_same(store):
  checkpoints = remote(keep=2)
  assert checkpoints.restore(make_state(0)) is None
  for step in (1, 2, 3, 3):
    path = checkpoints.save(step, make_state(step), {"cursor": step})
    assert str(path) == f"gs://bucket/run/checkpoints/step_{step:08d}"
  assert checkpoints.steps() == [2, 3]
  assert {key.split("/")[3] for key in store.objects} == {
    *("step_00000002", "step_00000003")
  }
  restored = remote().restore(make_state(0))
  assert restored.step == 3 and restored.extra == {"cursor": 3}
  assert_equal_bits(restored.state, make_state(3))
  wanted = {"params": make_state(0)["params"]}
  restored = remote().restore(wanted, step=2, is_partial=True)
  assert_equal_bits(restored.state, {"params": make_state(2)["params"]})


def test_in_an_object_store_the_manifest_makes_it_whole(store):
  """Whatever of a save is there when the process dies, the older one counts."""
  checkpoints = remote(keep=1)
  checkpoints.save(1, make_state(1), {})
  before = dict(store.objects)
  checkpoints.save(2, make_state(2), {})
  saved = {k: v for k, v in store.objects.items() if k not in before}
  assert list(saved)[-1].endswith("step_00000002/manifest.json")
  for key in saved:
    store.delete(key)
  for key, data in before.items():  # saving the second took the first away
    store.put(key, data)
  for key in list(saved)[:-1]:
    store.put(key, saved[key])
    restored = remote().restore(make_state(0))
    assert restored.step == 1
    assert "step_00000002: manifest.json is missing" in restored.notes[0]
  checkpoints.save(3, make_state(3), {})
  assert checkpoints.steps() == [3]
  assert remote().restore(make_state(0)).step == 3


@pytest.mark.parametrize("harm", ["cut", "removed"])
def test_sizes_are_watched_in_an_object_store(store, harm):
  checkpoints = remote()
  for step in (1, 2):
    checkpoints.save(step, make_state(step), {})
  key = next(k for k in store.objects if "step_00000002/arrays/d/" in k)
  if harm == "cut":
    store.objects[key] = store.objects[key][:-1]
  else:
    store.delete(key)
  restored = checkpoints.restore(make_state(0))
  assert restored.step == 1
  why = "bytes and had" if harm == "cut" else "is missing"
  assert why in restored.notes[0]


# Orbax closes its event loop while a write that it gave up is still under way.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("n_writes", [0, 3, -1])
def test_a_store_that_refuses_is_one_sentence(store, n_writes):
  """At the first write, in the middle, and at the last, the manifest."""
  checkpoints = remote()
  checkpoints.save(1, make_state(1), {})
  store.fail_after = n_writes % store.n_written
  with pytest.raises(errors.UserError, match="step 2 under gs://") as e:
    checkpoints.save(2, make_state(2), {})
  assert "Permission denied; the one of step 1 is untouched" in str(e.value)
  store.fail_after = -1
  assert checkpoints.steps() == [1]
  assert checkpoints.restore(make_state(0)).step == 1


def test_a_store_without_its_package(monkeypatch):
  monkeypatch.setitem(sys.modules, "gcsfs", None)
  with pytest.raises(errors.UserError, match="install the package gcsfs"):
    remote().restore(make_state(0))


def test_python_numbers_belong_into_extra(tmp_path):
  checkpoints = checkpoint.Checkpoints(tmp_path / "c")
  with pytest.raises(TypeError, match="leaf step"):
    checkpoints.save(1, {"step": 3}, {})


def test_full_disk_leaves_the_older_one(tmp_path, monkeypatch):
  checkpoints = saved_steps(tmp_path, 5)

  def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(manifest, "write", full)
  with pytest.raises(errors.UserError, match="No space left.*step 5"):
    checkpoints.save(10, make_state(10), {})
  assert checkpoints.steps() == [5]
  assert [p.name for p in (tmp_path / "c").iterdir()] == ["step_00000005"]
  assert checkpoints.restore(make_state()).step == 5


def test_full_disk_reported_by_the_array_writer(tmp_path, monkeypatch):
  checkpoints = saved_steps(tmp_path, 5)

  def full(*_, **__):
    raise ValueError("RESOURCE_EXHAUSTED: x [No space left on device]")

  monkeypatch.setattr(saved_arrays, "write", full)
  with pytest.raises(errors.UserError, match="cannot write the checkpoint"):
    checkpoints.save(10, make_state(10), {})


_SAVER = textwrap.dedent("""
  import sys
  import jax
  import jax.numpy as jnp
  from roc.device import checkpoint

  checkpoints = checkpoint.Checkpoints(sys.argv[1], keep=2)
  state = {"w": jnp.zeros((256, 1024)), "step": jnp.int32(0)}
  for step in range(1, 10_000):
    state = {"w": state["w"] + 1, "step": state["step"] + 1}
    checkpoints.save(step, state, {"cursor": step})
    print(step, flush=True)
""")


def test_kill_9_while_saving_leaves_a_whole_one(tmp_path):
  directory = tmp_path / "c"
  process = subprocess.Popen(
    [sys.executable, "-c", _SAVER, str(directory)],
    stdout=subprocess.PIPE,
    env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.getcwd()},
  )
  try:
    for n, wait_s in ((2, 0.02), (3, 0.08)):
      for _ in range(n):
        printed = int(process.stdout.readline())
      time.sleep(wait_s)
    os.kill(process.pid, signal.SIGKILL)
    rest = process.stdout.read().split()
  finally:
    process.kill()
    process.wait()
    process.stdout.close()
  finished = int(rest[-1]) if rest else printed
  abstract = {
    "w": jax.ShapeDtypeStruct((256, 1024), jnp.float32),
    "step": jax.ShapeDtypeStruct((), jnp.int32),
  }
  restored = checkpoint.Checkpoints(directory).restore(abstract)
  assert restored.step >= finished
  assert restored.extra == {"cursor": restored.step}
  assert int(restored.state["step"]) == restored.step
  assert bits(restored.state["w"]) == bits(
    jnp.full((256, 1024), restored.step, jnp.float32)
  )
