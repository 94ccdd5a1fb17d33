"""Text to batches of rows: the one door to this room.

    pipeline = make_pipeline(config, 'train', shard=0, shards=1)
    batch = next(pipeline)  # tokens, targets, segments, positions, weights
    saved = pipeline.state()
    make_pipeline(config, 'train').restore(saved)  # goes on exactly there

The stages, each in a file of its own:

    order.py      units, shuffled anew each epoch, dealt to the processes
    documents.py  the split's documents, tokenised by threads
    packing.py    rows                                one of these per source
    windows.py    a mixture of rows, shuffled within a window
    batches.py    batches

A thread of Grain's makes windows ahead of the caller. Training repeats for
ever. Validation is one pass in a fixed order, and every process makes the same
global batches and takes its own rows of them, so all see the same number of
batches, and the loss does not depend on how many there are.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import os
import time
import weakref
from typing import Any

import grain
import numpy as np

from gated_jax.config import DataConfig
from gated_jax.config import names_with
from gated_jax.data import positions
from gated_jax.data.chat import Chat
from gated_jax.data.sources import Skipped
from gated_jax.data.sources import Source
from gated_jax.data.stages import View
from gated_jax.data.stages import batches as make_batches
from gated_jax.data.stages import make_source
from gated_jax.data.tokenizer import make_tokenizer
from gated_jax.data.watch import digest_of
from gated_jax.data.watch import sample
from gated_jax.data.watch import sample_of_file
from gated_jax.paths import in_bucket

Batch = dict[str, np.ndarray]


class Pipeline:
  """An iterator of batches that knows its place.

  `gated_jax/data/batch.py` says what a batch holds.
  """

  def __init__(self, sources: list[Source], weights: list[float], view: View):
    self._iterator, self._windows = make_batches(sources, weights, view)
    # Threads must not outlive the modules that they use.
    self._end = weakref.finalize(self, _stop, self._iterator, view.pool)
    self._view = view
    self._sources = sources
    self._about = _about(view.config, sources, view)
    self.tokenizer = view.tokenizer
    self.wait_seconds = 0.0  # seconds that the caller was kept waiting, in all
    self.name = view.config.source
    self.is_text = view.config.is_text
    self.batches = 0  # given out since the beginning, resumed ones included
    self._names = view.config.names()
    self.source = self._names[
      0
    ]  # the name of the last validation batch's source

  def __iter__(self) -> 'Pipeline':
    return self

  def __next__(self) -> Batch:
    start = time.perf_counter()
    try:
      source, batch = next(self._iterator)
    except ValueError as error:
      # Grain adds notes about its own frames to what is one line.
      error.__dict__.pop('__notes__', None)
      raise
    finally:
      self.wait_seconds += time.perf_counter() - start
    self.batches += 1
    self.source = self._names[source]
    return batch

  @property
  def tokens_per_second(self) -> float:
    """How fast it is alone, measured while it was not waiting for its caller.

    Zero before the first window of rows.
    """
    speeds = [windows.speed for windows in self._windows]
    seconds = sum(speed.seconds for speed in speeds)
    return sum(speed.tokens for speed in speeds) / seconds if seconds else 0.0

  @property
  def padding(self) -> float:
    """The share of the places in rows so far that hold no token."""
    speeds = [windows.speed for windows in self._windows]
    places = sum(speed.places for speed in speeds)
    return 1 - sum(s.tokens for s in speeds) / places if places else 0.0

  @property
  def skipped(self) -> dict[str, str]:
    """Files, or parts of files, left out so far: name to reason."""
    return self._view.skipped.report()

  @property
  def shortened(self) -> int:
    """Conversations so far that lost their beginning to fit into a row."""
    return self._view.skipped.shortened

  def state(self) -> bytes:
    """The place after the last batch given out, however far ahead it reads."""
    state = {
      'about': self._about,
      'batches': self.batches,
      'position': self._iterator.get_state(),
    }
    return json.dumps(state).encode()

  def restore(self, state: bytes) -> None:
    """Goes on exactly where `state` was taken.

    Raises:
      ValueError: it is no such state, or one of other settings, other files or
        another number of processes, with which no exact continuation exists.
    """
    try:
      saved = json.loads(state)
      about, batches = saved['about'], int(saved['batches'])
      config = self._view.config
      window = config.shuffle_tokens // config.length
      position = positions.read(saved['position'], max(window, 1))
      # A setting that is younger than the position stood at its default.
      about = _settings(DataConfig()) | about
    except (ValueError, TypeError, KeyError) as error:
      raise ValueError(f'not a data position: {bytes(state)[:40]!r}') from error
    for key, now in self._about.items():
      # Positions from before contents were compared do not know them.
      if key == 'contents' and not self._same_contents(about.get(key, now)):
        raise ValueError(
          f'the data files of {self._about["data.source"]!r} have other '
          'contents than those of the saved position, in files of the same '
          'names and sizes: it cannot be continued exactly'
        )
      if key == 'contents':
        continue
      if key == 'files' and about.get(key) != now:
        raise ValueError(
          f'the data files of {self._about["data.source"]!r} are not those of '
          'the saved position (names or sizes differ): it cannot be continued '
          'exactly'
        )
      if about.get(key) != now:
        raise ValueError(
          f'the saved data position is for {key}={about.get(key)!r}, '
          f'not {now!r}: it cannot be continued exactly'
        )
    self._iterator.set_state(position)
    self.batches = batches

  def _same_contents(self, saved: str) -> bool:
    """Tells whether files are the saved ones, which may have been on a disk."""
    now = self._about['contents']
    moved = any(in_bucket(unit.path) for s in self._sources for unit in s.units)
    return saved == now or (moved and saved == _contents(self._sources, True))

  def start(self) -> None:
    """Begins to read ahead, for example while the step compiles."""
    self._iterator.start_prefetch()

  def close(self) -> None:
    """Stops the threads."""
    self._end()

  def __enter__(self) -> 'Pipeline':
    return self

  def __exit__(self, *exception) -> None:
    self.close()


def make_pipeline(
  config: DataConfig,
  split: str,
  *,
  shard: int = 0,
  shards: int = 1,
  vocab: int = 0,
) -> Pipeline:
  """Returns the batches of one split for process `shard` of `shards`.

  Args:
    config: what to read and how.
    split: 'train', without end, or 'validation', one pass.
    shard: which of the processes this is; its batches have `config.batch //
      shards` rows.
    shards: how many there are.
    vocab: ids must lie below it; 0: unchecked.

  Raises:
    ValueError: the batch does not divide, no file matches a glob, the
      tokenizer has more than `vocab` tokens. What is inside the files is found
      when it is read: `next` raises ValueError where no file is left to read,
      where a split has no documents, and for an id outside the vocabulary.
  """
  view = make_view(config, split, shard, shards, vocab)
  parts = config.parts()
  sources = [make_source(part, view) for _, part in parts]
  return Pipeline(sources, [weight for weight, _ in parts], view)


def make_view(
  config: DataConfig,
  split: str,
  shard: int = 0,
  shards: int = 1,
  vocab: int = 0,
) -> View:
  """One process's view of one split; arguments are those of `make_pipeline`."""
  if split not in ('train', 'validation'):
    raise ValueError(f"{split=} must be 'train' or 'validation'")
  if not 0 <= shard < shards:
    raise ValueError(f'{shard=} must lie in [0, {shards=})')
  if split == 'validation' and not config.validation:
    raise ValueError('data.validation=0 holds out nothing to validate on')
  if config.batch % shards:
    raise ValueError(
      f'data.batch={config.batch} must be a multiple of the {shards} processes'
    )
  tokenizer = make_tokenizer(config.tokenizer, config.special_tokens)
  text = any(part.is_text for _, part in config.parts())
  chat = None
  if any(part.is_chat for _, part in config.parts()):
    chat = Chat(tokenizer, config.special_tokens)
  return View(
    config,
    split,
    shard,
    shards,
    vocab,
    tokenizer,
    Skipped(log=split == 'train'),
    # Bytes are ids already: a thread would cost more than it does.
    pool=concurrent.futures.ThreadPoolExecutor(config.workers, 'tokenise')
    if text and tokenizer.name != 'bytes'
    else None,
    chat=chat,
  )


