"""Kernels that use the stacks of a scan in place, against those that do not."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.extend import core
from jax.sharding import AxisType
from jax.sharding import PartitionSpec

from gated_jax import sharding
from gated_jax import stacks
from gated_jax.aot.compile import compile_step
from gated_jax.aot.topology import open_topology
from gated_jax.config import DataConfig
from gated_jax.config import DeltaConfig
from gated_jax.config import MeshConfig
from gated_jax.config import ModelConfig
from gated_jax.config import OptimizerConfig
from gated_jax.config import RunConfig
from gated_jax.model.decoder import Decoder
from gated_jax.ops.moe.grouped_matmul import grouped_matmul
from gated_jax.training import step

LAYERS, BATCH, LENGTH, WIDTH, HEADS = 3, 4, 16, 8, 2
DEVICES = 4


def call(kernel, *arrays):
  """A kernel over blocks of eight rows of [B, T, D]."""
  b, t, d = arrays[0].shape
  block = pl.BlockSpec((1, 8, d), lambda b, i: (b, i, 0))
  return pl.pallas_call(
    kernel,
    grid=(b, t // 8),
    in_specs=[block] * len(arrays),
    out_specs=block,
    out_shape=jax.ShapeDtypeStruct(arrays[0].shape, arrays[0].dtype),
    interpret=True,
  )(*arrays)


def sine(x, y):
  y[...] = jnp.sin(x[...])


def slope(x, y, grad, dx):
  dx[...] = grad[...] * (jnp.cos(x[...]) + 0.1 * y[...])


@jax.custom_vjp
def bent(x):
  """Its backward needs input and output, which has a name."""
  return call(sine, x)


def bent_forward(x):
  y = checkpoint_name(call(sine, x), 'output')
  return y, (x, y)


bent.defvjp(bent_forward, lambda saved, grad: (call(slope, *saved, grad),))


def by_head(x):
  """What a device does: the kernel reads heads side by side."""
  flat = x.reshape(*x.shape[:2], -1)
  return bent(flat).reshape(x.shape)


def layer(x, matrix, devices=lambda f: f):
  """A product, a kernel that is repeated, and one whose output is saved."""
  y = checkpoint_name(x @ matrix, 'product')
  y = y.reshape(*y.shape[:2], HEADS, -1)
  y = devices(by_head)(y).reshape(x.shape)
  y = devices(by_head)(y[:, :, None])[:, :, 0]
  return x + y @ matrix, jnp.sum(y, axis=(1, 2))


def gradient(layer, saved=('product', 'output')):
  """Of a scan over layers."""
  policy = jax.checkpoint_policies.save_only_these_names(*saved)
  layer = jax.checkpoint(layer, policy=policy, prevent_cse=False)

  def loss(x, matrices):
    y, sums = jax.lax.scan(layer, x, matrices)
    return jnp.sum(y**2) + jnp.sum(sums)

  return jax.value_and_grad(loss, (0, 1))


def arrays():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(BATCH, LENGTH, WIDTH))
  matrices = 0.3 * rng.normal(size=(LAYERS, WIDTH, WIDTH))
  return jnp.asarray(x, jnp.float32), jnp.asarray(matrices, jnp.float32)


def equations(jaxpr, name, within=()):
  """Equations of that name, each with the names of those that it lies in."""
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == name:
      yield eqn, within
    inner = (*within, eqn.primitive.name)
    for program in core.jaxprs_in_params(eqn.params):
      yield from equations(program, name, inner)


def stacks_of(function, *args):
  """Of each kernel within a scan, which operands and outputs are stacks."""
  jaxpr = jax.make_jaxpr(function)(*args).jaxpr

  def stacked(variables):
    shapes = [v.aval.shape for v in variables]
    return [i for i, s in enumerate(shapes) if len(s) == 4 and s[0] == LAYERS]

  return [
    (stacked(eqn.invars), stacked(eqn.outvars))
    for eqn, within in equations(jaxpr, 'pallas_call')
    if 'scan' in within
  ]


def assert_same(results, expected):
  jax.tree.map(np.testing.assert_array_equal, results, expected)


def test_results_are_the_same_to_the_bit():
  plain = gradient(layer)
  assert_same(
    jax.jit(stacks.in_place(plain))(*arrays()), jax.jit(plain)(*arrays())
  )


def test_kernels_write_and_read_stacks():
  plain = gradient(layer)
  assert not any(r or w for r, w in stacks_of(plain, *arrays()))
  used = stacks_of(stacks.in_place(plain), *arrays())
  # Forward writes both kernels' outputs. Backward reads those, and the product.
  assert sum(len(written) for _, written in used) == 2
  backward = [read for read, written in used if read and not written]
  assert sorted(map(len, backward))[-2:] == [1, 2]


def test_on_each_device():
  mesh = jax.make_mesh(
    (DEVICES,),
    ('data',),
    axis_types=(AxisType.Auto,),
    devices=jax.devices()[:DEVICES],
  )
  rows = PartitionSpec('data')

  def devices(function):
    return jax.shard_map(
      function, in_specs=rows, out_specs=rows, check_vma=False
    )

  plain = gradient(lambda x, matrix: layer(x, matrix, devices))
  with jax.set_mesh(mesh):
    expected = jax.jit(plain)(*arrays())
    assert_same(jax.jit(stacks.in_place(plain))(*arrays()), expected)
    used = stacks_of(stacks.in_place(plain), *arrays())
  assert sum(len(written) for _, written in used) == 2
  assert max(len(read) for read, written in used if not written) == 2


def test_a_program_without_kernels_is_what_it_was():
  def plain(x, matrix):
    return jnp.tanh(x @ matrix), jnp.sum(x)

  function = gradient(plain)
  expected = jax.jit(function)(*arrays())
  assert_same(jax.jit(stacks.in_place(function))(*arrays()), expected)


@pytest.mark.long
@pytest.mark.parametrize(
  ('saved', 'uses'),
  [
    # Nothing; rows are read by forward, by forward once more, and by backward;
    # by forward, which writes the product, and by backward.
    ((), 0),
    (('rows',), 3),
    (('rows', 'product'), 2),
  ],
)
def test_kernels_with_tables_and_grids_that_depend_on_them(saved, uses):
  experts, rows, width = 2, 256, 128
  sizes = jnp.asarray([100, 156], jnp.int32)

  def experts_of(x, matrices):
    x = checkpoint_name(jnp.cos(x), 'rows')
    y = grouped_matmul(x, matrices, sizes, 'gmm', interpret=True)
    return x + 0.1 * checkpoint_name(y, 'product') ** 2, jnp.sum(x)

  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(rows, width)), jnp.float32)
  shape = LAYERS, experts, width, width
  matrices = jnp.asarray(0.1 * rng.normal(size=shape), jnp.float32)
  plain = gradient(experts_of, saved)
  expected = jax.jit(plain)(x, matrices)
  assert_same(jax.jit(stacks.in_place(plain))(x, matrices), expected)
  jaxpr = jax.make_jaxpr(stacks.in_place(plain))(x, matrices).jaxpr
  whole = (LAYERS, rows, width)
  used = [
    eqn
    for eqn, _ in equations(jaxpr, 'pallas_call')
    if whole in [v.aval.shape for v in (*eqn.invars, *eqn.outvars)]
  ]
  assert len(used) == uses


@pytest.mark.long
@pytest.mark.parametrize(
  ('mesh', 'remat', 'mixer'),
  [
    pytest.param(
      MeshConfig(fsdp=4), 'minimal', 'attention', marks=pytest.mark.nightly
    ),
    pytest.param(
      MeshConfig(fsdp=2, tensor=2),
      'attention',
      'attention',
      marks=pytest.mark.nightly,
    ),
    (MeshConfig(fsdp=1, tensor=2), 'minimal', 'gated_deltanet'),
  ],
)
def test_the_step_of_a_model_with_its_kernels(mesh, remat, mixer, monkeypatch):
  """Mixers, norms and rotation, interpreted: the same but for rounding.

  Of bfloat16 it is so with --xla_allow_excess_precision=false.
  """
  call = pl.pallas_call

  def interpreted(*args, **settings):
    return call(*args, **settings | {'interpret': True})

  monkeypatch.setattr(pl, 'pallas_call', interpreted)
  length, devices = 128, mesh.fsdp * mesh.tensor
  model = Decoder(
    ModelConfig(
      depth=LAYERS,
      pattern=(mixer,),
      width=256,
      heads=2,
      kv_heads=1,
      head_dim=128,
      mlp_width=256,
      vocab=64,
      length=length,
      remat=remat,
      attention='pallas_tpu',
      delta=DeltaConfig(2, 2, implementation='pallas_tpu'),
      dtype='float32',  # XLA rounds to bfloat16 where its fusions end
    )
  )
  tokens = np.random.default_rng(0).integers(0, 64, (4, length + 1))
  batch = {
    'tokens': jnp.asarray(tokens[:, :-1]),
    'targets': jnp.asarray(tokens[:, 1:]),
    'weights': jnp.ones((4, length)),
  }
  optimizer = optax.sgd(1.0)

  def updated():
    state = jax.jit(step.make_init(model, optimizer, length))(jax.random.key(0))
    run = step.make_step(model, optimizer, None, OptimizerConfig())
    used = [bool(r or w) for r, w in stacks_of(run, state, batch)]
    return jax.jit(run)(state, batch)[0].params, any(used)

  with sharding.activate(sharding.make_mesh(mesh, jax.devices()[:devices])):
    found, in_place = updated()
    monkeypatch.setattr(step.stacks, 'in_place', lambda function: function)
    expected, plain = updated()
  assert in_place
  assert not plain
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  jax.tree.map(close, found, expected)


@pytest.mark.long
def test_stacks_lie_on_a_tpu_as_kernels_write_and_read_them():
  pytest.importorskip('libtpu')
  length = 512
  config = RunConfig(
    model=ModelConfig(
      depth=3,
      width=512,
      heads=4,
      kv_heads=2,
      head_dim=128,
      mlp_width=1536,
      vocab=512,
      length=length,
      remat='minimal',
    ),
    data=DataConfig(batch=4, length=length),
    mesh=MeshConfig(fsdp=2, tensor=2),
  )
  text = compile_step(config, open_topology('v5e:2x2')).text
  # Of all layers, split as what is written into them.
  assert 'bf16[3,2,512,768]' in text
  assert 'bf16[3,2,256,1536]' not in text
  assert 'all-to-all' not in text
  # The stream, which a product reads as well, is not turned for it.
  assert 'bf16[4,2,256,512]' in text  # one more than there are layers
  assert not re.search(r'bf16\[[34],2,256,512\]\S* copy\(', text)
