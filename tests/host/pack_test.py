"""Packing: every field where it belongs, padding inert, order invisible."""

import random
import time

import numpy as np
import pytest

from roc import layout
from roc.host import calls, episode, pack, tools

ROLE = layout.Role
STATUS = layout.ToolStatus
CALL = calls.ToolCall("python", {"code": "x"}, "{}")


def _episode(rng, rollout_id=0, place=0, statuses=(), n_tokens=None):
  out = episode.Episode(place=place, rollout_id=rollout_id, gold="7")
  n_prompt, n_model = rng.randrange(1, 5), rng.randrange(1, 6)
  if n_tokens is not None:
    n_prompt, n_model = 1, n_tokens - 2
  out.append_prompt([rng.randrange(12, 90) for _ in range(n_prompt)])
  out.append_model(
    [rng.randrange(12, 90) for _ in range(n_model)],
    [-rng.random() for _ in range(n_model)],
  )
  out.append_environment([14], [ROLE.TOOL])
  for status in statuses:
    out.record_call(tools.ToolOutcome(CALL, status, ""))
  out.answers = ["7"] * rng.randrange(3)
  out.n_turns = rng.randrange(1, 4)
  out.has_void_turn = rng.random() < 0.5
  out.finish(rng.choice(list(layout.StopReason)))
  return out


def _groups(rng, n_groups=3, n_rollouts=4):
  return [
    [
      _episode(rng, o, 10 + n, [STATUS(rng.randrange(10))] * rng.randrange(3))
      for o in range(n_rollouts)
    ]
    for n in range(n_groups)
  ]


def test_fields_types_and_axes_are_those_of_the_layout():
  arrays = pack.pack(_groups(random.Random(0)), n_calls=3, length=16)
  assert set(arrays) == set(layout.TRAJECTORY_FIELDS)
  sizes = {"N": 3, "O": 4, "T": 16, "C": 3}
  for name, field in layout.TRAJECTORY_FIELDS.items():
    assert arrays[name].dtype == field.dtype, name
    assert arrays[name].shape == tuple(sizes[a] for a in field.axes), name


def test_every_value_is_where_it_belongs_and_padding_is_zero():
  groups = _groups(random.Random(1))
  arrays = pack.pack(groups, n_calls=3, length=16)
  for n, group in enumerate(groups):
    assert arrays["place"][n] == 10 + n
    for o, one in enumerate(group):
      size = len(one)
      at = (n, o)
      assert arrays["tokens"][at][:size].tolist() == one.token_ids
      assert arrays["roles"][at][:size].tolist() == one.roles
      np.testing.assert_array_equal(
        arrays["logp_sampler"][at][:size], np.float32(one.logprobs)
      )
      for name in ("tokens", "roles", "logp_sampler"):
        assert not arrays[name][at][size:].any()
      statuses = [record.status for record in one.tool_records]
      assert arrays["tool_status"][at].tolist() == statuses + [STATUS.NONE] * (
        3 - len(statuses)
      )
      assert arrays["n_turns"][at] == one.n_turns
      assert arrays["n_answers"][at] == one.n_answers
      assert arrays["has_void_turn"][at] == one.has_void_turn
      assert arrays["is_truncated"][at] == one.is_truncated
      assert arrays["outcome"][at] == one.outcome
      assert arrays["reward"][at] == one.reward
      assert arrays["rollout_id"][at] == o


def test_order_of_completion_cannot_be_seen():
  rng = random.Random(2)
  groups = _groups(rng)
  expected = pack.pack(groups, n_calls=3, length=16)
  for group in groups:
    rng.shuffle(group)
  for name, array in pack.pack(groups, n_calls=3, length=16).items():
    np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_a_missing_rollout_is_void_padding_and_changes_no_other_row():
  groups = _groups(random.Random(3))
  full = pack.pack(groups, n_calls=3, length=16)
  del groups[1][2]
  arrays = pack.pack(groups, n_calls=3, length=16)
  assert arrays["outcome"][1, 2] == layout.Outcome.VOID
  assert arrays["rollout_id"][1].tolist() == [0, 1, 2, 3]
  assert (arrays["tool_status"][1, 2] == STATUS.NONE).all()
  for name in ("tokens", "roles", "logp_sampler", "reward", "n_turns"):
    assert not arrays[name][1, 2].any()
  for name, field in layout.TRAJECTORY_FIELDS.items():
    if field.axes != "N":
      is_other = np.ones((3, 4), bool)
      is_other[1, 2] = False
      np.testing.assert_array_equal(
        arrays[name][is_other], full[name][is_other], err_msg=name
      )


