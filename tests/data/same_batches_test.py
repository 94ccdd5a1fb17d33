"""Batches of `rows='cut'` never change: digests of what the first release gave.

A run that goes on from an old checkpoint, or is repeated years later, has to
see the same tokens. The numbers were written down with the pipeline that read
one document at a time.
"""

import hashlib
import itertools
import json

import numpy as np
import pytest

from gated_jax.config import DataConfig
from gated_jax.data import text_sources
from gated_jax.data import token_sources
from gated_jax.data.pipeline import make_pipeline

WORDS = 'the gate of a head is one number for each channel of its output é 漢'


def _text(random):
  words = random.choice(WORDS.split(), int(random.integers(0, 90)))
  return '\n'.join(' '.join(words[i : i + 8]) for i in range(0, len(words), 8))


def _write_text(folder, files):
  random = np.random.default_rng(files)
  for i in range(files):
    (folder / f'{i:03d}.txt').write_text(_text(random))


def _write_lines(folder, files):
  random = np.random.default_rng(files)
  for i in range(files):
    lines = [json.dumps({'text': _text(random)}) for _ in range(40)]
    (folder / f'{i:03d}.jsonl').write_text('\n'.join(lines))


def _write_tokens(folder, files):
  random = np.random.default_rng(files)
  for i in range(files):
    ids = random.integers(0, 256, 4000).astype(np.uint16)
    ids[random.random(4000) < 1 / (3 + 40 * (i % 3))] = 256
    path = folder / f'{i:03d}'
    if i % 2:
      np.save(f'{path}.npy', ids)
    else:
      ids.tofile(f'{path}.bin')
      about = {'dtype': 'uint16', 'eos': 256}
      (folder / f'{i:03d}.bin.json').write_text(json.dumps(about))
    (folder / f'{i:03d}.npy.json').write_text('{"eos": 256}')


WRITERS = {'text': _write_text, 'jsonl': _write_lines, 'tokens': _write_tokens}
ENDINGS = {'text': 'txt', 'jsonl': 'jsonl', 'tokens': '[bn][ip][ny]'}
SMALL = {'batch': 4, 'length': 48, 'shuffle_tokens': 480}
# Kind of files, how many, settings, (split, process, of how many).
CASES = {
  'text': ('text', 60, {}, ('train', 0, 1)),
  'text, one file': ('text', 1, {'validation': 0}, ('train', 0, 1)),
  'text, cut': ('text', 20, {'max_document': 90}, ('train', 0, 1)),
  'text, unshuffled': ('text', 60, {'shuffle': False}, ('train', 0, 1)),
  'text, held out': ('text', 60, {'validation': 0.3}, ('validation', 0, 1)),
  'text, process': ('text', 60, {'seed': 5}, ('train', 1, 2)),
  'lines': ('jsonl', 3, {}, ('train', 0, 1)),
  'lines, one file of two': ('jsonl', 2, {'seed': 1}, ('train', 0, 1)),
  'lines, dealt': ('jsonl', 1, {}, ('train', 1, 4)),
  'lines, held out': ('jsonl', 3, {'validation': 0.2}, ('validation', 1, 2)),
  'tokens': ('tokens', 5, {}, ('train', 0, 1)),
  'tokens, one file': ('tokens', 1, {'validation': 0}, ('train', 0, 1)),
  'tokens, two files': ('tokens', 2, {'seed': 9}, ('train', 0, 1)),
  'tokens, many': ('tokens', 40, {'length': 200}, ('train', 0, 1)),
  'tokens, cut': ('tokens', 3, {'max_document': 17}, ('train', 0, 1)),
  'tokens, dealt': ('tokens', 1, {}, ('train', 2, 4)),
  'tokens, process': ('tokens', 12, {}, ('train', 1, 2)),
  'tokens, held out': ('tokens', 6, {'validation': 0.1}, ('validation', 0, 1)),
  'tokens, window of one': (
    'tokens',
    5,
    {'shuffle_tokens': 1},
    ('train', 0, 1),
  ),
  'synthetic': ('', 0, {'length': 100}, ('train', 0, 1)),
}
MIXTURES = {
  'mixture': ('3:text:{text}', '1:jsonl:{jsonl}', '0.7:tokens:{tokens}'),
  'mixture, synthetic': ('0.3:synthetic', '1:tokens:{tokens}'),
}
# Of 150 batches: with whole files as units, and with parts of them.
DIGESTS = {
  'text': ('1ccf5f94d4ab682f', '1ccf5f94d4ab682f'),
  'text, one file': ('91c1b3eee5718652', '91c1b3eee5718652'),
  'text, cut': ('b3f7c254e21dd570', 'b3f7c254e21dd570'),
  'text, unshuffled': ('83c570399aa47cfa', '83c570399aa47cfa'),
  'text, held out': ('01b1c6ca8dbf39a5', '01b1c6ca8dbf39a5'),
  'text, process': ('56c47b7c9e4cfc07', '56c47b7c9e4cfc07'),
  'lines': ('7a23ed9190d9ff46', 'c7f61e07ad6fb750'),
  'lines, one file of two': ('0e67d1650e83c72e', '081ef60e530412f9'),
  'lines, dealt': ('8b7c2175f8c63bf1', '6ddf5f765d9a8598'),
  'lines, held out': ('8446c65f47f49b7e', 'eebda7ea2a90b2a7'),
  'tokens': ('317ac5ecb427d87d', 'ee8fc858175604c3'),
  'tokens, one file': ('c22e7ebe4f70499d', '9021e5d75e8d576c'),
  'tokens, two files': ('0e13f54dcd607d49', 'ec4d11c6f77c2e03'),
  'tokens, many': ('2523d54884a5ad84', '0a550eb89d90732c'),
  'tokens, cut': ('49f031a6d5744fdd', '9c7801a323538224'),
  'tokens, dealt': ('cc92fe2f68c98cb8', '84e249cdec22ff3e'),
  'tokens, process': ('dfc0e1a15060cca6', '6e723d14591ca6f9'),
  'tokens, held out': ('bb981126a50f53da', 'a5da7e0481d78ad9'),
  'tokens, window of one': ('115927c764c084b1', '090e8425e7933bd4'),
  'synthetic': ('fb2777b2d60afc4f', 'fb2777b2d60afc4f'),
  'mixture': ('3aa6ff95fc65c577', '7f0f1e35f90130f6'),
  'mixture, synthetic': ('6982aa506780bfa1', 'ee9095f558fafc63'),
}


