"""Text survives the way to ids and back, whole and token by token."""

import builtins
import functools
import io
import json
import pathlib
import tempfile

import numpy as np
import pytest
import tokenizers
from hypothesis import HealthCheck
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from tokenizers import decoders
from tokenizers import models
from tokenizers import pre_tokenizers
from tokenizers import trainers

from gated_jax.data.tokenizer import ByteTokenizer
from gated_jax.data.tokenizer import document
from gated_jax.data.tokenizer import make_tokenizer

TRAINED = 'Attention sinks: naïve, 漢字, 🙂 and\n\ttabs. ' * 3
# The last characters are in no vocabulary, so they are made of bytes.
TEXT = TRAINED + 'ßþ🙃語 end'


def _hugging_face(folder, special=('<s>', '<|endoftext|>'), config=None):
  tokenizer = tokenizers.Tokenizer(models.BPE())
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


def _sentence_piece(folder, **options):
  import sentencepiece

  options = {'remove_extra_whitespaces': False} | options
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter([TRAINED] * 20),
    model_writer=model,
    vocab_size=320,
    model_type='bpe',
    byte_fallback=True,
    normalization_rule_name='identity',
    minloglevel=2,
    **options,
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


@pytest.mark.parametrize('ends', [(-1, -1), (7, -1), (-1, 8), (7, 8), (9, 9)])
def test_many_documents_at_once_are_each_of_them_between_its_ends(
  tokenizer, ends
):
  texts = ['', 'abc', TEXT, '', 'x', '\n', '']
  expected = [
    [*ends[:1], *tokenizer.encode(text).tolist(), *ends[1:]] if text else []
    for text in texts
  ]
  expected = [[i for i in ids if i >= 0] for ids in expected]
  ids, lengths, counts = tokenizer.encode_batch(texts, ends)
  assert lengths.tolist() == [len(ids) for ids in expected]
  assert ids.tolist() == [i for ids in expected for i in ids]
  assert ids.dtype == np.int32 and counts is None
  for nothing in ([], ['']):
    ids, lengths, _ = tokenizer.encode_batch(nothing, ends)
    assert not len(ids) and lengths.tolist() == [0] * len(nothing)


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


# Pieces that mean something to one decoder or another: spaces of each kind,
# words' ends and middles, the bytes of characters whole and in parts.
PIECES = [
  *('\u2581a', 'b', '\u2581', '\u2581\u2581', ' c', ' ', '##d', 'e</w>'),
  *('<0xE2>', '<0x82>', '<0xAC>', '<0xC3>', '<0xA9>', '.', "n't", '\u0120x'),
  *('\u00e2', '\u0124', '\u00ac', '\u00c3', '\u00a9f', '\ufffd', '|', '<pad>'),
]
LLAMA = [
  ('Replace', {'pattern': '\u2581', 'content': ' '}),
  ('ByteFallback', {}),
  ('Fuse', {}),
  ('Strip', {'content': ' ', 'left': 1, 'right': 0}),
]
DECODERS = {
  'none': [],
  'byte_level': [('ByteLevel', {})],
  'byte_level_strip': [('ByteLevel', {}), LLAMA[3]],
  'llama': LLAMA,
  'gemma': LLAMA[:3],
  'strip_more': [*LLAMA[:3], ('Strip', {'content': ' ', 'left': 3})],
  'metaspace': [('Metaspace', {})],
  'metaspace_never': [('Metaspace', {'prepend_scheme': 'never'})],
  'word_piece': [('WordPiece', {})],
  'word_piece_uncleaned': [('WordPiece', {'cleanup': False})],
  'bpe': [('BPEDecoder', {'suffix': '</w>'})],
  'ctc': [('CTC', {})],
  'replace_late': [('Fuse', {}), LLAMA[0]],
  'replace_across': [
    ('Fuse', {}),
    ('Replace', {'pattern': 'b.', 'content': ''}),
  ],
}


