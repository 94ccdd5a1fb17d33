"""A config on a TPU pod, in figures from the compiler alone.

    python -m gated_jax.aot --config=configs/dense_1b7.py --topology=v5p:8x8x8

Any setting can follow, as for train.py. The exit code is 0 when it fits, 1
when it does not, 2 for what the user has to change. Needs libtpu (a wheel
that `pip install jax[tpu]` brings) and no TPU.
"""

import os
import sys

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

import jax
from absl import flags
from ml_collections import config_flags

from gated_jax import cli
from gated_jax import sharding
from gated_jax.aot.topology import chip_of
from gated_jax.aot.topology import open_topology
from gated_jax.config import RunConfig
from gated_jax.config import from_dict

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file(
  'config', None, 'File in configs/, with --config.name=value on top.'
)
flags.DEFINE_string('topology', '', 'Pod, for example v5e:16x16.')
flags.DEFINE_bool('evaluation', False, 'The loss of held-out text alone.')
flags.DEFINE_bool('search', False, 'Try meshes, remat and batches.')
flags.DEFINE_float('minutes', 60, 'After which --search starts nothing new.')
flags.DEFINE_string('text', '', 'File for the compiled program, to read.')


def read_flags(argv: list[str]) -> RunConfig:
  """Parses the command line; ValueError in one line where it is wrong."""
  try:
    rest = FLAGS(argv)[1:]
    values = None if FLAGS.config is None else FLAGS.config.to_dict()
  except Exception as error:
    text = str(error).strip()
    if 'Traceback' in text:  # the config file itself refused, for a reason
      text = text.splitlines()[-1].removeprefix('ValueError: ')
    raise ValueError(' '.join(text.split())) from error
  if rest:
    raise ValueError(f'{rest[0]!r} is not a flag: flags begin with --')
  if values is None:
    raise ValueError('--config is missing, for example configs/dense_1b7.py')
  if not FLAGS.topology:
    raise ValueError('--topology is missing, for example v5e:16x16')
  return from_dict(values)


def run(config: RunConfig) -> int:
  """Compiles, prints, and says whether it fits."""
  devices = open_topology(FLAGS.topology, config.mesh.slices)
  from gated_jax.aot import kernels
  from gated_jax.aot import report
  from gated_jax.aot import search

  if FLAGS.search:
    found = search.search(config, devices, 60 * FLAGS.minutes, print)
    print(f'\n{report.CAVEAT}\n{search.table(found)}')
    return 0 if found else 1
  try:
    mesh = sharding.make_mesh(config.mesh, devices)
    kind, tensor = chip_of(devices).name, mesh.shape['tensor']
    price = kernels.prices(kind, config, tensor)
    result = report.examine(config, devices, price, not FLAGS.evaluation)
  except report.DoesNotFit as error:
    print(f'{report.CAVEAT}\n{error}')
    return 1
  if FLAGS.text:
    with open(FLAGS.text, 'w') as file:
      file.write(result.compiled.text)
  print(report.describe(result, FLAGS.topology))
  return 1 if result.excess > 0 else 0


def main(argv: list[str]) -> int:
  """The exit code; see gated_jax/cli.py."""
  # The host compiles; it must not look for a TPU of its own.
  jax.config.update('jax_platforms', 'cpu')
  return cli.run(lambda: run(read_flags(argv)))


if __name__ == '__main__':
  sys.exit(main(sys.argv))
