"""A mesh changes where arrays lie, and nothing else.

Loss, every gradient and the probes on eight devices, against one device, for
meshes times gates; decoding with a sharded cache; what is refused, and why.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from gated_jax import sharding
from gated_jax.config import DataConfig
from gated_jax.config import DeltaConfig
from gated_jax.config import GateConfig
from gated_jax.config import LoraConfig
from gated_jax.config import MeshConfig
from gated_jax.config import ModelConfig
from gated_jax.config import MoEConfig
from gated_jax.config import OptimizerConfig
from gated_jax.config import RopeConfig
from gated_jax.config import RunConfig
from gated_jax.model import adapters
from gated_jax.model import gate as gate_module
from gated_jax.model.cache import init_cache
from gated_jax.model.decoder import Decoder
from gated_jax.ops.attention import api
from gated_jax.ops.attention import context
from gated_jax.training.build import make_functions
from gated_jax.training.rows import rows_of_process
from tests.quick import QUICK

BATCH, LENGTH = 8, 32
MODEL = ModelConfig(
  vocab=64,
  length=LENGTH,
  depth=1,
  width=32,
  heads=8,
  kv_heads=2,
  head_dim=4,
  mlp_width=32,
  qk_norm=False,  # it takes away the scale that headwise gates give to keys
  dtype='float32',
  scan=False,
)
EXPERTS = {
  'pattern': ('attention+moe',),
  'moe': MoEConfig(experts=8, top_k=2, width=16),
}

GATES = {
  f'{position}_{granularity}': GateConfig(
    position=position, granularity=granularity, init_std=0.5
  )
  for position in ('query', 'key', 'value', 'sdpa_output', 'dense_output')
  for granularity in ('elementwise', 'headwise')
  if (position, granularity) != ('dense_output', 'headwise')
}
BEST = 'sdpa_output_elementwise'

MESHES = {
  'data': MeshConfig(data=8),
  'fsdp': MeshConfig(fsdp=8),
  'tensor': MeshConfig(tensor=2, data=4),
  'tensor_wider_than_kv_heads': MeshConfig(tensor=8),
  'expert': MeshConfig(expert=8),
  'context': MeshConfig(context=8),
  'context_with_data': MeshConfig(context=4, data=2),
  'data_fsdp_tensor': MeshConfig(data=2, fsdp=2, tensor=2),
  'fsdp_context_tensor': MeshConfig(fsdp=2, context=2, tensor=2),
  'fsdp_expert_tensor': MeshConfig(fsdp=2, expert=2, tensor=2),
  'expert_context_tensor': MeshConfig(expert=2, context=2, tensor=2),
}
# It splits all that a gate is made of: heads, kv heads, positions.
HARD = ('fsdp_context_tensor',)
EVERY_RUN = [
  *itertools.product(HARD, GATES),
  *((mesh, BEST) for mesh in MESHES if mesh not in HARD),
]
ALL = list(itertools.product(MESHES, GATES))


def tolerance(terms=BATCH * LENGTH):
  """Of the largest entry: two orders of one float32 sum of so many terms.

  Each is off by at most terms * 2^-24 of the sum of their sizes.
  """
  return 2 * terms * 2.0**-24


def model_config(mesh, gate):
  experts = EXPERTS if 'expert' in mesh else {}
  return dataclasses.replace(MODEL, gate=GATES[gate], **experts)


def shapes_of(config):
  tokens = jnp.zeros((1, LENGTH), jnp.int32)
  model = Decoder(config)
  return jax.eval_shape(model.init, jax.random.key(0), tokens)['params']


def filled(shapes, seed=0):
  """Large enough that nothing is nearly linear; no compilation."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: rng.normal(0.0, 0.3, x.shape).astype(np.float32),
    meta.unbox(shapes),
  )


