"""Rows of tensor names that several families share.

A family's own file puts its table together from these and rows of its own.
"""

from collections.abc import Iterable

from gated_jax.hf.names import Row


def layer_rows(*rows: Row) -> tuple[Row, ...]:
  """The same rows, named as every layer names them."""
  return tuple(
    row._replace(theirs=f'model.layers.{{layer}}.{row.theirs}') for row in rows
  )


def fused_query(groups: str) -> tuple[Row, ...]:
  """Queries and gates in one tensor, by a setting that counts its groups."""
  both = ('attention/query', 'attention/gate')
  weights = tuple(f'{name}/kernel' for name in both)
  biases = tuple(f'{name}/bias' for name in both)
  return layer_rows(
    Row('self_attn.q_proj.weight', weights, groups=groups),
    Row('self_attn.q_proj.bias', biases, groups=groups, vector=True),
  )


def shared_expert(name: str) -> tuple[Row, ...]:
  """The matrices of an expert that every token takes."""
  return layer_rows(
    *(
      Row(f'{name}.{theirs}.weight', (f'moe/shared/{ours}/kernel',))
      for theirs, ours in SWIGLU
    )
  )


# Names of SwiGLU's matrices, theirs and ours.
SWIGLU = (('gate_proj', 'gate_proj'), ('up_proj', 'up'), ('down_proj', 'down'))
COMMON = (
  Row('model.embed_tokens.weight', ('embed/embedding',), inputs=0),
  Row('model.norm.weight', ('final_norm/scale',), inputs=0),
  Row('lm_head.weight', ('unembed/kernel',)),
  *layer_rows(
    Row('input_layernorm.weight', ('attention_norm/scale',), inputs=0),
    Row('self_attn.k_proj.weight', ('attention/key/kernel',)),
    Row('self_attn.v_proj.weight', ('attention/value/kernel',)),
    Row('self_attn.o_proj.weight', ('attention/out/kernel',), inputs=2),
    Row('self_attn.k_proj.bias', ('attention/key/bias',), vector=True),
    Row('self_attn.v_proj.bias', ('attention/value/bias',), vector=True),
    Row('self_attn.o_proj.bias', ('attention/out/bias',), vector=True),
    Row('self_attn.q_norm.weight', ('attention/query_norm/scale',), inputs=0),
    Row('self_attn.k_norm.weight', ('attention/key_norm/scale',), inputs=0),
  ),
)
PLAIN_QUERY = layer_rows(
  Row('self_attn.q_proj.weight', ('attention/query/kernel',)),
  Row('self_attn.q_proj.bias', ('attention/query/bias',), vector=True),
)
SEPARATE_GATE = layer_rows(
  Row('self_attn.gate_proj.weight', ('attention/gate/kernel',)),
)
PRE_NORM = layer_rows(
  Row('post_attention_layernorm.weight', ('mlp_norm/scale',), inputs=0),
)
SANDWICH_NORM = layer_rows(
  Row(
    'post_attention_layernorm.weight', ('attention_post_norm/scale',), inputs=0
  ),
  Row('pre_mlp_layernorm.weight', ('mlp_norm/scale',), inputs=0),
  Row('post_mlp_layernorm.weight', ('mlp_post_norm/scale',), inputs=0),
)
# The same norms by other names.
FEEDFORWARD_NORM = layer_rows(
  *(
    Row(f'{theirs}_layernorm.weight', (f'{ours}/scale',), inputs=0)
    for theirs, ours in (
      ('post_attention', 'attention_post_norm'),
      ('pre_feedforward', 'mlp_norm'),
      ('post_feedforward', 'mlp_post_norm'),
    )
  )
)
MLP = layer_rows(
  *(
    Row(f'mlp.{theirs}.weight', (f'mlp/{ours}/kernel',))
    for theirs, ours in SWIGLU
  )
)
EXPERTS = layer_rows(
  *(
    Row(f'mlp.experts.{{expert}}.{theirs}.weight', (f'moe/{ours}',))
    for theirs, ours in SWIGLU
  )
)
# The same with all experts of a layer in one tensor.
FUSED_EXPERTS = layer_rows(
  Row('mlp.experts.gate_up_proj', ('moe/gate_proj', 'moe/up'), stack=1),
  Row('mlp.experts.down_proj', ('moe/down',), stack=1),
)


def renamed(rows: Iterable[Row], old: str, new: str) -> tuple[Row, ...]:
  """The same rows, with another beginning in place of `old`."""
  return tuple(
    row._replace(theirs=new + row.theirs.removeprefix(old))
    if row.theirs.startswith(old)
    else row
    for row in rows
  )
