"""Runs a program in a process of its own, so that libtpu writes schedules.

libtpu reads its flags once, when it is loaded, and writes every stage of the
compilation of each Pallas kernel into the folder that they name.
"""

import os
import subprocess
import sys
import tempfile
from typing import Any

from gated_jax.aot.topology import QUIET

FLAGS = (
  '--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true '
  '--xla_jf_dump_llo_pass_label_regex=final_'
)


def run_with_dumps(
  module: str, arguments: list[str], **options: Any
) -> subprocess.CompletedProcess[str]:
  """`python -m module arguments --dumps=FOLDER`, when it has ended.

  Args:
    module: its command line takes --dumps, the folder that libtpu writes to.
    arguments: the rest of its command line.
    options: passed on to `subprocess.run`.
  """
  with tempfile.TemporaryDirectory() as folder:
    return subprocess.run(
      [sys.executable, '-m', module, *arguments, f'--dumps={folder}'],
      env={
        **os.environ,
        **QUIET,
        'JAX_PLATFORMS': 'cpu',
        'LIBTPU_INIT_ARGS': FLAGS.format(folder=folder),
      },
      check=False,
      **options,
    )
