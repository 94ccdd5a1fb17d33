"""lm-evaluation-harness, on a task that lies in a local file."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from gated_jax import sharding
from gated_jax.config import MeshConfig
from gated_jax.config import ModelConfig
from gated_jax.data.tokenizer import ByteTokenizer
from gated_jax.model.decoder import Decoder

lm_eval = pytest.importorskip(
  'lm_eval', reason="pip install -e '.[eval]' to run lm-evaluation-harness"
)

from lm_eval.api.instance import Instance  # noqa: E402

from gated_jax.evals.harness import Harness  # noqa: E402

CONFIG = ModelConfig(
  vocab=264,  # bytes, rounded up for a mesh
  length=32,
  depth=1,
  width=16,
  heads=4,
  kv_heads=2,
  head_dim=8,
  mlp_width=16,
  dtype='float32',
  init_std=0.3,
)
CHOICES = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: '{file}'}}}}
test_split: test
output_type: multiple_choice
doc_to_text: '{{{{question}}}}'
doc_to_target: '{{{{answer}}}}'
doc_to_choice: '{{{{choices}}}}'
metric_list: [{{metric: acc}}]
"""
PERPLEXITY = """
task: local_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: '{file}'}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ''
doc_to_target: '{{{{question}}}}'
metric_list: [{{metric: bits_per_byte}}]
"""


@pytest.fixture(scope='module')
def model():
  decoder = Decoder(CONFIG)
  tokens = jnp.zeros((1, 1), jnp.int32)
  init = jax.jit(decoder.init)  # op by op takes many times as long
  return decoder, meta.unbox(init(jax.random.key(0), tokens)['params'])


@functools.cache
def compiled(decoder):
  return jax.jit(decoder.apply)


def log_probabilities(model, ids):
  """Of every token after the first, from all before it; no window."""
  decoder, params = model
  # What follows a token changes nothing before it: one shape for all.
  row = np.zeros((1, 40), np.int32)
  row[0, : len(ids)] = ids
  logits = compiled(decoder)({'params': params}, row)[0, : len(ids)]
  logits = np.asarray(logits, np.float64)
  p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  return p[np.arange(len(ids) - 1), ids[1:]], p.argmax(-1)[:-1] == ids[1:]


def request(kind, *args):
  return Instance(kind, {}, args, 0)


def test_a_continuation_is_scored_given_its_context(model):
  harness = Harness(*model, ByteTokenizer(), batch=2)
  pairs = [('abc', 'de'), ('abcd ', ' e'), ('', 'word'), ('a', 'b' * 9)]
  found = harness.loglikelihood([request('loglikelihood', *p) for p in pairs])
  for (context, answer), (nats, greedy) in zip(pairs, found, strict=True):
    ids = np.array([256, *(context + answer).encode()])
    p, same = log_probabilities(model, ids)
    # A space before the answer is scored with it.
    count = len(context + answer) - len(context.rstrip())
    assert nats == pytest.approx(p[-count:].sum(), rel=1e-5)
    assert greedy == same[-count:].all()


class Words:
  """A tokenizer that joins letters as far as its few words go."""

  name, vocab, bos, eos, start = 'words', 261, -1, 256, 256
  words = ('hello', 'hel', 'lo')

  def encode(self, text):
    ids = []
    while text:
      word = next((w for w in self.words if text.startswith(w)), text[0])
      known = word in self.words
      ids.append(257 + self.words.index(word) if known else ord(word))
      text = text[len(word) :]
    return np.array(ids, np.int32)


@pytest.mark.parametrize(
  ('pair', 'message'),
  [
    (('hel', 'lo'), "answer 'lo' after 'hel' has no token of its own"),
    (('', ''), "the answer after '' is empty"),
    (('abc', ''), "the answer after 'abc' is empty"),
    (('  ', 'lo'), "context '  ' before 'lo' has no token"),
    (('a', 'b' * 40), 'has 40 tokens, and the model is built for 32'),
  ],
)
def test_an_answer_without_tokens_does_not_win(model, pair, message):
  harness = Harness(*model, Words())
  ask = [request('loglikelihood', 'a', 'b'), request('loglikelihood', *pair)]
  with pytest.raises(ValueError, match=message):
    harness.loglikelihood(ask)


def test_answers_are_split_off_where_the_context_ends(model):
  harness = Harness(*model, Words())
  found = harness.loglikelihood([request('loglikelihood', 'hel', 'loab')])
  p, same = log_probabilities(model, np.array([258, ord('a'), ord('b')]))
  assert found[0] == (pytest.approx(p.sum(), rel=1e-5), same.all())


def test_a_long_context_loses_its_beginning(model, caplog):
  harness = Harness(*model, Words(), batch=3)
  context, answer = 'the beginning of it ' * 3, 'and an end'
  (found,) = harness.loglikelihood([request('loglikelihood', context, answer)])
  assert '1 of 1 contexts are longer' in caplog.text
  ids = Words().encode(context + answer)[-33:]
  p, _ = log_probabilities(model, ids)
  assert found[0] == pytest.approx(p[-len(answer) - 1 :].sum(), rel=1e-5)


def test_a_mesh_gives_the_same_scores(model):
  decoder, params = model
  pairs = [request('loglikelihood', 'ab', c * 5) for c in 'xyzuvw']
  alone = Harness(*model, ByteTokenizer(), batch=4).loglikelihood(pairs)
  mesh = sharding.make_mesh(MeshConfig(fsdp=4, tensor=2))
  tokens = jnp.zeros((1, 1), jnp.int32)
  boxed = jax.eval_shape(decoder.init, jax.random.key(0), tokens)['params']
  placed = jax.device_put(params, sharding.shardings(mesh, boxed))
  split = Harness(decoder, placed, ByteTokenizer(), mesh, batch=4)
  np.testing.assert_allclose(split.loglikelihood(pairs), alone, rtol=1e-4)


