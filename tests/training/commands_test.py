"""What to type next is what was typed, with other flags."""

import pathlib

import pytest

from gated_jax.training import commands

WEIGHTS = pathlib.Path('runs/a/checkpoints/500')


@pytest.mark.parametrize('form', ['--config.steps=9', '--config.steps 9'])
def test_a_longer_run_is_the_same_but_for_its_steps(form):
  command = f"python train.py --config=c.py {form} '--workdir=my runs/a'"
  assert commands.longer(command, 18) == (
    "python train.py --config=c.py '--workdir=my runs/a' --config.steps=18"
  )


def test_a_new_run_from_weights_has_a_folder_of_its_own(tmp_path):
  workdir = tmp_path / 'a'
  (tmp_path / 'a_2').mkdir()
  command = f'python train.py --config=c.py --workdir={workdir} --config.seed=1'
  assert commands.anew(command, workdir, WEIGHTS) == (
    f'python train.py --config=c.py --config.seed=1 --workdir={workdir}_3 '
    f'--config.init_from={WEIGHTS}'
  )


def test_without_a_command_the_call_is_named(tmp_path):
  assert 'with config.steps=4' in commands.longer('', 4)
  assert 'the same arguments' in commands.again('')
  anew = commands.anew('', tmp_path / 'a', WEIGHTS)
  assert f"config.init_from='{WEIGHTS}'" in anew
  assert f"workdir='{tmp_path / 'a_2'}'" in anew
