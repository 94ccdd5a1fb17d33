"""Counts by hand, by abstract evaluation, and of the program's products."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from flax.core import meta
from jax.interpreters.partial_eval import dce_jaxpr

from gated_jax.config import DataConfig
from gated_jax.config import GateConfig
from gated_jax.config import LoraConfig
from gated_jax.config import ModelConfig
from gated_jax.config import MoEConfig
from gated_jax.config import OptimizerConfig
from gated_jax.config import RunConfig
from gated_jax.model.abstract import boxed_parameters
from gated_jax.model.accounting import flops_per_token
from gated_jax.model.accounting import parameters
from gated_jax.model.decoder import Decoder
from gated_jax.training.parts import step_flops
from gated_jax.training.parts import trained_part
from gated_jax.training.step import model_loss

UNGATED = GateConfig(position='none')
DENSE28 = ModelConfig(vocab=152_064, gate=UNGATED)
DENSE48 = dataclasses.replace(DENSE28, depth=48, width=1536, mlp_width=4608)
MOE = ModelConfig(
  vocab=152_064,
  depth=24,
  heads=32,
  kv_heads=4,
  tie_embeddings=False,
  gate=UNGATED,
  pattern=('attention+moe',),
)
TINY = ModelConfig(
  vocab=40,
  length=16,
  depth=2,
  width=24,
  heads=4,
  kv_heads=2,
  head_dim=6,
  mlp_width=20,
  dtype='float32',
  attention='xla',
)


def test_the_papers_dense_models_by_hand():
  assert parameters(DENSE28) == {
    'embed': 311_427_072,  # 152,064 * 2,048
    # 28 * (2 * 2,048 * 2,048 + 2 * 2,048 * 1,024)
    'attention': 352_321_536,
    'mlp': 1_056_964_608,  # 28 * 3 * 2,048 * 6,144
    'norms': 123_904,  # 28 * (2 * 2,048 + 2 * 128) + 2,048
    'total': 1_720_837_120,
    'active': 1_720_837_120,
  }
  assert parameters(DENSE48)['total'] == 1_705_932_288


def test_the_papers_mixture_by_hand():
  assert parameters(MOE) == {
    'embed': 311_427_072,
    'unembed': 311_427_072,
    # 24 * (2 * 2,048 * 4,096 + 2 * 2,048 * 512)
    'attention': 452_984_832,
    'router': 6_291_456,  # 24 * 2,048 * 128
    'experts': 14_495_514_624,  # 24 * 128 * 3 * 2,048 * 768
    'norms': 106_496,  # 24 * (2 * 2,048 + 2 * 128) + 2,048
    'total': 15_577_751_552,
    # 24 * 8 * 3 * 2,048 * 768 = 905,969,664 of the experts
    'active': 1_988_206_592,
  }


# What the paper's tables add to its models, and what follows from them.
ADDED = [
  (MOE, {'position': 'sdpa_output'}, 201_326_592),
  (MOE, {'position': 'query'}, 201_326_592),
  (MOE, {'position': 'value'}, 25_165_824),
  (MOE, {'position': 'key'}, 25_165_824),
  (MOE, {'position': 'dense_output'}, 100_663_296),
  (MOE, {'position': 'sdpa_output', 'granularity': 'headwise'}, 1_572_864),
  (MOE, {'position': 'value', 'granularity': 'headwise'}, 196_608),
  (MOE, {'position': 'sdpa_output', 'shared': True}, 201_326_592),
  (MOE, {'position': 'value', 'shared': True}, 25_165_824),
  (MOE, {'position': 'sdpa_output', 'source': 'parameter'}, 24 * 32 * 128),
  (MOE, {'position': 'sdpa_output', 'kind': 'rms_norm'}, 24 * 128),
  (MOE, {'position': 'sdpa_output', 'kind': 'silu'}, 0),
  (MOE, {'position': 'sdpa_output', 'channels': 12}, 24 * 12 * 32 * 128),
  (DENSE28, {'position': 'sdpa_output'}, 117_440_512),
  (DENSE28, {'position': 'sdpa_output', 'granularity': 'headwise'}, 917_504),
  (DENSE48, {'position': 'sdpa_output'}, 150_994_944),
  (DENSE48, {'position': 'sdpa_output', 'granularity': 'headwise'}, 1_179_648),
]


@pytest.mark.parametrize(('model', 'gate', 'added'), ADDED)
def test_gates_add_what_the_paper_says(model, gate, added):
  gated = dataclasses.replace(model, gate=GateConfig(**gate))
  before, after = parameters(model), parameters(gated)
  assert after['total'] - before['total'] == added
  assert after['active'] - before['active'] == added


MODELS = {
  'dense28': dataclasses.replace(DENSE28, gate=GateConfig()),
  'moe': dataclasses.replace(MOE, gate=GateConfig()),
  'untied': dataclasses.replace(TINY, tie_embeddings=False),
  'sandwich': dataclasses.replace(TINY, norm='sandwich', qk_norm=False),
  'not_scanned': dataclasses.replace(TINY, scan=False),
  'windows': dataclasses.replace(
    TINY, pattern=('attention:window=4', 'attention')
  ),
  'shared_expert': dataclasses.replace(
    TINY,
    pattern=('attention+moe',),
    moe=MoEConfig(
      experts=4, top_k=2, width=8, shared_width=10, implementation='ragged_dot'
    ),
  ),
  'reduced_experts': dataclasses.replace(
    TINY,
    norm='sandwich',
    mixer_post_scale='none',
    ffn_post_scale='before',
    residual='gated',
    pattern=('attention', 'attention+moe'),
    moe=MoEConfig(
      experts=4,
      top_k=2,
      width=8,
      reduced_width=12,
      output_norm=True,
      implementation='ragged_dot',
    ),
  ),
  **{
    '-'.join(f'{k}={v}' for k, v in gate.items()): dataclasses.replace(
      TINY, gate=GateConfig(**gate)
    )
    for model, gate, _ in ADDED
    if model is MOE
  },
  'dense-parameter': dataclasses.replace(
    TINY, gate=GateConfig(position='dense_output', source='parameter')
  ),
  'headwise-parameter': dataclasses.replace(
    TINY,
    gate=GateConfig(
      position='value', source='parameter', granularity='headwise'
    ),
  ),
}


def by_path(config: ModelConfig) -> dict[str, int]:
  """Counted by hand from the names of the model's own parameters."""
  tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
  variables = jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens)
  params = meta.unbox(variables['params'])
  words = (
    'norm',
    'shares',
    'gate/',
    'router',
    'moe',
    'mlp',
    'attention',
    'unembed',
  )
  names = {
    'moe': 'experts',
    'norm': 'norms',
    'shares': 'norms',
    'gate/': 'gate',
  }
  counts: dict[str, int] = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    path = jax.tree_util.keystr(path, simple=True, separator='/')
    word = next((word for word in words if word in path), 'embed')
    name = names.get(word, word)
    counts[name] = counts.get(name, 0) + math.prod(leaf.shape)
  return {**counts, 'total': sum(counts.values())}


