"""A new run on the parameters of another, or of a model that was imported.

    python -m gated_jax.hf import path/of/theirs runs/imported
    python train.py --config=configs/start_from.py:runs/imported \
      --workdir=runs/tuned --config.data.source=text \
      --config.data.paths='/data/*.txt'

The model, its tokenizer and the length of its rows are those of the
checkpoint, whose adapters, if it has any, are added to their matrices.
Everything else stands at the defaults of `gated_jax/config` until a flag says
otherwise.
"""

import ml_collections

from configs import base
from gated_jax import checkpoint
from gated_jax.config import LoraConfig
from gated_jax.config import to_dict


def get_config(path: str = '') -> ml_collections.ConfigDict:
  """The settings for a run that starts from a checkpoint.

  Args:
    path: A workdir, the folder of a step, or of what was imported.
  """
  if not path:
    raise ValueError('say where to start: --config=configs/start_from.py:PATH')
  there = checkpoint.load_config(path)
  config = base.get_config()
  config.model = ml_collections.ConfigDict(to_dict(there.model))
  config.model.lora = ml_collections.ConfigDict(to_dict(LoraConfig()))
  config.data.tokenizer = there.data.tokenizer
  config.data.special_tokens = there.data.special_tokens
  config.data.length = there.data.length
  config.export_as = there.export_as
  config.init_from = path
  return config
