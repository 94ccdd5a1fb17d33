"""What a threshold on the gate saves of the cache, and what it costs.

    python -m gated_jax.decode.quiet --checkpoint=runs/smoke

On held-out text every token is predicted as a decoding step with
`skip_below` would predict it: the gate of a token depends on nothing later,
so all steps can be computed at once. Reads are counted in keys: a head left
out at position t of its document saves t + 1 of them.
"""

import argparse
import dataclasses
import functools
from collections.abc import Iterable
from collections.abc import Mapping
from typing import Any

import absl.logging
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from jaxtyping import Float

from gated_jax import sharding
from gated_jax.config import MeshConfig
from gated_jax.config import RunConfig
from gated_jax.data.pipeline import make_pipeline
from gated_jax.decode.generate import check_skip
from gated_jax.decode.weights import Params
from gated_jax.decode.weights import load
from gated_jax.model.decoder import Decoder
from gated_jax.platform import skip_absent_tpu

THRESHOLDS = (0.0, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7)


@dataclasses.dataclass(frozen=True)
class Measured:
  """Of all tokens that were predicted."""

  threshold: float
  loss: float  # nats per token
  unread: float  # share of the keys and values that a step would read


def measure(
  model: Decoder,
  params: Params,
  batches: Iterable[Mapping[str, Any]],
  threshold: float,
) -> Measured:
  """Loss and unread share with one threshold.

  Args:
    model: with a gate that multiplies the attention output.
    params: its parameters.
    batches: tokens, targets, segments, positions and weights [B, T].
    threshold: see `gated_jax/ops/attention/decode.py`.
  """
  check_skip(model.config, threshold)
  sums = [
    jax.device_get(_sums(model, params, dict(batch), jnp.float32(threshold)))
    for batch in batches
  ]
  nats, tokens, unread, keys = np.sum(np.array(sums, np.float64), axis=0)
  return Measured(threshold, float(nats / tokens), float(unread / keys))


@functools.partial(jax.jit, static_argnums=0)
def _sums(
  model: Decoder,
  params: Params,
  batch: dict[str, Array],
  threshold: Float[Array, ''],
) -> tuple[Array, Array, Array, Array]:
  """Nats and tokens; keys left unread, of how many."""
  logits, state = model.apply(
    {'params': params},
    batch['tokens'],
    segments=batch['segments'],
    positions=batch['positions'],
    skip_below=threshold,
    mutable=['probes'],
  )
  p = jax.nn.log_softmax(logits)
  nats = -jnp.take_along_axis(p, batch['targets'][..., None], axis=-1)[..., 0]
  weights = batch['weights']
  read = (batch['positions'] + 1) * (batch['segments'] != 0)
  quiet = [
    leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(state['probes'])
    if 'quiet_heads' in jax.tree_util.keystr(path)
  ]
  share = jnp.mean(jnp.stack(quiet), axis=(0, -1))  # over layers and kv heads
  unread = jnp.sum(share * read)
  return jnp.sum(nats * weights), jnp.sum(weights), unread, jnp.sum(read)


def held_out(config: RunConfig, count: int) -> list[dict[str, Any]]:
  """The first validation batches of a run."""
  with make_pipeline(
    config.data, 'validation', vocab=config.model.vocab
  ) as batches:
    return [batch for batch, _ in zip(batches, range(count), strict=False)]


def main() -> None:
  parser = argparse.ArgumentParser(prog='python -m gated_jax.decode.quiet')
  parser.add_argument('--checkpoint', required=True)
  parser.add_argument('--batches', type=int, default=8)
  flags = parser.parse_args()
  absl.logging.set_verbosity(absl.logging.FATAL)
  skip_absent_tpu()
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  config, model, params = load(flags.checkpoint, mesh)
  batches = held_out(config, flags.batches)
  print(f'{config.model.gate.granularity}, {config.model.kv_heads} kv heads')
  print('| threshold | unread | loss | change |\n|---|---|---|---|')
  exact = 0.0
  for threshold in THRESHOLDS:
    found = measure(model, params, batches, threshold)
    exact = exact or found.loss
    print(
      f'| {threshold} | {found.unread:.2%} | {found.loss:.4f} | '
      f'{found.loss - exact:+.4f} |',
      flush=True,
    )


if __name__ == '__main__':
  main()
