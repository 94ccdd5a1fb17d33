"""model/moe.py: parameter names, losses and logs. Values: ops/moe_test.py, ops/route_test.py."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from flax.core import meta

from gated_jax import sharding
from gated_jax.config import MeshConfig
from gated_jax.config import ModelConfig
from gated_jax.config import MoEConfig
from gated_jax.model.decoder import Decoder
from gated_jax.model.moe import MoE

CONFIG = ModelConfig(
  vocab=32,
  length=8,
  depth=1,
  width=8,
  heads=2,
  kv_heads=1,
  head_dim=4,
  mlp_width=16,
  dtype='float32',
  init_std=0.5,
  pattern=('attention+moe',),
  moe=MoEConfig(experts=4, top_k=2, width=6, shared_width=5),
)
X = jax.random.normal(jax.random.key(0), (2, 8, 8))


UNSHARED = dataclasses.replace(
  CONFIG, moe=dataclasses.replace(CONFIG.moe, shared_width=0)
)
GATED = dataclasses.replace(
  CONFIG, moe=dataclasses.replace(CONFIG.moe, shared_gate=True)
)
REDUCED = dataclasses.replace(
  UNSHARED,
  moe=dataclasses.replace(UNSHARED.moe, reduced_width=4, output_norm=True),
)


def boxed(config=CONFIG):
  """Parameters in their boxes, without numbers."""
  layer = MoE(config, config.moe.width)
  return jax.eval_shape(layer.init, jax.random.key(1), X)['params']


@pytest.fixture(scope='module')
def params():
  """Of all that any of the layers has; others pass over what is not theirs."""
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: rng.normal(scale=0.5, size=x.shape).astype(x.dtype),
    meta.unbox(boxed(GATED)),
  )


@functools.partial(jax.jit, static_argnums=0)
def run(config, params, x, valid=None):
  layer = MoE(config, config.moe.width)
  return layer.apply({'params': params}, x, valid)


def test_parameters_have_these_names_shapes_and_logical_axes():
  flat = traverse_util.flatten_dict(
    boxed(), sep='/', is_leaf=lambda _, v: hasattr(v, 'names')
  )
  found = {k: (v.value.shape, v.names) for k, v in flat.items()}
  assert found == {
    'router/kernel': ((8, 4), ('embed', None)),
    'gate_proj': ((4, 8, 6), ('experts', 'expert_embed', 'mlp')),
    'up': ((4, 8, 6), ('experts', 'expert_embed', 'mlp')),
    'down': ((4, 6, 8), ('experts', 'mlp', 'expert_embed')),
    'shared/gate_proj/kernel': ((8, 5), ('embed', 'mlp')),
    'shared/up/kernel': ((8, 5), ('embed', 'mlp')),
    'shared/down/kernel': ((5, 8), ('mlp', 'embed')),
  }
  flat = traverse_util.flatten_dict(meta.unbox(boxed(REDUCED)), sep='/')
  assert {k: v.shape for k, v in flat.items()} == {
    'router/kernel': (8, 4),
    'reduce/kernel': (8, 4),
    'input_norm/scale': (4,),
    'gate_proj': (4, 4, 6),
    'up': (4, 4, 6),
    'down': (4, 6, 4),
    'output_norm/scale': (4,),
    'expand/kernel': (4, 8),
  }


def test_output_is_routed_experts_plus_the_shared_one(params):
  found = run(CONFIG, params, X)
  p = jax.tree.map(np.float64, params)
  x = np.asarray(X, np.float64).reshape(-1, 8)

  def mlp(token, gate, up, down):
    g = token @ gate
    return (g / (1 + np.exp(-g)) * (token @ up)) @ down

  expected = np.zeros_like(x)
  for m, token in enumerate(x):
    scores = np.exp(token @ p['router']['kernel'])
    best = np.argsort(-scores)[:2]
    for e in best:
      part = mlp(token, p['gate_proj'][e], p['up'][e], p['down'][e])
      expected[m] += scores[e] / scores[best].sum() * part
    s = p['shared']
    expected[m] += mlp(
      token, s['gate_proj']['kernel'], s['up']['kernel'], s['down']['kernel']
    )
  np.testing.assert_allclose(
    found.output.reshape(-1, 8), expected, rtol=1e-4, atol=1e-5
  )


def test_the_shared_expert_is_scaled_by_a_gate_of_its_own(params):
  found, whole, routed = (
    np.asarray(run(config, params, X).output)
    for config in (GATED, CONFIG, UNSHARED)
  )
  kernel = params['shared_gate']['kernel']
  assert kernel.shape == (8, 1)
  score = 1 / (1 + np.exp(-np.asarray(X) @ kernel))
  expected = routed + score * (whole - routed)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_losses_are_scaled_by_their_coefficients_and_logs_are_not(params):
  out = run(CONFIG, params, X)
  assert float(out.losses['balance_loss']) == pytest.approx(
    CONFIG.moe.balance_loss * float(out.logs['balance'])
  )
  assert float(out.losses['router_z_loss']) == pytest.approx(
    CONFIG.moe.router_z_loss * float(out.logs['router_z'])
  )
  assert set(out.logs) == {'balance', 'router_z', 'max_load', 'idle_experts'}


def test_padding_changes_losses_but_no_output(params):
  valid = jnp.arange(8)[None].repeat(2, 0) < 5
  masked, whole = run(CONFIG, params, X, valid), run(CONFIG, params, X)
  np.testing.assert_array_equal(masked.output, whole.output)
  cut = run(CONFIG, params, X[:, :5])
  for name in cut.losses:
    assert float(masked.losses[name]) == pytest.approx(float(cut.losses[name]))
  assert masked.losses['balance_loss'] != whole.losses['balance_loss']


def test_without_a_shared_expert_there_are_no_parameters_for_it():
  assert 'shared' not in boxed(UNSHARED)


def test_router_learns_from_both_losses_and_the_output(params):
  def terms(router):
    o = run(UNSHARED, {**params, 'router': {'kernel': router}}, X)
    losses = o.losses['balance_loss'], o.losses['router_z_loss']
    return [*losses, jnp.sum(o.output**2)]

  @jax.jit
  def slopes(router):
    _, pull = jax.vjp(terms, router)
    return [pull(list(one)) for one in jnp.eye(3)]

  for (slope,) in slopes(params['router']['kernel']):
    assert jnp.abs(slope).sum() > 0


@pytest.mark.long
@pytest.mark.skipif(jax.device_count() < 2, reason='needs 2 devices')
@pytest.mark.parametrize(
  ('config', 'channels', 'full'),
  # Where all is made again, the gradient of `expand` needs the rows home again.
  [(CONFIG, 8, (10, 5)), (REDUCED, 4, (14, 7))],
)
def test_policies_send_rows_again_or_save_them_and_keep_chunks_in_order(
  config, channels, full
):
  """Two chunks go there, back, their gradients there and back: eight.

  The second is not read before the first's products are there, nor sent home
  before the first is home: a barrier for each, and in backward as many.
  """
  mesh = sharding.make_mesh(MeshConfig(expert=2), jax.devices()[:2])
  tokens = jax.ShapeDtypeStruct((4, 8), jnp.int32)

  with sharding.activate(mesh):
    made = jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens)
  params = meta.unbox(made['params'])

  def traced(remat):
    model = Decoder(dataclasses.replace(config, remat=remat))

    def total(params, tokens):
      return model.apply({'params': params}, tokens)[0].sum()

    with sharding.activate(mesh):
      text = str(jax.make_jaxpr(jax.grad(total))(params, tokens))
    # Of rows with all channels; further rounds have smaller buffers.
    rows = rf'f32\[32,{channels}\] = '
    exchanges = re.findall(rows + 'all_to_all', text)
    barriers = re.findall(rows + 'optimization_barrier', text)
    return len(exchanges), len(barriers)

  policies = 'minimal', 'exchange', 'full'
  counts = [traced(remat) for remat in policies]
  assert counts == [(8, 4), (8, 4), full]
