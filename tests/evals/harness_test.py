"""lm-evaluation-harness, on a task that lies in a local file."""

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


def test_a_long_text_is_cut_into_windows_that_predict_each_token_once(model):
  harness = Harness(*model, ByteTokenizer(), batch=3)
  text = 'a long text, longer than what the model was built to read at once. '
  (nats,) = harness.loglikelihood_rolling([request('rolling', text)])
  ids, expected, done = np.array([256, *text.encode()]), 0.0, 1
  while done < len(ids):
    end = min(len(ids), 33 if done == 1 else done + 16)
    p, _ = log_probabilities(model, ids[max(0, end - 33) : end])
    expected += p[done - end :].sum()
    done = end
  assert nats == pytest.approx(expected, rel=1e-5)


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
