"""Weights of small models of every family: what they compute, in and out."""

import json
import pathlib
import shutil
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from roc import errors
from roc.core import logprobs
from roc.device import engine as engine_lib
from roc.device import families, model, sampling, sharding, weights

MODELS = pathlib.Path(__file__).parents[1] / "golden" / "models"
FAMILIES = ("qwen2", "qwen3", "llama", "yarn")


def mesh(*shape):
  return sharding.make_mesh(*(shape or (1, 1, 1)))


def load(folder, *shape):
  policy = model.Policy(families.read(folder))
  return policy, weights.load(folder, policy, mesh(*shape))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", FAMILIES)
def test_scores_equal_the_reference(name, side):
  """Log-probs and entropies of padded rows, against transformers."""
  policy, params = load(MODELS / name)
  golden = np.load(MODELS / name / "golden.npz")
  ids_BT, mask_BT = golden[f"{side}_ids"], golden[f"{side}_mask"]
  position_BT = np.maximum(np.cumsum(mask_BT, axis=-1) - 1, 0)
  hidden_BTD = policy.hidden(params, ids_BT, position_BT, mask_BT)
  logp_BT, entropy_BT = logprobs.token_logprobs(
    hidden_BTD[:, :-1], policy.unembedding(params), ids_BT[:, 1:]
  )
  is_scored_BT = (mask_BT[:, :-1] * mask_BT[:, 1:]).astype(bool)
  assert is_scored_BT.sum() == golden["length"].sum() - len(ids_BT)
  for got_BT, want_BT in (
    (logp_BT, golden[f"{side}_logp"]),
    (entropy_BT, golden[f"{side}_entropy"][:, :-1]),
  ):
    np.testing.assert_allclose(
      np.asarray(got_BT)[is_scored_BT], want_BT[is_scored_BT], atol=1e-5
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_the_engine_draws_the_reference_s_greedy_tokens(name):
  policy, params = load(MODELS / name)
  golden = np.load(MODELS / name / "golden.npz")
  config = sampling.SamplingConfig(
    n_slots=2, chunk=7, extend_chunk=4, cache_length=64, temperature=0.0
  )
  engine = engine_lib.Engine(policy, config, [10_000])
  engine.set_params(params)
  rows = zip(golden["right_ids"], golden["length"], strict=True)
  handles = engine.submit(
    [
      engine_lib.Request(ids_T[:n].tolist(), np.zeros(2, np.uint32), 24)
      for ids_T, n in rows
    ]
  )
  tokens = {handle: [] for handle in handles}
  while drawn := engine.decode():
    for handle, chunk in drawn.items():
      tokens[handle] += chunk.tokens
    engine.release([h for h, chunk in drawn.items() if chunk.is_stopped])
  want = [ids.tolist() for ids in golden["greedy"]]
  assert [tokens[handle] for handle in handles] == want
  assert len({tuple(ids) for ids in want}) == 3


@pytest.mark.parametrize("name", FAMILIES)
def test_a_mesh_holds_the_same_numbers(name):
  _, plain = load(MODELS / name)
  policy, params = load(MODELS / name, 2, 2, 2)
  jax.tree.map(np.testing.assert_array_equal, params, plain)
  kernel = params["layers"]["gate_proj"]["kernel"]
  want = sharding.param_shardings(mesh(2, 2, 2), policy.abstract_params)
  assert kernel.sharding == want["layers"]["gate_proj"]["kernel"]
  assert kernel.addressable_shards[0].data.size == kernel.size // 4


def test_no_device_waits_for_another():
  """Each converts and puts into place what it was given."""
  policy = model.Policy(families.read(MODELS / "qwen3"))
  kernel = policy.abstract_params["layers"]["o_proj"]["kernel"]
  path = "layers/o_proj/kernel"
  where = sharding.param_sharding(mesh(2, 2, 2), path, kernel.shape)
  spec = jax.sharding.PartitionSpec(*where.spec[1:])
  of_layer = jax.sharding.NamedSharding(mesh(2, 2, 2), spec)
  stack = jax.ShapeDtypeStruct(kernel.shape, jnp.float32, sharding=where)
  layer = jax.ShapeDtypeStruct(
    kernel.shape[1:], jnp.bfloat16, sharding=of_layer
  )
  program = weights._put_layer(where).lower(stack, layer, 1).compile().as_text()
  assert "dynamic-update-slice" in program
  for word in ("all-gather", "all-reduce", "all-to-all", "collective"):
    assert word not in program


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_one_tensor_is_held_at_a_time(monkeypatch, shape):
  held, most = [], []
  plain = np.memmap

  def mapped(*args, **kwargs):
    most.append(sum(ref() is not None for ref in held))
    found = plain(*args, **kwargs)
    held.append(weakref.ref(found))
    return found

  monkeypatch.setattr(np, "memmap", mapped)
  policy, _ = load(MODELS / "qwen3", *shape)
  assert len(held) == 2 + 11 * policy.config.n_layers
  assert set(most) == {0}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_matrices_may_be_kept_in_sixteen_bits(dtype, shape):
  policy, plain = load(MODELS / "qwen2", *shape)
  params = weights.load(MODELS / "qwen2", policy, mesh(*shape), dtype=dtype)
  for path, x in jax.tree_util.tree_leaves_with_path(params):
    is_vector = path[-1].key in ("scale", "bias")
    assert x.dtype == (jnp.float32 if is_vector else jnp.dtype(dtype))
  rounded = jax.tree.map(lambda x, y: y.astype(x.dtype), params, plain)
  jax.tree.map(np.testing.assert_array_equal, params, rounded)


def tensors_of(folder):
  found = {}
  for path in folder.glob("*.safetensors"):
    found |= safetensors.numpy.load_file(path)
  return found


@pytest.mark.parametrize("shard_bytes", [1 << 30, 40_000])
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_exported_is_what_was_read(tmp_path, name, shard_bytes):
  policy, params = load(MODELS / name, 1, 2, 2)
  out = tmp_path / "out"
  weights.export(
    params, policy.config, out, dtype="float32", shard_bytes=shard_bytes
  )
  got, want = tensors_of(out), tensors_of(MODELS / name)
  assert got.keys() == want.keys()
  jax.tree.map(np.testing.assert_array_equal, got, want)
  n_files = len(list(out.glob("*.safetensors")))
  assert (
    (n_files > 1)
    == (shard_bytes == 40_000)
    == (out / weights.INDEX_FILE).exists()
  )
  again, params_again = load(out)
  assert again.config == policy.config
  jax.tree.map(np.testing.assert_array_equal, params_again, params)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits(tmp_path, dtype):
  policy, params = load(MODELS / "qwen3")
  weights.export(params, policy.config, tmp_path / "out", dtype=dtype)
  assert {str(x.dtype) for x in tensors_of(tmp_path / "out").values()} == {
    dtype
  }
  _, again = load(tmp_path / "out")
  rounded = jax.tree.map(lambda x: x.astype(dtype).astype(jnp.float32), params)
  jax.tree.map(np.testing.assert_array_equal, again, rounded)


# ------------------------------------------------------------------ bad folders


@pytest.fixture
def folder(tmp_path):
  made = tmp_path / "model"
  shutil.copytree(MODELS / "qwen3", made)
  (made / "model.safetensors").chmod(0o644)
  return made


def rewrite(folder, change):
  path = folder / "model.safetensors"
  tensors = safetensors.numpy.load_file(path)
  change(tensors)
  safetensors.numpy.save_file(tensors, path)


def assert_refused(folder, sentence):
  with pytest.raises(errors.UserError, match=sentence) as caught:
    load(folder)
  assert str(folder) in str(caught.value)
  assert len(str(caught.value).splitlines()) == 1


def test_missing_tensors_are_named(folder):
  names = [f"model.layers.{i}.self_attn.q_norm.weight" for i in range(3)]
  rewrite(folder, lambda tensors: [tensors.pop(name) for name in names])
  assert_refused(folder, f"lacks {names[0]}, {names[1]}, {names[2]}$")


def test_many_missing_tensors_are_counted(folder):
  rewrite(folder, lambda tensors: [tensors.pop(n) for n in list(tensors)[5:]])
  assert_refused(folder, "lacks .* and 25 more")


def test_tensors_that_are_left_over_are_named(folder):
  extra = np.zeros(3, np.float32)
  rewrite(folder, lambda tensors: tensors.update({"visual.patch": extra}))
  assert_refused(folder, "no place for, visual.patch")


def test_a_head_beside_a_tied_one_is_no_fault(folder):
  """Some exports hold both; and old ones the rotary frequencies."""
  extra = {
    "lm_head.weight": np.zeros((96, 32), np.float32),
    "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(8, np.float32),
  }
  _, plain = load(folder)
  rewrite(folder, lambda tensors: tensors.update(extra))
  _, params = load(folder)
  jax.tree.map(np.testing.assert_array_equal, params, plain)
  assert "head" not in params


def test_a_model_saved_without_its_head(folder):
  """Names then lack `model.`, as transformers writes and reads them."""
  _, plain = load(folder)
  bare = lambda tensors: {
    k.removeprefix("model."): v for k, v in tensors.items()
  }

  def rename(tensors):
    found = bare(tensors)
    tensors.clear()
    tensors.update(found)

  rewrite(folder, rename)
  fields = json.loads((folder / "config.json").read_text())
  fields["architectures"] = ["Qwen3Model"]
  (folder / "config.json").write_text(json.dumps(fields))
  _, params = load(folder)
  jax.tree.map(np.testing.assert_array_equal, params, plain)
  # A head of its own is then missing, and said to be.
  fields["tie_word_embeddings"] = False
  (folder / "config.json").write_text(json.dumps(fields))
  assert_refused(folder, "lacks lm_head.weight$")


def test_two_sets_of_weights_are_refused(folder):
  (folder / weights.INDEX_FILE).write_text(json.dumps(split(folder)))
  load(folder)
  shutil.copy(MODELS / "qwen3" / "model.safetensors", folder)
  assert_refused(folder, "holds two sets of weights: model.safetensors beside")
  (folder / "model.safetensors").unlink()
  other = folder / "model-00001-of-00007.safetensors"
  shutil.copy(MODELS / "qwen3" / "model.safetensors", other)
  assert_refused(folder, "two sets of weights: model-00001-of-00007.safetensor")


def test_a_tensor_of_another_shape_is_named(folder):
  name = "model.layers.1.mlp.up_proj.weight"
  rewrite(
    folder, lambda tensors: tensors.update({name: tensors[name].T.copy()})
  )
  assert_refused(folder, rf"{name} is of shape \(32, 56\).*says \(56, 32\)")


@pytest.mark.parametrize("n_bytes", [0, 5, 3_000, 100_000])
def test_files_that_are_cut_off(folder, n_bytes):
  path = folder / "model.safetensors"
  path.write_bytes(path.read_bytes()[:n_bytes])
  assert_refused(folder, "model.safetensors is no whole safetensors file")


def test_files_that_are_missing(folder):
  (folder / "model.safetensors").unlink()
  assert_refused(folder, "holds neither model.safetensors nor")
  index = folder / weights.INDEX_FILE
  index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
  assert_refused(folder, "model-1.safetensors is missing")
  for text in ("{", "[]", "{}", '{"weight_map": 3}'):
    index.write_text(text)
    assert_refused(folder, "is no index of safetensors")


def split(folder):
  """The model in two files with an index, whose text is returned."""
  path = folder / "model.safetensors"
  tensors = safetensors.numpy.load_file(path)
  names = sorted(tensors)
  weight_map = {}
  for file, part in (("a", names[:9]), ("b", names[9:])):
    file = f"{file}.safetensors"
    some = {name: tensors[name] for name in part}
    safetensors.numpy.save_file(some, folder / file)
    weight_map |= dict.fromkeys(part, file)
  path.unlink()
  return {"metadata": {"total_size": 1}, "weight_map": weight_map}


def test_an_index_is_believed_where_it_matters(folder):
  """Not in its total size: the headers say what there is, to the byte."""
  _, plain = load(folder)
  index, path = split(folder), folder / weights.INDEX_FILE
  path.write_text(json.dumps(index))
  _, params = load(folder)
  jax.tree.map(np.testing.assert_array_equal, params, plain)
  moved = {**index["weight_map"], "model.norm.weight": "a.safetensors"}
  path.write_text(json.dumps({"weight_map": moved}))
  assert_refused(folder, "says that model.norm.weight is in a.safetensors, wh")
  for file in ("../a.safetensors", "/a.safetensors", "", ".", "..", 7, None):
    path.write_text(json.dumps({"weight_map": {"model.norm.weight": file}}))
    assert_refused(folder, "is no index of safetensors")


def test_a_tensor_in_two_files(folder):
  index, path = split(folder), folder / weights.INDEX_FILE
  path.write_text(json.dumps(index))
  tensors = safetensors.numpy.load_file(folder / "b.safetensors")
  tensors |= safetensors.numpy.load_file(folder / "a.safetensors")
  safetensors.numpy.save_file(tensors, folder / "b.safetensors")
  assert_refused(folder, "is in both a.safetensors and b.safetensors")


@pytest.mark.parametrize(
  ("dtype", "kind"),
  [(np.int8, "I8"), (np.float64, "F64"), (jnp.float8_e4m3fn, "F8_E4M3")],
)
def test_types_that_are_no_weights(folder, dtype, kind):
  name = "model.layers.1.mlp.up_proj.weight"
  change = lambda tensors: tensors.update({name: tensors[name].astype(dtype)})
  rewrite(folder, change)
  assert_refused(folder, f"{name} is of type {kind}; weights must be F32, F16")


def test_numbers_that_are_not_aligned(folder):
  """As behind a tensor of an odd number of bytes."""
  _, plain = load(folder)
  header, numbers = take_apart(folder)
  put_together(folder, header, numbers, n_spaces=1)
  _, params = load(folder)
  jax.tree.map(np.testing.assert_array_equal, params, plain)


def take_apart(folder):
  data = (folder / "model.safetensors").read_bytes()
  n = int.from_bytes(data[:8], "little")
  return json.loads(data[8 : 8 + n]), data[8 + n :]


def put_together(folder, header, numbers, n_spaces=0):
  text = header if isinstance(header, str) else json.dumps(header)
  text = text.encode()
  text += b" " * (-len(text) % 8 + n_spaces)
  path = folder / "model.safetensors"
  path.write_bytes(len(text).to_bytes(8, "little") + text + numbers)


NORM = "model.norm.weight"


@pytest.mark.parametrize(
  ("change", "why"),
  [
    ({"dtype": "F31"}, f"{NORM} is of an unknown type"),
    ({"dtype": ["F32"]}, "its header cannot be read"),
    ({"shape": [31]}, f"{NORM} does not fit its place"),
    ({"shape": [-32]}, f"{NORM} has no place"),
    ({"shape": [32.0]}, f"{NORM} has no place"),
    ({"shape": 32}, "its header cannot be read"),
    ({"data_offsets": [0, 128]}, "overlap or leave gaps"),
    ({"data_offsets": [10**9, 10**9 + 128]}, "overlap or leave gaps"),
    ({"data_offsets": [128]}, "its header cannot be read|not enough values"),
    ({"data_offsets": [128, 0]}, f"{NORM} does not fit its place"),
  ],
)
def test_headers_that_lie(folder, change, why):
  header, numbers = take_apart(folder)
  header[NORM] |= change
  put_together(folder, header, numbers)
  assert_refused(folder, f"no whole safetensors file .*{why}.*; fetch it again")


@pytest.mark.parametrize(
  ("header", "why"),
  [
    ("[]", "its header cannot be read"),
    ("{", "its header cannot be read"),
    ("[" * 10_000, "its header cannot be read"),
    ('{"a": 3}', "its header cannot be read"),
    ('{"a": {}, "a": {}}', "names a tensor twice"),
  ],
)
def test_headers_that_are_none(folder, header, why):
  put_together(folder, header, b"")
  assert_refused(folder, f"no whole safetensors file .*{why}.*; fetch it again")


def test_bytes_beyond_the_end(folder):
  path = folder / "model.safetensors"
  path.write_bytes(path.read_bytes() + b"\0" * 8)
  assert_refused(folder, "it has .* bytes and should have")


def test_files_that_cannot_be_read(folder):
  path = folder / "model.safetensors"
  path.unlink()
  path.mkdir()
  assert_refused(folder, "model.safetensors cannot be read: Is a directory")
  index = folder / weights.INDEX_FILE
  index.symlink_to(index)
  assert_refused(folder, "index.json cannot be read: Too many levels of symb")
  index.unlink()
  path.rmdir()
  loop = folder / "a.safetensors"
  loop.symlink_to(loop)
  index.write_text(json.dumps({"weight_map": {NORM: loop.name}}))
  assert_refused(folder, "a.safetensors cannot be read: Too many levels")


def test_an_export_may_be_read_by_others(folder, tmp_path):
  policy, params = load(folder)
  templates = tmp_path / "additional_chat_templates"
  templates.mkdir()
  (templates / "rag.jinja").write_text("R")
  out = tmp_path / "out"
  weights.export(params, policy.config, out, side_files=[templates])
  for path in out.iterdir():
    if path.is_file():
      assert path.stat().st_mode & 0o777 == 0o644, path.name
  assert (out / templates.name / "rag.jinja").read_text() == "R"


def test_exports_do_not_overwrite(folder):
  policy, params = load(folder)
  with pytest.raises(errors.UserError, match="exists; name a new folder"):
    weights.export(params, policy.config, folder)


def test_a_failed_export_leaves_nothing(tmp_path):
  policy, params = load(MODELS / "qwen3")
  (tmp_path / "file").write_text("")
  with pytest.raises(errors.UserError, match="cannot be written"):
    weights.export(params, policy.config, tmp_path / "file" / "out")
  assert [p.name for p in tmp_path.iterdir()] == ["file"]
