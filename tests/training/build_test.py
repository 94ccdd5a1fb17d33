"""What is refused before anything is built."""

import pytest

from gated_jax.config import DataConfig
from gated_jax.config import ModelConfig
from gated_jax.config import MoEConfig
from gated_jax.config import RunConfig
from gated_jax.training import build
from gated_jax.training.workdir import check_workdir


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'attention': 'splash'}, 'splash attention .* this is a cpu'),
    ({'attention': 'pallas_tpu'}, 'pallas_tpu attention .* this is a cpu'),
    ({'attention': 'cudnn'}, 'cudnn attention .* this is a cpu'),
    (
      {
        'pattern': ('attention+moe',),
        'moe': MoEConfig(experts=8, implementation='gmm'),
      },
      "moe.implementation='gmm' needs a TPU and this is a cpu",
    ),
  ],
)
def test_what_this_hardware_lacks_is_named(settings, message):
  with pytest.raises(NotImplementedError, match=message):
    build.check_platform(ModelConfig(**settings), 'cpu')


def test_what_every_hardware_has_is_taken():
  for platform in ('cpu', 'gpu', 'tpu'):
    for attention in ('auto', 'xla'):
      build.check_platform(
        ModelConfig(
          attention=attention,
          pattern=('attention+moe',),
          moe=MoEConfig(experts=8),
        ),
        platform,
      )


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
  file = tmp_path / 'file'
  file.write_text('')
  for path, reason in ((file, 'File exists'), (file / 'x', 'Not a directory')):
    with pytest.raises(ValueError, match=f'workdir {path}: {reason}'):
      check_workdir(path)
  check_workdir(tmp_path / 'a' / 'b')
  (tmp_path / 'c').mkdir()
  (tmp_path / 'c' / 'checkpoints').write_text('')
  with pytest.raises(ValueError, match='c/checkpoints: File exists'):
    check_workdir(tmp_path / 'c')


def test_a_state_that_restarts_by_document_needs_rows_that_say_where():
  """Joined rows have no document numbers, so a state would leak."""
  hybrid = ModelConfig(depth=2, pattern=('gated_deltanet', 'attention'))
  for rows in ('cut', 'whole'):
    build.check_rows(RunConfig(model=hybrid, data=DataConfig(rows=rows)))
  joined = DataConfig(rows='joined')
  build.check_rows(RunConfig(model=ModelConfig(), data=joined))
  with pytest.raises(ValueError, match="mixer 'gated_deltanet' restarts there"):
    build.check_rows(RunConfig(model=hybrid, data=joined))