@functools.cache
def _with_decoder(name):
  parts = [getattr(decoders, kind)(**kw) for kind, kw in DECODERS[name]]
  vocab = {piece: i for i, piece in enumerate([*PIECES, '<s>', '<unk>'])}
  tokenizer = tokenizers.Tokenizer(models.WordLevel(vocab, '<unk>'))
  if parts:
    tokenizer.decoder = (
      parts[0] if len(parts) == 1 else decoders.Sequence(parts)
    )
  tokenizer.add_special_tokens(['<s>'])
  with tempfile.TemporaryDirectory() as folder:
    tokenizer.save(f'{folder}/tokenizer.json')
    return make_tokenizer(folder)


@functools.cache
def _pieces_with(**options):
  with tempfile.TemporaryDirectory() as folder:
    return make_tokenizer(_sentence_piece(pathlib.Path(folder), **options))


STREAMED = {
  **{name: functools.partial(_with_decoder, name) for name in DECODERS},
  'bytes': ByteTokenizer,
  'sentence_piece': _pieces_with,
  'sentence_piece_tidy': functools.partial(
    _pieces_with, remove_extra_whitespaces=True
  ),
  'sentence_piece_bare': functools.partial(
    _pieces_with, add_dummy_prefix=False
  ),
}


def test_half_a_surrogate_before_a_stream_is_not_shown_again():
  tokenizer = ByteTokenizer()
  for ids, rest in ([], ''), ([0x41], 'A'), ([0x80, 0x41], '\ufffdA'):
    stream = tokenizer.stream([0xED, 0xA0])
    assert ''.join(stream.feed(i) for i in ids) + stream.finish() == rest


@pytest.mark.parametrize('make', STREAMED.values(), ids=STREAMED)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_stream_gives_what_decoding_at_once_does(make, data):
  tokenizer = make()
  # Bytes make up most of some vocabularies; ids without a token are in reach.
  known = st.integers(-1, tokenizer.vocab + 1)
  ids = data.draw(st.lists(known, max_size=12))
  before = data.draw(st.lists(known, max_size=6))
  whole, shown = tokenizer.decode(before + ids), tokenizer.decode(before)
  stream = tokenizer.stream(before)
  streamed = ''.join(stream.feed(i) for i in ids) + stream.finish()
  while not whole.startswith(shown):  # half a character, for example
    shown = shown[:-1]
  assert streamed == whole[len(shown) :]


def test_a_stream_keeps_the_space_after_a_prompt_and_does_not_wait():
  tokenizer = _with_decoder('llama')
  a, b, half = (PIECES.index(x) for x in ('\u2581a', 'b', '<0xE2>'))
  stream = tokenizer.stream([a])
  assert [stream.feed(i) for i in (a, b, half, a)] == [
    ' a',
    'b',
    '',
    '\ufffd a',
  ]


# What files say (None: no file), and the ids of (bos, eos, start) that follow;
# the vocabulary has <s> 0, <|endoftext|> 1 and <|im_end|> 2.
ENDS = [
  (None, (0, 1, 0)),
  ({}, (-1, 1, 0)),
  ({'bos_token': '<s>'}, (-1, 1, 0)),
  ({'bos_token': '<s>', 'add_bos_token': True}, (0, 1, 0)),
  ({'bos_token': '<s>', 'add_bos_token': False}, (-1, 1, 0)),
  ({'bos_token': None, 'eos_token': {'content': '<|im_end|>'}}, (-1, 2, 2)),
  ({'bos_token': None, 'add_bos_token': None, 'eos_token': None}, (-1, -1, -1)),
]


@pytest.mark.parametrize(('config', 'ends'), ENDS)
def test_what_stands_before_a_text_is_what_its_authors_say(
  tmp_path, config, ends
):
  path = _hugging_face(tmp_path, ('<s>', '<|endoftext|>', '<|im_end|>'), config)
  tokenizer = make_tokenizer(path)
  assert (tokenizer.bos, tokenizer.eos, tokenizer.start) == ends
  expected = [i for i in (ends[0], *tokenizer.encode('ab'), ends[1]) if i >= 0]
  assert document(tokenizer, 'ab').tolist() == expected