def test_a_longer_bucket_only_adds_padding():
  groups = _groups(random.Random(4))
  short = pack.pack(groups, n_calls=3, length=16)
  long = pack.pack(groups, n_calls=5, length=32)
  for name in ("tokens", "roles", "logp_sampler"):
    np.testing.assert_array_equal(long[name][..., :16], short[name])
    assert not long[name][..., 16:].any()
  assert (long["tool_status"][..., 3:] == STATUS.NONE).all()


def test_an_empty_group_needs_its_place():
  rng = random.Random(5)
  groups = [[_episode(rng, 1, 10)], []]
  with pytest.raises(ValueError, match="group 1 must hold"):
    pack.pack(groups, n_calls=1, length=16)
  arrays = pack.pack(groups, n_calls=1, length=16, places=[10, 11])
  assert arrays["place"].tolist() == [10, 11]
  assert arrays["rollout_id"].shape == (2, 2)
  assert (arrays["outcome"][1] == layout.Outcome.VOID).all()


@pytest.mark.parametrize(
  ("episodes", "kwargs", "message"),
  [
    ([{"n_tokens": 17}], {}, "17 tokens; there is room for 16"),
    (
      [{"statuses": [STATUS.OK] * 3}],
      {},
      "3 tool calls; there is room for 2",
    ),
    ([{"rollout_id": 1}, {"rollout_id": 1}], {}, "id 1 is taken"),
    ([{"rollout_id": 4}], {"n_rollouts": 4}, "not in 0..3"),
    ([{}, {"place": 9, "rollout_id": 1}], {}, r"\[0, 9\]"),
  ],
)
def test_what_does_not_fit_is_an_error(episodes, kwargs, message):
  rng = random.Random(6)
  group = [_episode(rng, **settings) for settings in episodes]
  with pytest.raises(ValueError, match=message):
    pack.pack([group], n_calls=2, length=16, **kwargs)


def test_bucket_length():
  assert [pack.bucket_length(n, (64, 16, 32)) for n in (1, 16, 17, 64)] == [
    *(16, 16, 32, 64),
  ]
  with pytest.raises(ValueError, match=r"65 tokens.*\[16, 32, 64\]"):
    pack.bucket_length(65, (64, 16, 32))


def test_sft_rows_mark_what_the_model_is_to_write():
  rng = random.Random(7)
  episodes = [_episode(rng) for _ in range(5)]
  tokens_BT, is_model_BT = pack.sft_rows(episodes, 16)
  assert tokens_BT.shape == is_model_BT.shape == (5, 16)
  assert tokens_BT.dtype == np.int32 and is_model_BT.dtype == bool
  for row, one in enumerate(episodes):
    assert tokens_BT[row].sum() == sum(one.token_ids)
    assert is_model_BT[row].sum() == one.n_model_tokens
    learnt = tokens_BT[row][is_model_BT[row]].tolist()
    start = one.roles.index(ROLE.MODEL)
    assert learnt == one.token_ids[start : start + one.n_model_tokens]


