"""What is told to the TPU's compiler, by the compiler that is here."""

import pytest

pytest.importorskip('libtpu')

import jax
import jax.numpy as jnp

from gated_jax.aot.chips import open_topology
from gated_jax.ops.attention import schedule
from gated_jax.platform import COMPILER_OPTIONS


@pytest.mark.parametrize('kind', schedule.CORES)
def test_the_compiler_takes_its_options(kind):
  device = open_topology(schedule.CORES[kind].topology)[0]
  options = COMPILER_OPTIONS[device.device_kind]
  place = jax.sharding.SingleDeviceSharding(device)
  x = jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=place)
  square = jax.jit(lambda x: x @ x, compiler_options=options)
  assert square.lower(x).compile().as_text()
