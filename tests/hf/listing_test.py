"""hf/listing.py: the table of families, in a terminal and in docs/models.md."""

import pathlib

import pytest

from gated_jax.bench import families
from gated_jax.hf import __main__ as cli
from gated_jax.hf import listing
from gated_jax.hf.config import choose_family
from gated_jax.hf.config import find_family
from gated_jax.hf.families import FAMILIES
from gated_jax.hf.families import NOT_YET

DOCS = pathlib.Path(__file__).parents[2] / 'docs/models.md'


def test_the_page_has_the_table_that_the_code_has():
  tables = listing.markdown().split('\n\n')
  page = DOCS.read_text(encoding='utf-8')
  for table in tables:
    assert table in page
  for family in FAMILIES:
    assert family.about, family.name


def test_predicted_steps_are_those_of_the_table_of_pods():
  page = DOCS.read_text(encoding='utf-8')
  rows = [
    [cell.strip() for cell in line.strip('|').split('|')]
    for line in page.partition('## On a pod')[2].splitlines()
    if line.startswith('|')
  ]
  for size, steps in listing.PREDICTED.values():
    for step in steps:
      (row,) = (
        row for row in rows if size in row[0] and row[1].startswith(step.pod)
      )
      assert row[-2:] == [f'{step.seconds:.2f} s', f'{step.tokens // 1000:,}k']


def test_list_names_every_family_and_what_is_refused(capsys):
  assert cli.main(['list']) == 0
  printed = capsys.readouterr().out
  for family in FAMILIES:
    assert f'\n{family.name}\n' in f'\n{printed}'
  for kind, reason in NOT_YET.items():
    assert f'{kind}: {reason}' in printed
  assert max(map(len, printed.splitlines())) <= listing.WIDTH


@pytest.mark.parametrize('kind', NOT_YET)
def test_a_gated_model_that_cannot_be_computed_is_refused_with_the_reason(kind):
  with pytest.raises(ValueError, match=f'{kind}.*cannot compute: ') as error:
    find_family({'model_type': kind})
  assert NOT_YET[kind] in str(error.value)


@pytest.mark.parametrize('name', families.FAMILIES)
def test_the_model_whose_speed_is_shown_is_one_of_its_family(name):
  assert choose_family(families.model_of(name), name).name == name
  assert name in listing.SPEED
