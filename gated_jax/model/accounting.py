"""How many parameters a model has, and how many FLOPs a token costs it.

Both in closed form from the config, without building anything:

    embed, unembed      V D each (tied: embed alone)
    attention           L * 2 D H (N + K)
    gate                L * D N H, or as the table in `gate.py` says
    mlp                 L * 3 D F
    router, experts     L * D E, L * 3 D F_e E, and F_s for the shared expert
    norms               what is left: vectors

`count_parameters` gives the same of a tree of parameters.
"""

import math
from typing import Any

import jax

from gated_jax.config import ModelConfig

# Part of each submodule's parameters; the innermost name decides.
_PARTS = {
  'embed': 'embed',
  'unembed': 'unembed',
  'attention': 'attention',
  'gate': 'gate',
  'mlp': 'mlp',
  'moe': 'experts',
  'router': 'router',
}


def _gate(config: ModelConfig) -> int:
  """Parameters of one layer's gate."""
  c, g = config, config.gate
  if not g.has_scores:
    return 0
  if g.position == 'dense_output':
    scores = c.width
  else:
    heads = c.kv_heads if g.position in ('key', 'value') else c.heads
    scores = heads * (1 if g.granularity == 'headwise' else c.head_dim)
  inputs = 1 if g.source == 'parameter' else g.channels or c.width
  return inputs * scores


def _mlp(config: ModelConfig, experts: int) -> dict[str, int]:
  """Parameters of one layer's MLP, or of that many of its experts."""
  c, moe = config, config.moe
  if not moe.experts:
    return {'mlp': 3 * c.width * c.mlp_width}
  return {
    'router': c.width * moe.experts,
    'experts': 3 * c.width * (experts * moe.width + moe.shared_width),
  }


def _norms(config: ModelConfig) -> int:
  """Scales of one layer's norms."""
  c = config
  heads = 2 * c.qk_norm + (c.gate.kind == 'rms_norm')
  return c.width * (4 if c.norm == 'sandwich' else 2) + c.head_dim * heads


def _matrices(config: ModelConfig, experts: int) -> dict[str, int]:
  """Parameters of all layers that stand in products, or are a gate's."""
  c = config
  layer = {
    'attention': 2 * c.width * c.head_dim * (c.heads + c.kv_heads),
    'gate': _gate(c),
    **_mlp(c, experts),
  }
  return {part: c.depth * count for part, count in layer.items()}


def parameters(config: ModelConfig) -> dict[str, int]:
  """Parameters by part, their `total`, and how many a token uses (`active`).

  Active are all but the experts that a token does not choose; an embedding
  counts whole.
  """
  c = config
  parts = {'embed': c.vocab * c.width}
  if not c.tie_embeddings:
    parts['unembed'] = c.vocab * c.width
  parts |= _matrices(c, c.moe.experts)
  parts['norms'] = c.depth * _norms(c) + c.width
  total = sum(parts.values())
  idle = parts.get('experts', 0) - _matrices(c, c.moe.top_k).get('experts', 0)
  return {**parts, 'total': total, 'active': total - idle}


def count_parameters(params: Any) -> dict[str, int]:
  """Parameters of a `Decoder` by part, and their `total`.

  Args:
    params: the tree `Decoder.init` makes, or its shapes, boxed or not.

  Raises:
    ValueError: a parameter is of no part known here.
  """
  counts: dict[str, int] = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    # A box's own key is none of a dict.
    names = [k.key for k in path if isinstance(k, jax.tree_util.DictKey)]
    parts = [_PARTS[name] for name in names if name in _PARTS]
    if names[-1:] == ['scale']:
      parts = ['norms']
    if not parts:
      raise ValueError(f'{"/".join(names)} is no parameter of a Decoder')
    counts[parts[-1]] = counts.get(parts[-1], 0) + math.prod(leaf.shape)
  return {**counts, 'total': sum(counts.values())}


def _visible(length: int, window: int) -> float:
  """Keys that a query sees, on average over a row of one document."""
  window = min(window or length, length)
  return window - window * (window - 1) / (2 * length)


def flops_per_token(config: ModelConfig, length: int) -> dict[str, float]:
  """FLOPs to train on one token, by part: forward, and twice that backward.

  Products of matrices alone, two FLOPs for each multiplication, and only what
  the mathematics needs: keys that causality and windows leave to be seen,
  experts that are chosen, nothing recomputed. Rows are taken as one document;
  shorter ones cost less attention.

  Args:
    config: the model.
    length: tokens in a row.
  """
  c = config
  products = _matrices(c, c.moe.top_k)
  products['attention_projections'] = products.pop('attention')
  if c.gate.source == 'parameter':
    products['gate'] = 0
  products['logits'] = c.vocab * c.width
  repeats = c.depth // len(c.windows)
  seen = repeats * sum(_visible(length, window) for window in c.windows)
  flops = {part: 6.0 * count for part, count in products.items()}
  return {**flops, 'attention': 6.0 * 2 * c.heads * c.head_dim * seen}
