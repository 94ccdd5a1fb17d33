"""A model's parameters without their numbers: shapes, kinds and places."""

from typing import Any

import jax
import jax.numpy as jnp
from flax.core import meta

from gated_jax import sharding
from gated_jax.config import ModelConfig
from gated_jax.model.decoder import Decoder


def boxed_parameters(config: ModelConfig, length: int = 1) -> Any:
  """The tree that `Decoder.init` makes, abstract and in boxes.

  Args:
    config: of the model.
    length: of the row that is traced. No parameter depends on it, but an active
      mesh may have to split it.
  """
  # Nothing is computed: the mesh may be of devices that are not there.
  tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
  key = jax.eval_shape(lambda: jax.random.key(0))
  return jax.eval_shape(Decoder(config).init, key, tokens)['params']


def abstract_parameters(
  config: ModelConfig, mesh: jax.sharding.Mesh | None = None
) -> Any:
  """Shapes, dtypes and places of a model's parameters.

  Args:
    config: of the model.
    mesh: that splits them; None: all are on the first device.
  """
  boxed = boxed_parameters(config)
  if mesh is None:
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    places = jax.tree.map(lambda _: here, meta.unbox(boxed))
  else:
    places = sharding.shardings(mesh, boxed)
  return jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
    meta.unbox(boxed),
    places,
  )
