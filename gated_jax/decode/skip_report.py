"""The share of the cache that skipping nearly shut heads saves, and its cost.

    python -m gated_jax.decode.skip_report --checkpoint=runs/smoke

On held-out text every token is predicted as a decoding step with `skip_below`
would predict it. The gate of a token depends on nothing later, so that all
steps can be computed at once. Reads are counted in keys: a head that is skipped
at position t of its document saves t + 1 of them.
"""

import argparse
import dataclasses
import functools
import os
import sys
from collections.abc import Iterable
from collections.abc import Mapping
from typing import Any

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from jaxtyping import Float

from gated_jax import cli
from gated_jax import sharding
from gated_jax.config import MeshConfig
from gated_jax.config import RunConfig
from gated_jax.data.pipeline import make_pipeline
from gated_jax.decode.generate import check_skip
from gated_jax.decode.weights import Params
from gated_jax.decode.weights import load
from gated_jax.model.decoder import Decoder
from gated_jax.platform import check_devices
from gated_jax.platform import skip_absent_tpu

THRESHOLDS = (0.0, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7)


@dataclasses.dataclass(frozen=True)
class Measured:
  """Means over all tokens that were predicted."""

  threshold: float
  loss: float  # nats per token
  skipped: float  # share of the keys and values that a step would read


def measure(
  model: Decoder,
  params: Params,
  batches: Iterable[Mapping[str, Any]],
  threshold: float,
) -> Measured:
  """Loss and share of skipped reads with one threshold.

  Args:
    model: Has a gate that multiplies the attention output.
    params: Its parameters.
    batches: See gated_jax/data/batch.py.
    threshold: See `gated_jax/ops/attention/decode.py`.
  """
  check_skip(model.config, threshold)
  sums = [
    jax.device_get(_sums(model, params, dict(batch), jnp.float32(threshold)))
    for batch in batches
  ]
  nats, tokens, skipped, keys = np.sum(np.array(sums, np.float64), axis=0)
  return Measured(threshold, float(nats / tokens), float(skipped / keys))


@functools.partial(jax.jit, static_argnums=0)
def _sums(
  model: Decoder,
  params: Params,
  batch: dict[str, Array],
  threshold: Float[Array, ''],
) -> tuple[Array, Array, Array, Array]:
  """Nats, tokens, keys that were skipped, and keys in all."""
  tokens = batch['tokens']
  logits, state = model.apply(
    {'params': params},
    tokens,
    segments=batch.get('segments'),
    positions=batch.get('positions'),
    skip_below=threshold,
    mutable=['probes'],
  )
  p = jax.nn.log_softmax(logits)
  nats = -jnp.take_along_axis(p, batch['targets'][..., None], axis=-1)[..., 0]
  weights = batch['weights']
  rows = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  seen = batch.get('positions', rows) + 1
  keys = seen * (batch.get('segments', weights) != 0)
  skipped = [
    leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(state['probes'])
    if 'skipped_heads' in jax.tree_util.keystr(path)
  ]
  share = jnp.mean(jnp.stack(skipped), axis=(0, -1))  # over layers, kv heads
  return (
    jnp.sum(nats * weights),
    jnp.sum(weights),
    jnp.sum(share * keys),
    jnp.sum(keys),
  )


def held_out(config: RunConfig, count: int) -> list[dict[str, Any]]:
  """The first validation batches of a run."""
  with make_pipeline(
    config.data, 'validation', vocab=config.model.vocab
  ) as batches:
    return [batch for batch, _ in zip(batches, range(count), strict=False)]


def read_flags(argv: list[str]) -> argparse.Namespace:
  """Parses the command line; ValueError in one line where it is wrong."""
  parser = cli.Parser(
    prog='python -m gated_jax.decode.skip_report', allow_abbrev=False
  )
  parser.add_argument('--checkpoint', required=True, help='a run, or a step')
  parser.add_argument('--batches', type=int, default=8, help='of held-out text')
  flags = parser.parse_args(argv)
  if flags.batches < 1:
    raise ValueError(f'--batches={flags.batches} must be positive')
  return flags


def run(flags: argparse.Namespace) -> None:
  """Prints a row for every threshold that the gate can fall below."""
  check_devices()
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  config, model, params = load(flags.checkpoint, mesh)
  check_skip(config.model, THRESHOLDS[1])
  batches = held_out(config, flags.batches)
  print(f'{config.model.gate.granularity}, {config.model.kv_heads} kv heads')
  print('| threshold | skipped | loss | change |\n|---|---|---|---|')
  exact = measure(model, params, batches, 0.0).loss
  for threshold in THRESHOLDS:
    result = measure(model, params, batches, threshold)
    print(
      f'| {threshold} | {result.skipped:.2%} | {result.loss:.4f} | '
      f'{result.loss - exact:+.4f} |',
      flush=True,
    )


def main(argv: list[str]) -> int:
  """The exit code; see gated_jax/cli.py."""
  skip_absent_tpu()
  return cli.run(lambda: run(read_flags(argv)))


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
