"""What is said of an array has to be true, and its end has to be stated."""

import json
import re

import numpy as np
import pytest

from gated_jax.config import DataConfig
from gated_jax.data import token_sources
from gated_jax.data.array_files import AS_STATED
from gated_jax.data.array_files import NONE
from gated_jax.data.array_files import Contradiction
from gated_jax.data.array_files import Wanted
from gated_jax.data.array_files import open_array
from gated_jax.data.pipeline import make_pipeline

# Ten documents of nine ids and their end.
IDS = np.tile(np.array([*range(1, 10), 256], np.uint16), 10)
PLAIN = Wanted(AS_STATED, 'bytes', 256, 'bytes')


def _array(folder, about=None, ids=IDS):
  path = folder / 'a.npy'
  np.save(path, ids)
  if about is not None:
    (folder / 'a.npy.json').write_text(json.dumps(about))
  return str(path)


def _batch(path, **changes):
  config = DataConfig(
    **{
      'source': 'tokens',
      'paths': path,
      'batch': 2,
      'length': 16,
      'validation': 0,
      'shuffle': False,
      **changes,
    }
  )
  with make_pipeline(config, 'train') as pipeline:
    return next(pipeline)


@pytest.mark.parametrize(
  ('about', 'setting', 'eos'),
  [
    ({'eos': 256}, AS_STATED, 256),
    ({'eos': 256}, 256, 256),
    ({'eos': 5}, 5, 5),
    ({'eos': None}, AS_STATED, -1),
    ({'eos': -1}, NONE, -1),
    ({}, 7, 7),
    (None, NONE, -1),
  ],
)
def test_the_end_of_a_document_is_what_was_stated(
  tmp_path, about, setting, eos
):
  path = _array(tmp_path, about)
  assert open_array(path, PLAIN._replace(eos=setting)).eos == eos


def test_a_tokenizer_that_was_chosen_states_it(tmp_path):
  path = _array(tmp_path)
  chosen = Wanted(AS_STATED, 'x/tokenizer.json', 9, 'abc')
  assert open_array(path, chosen).eos == 9
  with pytest.raises(Contradiction, match='nothing says which id ends'):
    open_array(path, chosen._replace(tokenizer_eos=-1))


@pytest.mark.parametrize(
  ('about', 'changes', 'message'),
  [
    # GPT-2's ids would be cut at 256, and their true ends be missed.
    (None, {}, 'set data.eos to it (-2: no id does), or write {"eos": ID} to'),
    ({'eos': 256}, {'eos': 3}, 'data.eos=3, but'),
    ({'eos': 256}, {'eos': NONE}, 'data.eos=-2, but'),
    ({'eos': '</s>'}, {}, "eos='</s>' must be an id, or null"),
    ({'eos': 256, 'dtype': 'int32'}, {}, 'holds uint16, but'),
    ({'eos': 256, 'tokenizer': 'c0ffee'}, {}, 'a tokenizer with hash c0ffee'),
    ({'eos': 256, 'tokens': 99}, {}, 'damaged: 100 ids, where'),
    ({'eos': 300}, {}, '300 is not among the first 100 ids. Set data.eos to'),
    ([], {}, 'holds no JSON object'),
  ],
)
def test_what_contradicts_an_array_is_refused_by_name(
  tmp_path, about, changes, message
):
  path = _array(tmp_path, about)
  with pytest.raises(ValueError, match=re.escape(message)) as error:
    _batch(path, **changes)
  assert 'a.npy' in str(error.value)
  assert '\n' not in str(error.value)


def test_arrays_made_by_bytes_are_not_read_as_a_tokenizers(tmp_path):
  path = _array(tmp_path, {'eos': 256, 'tokenizer': 'bytes'})
  chosen = Wanted(AS_STATED, 'x/tokenizer.json', 9, 'abc')
  with pytest.raises(Contradiction, match=r'with bytes, .* and not with'):
    open_array(path, chosen)


def test_without_any_end_documents_are_cut_by_length(tmp_path):
  path = _array(tmp_path, ids=np.arange(100, dtype=np.uint16))
  batch = _batch(path, eos=NONE, max_document=20)
  assert batch['segments'][0].max() == 1
  assert batch['positions'][1].tolist() == [*range(3), *range(13)]


def test_an_end_in_a_later_file_is_enough(tmp_path, monkeypatch):
  np.save(tmp_path / 'a.npy', np.ones(50, np.uint16))
  np.save(tmp_path / 'b.npy', IDS)
  assert _batch(f'{tmp_path}/*.npy', eos=256)
  monkeypatch.setattr(token_sources, '_SEARCHED', 50)
  with pytest.raises(ValueError, match='256 is not among the first 50 ids'):
    _batch(f'{tmp_path}/*.npy', eos=256)
