"""hf/names.py: layouts on numbers that can be read, and holes in a table."""

import dataclasses

import numpy as np
import pytest

from gated_jax.config import ModelConfig
from gated_jax.hf import names

CONFIG = ModelConfig(
  vocab=5, length=8, depth=1, width=2, heads=4, kv_heads=2, head_dim=2,
  mlp_width=3,
)  # fmt: skip
QUERY, GATE = 'attention/query/kernel', 'attention/gate/kernel'


def tensor(groups, gate_shape):
  shapes = {f'layers/{QUERY}': (1, 2, 4, 2), f'layers/{GATE}': (1, *gate_shape)}
  row = names.Row('{layer}.q', (QUERY, GATE), groups=groups)
  (found,) = names.tensors([row], CONFIG, shapes)
  return found


# Letters are query heads, numbers their channels, ' is the gate.
@pytest.mark.parametrize(
  ('groups', 'gate_shape', 'rows'),
  [
    ('kv_heads', (2, 4, 2), "a0 a1 b0 b1 a0' a1' b0' b1' c0 c1 d0 d1 c0' c1' d0' d1'"),
    ('heads', (2, 4, 2), "a0 a1 a0' a1' b0 b1 b0' b1' c0 c1 c0' c1' d0 d1 d0' d1'"),
    ('', (2, 4, 2), "a0 a1 b0 b1 c0 c1 d0 d1 a0' a1' b0' b1' c0' c1' d0' d1'"),
    ('kv_heads', (2, 4), "a0 a1 b0 b1 a' b' c0 c1 d0 d1 c' d'"),
    ('heads', (2, 4), "a0 a1 a' b0 b1 b' c0 c1 c' d0 d1 d'"),
  ],
)  # fmt: skip
def test_rows_are_in_this_order(groups, gate_shape, rows):
  query = np.array([[f'{h}{c}' for c in (0, 1)] for h in 'abcd'], object)
  gate = query + "'"
  if len(gate_shape) == 2:
    gate = np.array([f"{h}'" for h in 'abcd'], object)
  columns = np.array(['x', 'y'], object)
  query = columns[:, None, None] + query
  gate = columns.reshape(2, *(1,) * gate.ndim) + gate
  t = tensor(groups, gate_shape)
  joined = t.join([query, gate])
  expected = [[f'x{r}', f'y{r}'] for r in rows.split()]
  assert joined.tolist() == expected
  assert t.shape == joined.shape
  back = t.split(joined)
  assert [b.tolist() for b in back] == [query.tolist(), gate.tolist()]


def test_a_pattern_of_windows_takes_layers_in_turn():
  config = dataclasses.replace(
    CONFIG, depth=6, pattern=('attention:window=4',) * 2 + ('attention',)
  )
  path = 'mlp/up/kernel'
  shapes = {f'layers/block_{i}/{path}': (2, 2, 3) for i in range(3)}
  row = names.Row('layers.{layer}.up', (path,))
  found = names.tensors([row], config, shapes)
  assert [(t.name, t.leaves[0], t.at) for t in found] == [
    (f'layers.{i}.up', f'layers/block_{i % 3}/{path}', (i // 3,))
    for i in range(6)
  ]


ONE = names.Row('{layer}.one', ('one',), inputs=0)


@pytest.mark.parametrize(
  ('rows', 'message'),
  [
    ([], 'parameter layers/one of shape .* has no name'),
    ([ONE, ONE], r'two rows of the table name the tensor 0\.one'),
    (
      [ONE, ONE._replace(theirs='{layer}.two')],
      r'two rows of the table hold the parameter layers/one, the second as 0\.two',
    ),
  ],
)
def test_holes_and_overlaps_in_a_table_are_named(rows, message):
  with pytest.raises(ValueError, match=message):
    names.tensors(rows, CONFIG, {'layers/one': (1, 7)})


def test_half_a_parameter_is_a_hole():
  with pytest.raises(ValueError, match='7 of its 14 numbers'):
    names.tensors([ONE], CONFIG, {'layers/one': (2, 7)})


def test_torch_is_not_imported():
  import subprocess
  import sys

  code = (
    'import sys, gated_jax.hf.__main__; '
    'assert not {"torch", "transformers"} & set(sys.modules)'
  )
  subprocess.run([sys.executable, '-c', code], check=True)
