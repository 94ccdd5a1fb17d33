"""ops/moe against a loop over experts in float64, written from the paper."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from gated_jax.ops import moe
from gated_jax.ops.moe import swiglu_tpu
from gated_jax.ops.moe.grouped_matmul import grouped_matmul
from gated_jax.ops.route import RouteSpec
from gated_jax.ops.route import route
from gated_jax.ops.route import router_statistics

# Together most of a minute or more; see CONTRIBUTING.md.
pytestmark = pytest.mark.long

B, T, D, F, E = 2, 12, 8, 6, 8


def make(seed=0, batch=B, experts=E):
  r = np.random.default_rng(seed)
  return {
    'x': r.normal(size=(batch, T, D)),
    'router': r.normal(size=(D, experts)),
    'gate_proj': r.normal(size=(experts, D, F)) / D**0.5,
    'up': r.normal(size=(experts, D, F)) / D**0.5,
    'down': r.normal(size=(experts, F, D)) / F**0.5,
  }


def to_float32(arrays):
  return {k: jnp.asarray(v, jnp.float32) for k, v in arrays.items()}


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


EPS = 1e-3  # of the norm of outputs, where `a` has a scale for one


def loop(a, top_k, normalize=True, limit=np.inf):
  """Every token, every chosen expert, one after the other, in float64."""
  x = a['x'].reshape(-1, a['x'].shape[-1])
  out = np.zeros_like(x)
  for m, token in enumerate(x):
    p = softmax(token @ a['router'])
    best = sorted(range(len(p)), key=lambda e: (-p[e], e))[:top_k]
    total = sum(p[e] for e in best) if normalize else 1.0
    for e in best:
      g, u = token @ a['gate_proj'][e], token @ a['up'][e]
      g = np.minimum(g / (1 + np.exp(-g)), limit)
      u = np.minimum(np.maximum(u, -limit), limit)
      y = (g * u) @ a['down'][e]
      if 'scale' in a:
        y = y * a['scale']
        y = y / np.sqrt(np.mean(y**2) + EPS)
      out[m] += p[e] / total * y
  return out.reshape(a['x'].shape)


PLAIN = moe.ExpertSpec()


def apply(a, top_k, normalize=True, spec=PLAIN):
  routing = route(a['x'], a['router'], RouteSpec(top_k, normalize=normalize))
  names = ('gate_proj', 'up', 'down', 'scale')
  weights = moe.ExpertWeights(*(a.get(name) for name in names))
  return moe.apply_experts(
    a['x'], routing.indices, routing.weights, weights, spec
  )


def slopes(function, a, direction, step=1e-5):
  """Derivative of sum(function * direction) along one random line per array."""
  r = np.random.default_rng(7)
  out = {}
  for name in a:
    line = r.normal(size=a[name].shape)
    ends = [
      np.sum(function({**a, name: a[name] + s * step * line}) * direction)
      for s in (1, -1)
    ]
    out[name] = line, (ends[0] - ends[1]) / (2 * step)
  return out


@pytest.mark.parametrize('top_k', [1, 2, E])
@pytest.mark.parametrize('normalize', [True, False])
@pytest.mark.parametrize('implementation', ['ragged_dot', 'gmm', 'tiles'])
def test_values_and_gradients_equal_a_loop_over_experts(
  top_k, normalize, implementation
):
  a = make()
  spec = moe.ExpertSpec(implementation, interpret=True)
  run = jax.jit(
    functools.partial(apply, top_k=top_k, normalize=normalize, spec=spec)
  )
  a32 = to_float32(a)
  np.testing.assert_allclose(
    run(a32), loop(a, top_k, normalize), rtol=1e-4, atol=1e-5
  )
  direction = np.random.default_rng(1).normal(size=a['x'].shape)
  grads = jax.jit(jax.grad(lambda p: jnp.sum(run(p) * direction)))(a32)
  expected = slopes(lambda p: loop(p, top_k, normalize), a, direction)
  for name, (line, slope) in expected.items():
    found = np.sum(np.asarray(grads[name], np.float64) * line)
    scale = np.linalg.norm(grads[name]) * np.linalg.norm(line)
    assert abs(found - slope) < 2e-5 * scale + 1e-6, name


@pytest.mark.parametrize('implementation', ['ragged_dot', 'gmm', 'tiles'])
def test_a_norm_of_every_experts_output_comes_before_its_weight(implementation):
  r = np.random.default_rng(5)
  a = {**make(), 'scale': r.normal(size=D)}
  spec = moe.ExpertSpec(implementation, interpret=True, norm_eps=EPS)
  run = jax.jit(functools.partial(apply, top_k=2, spec=spec))
  a32 = to_float32(a)
  np.testing.assert_allclose(run(a32), loop(a, 2), rtol=1e-4, atol=1e-5)
  direction = r.normal(size=a['x'].shape)
  grads = jax.jit(jax.grad(lambda p: jnp.sum(run(p) * direction)))(a32)
  expected = slopes(lambda p: loop(p, 2), a, direction)
  for name, (line, slope) in expected.items():
    found = np.sum(np.asarray(grads[name], np.float64) * line)
    scale = np.linalg.norm(grads[name]) * np.linalg.norm(line)
    assert abs(found - slope) < 2e-5 * scale + 1e-6, name


@pytest.mark.parametrize('limit', [0.3, 0.8])
def test_a_limit_clamps_both_factors_of_every_expert(limit):
  a = make()
  spec = moe.ExpertSpec(limit=limit)
  found = jax.jit(functools.partial(apply, top_k=2, spec=spec))(to_float32(a))
  expected = loop(a, 2, limit=limit)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
  assert np.abs(expected - loop(a, 2)).max() > 0.01


def test_permuting_tokens_permutes_outputs():
  a = to_float32(make())
  order = np.random.default_rng(3).permutation(T)
  straight = apply(a, 2)[:, order]
  turned = apply({**a, 'x': a['x'][:, order]}, 2)
  np.testing.assert_allclose(straight, turned, rtol=1e-5, atol=1e-6)


def test_permuting_experts_changes_nothing():
  a = to_float32(make())
  order = np.random.default_rng(3).permutation(E)
  turned = {
    'x': a['x'],
    'router': a['router'][:, order],
    **{k: a[k][order] for k in ('gate_proj', 'up', 'down')},
  }
  np.testing.assert_allclose(
    apply(a, 2), apply(turned, 2), rtol=1e-5, atol=1e-6
  )


def test_idle_experts_get_no_gradient():
  a = to_float32(make())
  x = jnp.abs(a['x'])
  router = jnp.zeros((D, E)).at[:, 0].set(3).at[:, 3].set(2)
  a = {**a, 'x': x, 'router': router}
  grads = jax.grad(lambda p: jnp.sum(apply(p, 2) ** 2))(a)
  used = np.abs(grads['down']).sum((1, 2)) > 0
  np.testing.assert_array_equal(np.flatnonzero(used), [0, 3])


def test_unknown_implementation_is_refused():
  with pytest.raises(ValueError, match='cublas'):
    apply(to_float32(make()), 2, spec=moe.ExpertSpec('cublas'))


def split(mesh_shape, spec, normed):
  """`apply` with experts, tokens and F split over a mesh, and its mesh."""
  names = ('data', 'expert', 'tensor')
  devices = np.array(jax.devices()[: int(np.prod(mesh_shape))])
  mesh = jax.sharding.Mesh(devices.reshape(mesh_shape), names)
  spec = dataclasses.replace(
    spec,
    expert_axis='expert',
    token_axes=('data', 'expert'),
    tensor_axis='tensor',
  )
  tokens = P(('data', 'expert'))
  inner = jax.shard_map(
    lambda x, i, w, experts: moe.apply_experts(x, i, w, experts, spec),
    mesh=mesh,
    in_specs=(
      tokens,
      tokens,
      tokens,
      moe.ExpertWeights(
        P('expert', None, 'tensor'),
        P('expert', None, 'tensor'),
        P('expert', 'tensor'),
        P() if normed else None,
      ),
    ),
    out_specs=tokens,
    check_vma=False,
  )

  def run(a, top_k):
    routing = route(a['x'], a['router'], RouteSpec(top_k))
    stats = router_statistics(routing)
    names = ('gate_proj', 'up', 'down', 'scale')
    experts = moe.ExpertWeights(*(a.get(name) for name in names))
    y = inner(a['x'], routing.indices, routing.weights, experts)
    return y, stats

  return run


# Implementation, mesh, top_k, slack, chunks and what is saved. Slack below one
# forces further rounds, as a very uneven load does. A device has 96, 24, 12, 12
# and 24 tokens: not all chunks that are asked for divide them.
ROWS, BOTH = (moe.ROWS_NAME,), (moe.ROWS_NAME, moe.PRODUCT_NAME)
SPLITS = [
  ('ragged_dot', (1, 2, 1), 2, 1.25, 1, ()),
  ('tiles', (1, 4, 1), 2, 0.5, 2, BOTH),
  ('tiles', (1, 8, 1), 2, 1.25, 5, ROWS),
  ('tiles', (2, 4, 1), E, 1.25, 2, ()),
  ('ragged_dot', (2, 2, 2), 2, 0.3, 4, ROWS),
]


@pytest.mark.skipif(jax.device_count() < 8, reason='needs 8 devices')
@pytest.mark.parametrize(
  'implementation, shape, top_k, slack, chunks, saved', SPLITS
)
@pytest.mark.parametrize(
  ('skewed', 'normed'), [(False, False), (True, False), (True, True)]
)
def test_splitting_experts_changes_neither_loss_nor_gradients(
  implementation, shape, top_k, slack, chunks, saved, skewed, normed
):
  if normed and shape not in ((1, 2, 1), (2, 2, 2)):
    pytest.skip('experts on two devices, and their channels too, are enough')
  a = to_float32(make(batch=8))
  if normed:
    a['scale'] = jnp.linspace(-1, 2, D)
  if skewed:  # nearly every token goes to the experts of one device
    a['x'] = jnp.abs(a['x'])
    a['router'] = a['router'].at[:, 0].add(4).at[:, 1].add(3)
  spec = moe.ExpertSpec(implementation, slack=slack, chunks=chunks, saved=saved)
  run = split(shape, spec, normed)

  def loss(a, function):
    y, stats = function(a)
    return jnp.sum(jnp.sin(y)) + stats.balance + stats.router_z, y

  def whole(a):
    routing = route(a['x'], a['router'], RouteSpec(top_k))
    return apply(a, top_k), router_statistics(routing)

  value = functools.partial(jax.value_and_grad, has_aux=True)
  (l0, y0), g0 = jax.jit(value(lambda a: loss(a, whole)))(a)
  parts = functools.partial(run, top_k=top_k)
  (l1, y1), g1 = jax.jit(value(lambda a: loss(a, parts)))(a)
  assert float(l1) == pytest.approx(float(l0), rel=1e-5)
  np.testing.assert_allclose(y1, y0, rtol=1e-4, atol=1e-5)
  for name in a:
    np.testing.assert_allclose(
      g1[name], g0[name], rtol=1e-3, atol=1e-4, err_msg=name
    )


@pytest.mark.parametrize('limit', [0.0, 0.7])
def test_the_kernel_between_the_products_equals_its_formula(limit):
  r = np.random.default_rng(0)
  rows, width, used = 64, 128, 40
  both = r.normal(size=(rows, 2 * width))
  weights, grad = r.normal(size=(rows, 1)), r.normal(size=(rows, width))
  line, other = r.normal(size=both.shape), r.normal(size=weights.shape)

  def formula(both, weights):
    gate, up = both[:used, :width], both[:used, width:]
    gate = gate / (1 + np.exp(-gate))
    if limit:
      gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    return gate * up * weights[:used]

  def run(both, weights):
    return swiglu_tpu.hidden(both, weights, jnp.int32(used), limit, True)

  assert swiglu_tpu.fits(both.shape)
  narrow = [jnp.asarray(x, jnp.float32) for x in (both, weights, grad)]
  # Rows of no expert may hold anything.
  narrow[0] = narrow[0].at[used:].set(jnp.nan)
  narrow[2] = narrow[2].at[used:].set(jnp.nan)
  y, pull = jax.vjp(run, *narrow[:2])
  d_both, d_weights = pull(narrow[2])
  np.testing.assert_allclose(y[:used], formula(both, weights), atol=1e-5)
  for x in (y, d_both, d_weights):
    assert not np.any(x[used:])
  step = 1e-6

  def slope(ahead, behind):
    return np.sum((ahead - behind) * grad[:used]) / (2 * step)

  expected = slope(
    formula(both + step * line, weights), formula(both - step * line, weights)
  )
  assert np.sum(d_both * line) == pytest.approx(expected, rel=1e-3)
  expected = slope(
    formula(both, weights + step * other), formula(both, weights - step * other)
  )
  assert np.sum(d_weights * other) == pytest.approx(expected, rel=1e-3)


def test_a_width_that_is_no_whole_tile_takes_the_plain_formula():
  assert not swiglu_tpu.fits((64, 2 * 96))
  assert not swiglu_tpu.fits((8, 2 * 128))


@pytest.mark.parametrize('implementation', ['ragged_dot', 'gmm', 'tiles'])
def test_the_gradient_of_matrices_adds_to_that_of_earlier_rows(implementation):
  r = np.random.default_rng(0)
  rows, matrices, start, grad = (
    jnp.asarray(r.normal(size=shape), jnp.float32)
    for shape in ((128, 128), (3, 128, 128), (3, 128, 128), (128, 128))
  )
  sizes = jnp.array([40, 0, 60], jnp.int32)  # one has none, some rows no group
  grad = grad.at[100:].set(0)

  def run(matrices):
    return grouped_matmul(rows, matrices, sizes, implementation, True, start)

  (found,) = jax.vjp(run, matrices)[1](grad)
  expected = np.array(start, np.float64)
  for group, (first, last) in enumerate(((0, 40), (40, 40), (40, 100))):
    expected[group] += np.asarray(rows[first:last], np.float64).T @ np.asarray(
      grad[first:last], np.float64
    )
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)
