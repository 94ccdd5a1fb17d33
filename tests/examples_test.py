"""The examples in docs/ do what they say."""

import dataclasses
import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train
from gated_jax import checkpoint
from gated_jax import config_flag
from gated_jax.model.abstract import abstract_parameters
from tests.cli_test import fresh_flags

# Together most of a minute or more; see CONTRIBUTING.md.
pytestmark = pytest.mark.long

FOLDER = pathlib.Path(__file__).parents[1] / 'docs/examples'


def load(name):
  spec = importlib.util.spec_from_file_location(name, FOLDER / f'{name}.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_a_linen_model_learns_with_gated_attention():
  first, last = load('linen_model').train()
  assert first > 1.5
  assert last < 0.5


def test_an_nnx_model_learns_to_count_and_counts():
  example = load('nnx_transformer')
  model, first, last = example.train(steps=100)
  assert first > 2
  assert last < 0.1
  prompt = np.array([[0, 1], [5, 8]])
  steps = np.arange(example.LENGTH)
  expected = (prompt[:, :1] + (prompt[:, 1:] - prompt[:, :1]) * steps) % 11
  np.testing.assert_array_equal(example.sample(model, prompt), expected)


def test_plain_functions_under_grad_vmap_and_shard_map():
  example = load('plain_jax')
  query, key, value, gate = example.arrays()
  expected = example.attend(query, key, value, gate)

  # d/dg of (y s(g))^2 is 2 (y s)^2 (1 - s).
  gradient = 2 * expected**2 * jax.nn.sigmoid(-gate)
  np.testing.assert_allclose(
    example.gradient_of_the_gate(), gradient, rtol=1e-5, atol=1e-6
  )

  gates = jnp.stack([gate, jnp.full_like(gate, 100.0)])
  both = example.several_gates_at_once(gates)
  np.testing.assert_allclose(both[0], expected, rtol=1e-6, atol=1e-6)
  opened = example.gated_dot_product_attention(query, key, value).output
  np.testing.assert_allclose(both[1], opened, rtol=1e-6, atol=1e-6)

  mesh = jax.sharding.Mesh(jax.devices()[:2], ('heads',))
  split = example.heads_over_devices(mesh)
  np.testing.assert_allclose(split, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.nightly
def test_without_a_gate_a_sink_grows_and_with_one_it_hardly_does():
  example = load('backcopy')
  sinks = [
    example.run(example.GATES[name], seed=0, steps=750)[0]
    for name in ('none', 'elementwise')
  ]
  assert sinks[0] > 0.3
  assert sinks[1] < 0.6 * sinks[0]


def test_every_example_is_tested():
  tested = {
    'backcopy',
    'distillation',
    'linen_model',
    'nnx_transformer',
    'own_trainer',
    'plain_jax',
  }
  assert {path.stem for path in FOLDER.glob('*.py')} == tested


@pytest.mark.nightly
def test_a_trainer_with_parts_of_ones_own_reaches_its_goal_and_ends(tmp_path):
  losses = load('own_trainer').train(tmp_path)
  assert min(losses.values()) < 0.5
  assert list(losses)[-1] < 300


@pytest.mark.nightly
def test_a_student_comes_near_its_teacher(tmp_path):
  apart = load('distillation').train(tmp_path)
  first, *_, last = apart.values()
  assert last < 0.1 * first


@pytest.mark.nightly
def test_a_config_file_brings_its_own_loss(tmp_path, monkeypatch, capsys):
  example = load('distillation')
  config = example.settings(2, 6)
  config = dataclasses.replace(
    config,
    data=dataclasses.replace(config.data, source='synthetic'),
    model=dataclasses.replace(config.model, vocab=320),
    eval_batches=1,
  )
  params = jax.tree.map(
    lambda x: np.full(x.shape, 0.1, x.dtype),
    abstract_parameters(config.model),
  )
  teacher = tmp_path / 'teacher'
  checkpoint.save_parameters(teacher, params, config)
  student = tmp_path / 'student'
  words = [f'--config={FOLDER}/distillation.py:{teacher}']
  words = ['train.py', *words, f'--workdir={student}']
  fresh = fresh_flags()
  for module in (config_flag, train):
    monkeypatch.setattr(module, 'FLAGS', fresh)
  assert train.main(words) == 0, capsys.readouterr().err
  lines = (student / 'metrics.jsonl').read_text().splitlines()
  measured = [json.loads(line) for line in lines]
  assert [x['kl'] for x in measured if 'kl' in x]
  saved = checkpoint.read_run(checkpoint.find(student))
  assert saved['own_loss'] == 'distil.<locals>.loss'
  assert saved['config']['model']['depth'] == 1
