"""Absurd sizes are refused at once, by their size alone."""

import dataclasses

import jax
import pytest

from gated_jax import memory
from gated_jax.config import ModelConfig
from gated_jax.model.abstract import boxed_parameters
from gated_jax.model.size import check_fits
from gated_jax.model.size import least_bytes

SMALL = ModelConfig(
  vocab=64, depth=2, width=16, heads=2, kv_heads=1, head_dim=8, mlp_width=16
)
HUGE = 2**31 - 2
ABSURD = [
  {'depth': 10**9},
  {'depth': 10**9, 'scan': False},
  {'head_dim': HUGE},
  {'heads': HUGE},
  {'vocab': HUGE},
  {'width': HUGE},
  {'mlp_width': HUGE, 'width': 1024},
  {'pattern': (f'attention:heads={HUGE}', 'attention')},
]


@pytest.mark.parametrize('sizes', ABSURD, ids=str)
def test_what_no_machine_holds_is_refused(sizes):
  with pytest.raises(ValueError, match=r'depth=.* need [\d,.]+ GiB of memory'):
    check_fits(dataclasses.replace(SMALL, **sizes), jax.devices())


@pytest.mark.parametrize(
  'model', [SMALL, dataclasses.replace(SMALL, length=HUGE, scan=False)]
)
def test_what_fits_is_not(model):
  check_fits(model, jax.devices())


@pytest.mark.parametrize(
  'change', [{}, {'tie_embeddings': False}, {'param_dtype': 'bfloat16'}]
)
def test_the_lower_bound_is_one(change):
  model = dataclasses.replace(SMALL, **change)
  assert 0 < least_bytes(model) <= memory.size_of(boxed_parameters(model))