def packed(config):
  """Rows of several documents, whose borders differ, and some padding."""
  rng = np.random.default_rng(1)
  tokens, targets = rng.integers(0, config.vocab, (2, BATCH, LENGTH))
  segments = np.zeros((BATCH, LENGTH), np.int32)
  positions = np.zeros((BATCH, LENGTH), np.int32)
  for row in range(BATCH):
    used = LENGTH - row % 4
    cuts = np.sort(rng.choice(np.arange(1, used), row % 4, replace=False))
    for i, (begin, end) in enumerate(
      itertools.pairwise([0, *cuts.tolist(), used])
    ):
      segments[row, begin:end] = i + 1
      positions[row, begin:end] = np.arange(end - begin)
  weights = rng.uniform(0.5, 2.0, segments.shape) * (segments > 0)
  return {
    'tokens': tokens.astype(np.int32),
    'targets': targets.astype(np.int32),
    'segments': segments,
    'positions': positions,
    'weights': weights.astype(np.float32),
  }


def measure(config, mesh=None):
  """Loss with its metrics, probes and gradients, as one tree of NumPy.

  The gradients are of all parameters, or of adapters where there are some.
  """
  model, boxed, batch = Decoder(config), shapes_of(config), packed(config)
  params = filled(boxed)
  adapted = bool(config.lora.rank)
  part_of = adapters.alone if adapted else lambda params: params

  def loss(trained, params, batch):
    found, probes = model.apply(
      {'params': adapters.put(params, trained) if adapted else trained},
      batch,
      method='loss',
      deterministic=True,
      mutable=['probes'],
    )
    return found.total, (found, probes)

  run = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)
  if mesh is None:
    (_, found), gradients = run(part_of(params), params, batch)
  else:
    with sharding.activate(sharding.make_mesh(mesh)) as made:
      params = jax.device_put(params, sharding.shardings(made, boxed))
      batch = jax.device_put(batch, sharding.batch_sharding(made))
      (_, found), gradients = run(part_of(params), params, batch)
  return jax.device_get({'found': found, 'gradients': gradients})


@functools.cache
def one_device(config):
  return measure(config)


def assert_same(found, expected):
  names = [
    jax.tree_util.keystr(path)
    for path, _ in jax.tree_util.tree_leaves_with_path(expected)
  ]
  pairs = zip(
    names, jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
  )
  for name, a, b in pairs:
    assert a.shape == b.shape, name
    assert np.any(b) or 'gradients' not in name, f'{name} shows nothing'
    if np.issubdtype(b.dtype, np.integer):
      # A count: one score may lie within rounding of a histogram's edge.
      assert np.max(np.abs(a - b)) <= 1, name
    else:
      off = np.max(np.abs(a - b)) / np.max(np.abs(b), initial=1e-30)
      assert off <= tolerance(), f'{name} is off by {off:.1e} of its largest'


@pytest.mark.parametrize(
  ('mesh', 'gate'),
  [pytest.param(*pair, marks=pytest.mark.long) for pair in EVERY_RUN],
)
def test_a_mesh_computes_what_one_device_computes(mesh, gate):
  config = model_config(mesh, gate)
  assert_same(measure(config, MESHES[mesh]), one_device(config))


@pytest.mark.nightly
@pytest.mark.parametrize(
  ('mesh', 'gate'), [pair for pair in ALL if pair not in EVERY_RUN]
)
def test_every_other_pair_of_mesh_and_gate(mesh, gate):
  config = model_config(mesh, gate)
  assert_same(measure(config, MESHES[mesh]), one_device(config))


@pytest.mark.long
@pytest.mark.parametrize('mesh', ['context', 'fsdp_context_tensor'])
def test_keys_that_a_chunk_must_not_see_belong_to_no_document(
  mesh, monkeypatch
):
  config = model_config(mesh, BEST)
  expected = one_device(config)
  xla = dataclasses.replace(api.BACKENDS['xla'], skips_hidden=True)
  monkeypatch.setitem(api.BACKENDS, 'xla', xla)
  monkeypatch.setattr(context, '_squares', None)
  assert_same(measure(config, MESHES[mesh]), expected)


@pytest.mark.long
@pytest.mark.parametrize('mesh', ['fsdp', 'context_with_data', 'tensor'])
def test_a_product_for_keys_and_a_narrow_gate(mesh, monkeypatch):
  config = model_config(mesh, 'sdpa_output_headwise')
  expected = one_device(config)  # each by itself
  monkeypatch.setattr(gate_module, 'on_tpu', lambda implementation: True)
  assert_same(measure(config, MESHES[mesh]), expected)


