"""Text survives the way to ids and back, whole and token by token."""

import builtins
import io
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from gated_jax.data.tokenizer import ByteTokenizer
from gated_jax.data.tokenizer import document
from gated_jax.data.tokenizer import make_tokenizer

TRAINED = 'Attention sinks: naïve, 漢字, 🙂 and\n\ttabs. ' * 3
# The last characters are in no vocabulary, so they are made of bytes.
TEXT = TRAINED + 'ßþ🙃語 end'


def _hugging_face(folder, special=('<s>', '<|endoftext|>'), config=None):
  from tokenizers import Tokenizer
  from tokenizers import decoders
  from tokenizers import models
  from tokenizers import pre_tokenizers
  from tokenizers import trainers

  tokenizer = Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=300,
    special_tokens=list(special),
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  tokenizer.train_from_iterator([TRAINED], trainer)
  tokenizer.save(str(folder / 'tokenizer.json'))
  if config is not None:
    (folder / 'tokenizer_config.json').write_text(json.dumps(config))
  return str(folder / 'tokenizer.json')


def _sentence_piece(folder):
  import sentencepiece

  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter([TRAINED] * 20),
    model_writer=model,
    vocab_size=320,
    model_type='bpe',
    byte_fallback=True,
    remove_extra_whitespaces=False,
    normalization_rule_name='identity',
    minloglevel=2,
  )
  path = folder / 'small.model'
  path.write_bytes(model.getvalue())
  return str(path)


MAKERS = {
  'bytes': lambda folder: 'bytes',
  'hugging_face': _hugging_face,
  'sentence_piece': _sentence_piece,
}


@pytest.fixture(scope='module', params=MAKERS)
def tokenizer(request, tmp_path_factory):
  folder = tmp_path_factory.mktemp(request.param)
  return make_tokenizer(MAKERS[request.param](folder))


def test_text_comes_back_and_ids_lie_below_vocab(tokenizer):
  ids = tokenizer.encode(TEXT)
  assert ids.dtype == np.int32
  assert 0 <= ids.min() <= ids.max() < tokenizer.vocab
  assert tokenizer.decode(ids) == TEXT


def test_the_ends_of_a_document_are_no_text(tokenizer):
  ids = document(tokenizer, 'abc')
  assert ids[0] == tokenizer.bos >= 0
  assert ids[-1] == tokenizer.eos >= 0
  assert tokenizer.decode(ids) == 'abc'
  assert tokenizer.byte_lengths()[tokenizer.eos] == 0


def test_a_stream_never_prints_half_a_character(tokenizer):
  stream = tokenizer.stream()
  parts = [stream.feed(int(i)) for i in document(tokenizer, TEXT)]
  assert '\ufffd' not in ''.join(parts)
  assert ''.join(parts) + stream.finish() == TEXT
  # It does not wait for the end either.
  assert sum(map(bool, parts)) > len(parts) // 2


def test_byte_lengths_add_up_to_the_text(tokenizer):
  lengths = tokenizer.byte_lengths()
  assert lengths.shape == (tokenizer.vocab,)
  ids = document(tokenizer, TEXT)
  # SentencePiece puts a space before the text.
  added = tokenizer.name.endswith('.model')
  assert lengths[ids].sum() == len(TEXT.encode()) + added


def test_bytes_are_their_own_ids_and_256_is_the_end():
  tokenizer = make_tokenizer('bytes')
  assert tokenizer.vocab == 257
  assert document(tokenizer, 'é').tolist() == [256, 0xC3, 0xA9, 256]


@settings(max_examples=50, deadline=None)
@given(st.text(), st.lists(st.integers(-5, 300)))
def test_bytes_take_any_text_and_any_ids(text, ids):
  tokenizer = ByteTokenizer()
  assert tokenizer.decode(tokenizer.encode(text)) == text
  stream = tokenizer.stream()
  streamed = ''.join(stream.feed(i) for i in ids) + stream.finish()
  assert streamed == tokenizer.decode(ids)


def test_half_a_character_at_the_end_is_replaced():
  stream = ByteTokenizer().stream()
  assert stream.feed(0xC3) == ''
  assert stream.finish() == '\ufffd'


def test_the_config_beside_a_tokenizer_says_which_tokens_are_the_ends(tmp_path):
  path = _hugging_face(
    tmp_path,
    special=('<|im_end|>', '<|endoftext|>'),
    config={'bos_token': None, 'eos_token': {'content': '<|im_end|>'}},
  )
  tokenizer = make_tokenizer(path)
  assert tokenizer.bos == tokenizer.eos == 0


def test_without_an_end_token_text_stands_alone(tmp_path):
  tokenizer = make_tokenizer(_hugging_face(tmp_path, special=()))
  assert (tokenizer.bos, tokenizer.eos) == (-1, -1)
  ids = document(tokenizer, 'abc')
  np.testing.assert_array_equal(ids, tokenizer.encode('abc'))


@pytest.mark.parametrize('name', ['byte', '/no/such/tokenizer.json', ''])
def test_an_unknown_tokenizer_is_refused_by_name(name):
  with pytest.raises(ValueError, match=f'{name!r} is neither'):
    make_tokenizer(name)


@pytest.mark.parametrize('name', ['a.json', 'a.model', 'a.txt'])
@pytest.mark.parametrize('content', [b'', b'{}', b'\xff\x00garbage'])
def test_a_file_that_is_no_tokenizer_is_refused_by_name(
  tmp_path, name, content
):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(ValueError, match=name):
    make_tokenizer(str(tmp_path / name))


@pytest.mark.parametrize(
  ('name', 'package'), [('a.json', 'tokenizers'), ('a.model', 'sentencepiece')]
)
def test_a_missing_package_names_the_extra(
  tmp_path, monkeypatch, name, package
):
  real = builtins.__import__

  def without(wanted, *args, **kwargs):
    if wanted == package:
      raise ImportError(wanted)
    return real(wanted, *args, **kwargs)

  (tmp_path / name).write_bytes(b'x')
  monkeypatch.setattr(builtins, '__import__', without)
  with pytest.raises(ImportError, match=r'pip install gated_jax\[hf\]'):
    make_tokenizer(str(tmp_path / name))
