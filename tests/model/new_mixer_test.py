"""A mixer in one file: everything the package does works with it.

The average over a window of earlier values, with the values in its state. It
stands in for any layer that somebody may add; no other file knows of it.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.core import meta

from gated_jax import Decoder
from gated_jax import sharding
from gated_jax.config import LayerSpec
from gated_jax.config import MeshConfig
from gated_jax.config import ModelConfig
from gated_jax.config import OptimizerConfig
from gated_jax.decode.generate import generate
from gated_jax.evals import diagnostics
from gated_jax.model.abstract import boxed_parameters
from gated_jax.model.accounting import flops_per_token
from gated_jax.model.accounting import parameters
from gated_jax.model.linear import Kernel
from gated_jax.model.linear import project
from gated_jax.model.mixers import MIXERS
from gated_jax.training.optimizer import make_optimizer
from tests.model import mixer_contract_test as contract

PATTERN = ('average:window=3', 'attention')


class Average(nn.Module):
  """out(mean of value(x) over the last `window` tokens of a document)."""

  config: ModelConfig
  layer: LayerSpec
  splits_sequence: ClassVar[bool] = False
  restarts_by_document: ClassVar[bool] = True

  @nn.compact
  def __call__(self, x, ctx, state):
    c, window = self.config, self.layer.window
    shape, axes = (c.width, 2 * c.width), ('embed', 'mlp')
    value = project(x, Kernel(shape, axes, name='value')(), c.dtype)
    value = sharding.constrain(value, 'batch', 'length', 'mlp')
    b, t = x.shape[:2]
    valid = jnp.ones((b, t), bool) if ctx.valid is None else ctx.valid
    documents = ctx.segments
    if documents is None:
      documents = jnp.ones((b, t), jnp.int32)
    before = 0
    if state is not None:
      before = window - 1
      known = jnp.arange(before) >= before - ctx.cache_length[:, None]
      value = jnp.concatenate([state, value], 1)
      valid = jnp.concatenate([known, valid], 1)
      documents = jnp.concatenate([jnp.ones((b, before), int), documents], 1)
      # The last values that are not padding, ending at each row's last token.
      count = jnp.sum(valid[:, before:], 1)
      at = count[:, None] + jnp.arange(before)
      state = jnp.take_along_axis(value, at[..., None], 1)
    query, key = jnp.arange(before, before + t)[:, None], jnp.arange(before + t)
    near = (key <= query) & (query - key < window)
    same = documents[:, before:, None] == documents[:, None]
    seen = near & same & valid[:, None]
    weights = seen / jnp.maximum(seen.sum(-1, keepdims=True), 1)
    y = jnp.einsum('bts,bsm->btm', weights.astype(value.dtype), value)
    self.sow('probes', 'average_size', jnp.abs(y).max())
    y = sharding.constrain(y, 'batch', 'length', 'mlp')
    out = Kernel(shape[::-1], axes[::-1], name='out')()
    return project(y, out, c.dtype), state

  @staticmethod
  def init_state(config, layer, batch, length, dtype, stack):
    shape = (*stack, batch, layer.window - 1, 2 * config.width)
    return jnp.zeros(shape, dtype)

  @staticmethod
  def flops(config, layer, length):
    return 2 * 2 * config.width * min(layer.window, length)


@pytest.fixture(autouse=True)
def table(monkeypatch):
  monkeypatch.setitem(MIXERS, 'average', Average)


def config_of(**changes):
  return dataclasses.replace(contract.BASE, pattern=PATTERN, **changes)


@pytest.mark.long
@pytest.mark.parametrize(
  'check', contract.CHECKS, ids=lambda check: check.__name__
)
def test_it_holds_what_every_mixer_must(check):
  check(PATTERN)


@pytest.mark.long
def test_it_trains_and_is_sharded_and_optimised_by_the_rules_of_its_kinds():
  config = config_of(scan=True, depth=4)
  model, mesh = (
    Decoder(config),
    sharding.make_mesh(MeshConfig(fsdp=4, tensor=2)),
  )
  tokens = contract.tokens_of(8)
  ones = np.ones_like(tokens)
  batch = {'tokens': tokens, 'targets': tokens, 'segments': ones}
  batch['weights'] = ones.astype(np.float32)
  boxed = boxed_parameters(config)
  settings = OptimizerConfig(name='muon', learning_rate=0.02, warmup_steps=0)
  update = make_optimizer(settings, 20, boxed)

  @jax.jit
  def step(params, state):
    def loss_of(params):
      return model.apply({'params': params}, batch, method='loss').total

    loss, gradient = jax.value_and_grad(loss_of)(params)
    change, state = update.update(gradient, state, params)
    return optax.apply_updates(params, change), state, loss

  with sharding.activate(mesh):
    places = sharding.shardings(mesh, boxed)
    init = jax.jit(lambda key: model.init(key, tokens)['params'])
    params = jax.device_put(meta.unbox(init(jax.random.key(0))), places)
    state = update.init(params)
    losses = []
    for _ in range(12):
      params, state, loss = step(params, state)
      losses.append(float(loss))
  assert losses[-1] < 0.5 * losses[0], losses
  kernel = params['layers']['block_0']['average']['value']['kernel']
  assert not kernel.sharding.is_fully_replicated


def test_it_decodes_with_its_state():
  model, params = contract.made(PATTERN)
  prompts = [[3, 1, 4, 1, 5], [9, 2]]
  steps = generate(model, params, prompts, max_tokens=5)
  found = np.stack(list(steps), axis=1)
  for prompt, answer in zip(prompts, found, strict=True):
    text = list(prompt)
    for token in answer:
      row = np.zeros((1, contract.LENGTH), np.int32)
      row[0, : len(text)] = text
      logits = contract.logits_of(PATTERN, row)[0, len(text) - 1]
      assert token == np.argmax(logits)
      text.append(token)


def test_its_parameters_and_flops_are_counted():
  config = config_of()
  assert parameters(config)['average'] == 2 * 16 * 32
  flops = flops_per_token(config, 16)
  assert flops['average_projections'] == 6 * 2 * 16 * 32
  assert flops['average'] == 3 * 2 * 2 * 16 * 3


@pytest.mark.long
def test_it_shows_its_own_probe_beside_those_of_other_layers():
  model, params = contract.made(PATTERN)
  tokens = contract.tokens_of(1)
  batch = {'tokens': tokens, 'targets': tokens}
  batch['weights'] = np.ones_like(tokens, np.float32)
  report = diagnostics.probe(model, params, [batch])
  scalars = report.scalars()
  assert len(report.first_token) == 1  # there is one layer of attention
  assert 'sink/layer_01' in scalars
  assert 'sink/layer_00' not in scalars
  assert scalars['average_size/layer_00'] > 0


def test_a_mesh_that_splits_rows_refuses_it_by_name():
  model, params = contract.made(PATTERN)
  mesh = sharding.make_mesh(MeshConfig(context=8))
  with (
    sharding.activate(mesh),
    pytest.raises(
      ValueError, match=r"mesh.context=8 .* mixer 'average' cannot"
    ),
  ):
    model.apply({'params': params}, jnp.zeros((1, 16), jnp.int32))


def test_a_word_of_no_mixer_is_refused_with_the_nearest():
  config = dataclasses.replace(contract.BASE, pattern=('averag:window=3',))
  with pytest.raises(ValueError, match=r"'averag'.*did you mean average\?"):
    Decoder(config).init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