# What released models have beside the gate, all at once.
RELEASED = dataclasses.replace(
  MODEL,
  depth=2,
  lead=('attention:nope+mlp:limit=1.5',),
  pattern=(
    'attention:window=6,heads=16,rope_scaling=none,rope_base=100'
    '+moe:limit=1.5,shared_limit=1.0',
  ),
  rope=RopeConfig(scaling='llama3', factor=4.0, original_length=16),
  gate=GateConfig(
    granularity='headwise', activation='softplus', bias=True, init_std=0.5
  ),
  moe=MoEConfig(
    experts=8,
    top_k=2,
    width=16,
    shared_width=16,
    score='sigmoid',
    softcap=2.0,
    bias=True,
    scale=1.7,
  ),
  norm='sandwich',
  norm_zero_centered=True,
  final_norm_plain=True,
  post_norm_eps=1e-3,
  qk_norm=True,
  qk_norm_scale=False,
  query_scale=2.0,
  qkv_bias=True,
  out_bias=True,
  embed_norm=True,
  output_scale=0.5,
  logit_softcap=3.0,
  z_loss=1e-2,
  tie_embeddings=False,
)


@pytest.mark.long
def test_settings_of_released_models_are_the_same_on_a_mesh():
  one = dataclasses.replace(RELEASED, depth=1, lead=())
  mesh = MESHES['fsdp_expert_tensor']
  assert_same(measure(one, mesh), one_device(one))


@pytest.mark.nightly
@pytest.mark.parametrize('mesh', MESHES)
def test_and_so_they_are_on_every_mesh(mesh):
  assert_same(measure(RELEASED, MESHES[mesh]), one_device(RELEASED))


# A memory, attention and both kinds of experts, whose every matrix has an adapter.
ADAPTED = dataclasses.replace(
  MODEL,
  depth=2,
  lead=('gated_deltanet',),
  pattern=('attention+moe',),
  delta=DeltaConfig(key_heads=2, value_heads=8, key_dim=4, value_dim=4),
  moe=MoEConfig(
    experts=8, top_k=2, width=16, shared_width=16, shared_gate=True
  ),
  lora=LoraConfig(rank=3, alpha=6.0),
  tie_embeddings=False,
)


@pytest.mark.nightly
@pytest.mark.parametrize('mesh', MESHES)
def test_adapters_have_the_same_gradients_on_a_mesh(mesh):
  config = ADAPTED
  if 'context' in mesh:  # which a memory cannot be carried across
    config = dataclasses.replace(ADAPTED, lead=('attention',))
  assert_same(measure(config, MESHES[mesh]), one_device(config))


@pytest.mark.long
@pytest.mark.parametrize(
  ('kind', 'mesh'),
  [
    ('sink_logit', 'fsdp_context_tensor'),
    ('key_bias', 'tensor_wider_than_kv_heads'),
  ],
)
def test_a_logit_without_a_value_is_the_same_on_a_mesh(kind, mesh):
  config = dataclasses.replace(MODEL, depth=1, gate=GateConfig(kind=kind))
  assert_same(measure(config, MESHES[mesh]), one_device(config))


@pytest.mark.long
def test_scanned_layers_with_recomputation_and_qk_norm():
  config = dataclasses.replace(
    model_config('', BEST),
    depth=2,
    scan=True,
    qk_norm=True,
    remat='minimal',
    norm='sandwich',
    z_loss=1e-2,
    tie_embeddings=False,
  )
  mesh = MESHES['fsdp_context_tensor']
  assert_same(measure(config, mesh), one_device(config))


