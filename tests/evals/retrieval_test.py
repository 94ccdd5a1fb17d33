"""The pass key task: what is asked, and what counts as found."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from gated_jax import cli
from gated_jax import paths
from gated_jax.config import ModelConfig
from gated_jax.evals import retrieval
from gated_jax.model.decoder import Decoder


def encode(text):
  return list(text.encode())


def text(tokens):
  return bytes(tokens.tolist()).decode()


class Copier(nn.Module):
  """Goes on as the text did the first time it read the last eight tokens.

  In rows chosen by `wrong` the last token is another one.
  """

  wrong: tuple[int, ...] = ()

  def __call__(self, tokens):
    length = tokens.shape[1]
    same = tokens[:, :, None] == tokens[:, None, :]
    same = jnp.pad(same, ((0, 0), (7, 0), (7, 0)))
    runs = [same[:, i : i + length, i : i + length] for i in range(8)]
    first = jnp.argmax(jnp.all(jnp.stack(runs), axis=0), axis=-1)
    following = jnp.take_along_axis(jnp.roll(tokens, -1, axis=1), first, axis=1)
    if self.wrong:
      following = following.at[jnp.array(self.wrong), -1].add(1)
    return jax.nn.one_hot(following, 256) * 50


def test_a_row_hides_its_number_once_and_asks_for_it_at_the_end():
  texts = retrieval.hide(encode, 400, 0.5, 3, np.random.default_rng(0))
  assert texts.tokens.shape == (3, 401)
  keys = set()
  for tokens, count in zip(*texts, strict=True):
    whole, answer = text(tokens), text(tokens[-count:])
    assert len(answer) == 6
    assert answer.startswith(' ')
    assert whole.endswith('The pass key is' + answer)
    assert whole.count(answer) == 2
    assert 120 < whole.index(f'The pass key is{answer}. Remember it.') < 280
    keys.add(answer)
  assert len(keys) == 3


@pytest.mark.parametrize('depth, low, high', [(0.0, 0, 0), (1.0, 800, 960)])
def test_depth_places_the_needle(depth, low, high):
  texts = retrieval.hide(encode, 1000, depth, 1, np.random.default_rng(0))
  place = text(texts.tokens[0]).index('Remember') - len(
    'The pass key is 12345. '
  )
  assert low <= place <= high


def test_a_row_counts_only_when_its_whole_answer_is_right():
  results = [
    retrieval.recall(
      Copier(wrong), {}, encode, lengths=(128, 200), depths=(0.0, 1.0), rows=4
    )
    for wrong in ((), (1,), (0, 1, 2, 3))
  ]
  for found, accuracy in zip(results, (1.0, 0.75, 0.0), strict=True):
    np.testing.assert_array_equal(found.accuracy, np.full((2, 2), accuracy))
  assert results[0].nats.max() < 1e-3 < results[1].nats.min()
  assert results[1].scalars() == {
    'retrieval/128': 0.75,
    'retrieval/200': 0.75,
  }


def test_only_the_tokens_of_an_answer_count_where_answers_differ_in_length():
  def pairs(words):
    """Two even digits in a row are one token."""
    found = re.findall(r'[02468]{2}|.', words)
    return [int(x) + 128 if len(x) == 2 else ord(x) for x in found]

  class Flat(nn.Module):
    def __call__(self, tokens):
      return jnp.zeros((*tokens.shape, 256))

  texts = retrieval.hide(pairs, 200, 0.5, 8, np.random.default_rng(0))
  assert len(set(texts.answers.tolist())) > 1
  found = retrieval.recall(Flat(), {}, pairs, (200,), (0.5,))
  np.testing.assert_allclose(found.nats, np.log(256), rtol=1e-6)
  found = retrieval.recall(Copier(), {}, pairs, (200,), (0.5,))
  assert found.accuracy == 1


@pytest.mark.long
def test_a_decoder_of_zeros_finds_every_token_equally_likely():
  config = ModelConfig(
    vocab=128,
    length=128,
    depth=1,
    width=16,
    heads=2,
    kv_heads=1,
    head_dim=8,
    mlp_width=16,
    dtype='float32',
    attention='xla',
  )
  model = Decoder(config)
  tokens = jnp.zeros((1, 8), jnp.int32)
  shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), tokens))
  params = jax.tree.map(lambda x: jnp.zeros(x.shape), shapes['params'])
  found = retrieval.recall(model, params, encode, (100,), (0.5,), rows=2)
  assert found.accuracy == 0
  np.testing.assert_allclose(found.nats, np.log(128), rtol=1e-6)


def test_a_length_without_room_is_refused_with_what_it_takes():
  with pytest.raises(ValueError, match=r'length=40 .* take 78 tokens'):
    retrieval.hide(encode, 40, 0.5, 1, np.random.default_rng(0))


def test_several_keys_stand_in_the_text_and_one_is_asked_for():
  form = retrieval.Form('keys', start=(7,))
  texts = retrieval.hide(encode, 700, 0.0, 4, np.random.default_rng(0), form)
  for tokens, count in zip(*texts, strict=True):
    assert tokens[0] == 7
    whole = text(tokens[1:])
    keys = dict(re.findall(r'The (\w+) key is (\d{5})\. ', whole))
    assert len(keys) == 4
    asked = re.search(r'What is the (\w+) key\? The \1 key is (\d+)$', whole)
    assert asked[2] == keys[asked[1]]
    assert text(tokens[-count:]) == f' {asked[2]}'
    # The one that is asked for stands where the depth says.
    assert whole.index(f'The {asked[1]} key') < 100


def test_a_variable_leads_to_its_number_through_two_others():
  form = retrieval.Form('variables')
  texts = retrieval.hide(encode, 700, 0.5, 6, np.random.default_rng(0), form)
  for tokens in texts.tokens:
    whole = text(tokens)
    values, links = {}, 0
    for name, value in re.findall(r'Let (\w) be (\w+)\. ', whole):
      # A name is known before another one is given its number.
      values[name] = values.get(value, value)
      links += value in values
    assert (len(values), links) == (6, 4)
    asked = re.search(r'What is (\w)\? The number \1 is (\d+)$', whole)
    assert values[asked[1]] == asked[2]


@pytest.mark.parametrize('place', ['tmp_path', 'bucket'])
def test_texts_to_train_on_hold_every_task_with_its_answer(
  place, request, capsys
):
  path = paths.expand(request.getfixturevalue(place)) / 'new/texts.jsonl'
  retrieval.main(
    [f'--out={path}', '--documents=9', '--least=300', '--most=500']
  )
  assert capsys.readouterr().out.strip() == str(path)
  lines = [json.loads(x)['text'] for x in paths.read_bytes(path).splitlines()]
  assert len(lines) == 9
  assert all(300 < len(x) < 510 and x.endswith('.\n') for x in lines)
  for question in ('the pass key', r'the \w+ key', r'\w'):
    pattern = rf'What is {question}\? .* is \d{{5}}\.\n$'
    assert sum(bool(re.search(pattern, x)) for x in lines) >= 3
  arguments = [f'--out={path}', '--least=600', '--most=500']
  assert cli.run(lambda: retrieval.main(arguments)) == cli.REFUSED
  assert '--least=600 between 1 and --most=500' in capsys.readouterr().err
