"""The paper's claims, each at a size that one GPU trains in minutes.

    python -m gated_jax.data tokenize --out=runs/text \
      --paths='SOURCES/**/*.py,SOURCES/**/*.h' --train-tokenizer=16383
    python -m gated_jax.evals.sweep configs/evidence.py:sinks --devices=4
    python -m gated_jax.evals.report runs/evidence --out=runs/report

Words after the colon: a claim, an arm, then what the claim varies. `sinks` and
`variants` take ARM,SEED and `stability` takes ARM,RATE,SEED; the sweep fills in
what is left out, so that `sinks` is all of that claim's runs and
`sinks,headwise` are its three seeds. `small` at the end is the same in a size
for a CPU.

    sinks           12 layers: attention on the first token, activations, loss
    longer          the same with 32 rows, rate 1.5e-3 and decay 0.5: more of it
    sinks_qk        the same with QK-norm at two larger rates, decay 0.1
    variants        shorter: the losses of every arm of Tables 1 and 3, and of
                    three that are not in the paper: exclusive self-attention,
                    a logit without a value for each head, a learnable key
    stability       16 layers, no clipping: loss against learning rate
    stability_arms  the same with headwise gates and sandwich norm
    stability_qk    the same with QK-norm, at larger rates
    context         rows of 512, rotary base 10,000, both arms with QK-norm; a
                    twentieth of the text is retrieval
    continued       goes on with `context` in rows of 2048, base 1,000,000;
                    `gated_jax.evals.context` then reads further, with YaRN
    ungated         6,000 steps without a gate, which the next two go on from
    gates_first     500 steps in which only a gate that was added trains
    add_gate        2,000 steps with a gate added in several ways, and without

`context` and `continued` read texts of the retrieval tasks too;
docs/experiments.md has the commands that make them, all results, and the
hardware. A run that goes on from another looks for it in runs/evidence.

Under these settings a small model without a gate grows sinks
(docs/experiments.md says what was tried): documents are joined, every row
begins with one token that text never has, there is no QK-norm, batches are
small and the learning rate is constant to near the end. A gate that is a whole
matrix is paid for by a narrower MLP: parameters are 48,509,440 without a gate
and with every such one, 48,546,304 headwise, 0.1% more at most.

One H200 trains 0.9M tokens/s of `sinks` (190 to 220 s a run); compiling takes
up to a minute, which a second run on the same GPU hides (--devices=2 with
CUDA_VISIBLE_DEVICES=0,0 and XLA_PYTHON_CLIENT_MEM_FRACTION=0.4). Expected of
`sinks` (690M characters of Python and C++, seeds 0 to 2, means over layers 2 to
11):

                     held-out loss    first token    largest activation
    baseline         1.420 to 1.443   0.047 to 0.065   338 to 484
    headwise         1.394 to 1.409   0.017 to 0.021    85 to 107
    elementwise      1.370 to 1.387   0.012 to 0.014    82 to 114
    baseline_qk      1.399            0.093            862
    elementwise_qk   1.366            0.012            140

and of `longer` (1.05 GB of such text and its documentation, seeds 0 to 2, 8
minutes a run):

    baseline         1.433 to 1.513   0.118 to 0.125   233 to 468
    elementwise      1.403 to 1.466   0.013 to 0.018    33 to 56
    baseline_qk      1.421 to 1.478   0.236 to 0.358   594 to 898
    elementwise_qk   1.397 to 1.447   0.027 to 0.035    91 to 105
"""

from typing import Any
from typing import NamedTuple

from configs import base
from configs import gate_sweep


class Arm(NamedTuple):
  """One model of a comparison.

  Attributes:
    row: Its row in `gate_sweep.py`, which says how it is gated and what the
      paper measured; '': the paper has none.
    channels: What its gate costs, in channels of the MLP.
    change: Further settings.
  """

  row: str
  channels: int = 0
  change: dict[str, Any] = {}  # noqa: RUF012 (never written to)


