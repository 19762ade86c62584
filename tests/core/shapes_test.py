"""No public function of core takes other shapes or dtypes in silence."""

import functools
import importlib
import inspect
import pkgutil
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from roc import core
from roc.core import losses, masks, metrics, products, resample, shapes

SIZES = {letter: 2 + i for i, letter in enumerate("BCDGNOTV")}
# What a function needs beside arrays.
SETTINGS = {
  "token_weights": {"kind": "token"},
  "with_regularizers": {"kl_coef": 0.1, "entropy_coef": 0.1},
  "quotas": {"mode": "sort", "n_keep": 2, "min_pos": 1, "min_neg": 1},
  "resample": {"mode": "inverse", "key": jax.random.key(0), "n_keep": 2},
  "take_kept": {"n_keep": 2},
  "is_length_ok": {"kind": "mask"},
  "soft_overlong_penalty": {"max_length": 8, "buffer": 2},
}
INTEGERS = re.compile("n_|target|outcome|tool_status|length|rollout_|group_")


def dtype_of(name):
  if name.startswith(("is_", "has_", "keep_")):
    return np.bool_
  return np.int32 if INTEGERS.match(name) else np.float32


def spec(name):
  axes = re.search(r"_([A-Z]+)$", name)[1]
  return jax.ShapeDtypeStruct(
    tuple(SIZES[letter] for letter in axes), dtype_of(name)
  )


def public_functions():
  """Every public function of core with an array whose name has axes."""
  for module in pkgutil.iter_modules(core.__path__):
    members = vars(importlib.import_module(f"roc.core.{module.name}"))
    for name, function in members.items():
      is_ours = getattr(function, "__module__", "").endswith(module.name)
      if inspect.isfunction(function) and is_ours and name[0] != "_":
        names = inspect.signature(function).parameters
        arrays = [n for n in names if re.search(r"_[A-Z]+$", n)]
        if arrays:
          yield pytest.param(function, arrays, id=f"{module.name}.{name}")


def trace(function, arrays):
  """Shapes of the result; nothing is computed and nothing compiled."""
  given = SETTINGS.get(function.__name__, {})
  if function.__name__ == "count_penalties":
    counts = spec("n_judged_NO")
    arrays = arrays | {"calls": resample.CallCounts(counts, counts)}
  return jax.eval_shape(functools.partial(_call, function, given), arrays)


def _call(function, given, arrays):
  return function(**given, **arrays)


def test_all_that_take_arrays_are_found():
  found = {param.id for param in public_functions()}
  assert len(found) >= 25
  assert {"losses.gspo", "resample.resample", "rows.is_eligible"} <= found


@pytest.mark.parametrize(("function", "names"), list(public_functions()))
def test_public_functions_refuse_other_shapes_and_dtypes(function, names):
  where = f"{function.__module__.rpartition('.')[2]}.{function.__name__}: "
  arrays = {name: spec(name) for name in names}
  trace(function, arrays)
  for name, right in arrays.items():

    def refused(shape, dtype, match, name=name):
      wrong = {name: jax.ShapeDtypeStruct(shape, dtype)}
      with pytest.raises(ValueError, match=match) as e:
        trace(function, arrays | wrong)
      assert str(e.value).startswith(where) and name in str(e.value)

    refused((*right.shape, 1), right.dtype, "but its axes are")
    refused(right.shape[1:], right.dtype, "but its axes are")
    other = np.float32 if right.dtype != np.float32 else np.int32
    refused(right.shape, other, f"{name} has dtype {np.dtype(other)}; it must")
    axes = re.search(r"_([A-Z]+)$", name)[1]
    for i, letter in enumerate(axes):
      if sum(letter in n.rpartition("_")[2] for n in names) < 2:
        continue
      for length in (1, right.shape[i] + 1):
        shape = (*right.shape[:i], length, *right.shape[i + 1 :])
        refused(shape, right.dtype, f"axis {letter} is ")


def test_the_message_names_both_arrays():
  message = re.escape(
    "losses.cispo: axis B is 5 in adv_B, of shape (5,), and 4 in logp_new_BT,"
    " of shape (4, 3)."
  )
  ones = jnp.ones((4, 3))
  with pytest.raises(ValueError, match=message):
    losses.cispo(ones, ones, jnp.ones(5), ones > 0)


def test_counts_of_calls_are_checked_field_by_field():
  right = jnp.zeros((2, 3), jnp.int32)
  calls = resample.CallCounts(right, jnp.zeros((2, 1), jnp.int32))
  with pytest.raises(ValueError, match="axis O is 1 in n_failed_NO"):
    resample.count_penalties(calls, right, right)


@pytest.mark.parametrize(
  "function", [masks.masked_sum, masks.masked_mean, metrics.mean]
)
def test_where_has_the_shape_of_what_it_chooses_from(function):
  x = jnp.ones((2, 3))
  for where in (jnp.ones((2, 1), bool), jnp.ones(3, bool), jnp.array(True)):
    with pytest.raises(ValueError, match=rf"{function.__name__}: .*where"):
      function(x, where)
  with pytest.raises(ValueError, match="where has dtype float32"):
    function(x, x)


@pytest.mark.parametrize(
  "function",
  [masks.is_model, masks.is_valid, masks.is_prompt, masks.is_observation],
)
def test_roles_are_integers(function):
  with pytest.raises(ValueError, match="roles has dtype float32; it must be"):
    function(jnp.ones((2, 3)))


def test_products_do_not_broadcast():
  x, y = jnp.ones((2, 3)), jnp.ones((1, 3))
  with pytest.raises(ValueError, match="axis b is 1 in y, of shape"):
    products.einsum("bt,bt->b", jnp.float32, x, y)
  with pytest.raises(ValueError, match="x has shape"):
    products.product("btd,df->btf", jnp.float32, x, y)


def test_under_jit_the_checks_leave_no_trace():
  def plain(x_BT):
    return 2.0 * x_BT

  x_BT = jnp.ones((2, 3))
  programs = (
    jax.jit(f).lower(x_BT).as_text() for f in (plain, shapes.checked(plain))
  )
  assert len(set(programs)) == 1
