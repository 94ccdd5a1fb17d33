"""The one door to attention: checks its arguments, chooses a backend.

    Y = softmax(scale * Q K^T + mask) V          Y' = Y * sigmoid(G)

Read `spec.py` for what goes in and out, `xla.py` for what it means.
"""

import functools
import logging
from collections.abc import Callable

import jax
from jaxtyping import Array
from jaxtyping import Float

from gated_jax.ops.attention import cudnn
from gated_jax.ops.attention import pallas_tpu
from gated_jax.ops.attention import splash
from gated_jax.ops.attention import xla
from gated_jax.ops.attention.spec import AttentionSpec
from gated_jax.ops.attention.spec import Masking
from gated_jax.ops.attention.spec import Result
from gated_jax.ops.attention.spec import refuse

BACKENDS: dict[str, Callable[..., Result]] = {
  'xla': xla.attend,
  'cudnn': cudnn.attend,
  'splash': splash.attend,
  'pallas_tpu': pallas_tpu.attend,
}
# What automatic choice tries on each platform, in this order. `xla` refuses
# nothing, so it ends every list.
PREFERENCE = {
  'tpu': ('pallas_tpu', 'splash', 'xla'),
  'gpu': ('cudnn', 'xla'),
  'cpu': ('xla',),
}
# The only platform that each of these runs on.
NEEDS = {'cudnn': 'gpu', 'splash': 'tpu', 'pallas_tpu': 'tpu'}
# Those that do not compute what documents hide from one another.
SKIPS_HIDDEN = ('pallas_tpu',)


def first_choice(implementation: str) -> str:
  """What 'auto' tries first here; any other name stands for itself."""
  if implementation != 'auto':
    return implementation
  return PREFERENCE.get(jax.default_backend(), ('xla',))[0]


def check_platform(implementation: str, platform: str) -> None:
  """NotImplementedError where a backend cannot run; 'auto' can anywhere.

  For whoever knows the devices before tracing: a kernel for TPUs may be traced
  on any machine, so by itself it fails only when it is lowered for another.
  """
  needed = NEEDS.get(implementation, platform)
  reason = f'it needs a {needed.upper()} and this is a {platform}'
  refuse(implementation, **{reason: needed != platform})


def gated_dot_product_attention(
  query: Float[Array, 'B T N H'],
  key: Float[Array, 'B S K H'],
  value: Float[Array, 'B S K H'],
  gate: Float[Array, 'B T N #H'] | None = None,
  *,
  masking: Masking = Masking(),
  spec: AttentionSpec = AttentionSpec(),
  implementation: str = 'auto',
) -> Result:
  """Softmax attention whose output a gate scales, head by head.

  Args:
    query: [B, T, N, H].
    key: [B, S, K, H] with N a multiple of K; query head n reads kv head
      n // (N / K).
    value: [B, S, K, H].
    gate: logits (not scores), [B, T, N, H] for one per channel, [B, T, N, 1]
      for one per head; None leaves the output as it is.
    masking: arrays that say which keys a query sees, beside spec.causal.
    spec: the static options.
    implementation: a backend by name, or 'auto' for the first on this
      platform that can do the call. One asked for by name is never replaced.

  Returns:
    (output, lse): [B, T, N, H] in query's dtype, and with spec.return_lse
    the log-sum-exp of the scaled logits, [B, N, T] float32, else None.

  Raises:
    ValueError: shapes that do not fit, or a backend that does not exist.
    NotImplementedError: the backend asked for cannot do this, and why.
  """
  _check_shapes(query, key, value, gate, masking)
  arguments = (query, key, value, gate, masking, spec)
  if implementation != 'auto':
    if implementation not in BACKENDS:
      raise ValueError(
        f'{implementation=} must be auto or one of {", ".join(BACKENDS)}'
      )
    return BACKENDS[implementation](*arguments)
  platform = jax.default_backend()
  refusals = []
  for name in PREFERENCE.get(platform, ('xla',)):
    try:
      result = BACKENDS[name](*arguments)
    except NotImplementedError as e:
      refusals.append(str(e))
    else:
      _announce(platform, name, '; '.join(refusals))
      return result
  raise AssertionError('xla refuses nothing')


@functools.cache
def _announce(platform: str, name: str, refusals: str) -> None:
  why = f' ({refusals})' if refusals else ''
  logging.info('attention on %s: %s%s', platform, name, why)


def _check_shapes(
  query: Array,
  key: Array,
  value: Array,
  gate: Array | None,
  masking: Masking,
) -> None:
  for name, array in (('query', query), ('key', key), ('value', value)):
    if array.ndim != 4:
      raise ValueError(f'{name} of shape {array.shape} must be [B, T, N, H]')
  b, t, n, h = query.shape
  s, k = key.shape[1:3]
  if key.shape != value.shape or key.shape[0] != b or key.shape[3] != h:
    raise ValueError(
      f'query {query.shape}, key {key.shape} and value {value.shape} must '
      'agree in batch and head width, key and value in everything'
    )
  if n % k:
    raise ValueError(f'{n} query heads must be a multiple of {k} kv heads')
  if gate is not None and gate.shape not in ((b, t, n, h), (b, t, n, 1)):
    raise ValueError(
      f'gate logits {gate.shape} must be {(b, t, n, h)} or {(b, t, n, 1)}'
    )
  segments = masking.query_segments, masking.kv_segments
  if (segments[0] is None) != (segments[1] is None):
    raise ValueError('query_segments and kv_segments come together')
  if segments[0] is not None and segments[1] is not None:
    shapes = segments[0].shape, segments[1].shape
    if shapes != ((b, t), (b, s)):
      raise ValueError(f'segments {shapes} must be {((b, t), (b, s))}')
