"""A model with adapters is exported as the sum that it computes."""

import dataclasses

import jax
import numpy as np
import pytest

from gated_jax import checkpoint
from gated_jax.config import DataConfig
from gated_jax.config import LoraConfig
from gated_jax.config import OptimizerConfig
from gated_jax.config import RunConfig
from gated_jax.hf import __main__ as cli
from gated_jax.hf import convert
from gated_jax.model import adapters
from gated_jax.model.abstract import abstract_parameters


@pytest.mark.long
def test_export_adds_adapters_to_their_matrices(cases, tmp_path, capsys):
  _, config = cases['qwen3']
  config = dataclasses.replace(config, lora=LoraConfig(rank=2, alpha=3.0))
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype(x.dtype),
    abstract_parameters(config),
  )
  run = RunConfig(
    model=config,
    data=DataConfig(length=config.length),
    optimizer=OptimizerConfig(train='adapters'),
  )
  checkpoint.save_parameters(tmp_path / 'ours', params, run)
  assert not cli.main(['export', f'{tmp_path}/ours', f'{tmp_path}/theirs'])
  assert 'adapters are added' in capsys.readouterr().out
  _, found = convert.load(tmp_path / 'theirs')
  _, expected = adapters.merge(config, params)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), found, expected
  )
