"""A config on a TPU pod, in figures from the compiler alone.

    python -m gated_jax.aot --config=configs/dense_1b7.py --topology=v5p:8x8x8

Any setting can follow, as for train.py. The exit code is 0 when it fits, 1
when it does not, 2 for what the user has to change. Needs libtpu (a wheel
that `pip install jax[tpu]` brings) and no TPU.
"""

import math
import os
import sys

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

import jax
from absl import flags

from gated_jax import cli
from gated_jax import config_flag
from gated_jax import sharding
from gated_jax.aot.topology import chip_of
from gated_jax.aot.topology import open_topology
from gated_jax.aot.topology import parted_chips
from gated_jax.config import RunConfig
from gated_jax.paths import local

FLAGS = flags.FLAGS
flags.DEFINE_string('topology', '', 'Pod, for example v5e:16x16.')
flags.DEFINE_bool('evaluation', False, 'The loss of held-out text alone.')
flags.DEFINE_bool('search', False, 'Try meshes, remat and batches.')
flags.DEFINE_bool('same_batch', False, "--search keeps the config's batch.")
flags.DEFINE_float('minutes', 60, 'After which --search starts nothing new.')
flags.DEFINE_string('text', '', 'File for the compiled program, to read.')


def read_flags(argv: list[str]) -> RunConfig:
  """Parses the command line; ValueError in one line where it is wrong."""
  config = config_flag.read(argv, 'configs/dense_1b7.py')
  if not FLAGS.topology:
    raise ValueError('--topology is missing, for example v5e:16x16')
  if not 0 < FLAGS.minutes < math.inf:
    raise ValueError(f'--minutes={FLAGS.minutes} must be positive and finite')
  if FLAGS.same_batch and not FLAGS.search:
    raise ValueError('--same_batch is for --search, which is not there')
  folder = local(FLAGS.text).parent
  if FLAGS.text and not folder.is_dir():
    raise ValueError(f'--text={FLAGS.text}: there is no folder {folder}')
  return config


def run(argv: list[str]) -> int:
  """Compiles, prints, and says whether it fits; or prints the help."""
  help_text = config_flag.help_wanted(argv, __doc__)
  if help_text is not None:
    print(help_text)
    return cli.DONE
  config = read_flags(argv)
  if config_flag.loss_maker():
    print("the loss is taken as the model's own, not as get_loss makes it")
  devices = open_topology(FLAGS.topology, config.mesh.slices)
  from gated_jax.aot import kernels
  from gated_jax.aot import report
  from gated_jax.aot import search

  if FLAGS.search:
    seconds, same = 60 * FLAGS.minutes, FLAGS.same_batch
    reports = search.search(config, devices, seconds, print, same)
    print(f'\n{report.CAVEAT}\n{search.table(reports)}')
    return 0 if reports else 1
  try:
    mesh = sharding.make_mesh(config.mesh, devices)
    kind, tensor = chip_of(devices).name, mesh.shape['tensor']
    price = kernels.prices(kind, config, tensor)
    result = report.examine(config, devices, price, not FLAGS.evaluation)
  except report.DoesNotFit as error:
    print(f'{report.CAVEAT}\n{error}')
    return 1
  if FLAGS.text:
    with open(local(FLAGS.text), 'w') as file:
      file.write(result.compiled.text)
  print(report.describe(result, FLAGS.topology))
  parted = parted_chips(config.mesh, devices)
  if parted:
    print(f'\n{parted}')
  return 1 if result.excess > 0 else 0


def main(argv: list[str]) -> int:
  """The exit code; see gated_jax/cli.py."""
  # The host compiles; it must not look for a TPU of its own.
  jax.config.update('jax_platforms', 'cpu')
  return cli.run(lambda: run(argv))


if __name__ == '__main__':
  sys.exit(main(sys.argv))