def test_a_template_that_puts_a_token_first_is_followed(tmp_path):
  from tokenizers import processors

  path = _hugging_face(tmp_path, config={'bos_token': '<s>'})
  inner = tokenizers.Tokenizer.from_file(path)
  inner.post_processor = processors.TemplateProcessing(
    single='<s> $A', special_tokens=[('<s>', 0)]
  )
  inner.save(path)
  assert make_tokenizer(path).bos == 0


@pytest.mark.parametrize(
  ('config', 'ends'),
  [
    (None, (1, 2, 1)),
    ({'bos_token': '<s>', 'add_bos_token': False}, (-1, 2, 1)),
    ({'bos_token': None}, (-1, 2, 1)),
    ({'bos_token': '<s>'}, (1, 2, 1)),
  ],
)
def test_a_sentence_piece_model_follows_the_config_beside_it(
  tmp_path, config, ends
):
  path = _sentence_piece(tmp_path)
  if config is not None:
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(config))
  tokenizer = make_tokenizer(path)
  assert (tokenizer.bos, tokenizer.eos, tokenizer.start) == ends


@pytest.mark.parametrize(
  ('config', 'message'),
  [
    ('{', 'is not JSON'),
    ('[]', 'holds no object'),
    ('{"add_bos_token": 1}', 'add_bos_token=1 must be true or false'),
    ('{"add_bos_token": true, "bos_token": null}', 'and no bos_token'),
  ],
)
def test_a_config_that_makes_no_sense_is_refused_by_name(
  tmp_path, config, message
):
  path = _hugging_face(tmp_path)
  (tmp_path / 'tokenizer_config.json').write_text(config)
  with pytest.raises(ValueError, match=f'tokenizer_config.json.*{message}'):
    make_tokenizer(path)


def _matching_specials(folder):
  """A tokenizer whose special token is an ordinary piece of its model too."""
  pieces = ['<unk>', '</s>', '<', '/', 's', '>', 'a', 'b', '\u2581']
  scored = [(piece, -2.0 * len(piece) ** 0.5) for piece in pieces]
  tokenizer = tokenizers.Tokenizer(models.Unigram(scored, 0, False))
  tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
  tokenizer.decoder = decoders.Metaspace()
  tokenizer.add_special_tokens(['</s>', '<unk>'])
  tokenizer.save(str(folder / 'tokenizer.json'))
  return str(folder / 'tokenizer.json')


@pytest.mark.parametrize('make', [_hugging_face, _matching_specials])
@settings(
  max_examples=30,
  deadline=None,
  suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(text=st.lists(st.sampled_from(['a', '</s>', '<', 'b ', '<s>', '\0'])))
def test_no_document_spells_a_special_token(tmp_path, make, text):
  tokenizer = make_tokenizer(make(tmp_path))
  text = ''.join(text)
  ids = tokenizer.encode(text)
  unknown = tokenizer._tokenizer.token_to_id('<unk>')
  assert not tokenizer._special.intersection(ids) - {unknown}
  # A spelling that had to be cut may have a space at the cut.
  back = tokenizer.decode(ids).replace('< /s>', '</s>')
  assert back == text or unknown in ids


def test_a_switch_lets_text_spell_special_tokens(tmp_path):
  path = _hugging_face(tmp_path)
  text = 'a<|endoftext|>b'
  apart, read = make_tokenizer(path), make_tokenizer(path, special_tokens=True)
  assert read.eos in read.encode(text) and apart.eos not in apart.encode(text)
  assert apart.special_in(text) == ['<|endoftext|>']
  assert apart.special_in('ab') == []
  with pytest.raises(ValueError, match="does nothing with tokenizer 'bytes'"):
    make_tokenizer('bytes', special_tokens=True)


def test_gaps_of_a_vocabulary_are_known(tmp_path):
  tokenizer = tokenizers.Tokenizer(models.WordLevel({'a': 0, 'b': 3}, 'a'))
  tokenizer.save(str(tmp_path / 'tokenizer.json'))
  known = make_tokenizer(str(tmp_path)).known()
  assert known.tolist() == [True, False, False, True]
  assert ByteTokenizer().known().all()


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