@pytest.mark.parametrize('name', MODELS)
def test_parts_are_those_that_the_parameters_names_say(name):
  found = parameters(MODELS[name])
  del found['active']
  assert by_path(MODELS[name]) == found


def test_flops_of_the_dense_model_by_hand():
  gated = dataclasses.replace(DENSE28, gate=GateConfig())
  assert flops_per_token(gated, 4096) == {
    'attention_projections': 6 * 352_321_536,
    'gate': 6 * 117_440_512,
    'mlp': 6 * 1_056_964_608,
    'logits': 6 * 311_427_072,
    # 28 layers, 16 heads of 128, scores and values, 4,097 / 2 keys
    'attention': 6 * 28 * 16 * 128 * 2 * 2048.5,
  }


def test_flops_count_chosen_experts_and_no_scores_that_are_parameters():
  gate = GateConfig(source='parameter')
  found = flops_per_token(dataclasses.replace(MOE, gate=gate), 4096)
  assert found['experts'] == 6 * 905_969_664
  assert found['router'] == 6 * 6_291_456
  assert 'gate' not in found
  assert 'mlp' not in found


@pytest.mark.parametrize('windows', [(0,), (1,), (3,), (16,), (99,), (3, 0)])
def test_attention_flops_are_those_of_the_keys_seen(windows):
  words = tuple(f'attention:window={window}' for window in windows)
  config = dataclasses.replace(TINY, pattern=words)
  pairs = sum(
    1
    for layer in range(config.depth)
    for query in range(16)
    for key in range(query + 1)
    if query - key < (windows[layer % len(windows)] or 16)
  )
  # A score and its part in the sum over values: a head of 6 each.
  forward = pairs * 4 * 2 * 2 * 6
  found = flops_per_token(config, 16)['attention']
  assert found * 16 == pytest.approx(3 * forward)


