"""Checks of the arrays that a public function of core is called with.

Arrays carry their axes in the name, so the name of a parameter says what it
takes: `adv_B` has one axis, as long as the first of `logp_BT`, and
`is_model_BT` is boolean. A [B, 1] array in place of the first would broadcast,
without a word, to another result. Shapes and dtypes are known while a function
is traced, so under `jax.jit` the checks cost nothing.
"""

import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import jax.numpy as jnp
import numpy as np

P = ParamSpec("P")
R = TypeVar("R")

_AXES = re.compile(r"_([A-Z1]+)$")
# By the beginning of a name; all other arrays with axes are floating.
_KINDS = {
  r"(is|has|keep|where)(_|$)": np.bool_,
  r"(n|target|roles|outcome|tool_status|length|(rollout|group)_id)(_|$)": (
    np.integer
  ),
}


def checked(function: Callable[P, R]) -> Callable[P, R]:
  """Decorates a function whose arrays carry their axes in the name.

  Checked are rank, equal lengths of axes of the same letter, and the kind of
  dtype; `where` has the shape of `x`. A NamedTuple is checked field by field.
  What is None, and what has neither axes nor a kind in its name, is not.

  Args:
    function: any of core.

  Returns:
    The function, which raises a ValueError that names function, argument and
    shapes before anything is computed.
  """
  signature = inspect.signature(function)
  name = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"

  @functools.wraps(function)
  def call(*args: P.args, **kwargs: P.kwargs) -> R:
    given = dict(_flat(signature.bind(*args, **kwargs).arguments))
    for key, value in given.items():
      kind = next((k for p, k in _KINDS.items() if re.match(p, key)), None)
      if kind is None and _AXES.search(key):
        kind = np.floating
      dtype = getattr(value, "dtype", type(value))
      if kind is not None and not jnp.issubdtype(dtype, kind):
        raise ValueError(
          f"{name}: {key} has dtype {dtype}; it must be {kind.__name__}."
        )
    axes = {k: m[1] for k in given if (m := _AXES.search(k))}
    if given.get("where") is not None:
      letters = [str(i) for i in range(np.ndim(given["x"]))]
      axes |= {"x": letters, "where": letters}
    require_axes(name, given, axes)
    return function(*args, **kwargs)

  return call


def require_axes(
  function: str, arrays: Mapping[str, Any], axes: Mapping[str, Sequence[str]]
) -> None:
  """Raises a ValueError unless ranks, and lengths of equal axes, agree.

  Args:
    function: its name, for the message.
    arrays: by name of the argument.
    axes: letters of the axes by name of the argument.
  """
  first: dict[str, tuple[int, str]] = {}
  for name, letters in axes.items():
    shape = np.shape(arrays[name])
    if len(shape) != len(letters):
      raise ValueError(
        f"{function}: {name} has shape {shape}, but its axes are"
        f" [{', '.join(letters)}]."
      )
    for letter, length in zip(letters, shape, strict=True):
      wanted, where = first.setdefault(letter, (length, name))
      if length != wanted:
        raise ValueError(
          f"{function}: axis {letter} is {length} in {name}, of shape {shape},"
          f" and {wanted} in {where}, of shape {np.shape(arrays[where])}."
        )


def _flat(given: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
  for name, value in given.items():
    if hasattr(value, "_fields"):
      yield from _flat(value._asdict())
    elif value is not None:
      yield name, value
