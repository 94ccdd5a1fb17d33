"""Import and export with a bucket on either side."""

import dataclasses
import re

import fsspec
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from gated_jax import checkpoint
from gated_jax import paths
from gated_jax.config import LoraConfig
from gated_jax.config import OptimizerConfig
from gated_jax.hf import __main__ as cli
from gated_jax.hf import convert
from gated_jax.hf import tokenizer
from gated_jax.model.abstract import abstract_parameters

CASE = 'qwen3'


def run(*args):
  return cli.main([str(x) for x in args])


@pytest.fixture
def theirs(cases, make_params, tmp_path):
  family, config = cases[CASE]
  folder = tmp_path / 'theirs'
  # In several shards, so that an index names them.
  convert.save(folder, make_params(config), config, family, shard_bytes=50_000)
  tokenizer.write_bytes(folder, config.length)
  return folder


def contents(folder):
  """Bytes of all files in a folder on a disk or in a bucket, by name."""
  folder = paths.expand(folder)
  return {p.name: paths.read_bytes(p) for p in paths.files_below(folder)}


def put(folder, place):
  files = fsspec.filesystem('gs')
  for name, content in contents(folder).items():
    files.pipe_file(f'{place}/{name}', content)


def test_a_folder_in_a_bucket_is_read_and_written_as_one_on_a_disk(
  theirs, cases, make_params, bucket
):
  family, config = cases[CASE]
  params = make_params(config)
  convert.save(
    f'{bucket}/new/theirs',
    params,
    config,
    family,
    shard_bytes=50_000,
    more=lambda folder: tokenizer.write_bytes(folder, config.length),
  )
  assert len(contents(theirs)) > 6
  assert contents(f'{bucket}/new/theirs') == contents(theirs)
  assert not paths.exists(paths.expand(f'{bucket}/new/.theirs.partial'))
  _, loaded = convert.load(f'{bucket}/new/theirs')
  jax.tree.map(np.testing.assert_array_equal, loaded, convert.load(theirs)[1])


@pytest.mark.long
def test_a_model_comes_from_a_bucket_and_goes_back_into_it(
  theirs, tmp_path, bucket
):
  put(theirs, f'{bucket}/theirs')
  assert run('import', f'{bucket}/theirs', tmp_path / 'ours') == 0
  config = checkpoint.load_config(tmp_path / 'ours')
  assert config.data.tokenizer == str(tmp_path / 'ours/tokenizer')
  assert run('export', tmp_path / 'ours', f'{bucket}/back') == 0
  assert run('export', tmp_path / 'ours', tmp_path / 'back') == 0
  whole = contents(tmp_path / 'back')
  assert contents(f'{bucket}/back') == whole
  assert whole['config.json'] == contents(theirs)['config.json']


def arrays(folder):
  return checkpoint.read_run(paths.expand(folder))['arrays']


@pytest.mark.nightly
def test_everything_lies_in_a_bucket(theirs, tmp_path, bucket):
  """A model, an adapter of it, and our own checkpoints of both."""
  put(theirs, f'{bucket}/theirs')
  assert run('import', f'{bucket}/theirs', f'{bucket}/ours') == 0
  assert run('import', theirs, tmp_path / 'ours') == 0
  assert arrays(f'{bucket}/ours') == arrays(tmp_path / 'ours')
  config = checkpoint.load_config(f'{bucket}/ours')
  assert config.data.tokenizer == f'{bucket}/ours/tokenizer'
  assert not paths.exists(paths.expand(f'{bucket}/.ours.partial'))
  assert run('export', f'{bucket}/ours', f'{bucket}/back') == 0
  assert run('export', tmp_path / 'ours', tmp_path / 'back') == 0
  assert contents(f'{bucket}/back') == contents(tmp_path / 'back')
  assert run('add-gate', f'{bucket}/theirs', f'{bucket}/gated') == 0

  model = dataclasses.replace(config.model, lora=LoraConfig(rank=2))
  rng = np.random.default_rng(0)
  tuned = jax.tree.map(
    lambda x: jax.numpy.asarray(rng.normal(size=x.shape), x.dtype),
    abstract_parameters(model),
  )
  optimizer = OptimizerConfig(train='adapters')
  config = dataclasses.replace(config, model=model, optimizer=optimizer)
  checkpoint.save_parameters(f'{bucket}/tuned', tuned, config)
  base = f'--base={bucket}/theirs'
  made = ('export', '--peft', base, f'{bucket}/tuned', f'{bucket}/adapter')
  assert run(*made) == 0
  names = contents(f'{bucket}/adapter').keys()
  assert {'adapter_config.json', 'adapter_model.safetensors'} <= names
  # The base is named in the adapter's folder, and found there.
  assert run('import', f'{bucket}/adapter', f'{bucket}/both') == 0
  trained, read = arrays(f'{bucket}/tuned'), arrays(f'{bucket}/both')
  lora = [name for name in trained if 'lora' in name]
  assert lora and all(read[name] == trained[name] for name in lora)
  first = arrays(f'{bucket}/ours')
  assert all(read[name] == first[name] for name in first)


