"""The one door to attention: checks its arguments and chooses a backend.

    Y = softmax(scale * Q K^T + mask) V          Y' = Y * sigmoid(G)

Read `spec.py` for what goes in and out, `xla.py` for what it means.
"""

import functools
import logging

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float

from gated_jax.ops.attention import cudnn
from gated_jax.ops.attention import decode_tpu
from gated_jax.ops.attention import splash
from gated_jax.ops.attention import xla
from gated_jax.ops.attention.pallas_tpu import backend as pallas_tpu
from gated_jax.ops.attention.spec import AttentionSpec
from gated_jax.ops.attention.spec import Backend
from gated_jax.ops.attention.spec import Inputs
from gated_jax.ops.attention.spec import Masking
from gated_jax.ops.attention.spec import Result
from gated_jax.ops.attention.spec import refuse

# Automatic choice tries those that run on the platform in this order. `xla`
# refuses nothing, so it comes last.
BACKENDS: dict[str, Backend] = {
  'pallas_tpu': Backend(
    pallas_tpu.attend,
    platform='tpu',
    skips_hidden=True,
    read_pages=decode_tpu.attend,
  ),
  'splash': Backend(splash.attend, platform='tpu'),
  'cudnn': Backend(cudnn.attend, platform='gpu'),
  'xla': Backend(xla.attend),
}


def candidates(implementation: str, platform: str = '') -> tuple[str, ...]:
  """Names of backends in the order in which they are tried.

  Args:
    implementation: a name, which stands for itself, or 'auto'.
    platform: where attention is to run; '': JAX's default backend.

  Raises:
    ValueError: there is no such backend.
  """
  if implementation == 'auto':
    platforms = ('', platform or jax.default_backend())
    return tuple(
      name for name, row in BACKENDS.items() if row.platform in platforms
    )
  if implementation not in BACKENDS:
    raise ValueError(
      f'{implementation=} must be auto or one of {", ".join(BACKENDS)}'
    )
  return (implementation,)


def first_choice(implementation: str) -> Backend:
  """The backend that is tried first on this platform."""
  return BACKENDS[candidates(implementation)[0]]


def check_platform(implementation: str, platform: str) -> None:
  """NotImplementedError where a backend cannot run; 'auto' can anywhere.

  A kernel for TPUs may be traced on any machine and fails only when it is
  lowered for another device. A caller that knows the devices can ask here
  before it traces anything.
  """
  needed = BACKENDS[candidates(implementation, platform)[0]].platform
  reason = f'it needs a {needed.upper()} and this is a {platform}'
  refuse(implementation, **{reason: needed not in ('', platform)})


def gated_dot_product_attention(
  query: Float[Array, '*B T N H'],
  key: Float[Array, '*B S K H'],
  value: Float[Array, '*B S K V'],
  gate: Float[Array, '*B T N #V'] | None = None,
  *,
  masking: Masking = Masking(),
  spec: AttentionSpec = AttentionSpec(),
  implementation: str = 'auto',
) -> Result:
  """Softmax attention whose output a gate scales, head by head.

  Args:
    query: [*B, T, N, H] with any number of batch axes, also none.
    key: [*B, S, K, H] with N a multiple of K; query head n reads kv head
      n // (N / K).
    value: [*B, S, K, V]; V may differ from H.
    gate: logits (not scores), [*B, T, N, V] for one per channel, [*B, T, N, 1]
      for one per head; None leaves the output as it is.
    masking: arrays that say which keys a query sees, beside spec.causal.
    spec: the static options.
    implementation: a backend by name, or 'auto' for the first on this
      platform that can do the call. One asked for by name is never replaced.

  Returns:
    (output, lse): [*B, T, N, V] in query's dtype, and with spec.return_lse
    the log-sum-exp of the attention logits, [*B, N, T] float32, else None.
    `xla` has derivatives of every kind and order; the kernels of the other
    backends have gradients only (jax.grad and jax.vjp, once).

  Raises:
    ValueError: shapes that do not fit, or a backend that does not exist.
    NotImplementedError: the backend asked for cannot do this, and why.
  """
  inputs = Inputs(query, key, value, gate)
  _check_shapes(inputs, masking)
  if query.ndim == 4:
    return _attend(inputs, masking, spec, implementation)
  batch = query.shape[:-3]
  flat = Inputs(
    _flatten(query, 3),
    _flatten(key, 3),
    _flatten(value, 3),
    None if gate is None else _flatten(gate, 3),
  )
  masking = _flat_masking(masking, batch)
  output, lse = _attend(flat, masking, spec, implementation)
  return Result(
    output.reshape(*batch, *output.shape[1:]),
    None if lse is None else lse.reshape(*batch, *lse.shape[1:]),
  )