class Claim(NamedTuple):
  """One comparison.

  Attributes:
    arms: Name of each arm to the number of its seeds.
    rates: Learning rates of each arm; one alone is not part of the words.
    steps: How many.
    depth: Layers.
    length: Tokens of a row.
    tokens: Of a step.
    decay: Weight decay.
  """

  arms: dict[str, int]
  rates: tuple[str, ...]
  steps: int = 11_000
  depth: int = 12
  length: int = 1024
  tokens: int = 16_384
  # Sinks form earlier at a larger decay (arXiv 2410.10781).
  decay: float = 0.3


_QK_NORM = {'model.qk_norm': True}

_ADDED = {'model.gate.activation': 'two_sigmoid', 'model.gate.init': 'zeros'}

# A gate with a score for each of 6 heads of 128 channels has width * 768
# parameters in a layer, as many as 256 channels of the MLP; one on the 3 heads
# of the values has half of that.
ARMS = {
  'baseline': Arm('baseline'),
  'elementwise': Arm('sdpa_elementwise', 256),
  'headwise': Arm('sdpa_headwise'),
  'value': Arm('value_elementwise', 128),
  'shared': Arm('sdpa_shared', 256),
  'parameter': Arm('sdpa_parameter'),
  'ns_sigmoid': Arm('sdpa_ns_sigmoid', 256),
  'key': Arm('key_elementwise', 128),
  'query': Arm('query_elementwise', 256),
  # 170.7 channels: 0.1% more parameters than without a gate.
  'dense_output': Arm('dense_output', 168),
  'value_headwise': Arm('value_headwise'),
  'value_shared': Arm('value_shared', 128),
  'additive_silu': Arm('sdpa_additive_silu', 256),
  'silu': Arm('sdpa_silu', 256),
  'rms_norm': Arm('sdpa_rms_norm'),
  'silu_no_scores': Arm('sdpa_silu_no_scores'),
  'additive_identity': Arm('sdpa_additive_identity', 256),
  'exclusive': Arm('', 0, {'model.gate.kind': 'exclusive'}),
  'sink_logit': Arm('', 0, {'model.gate.kind': 'sink_logit'}),
  'key_bias': Arm('', 0, {'model.gate.kind': 'key_bias'}),
  'baseline_qk': Arm('baseline', 0, _QK_NORM),
  'elementwise_qk': Arm('sdpa_elementwise', 256, _QK_NORM),
  'headwise_qk': Arm('sdpa_headwise', 0, _QK_NORM),
  'sandwich': Arm('baseline', 0, {'model.norm': 'sandwich'}),
  'sandwich_qk': Arm('baseline', 0, {'model.norm': 'sandwich'} | _QK_NORM),
  # Gates that a trained model gets. All but the last are exactly 1 at first.
  'added': Arm('', 0, _ADDED),
  'added_10': Arm('', 0, _ADDED | {'optimizer.gate_learning_rate': 10.0}),
  'added_100': Arm('', 0, _ADDED | {'optimizer.gate_learning_rate': 100.0}),
  'added_10_free': Arm(
    '',
    0,
    _ADDED
    | {
      'optimizer.gate_learning_rate': 10.0,
      'optimizer.gate_weight_decay': 0.0,
    },
  ),
  'added_headwise_10': Arm(
    '',
    0,
    _ADDED
    | {
      'optimizer.gate_learning_rate': 10.0,
      'model.gate.granularity': 'headwise',
    },
  ),
  'added_first': Arm('', 0, _ADDED),
  'added_bias': Arm(
    '',
    0,
    {
      'model.gate.init': 'zeros',
      'model.gate.bias': True,
      'model.gate.bias_init': 4.0,
    },
  ),
}

# Arms that answer other questions than Tables 1 and 3.
_SPECIAL = (
  'baseline_qk',
  'elementwise_qk',
  'headwise_qk',
  'sandwich',
  'sandwich_qk',
)
_IS_ADDED = tuple(name for name in ARMS if name.startswith('added'))
_PAIR = {'baseline_qk': 2, 'elementwise_qk': 2}

