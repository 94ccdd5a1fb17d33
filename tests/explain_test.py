"""Every setting is printed with its default and the comment beside it."""

import dataclasses

import pytest

from gated_jax.config import RunConfig
from gated_jax.explain import explain

GROUPS = ('', 'model', 'model.gate', 'data', 'optimizer', 'mesh', 'checkpoint')


@pytest.mark.parametrize('group', GROUPS)
def test_every_setting_of_a_group_is_there(group):
  config = RunConfig()
  for name in filter(None, group.split('.')):
    config = getattr(config, name)
  text = explain(group)
  for field in dataclasses.fields(config):
    if not dataclasses.is_dataclass(getattr(config, field.name)):
      prefix = f'--config.{group}.' if group else '--config.'
      assert f'\n{prefix}{field.name}=' in text


def test_comments_above_and_beside_a_setting_are_its_own():
  lines = [line.strip() for line in explain().splitlines()]
  above = lines.index("--config.init_from=''")
  assert lines[above + 1].startswith('A checkpoint folder whose parameters')
  seed = lines.index('--config.seed=0')
  assert lines[seed + 1].startswith('--config.'), 'it has no comment'
  lines = [line.strip() for line in explain('checkpoint').splitlines()]
  assert lines[lines.index('--config.checkpoint.every=500') + 1].startswith(
    'steps;'
  )


def test_groups_within_groups_are_named():
  assert '--help=model.gate' in explain('model')


def test_an_unknown_group_names_the_nearest():
  with pytest.raises(ValueError, match=r'did you mean model\?'):
    explain('modle')
