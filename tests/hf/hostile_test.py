"""Folders made elsewhere may hold anything: one line says what is wrong."""

import json
import os

import numpy as np
import pytest

from gated_jax.config import GateConfig
from gated_jax.config import ModelConfig
from gated_jax.hf import __main__ as cli
from gated_jax.hf import convert
from gated_jax.hf import files
from gated_jax.hf import tokenizer

SHARD = 'model-00002-of-00003.safetensors'


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """The files of a small model in several shards, by name."""
  folder = tmp_path_factory.mktemp('whole') / 'model'
  config = ModelConfig(
    vocab=300,
    length=32,
    depth=2,
    width=16,
    heads=2,
    kv_heads=1,
    head_dim=8,
    mlp_width=24,
    gate=GateConfig(position='none'),
  )
  rng = np.random.default_rng(0)
  params = {
    path: rng.normal(size=leaf.shape).astype(np.float32)
    for path, leaf in convert.flatten(
      convert.abstract_parameters(config)
    ).items()
  }
  convert.save(folder, convert.unflatten(params), config, shard_bytes=10_000)
  tokenizer.write_bytes(folder, config.length)
  return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(whole, tmp_path):
  for name, content in whole.items():
    (tmp_path / 'theirs').mkdir(exist_ok=True)
    (tmp_path / 'theirs' / name).write_bytes(content)
  return tmp_path / 'theirs'


def refuse(folder, capsys, message):
  target = folder.parent / 'ours'
  before = sorted(folder.parent.rglob('*'))
  assert cli.main(['import', str(folder), str(target)]) == 2
  captured = capsys.readouterr()
  assert captured.err.startswith('error: ') and captured.err.count('\n') == 1
  assert message in captured.err
  assert sorted(folder.parent.rglob('*')) == before


def change(path, **values):
  path.write_text(json.dumps(json.loads(path.read_text()) | values))


# What config.json is made to say, and what is said of it.
YARN = {'rope_type': 'yarn', 'rope_theta': 1e4, 'factor': 2.0}
CONFIGS = [
  ({'num_hidden_layers': 10**18}, 'num_hidden_layers=1000000000000000000'),
  ({'num_hidden_layers': 10**6}, 'num_hidden_layers=1000000, and the tensors'),
  ({'num_hidden_layers': True}, 'num_hidden_layers=True, which is not an int'),
  ({'num_hidden_layers': 0}, 'num_hidden_layers=0, which is not an integer'),
  ({'vocab_size': 10**18}, 'vocab_size=1000000000000000000, which is not'),
  ({'vocab_size': 2**31 - 8}, 'vocab_size=2147483640, and the tensors of'),
  ({'vocab_size': 304}, 'vocab_size=304, and the tensors of its files allow'),
  ({'vocab_size': 200}, 'and config.json makes it (200, 16)'),
  ({'hidden_size': 2**31 - 8}, 'hidden_size=2147483640, and the tensors'),
  ({'head_dim': 2**31 - 2}, 'num_attention_heads x head_dim=4294967292'),
  ({'num_key_value_heads': 2}, 'and config.json makes it'),
  ({'num_attention_heads': 2**30}, 'num_attention_heads x head_dim='),
  ({'intermediate_size': 2**31 - 8}, 'intermediate_size=2147483640, and'),
  ({'rms_norm_eps': '1e-6'}, "rms_norm_eps='1e-6', which is not a finite"),
  ({'rms_norm_eps': float('nan')}, 'rms_norm_eps=nan'),
  ({'initializer_range': 10**400}, 'which is not a finite number'),
  ({'tie_word_embeddings': 'no'}, "tie_word_embeddings='no'"),
  ({'rope_theta': float('inf')}, 'rope_theta=inf, which is not a finite'),
  ({'rope_scaling': None, 'rope_theta': float('nan')}, 'rope_theta=nan'),
  ({'partial_rotary_factor': float('nan')}, 'partial_rotary_factor=nan'),
  ({'rope_scaling': 5}, 'rope parameters are no object'),
  ({'rope_scaling': {'rope_type': []}}, 'are of rope_type []'),
  ({'rope_scaling': YARN | {'factor': float('inf')}}, 'factor=inf'),
  (
    {'rope_scaling': YARN | {'original_max_position_embeddings': 0}},
    'original_max_position_embeddings=0',
  ),
  (
    {'rope_scaling': YARN | {'original_max_position_embeddings': '8'}},
    "original_max_position_embeddings='8'",
  ),
  ({'rope_scaling': YARN | {'beta_fast': float('nan')}}, 'beta_fast=nan'),
  ({'architectures': 5, 'use_qk_norm': True}, 'architectures=5, which is not'),
  ({'architectures': [5]}, 'architectures=[5], which is not a list of str'),
  ({'model_type': ['qwen3']}, "model_type ['qwen3']"),
  ({'layer_types': 5}, 'layer_types=5, which is not a list of str'),
  ({'layer_types': [['x'], {}]}, 'which is not a list of str'),
  ({'x' * 10**6: 'y' * 10**6}, 'which is not known here'),
]