def test_packed_rows_hold_every_episode_once_and_in_one_piece():
  rng = random.Random(8)
  episodes = [_episode(rng) for _ in range(60)]
  arrays = pack.pack_sft(episodes, 24)
  found = []
  for row in range(len(arrays["tokens_BT"])):
    segments = arrays["segment_BT"][row]
    for number in range(1, segments.max() + 1):
      here = np.flatnonzero(segments == number)
      assert (np.diff(here) == 1).all()
      assert arrays["position_BT"][row, here].tolist() == list(range(len(here)))
      found.append(
        (
          arrays["tokens_BT"][row, here].tolist(),
          arrays["roles_BT"][row, here].tolist(),
        )
      )
    is_empty = segments == 0
    for name in ("tokens_BT", "roles_BT", "position_BT"):
      assert not arrays[name][row, is_empty].any()
  assert sorted(found) == sorted((e.token_ids, e.roles) for e in episodes)
  n_tokens = sum(len(one) for one in episodes)
  assert (arrays["segment_BT"] > 0).sum() == n_tokens
  assert n_tokens / arrays["tokens_BT"].size > 0.85


def test_packing_is_first_fit_in_order():
  rng = random.Random(9)
  sizes = [6, 7, 4, 3, 10]
  arrays = pack.pack_sft([_episode(rng, n_tokens=n) for n in sizes], 10)
  filled = [(row > 0).sum() for row in arrays["segment_BT"]]
  assert filled == [10, 10, 10]
  assert arrays["segment_BT"][0].tolist() == [1] * 6 + [2] * 4
  assert arrays["segment_BT"][1].tolist() == [1] * 7 + [2] * 3


def test_sft_edge_cases():
  rng = random.Random(10)
  assert pack.pack_sft([], 8)["tokens_BT"].shape == (0, 8)
  two = [_episode(rng, n_tokens=4) for _ in range(2)]
  assert pack.pack_sft(two, 8, max_per_row=1)["tokens_BT"].shape == (2, 8)
  with pytest.raises(ValueError, match="9 tokens; a row holds 8"):
    pack.pack_sft([_episode(rng, n_tokens=9)], 8)


def _naive_first_fit(sizes, length, max_per_row):
  rows = []
  for size in sizes:
    for row in rows:
      is_full = max_per_row is not None and len(row) >= max_per_row
      if not is_full and sum(row) + size <= length:
        row.append(size)
        break
    else:
      rows.append([size])
  return rows


@pytest.mark.parametrize("max_per_row", [None, 1, 3])
@pytest.mark.parametrize("n", [1, 2, 3, 64, 101])
def test_the_tree_finds_what_looking_at_every_row_finds(n, max_per_row):
  rng = random.Random(n)
  sizes = [rng.randrange(2, 33) for _ in range(n)]
  lessons = [
    pack.Compact("", np.full(s, 12, np.int32), np.full(s, 2, np.int8))
    for s in sizes
  ]
  arrays = pack.pack_sft(lessons, 32, max_per_row=max_per_row)
  found = [np.bincount(row)[1:].tolist() for row in arrays["segment_BT"]]
  assert found == _naive_first_fit(sizes, 32, max_per_row)


def test_arrays_pack_as_lists_do():
  rng = random.Random(11)
  episodes = [_episode(rng) for _ in range(40)]
  lists = pack.pack_sft(episodes, 16)
  for name, array in pack.pack_sft(
    [pack.Compact.of(e) for e in episodes], 16
  ).items():
    np.testing.assert_array_equal(array, lists[name], err_msg=name)
  cut = pack.Compact.of(episodes[0], 2)
  assert cut.token_ids.tolist() == episodes[0].token_ids[:2]
  assert cut.roles.tolist() == episodes[0].roles[:2]


def test_twenty_thousand_lessons_pack_in_a_moment():
  """Looking at every row would be 20,000 x 9,000 comparisons."""
  rng = np.random.default_rng(12)
  lessons = [
    pack.Compact("", np.zeros(n, np.int32), np.zeros(n, np.int8))
    for n in rng.integers(60, 400, 20_000)
  ]
  start = time.process_time()
  arrays = pack.pack_sft(lessons, 512)
  # 0.3 s alone on one core; a machine under load is slower, not ten times.
  assert time.process_time() - start < 3
  assert (arrays["segment_BT"] > 0).mean() > 0.9
