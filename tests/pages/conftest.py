"""A folder in which the names that the pages use are there."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from gated_jax import checkpoint
from gated_jax.config import DataConfig
from gated_jax.config import GateConfig
from gated_jax.config import ModelConfig
from gated_jax.config import RunConfig
from gated_jax.hf import convert
from gated_jax.model.abstract import abstract_parameters
from tests.pages.blocks import ROOT

# A small model under each name that a page gives to a run or an import.
OURS = ('runs/smoke', 'runs/imported', 'runs/a', 'runs/b', 'runs/gated')
OURS += ('runs/ungated', 'runs/mine', 'runs/lora', 'path/of/ours')
OURS += ('models/mine', 'runs/theirs')
UNGATED = 'path/of/either'  # a gate is added to it
THEIRS = 'path/of/theirs'
MODEL = ModelConfig(
  vocab=320,
  length=64,
  depth=2,
  width=16,
  heads=2,
  kv_heads=1,
  head_dim=8,
  mlp_width=16,
  dtype='float32',
  scan=False,
)


def save(folder, model):
  """A checkpoint of random parameters; they are returned."""
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: (rng.normal(size=x.shape) * 0.3).astype(x.dtype),
    abstract_parameters(model),
  )
  data = DataConfig(source='stdlib', length=64, batch=2, rows='joined')
  run = RunConfig(model=model, data=data, eval_batches=1)
  checkpoint.save_parameters(folder / 'checkpoints/5', params, run)
  return params


@pytest.fixture(scope='module')
def small(tmp_path_factory):
  """A folder in which the names that the pages use are there."""
  folder = tmp_path_factory.mktemp('pages')
  params = save(folder / 'saved', MODEL)
  log = [{'step': s, 'loss': 3.0 / s, 'tokens_per_second': 9.0} for s in (1, 2)]
  text = ''.join(json.dumps(line) + '\n' for line in log)
  for name in OURS:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(folder / 'saved', folder / name)
    (folder / name / 'metrics.jsonl').write_text(text)
  no_gate = dataclasses.replace(MODEL, gate=GateConfig(position='none'))
  save(folder / UNGATED, no_gate)
  convert.save(folder / THEIRS, params, MODEL)
  for name in ('path/of/base', 'theirs'):
    shutil.copytree(folder / THEIRS, folder / name)
  for name in ('configs', 'docs', 'tests', 'train.py'):
    (folder / name).symlink_to(ROOT / name)
  return folder