@pytest.mark.parametrize(('values', 'message'), CONFIGS)
def test_a_config_that_cannot_be_is_refused(folder, capsys, values, message):
  change(folder / 'config.json', **values)
  refuse(folder, capsys, message)


@pytest.mark.parametrize(
  'name',
  [
    'config.json',
    files.INDEX,
    SHARD,
    'merges.txt',
    *tokenizer.MODELS,
  ],
)
@pytest.mark.parametrize('kind', ['pipe', 'folder', 'link', 'broken link'])
def test_what_is_no_regular_file_of_the_folder_is_not_read(
  folder, capsys, name, kind
):
  path = folder / name
  path.unlink(missing_ok=True)
  if kind == 'pipe':
    os.mkfifo(path)
  elif kind == 'folder':
    path.mkdir()
  else:
    secret = folder.parent / 'secret'
    path.symlink_to(secret)
    if kind == 'link':
      secret.write_text('{}')
  refuse(folder, capsys, name)


@pytest.mark.parametrize(
  ('file', 'message'),
  [
    ('../theirs/x.safetensors', 'is not the name of a file in it'),
    ('/etc/passwd', "'/etc/passwd' is not the name of a file in it"),
    ('..', "'..' is not the name of a file in it"),
    ('', "'' is not the name of a file in it"),
    ('a\0b', 'is not the name of a file in it'),
    (5, 'is 5, no name'),
    (['x'], "is ['x'], no name"),
    (None, 'is None, no name'),
    ('x' * 300, 'File name too long'),
    ('other.safetensors', 'names other.safetensors, which is missing'),
    ('config.json', 'is truncated or no safetensors file'),
  ],
)
def test_an_index_names_files_of_its_folder(folder, capsys, file, message):
  path = folder / files.INDEX
  weight_map = json.loads(path.read_text())['weight_map']
  weight_map['model.norm.weight'] = file
  change(path, weight_map=weight_map)
  refuse(folder, capsys, message)


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    ('[' * 10**5, 'is nested too deeply'),
    ('{"a": ' + '1' * 5000 + '}', 'is not JSON'),
    ('[]', 'holds no object'),
    ('', 'is not JSON'),
  ],
)
def test_a_config_that_is_no_config_is_refused(
  folder, capsys, content, message
):
  (folder / 'config.json').write_text(content)
  refuse(folder, capsys, message)


@pytest.mark.parametrize('content', ['', '{}', '{"model": 5}', '\0'])
def test_a_tokenizer_that_cannot_be_read_is_not_imported(
  folder, capsys, content
):
  (folder / 'tokenizer.json').write_text(content)
  refuse(folder, capsys, 'tokenizer.json is no tokenizer.json')


def test_a_header_without_numbers_is_believed_in_nothing(folder, capsys):
  name = SHARD
  header = {
    'x': {'dtype': 'F32', 'shape': [0, 2**60], 'data_offsets': [0, 0]},
  }
  text = json.dumps(header).encode()
  content = len(text).to_bytes(8, 'little') + text
  (folder / name).write_bytes(content)
  refuse(folder, capsys, 'has no tensor')


@pytest.mark.long
def test_the_links_of_a_hugging_face_cache_are_followed(folder, capsys):
  cache = folder.parent / 'models--a--b'
  snapshot = cache / 'snapshots/0123'
  snapshot.mkdir(parents=True)
  (cache / 'blobs').mkdir()
  for number, path in enumerate(sorted(folder.iterdir())):
    path.rename(cache / f'blobs/{number}')
    (snapshot / path.name).symlink_to(f'../../blobs/{number}')
  target = folder.parent / 'ours'
  assert cli.main(['import', str(snapshot), str(target)]) == 0
  assert not (target / 'tokenizer/tokenizer.json').is_symlink()
  assert cli.main(['export', str(target), str(folder.parent / 'back')]) == 0


def test_lists_and_stretched_tensors_in_a_torch_file_are_refused(
  folder, capsys
):
  torch = pytest.importorskip('torch')
  (folder / files.INDEX).unlink()
  for content, message in [
    ([torch.zeros(2)], 'holds a list, not tensors by name'),
    ({'a': 5}, "'a' is not the name of a tensor"),
    ({5: torch.zeros(2)}, '5 is not the name of a tensor'),
    (
      {'a': torch.zeros(1).expand(10**6, 10**6)},
      'has more numbers than are stored',
    ),
  ]:
    torch.save(content, folder / files.TORCH_WEIGHTS)
    refuse(folder, capsys, message)


@pytest.mark.parametrize('size', ['inf', '-inf', 'nan', '0', '-1', 'x', '1e-9'])
def test_a_shard_has_a_size(tmp_path, capsys, size):
  args = ['export', str(tmp_path), str(tmp_path / 'x'), f'--shard-gb={size}']
  assert cli.main(args) == 2
  error = capsys.readouterr().err
  assert f'{size} must be a number of gigabytes' in error
  assert error.count('\n') == 1
