"""How much of a model's files is in memory beside the model."""

import dataclasses
import tracemalloc

import jax
import numpy as np
import pytest

from gated_jax import sharding
from gated_jax.config import MeshConfig
from gated_jax.hf import convert

MIB = 2**20
SHARD = 4 * MIB
SLACK = MIB  # what Python and tracing the shapes need


@pytest.fixture
def model(cases, make_params, tmp_path):
  """(config, parameters) of 25 MiB, also in files of 4 MiB."""
  family, config = cases['gated_elementwise']
  config = dataclasses.replace(
    config, vocab=4096, width=256, mlp_width=1024, depth=4, head_dim=64
  )
  params = make_params(config)
  convert.save(tmp_path / 'x', params, config, family, shard_bytes=SHARD)
  assert len(list((tmp_path / 'x').glob('*.safetensors'))) > 5
  return config, params


def sizes(params):
  return [leaf.nbytes for leaf in jax.tree.leaves(params)]


@pytest.mark.parametrize('split', [False, True], ids=['whole', 'split'])
def test_loading_holds_one_parameter_and_one_tensor_more(
  split, model, tmp_path
):
  _, params = model
  mesh = sharding.make_mesh(MeshConfig(fsdp=8)) if split else None
  tracemalloc.start()
  try:
    _, found = convert.load(tmp_path / 'x', mesh)
    _, peak = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
  # Of what lies in NumPy's memory; on a CPU that may be the parameters too.
  largest = max(sizes(params))
  bound = sum(sizes(params)) + largest + SHARD + SLACK
  assert peak < bound < 2 * sum(sizes(params))
  np.testing.assert_array_equal(
    found['final_norm']['scale'], params['final_norm']['scale']
  )


def test_saving_holds_one_shard(model, tmp_path):
  config, params = model
  tracemalloc.start()
  try:
    convert.save(tmp_path / 'y', params, config, shard_bytes=SHARD)
    _, peak = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
  assert peak < SHARD + SLACK < sum(sizes(params)) / 4