def dots(jaxpr) -> float:
  """FLOPs of all matrix products of a traced function, loops unrolled."""
  total = 0.0
  for equation in jaxpr.eqns:
    name, values = equation.primitive.name, equation.params
    lhs, *_ = (
      (v.aval.shape for v in equation.invars) if equation.invars else [()]
    )
    if name == 'dot_general':
      (contracted, _), _ = values['dimension_numbers']
      inner = math.prod(lhs[axis] for axis in contracted)
      total += 2 * inner * math.prod(equation.outvars[0].aval.shape)
    elif name == 'ragged_dot_general':
      total += 2 * math.prod(lhs) * equation.outvars[0].aval.shape[-1]
    elif name == 'cond':  # one branch runs
      total += max(dots(branch.jaxpr) for branch in values['branches'])
      continue
    times = values.get('length', 1) if name == 'scan' else 1
    for value in jax.tree.leaves(
      list(values.values()), is_leaf=lambda x: hasattr(x, 'eqns')
    ):
      inner = getattr(value, 'jaxpr', value)
      if hasattr(inner, 'eqns'):
        total += times * dots(inner)
  return total


def needed(config: ModelConfig, length: int, trained=None) -> float:
  """Of a token, where attention multiplies masked keys as well."""
  words = tuple(word.partition(':window')[0] for word in config.pattern)
  config = dataclasses.replace(config, pattern=words)
  parts = flops_per_token(config, length, trained)
  masked = 2 * length / (length + 1)
  return sum({**parts, 'attention': masked * parts['attention']}.values())


def batch(length: int) -> dict[str, jax.ShapeDtypeStruct]:
  names = ('tokens', 'targets', 'segments', 'positions')
  ids = jax.ShapeDtypeStruct((2, length), jnp.int32)
  weights = jax.ShapeDtypeStruct((2, length), jnp.float32)
  return {**dict.fromkeys(names, ids), 'weights': weights}


@pytest.mark.parametrize(
  'name',
  [
    'not_scanned',
    'windows',
    'untied',
    'shared_expert',
    'reduced_experts',
    'position=dense_output',
    'position=value-granularity=headwise',
    'position=sdpa_output-channels=12',
    'position=sdpa_output-source=parameter',
  ],
)
def test_flops_are_those_of_the_products_in_the_model(name):
  model = Decoder(MODELS[name])
  inputs = batch(16)

  def loss(params, inputs):
    return model.apply(
      {'params': params}, inputs, deterministic=True, method='loss'
    ).total

  params = jax.eval_shape(model.init, jax.random.key(0), inputs['tokens'])
  params = params['params']
  forward = jax.make_jaxpr(loss)(params, inputs)
  training = jax.make_jaxpr(jax.grad(loss))(params, inputs)
  expected = 2 * 16 * needed(MODELS[name], 16)
  assert dots(training.jaxpr) == pytest.approx(expected)
  assert dots(forward.jaxpr) == pytest.approx(expected / 3)


def test_flops_are_nearly_all_that_xla_counts():
  config = dataclasses.replace(
    TINY, vocab=2048, width=512, head_dim=128, mlp_width=1024, scan=False
  )
  model, tokens = Decoder(config), batch(16)['tokens']
  params = jax.eval_shape(model.init, jax.random.key(0), tokens)
  # Whatever is here: only the CPU's compiler counts before it compiles.
  with jax.default_device(jax.local_devices(backend='cpu')[0]):
    lowered = jax.jit(model.apply).lower(params, tokens)
  counted = lowered.cost_analysis()['flops']
  expected = 2 * 16 * needed(config, 16) / 3
  # Norms, rotations, activations and the like are the rest.
  assert expected < counted < 1.02 * expected


