"""The attention module against float64 NumPy, gradients too, gate by gate."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from gated_jax import GateConfig
from gated_jax import GatedAttention
from gated_jax import ModelConfig
from gated_jax.model import gate as gate_module
from gated_jax.model.mixer import Context
from gated_jax.model.mixers import attention
from gated_jax.model.mixers.self_attention import SelfAttention
from tests.quick import QUICK

B, T, S, D, E = 2, 5, 7, 12, 10
N, K, H = 4, 2, 6

# Every position, granularity and sharing that GateConfig allows, then every
# activation, sum and source where the paper has them.
GATES = [
  GateConfig(position='none'),
  GateConfig(kind='rms_norm'),
  GateConfig(kind='silu'),
  GateConfig(kind='exclusive'),
  GateConfig(kind='sink_logit'),
  GateConfig(kind='key_bias'),
  GateConfig(position='dense_output'),
  *(
    GateConfig(position=position, granularity=granularity)
    for position, granularity in itertools.product(
      ('query', 'key', 'value', 'sdpa_output'), ('elementwise', 'headwise')
    )
  ),
  *(GateConfig(position=p, shared=True) for p in ('value', 'sdpa_output')),
  *(
    GateConfig(activation=name, mode=mode)
    for name, mode in itertools.product(
      ('silu', 'identity', 'ns_sigmoid', 'two_sigmoid', 'softplus'),
      ('multiplicative', 'additive'),
    )
  ),
  GateConfig(source='parameter'),
  GateConfig(source='parameter', granularity='headwise', position='value'),
  GateConfig(channels=3),
  GateConfig(channels=3, granularity='headwise'),
  GateConfig(position='dense_output', channels=5, mode='additive'),
]


def label(gate):
  plain = GateConfig()
  changed = {k: v for k, v in vars(gate).items() if v != getattr(plain, k)}
  return '-'.join(map(str, changed.values())) or 'default'


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


ACT = {
  'sigmoid': sigmoid,
  'silu': lambda x: x * sigmoid(x),
  'identity': lambda x: x,
  'ns_sigmoid': lambda x: 0.5 + 0.5 * sigmoid(x),
  'two_sigmoid': lambda x: 2 * sigmoid(x),
  'softplus': lambda x: np.log(1 + np.exp(x)),
}


def reference(p, x, y, mask, gate, qk_norm=False):
  """Head by head in loops; complex numbers pass through, for derivatives."""

  def gated(name, z, source):
    if gate.position != name or gate.kind != 'gate':
      return z
    if gate.source == 'parameter':
      g = np.broadcast_to(
        p['gate']['scores'], (*z.shape[:2], *p['gate']['scores'].shape)
      )
    else:
      w = p['gate']['kernel']
      flat = source[..., : len(w)] @ w.reshape(len(w), -1)
      g = flat.reshape(*z.shape[:2], *w.shape[1:])
    if gate.granularity == 'headwise':
      g = g[..., None]
    s = ACT[gate.activation](g)
    if gate.shared:
      s = sum(s[:, :, n] for n in range(s.shape[2]))[:, :, None] / z.shape[2]
    return z + s if gate.mode == 'additive' else z * s

  def heads(name, source):
    w = p[name]['kernel']
    z = (source @ w.reshape(len(w), -1)).reshape(*source.shape[:2], -1, H)
    return gated(name, z, source)

  def rms(z, name):
    mean = np.sum(z * z, axis=-1, keepdims=True) / z.shape[-1]
    return z / np.sqrt(mean + 1e-6) * p[name]['scale']

  q, k, v = heads('query', x), heads('key', y), heads('value', y)
  if qk_norm:
    q, k = rms(q, 'query_norm'), rms(k, 'key_norm')
  out = np.zeros((*x.shape[:2], N, H), np.result_type(q, k, v))
  for b, n, t in itertools.product(range(len(x)), range(N), range(x.shape[1])):
    logits = k[b, :, n * K // N] @ q[b, t, n] / np.sqrt(H)
    w = np.exp(logits) * mask[b, t]
    total = np.sum(w)
    if gate.kind == 'sink_logit':
      total = total + np.exp(p['sink']['logit'][n])
    if gate.kind == 'key_bias':
      bias = p['sink']['key'][n * K // N]
      total = total + np.exp(bias @ q[b, t, n] / np.sqrt(H))
    out[b, t, n] = w @ v[b, :, n * K // N] / total
  out = gated('sdpa_output', out, x)
  if gate.kind == 'rms_norm':
    out = rms(out, 'output_norm')
  if gate.kind == 'silu':
    out = ACT['silu'](out)
  if gate.kind == 'exclusive':
    for n in range(N):
      own = v[:, :, n * K // N]
      share = np.sum(out[:, :, n] * own, -1) / np.sum(own * own, -1)
      out[:, :, n] -= share[..., None] * own
  w = p['out']['kernel']
  z = out.reshape(*x.shape[:2], -1) @ w.reshape(N * H, -1)
  return gated('dense_output', z, x)


def tree_step(tree, direction, size):
  return jax.tree.map(lambda a, d: a + size * d, tree, direction)


@pytest.mark.parametrize('gate', GATES, ids=label)
def test_values_and_gradients_are_those_of_float64_loops(gate):
  check_against_loops(gate)


@pytest.mark.parametrize('activation', ['sigmoid', 'identity'])
def test_the_same_where_keys_and_a_narrow_gate_share_a_product(
  activation, monkeypatch
):
  shared = []

  project_both = attention.project_both

  def counted(*arrays):
    shared.append(arrays)
    return project_both(*arrays)

  monkeypatch.setattr(gate_module, 'on_tpu', lambda implementation: True)
  monkeypatch.setattr(attention, 'project_both', counted)
  check_against_loops(GateConfig(granularity='headwise', activation=activation))
  assert shared


def check_against_loops(gate):
  rng = np.random.default_rng(0)
  cross = gate.position in ('none', 'key', 'value')
  mask = rng.random((B, T, S if cross else T)) < 0.6
  mask[..., 0] = True
  x = rng.normal(size=(B, T, D))
  y = rng.normal(size=(B, S, E)) if cross else x
  with jax.enable_x64(True):
    layer = GatedAttention(
      num_heads=N,
      num_kv_heads=K,
      qkv_features=N * H,
      gate=gate,
      use_bias=False,
      dtype='float64',
      param_dtype='float64',
    )
    inputs = (x, y) if cross else (x,)
    kinds = {'mask': mask[:, None], 'deterministic': True}
    shapes = jax.eval_shape(
      lambda key: layer.init(key, *inputs, **kinds), jax.random.key(1)
    )
    params = jax.tree.map(
      lambda a: 0.4 * rng.normal(size=a.shape), meta.unbox(shapes)['params']
    )
    weights = rng.normal(size=(B, T, D))

    def scalar(params, *inputs):
      return jnp.sum(
        weights * layer.apply({'params': params}, *inputs, **kinds)
      )

    points = (params, *inputs)
    slopes_of = jax.grad(scalar, tuple(range(len(points))))

    def both(*points):
      """Without a gradient, and the gradient: one program to compile."""
      params, *inputs = points
      output = layer.apply({'params': params}, *inputs, **kinds)
      return output, slopes_of(*points)

    found, gradients = jax.jit(both, compiler_options=QUICK)(*points)
    expected = reference(params, x, y, mask, gate)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)

    # Along random directions: exact derivatives by an imaginary step.
    for which in range(len(points)):
      for path in range(2 if which else 5):
        leaves = jax.tree.map(lambda a: rng.normal(size=a.shape), points[which])
        if not which and path < 4:  # one kind of parameter at a time
          keep = ('gate', 'value', 'key', 'sink')[path]
          leaves = {
            n: jax.tree.map(lambda d, n=n, keep=keep: d * (n == keep), sub)
            for n, sub in leaves.items()
          }
        moved = list(points)
        moved[which] = tree_step(points[which], leaves, 1e-30j)
        p, first, *rest = moved
        slope = reference(p, first, rest[0] if rest else first, mask, gate)
        slope = np.sum(weights * slope.imag) / 1e-30
        terms = jax.tree.map(
          lambda g, d: np.sum(g * d), gradients[which], leaves
        )
        total = sum(jax.tree.leaves(terms))
        np.testing.assert_allclose(total, slope, rtol=1e-8, atol=1e-8)


@pytest.mark.long
def test_a_zero_two_sigmoid_gate_leaves_a_trained_layer_as_it_was():
  x = jax.random.normal(jax.random.key(0), (1, 6, 16))
  plain = GatedAttention(num_heads=4, gate=GateConfig(position='none'))
  params = meta.unbox(plain.init(jax.random.key(1), x))['params']
  gate = GateConfig(activation='two_sigmoid', init='zeros')
  gated = GatedAttention(num_heads=4, gate=gate)
  zeros = {'gate': {'kernel': jnp.zeros((16, 4, 4))}}
  np.testing.assert_array_equal(
    gated.apply({'params': {**params, **zeros}}, x),
    plain.apply({'params': params}, x),
  )


@pytest.mark.long
def test_gate_in_bfloat16_rounds_once_unless_told_otherwise():
  x = jax.random.normal(jax.random.key(0), (1, 64, 16)).astype(jnp.bfloat16)

  def run(kind):
    layer = GatedAttention(
      num_heads=4, gate=GateConfig(dtype=kind), dtype='bfloat16', init_std=0.5
    )
    params = layer.init(jax.random.key(1), x)
    exact = layer.clone(dtype='float32')
    return layer.apply(params, x), exact.apply(params, x.astype(jnp.float32))

  wide, exact = run('float32')
  narrow, _ = run('model')
  assert (wide != narrow).any()
  error = [float(jnp.abs(y - exact).mean()) for y in (wide, narrow)]
  assert error[0] < error[1]


def test_queries_of_one_document_do_not_see_another():
  segments = jnp.array([[1, 1, 1, 2, 2, 0]])
  x = jax.random.normal(jax.random.key(0), (1, 6, 16))
  config = ModelConfig(
    width=16, heads=4, kv_heads=4, head_dim=4, dtype='float32',
    pattern=('attention:nope',),
  )  # fmt: skip
  layer = SelfAttention(config, config.layers[0])
  ctx = Context(segments=segments, valid=segments != 0)
  params = jax.jit(layer.init, compiler_options=QUICK)(
    jax.random.key(1), x, ctx, None
  )

  def outputs(x):
    return layer.apply(params, x, ctx, None)[0][0].sum(-1)

  gradients = jax.jit(jax.jacrev(outputs), compiler_options=QUICK)(x)
  seen = (np.abs(gradients)[:, 0].sum(-1) > 0).astype(int)
  np.testing.assert_array_equal(
    seen,
    [
      [1, 0, 0, 0, 0, 0],
      [1, 1, 0, 0, 0, 0],
      [1, 1, 1, 0, 0, 0],
      [0, 0, 0, 1, 0, 0],
      [0, 0, 0, 1, 1, 0],
      [0, 0, 0, 0, 0, 1],
    ],
  )


def test_values_of_another_sequence_are_no_tokens_own():
  layer = GatedAttention(num_heads=2, gate=GateConfig(kind='exclusive'))
  inputs = jnp.ones((1, 4, 8)), jnp.ones((1, 6, 8))
  with pytest.raises(ValueError, match=r"kind='exclusive'.* 4 tokens .* 6"):
    layer.init(jax.random.key(0), *inputs)
