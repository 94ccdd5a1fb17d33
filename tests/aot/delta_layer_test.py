"""A layer of Gated DeltaNet through the TPU compiler, at Qwen3-Next's sizes.

Its kernels read arrays as the projections write them: what XLA computes beside
its products is little, by its own estimate.
"""

import jax
import jax.numpy as jnp
import pytest
from flax.core import meta

from gated_jax import chips
from gated_jax.aot.attention_kernels import compiling_for
from gated_jax.aot.attention_kernels import device_of
from gated_jax.aot.program import Program
from gated_jax.config import DeltaConfig
from gated_jax.config import ModelConfig
from gated_jax.model.mixer import Context
from gated_jax.model.mixers.gated_deltanet import GatedDeltaNet

pytest.importorskip('libtpu')
KIND, LENGTH = 'v5e', 4096
KERNELS = {
  f'{name}_{way}': calls
  for name, calls in {
    'gated_delta': 1,
    'delta_unit_filter': 2,  # queries and keys
    'delta_filter': 1,
    'delta_norm': 1,
  }.items()
  for way in ('forward', 'backward')
}


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_beside_kernels_and_products_there_is_little():
  config = ModelConfig(
    depth=1,
    pattern=('gated_deltanet',),
    param_dtype='bfloat16',
    delta=DeltaConfig(implementation='pallas_tpu'),
  )
  layer = GatedDeltaNet(config, config.layers[0])
  place = jax.sharding.SingleDeviceSharding(device_of(KIND))

  def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

  def run(params, x, segments, slope):
    context = Context(segments=segments)

    def output(params, x):
      return layer.apply({'params': params}, x, context, None)[0]

    y, pull = jax.vjp(output, params, x)
    return y, pull(slope)

  def init(x):
    variables = layer.init(jax.random.key(0), x, Context(), None)
    return meta.unbox(variables['params'])

  x = array(1, LENGTH, config.width)
  with compiling_for(device_of(KIND)):
    params = jax.tree.map(
      lambda p: array(*p.shape, dtype=p.dtype), jax.eval_shape(init, x)
    )
    arguments = params, x, array(1, LENGTH, dtype=jnp.int32), x
    options = dict(chips.TPUS[KIND].compiler_options)
    lowered = jax.jit(run, compiler_options=options).lower(*arguments)
    compiled = lowered.compile()
  program = Program(compiled.as_text())
  calls = {kernel.name: 0 for kernel in program.kernels()}
  for kernel in program.kernels():
    calls[kernel.name] += kernel.calls
  assert calls == KERNELS
  cycles = program.cycles_by_kind()
  rest = sum(cycles.values()) - cycles['matmul']
  print(f'products {cycles["matmul"]:,} cycles, the rest of XLA {rest:,}')
  assert rest < 0.12 * cycles['matmul']
