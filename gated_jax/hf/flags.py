"""The command line of `python -m gated_jax.hf`."""

import argparse
import math
from typing import Any

from gated_jax import cli
from gated_jax.hf import rewrites
from gated_jax.hf.families import FAMILIES
from gated_jax.hf.files import DTYPES

ADD_GATE = (
  'give an ungated model a gate that changes nothing at first: zero weights '
  'and 2 sigmoid, so that every score is one'
)
NEGATIVE = (
  'The paper tried a gate added in continued training and reports no gain '
  '(arXiv 2505.06708, appendix A.7): attention sinks and large activations '
  'stay as they were, and by its author the gate hardly moves from one. '
  'Gate a model from the start of its training if you can.'
)


def parser() -> argparse.ArgumentParser:
  """The command line."""
  top = cli.Parser(
    prog='python -m gated_jax.hf',
    description="Checkpoints of Hugging Face's form to ours and back.",
    allow_abbrev=False,
  )
  commands = top.add_subparsers(dest='command', required=True)

  def command(name: str, text: str, **more: Any) -> argparse.ArgumentParser:
    """A command with the flags that all commands have."""
    parser = commands.add_parser(
      name, help=text, description=text, allow_abbrev=False, **more
    )
    parser.add_argument('source', help='folder to read')
    parser.add_argument('target', help='new folder')
    parser.add_argument(
      '--mesh', default='', help='for example fsdp=4,tensor=2; default: fsdp'
    )
    parser.add_argument(
      '--ignore',
      action='append',
      default=[],
      help='key of config.json or name of a tensor that changes no logits, or '
      'a pattern of such (mtp*); repeatable',
    )
    parser.add_argument(
      '--param-dtype',
      default='',
      choices=['', 'float32', 'bfloat16'],
      help='of parameters read from a folder of theirs; default: as there',
    )
    return parser

  text = 'which families of models can be read and written'
  commands.add_parser('list', help=text, description=text, allow_abbrev=False)
  command('import', 'theirs to ours').add_argument(
    '--base',
    default='',
    help='of an adapter that PEFT saved: the folder of its base, of either '
    'form; default: the folder that its adapter_config.json names',
  )
  _add_export_flags(command('export', 'ours to theirs'))
  add = command('add-gate', ADD_GATE, epilog=NEGATIVE)
  add.add_argument(
    '--granularity',
    default='elementwise',
    choices=['elementwise', 'headwise'],
  )
  return top


def _add_export_flags(export: argparse.ArgumentParser) -> None:
  """Adds the flags that only an export has."""
  export.add_argument(
    '--family',
    default='',
    choices=['', *(family.name for family in FAMILIES if family.write)],
    help='default: as it was imported, or the first that can describe it',
  )
  export.add_argument(
    '--dtype', default='', choices=['', *DTYPES], help='of the files'
  )
  export.add_argument(
    '--peft',
    action='store_true',
    help='the adapters alone, as PEFT loads them; default: each is added to '
    'its matrix',
  )
  export.add_argument(
    '--base',
    default='',
    help='with --peft: name or folder that others load the base from',
  )
  export.add_argument(
    '--rewrite',
    action='append',
    default=[],
    choices=list(rewrites.REWRITES),
    help='first turn parameters into others of the same function: norms (scale '
    'as distance from one, or back), two_sigmoid (to sigmoid), headwise (to '
    'elementwise); repeatable',
  )
  export.add_argument(
    '--shard-gb', type=_gigabytes, default=5.0, help='size of a file at most'
  )


def _gigabytes(text: str) -> float:
  """The size of a file, which has to hold a number at least."""
  try:
    size = float(text)
  except ValueError:
    size = math.nan
  if not (math.isfinite(size) and size >= 1e-6):
    raise argparse.ArgumentTypeError(
      f'{text} must be a number of gigabytes, at least 0.000001'
    )
  return size
