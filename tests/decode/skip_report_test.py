"""The report of what skipping heads saves and costs."""

import numpy as np
import pytest

from gated_jax.config import ModelConfig
from gated_jax.decode import for_decoding
from gated_jax.decode import skip_report
from gated_jax.evals import likelihood
from gated_jax.model.decoder import Decoder

CONFIG = ModelConfig(
  vocab=61,
  length=64,
  depth=2,
  width=16,
  heads=4,
  kv_heads=2,
  head_dim=8,
  mlp_width=24,
  dtype='float32',
  init_std=0.3,
)


def tokens_of(shape, seed=0):
  return np.random.default_rng(seed).integers(0, 61, shape, np.int32)


@pytest.mark.long
def test_what_a_threshold_saves_and_costs_is_measured(make_params):
  config, params = for_decoding(CONFIG, make_params(CONFIG))
  shape = (2, 16)
  segments = np.ones(shape, np.int32)
  segments[:, -3:] = 0
  batch = {
    'tokens': tokens_of(shape),
    'targets': tokens_of(shape, 1),
    'segments': segments,
    'positions': np.tile(np.arange(16, dtype=np.int32), (2, 1)),
    'weights': segments.astype(np.float32),
  }
  model = Decoder(config)
  exact = skip_report.measure(model, params, [batch], 0.0)
  known = likelihood.evaluate(model, params, [batch])
  assert exact.skipped == 0
  assert exact.loss == pytest.approx(known.loss, rel=1e-5)
  nothing = skip_report.measure(model, params, [batch, batch], 1 - 1e-6)
  assert nothing.skipped == pytest.approx(1)
  assert nothing.loss != pytest.approx(exact.loss, rel=1e-3)


@pytest.mark.long
def test_joined_rows_count_every_key(make_params):
  config, params = for_decoding(CONFIG, make_params(CONFIG))
  batch = {
    'tokens': tokens_of((2, 16)),
    'targets': tokens_of((2, 16), 1),
    'weights': np.ones((2, 16), np.float32),
  }
  model = Decoder(config)
  assert skip_report.measure(model, params, [batch], 0.0).skipped == 0
  whole = skip_report.measure(model, params, [batch], 1 - 1e-6)
  assert whole.skipped == pytest.approx(1)


def test_a_wrong_command_gets_one_line(capsys):
  for flags, message in [
    ([], '--checkpoint'),
    (['--checkpoint=nowhere'], 'no checkpoint at nowhere'),
    (['--checkpoint=nowhere', '--batches=0'], '--batches=0 must be positive'),
  ]:
    assert skip_report.main(flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.count('\n') == 1