ADAPTED = dataclasses.replace(
  TINY, scan=False, tie_embeddings=False, lora=LoraConfig(rank=3)
)
GATED_EXPERTS = dataclasses.replace(
  MODELS['shared_expert'], scan=False, attention='xla'
)
REDUCED = dataclasses.replace(MODELS['reduced_experts'], scan=False)
# What trains of which model.
PARTS: dict[str, tuple[ModelConfig, str]] = {
  'all': (MODELS['not_scanned'], 'all'),
  'adapters': (ADAPTED, 'adapters'),
  'adapters of attention': (
    dataclasses.replace(
      ADAPTED, lora=LoraConfig(rank=3, matrices='*/attention')
    ),
    'adapters',
  ),
  'one side of adapters': (ADAPTED, '*_lora_b'),
  'gates': (MODELS['not_scanned'], '*/gate'),
  'gates of values': (
    dataclasses.replace(
      MODELS['not_scanned'], gate=GateConfig(position='value')
    ),
    '*/gate',
  ),
  'a dense gate': (
    dataclasses.replace(
      MODELS['not_scanned'], gate=GateConfig(position='dense_output')
    ),
    '*/gate',
  ),
  'last layer': (ADAPTED, 'layers_1,final_norm,!*_lora_*'),
  'matrices back': (MODELS['not_scanned'], '*/mlp/down,*/attention/out'),
  'norms': (MODELS['sandwich'], 'layers/mlp_post_norm'),
  'last norm': (MODELS['not_scanned'], 'final_norm'),
  'unembed': (ADAPTED, 'unembed'),
  'routers': (GATED_EXPERTS, '*/router'),
  'routers behind a norm': (REDUCED, '*/router'),
  'matrices to fewer channels': (REDUCED, '*/reduce'),
  'norms of inputs': (REDUCED, '*/input_norm'),
  'norms of outputs': (REDUCED, '*/moe/output_norm'),
  'matrices back from fewer': (REDUCED, '*/expand'),
  'experts': (REDUCED, '*/moe/down'),
  'shares': (REDUCED, '*/attention_shares'),
  'shared experts': (GATED_EXPERTS, '*/shared'),
}
# Products of the lowest layer that are counted and that nothing needs: of keys
# where values alone train, of the one kind of experts where the other's do.
NEARLY = {'gates of values': 0.07, 'shared experts': 0.02, 'routers': 0.02}


@pytest.mark.parametrize(
  'name',
  [
    name
    if name in ('adapters', 'gates')
    else pytest.param(name, marks=pytest.mark.long)
    for name in PARTS
  ],
)
def test_backward_counts_what_a_part_of_the_model_needs(name):
  config, train = PARTS[name]
  config = dataclasses.replace(config, scan=False)
  pattern = train.replace('layers/', '*/')
  boxed = boxed_parameters(config)
  part = trained_part(pattern, boxed)
  params, inputs = meta.unbox(boxed), batch(16)

  def loss(trained, params, inputs):
    return model_loss(
      Decoder(config), part.put(trained, params), inputs, jax.random.key(0)
    ).total

  traced = jax.make_jaxpr(jax.grad(loss))(part.of(params), params, inputs)
  # A rule of one's own gives the gradients of all its arguments.
  jaxpr, _ = dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars))
  expected = 2 * 16 * needed(config, 16, part.paths)
  counted = dots(jaxpr)
  assert counted == pytest.approx(expected, rel=NEARLY.get(name, 1e-6))


@pytest.mark.long
@pytest.mark.parametrize(
  ('train', 'rank'), [('all', 0), ('adapters', 8), ('*/gate', 0)]
)
def test_a_step_is_nearly_all_that_xla_compiles(train, rank):
  """Within 3 %: norms, softmax, SwiGLU, clipping and updates are the rest."""
  config = RunConfig(
    model=dataclasses.replace(
      TINY, vocab=1024, length=64, width=512, head_dim=128, mlp_width=1024,
      scan=False, remat='none', lora=LoraConfig(rank=rank),
    ),
    data=DataConfig(source='synthetic', batch=2, length=64),
    optimizer=OptimizerConfig(train=train),
  )  # fmt: skip
  model = Decoder(config.model)
  part = trained_part(train, boxed_parameters(config.model))
  params = meta.unbox(boxed_parameters(config.model))

  def loss(trained, params, inputs):
    whole = part.put(trained, params)
    return model_loss(model, whole, inputs, jax.random.key(0)).total

  with jax.default_device(jax.local_devices(backend='cpu')[0]):
    step = jax.jit(jax.grad(loss)).lower(part.of(params), params, batch(64))
    counted = step.compile().cost_analysis()['flops']
  expected = 2 * 64 * sum(step_flops(config).values())
  masked = needed(config.model, 64, part.paths)
  assert expected < 2 * 64 * masked < counted < 1.03 * 2 * 64 * masked
