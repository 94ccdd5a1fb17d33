"""python -m gated_jax.evals: the figures of a run, and of other text."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from gated_jax import checkpoint
from gated_jax.config import ModelConfig
from gated_jax.config import RunConfig
from gated_jax.data.tokenizer import ByteTokenizer
from gated_jax.data.tokenizer import document
from gated_jax.evals import __main__ as cli
from gated_jax.model.abstract import abstract_parameters
from gated_jax.model.decoder import Decoder

# Together most of a minute or more; see CONTRIBUTING.md.
pytestmark = pytest.mark.long

MODEL = ModelConfig(
  vocab=320,
  length=64,
  depth=2,
  pattern=('attention:window=8', 'attention'),
  width=16,
  heads=2,
  kv_heads=1,
  head_dim=8,
  mlp_width=16,
  dtype='float32',
)


@pytest.fixture(scope='module')
def params():
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: (rng.normal(size=x.shape) * 0.3).astype(x.dtype),
    abstract_parameters(MODEL),
  )


@pytest.fixture(scope='module')
def run(tmp_path_factory, params):
  """A run on text of its own, a part of which it held out."""
  folder = tmp_path_factory.mktemp('run')
  for i in range(40):
    (folder / f'{i}.txt').write_text(
      f'text number {i} and so on, ' * (i % 5 + 1)
    )
  data = dataclasses.replace(
    RunConfig().data,
    source='text',
    paths=str(folder / '*.txt'),
    length=32,
    validation=0.3,
  )
  config = RunConfig(model=MODEL, data=data, eval_batches=2)
  checkpoint.save_parameters(folder / 'checkpoints/7', params, config)
  return folder


def measure(capsys, *flags):
  """The figures that the command prints, by name."""
  assert cli.main([str(flag) for flag in flags]) == 0
  text = capsys.readouterr().out
  return dict(re.findall(r'^(\w[^|\n]*?)  +(\S.*)$', text, re.MULTILINE)), text


@pytest.mark.nightly
def test_other_text_is_measured_whole(run, params, tmp_path, capsys):
  text = 'one text, as long as three rows and a bit. ' * 2
  (tmp_path / 'other.txt').write_text(text)
  figures, out = measure(
    capsys,
    f'--checkpoint={run}',
    f'--figures={tmp_path / "out"}',
    '--config.data.source=text',
    '--config.data.paths',
    tmp_path / '*.txt',
  )
  ids = document(ByteTokenizer(), text)
  nats = 0.0
  for begin in range(0, len(ids) - 1, 32):
    row = ids[begin : begin + 33]
    logits = Decoder(MODEL).apply({'params': params}, row[None, :-1])[0]
    logits = np.asarray(logits, np.float64)
    p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nats -= p[np.arange(len(row) - 1), row[1:]].sum()
  count = len(ids) - 1
  assert figures['documents'] == 'all'
  assert figures['batches'] == '1, all there are'
  assert figures['tokens'] == str(count)
  loss = float(figures['loss'].split()[0])
  assert loss == pytest.approx(nats / count, abs=1e-4)
  assert float(figures['perplexity']) == pytest.approx(
    np.exp(nats / count), rel=1e-3
  )
  assert float(figures['bits per byte']) == pytest.approx(
    nats / np.log(2) / len(text), abs=1e-4
  )
  assert 'first-token attention' in figures and 'mean gate' in figures
  assert len(re.findall(r'^\| \d+ \|', out, re.MULTILINE)) == MODEL.depth
  names = {path.name for path in (tmp_path / 'out').iterdir()}
  assert names == {'sink.png', 'gate.png', 'activation.png', 'attention.png'}


def test_a_runs_own_text_is_what_it_held_out(run, capsys):
  figures, _ = measure(capsys, f'--checkpoint={run / "checkpoints/7"}')
  assert figures['documents'] == '30.00%, held out by their content'
  assert figures['batches'] == '2'
  more, _ = measure(capsys, f'--checkpoint={run}', '--config.eval_batches=1000')
  assert more['batches'].endswith('all there are')
  tokens = [int(x['tokens'].replace(',', '')) for x in (figures, more)]
  assert tokens[0] < tokens[1]


def test_ids_without_text_have_no_bits_per_byte(run, capsys):
  figures, _ = measure(
    capsys,
    f'--checkpoint={run}',
    '--config.data.source=synthetic',
    '--config.data.paths=',
    '--config.eval_batches=1',
  )
  assert 'loss' in figures and 'bits per byte' not in figures


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    ([], '--checkpoint'),
    (['--checkpoint=nowhere'], 'no checkpoint at nowhere'),
    (['RUN', '--config.data.pths=x'], 'did you mean --config.data.paths'),
    (['RUN', '--config.steps=many'], '--config.steps=many must be of type int'),
    (['RUN', '--steps=5'], "'--steps=5' is not a flag"),
    (['RUN', 'x'], "'x' is not a flag"),
    (['RUN', '--config.data.batch'], '--config.data.batch has no value'),
    (['RUN', '--config.data.validation=nan'], 'data.validation=nan'),
    (['RUN', '--config.data.shuffle=maybe'], 'must be of type bool'),
    (['RUN', '--config.data.mixture=(1'], 'must be of type tuple'),
    (['RUN', '--config.data.paths=/no/*'], "no data files match '/no/*'"),
    (['RUN', '--config.model.width=32'], 'holds another model'),
    (['RUN', f'--config.model.depth={10**6}'], 'holds another model'),
    (['RUN', f'--config.model.width={2**28}'], 'GiB of memory'),
    (['RUN', '--config.data.batch=3'], 'data.batch'),
    (['RUN', '--figures=FILE'], 'must be a folder'),
  ],
)
def test_a_wrong_command_gets_one_line(run, capsys, flags, message):
  names = {
    'RUN': f'--checkpoint={run}',
    '--figures=FILE': f'--figures={run}/1.txt',
  }
  assert cli.main([names.get(flag, flag) for flag in flags]) == 2
  error = capsys.readouterr().err
  assert message in error
  assert error.startswith('error: ') and error.count('\n') == 1
