"""Every setting at its default; every other config is a difference to it.

    python train.py --config=configs/base.py --workdir=runs/base

The defaults themselves stand in `gated_jax/config`. This one trains the
paper's 1.7B model, gated without a narrower MLP to pay for it: 1,838,015,488
parameters. It is not meant for a small machine: see `smoke.py`.
"""

import ml_collections

from gated_jax import config


def get_config() -> ml_collections.ConfigDict:
  """A locked ConfigDict: a name that is no setting cannot be put in."""
  return ml_collections.ConfigDict(config.to_dict(config.RunConfig())).lock()
