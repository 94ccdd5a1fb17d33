"""Patterns choose the parameters that they name, and say what they miss."""

import re

import pytest

from gated_jax.model.patterns import choose

SCANNED = ('embed/embedding', 'unembed/kernel', 'layers/attention/gate/kernel',
           'layers/attention/query/kernel', 'layers/mlp/gate_proj/kernel')  # fmt: skip
APART = tuple(
  name.replace('layers', f'layers_{i}') for name in SCANNED for i in (1, 11)
)


def paths(names):
  return [tuple(name.split('/')) for name in names]


@pytest.mark.parametrize(
  ('patterns', 'places'),
  [
    ('*', (0, 1, 2, 3, 4)),
    ('*/gate', (2,)),
    ('gate', None),
    ('embed', (0,)),
    ('!embed,!unembed', (2, 3, 4)),
    ('layers, !*/gate_proj', (2, 3)),
    ('*,!layers,*/mlp', (0, 1, 4)),
    ('*/query/kerne?', (3,)),
  ],
)
def test_patterns_are_read_in_order(patterns, places):
  if places is None:
    with pytest.raises(ValueError, match="'gate' matches no parameter"):
      choose('train', patterns, paths(SCANNED))
    return
  expected = {paths(SCANNED)[place] for place in places}
  assert choose('train', patterns, paths(SCANNED)) == expected


def test_layer_1_is_not_layer_11():
  found = choose('train', 'layers_1', paths(APART))
  assert {path[0] for path in found} == {'layers_1'}
  assert len(found) == 3


@pytest.mark.parametrize(
  ('names', 'patterns', 'message'),
  [
    (SCANNED, '*/gates', "'*/gates' matches no parameter; the nearest names "
     'are gate, '),
    (SCANNED, '*,!embedding', "'!embedding' matches no parameter; the nearest "
     'names are embedding, '),
    (SCANNED, 'layers_3', "'layers_3' matches no parameter; a scanned model "
     'keeps its layers in one array: set model.scan=False'),
    (APART, 'layers_3', "'layers_3' matches no parameter; the nearest names "
     'are layers_1'),
    (SCANNED, 'zzz', "optimizer.train='zzz': 'zzz' matches no parameter"),
    (SCANNED, '*,!*', "'*,!*' leaves no parameter"),
  ],
)  # fmt: skip
def test_a_pattern_without_effect_is_one_line(names, patterns, message):
  with pytest.raises(ValueError, match=re.escape(message)) as error:
    choose('optimizer.train', patterns, paths(names))
  assert '\n' not in str(error.value)
