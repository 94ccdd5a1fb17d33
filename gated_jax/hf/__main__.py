"""Checkpoints of Hugging Face's form to ours and back.

    python -m gated_jax.hf import path/of/theirs path/of/ours
    python -m gated_jax.hf export path/of/ours path/of/theirs
    python -m gated_jax.hf add-gate path/of/either path/of/ours

What is written is a new folder, whole or not there at all. The exit code is
2 for what the user has to change, 1 for other failures.
"""

import argparse
import dataclasses
import os
import pathlib
import shutil
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
# What travels with a model, in a folder of its own on our side.
TOKENIZER = 'tokenizer'
TOKENIZER_FILES = (
  'tokenizer.json',
  'tokenizer.model',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'added_tokens.json',
  'vocab.json',
  'merges.txt',
  'chat_template.jinja',
  'generation_config.json',
)


def parser() -> argparse.ArgumentParser:
  """The command line."""
  top = cli.Parser(
    prog='python -m gated_jax.hf', description=(__doc__ or '').split('\n')[0]
  )
  commands = top.add_subparsers(dest='command', required=True)

  def command(name: str, text: str, **more: Any) -> argparse.ArgumentParser:
    found = commands.add_parser(name, help=text, description=text, **more)
    found.add_argument('source', help='folder to read')
    found.add_argument('target', help='new folder')
    found.add_argument(
      '--mesh', default='', help='for example fsdp=4,tensor=2; default: fsdp'
    )
    found.add_argument(
      '--ignore',
      action='append',
      default=[],
      help='key of config.json, or tensor, that changes no logits; repeatable',
    )
    found.add_argument(
      '--param-dtype',
      default='',
      choices=['', 'float32', 'bfloat16'],
      help='of parameters read from a folder of theirs; default: as there',
    )
    return found

  command('import', 'theirs to ours')
  export = command('export', 'ours to theirs')
  export.add_argument(
    '--family',
    default='',
    choices=['', *(family.name for family in FAMILIES)],
    help='default: the first that can describe the model',
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
  export.add_argument('--shard-gb', type=float, default=5.0, help='of a file')
  add = command('add-gate', ADD_GATE, epilog=NEGATIVE)
  add.add_argument(
    '--granularity',
    default='elementwise',
    choices=['elementwise', 'headwise'],
  )
  return top


def make_mesh(text: str) -> jax.sharding.Mesh:
  """All devices, split as 'axis=size,axis=size' says."""
  pairs = [part.partition('=') for part in text.split(',') if part]
  try:
    sizes = {name: int(size) for name, _, size in pairs}
  except ValueError:
    raise ValueError(f'--mesh={text} must be axis=size,axis=size') from None
  return sharding.make_mesh(from_dict(sizes, MeshConfig(), 'mesh.'))


def read(args: argparse.Namespace) -> tuple[RunConfig, Any]:
  """The model at `source`, of either form."""
  source, mesh = pathlib.Path(args.source), make_mesh(args.mesh)
  if not (source / 'config.json').exists():
    if not source.exists():
      raise ValueError(f'there is no folder {source}')
    config = checkpoint.load_config(source)
    abstract = convert.abstract_parameters(config.model, mesh)
    return config, checkpoint.load_parameters(source, abstract)
  model, params = convert.load(source, mesh, args.param_dtype, args.ignore)
  plain = RunConfig()
  length = min(plain.data.length, model.length)
  data = dataclasses.replace(plain.data, length=length)
  return dataclasses.replace(plain, model=model, data=data), params


def write(args: argparse.Namespace, config: RunConfig, params: Any) -> None:
  """A checkpoint of ours, with the files of a tokenizer beside it."""
  target = pathlib.Path(args.target)
  files = tokenizer_files(args.source)
  if files and files[0].name in ('tokenizer.json', 'tokenizer.model'):
    name = str((target / TOKENIZER).absolute())
    data = dataclasses.replace(config.data, tokenizer=name)
    config = dataclasses.replace(config, data=data)
  checkpoint.save_parameters(target, params, config)
  copy(files, target / TOKENIZER, whole=target)


def tokenizer_files(source: str) -> list[pathlib.Path]:
  """Those of a folder of theirs, or of ours that came from one."""
  folders = (pathlib.Path(source), pathlib.Path(source) / TOKENIZER)
  found = [folder / name for name in TOKENIZER_FILES for folder in folders]
  return [path for path in found if path.is_file()]


def copy(
  files: list[pathlib.Path], folder: pathlib.Path, whole: pathlib.Path
) -> None:
  """Copies files; when that fails, `whole` is removed."""
  try:
    if files:
      folder.mkdir(exist_ok=True)
    for file in files:
      shutil.copyfile(file, folder / file.name)
  except BaseException:
    shutil.rmtree(whole, ignore_errors=True)
    raise


def run(args: argparse.Namespace) -> None:
  """Reads, changes, writes."""
  target = pathlib.Path(args.target)
  if target.exists():
    raise ValueError(f'{target} exists; choose another name or remove it')
  config, params = read(args)
  model = config.model
  if args.command == 'add-gate':
    mesh = make_mesh(args.mesh)
    model, params = rewrites.add_gate(model, params, args.granularity, mesh)
  if args.command == 'export':
    for name in args.rewrite:
      model, params = rewrites.REWRITES[name](model, params)
    size = int(args.shard_gb * 10**9)
    convert.save(target, params, model, args.family, args.dtype, size)
    copy(tokenizer_files(args.source), target, whole=target)
  else:
    write(args, dataclasses.replace(config, model=model), params)
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  print(f'{target}: {model.depth} layers, {count:,} parameters')


def main(argv: list[str]) -> int:
  """The exit code; see gated_jax/cli.py."""
  return cli.run(lambda: run(parser().parse_args(argv)))


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
