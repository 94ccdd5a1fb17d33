"""A folder with as many tensors as Qwen3-Next-80B-A3B has, onto eight devices.

Sizes are small, the numbers of layers, experts, shards and tensors are those of
the released folder: 48 layers, 512 experts, 41 files.
"""

import collections
import weakref

import ml_dtypes
import numpy as np
import pytest

from gated_jax import sharding
from gated_jax.config import MeshConfig
from gated_jax.hf import convert
from gated_jax.hf import files
from gated_jax.hf import names
from gated_jax.hf.config import family_named
from gated_jax.hf.config import read_config
from gated_jax.hf.config import write_config
from gated_jax.model.abstract import abstract_parameters

SHARDS = 41
VALUES = {
  'num_hidden_layers': 48,
  'num_experts': 512,
  'num_experts_per_tok': 10,
  'num_attention_heads': 16,
  'num_key_value_heads': 2,
  'linear_num_key_heads': 16,
  'linear_num_value_heads': 32,
  'vocab_size': 256,
  'hidden_size': 16,
  'intermediate_size': 16,
  'moe_intermediate_size': 8,
  'shared_expert_intermediate_size': 8,
  'head_dim': 8,
  'linear_key_head_dim': 2,
  'linear_value_head_dim': 2,
  'max_position_embeddings': 262_144,
  'rms_norm_eps': 1e-6,
  'rope_theta': 1e7,
}
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """The folder; tensors hold their own numbers, and are written as they come."""
  path = tmp_path_factory.mktemp('large')
  family = family_named('qwen3_next')
  config = read_config(VALUES, family)
  shapes = convert.shapes_of(abstract_parameters(config))
  listed = names.tensors(family.rows, config, shapes)
  numbers = {t.name: i for i, t in enumerate(listed)}
  sizes = {t.name: t.shape for t in listed}
  total = sum(2 * int(np.prod(shape)) for shape in sizes.values())

  def read(name):
    return np.full(sizes[name], numbers[name] % 251, BFLOAT16)

  dtypes = dict.fromkeys(sizes, 'bfloat16')
  files.write_tensors(
    path, list(sizes.items()), read, dtypes, -(-total // (SHARDS - 1))
  )
  values = write_config(config, family) | {'torch_dtype': 'bfloat16'}
  files.write_json(path / 'config.json', values)
  return path, family, numbers


@pytest.mark.long
def test_every_tensor_is_read_once_onto_its_devices(folder, monkeypatch):
  path, family, numbers = folder
  assert len(list(path.glob('*.safetensors'))) in (SHARDS - 1, SHARDS)
  assert len(numbers) > 74_000
  count, whole = collections.Counter(), files.TensorFiles.read
  alive, most = set(), 0

  def counted(self, name):
    nonlocal most
    count[name] += 1
    array = whole(self, name)
    owner = array
    while owner.base is not None:
      owner = owner.base
    alive.add(name)
    weakref.finalize(owner, alive.discard, name)
    most = max(most, len(alive))
    return array

  monkeypatch.setattr(files.TensorFiles, 'read', counted)
  mesh = sharding.make_mesh(MeshConfig(expert=8))
  config, params = convert.load(path, mesh)
  assert count == dict.fromkeys(numbers, 1)
  flat = convert.flatten(params)
  assert most == 1  # none waits in memory for others
  for path_of, leaf in flat.items():
    if 'experts' in path_of.split('/'):
      shard = leaf.addressable_shards[0].data
      assert shard.size * 8 == leaf.size, path_of
  # Each tensor's number is where the table says that the tensor belongs.
  host = {name: np.asarray(leaf) for name, leaf in flat.items()}
  shapes = convert.shapes_of(params)
  for t in names.tensors(family.rows, config, shapes):
    for leaf in t.leaves:
      part = host[leaf][t.at]
      assert np.all(part == BFLOAT16.type(numbers[t.name] % 251)), t.name
