"""hf/convert.py and hf/files.py: folders there and back, and broken ones."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from safetensors.numpy import save_file

from gated_jax import sharding
from gated_jax.config import MeshConfig
from gated_jax.config import word_of
from gated_jax.hf import convert
from gated_jax.hf import files
from tests.hf.conftest import CASES


def bits(tree):
  return {
    path: (str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes())
    for path, leaf in convert.flatten(tree).items()
  }


def ours_alone(config):
  return dataclasses.replace(
    config,
    param_dtype='float32',
    dtype='float32',
    lead=(),
    pattern=tuple(word_of(layer, config) for layer in config.layers),
    scan=True,
  )


# These take most of the time that all of them take.
SLOW = (
  'afmoe',
  'beam',
  'laguna',
  'lfm3',
  'muse_spark',
  'qwen3_5_hybrid',
  'qwen3_5_moe',
  'qwen3_moe_mixed',
  'qwen3_moe_window',
  'qwen3_next_hybrid',
  'qwen3_next_moe',
  'step',
  'trinity',
)


@pytest.mark.parametrize(
  'case',
  [
    pytest.param(name, marks=[pytest.mark.long] if name in SLOW else [])
    for name in CASES
  ],
  indirect=True,
)
def test_a_round_trip_is_exact_to_the_bit(case, make_params, tmp_path):
  _check_round_trip(*case, make_params, tmp_path)


@pytest.mark.parametrize(
  'name',
  [
    'gated_headwise',
    'qwen3_moe',
    pytest.param('qwen3_5_hybrid', marks=pytest.mark.long),
  ],
)
def test_and_so_it_is_in_bfloat16(name, cases, make_params, tmp_path):
  family, config = cases[name]
  config = dataclasses.replace(config, param_dtype='bfloat16', dtype='bfloat16')
  _check_round_trip(family, config, make_params, tmp_path)


def _check_round_trip(family, config, make_params, tmp_path):
  params = make_params(config)
  convert.save(tmp_path / 'theirs', params, config, family)
  found, back = convert.load(tmp_path / 'theirs')
  assert bits(back) == bits(params)
  # `balance_loss` and such are kept as well, where config.json has them.
  assert ours_alone(found) == ours_alone(config)
  assert found.layers == config.layers
  convert.save(tmp_path / 'again', back, found, family)
  for name in ('config.json', 'model.safetensors'):
    first, second = (tmp_path / x / name for x in ('theirs', 'again'))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
  ('name', 'words'),
  [
    ('qwen3_5_hybrid', {'A_log', 'dt_bias', 'norm.weight'}),
    pytest.param(
      'muse_spark',
      {
        'post_attention_residual_gate.gate',
        'post_feedforward_residual_gate.gate',
        'mlp.gate.weight',
        'mlp.gate.e_score_correction_bias',
      },
      marks=pytest.mark.long,
    ),
  ],
)
def test_float32_that_stays_float32_makes_no_other_parameter_wide(
  name, words, cases, make_params, tmp_path
):
  family, config = cases[name]
  config = dataclasses.replace(config, param_dtype='bfloat16', dtype='bfloat16')
  convert.save(tmp_path / 'x', make_params(config), config, family)
  tensors = load_file(tmp_path / 'x/model.safetensors')
  wide = [n for n in tensors if tensors[n].itemsize > 2]
  assert {w for w in words for n in wide if n.endswith('.' + w)} == words
  assert all(n.endswith(tuple(words)) for n in wide)
  found, _ = convert.load(tmp_path / 'x')
  assert found.param_dtype == 'bfloat16'
  convert.save(tmp_path / 'y', make_params(config), config, family, 'bfloat16')
  tensors = load_file(tmp_path / 'y/model.safetensors')
  assert {x.itemsize for x in tensors.values()} == {2}


def test_layers_that_are_not_stacked_give_the_same_files(
  cases, make_params, tmp_path
):
  family, config = cases['afmoe']
  params = make_params(config)
  flat = {}
  for path, leaf in convert.flatten(params).items():
    parts = path.split('/', 2)
    if parts[0] == 'layers':
      flat[f'layers_{parts[1].removeprefix("block_")}/{parts[2]}'] = leaf[0]
    else:
      flat[path] = leaf
  apart = dataclasses.replace(config, scan=False)
  convert.save(tmp_path / 'a', params, config, family)
  convert.save(tmp_path / 'b', convert.unflatten(flat), apart, family)
  for name in ('config.json', 'model.safetensors'):
    a, b = (tmp_path / x / name for x in 'ab')
    assert a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize(
  'mesh', [{'fsdp': 8}, {'fsdp': 2, 'tensor': 2, 'data': 2}, {'data': 8}]
)
@pytest.mark.parametrize('name', ['gated_elementwise', 'qwen3_moe'])
def test_a_sharded_mesh_holds_the_same_numbers(
  name, mesh, cases, make_params, tmp_path
):
  family, config = cases[name]
  params = make_params(config)
  convert.save(tmp_path / 'theirs', params, config, family)
  placed = sharding.make_mesh(MeshConfig(**{'fsdp': 1, **mesh}))
  _, back = convert.load(tmp_path / 'theirs', placed)
  assert bits(back) == bits(params)
  kernel = convert.flatten(back)['layers/attention/query/kernel']
  parts = len({str(s.index) for s in kernel.addressable_shards})
  assert parts == np.prod([mesh.get('fsdp', 1), mesh.get('tensor', 1)])
  convert.save(tmp_path / 'again', back, config, family)
  first, second = (
    tmp_path / x / 'model.safetensors' for x in ('theirs', 'again')
  )
  assert first.read_bytes() == second.read_bytes()


def test_shards_are_no_larger_than_asked_and_read_back(
  cases, make_params, tmp_path
):
  family, config = cases['qwen3']
  params = make_params(config)
  convert.save(tmp_path / 'x', params, config, family, shard_bytes=20_000)
  shards = sorted((tmp_path / 'x').glob('*.safetensors'))
  assert len(shards) > 3
  assert shards[0].name == f'model-00001-of-{len(shards):05}.safetensors'
  tensors = [load_file(shard) for shard in shards]
  assert all(sum(t.nbytes for t in x.values()) <= 20_000 for x in tensors)
  index = json.loads((tmp_path / 'x' / files.INDEX).read_text())
  assert index['metadata']['total_size'] == sum(
    t.nbytes for x in tensors for t in x.values()
  )
  _, back = convert.load(tmp_path / 'x')
  assert bits(back) == bits(params)


def test_experts_in_one_tensor_are_read_as_those_apart(
  cases, make_params, tmp_path
):
  family, config = cases['qwen3_5_moe']
  params = make_params(config)
  convert.save(tmp_path / 'apart', params, config, family)
  tensors = load_file(tmp_path / 'apart/model.safetensors')
  for layer in range(config.depth):
    prefix = f'model.layers.{layer}.mlp.experts'
    gate, up, down = (
      np.stack(
        [tensors.pop(f'{prefix}.{e}.{name}_proj.weight') for e in range(4)]
      )
      for name in ('gate', 'up', 'down')
    )
    tensors[f'{prefix}.gate_up_proj'] = np.concatenate([gate, up], axis=1)
    tensors[f'{prefix}.down_proj'] = down
  (tmp_path / 'fused').mkdir()
  save_file(tensors, tmp_path / 'fused/model.safetensors')
  text = (tmp_path / 'apart/config.json').read_text()
  (tmp_path / 'fused/config.json').write_text(text)
  _, back = convert.load(tmp_path / 'fused')
  assert bits(back) == bits(params)
  del tensors[f'{prefix}.down_proj']
  save_file(tensors, tmp_path / 'fused/model.safetensors')
  with pytest.raises(
    ValueError, match=r'no tensor .*3\.mlp.experts.down_proj$'
  ):
    convert.load(tmp_path / 'fused')


@pytest.mark.parametrize('name', ['qwen3_5_hybrid', 'qwen3_5_moe'])
def test_the_published_form_is_read_without_its_other_parts(
  name, cases, make_params, tmp_path
):
  family, config = cases[name]
  params = make_params(config)
  convert.save(tmp_path / 'text', params, config, family)
  tensors = {
    key.replace('model.', 'model.language_model.', 1): x
    for key, x in load_file(tmp_path / 'text/model.safetensors').items()
  }
  for key in ('model.visual.merger.norm.bias', 'mtp.fc.weight', 'mtp.norm.x'):
    tensors[key] = np.zeros(3, np.float32)
  inner = json.loads((tmp_path / 'text/config.json').read_text())
  values = {
    'architectures': [inner.pop('architectures')[0]],
    'model_type': inner['model_type'].removesuffix('_text'),
    'text_config': inner | {'mtp_num_hidden_layers': 1},
    'vision_config': {'depth': 27},
    'image_token_id': 5,
    'tie_word_embeddings': False,
  }
  (tmp_path / 'whole').mkdir()
  save_file(tensors, tmp_path / 'whole/model.safetensors')
  (tmp_path / 'whole/config.json').write_text(json.dumps(values))
  lines = []
  found, back = convert.load(tmp_path / 'whole', say=lines.append)
  assert bits(back) == bits(params)
  assert found.layers == config.layers
  assert [line.rpartition(': ')[2] for line in sorted(lines)] == [
    'model.visual.* (1)',
    'mtp.* (2)',
  ]
  with pytest.raises(ValueError, match='is only read'):
    convert.save(tmp_path / 'x', back, found, f'{family}_published')


def test_one_tensor_at_a_time_is_read_and_once(
  cases, make_params, tmp_path, monkeypatch
):
  family, config = cases['gated_elementwise']
  convert.save(tmp_path / 'x', make_params(config), config, family)
  seen = []
  read = files.TensorFiles.read
  monkeypatch.setattr(
    files.TensorFiles, 'read', lambda self, n: seen.append(n) or read(self, n)
  )
  convert.load(tmp_path / 'x', sharding.make_mesh(MeshConfig(fsdp=8)))
  assert sorted(seen) == sorted(load_file(tmp_path / 'x/model.safetensors'))


@pytest.mark.parametrize(
  ('stored', 'asked', 'kept'),
  [
    ('bfloat16', '', 'bfloat16'),
    ('bfloat16', 'float32', 'float32'),
    ('float16', '', 'float32'),
    ('float32', 'bfloat16', 'bfloat16'),
  ],
)
def test_dtypes(stored, asked, kept, cases, make_params, tmp_path):
  family, config = cases['qwen3']
  params = make_params(config)
  convert.save(tmp_path / 'x', params, config, family, dtype=stored)
  found, back = convert.load(tmp_path / 'x', param_dtype=asked)
  assert (found.dtype, found.param_dtype) == (stored, kept)
  expected = jax.tree.map(
    lambda x: x.astype(files.DTYPES[stored]).astype(files.DTYPES[kept]), params
  )
  assert bits(back) == bits(expected)


def test_tied_embeddings_may_be_written_twice_but_not_differ(
  cases, make_params, tmp_path
):
  family, config = cases['qwen3_tied']
  convert.save(tmp_path / 'x', make_params(config), config, family)
  path = tmp_path / 'x/model.safetensors'
  tensors = load_file(path)
  tensors['lm_head.weight'] = tensors['model.embed_tokens.weight'].copy()
  save_file(tensors, path)
  convert.load(tmp_path / 'x')
  tensors['lm_head.weight'][0, 0] += 1
  save_file(tensors, path)
  with pytest.raises(ValueError, match=r'lm_head\.weight'):
    convert.load(tmp_path / 'x')


def _drop(tensors):
  del tensors['model.layers.2.self_attn.k_norm.weight']


def _add(tensors):
  tensors['model.layers.1.self_attn.q_proj.bias'] = np.zeros(4, np.float32)


def _reshape(tensors):
  name = 'model.layers.3.mlp.up_proj.weight'
  tensors[name] = tensors[name][:-1].copy()


def _infinite(tensors):
  tensors['model.norm.weight'][3] = np.inf


def _not_a_number(tensors):
  tensors['model.layers.0.self_attn.o_proj.weight'][3, 2] = np.nan


def _integer(tensors):
  name = 'model.embed_tokens.weight'
  tensors[name] = tensors[name].astype(np.int8)


@pytest.mark.parametrize(
  ('spoil', 'message'),
  [
    (_drop, 'has no tensor model.layers.2.self_attn.k_norm.weight'),
    (_add, r'tensor model.layers.1.self_attn.q_proj.bias of shape \(4,\)'),
    (_reshape, r'3.mlp.up_proj.weight is of shape \(47, 32\).*\(48, 32\)'),
    (_infinite, 'tensor model.norm.weight is corrupt'),
    (_not_a_number, 'layers.0.self_attn.o_proj.weight is corrupt'),
    (_integer, 'model.embed_tokens.weight has dtype I8'),
  ],
)
def test_wrong_tensors_are_named(spoil, message, cases, make_params, tmp_path):
  family, config = cases['qwen3']
  convert.save(tmp_path / 'x', make_params(config), config, family)
  tensors = load_file(tmp_path / 'x/model.safetensors')
  spoil(tensors)
  save_file(tensors, tmp_path / 'x/model.safetensors')
  with pytest.raises(ValueError, match=message):
    convert.load(tmp_path / 'x')


def test_a_tensor_that_changes_nothing_can_be_ignored(
  cases, make_params, tmp_path
):
  family, config = cases['qwen3']
  convert.save(tmp_path / 'x', make_params(config), config, family)
  tensors = load_file(tmp_path / 'x/model.safetensors')
  name = 'model.layers.0.self_attn.rotary_emb.inv_freq'
  tensors |= {x: np.ones(4, np.float32) for x in (name, 'mtp.weight')}
  save_file(tensors, tmp_path / 'x/model.safetensors')
  with pytest.raises(ValueError, match=r'mtp\.weight'):
    convert.load(tmp_path / 'x')
  convert.load(tmp_path / 'x', ignore=['mtp.weight'])


def _truncate(folder):
  path = sorted(folder.glob('*.safetensors'))[1]
  path.write_bytes(path.read_bytes()[:-100])


def _lose(folder):
  sorted(folder.glob('*.safetensors'))[1].unlink()


def _twice(folder):
  first, second = sorted(folder.glob('*.safetensors'))[:2]
  both = load_file(second)
  both['model.embed_tokens.weight'] = load_file(first)[
    'model.embed_tokens.weight'
  ]
  save_file(both, second)


def _scribble(folder):
  (folder / files.INDEX).write_text('{"weight_map": ')


def _no_map(folder):
  (folder / files.INDEX).write_text('{}')


def _no_weights(folder):
  for path in folder.glob('model*'):
    path.unlink()


def _no_config(folder):
  (folder / 'config.json').unlink()


@pytest.mark.parametrize(
  ('spoil', 'message'),
  [
    (_truncate, 'model-00002-of-.*truncated'),
    (_lose, 'names model-00002-of-.*missing'),
    (_twice, 'model.embed_tokens.weight is in two files.*model-00002-of'),
    (_scribble, 'index.json is not JSON'),
    (_no_map, 'index.json has no weight_map'),
    (_no_weights, 'has no weights: neither model.safetensors'),
    (_no_config, r'there is no file .*config.json'),
  ],
)
def test_broken_folders_are_refused(
  spoil, message, cases, make_params, tmp_path
):
  family, config = cases['qwen3']
  params = make_params(config)
  convert.save(tmp_path / 'x', params, config, family, shard_bytes=20_000)
  spoil(tmp_path / 'x')
  with pytest.raises(ValueError, match=message):
    convert.load(tmp_path / 'x')


def test_a_failed_export_leaves_nothing(
  cases, make_params, tmp_path, monkeypatch
):
  family, config = cases['qwen3']
  params = make_params(config)

  def full(path, values):
    raise OSError('no space left on device')

  monkeypatch.setattr(convert, 'write_json', full)
  with pytest.raises(OSError, match='no space'):
    convert.save(tmp_path / 'x', params, config, family)
  assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(cases, make_params, tmp_path):
  family, config = cases['qwen3']
  (tmp_path / 'x').mkdir()
  (tmp_path / 'x/precious').touch()
  with pytest.raises(ValueError, match='exists'):
    convert.save(tmp_path / 'x', make_params(config), config, family)
  assert [p.name for p in (tmp_path / 'x').iterdir()] == ['precious']


def test_parameters_of_another_model_are_refused(cases, make_params, tmp_path):
  family, config = cases['qwen3']
  wider = dataclasses.replace(config, mlp_width=64)
  with pytest.raises(ValueError, match=r'layers/mlp/down/kernel is \(4, 48, '):
    convert.save(tmp_path / 'x', make_params(config), wider, family)


def test_torch_files_read_as_safetensors_do(cases, make_params, tmp_path):
  torch = pytest.importorskip('torch', reason="pip install -e '.[compare]'")
  family, config = cases['qwen3']
  config = dataclasses.replace(config, param_dtype='bfloat16')
  params = make_params(config)
  convert.save(tmp_path / 'x', params, config, family)
  path = tmp_path / 'x/model.safetensors'
  tensors = {
    name: torch.from_numpy(t.astype(np.float32)).to(torch.bfloat16)
    for name, t in load_file(path).items()
  }
  path.unlink()
  torch.save(tensors, tmp_path / 'x/pytorch_model.bin')
  _, back = convert.load(tmp_path / 'x')
  assert bits(back) == bits(params)
  broken = (tmp_path / 'x/pytorch_model.bin').read_bytes()[:2000]
  (tmp_path / 'x/pytorch_model.bin').write_bytes(broken)
  with pytest.raises(ValueError, match=r'pytorch_model\.bin is truncated'):
    convert.load(tmp_path / 'x')