def test_generation_is_refused_or_ends_at_a_stop(model):
  asked = [request('generate_until', 'ab', {'until': ['x'], 'max_gen_toks': 4})]
  with pytest.raises(NotImplementedError, match='generates text'):
    Harness(*model, ByteTokenizer()).generate_until(asked)
  harness = Harness(
    *model, ByteTokenizer(), generate=lambda texts, count, until: ['yes x no']
  )
  assert harness.generate_until(asked) == ['yes ']


def test_tasks_of_a_local_file_run(model, tmp_path, monkeypatch):
  monkeypatch.setenv('HF_DATASETS_OFFLINE', '1')
  monkeypatch.setenv('HF_DATASETS_CACHE', str(tmp_path / 'cache'))
  documents = [
    {'question': 'ab', 'choices': ['cd', 'ef', 'gh'], 'answer': i % 3}
    for i in range(5)
  ]
  file = tmp_path / 'documents.jsonl'
  file.write_text('\n'.join(map(json.dumps, documents)))
  for name, text in (('choices', CHOICES), ('text', PERPLEXITY)):
    (tmp_path / f'{name}.yaml').write_text(text.format(file=file))
  from lm_eval.tasks import TaskManager

  tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
  harness = Harness(*model, ByteTokenizer())
  results = lm_eval.simple_evaluate(
    model=harness,
    tasks=['local_choice', 'local_text'],
    task_manager=tasks,
    bootstrap_iters=0,
  )['results']
  found = harness.loglikelihood(
    [request('loglikelihood', 'ab', f' {c}') for c in ('cd', 'ef', 'gh')]
  )
  best = int(np.argmax([nats for nats, _ in found]))
  right = np.mean([d['answer'] == best for d in documents])
  assert results['local_choice']['acc,none'] == pytest.approx(right)
  (nats,) = harness.loglikelihood_rolling([request('rolling', 'ab')])
  bits = results['local_text']['bits_per_byte,none']
  assert bits == pytest.approx(-nats / np.log(2) / 2, rel=1e-5)


def _corpus_tokenizer(folder):
  """A byte-level BPE that puts nothing before a text."""
  from tokenizers import Tokenizer
  from tokenizers import decoders
  from tokenizers import models
  from tokenizers import pre_tokenizers
  from tokenizers import trainers

  inner = Tokenizer(models.BPE())
  inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  inner.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=300,
    special_tokens=['<|endoftext|>'],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  inner.train_from_iterator(['hello there, hello world of text. ' * 9], trainer)
  inner.save(str(folder / 'tokenizer.json'))
  config = {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'bos_token': None,
    'eos_token': '<|endoftext|>',
  }
  (folder / 'tokenizer_config.json').write_text(json.dumps(config))


PAIRS = [
  ('hello th', 'ere, hello'),
  ('hello ', 'world'),
  ('hello', ' world of'),
  ('', 'hello'),
  ('text ' * 30, 'of text'),
  ('an answer', ' as long as it is, and longer than its context'),
  ('naïve ', '漢字'),
]
TEXTS = ['hello world', 'a', 'hello there, hello world of text. ' * 12]


@pytest.mark.parametrize('kind', ['bytes', 'pieces'])
def test_scores_are_those_of_the_harness_s_own_adapter(
  kind, tmp_path, monkeypatch
):
  monkeypatch.setenv('HF_HUB_OFFLINE', '1')
  pytest.importorskip('torch', reason='the adapter runs on it')
  from lm_eval.models.huggingface import HFLM

  from gated_jax.data.tokenizer import make_tokenizer
  from gated_jax.hf import convert
  from gated_jax.hf import tokenizer as tokenizers

  config = dataclasses.replace(
    CONFIG,
    vocab=304,
    length=64,
    depth=2,
    init_std=0.5,
    norm_zero_centered=True,  # so that transformers has a class with the gate
  )
  shapes = convert.flatten(convert.abstract_parameters(config))
  rng = np.random.default_rng(0)
  params = convert.unflatten(
    {
      path: rng.normal(size=leaf.shape).astype(np.float32) * 0.5
      for path, leaf in shapes.items()
    }
  )
  folder = tmp_path / 'model'
  convert.save(folder, params, config)
  if kind == 'bytes':
    tokenizers.write_bytes(folder, config.length)
  else:
    _corpus_tokenizer(folder)
  theirs = HFLM(
    pretrained=str(folder), device='cpu', dtype='float32', batch_size=2
  )
  assert theirs.max_length == config.length
  ours = Harness(Decoder(config), params, make_tokenizer(str(folder)), batch=3)
  pairs = [request('loglikelihood', *pair) for pair in PAIRS]
  for a, b in zip(
    ours.loglikelihood(pairs),
    theirs.loglikelihood(pairs, disable_tqdm=True),
    strict=True,
  ):
    assert a == (pytest.approx(b[0], abs=1e-4, rel=1e-6), b[1])
  texts = [request('loglikelihood_rolling', text) for text in TEXTS]
  np.testing.assert_allclose(
    ours.loglikelihood_rolling(texts),
    theirs.loglikelihood_rolling(texts, disable_tqdm=True),
    rtol=1e-6,
    atol=1e-4,
  )
  joined = [request('loglikelihood', 'hello th', 'ere')]
  if kind == 'pieces':
    with pytest.raises(AssertionError):
      theirs.loglikelihood(joined, disable_tqdm=True)
    with pytest.raises(ValueError, match='has no token of its own'):
      ours.loglikelihood(joined)
