"""Olmo-Hybrid: three layers of Gated DeltaNet to one of ungated attention.

Layers of linear attention norm what their blocks read, layers of softmax
attention what their blocks put out. Queries and keys are normed over all heads
of a token together. Where rope_theta is null there is no rotary embedding.
"""

from typing import Any

from gated_jax.config import ModelConfig
from gated_jax.config import RopeConfig
from gated_jax.config import shortest_pattern
from gated_jax.hf.families.family import Family
from gated_jax.hf.families.family import interval
from gated_jax.hf.families.rows import COMMON
from gated_jax.hf.families.rows import MLP
from gated_jax.hf.families.rows import PLAIN_QUERY
from gated_jax.hf.families.rows import layer_rows
from gated_jax.hf.keys import Keys
from gated_jax.hf.keys import read_layer_types
from gated_jax.hf.keys import write_deltanet
from gated_jax.hf.names import Row
from gated_jax.hf.rope import read_rope
from gated_jax.hf.rope import write_rope

# Letters of theirs, and the matrices of ours that they stand for.
_MATRICES = {
  'q': 'query',
  'k': 'key',
  'v': 'value',
  'g': 'gate',
  'b': 'beta',
  'a': 'decay',
}
_VECTORS = {
  'A_log': 'log_rate',
  'dt_bias': 'step_bias',
  'o_norm.weight': 'output_scale',
}
_MIX = 'gated_deltanet'
_ROWS = (
  *COMMON,
  *PLAIN_QUERY,
  *MLP,
  *layer_rows(
    *(
      Row(f'linear_attn.{theirs}_proj.weight', (f'{_MIX}/{ours}/kernel',))
      for theirs, ours in _MATRICES.items()
    ),
    *(
      Row(
        f'linear_attn.{theirs}_conv1d.weight',
        (f'{_MIX}/{_MATRICES[theirs]}_filter',),
        filter=True,
      )
      for theirs in 'qkv'
    ),
    *(
      Row(f'linear_attn.{theirs}', (f'{_MIX}/{ours}',), inputs=0)
      for theirs, ours in _VECTORS.items()
    ),
    Row('linear_attn.o_proj.weight', (f'{_MIX}/out/kernel',), inputs=2),
    Row('attention_layer_norm.weight', (f'{_MIX}_norm/scale',), inputs=0),
    Row('feedforward_layer_norm.weight', ('mlp_norm/scale',), inputs=0),
    *(
      Row(f'post_{theirs}_layernorm.weight', (f'{ours}_post_norm/scale',), 0)
      for theirs, ours in (('attention', 'attention'), ('feedforward', 'mlp'))
    ),
  ),
)


def _read_rope(keys: Keys, length: int) -> RopeConfig | None:
  """The rotary embedding; a base that is null, not absent, says there is none.

  So does the class of transformers, which takes 10,000 for an absent one.
  """
  inside, outside = keys.peek('rope_parameters'), keys.rest()
  said = isinstance(inside, dict) and 'rope_theta' in inside
  base = (inside if said else outside).get('rope_theta', RopeConfig().base)
  values = read_rope(keys, length, 1.0)
  if base is None:
    return None
  rope = RopeConfig(**values)
  if rope.fraction != 1:
    keys.refuse(
      f' has partial_rotary_factor={rope.fraction}, which '
      'OlmoHybridForCausalLM does not read'
    )
  return rope


def _read_delta(keys: Keys) -> dict[str, Any]:
  """Sizes of DeltaNet, by default parts of the width and of the heads."""
  heads = keys.taken['num_attention_heads']
  key_heads = keys.integer('linear_num_key_heads', heads)
  share = 3 * keys.taken['hidden_size'] // (4 * key_heads)
  key_dim = keys.integer('linear_key_head_dim', share)
  return {
    'key_heads': key_heads,
    'value_heads': keys.integer('linear_num_value_heads', heads),
    'key_dim': key_dim,
    'value_dim': keys.integer('linear_value_head_dim', 2 * key_dim),
    'filter_width': keys.integer('linear_conv_kernel_dim', 4),
    'doubled_beta': keys.flag('linear_allow_neg_eigval', True),
    'norm_eps': 1e-5,  # whatever rms_norm_eps is
  }


def _read(keys: Keys, depth: int) -> dict[str, Any]:
  rope = _read_rope(keys, keys.taken['max_position_embeddings'])
  full = 'attention:norm=post' if rope else 'attention:nope,norm=post'
  default = interval(depth, 4, 'linear_attention')
  if depth < 4:  # the class makes the last layer attend
    default = [*default[:-1], 'full_attention']
  words = read_layer_types(keys, default, None, full, linear=_MIX)
  return {
    'pattern': shortest_pattern(words),
    'qk_norm_joint': True,
    'gate': {'position': 'none'},
    'delta': _read_delta(keys),
    **({'rope': vars(rope)} if rope else {}),
  }


def _write(config: ModelConfig) -> dict[str, Any]:
  return {
    **write_deltanet(config),
    'linear_allow_neg_eigval': config.delta.doubled_beta,
    **(
      {'rope_parameters': {'rope_type': 'default', 'rope_theta': None}}
      if config.has_unrotated
      else write_rope(config.rope)
    ),
    # The class has tokens by default which may lie beyond the vocabulary.
    'pad_token_id': None,
    'eos_token_id': None,
  }


OLMO_HYBRID = Family(
  name='olmo_hybrid',
  model_type='olmo_hybrid',
  architecture='OlmoHybridForCausalLM',
  rows=_ROWS,
  read=_read,
  write=_write,
  rope_by_type=True,
  divides_width=True,
  inert=frozenset({'linear_a_log_*', 'linear_dt_*'}),
  about=(
    'Gated DeltaNet whose share of correction goes up to two, and ungated '
    'attention with norms of outputs alone and of all heads together, with or '
    'without rotary embedding'
  ),
  limits=(
    'files that transformers 5.24 saved are refused where keys and values are '
    'not equally wide: it cuts their filters into equal thirds'
  ),
)