CLAIMS = {
  'sinks': Claim(
    {
      'baseline': 3,
      'elementwise': 3,
      'headwise': 3,
      'value': 1,
      'shared': 1,
      'parameter': 1,
      'ns_sigmoid': 1,
      'baseline_qk': 1,
      'elementwise_qk': 1,
    },
    ('1e-3',),
  ),
  'variants': Claim(
    dict.fromkeys(
      [name for name in ARMS if name not in (*_SPECIAL, *_IS_ADDED)], 2
    ),
    ('1e-3',),
    steps=2000,
  ),
  'stability': Claim(
    dict.fromkeys(('baseline', 'elementwise'), 1),
    ('1e-3', '1.5e-3', '2e-3', '3e-3', '6e-3', '1.2e-2'),
    steps=1500,
    depth=16,
    decay=0.1,
  ),
  'stability_arms': Claim(
    dict.fromkeys(('baseline', 'elementwise', 'headwise', 'sandwich'), 1),
    ('1e-3', '1.5e-3', '2e-3', '3e-3', '6e-3', '1.2e-2'),
    steps=1500,
    depth=16,
    decay=0.1,
  ),
  'stability_qk': Claim(
    dict.fromkeys(
      ('baseline_qk', 'elementwise_qk', 'headwise_qk', 'sandwich_qk'), 1
    ),
    ('3e-3', '6e-3', '1.2e-2', '2.4e-2', '4.8e-2', '9.6e-2'),
    steps=1500,
    depth=16,
    decay=0.1,
  ),
  'context': Claim(_PAIR, ('1e-3',), steps=3000, length=512),
  'longer': Claim(
    dict.fromkeys(('baseline', 'elementwise', *_PAIR), 3),
    ('1.5e-3',),
    steps=13_000,
    tokens=32_768,
    decay=0.5,
  ),
  'sinks_qk': Claim(dict.fromkeys(_PAIR, 1), ('2e-3', '4e-3'), decay=0.1),
  'ungated': Claim({'baseline': 3}, ('1e-3',), steps=6000),
  'gates_first': Claim({'added_first': 3}, ('1e-3',), steps=500),
  'add_gate': Claim(
    dict.fromkeys(('baseline', *_IS_ADDED), 3), ('1e-3',), steps=2000
  ),
  # At the rate at which `context` ends.
  'continued': Claim(_PAIR, ('1.5e-4',), steps=1000, length=2048),
}


def runs(words: str = '') -> list[str]:
  """The words of every run that the given words stand for."""
  given, small = _split(words)
  found = []
  for name, claim in CLAIMS.items():
    for rate in claim.rates:
      words_of_rate = [rate] if len(claim.rates) > 1 else []
      for seed in range(max(claim.arms.values())):
        for arm, seeds in claim.arms.items():
          run = [name, arm, *words_of_rate, str(seed)]
          if seed < seeds and run[: len(given)] == given:
            found.append(','.join([*run, *small]))
  if not found:
    raise ValueError(f'{words!r} {_usage()}')
  return found


def about(words: str) -> dict[str, Any]:
  """What a report wants to know of one run."""
  claim, arm, rate, seed, _ = _parse(words)
  row = gate_sweep.ROWS.get(ARMS[arm].row)
  return {
    'claim': claim,
    'arm': arm,
    'rate': float(rate),
    'seed': seed,
    'paper': row.paper if row and not ARMS[arm].change else {},
  }


def get_config(words: str = 'sinks,elementwise,0'):
  name, arm, rate, seed, small = _parse(words)
  row, channels, change = ARMS[arm]
  config, claim = base.get_config(), CLAIMS[name]
  _model(config.model, claim, small)
  config.model.mlp_width -= channels // (8 if small else 1)
  if row:
    config.update_from_flattened_dict(gate_sweep.ROWS[row].change)
  _data(config, claim)
  _optimizer(config.optimizer, name, float(rate))
  config.optimizer.weight_decay = claim.decay

  config.seed = config.data.seed = seed
  config.steps = claim.steps
  # A spike may last for one step.
  config.log_every = 1 if name.startswith('stability') else 10
  config.eval_every = config.probe_every = 1000 if claim.steps > 2000 else 500
  config.eval_batches = 64
  config.figures = False
  config.checkpoint.every = 2000
  config.checkpoint.keep_last = 1
  config.checkpoint.keep_best = 0
  config.update_from_flattened_dict(change)
  if small:
    config.steps, config.optimizer.warmup_steps = 60, 10
    config.eval_every = config.probe_every = 20
    config.eval_batches = 4
    config.checkpoint.every = 20
  if name in ('context', 'continued'):
    _retrieval(config, 'long' if name == 'continued' else 'short')
  if name == 'continued':
    config.model.rope.base = 1e6
  if name == 'gates_first':
    config.optimizer.train = '*/gate'
  before, changes = _before(name, arm)
  if before.startswith('gates_first') and not small:
    config.steps -= CLAIMS['gates_first'].steps
  if before:
    # Where the sweep puts it.
    folder = '_'.join([before, str(seed), *['small'] * small])
    config.init_from = f'runs/evidence/{folder}'
    config.init_changes = changes
  return config