@pytest.mark.long
@pytest.mark.parametrize(
  'mesh', ['tensor_wider_than_kv_heads', 'data_fsdp_tensor']
)
def test_decoding_with_a_sharded_cache(mesh):
  config = model_config('', BEST)
  model, boxed = Decoder(config), shapes_of(config)
  tokens = packed(config)['tokens'][:, :6]

  def decode(params, tokens):
    """Four tokens at once, then two one by one."""
    cache, logits = init_cache(config, BATCH, LENGTH), []
    for begin, end in ((0, 4), (4, 5), (5, 6)):
      found, cache = model.apply(
        {'params': params}, tokens[:, begin:end], cache=cache
      )
      logits.append(found)
    return jnp.concatenate(logits, axis=1), cache

  run = jax.jit(decode, compiler_options=QUICK)
  expected = jax.device_get(run(filled(boxed), tokens))
  with sharding.activate(sharding.make_mesh(MESHES[mesh])) as made:
    params = jax.device_put(filled(boxed), sharding.shardings(made, boxed))
    rows = jax.sharding.NamedSharding(
      made, jax.sharding.PartitionSpec(sharding.mesh_axes('batch') or None)
    )
    found = run(params, jax.device_put(tokens, rows))
    # One of two kv heads for each device of the tensor axis, where it is as
    # wide as they are many; rows over data and fsdp.
    parts = {'tensor_wider_than_kv_heads': 1, 'data_fsdp_tensor': 8}[mesh]
    for x in jax.tree.leaves(found[1].layers):
      assert x.sharding.shard_shape(x.shape) == (
        {1: BATCH, 8: BATCH // 4}[parts],
        {1: 2, 8: 1}[parts],
        LENGTH,
        config.head_dim,
      )
  assert_same(jax.device_get(found), expected)


def run_config(mesh, **model):
  return RunConfig(
    model=dataclasses.replace(MODEL, scan=True, depth=2, **model),
    data=DataConfig(batch=BATCH, length=LENGTH),
    mesh=mesh,
  )


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
@pytest.mark.parametrize(
  'model',
  [
    {'gate': GATES[BEST], 'qk_norm': True},
    {'gate': GATES['key_headwise'], 'tie_embeddings': False},
    {'gate': GATES['dense_output_elementwise'], **EXPERTS},
  ],
)
def test_nothing_large_is_on_every_device(model, optimizer):
  """Parameters and moments of a state as it is after init."""
  config = dataclasses.replace(
    run_config(MESHES['fsdp'], **model),
    optimizer=OptimizerConfig(name=optimizer),
  )
  mesh = sharding.make_mesh(config.mesh)
  with sharding.activate(mesh):
    state, _, _ = make_functions(config, Decoder(config.model), mesh)
  split = 0
  for path, x in jax.tree_util.tree_leaves_with_path(state):
    name = jax.tree_util.keystr(path)
    whole = x.sharding.shard_shape(x.shape) == x.shape
    small = x.size <= config.model.depth * config.model.width  # a norm's scale
    assert not whole or small, f'{name} {x.shape} is replicated'
    split += not whole
  parameters = len(jax.tree.leaves(state.params))
  assert split > parameters, 'moments are looked at as well'


def test_init_leaves_an_eighth_on_each_device():
  config = run_config(MESHES['fsdp'])
  mesh = sharding.make_mesh(config.mesh)
  with sharding.activate(mesh):
    _, init, _ = make_functions(config, Decoder(config.model), mesh)
    state = init(jax.random.key(0))
  for path, x in jax.tree_util.tree_leaves_with_path(state):
    name = jax.tree_util.keystr(path)
    if x.size > config.model.depth * config.model.width:
      for shard in x.addressable_shards:
        assert shard.data.size * 8 == x.size, name


@pytest.mark.parametrize(
  ('mesh', 'message'),
  [
    (MeshConfig(fsdp=3), 'fsdp 3 x expert 1 .* makes 3, and there are 8 devic'),
    (MeshConfig(tensor=3), '3 does not divide 8 devices, so mesh.fsdp cannot'),
    (MeshConfig(slices=3, data=8, fsdp=1), 'mesh.data=8 must be a .*slices=3'),
  ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(mesh, message):
  with pytest.raises(ValueError, match=message):
    sharding.make_mesh(mesh)


@pytest.mark.parametrize(
  ('mesh', 'batch', 'length', 'message'),
  [
    (
      'data_fsdp_tensor',
      (6, 1),
      32,
      'data.batch=6 must be a multiple of 4: mesh data 2 x fsdp 2$',
    ),
    (
      'data_fsdp_tensor',
      (12, 2),
      32,
      'data.batch=12 must be a multiple of 8: .*, optimizer.accumulate 2',
    ),
    (
      'context',
      (3, 1),
      40,
      'data.length=40 must be a multiple of 16: mesh context 8, two chunks',
    ),
  ],
)
def test_rows_that_cannot_be_split_are_refused(mesh, batch, length, message):
  made = sharding.make_mesh(MESHES[mesh])
  with pytest.raises(ValueError, match=message):
    sharding.check_batch(made, batch[0], length, batch[1])
  sharding.check_batch(made, 16, 32)


@pytest.mark.parametrize(
  ('mesh', 'model', 'message'),
  [
    (
      'expert',
      EXPERTS | {'moe': MoEConfig(experts=6, top_k=2)},
      'moe/.*: experts has 6 entries, which mesh axes expert 8 do not',
    ),
    (
      'tensor',
      {'heads': 3, 'kv_heads': 1},
      'attention/.*: heads has 3 entries, which mesh axes tensor 2',
    ),
    (
      'tensor_wider_than_kv_heads',
      {'heads': 24, 'kv_heads': 3},
      'kv_heads has 3 entries, which mesh axes tensor 8',
    ),
  ],
)
def test_a_model_that_cannot_be_split_is_refused(mesh, model, message):
  boxed = shapes_of(dataclasses.replace(MODEL, **model))
  with pytest.raises(ValueError, match=message) as error:
    sharding.shardings(sharding.make_mesh(MESHES[mesh]), boxed)
  assert '\n' not in str(error.value)


def test_one_mesh_axis_cannot_split_two_axes_of_an_array():
  with pytest.raises(
    ValueError, match=r'mesh axis tensor of size 2 would spli'
  ):
    sharding.spec_of({'tensor': 2}, ('heads', 'mlp'), (4, 4), 'w')


@dataclasses.dataclass(frozen=True)
class Chip:
  """A device that knows its slice, or its process."""

  id: int
  slice_index: int | None = None
  process_index: int = 0
  platform: str = 'gpu'
  device_kind: str = 'gpu'


@pytest.mark.parametrize('known', [False, True])
@pytest.mark.parametrize(
  ('config', 'axis'),
  [
    (MeshConfig(data=4, fsdp=2, slices=2), 0),
    (MeshConfig(fsdp=4, tensor=2, slices=2, slice_axis='fsdp'), 1),
  ],
)
def test_slices_lie_outermost_on_their_axis(config, axis, known):
  """Going along any other axis never leaves a slice."""
  devices = [Chip(i, i // 4 if known else None, i // 4) for i in range(8)]
  made = sharding.make_mesh(config, devices)
  slices = np.vectorize(lambda chip: chip.id // 4)(made.devices)
  halves = np.split(slices, 2, axis=axis)
  assert [set(half.ravel().tolist()) for half in halves] == [{0}, {1}]


class Rows:
  """A sharding that gives each process these rows, a device for each."""

  def __init__(self, *processes):
    self._processes = processes

  def devices_indices_map(self, shape):
    pairs = [(i, row) for i, rows in enumerate(self._processes) for row in rows]
    return {
      Chip(at, process_index=i): (slice(row, row + 1), slice(0, shape[1]))
      for at, (i, row) in enumerate(pairs)
    }


@pytest.mark.parametrize(
  ('processes', 'expected'),
  [
    # As on a torus, where a process's chips are a square.
    (
      ((0, 1, 4, 5), (2, 3, 6, 7)),
      ((0, 2, (0, 1, 4, 5)), (1, 2, (2, 3, 6, 7))),
    ),
    # Two share their rows (a tensor axis between them).
    (((0, 2), (1, 3), (0, 2), (1, 3)), ((0, 2, (0, 2)), (1, 2, (1, 3))) * 2),
    # Neither alike nor apart: everyone reads everything.
    (((0, 1), (1, 2), (2, 3)), ((0, 1, (0, 1, 2, 3)),) * 3),
  ],
)
def test_a_process_reads_the_rows_that_it_holds(processes, expected):
  batch = 1 + max(max(rows) for rows in processes)
  for process, share in enumerate(expected):
    found = rows_of_process(Rows(*processes), batch, 16, process)
    assert tuple(found) == share
