"""Loss by position and retrieval of a checkpoint, under another rotation."""

import json
import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from gated_jax import cli
from gated_jax import paths
from gated_jax.evals import context

ROOT = pathlib.Path(__file__).parents[2]


class Later(nn.Module):
  """Logits that know the target better the later it comes."""

  def __call__(self, tokens):
    sure = jnp.arange(tokens.shape[1], dtype=jnp.float32)[None, :, None]
    # The target is the token itself.
    return sure * (tokens[..., None] == jnp.arange(8))


def batch(tokens, weights):
  return {
    'tokens': np.array(tokens, np.int32),
    'targets': np.array(tokens, np.int32),
    'weights': np.array(weights, np.float32),
  }


def test_each_place_has_the_mean_of_the_tokens_that_count_there():
  batches = [
    batch([[1, 2, 3], [4, 5, 6]], [[1, 1, 0], [1, 0, 0]]),
    batch([[7, 7, 7], [0, 0, 0]], [[1, 1, 0], [0, 0, 0]]),
  ]
  found = context.loss_by_position(Later(), {}, batches)
  expected = [np.log(np.exp(n) + 7) - n for n in range(3)]
  np.testing.assert_allclose(found[:2], expected[:2], rtol=1e-6)
  assert np.isnan(found[2])


def test_bins_name_their_last_place_and_leave_out_what_is_unknown():
  values = np.array([1.0, 3.0, 5.0, np.nan, 2.0])
  assert context.binned(values, 2) == [[3, 3.0], [5, 2.0]]
  assert context.binned(values[:2], 32) == [[1, 1.0], [2, 3.0]]


@pytest.mark.parametrize('place', ['tmp_path', 'bucket'])
def test_figures_of_several_rotations_share_a_file(place, request):
  folder = paths.expand(request.getfixturevalue(place))
  path = folder / 'new' / 'context.json'
  context.add(path, 'trained', {'loss': [[1, 2.0]]})
  context.add(path, 'yarn', {'loss': []})
  known = json.loads(paths.read_bytes(path))
  assert known == {'trained': {'loss': [[1, 2.0]]}, 'yarn': {'loss': []}}


@pytest.mark.parametrize('lengths', ['', '12,x', '0', '5,-1'])
def test_lengths_are_numbers(lengths, capsys):
  arguments = ['--checkpoint=x', f'--lengths={lengths}']
  assert cli.run(lambda: context.main(arguments)) == cli.REFUSED
  error = capsys.readouterr().err
  assert error.count('\n') == 1
  assert f'--lengths={lengths!r} must be lengths' in error


@pytest.mark.nightly
def test_a_run_is_read_further_than_it_was_trained(
  tmp_path, monkeypatch, capsys
):
  """Trains on bytes for a step, then reads four times as far with YaRN."""
  monkeypatch.chdir(tmp_path)
  text = ''.join(f'line {i} of some text\n' for i in range(400))
  for name in 'abcdefgh':
    (tmp_path / f'{name}.txt').write_text(text + name)
  subprocess.run(
    [
      sys.executable,
      str(ROOT / 'train.py'),
      f'--config={ROOT}/configs/smoke.py',
      '--workdir=run',
      '--config.steps=1',
      '--config.optimizer.warmup_steps=0',
      '--config.data.source=text',
      '--config.data.paths=*.txt',
      '--config.data.rows=joined',
      '--config.data.validation=0.3',
      '--config.figures=False',
    ],
    check=True,
    env={**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'},
    stdout=subprocess.DEVNULL,
  )
  context.main(
    [
      '--checkpoint=run',
      '--lengths=512,1024',
      '--rows=1',
      '--out=run/context.json',
      '--name=yarn',
      '--config.model.rope.scaling=yarn',
      '--config.model.rope.factor=4',
      '--config.model.rope.original_length=256',
      '--config.eval_batches=1',
    ]
  )
  figures = json.loads((tmp_path / 'run/context.json').read_text())['yarn']
  assert len(figures['loss']) == context.BINS
  assert figures['loss'][-1][0] == 1024
  assert set(figures['retrieval']) == {'needle', 'keys', 'variables'}
  assert 'loss to position 1024' in capsys.readouterr().out
