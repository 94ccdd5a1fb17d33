"""ops/route.py against loops over tokens in float64, written from the papers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gated_jax.ops import route as router
from gated_jax.ops.route import RouteSpec
from gated_jax.ops.route import route
from gated_jax.ops.route import router_statistics

B, T, D, E = 2, 12, 8, 8


def make(seed=0):
  r = np.random.default_rng(seed)
  return r.normal(size=(B, T, D)), r.normal(size=(D, E)), r.normal(size=E)


def float32(*arrays):
  return [jnp.asarray(a, jnp.float32) for a in arrays]


def reference(x, kernel, bias, spec):
  """Choices and weights of each token, one after the other."""
  choices, weights = [], []
  for token in x.reshape(-1, x.shape[-1]):
    r = token @ kernel * spec.logit_scale
    if spec.softcap:
      r = spec.softcap * np.tanh(r / spec.softcap)
    if spec.score == 'softmax':
      s = np.exp(r - r.max())
      s /= s.sum()
    else:
      s = 1 / (1 + np.exp(-r))
    rank = dict(enumerate(s + bias))
    size = len(s) // spec.groups
    groups = [range(g * size, (g + 1) * size) for g in range(spec.groups)]
    best = sorted(groups, key=lambda g: -sum(sorted(rank[e] for e in g)[-2:]))
    allowed = [e for group in best[: spec.top_groups] for e in group]
    chosen = sorted(allowed, key=lambda e: (-rank[e], e))[: spec.top_k]
    p = s[chosen]
    if spec.normalize:
      p = p / p.sum()
    choices.append(chosen)
    weights.append(spec.scale * p)
  shape = (*x.shape[:-1], spec.top_k)
  return np.reshape(choices, shape), np.reshape(weights, shape)


SPECS = {
  'softmax': RouteSpec(2),
  'softmax as it is': RouteSpec(3, normalize=False),
  'softmax in groups': RouteSpec(2, groups=4, top_groups=2),
  'sigmoid': RouteSpec(3, 'sigmoid', scale=2.5),
  'sigmoid as it is': RouteSpec(3, 'sigmoid', normalize=False, scale=0.5),
  'sigmoid in groups': RouteSpec(
    3, 'sigmoid', groups=4, top_groups=2, softcap=1.5
  ),
  'sigmoid of scaled logits': RouteSpec(
    3, 'sigmoid', logit_scale=0.2, softcap=0.7
  ),
  'one expert a group': RouteSpec(2, 'sigmoid', groups=8, top_groups=3),
}


@pytest.mark.parametrize('biased', [False, True])
@pytest.mark.parametrize('name', SPECS)
def test_choices_and_weights_are_those_of_a_loop_in_float64(name, biased):
  spec, (x, kernel, bias) = SPECS[name], make()
  bias = bias if biased else np.zeros(E)
  choices, weights = reference(x, kernel, bias, spec)
  given = jnp.asarray(bias, jnp.float32) if biased else None
  found = jax.jit(functools.partial(route, spec=spec))(
    *float32(x, kernel), bias=given
  )
  np.testing.assert_array_equal(found.indices, choices)
  np.testing.assert_allclose(found.weights, weights, rtol=2e-5)
  np.testing.assert_allclose(found.probabilities.sum(-1), 1, rtol=1e-5)


@pytest.mark.parametrize('name', ['softmax', 'sigmoid', 'sigmoid in groups'])
def test_weights_have_the_gradients_of_their_values(name):
  spec, (x, kernel, bias) = SPECS[name], make()
  direction = np.random.default_rng(5).normal(size=(B, T, spec.top_k))

  def total(x, kernel):
    routing = route(*float32(x, kernel), spec, jnp.asarray(bias, jnp.float32))
    return jnp.sum(routing.weights * direction)

  grads = jax.jit(jax.grad(total, (0, 1)))(*float32(x, kernel))
  lines = [
    np.random.default_rng(k).normal(size=a.shape)
    for k, a in enumerate((x, kernel))
  ]
  for k, (line, grad) in enumerate(zip(lines, grads, strict=True)):
    ends = []
    for step in (1e-6, -1e-6):
      moved = [x, kernel]
      moved[k] = moved[k] + step * line
      ends.append((reference(*moved, bias, spec)[1] * direction).sum())
    slope = (ends[0] - ends[1]) / 2e-6
    found = np.sum(np.asarray(grad, np.float64) * line)
    assert found == pytest.approx(slope, rel=1e-3, abs=1e-3)


def test_the_bias_gets_the_excess_load_whatever_the_loss_is():
  spec, (x, kernel, bias) = SPECS['sigmoid'], make()
  valid = np.random.default_rng(2).random((B, T)) < 0.6
  choices, _ = reference(x, kernel, bias, spec)
  counts = np.bincount(choices[valid].ravel(), minlength=E)
  expected = counts / counts.sum() - 1 / E

  @jax.jit
  def gradients(factor):
    def loss(x, kernel, bias):
      return factor * jnp.sum(
        jnp.sin(route(x, kernel, spec, bias, jnp.asarray(valid)).weights)
      )

    return jax.grad(loss, (0, 1, 2))(*float32(x, kernel, bias))

  once, twice = gradients(1.0), gradients(2.0)
  for grads in (once, twice):
    np.testing.assert_allclose(grads[2], expected, atol=1e-6)
  # The bias is no part of a weight, so other gradients are as without it.
  np.testing.assert_allclose(twice[0], 2 * once[0], rtol=1e-5)
  np.testing.assert_allclose(twice[1], 2 * once[1], rtol=1e-5)


@pytest.mark.long
def test_descent_on_the_bias_evens_the_load():
  spec = RouteSpec(2, 'sigmoid')
  x, kernel, _ = float32(*make())
  kernel = kernel.at[:, 0].add(x.mean((0, 1)) * 20)  # nearly always chosen

  @jax.jit
  def step(bias):
    def loss(bias):
      return jnp.sum(route(x, kernel, spec, bias).weights)

    return bias - 0.02 * jnp.sign(jax.grad(loss)(bias))

  def worst(bias):
    return float(router_statistics(route(x, kernel, spec, bias)).max_load)

  bias = jnp.zeros(E)
  before = worst(bias)
  for _ in range(60):
    bias = step(bias)
  assert worst(bias) < 1.6 < before


@pytest.mark.long
def test_microbatches_average_the_load_of_the_bias():
  spec, (x, kernel, bias) = RouteSpec(2), float32(*make())

  def grad(x):
    return jax.grad(lambda b: jnp.sum(route(x, kernel, spec, b).weights))(bias)

  halves = (grad(x[:1]) + grad(x[1:])) / 2
  np.testing.assert_allclose(halves, grad(x), atol=1e-6)


def test_layers_of_a_scan_on_many_devices_get_the_load_of_all_tokens():
  spec, (x, kernel, bias) = RouteSpec(2, 'sigmoid'), float32(*make())
  x = jnp.concatenate([x] * 4) * jnp.arange(1, 9)[:, None, None]
  biases = jnp.stack([bias, -bias])

  @jax.checkpoint
  def layer(x, bias):
    return x * route(x, kernel, spec, bias).weights.sum(-1, keepdims=True), None

  def gradient(x):
    def loss(biases):
      return jnp.sum(jax.lax.scan(layer, x, biases)[0])

    return jax.grad(loss)(biases)

  mesh = jax.sharding.Mesh(np.array(jax.devices()), ('data',))
  split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
  found = jax.jit(gradient, in_shardings=split)(x)
  for k, line in enumerate(biases):
    # A weight that sums to one leaves x as it is, layer after layer.
    choices, _ = reference(*(np.float64(a) for a in (x, kernel, line)), spec)
    share = np.bincount(choices.ravel(), minlength=E) / choices.size
    np.testing.assert_allclose(found[k], share - 1 / E, atol=1e-6)


def test_ties_go_to_the_first_expert():
  routing = route(jnp.ones((3, D)), jnp.zeros((D, 5)), RouteSpec(2))
  np.testing.assert_array_equal(routing.indices, [[0, 1]] * 3)
  np.testing.assert_allclose(routing.weights, 0.5)


@pytest.mark.parametrize('score', router.SCORES)
def test_statistics_follow_their_formulas_over_valid_tokens(score):
  x, kernel, _ = make()
  valid = np.random.default_rng(2).random((B, T)) < 0.6
  spec = RouteSpec(2, score)
  stats = router_statistics(
    route(*float32(x, kernel), spec), jnp.asarray(valid)
  )
  logits = x[valid] @ kernel
  s = np.exp(logits) if score == 'softmax' else 1 / (1 + np.exp(-logits))
  p = s / s.sum(-1, keepdims=True)
  picks = np.argsort(-s, axis=-1, kind='stable')[:, :2]
  f = np.bincount(picks.ravel(), minlength=E) / picks.size
  assert float(stats.balance) == pytest.approx(E * f @ p.mean(0), rel=1e-5)
  z = np.log(np.exp(logits).sum(-1)) ** 2
  assert float(stats.router_z) == pytest.approx(z.mean(), rel=1e-5)
  assert float(stats.max_load) == pytest.approx(E * f.max(), rel=1e-5)


def test_balance_is_one_where_the_load_is_even():
  stats = router_statistics(route(jnp.eye(E) * 5, jnp.eye(E), RouteSpec(1)))
  assert float(stats.balance) == pytest.approx(1)
  assert float(stats.max_load) == pytest.approx(1)


def test_experts_that_no_token_chose_are_counted():
  kernel = jnp.zeros((D, E)).at[:, 0].set(3).at[:, 3].set(2)
  stats = router_statistics(route(jnp.ones((4, D)), kernel, RouteSpec(2)))
  assert float(stats.idle_experts) == (E - 2) / E
  assert float(stats.max_load) == pytest.approx(E / 2)


def test_router_is_float32_in_a_bfloat16_model():
  x, kernel, _ = make()
  x = jnp.asarray(x, jnp.bfloat16)
  routing = route(x, jnp.asarray(kernel, jnp.float32), RouteSpec(2))
  assert routing.logits.dtype == jnp.float32
  exact = np.asarray(x, np.float64) @ kernel
  np.testing.assert_allclose(routing.logits, exact, rtol=1e-5, atol=1e-5)


def test_scores_of_nothing_give_weights_that_are_numbers():
  kernel = jnp.full((D, E), -1e4)
  routing = route(jnp.ones((1, D)), kernel, RouteSpec(2, 'sigmoid'))
  assert jnp.isfinite(routing.weights).all()
  assert jnp.isfinite(routing.probabilities).all()


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'top_k': 9}, 'top_k=9 must lie between 1 and 8'),
    ({'top_k': 3, 'groups': 4}, 'top_k=3 must lie between 1 and 2'),
    ({'top_k': 1, 'groups': 3}, '8 experts must be a multiple of groups=3'),
    ({'top_k': 1, 'top_groups': 2}, 'top_groups=2 .* 1 groups'),
    ({'top_k': 1, 'score': 'tanh'}, "score='tanh' must be one of softmax"),
  ],
)
def test_what_cannot_be_chosen_is_refused(options, message):
  with pytest.raises(ValueError, match=message):
    route(jnp.ones((1, D)), jnp.ones((D, E)), RouteSpec(**options))