@pytest.fixture(params=['whole', 'parts'])
def units(request, monkeypatch):
  """Units far smaller than a file give other batches, also for ever."""
  if request.param == 'parts':
    monkeypatch.setattr(text_sources, '_RANGE', 700)
    monkeypatch.setattr(token_sources, '_RANGE', 700)
  return request.param


def _paths(folder, kind, files):
  folder = folder / kind
  folder.mkdir()
  WRITERS[kind](folder, files)
  return f'{folder}/*.{ENDINGS[kind]}'


def digest_of_batches(config, split, shard, shards, count=150):
  digest = hashlib.blake2b(digest_size=8)
  with make_pipeline(config, split, shard=shard, shards=shards) as pipeline:
    for batch in itertools.islice(pipeline, count):
      for name, value in sorted(batch.items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(value).tobytes())
  return digest.hexdigest()


def case(name, folder):
  if name in MIXTURES:
    paths = {kind: _paths(folder, kind, 7) for kind in WRITERS}
    mixture = tuple(entry.format(**paths) for entry in MIXTURES[name])
    config = DataConfig(source='mixture', mixture=mixture, **SMALL)
    return config, ('train', 0, 1)
  kind, files, changes, where = CASES[name]
  if not kind:
    return DataConfig(source='synthetic', **{**SMALL, **changes}), where
  paths = _paths(folder, kind, files)
  return DataConfig(source=kind, paths=paths, **{**SMALL, **changes}), where


@pytest.mark.parametrize('name', [*CASES, *MIXTURES])
def test_batches_are_those_of_the_first_release(tmp_path, units, name):
  config, where = case(name, tmp_path)
  whole, parts = DIGESTS[name]
  expected = whole if units == 'whole' else parts
  assert digest_of_batches(config, *where) == expected


# Case, batches given out, and the position that the first release saved then.
POSITIONS = [
  (
    'tokens',
    5,  # ten rows are a window: both of them are used up
    {
      'parent_window_start_state': {
        'parent': {'place': 0, 'cursor': 794},
        'used': 4,
      },
      'window_index': 2,
      'pos_in_window': 10,
    },
  ),
  (
    'tokens',
    27,
    {
      'parent_window_start_state': {
        'parent': {'place': 1, 'cursor': 2337},
        'used': 152,
      },
      'window_index': 10,
      'pos_in_window': 8,
    },
  ),
  (
    'mixture',
    27,
    {
      'parent_window_start_state': {
        'parents': [
          {'parent': {'place': 11, 'cursor': 395}, 'used': 254},
          {'parent': {'place': 0, 'cursor': 1488}, 'used': 48},
          {'parent': {'place': 0, 'cursor': 1046}, 'used': 5},
        ],
        'index': 100,
        'stop': False,
      },
      'window_index': 10,
      'pos_in_window': 8,
    },
  ),
  (
    'lines',
    27,
    {
      'parent_window_start_state': {
        'parent': {'place': 0, 'cursor': 6268},
        'used': 36,
      },
      'window_index': 10,
      'pos_in_window': 8,
    },
  ),
]


@pytest.mark.parametrize(('name', 'count', 'position'), POSITIONS)
def test_positions_of_the_first_release_go_on_exactly(
  tmp_path, name, count, position
):
  config, (split, *_) = case(name, tmp_path)
  with make_pipeline(config, split) as pipeline:
    for _ in range(count):
      next(pipeline)
    old = json.loads(pipeline.state()) | {'position': position}
    # These settings did not exist.
    for setting in ('rows', 'first_token', 'special_tokens'):
      del old['about'][f'data.{setting}']
    with make_pipeline(config, split) as again:
      again.restore(json.dumps(old).encode())
      assert again.batches == count
      for _ in range(6):
        expected, batch = next(pipeline), next(again)
        for key, value in expected.items():
          np.testing.assert_array_equal(batch[key], value)
