"""A module looks at no mesh that it was not given.

The axes of these meshes have names that the trainer's own mesh has too, or
that users like. Whatever they are called, results are those of one device.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gated_jax import GatedAttention
from tests.quick import QUICK

D = 16
ROWS = (8, 6)  # eight rows divide over four devices, six do not
MODULE = GatedAttention(
  num_heads=4, num_kv_heads=2, gate='headwise', causal=True
)
NAMES = [
  ('data', 'tensor'),
  pytest.param(('fsdp', 'model'), marks=pytest.mark.long),
  pytest.param(('dp', 'tp'), marks=pytest.mark.long),
]


@functools.cache
def drawn(rows):
  return np.random.default_rng(rows).normal(size=(rows, 5, D)).astype('float32')


@functools.cache
def parameters():
  init = jax.jit(MODULE.init, compiler_options=QUICK)
  return init(jax.random.key(0), drawn(8))


def loss(params, x):
  y = MODULE.apply(params, x)
  return jnp.sum(y**3), y


@functools.cache
def expected(rows):
  """Output and gradients of parameters on one device."""
  return jax.jit(jax.grad(loss, has_aux=True), compiler_options=QUICK)(
    parameters(), drawn(rows)
  )


def check(results, rows):
  trees = results, expected(rows)
  for a, b in zip(*map(jax.tree.leaves, trees), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def mesh_of(names, kind):
  grid = np.array(jax.devices()).reshape(4, 2)
  return Mesh(grid, names, axis_types=(kind,) * 2)


def where(rows, mesh, names):
  """Rows split over the first axis, where they divide."""
  spec = P(names[0]) if rows % mesh.shape[names[0]] == 0 else P()
  return NamedSharding(mesh, spec)


@pytest.mark.parametrize('rows', ROWS)
@pytest.mark.parametrize('kind', [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize('names', NAMES, ids='-'.join)
def test_a_mesh_of_the_user_changes_no_number(names, kind, rows):
  mesh = mesh_of(names, kind)
  x = jax.device_put(drawn(rows), where(rows, mesh, names))
  params = jax.device_put(parameters(), NamedSharding(mesh, P()))
  step = jax.jit(jax.grad(loss, has_aux=True), compiler_options=QUICK)
  with jax.set_mesh(mesh):
    check(step(params, x), rows)
    made = jax.eval_shape(MODULE.init, jax.random.key(0), x)
  assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, params)


@pytest.mark.parametrize('names', NAMES, ids='-'.join)
def test_an_output_is_split_as_its_input(names):
  mesh = mesh_of(names, AxisType.Explicit)
  with jax.set_mesh(mesh):
    x = jax.device_put(drawn(8), P(names[0]))
    y = jax.eval_shape(MODULE.apply, parameters(), x)
  assert y.sharding.spec[0] == names[0]


@pytest.mark.parametrize('rows', ROWS)
@pytest.mark.parametrize('names', NAMES[:2], ids='-'.join)
def test_the_older_context_of_a_mesh_changes_no_number(names, rows):
  mesh = mesh_of(names, AxisType.Auto)
  with mesh:
    place = where(rows, mesh, names), NamedSharding(mesh, P())
    step = jax.jit(
      jax.grad(loss, has_aux=True),
      in_shardings=place[::-1],
      compiler_options=QUICK,
    )
    check(step(parameters(), drawn(rows)), rows)


@pytest.mark.parametrize('kind', [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize('rows', [8, 16])
@pytest.mark.parametrize('names', NAMES, ids='-'.join)
def test_shard_map_of_the_user_gives_each_device_its_rows(names, rows, kind):
  mesh = mesh_of(names, kind)
  each = P(names)
  run = jax.shard_map(
    MODULE.apply,
    mesh=mesh,
    in_specs=(P(), each),
    out_specs=each,
  )
  with jax.set_mesh(mesh):
    x = jax.device_put(drawn(rows), NamedSharding(mesh, each))
    y = jax.jit(run, compiler_options=QUICK)(parameters(), x)
  np.testing.assert_allclose(y, expected(rows)[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('rows', ROWS)
def test_parameters_split_by_the_user_stay_split(rows):
  """Tensor parallelism as users write it: heads over an axis of theirs."""
  names = ('data', 'tensor')
  mesh = mesh_of(names, AxisType.Auto)

  def place(path, x):
    at = {'out': 0, 'gate': 1}.get(path[1].key, x.ndim - 2)
    spec = [None] * x.ndim
    if path[-1].key == 'kernel':
      spec[at] = 'tensor'
    return jax.device_put(x, NamedSharding(mesh, P(*spec)))

  params = jax.tree_util.tree_map_with_path(place, parameters())
  x = jax.device_put(drawn(rows), where(rows, mesh, names))
  check(
    jax.jit(jax.grad(loss, has_aux=True), compiler_options=QUICK)(params, x),
    rows,
  )


def test_pmap_of_the_user_gives_each_device_its_rows():
  x = drawn(8)[:, None]
  y = jax.pmap(MODULE.apply, in_axes=(None, 0))(parameters(), x)
  np.testing.assert_allclose(y[:, 0], expected(8)[1], rtol=1e-4, atol=1e-4)


def test_names_of_axes_follow_rules_of_the_user():
  """With logical_axes the parameters lie as the user's own rules say."""
  mesh = mesh_of(('dp', 'tp'), AxisType.Auto)
  named = MODULE.clone(logical_axes=True)
  boxed = jax.eval_shape(named.init, jax.random.key(0), drawn(8))
  rules = (('heads', 'tp'), ('kv_heads', 'tp'))
  places = nn.logical_to_mesh_sharding(
    nn.get_partition_spec(boxed), mesh, rules
  )
  assert places['params']['query']['kernel'].spec == P(None, 'tp', None)
  params = jax.device_put(parameters(), places)
  check(
    jax.jit(jax.grad(loss, has_aux=True), compiler_options=QUICK)(
      params, drawn(8)
    ),
    8,
  )