def _attend(
  inputs: Inputs, masking: Masking, spec: AttentionSpec, implementation: str
) -> Result:
  """One batch axis, by the first candidate that can do it."""
  names = candidates(implementation)
  refusals = []
  for name in names:
    try:
      result = BACKENDS[name].attend(inputs, masking, spec)
    except NotImplementedError as error:
      if name == names[-1]:
        raise
      refusals.append(str(error))
    else:
      if implementation == 'auto':
        _announce(jax.default_backend(), name, '; '.join(refusals))
      return result
  raise AssertionError('there is at least one candidate')


def _flatten(x: Array, rest: int) -> Array:
  """One batch axis in place of all axes before the last `rest`."""
  return x.reshape(-1, *x.shape[x.ndim - rest :])


def _flat_masking(masking: Masking, batch: tuple[int, ...]) -> Masking:
  """The same rules for one batch axis."""
  mask = masking.mask
  if mask is not None:
    if any(size != 1 for size in mask.shape[:-3]):
      mask = jnp.broadcast_to(mask, (*batch, *mask.shape[-3:]))
    mask = _flatten(mask, 3)
  query_ids, kv_ids = (
    None if ids is None else _flatten(ids, 1)
    for ids in (masking.query_segments, masking.kv_segments)
  )
  offset = masking.query_offset
  offset = None if offset is None else offset.reshape(-1)
  return Masking(query_ids, kv_ids, offset, mask, masking.dropout_key)


@functools.cache
def _announce(platform: str, name: str, refusals: str) -> None:
  """Logs each automatic choice once."""
  why = f' ({refusals})' if refusals else ''
  logging.info('attention on %s: %s%s', platform, name, why)


def _check_shapes(inputs: Inputs, masking: Masking) -> None:
  query, key, value, gate = inputs
  for name, array in (('query', query), ('key', key), ('value', value)):
    if array.ndim < 3:
      raise ValueError(f'{name} of shape {array.shape} must be [*B, T, N, H]')
  *batch, t, n, h = query.shape
  s, k = key.shape[-3:-1]
  same = key.shape[:-1] == value.shape[:-1]
  if not same or key.shape != (*batch, s, k, h):
    raise ValueError(
      f'query {query.shape}, key {key.shape} and value {value.shape} must '
      'agree in batch, query and key in head width, key and value in length '
      'and heads'
    )
  if n % k:
    raise ValueError(f'{n} query heads must be a multiple of {k} kv heads')
  fits = (*batch, t, n, value.shape[-1]), (*batch, t, n, 1)
  if gate is not None and gate.shape not in fits:
    raise ValueError(f'gate logits {gate.shape} must be {fits[0]} or {fits[1]}')
  _check_masking(masking, tuple(batch), (n, t, s))


def _check_masking(
  masking: Masking, batch: tuple[int, ...], sizes: tuple[int, int, int]
) -> None:
  """Refuses arrays of shapes that do not fit the batch, and (N, T, S)."""
  n, t, s = sizes
  segments = masking.query_segments, masking.kv_segments
  if (segments[0] is None) != (segments[1] is None):
    raise ValueError('query_segments and kv_segments come together')
  if segments[0] is not None and segments[1] is not None:
    shapes = segments[0].shape, segments[1].shape
    if shapes != ((*batch, t), (*batch, s)):
      raise ValueError(
        f'segments {shapes} must be {((*batch, t), (*batch, s))}'
      )
  offset, mask = masking.query_offset, masking.mask
  if offset is not None and offset.shape != batch:
    raise ValueError(f'query_offset {offset.shape} must be {batch}')
  if mask is not None:
    fits = (*batch, n, t, s)
    sizes_fit = all(a in (1, b) for a, b in zip(mask.shape, fits, strict=False))
    if mask.ndim != len(fits) or not sizes_fit:
      raise ValueError(
        f'mask {mask.shape} must be {fits}, or 1 where it repeats'
      )
