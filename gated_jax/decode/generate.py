"""Prompts to tokens: prefill in chunks, then step by step.

    for tokens in generate(model, params, prompts, max_tokens=100): ...

The cache is a value that every call takes and returns, and its memory goes
from one to the next. Shapes are rounded up to buckets, so that prompts of any
length run through few compiled programs: one prefill for each size of chunk
and cache, one step for each size of cache. Rows are padded on the right;
each has its own length in the cache. Read `sampling.py` for the choice of a
token, `gated_jax/model/decoder.py` for the cache.
"""

import dataclasses
import functools
from collections.abc import Collection
from collections.abc import Iterator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int

from gated_jax import memory
from gated_jax.config import ModelConfig
from gated_jax.decode.sampling import Sampling
from gated_jax.decode.sampling import choose
from gated_jax.decode.weights import Params
from gated_jax.model.cache import Cache
from gated_jax.model.cache import init_cache
from gated_jax.model.decoder import Decoder

CHUNK = 256  # the most tokens of each row that one call of prefill takes
SMALLEST = 32  # the shortest chunk and cache
# The largest score that each activation can give. The others have no bound.
LARGEST_SCORE = {'sigmoid': 1.0, 'ns_sigmoid': 1.0, 'two_sigmoid': 2.0}


@dataclasses.dataclass(frozen=True)
class Buckets:
  """The shapes that prompts are padded to; all count tokens of one row."""

  chunk: int  # tokens of one call of prefill
  chunks: int  # calls
  cache: int  # room of the cache


