"""Several devices draw what one draws, and share the work."""

import dataclasses

import jax
import numpy as np
import pytest

from roc.device import engine_stats
from roc.device import engines as engines_lib
from tests.device import engine_test as single

pytestmark = pytest.mark.slow
jobs, engine, plain = single.jobs, single.engine, single.plain


@pytest.fixture(scope="module")
def engines(policy, params):
  """Three engines of four slots each."""
  config = dataclasses.replace(single.CONFIG, n_slots=4)
  made = engines_lib.Engines(
    policy, config, single.STOP_IDS, devices=jax.local_devices()[2:5]
  )
  made.set_params(params)
  yield made
  assert made.n_rollouts == 0


@pytest.mark.bits
@pytest.mark.parametrize("seed", [0, 1])
def test_they_draw_the_same_bits(engines, jobs, plain, seed):
  rng = np.random.default_rng(seed)
  order = rng.permutation(len(jobs)).tolist()
  delays = rng.integers(0, 4, (len(jobs), 9))
  records = single.drive(
    engines, jobs, order=order, delay=lambda j, t: delays[j, t]
  )
  single.assert_same_bits(plain[0], records)


def test_work_is_shared_out_prompt_by_prompt(engines, jobs):
  requests = [job.request for job in jobs]
  handles = engines.submit(requests * 4)
  assert engines.n_rollouts == 28
  assert engines.budget_left(handles[-1]) == requests[-1].budget
  assert engines.dispatch()
  drawn = engines.collect()
  loads = [e.n_rollouts for e in engines._engines]
  assert min(loads) >= 6 and sum(loads) <= 28
  assert set(drawn) <= set(handles)
  engines.release(handles[:5] + handles[20:])  # some of them still queued
  assert engines.n_rollouts == 15
  engines.release(handles[5:20])


def test_each_device_holds_its_own(engines):
  devices = [e._pool.k_LPKEZ.devices() for e in engines._engines]
  assert devices == [{d} for d in jax.local_devices()[2:5]]


def test_weights_wait_for_rollouts_and_prompts_are_checked(
  engines, params, jobs
):
  handles = engines.submit([jobs[0].request])
  with pytest.raises(RuntimeError, match="in flight"):
    engines.set_params(params)
  engines.release(handles)
  too_long = dataclasses.replace(jobs[0].request, budget=10_000)
  with pytest.raises(ValueError, match="exceeds sampling.cache_length"):
    engines.submit([too_long])


def test_a_group_larger_than_a_device_may_hold_is_split(engines, jobs):
  handles = engines.submit([jobs[1].request] * 40)
  assert engines.dispatch()
  assert [e.n_rollouts for e in engines._engines] == [8, 8, 8]
  engines.release(handles)
  assert engines.collect() == {}


def test_stats_add_up(engines, jobs):
  engines.stats()
  before = engines.prefilled_tokens
  single.drive(engines, jobs)
  row = engines.stats()
  assert 0 < row["slot_occupancy"] <= 1
  assert row["decode_tokens_per_s"] > 0 and row["compilations"] == 0
  assert engines.prefilled_tokens > before


def test_rows_of_stats_together():
  a = {"decode_tokens_per_s": 10.0, "cache_use_max": 0.5, "cache_use": 0.2}
  b = {"decode_tokens_per_s": 30.0, "cache_use_max": 0.7, "cache_use": 0.4}
  assert engine_stats.together([a, b, {"compilations": 2.0}]) == {
    "decode_tokens_per_s": 40.0,
    "cache_use_max": 0.7,
    "cache_use": pytest.approx(0.3),
    "compilations": 2.0,
  }