def _model(model: Any, claim: Claim, small: bool) -> None:
  """The sizes that all arms of a claim share; without a gate, so far."""
  model.length = claim.length // 8 if small else claim.length
  model.vocab = 512 if small else 16_384
  model.depth = 4 if small else claim.depth
  model.width = 64 if small else 512
  model.heads, model.kv_heads = 6, 3
  model.head_dim = 16 if small else 128  # sinks grow with it
  model.mlp_width = 176 if small else 1408
  model.qk_norm = False
  # Unrolled layers take two thirds of the time, and half a minute more to
  # compile: two runs on a GPU, of which one compiles, hide that.
  model.scan = False
  if small:
    model.dtype = 'float32'


def _data(config: Any, claim: Claim) -> None:
  """Text in joined rows."""
  data = config.data
  data.source = 'tokens'
  data.paths = 'runs/text/*.bin'
  data.tokenizer = 'runs/text'
  data.rows = 'joined'
  # One more than the tokenizer's last: no text has it.
  data.first_token = config.model.vocab - 1
  data.length = config.model.length
  data.batch = claim.tokens // claim.length
  data.validation = 0.02


def _optimizer(optimizer: Any, claim: str, rate: float) -> None:
  """A constant rate to near the end."""
  optimizer.learning_rate = rate
  optimizer.final_learning_rate = 0.15 * rate
  optimizer.schedule = 'wsd'
  optimizer.decay_share = 0.15
  optimizer.warmup_steps = 200
  if claim.startswith('stability'):
    optimizer.clip_norm = 0.0


def _retrieval(config: Any, tasks: str) -> None:
  """Mixes the tasks in."""
  data = config.data
  data.source, data.paths = 'mixture', ''
  data.mixture = (
    '0.95:tokens:runs/text/*.bin',
    f'0.05:tokens:runs/tasks/{tasks}/*.bin',
  )


def _before(claim: str, arm: str) -> tuple[str, tuple[str, ...]]:
  """The claim and arm that a run goes on with, and what differs; '': none."""
  if claim == 'continued':
    return f'context_{arm}', ('model.rope',)
  if claim == 'add_gate' and arm == 'added_first':
    return f'gates_first_{arm}', ()
  if claim in ('gates_first', 'add_gate'):
    return 'ungated_baseline', ('model.gate',)
  return '', ()


def _split(words: str) -> tuple[list[str], list[str]]:
  """The words, and `small` apart."""
  given = words.split(',') if words else []
  return [w for w in given if w != 'small'], [w for w in given if w == 'small']


def _parse(words: str) -> tuple[str, str, str, int, bool]:
  """Claim, arm, rate, seed, and whether the run is a small one."""
  given, small = _split(words)
  claim = CLAIMS.get(given[0] if given else '')
  if claim is None or len(given) != (4 if len(claim.rates) > 1 else 3):
    raise ValueError(f'{words!r} {_usage()}')
  arm, seed = given[1], given[-1]
  rate = given[2] if len(claim.rates) > 1 else claim.rates[0]
  try:
    float(rate)
  except ValueError:
    raise ValueError(f'{rate!r} is no learning rate') from None
  if arm not in ARMS or not seed.isdecimal():
    raise ValueError(f'{words!r} {_usage()}')
  return given[0], arm, rate, int(seed), bool(small)


def _usage() -> str:
  return (
    f'must be CLAIM,ARM,SEED or stability,ARM,RATE,SEED; CLAIM one of: '
    f'{" ".join(CLAIMS)}; ARM one of: {" ".join(ARMS)}'
  )