@pytest.mark.nightly
def test_torch_files_in_a_bucket_are_read(theirs, bucket):
  torch = pytest.importorskip('torch', reason="pip install -e '.[compare]'")
  put(theirs, f'{bucket}/theirs')
  wanted = convert.load(theirs)[1]
  tensors = {}
  for path in theirs.glob('*.safetensors'):
    for name, x in load_file(path).items():
      tensors[name] = torch.from_numpy(x)
    path.unlink()
  (theirs / 'model.safetensors.index.json').unlink()
  torch.save(tensors, theirs / 'pytorch_model.bin')
  put(theirs, f'{bucket}/old')
  _, found = convert.load(f'{bucket}/old')
  jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize('failing', ['model-00002', 'config.json'])
def test_an_export_that_fails_leaves_nothing(
  cases, make_params, bucket, failing
):
  family, config = cases[CASE]
  params = make_params(config)
  target = f'{bucket}/x'
  original = paths.upload

  def upload(file, place):
    if file.name.startswith(failing):
      raise OSError(f'{place}: the request failed')
    original(file, place)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(paths, 'upload', upload)
    with pytest.raises(OSError, match=failing):
      convert.save(target, params, config, family, shard_bytes=50_000)
  assert not paths.files_below(paths.expand(bucket))


def test_what_a_kill_left_is_replaced(cases, make_params, bucket):
  family, config = cases[CASE]
  params = make_params(config)
  files = fsspec.filesystem('gs')
  files.pipe_file(f'{bucket}/.x.partial', b'')
  files.pipe_file(f'{bucket}/x/model-00009-of-00009.safetensors', b'half')
  convert.save(f'{bucket}/x', params, config, family)
  assert set(contents(f'{bucket}/x')) == {'config.json', 'model.safetensors'}
  with pytest.raises(ValueError, match=r'/x exists; choose another name'):
    convert.save(f'{bucket}/x', params, config, family)


@pytest.mark.parametrize(
  ('words', 'message'),
  [
    (['export', '{ours}', 'gs://no-such-bucket/x'], 'there is no bucket'),
    (['export', '{ours}', 'gs://forbidden/x'], 'no permission'),
    (['export', '{ours}', 'ftp://host/x'], 'nothing is known of ftp://'),
    (['export', '{ours}', '{bucket}'], 'is a whole bucket: name a folder'),
    (['import', 'gs://no-such-bucket/x', 'ours'], 'there is no bucket'),
    (['import', '{bucket}/object', 'ours'], r'/object.*'),
    (['import', '{bucket}/nothing', 'ours'], 'there is no folder .*/nothing'),
  ],
)
def test_what_is_wrong_is_said_in_one_line(
  words, message, bucket, tmp_path, capsys, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  fsspec.filesystem('gs').pipe_file(f'{bucket}/object', b'x')
  args = [word.format(ours=tmp_path, bucket=bucket) for word in words]
  assert run(*args) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith('error: ')
  assert re.search(message, line), line
  assert not (tmp_path / 'ours').exists()