def _stop(
  iterator: grain.DatasetIterator, pool: concurrent.futures.Executor | None
) -> None:
  iterator.close()
  if pool is not None:
    pool.shutdown(wait=False, cancel_futures=True)


def _about(
  config: DataConfig, sources: list[Source], view: View
) -> dict[str, Any]:
  """Everything that a position depends on, as JSON has it."""
  digest = hashlib.blake2b(digest_size=8)
  for source in sources:
    for unit in source.units:
      name = os.path.basename(unit.path)
      digest.update(repr((name, unit.begin, unit.end)).encode())
  about = _settings(config) | {
    'split': view.split,
    'process': view.shard,
    'processes': view.shards,
    'files': digest.hexdigest(),
    'contents': _contents(sources),
  }
  if view.chat is not None:
    about['chat template'] = view.chat.digest
  return json.loads(json.dumps(about))


def _contents(sources: list[Source], as_on_disk: bool = False) -> str:
  """A digest of what the files of some sources contain.

  Args:
    sources: whose units they are cut into.
    as_on_disk: samples files in buckets, at ten requests each, to compare them
      with files on a disk. Otherwise what the bucket says of them is enough.
  """
  files = {
    unit.path: source.files for source in sources for unit in source.units
  }

  def sample_of(path: str) -> bytes:
    """Bytes that stand for the contents of a file."""
    known = files[path]
    if path not in known.entries:
      return sample_of_file(path)
    content = known.content(path)
    if content and not as_on_disk:
      return content.encode()
    return sample(known.size(path), functools.partial(known.read, path))

  return digest_of(list(files), sample_of)


def _settings(config: DataConfig) -> dict[str, Any]:
  """The settings that move the data."""
  free = names_with(config, 'free')
  return {
    f'data.{name}': value
    for name, value in dataclasses.asdict(config).items()
    # Files may move: their names and sizes are compared instead of paths.
    if name not in free
  }
