"""The gate without any module: plain functions under JAX's transformations.

    python docs/examples/plain_jax.py

`gated_dot_product_attention` takes arrays and gives arrays, so `jax.grad`,
`jax.vmap` and `jax.shard_map` apply to it as to anything else.
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec

from gated_jax import gated_dot_product_attention

B, T, N, K, H = 4, 8, 4, 2, 16


def arrays(key=0):
  """Query, key, value, and gate logits: one for each head and channel."""
  keys = jax.random.split(jax.random.key(key), 4)
  shapes = [(B, T, heads, H) for heads in (N, K, K, N)]
  return [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]


def attend(query, key, value, gate):
  """Causal, gated."""
  return gated_dot_product_attention(query, key, value, gate).output


def gradient_of_the_gate():
  """How the gate logits should change for a smaller output."""
  query, key, value, gate = arrays()

  def loss(gate):
    return jnp.sum(attend(query, key, value, gate) ** 2)

  return jax.grad(loss)(gate)


def several_gates_at_once(gates):
  """One attention, many gates: vmap over the gate alone.

  Args:
    gates: [M, B, T, N, H].
  """
  query, key, value, _ = arrays()
  return jax.vmap(attend, (None, None, None, 0))(query, key, value, gates)


def heads_over_devices(mesh):
  """Each device attends with its own heads; no communication is needed."""
  split = PartitionSpec(None, None, 'heads')
  whole = jax.shard_map(
    attend, mesh=mesh, in_specs=(split,) * 4, out_specs=split
  )
  return jax.jit(whole)(*arrays())


if __name__ == '__main__':
  print('gradient', gradient_of_the_gate().shape)
  print('gates', several_gates_at_once(jnp.zeros((3, B, T, N, H))).shape)
  mesh = Mesh(jax.devices()[: min(K, jax.device_count())], ('heads',))
  print('sharded', heads_over_devices(mesh).shape)
