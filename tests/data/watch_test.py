"""Files that change under a run end it with a word, or are not gone on from."""

import os

import numpy as np
import pytest

from gated_jax.config import DataConfig
from gated_jax.data import watch
from gated_jax.data.pipeline import make_pipeline

END = 256


def tokens(path, count=40_000):
  """Documents of 100 ids."""
  ids = np.random.default_rng(0).integers(0, 256, count).astype(np.uint16)
  ids[99::100] = END
  np.save(path, ids)
  return ids


def config(paths, source='tokens', **settings):
  return DataConfig(
    source=source,
    paths=str(paths),
    batch=1,
    length=64,
    validation=0,
    prefetch=1,
    shuffle_tokens=64,
    eos=END if source == 'tokens' else -1,
    **settings,
  )


def read_all(pipeline):
  for _ in range(2000):
    next(pipeline)


@pytest.mark.parametrize('size', [0, 100, 30_001])
def test_an_array_that_is_cut_short_while_it_is_read_is_named(tmp_path, size):
  path = tmp_path / 'ids.npy'
  tokens(path)
  with make_pipeline(config(path, shuffle=False), 'train') as pipeline:
    next(pipeline)
    os.truncate(path, size)
    with pytest.raises(watch.FilesChangedError) as error:
      read_all(pipeline)
  assert str(path) in str(error.value)
  assert '\n' not in str(error.value)


def test_an_array_that_grows_is_noticed_at_its_next_unit(tmp_path):
  path = tmp_path / 'ids.npy'
  tokens(path)
  with make_pipeline(config(path), 'train') as pipeline:
    next(pipeline)
    tokens(path, 50_000)
    with pytest.raises(
      watch.FilesChangedError, match='it had 40000 ids and has 50000'
    ):
      read_all(pipeline)


def test_what_is_read_is_what_a_mapping_would_show(tmp_path):
  ids = tokens(tmp_path / 'ids.npy')
  mapped = np.load(tmp_path / 'ids.npy', mmap_mode='r')
  with watch.IntegerFile(
    str(tmp_path / 'ids.npy'), mapped.dtype, mapped.offset, len(mapped)
  ) as file:
    assert len(file) == len(ids)
    assert file[7] == ids[7]
    for place in (slice(0, 5), slice(39_990, 50_000), slice(9, 3), slice(None)):
      np.testing.assert_array_equal(file[place], ids[place])


def texts(folder, seed, size=200_000):
  rng = np.random.default_rng(seed)
  for name in ('a.txt', 'b.txt'):
    letters = rng.integers(97, 123, size, np.uint8)
    letters[rng.integers(0, size, size // 6)] = 32
    (folder / name).write_bytes(letters.tobytes())


def test_other_text_of_the_same_size_is_not_gone_on_from(tmp_path):
  texts(tmp_path, 0)
  settings = config(tmp_path / '*.txt', 'text')
  with make_pipeline(settings, 'train') as pipeline:
    next(pipeline)
    saved = pipeline.state()
  with make_pipeline(settings, 'train') as pipeline:
    pipeline.restore(saved)
  texts(tmp_path, 1)
  with (
    make_pipeline(settings, 'train') as pipeline,
    pytest.raises(ValueError, match=r'other contents .* names and sizes'),
  ):
    pipeline.restore(saved)


def test_a_digest_is_of_head_tail_and_middle(tmp_path):
  path = tmp_path / 'a'
  whole = bytearray(10_000_000)
  digests = set()
  for place in (None, 0, len(whole) // 3, len(whole) - 1):
    changed = bytearray(whole)
    if place is not None:
      changed[place] = 1
    path.write_bytes(changed)
    digests.add(watch.digest_of([str(path)]))
  assert len(digests) == 4
  assert watch.digest_of(['no file']) == watch.digest_of(['no other'])