def buckets(longest: int, new: int) -> Buckets:
  """Shapes for prompts of up to `longest` tokens, and `new` ones after them."""
  chunk = min(CHUNK, _power(longest))
  chunks = -(-longest // chunk)
  # The last chunk is written whole, padding included.
  return Buckets(chunk, chunks, _power(max(longest + new - 1, chunks * chunk)))


def _power(n: int) -> int:
  """The next power of two, or a step of a quarter of one between them."""
  power = max(SMALLEST, 1 << (n - 1).bit_length())
  quarter = power // 8
  return power if power <= CHUNK else -(-n // quarter) * quarter


def check_prompts(
  prompts: Sequence[Sequence[int] | np.ndarray], config: ModelConfig
) -> None:
  """ValueError naming what the model cannot read."""
  if not len(prompts):
    raise ValueError('there are no prompts')
  for i, prompt in enumerate(prompts):
    ids = np.asarray(prompt)
    if not ids.size:
      raise ValueError(f'prompt {i} is empty')
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
      raise ValueError(f'prompt {i} must be a list of token ids')
    if ids.size > config.length:
      raise ValueError(
        f'prompt {i} has {ids.size} tokens, and the model is built for '
        f'{config.length}'
      )
    wrong = ids[(ids < 0) | (ids >= config.vocab)]
    if wrong.size:
      raise ValueError(
        f'prompt {i} has the token id {wrong[0]}, which is not in '
        f'[0, {config.vocab})'
      )


def generate(
  model: Decoder,
  params: Params,
  prompts: Sequence[Sequence[int] | np.ndarray],
  *,
  max_tokens: int = 128,
  sampling: Sampling = Sampling(),
  seed: int = 0,
  stop: Collection[int] = (),
  skip_below: float = 0.0,
) -> Iterator[Int[np.ndarray, ' B']]:
  """Yields one token of every row at a time.

  A row ends with a stop token, which is yielded, or where the model's length
  is reached; then it yields -1 until all rows have ended. The same arguments
  give the same tokens. On a mesh, call it inside `sharding.activate`.

  Args:
    model: Fastest with `scan=False`; see `weights.py`.
    params: Its parameters.
    prompts: Token ids of each row, of any lengths.
    max_tokens: The most new tokens of each row.
    sampling: How they are chosen.
    seed: Fixes the draws.
    stop: Ids that end a row.
    skip_below: Steps do not read the cache for heads whose gate scores are
      all below; see docs/decoding.md. 0 is exact.

  Raises:
    ValueError: the model cannot read a prompt, or another argument has no
      meaning; at once, not when the first token is asked for.
  """
  config = model.config
  check_prompts(prompts, config)
  if max_tokens < 1:
    raise ValueError(f'{max_tokens=} must be positive')
  if not 0 <= seed < 2**32:
    raise ValueError(f'{seed=} must lie in [0, 2**32)')
  for token in stop:
    if not 0 <= token < config.vocab:
      raise ValueError(
        f'the stop token {token} is not in [0, {config.vocab}), the ids of '
        'the model'
      )
  check_skip(config, skip_below)
  _check_cache(config, params, prompts, max_tokens)
  return _run(
    model,
    params,
    [np.asarray(p, np.int32) for p in prompts],
    max_tokens,
    (sampling, seed, skip_below),
    frozenset(stop),
  )


def _check_cache(
  config: ModelConfig,
  params: Params,
  prompts: Sequence[Sequence[int] | np.ndarray],
  max_tokens: int,
) -> None:
  """ValueError where the cache needs more memory than there is."""
  longest = max(len(prompt) for prompt in prompts)
  new = min(max_tokens, config.length - min(map(len, prompts)) + 1)
  room = buckets(longest, new).cache
  cache = jax.eval_shape(lambda: init_cache(config, len(prompts), room))
  arrays = (x for x in jax.tree.leaves(params) if isinstance(x, jax.Array))
  devices = next((list(x.devices()) for x in arrays), jax.devices()[:1])
  memory.check(
    f'the keys and values of {len(prompts)} rows with room for {room} tokens',
    memory.size_of(cache),
    devices,
  )


def check_skip(config: ModelConfig, skip_below: float) -> None:
  """ValueError where no bound of the error would hold, or nothing is read."""
  gate = config.gate
  if not 0 <= skip_below < float('inf'):
    raise ValueError(f'{skip_below=} must be a finite number, and not negative')
  fits = gate.scores_output and gate.mode == 'multiplicative'
  if skip_below and not fits:
    raise ValueError(
      f'{skip_below=} needs a gate that multiplies the attention output, not '
      f'position={gate.position!r}, kind={gate.kind!r}, mode={gate.mode!r}'
    )
  largest = LARGEST_SCORE.get(gate.activation, float('inf'))
  if skip_below >= largest:
    raise ValueError(
      f'{skip_below=} would skip every head: scores of the activation '
      f'{gate.activation!r} are below {largest}'
    )


def _run(
  model: Decoder,
  params: Params,
  prompts: list[np.ndarray],
  max_tokens: int,
  options: tuple[Sampling, int, float],
  stop: frozenset[int],
) -> Iterator[Int[np.ndarray, ' B']]:
  lengths = np.array([len(p) for p in prompts])
  # The last token takes no place in the cache: nothing is computed from it.
  room = model.config.length - lengths + 1
  count = int(min(max_tokens, room.max()))
  logits, cache = prefill(model, params, prompts, count)
  sampling, seed, threshold = options
  skip_below = jnp.float32(threshold) if threshold else None
  draw = np.uint32(seed)
  tokens = _choose(logits, draw, np.int32(0), sampling=sampling)
  alive = np.ones(len(prompts), bool)
  for i in range(count):
    ahead = tokens
    if i + 1 < count:
      # Dispatched before the host looks at the tokens that it follows from.
      tokens, cache = _step(
        model,
        params,
        cache,
        ahead,
        draw,
        np.int32(i + 1),
        skip_below,
        sampling=sampling,
      )
    chosen = np.where(alive, np.asarray(ahead), -1)
    yield chosen
    alive &= ~np.isin(chosen, list(stop)) & (room > i + 1)
    if not alive.any():
      return


def prefill(
  model: Decoder, params: Params, prompts: Sequence[np.ndarray], new: int
) -> tuple[Float[Array, 'B V'], Cache]:
  """Logits after each prompt, and a cache with room for `new` tokens more.

  Args:
    model: The decoder.
    params: Its parameters.
    prompts: Token ids, checked.
    new: How many tokens will be generated, the first included.
  """
  lengths = np.array([len(p) for p in prompts])
  shape = buckets(int(lengths.max()), new)
  tokens = np.zeros((len(prompts), shape.chunks * shape.chunk), np.int32)
  for row, prompt in zip(tokens, prompts, strict=True):
    row[: len(prompt)] = prompt
  segments = (np.arange(tokens.shape[1]) < lengths[:, None]).astype(np.int32)
  cache = _empty(model.config, len(prompts), shape.cache)
  logits = jnp.zeros((len(prompts), model.config.vocab), jnp.float32)
  for i in range(shape.chunks):
    part = slice(i * shape.chunk, (i + 1) * shape.chunk)
    logits, cache = _extend(
      model, params, cache, logits, tokens[:, part], segments[:, part]
    )
  return logits, cache


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _empty(config: ModelConfig, batch: int, length: int) -> Cache:
  return init_cache(config, batch, length)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(2, 3))
def _extend(
  model: Decoder,
  params: Params,
  cache: Cache,
  before: Float[Array, 'B V'],
  tokens: Int[Array, 'B T'],
  segments: Int[Array, 'B T'],
) -> tuple[Float[Array, 'B V'], Cache]:
  """The cache with one chunk more; rows without tokens keep their logits."""
  logits: Array
  logits, cache = model.apply(  # type: ignore[assignment]
    {'params': params}, tokens, segments=segments, cache=cache, last=True
  )
  any_new = jnp.any(segments != 0, axis=1, keepdims=True)
  return jnp.where(any_new, logits[:, 0].astype(jnp.float32), before), cache


_choose = functools.partial(jax.jit, static_argnames='sampling')(choose)


@functools.partial(
  jax.jit, static_argnums=0, static_argnames='sampling', donate_argnums=2
)
def _step(
  model: Decoder,
  params: Params,
  cache: Cache,
  tokens: Int[Array, ' B'],
  seed: Int[Array, ''],
  index: Int[Array, ''],
  skip_below: Float[Array, ''] | None,
  *,
  sampling: Sampling,
) -> tuple[Int[Array, ' B'], Cache]:
  """The tokens after these, and the cache with these."""
  logits: Array
  logits, cache = model.apply(  # type: ignore[assignment]
    {'params': params}, tokens[:, None], cache=cache, skip_below=skip_below
  )
  return choose(logits[:, 0], seed, index, sampling), cache
