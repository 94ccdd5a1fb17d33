"""Checkpoints of Hugging Face's form to ours and back.

    python -m gated_jax.hf import path/of/theirs path/of/ours
    python -m gated_jax.hf export path/of/ours path/of/theirs
    python -m gated_jax.hf add-gate path/of/either path/of/ours
    python -m gated_jax.hf list

What is written is a new folder, whole or not there at all. A tokenizer travels
with its model. The exit code is 2 for what the user has to change, 1 for other
failures.
"""

import argparse
import dataclasses
import math
import os
import pathlib
import sys
from typing import Any

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

import jax

from gated_jax import checkpoint
from gated_jax import cli
from gated_jax import sharding
from gated_jax.config import MeshConfig
from gated_jax.config import RunConfig
from gated_jax.config import from_dict
from gated_jax.hf import convert
from gated_jax.hf import listing
from gated_jax.hf import rewrites
from gated_jax.hf import tokenizer
from gated_jax.hf.config import choose_family
from gated_jax.hf.config import find_family
from gated_jax.hf.families import FAMILIES
from gated_jax.hf.files import DTYPES
from gated_jax.hf.files import check_free
from gated_jax.hf.files import read_json
from gated_jax.hf.files import whole_folder
from gated_jax.model import adapters
from gated_jax.model.abstract import abstract_parameters
from gated_jax.paths import local
from gated_jax.platform import check_devices
from gated_jax.platform import skip_absent_tpu

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
    description=(__doc__ or '').split('\n')[0],
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
      help='key of config.json, or pattern of tensors (mtp.*), that changes no '
      'logits; repeatable',
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
  command('import', 'theirs to ours')
  _add_export_flags(command('export', 'ours to theirs'))
  add = command('add-gate', ADD_GATE, epilog=NEGATIVE)
  add.add_argument(
    '--granularity',
    default='elementwise',
    choices=['elementwise', 'headwise'],
  )
  return top


def _add_export_flags(export: argparse.ArgumentParser) -> None:
  """What only an export is told."""
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


def make_mesh(text: str) -> jax.sharding.Mesh:
  """All devices, split as 'axis=size,axis=size' says."""
  pairs = [part.partition('=') for part in text.split(',') if part]
  try:
    sizes = {name: int(size) for name, _, size in pairs}
  except ValueError:
    raise ValueError(f'--mesh={text} must be axis=size,axis=size') from None
  return sharding.make_mesh(from_dict(sizes, MeshConfig(), 'mesh.'))


def read(args: argparse.Namespace) -> tuple[RunConfig, Any, tokenizer.Files]:
  """The model at `source`, of either form, and its tokenizer's files."""
  source, mesh = local(args.source), make_mesh(args.mesh)
  if os.path.lexists(source / 'config.json'):
    files = tokenizer.in_folder(source)
    model, params = convert.load(
      source, mesh, args.param_dtype, args.ignore, print
    )
    plain = RunConfig()
    length = min(plain.data.length, model.length)
    data = dataclasses.replace(plain.data, length=length)
    family = find_family(read_json(source / 'config.json'))
    config = dataclasses.replace(
      plain,
      model=model,
      data=data,
      export_as=family.name if family.write else '',
    )
    return config, params, files
  if not source.exists():
    raise ValueError(f'there is no folder {source}')
  folder = checkpoint.find(source)
  config = checkpoint.load_config(folder)
  files = tokenizer.of_run(config.data.tokenizer)
  abstract = abstract_parameters(config.model, mesh)
  return (
    config,
    checkpoint.load_parameters(folder, abstract, sparing=True),
    files,
  )


def write_ours(
  target: pathlib.Path, config: RunConfig, params: Any, files: tokenizer.Files
) -> None:
  """A checkpoint of ours, with the files of a tokenizer beside it."""
  if set(tokenizer.MODELS) & set(files):
    name = str((target / checkpoint.TOKENIZER).absolute())
    data = dataclasses.replace(config.data, tokenizer=name)
    config = dataclasses.replace(config, data=data)
  with whole_folder(target) as partial:
    partial.rmdir()  # a checkpoint makes its own
    checkpoint.save_parameters(partial, params, config)
    tokenizer.copy(files, partial / checkpoint.TOKENIZER)


def write_theirs(
  args: argparse.Namespace,
  config: RunConfig,
  params: Any,
  files: tokenizer.Files,
) -> None:
  """A folder of theirs, with the files of a tokenizer in it."""
  target, model = local(args.target), config.model

  def more(folder: pathlib.Path) -> None:
    """Puts the tokenizer's files beside the weights."""
    tokenizer.copy(files, folder)
    if not files and config.data.tokenizer == 'bytes':
      tokenizer.write_bytes(folder, model.length)

  size = int(args.shard_gb * 10**9)
  family = args.family or choose_family(model, config.export_as).name
  convert.save(target, params, model, family, args.dtype, size, more)


def _merged(config: RunConfig, params: Any) -> tuple[RunConfig, Any]:
  """The model without adapters; sums take the memory of their matrices."""
  print('adapters are added to their matrices')

  def merge(base: Any, more: Any) -> Any:
    """The parameters alone, which may be traced."""
    whole = adapters.put(base, more)
    return adapters.merge(config.model, whole, keep_dtype=True)[1]

  new = dataclasses.replace(
    config,
    model=adapters.plain(config.model),
    optimizer=dataclasses.replace(config.optimizer, train='all'),
  )
  base, more = adapters.without(params), adapters.alone(params)
  return new, jax.jit(merge, donate_argnums=0)(base, more)


def run(args: argparse.Namespace) -> None:
  """Reads, changes, writes."""
  if args.command == 'list':
    print(listing.text())
    return
  check_devices()
  target = local(args.target)
  check_free(target)
  config, params, files = read(args)
  if config.model.lora.rank:
    config, params = _merged(config, params)
  model = config.model
  if args.command == 'add-gate':
    mesh = make_mesh(args.mesh)
    model, params = rewrites.add_gate(model, params, args.granularity, mesh)
  if args.command == 'export':
    for name in args.rewrite:
      model, params = rewrites.REWRITES[name](model, params)
  config = dataclasses.replace(config, model=model)
  if args.command == 'export':
    write_theirs(args, config, params, files)
  else:
    write_ours(target, config, params, files)
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  print(f'{target}: {model.depth} layers, {count:,} parameters')


def main(argv: list[str]) -> int:
  """The exit code; see gated_jax/cli.py."""
  skip_absent_tpu()
  return cli.run(lambda: run(parser().parse_args(argv)))


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
