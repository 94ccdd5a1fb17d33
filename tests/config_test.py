"""Plain values to settings: what fits goes in, the rest is refused by name."""

import dataclasses
import json
import string

import hypothesis
import pytest
from hypothesis import strategies as st

from gated_jax.config import ModelConfig
from gated_jax.config import RunConfig
from gated_jax.config import differences
from gated_jax.config import from_dict
from gated_jax.config import to_dict


def leaves(values, path=()):
  for name, value in values.items():
    if isinstance(value, dict):
      yield from leaves(value, (*path, name))
    else:
      yield (*path, name), value


PATHS = dict(leaves(to_dict(RunConfig())))
anything = st.one_of(
  st.none(),
  st.booleans(),
  st.integers(),
  st.floats(),
  st.text(max_size=5),
  st.lists(st.integers(), max_size=3),
  st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


def put(path, value):
  for name in reversed(path):
    value = {name: value}
  return value


def test_settings_survive_json():
  config = RunConfig(model=ModelConfig(depth=4, windows=(128, 0)))
  assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


@hypothesis.given(st.sampled_from(sorted(PATHS)), anything)
def test_any_value_is_taken_as_it_is_or_refused_with_its_name(path, value):
  try:
    config = from_dict(put(path, value))
  except ValueError as error:
    assert '\n' not in str(error)
    assert any(name in str(error) for name in path)
    return
  found = dict(leaves(to_dict(config)))[path]
  assert type(found) is type(PATHS[path])
  assert found == (tuple(value) if isinstance(found, tuple) else value)


@hypothesis.given(st.text(string.ascii_lowercase + '_', min_size=1))
def test_names_that_are_no_settings_are_refused(name):
  hypothesis.assume(name not in {f.name for f in dataclasses.fields(RunConfig)})
  with pytest.raises(ValueError, match=f'no setting {name}'):
    from_dict({name: 1})


@pytest.mark.parametrize(
  ('values', 'message'),
  [
    ({'stpes': 3}, 'no setting stpes; did you mean steps?'),
    ({'model': {'widht': 3}}, 'no setting model.widht; did you mean model.wid'),
    ({'model': {'gate': {'postion': 'key'}}}, 'did you mean model.gate.pos'),
    ({'model': 3}, 'model=3 must be a group of settings'),
    ({'steps': 3.0}, 'steps=3.0 must be of type int, not float'),
    ({'steps': True}, 'steps=True must be of type int, not bool'),
    ({'steps': 2**31}, 'steps=2147483648 must be below 2**31'),
    ({'seed': 2**31}, 'seed=2147483648 must lie in [0, 2**31)'),
    ({'seed': -1}, 'seed=-1 must lie in [0, 2**31)'),
    ({'model': {'vocab': 10**12}}, 'model.vocab=1000000000000 must be below'),
    ({'model': {'windows': [0, 'a']}}, "model.windows='a' must be of type int"),
  ],
)
def test_mistakes_are_named(values, message):
  with pytest.raises(ValueError) as error:
    from_dict(values)
  assert message in str(error.value)


def test_differences_show_both_values():
  old = to_dict(RunConfig())
  new = to_dict(RunConfig(steps=5000, model=ModelConfig(width=64)))
  assert differences(old, new) == {
    'steps': (1000, 5000),
    'model.width': (2048, 64),
  }
  assert not differences(json.loads(json.dumps(old)), old)
  assert differences({'gone': 1}, {}) == {'gone': (1, '(none)')}
