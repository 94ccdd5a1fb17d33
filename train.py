"""Trains a model: flags to RunConfig to training loop, and nothing else.

    python train.py --config=configs/smoke.py --workdir=runs/smoke

Any setting can follow: --config.steps=500 --config.model.depth=8; --help=model
prints those of the model, with their defaults. Started again with the same
workdir, it goes on from the newest checkpoint. On several processes, add
--distributed (TPU pods and Slurm tell the rest) or say it all:
--coordinator=host:port --processes=2 --process_id=0.
"""

import logging
import os
import shlex
import sys

# JAX's C++ side prints warnings before Python is heard; users can raise this.
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

from absl import flags

from gated_jax import cli
from gated_jax import config_flag
from gated_jax import processes
from gated_jax.config import RunConfig
from gated_jax.paths import expand
from gated_jax.paths import in_bucket
from gated_jax.platform import check_devices
from gated_jax.platform import skip_absent_tpu
from gated_jax.processes import Group

FLAGS = flags.FLAGS
flags.DEFINE_string('workdir', '', 'Folder of the run, also gs://bucket/x.')
flags.DEFINE_bool('distributed', False, 'Several processes, found by JAX.')
flags.DEFINE_string('coordinator', '', 'host:port of process 0.')
flags.DEFINE_integer('processes', 0, 'How many there are; 0: found by JAX.')
flags.DEFINE_integer('process_id', -1, 'Which one this is; -1: found by JAX.')
flags.DEFINE_integer(
  'join_timeout',
  Group().join_timeout,
  'Seconds to wait for the others.',
  lower_bound=1,
)
flags.DEFINE_integer(
  'peer_timeout',
  Group().peer_timeout,
  'Seconds without a sign of life until another process is gone.',
  lower_bound=2,
)
flags.DEFINE_bool('debug', False, 'Show where in the code an error arose.')


def read_flags(argv: list[str]) -> RunConfig:
  """The settings; ValueError in one line where the command line is wrong."""
  config = config_flag.read(argv, 'configs/smoke.py')
  if not FLAGS.workdir:
    raise ValueError('--workdir is missing, for example runs/smoke')
  return config


def main(argv: list[str]) -> int:
  """The exit code; see docs/tpu_vm.md."""
  logging.basicConfig(format='%(message)s')
  failed = True

  def program() -> int:
    """Trains, and notes that it ended without an error."""
    nonlocal failed
    code = train(argv)
    failed = False
    return code

  code = cli.run(program, debug='--debug' in argv)
  if failed:
    processes.leave(code)
    if FLAGS.is_parsed() and in_bucket(FLAGS.workdir):
      cli.leave(code)
  return code


def train(argv: list[str]) -> int:
  """Trains as the command line says; returns the exit code."""
  help_text = config_flag.help_wanted(argv, __doc__)
  if help_text is not None:
    print(help_text)
    return cli.DONE
  config = read_flags(argv)
  make_loss = config_flag.loss_maker()
  skip_absent_tpu()
  group = Group(
    FLAGS.coordinator,
    FLAGS.processes,
    FLAGS.process_id,
    FLAGS.join_timeout,
    FLAGS.peer_timeout,
  )
  several = FLAGS.distributed or group[:3] != Group()[:3]
  if several:
    processes.join(group)
  check_devices()
  from gated_jax.training import loop

  command = shlex.join(sys.orig_argv)  # with the interpreter as typed
  try:
    own = {'loss': make_loss()} if make_loss else {}
    result = loop.run(config, expand(FLAGS.workdir), command, **own)
  except RuntimeError as error:
    if several:
      processes.until_explained(error, group.peer_timeout)
    raise
  # Of several processes, most do not know which signal another one had.
  if result.stopped_by == 'SIGINT' and not several:
    return cli.INTERRUPTED
  return cli.UNFINISHED if result.stopped_by else cli.DONE


if __name__ == '__main__':
  sys.exit(main(sys.argv))
