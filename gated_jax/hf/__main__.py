"""Checkpoints of Hugging Face's form to ours and back.

    python -m gated_jax.hf import path/of/theirs path/of/ours
    python -m gated_jax.hf export path/of/ours path/of/theirs
    python -m gated_jax.hf export --peft path/of/ours path/of/an/adapter
    python -m gated_jax.hf add-gate path/of/either path/of/ours
    python -m gated_jax.hf list

What is written is a new folder, whole or not there at all. A tokenizer travels
with its model. The exit code is 2 for what the user has to change, 1 for other
failures.
"""

import argparse
import dataclasses
import os
import pathlib
import sys
from typing import Any

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

import jax

from gated_jax import checkpoint
from gated_jax import cli
from gated_jax import sharding
from gated_jax.checkpoint.folder import check_place
from gated_jax.config import MeshConfig
from gated_jax.config import RunConfig
from gated_jax.config import from_dict
from gated_jax.hf import convert
from gated_jax.hf import listing
from gated_jax.hf import rewrites
from gated_jax.hf import tokenizer
from gated_jax.hf.config import choose_family
from gated_jax.hf.config import find_family
from gated_jax.hf.files import read_json
from gated_jax.hf.flags import parser
from gated_jax.hf.new_folder import check_free
from gated_jax.hf.new_folder import uploading
from gated_jax.hf.new_folder import whole_folder
from gated_jax.hf.peft import CONFIG as ADAPTER
from gated_jax.hf.peft import read as peft_read
from gated_jax.hf.peft import settings as peft_settings
from gated_jax.hf.peft import write as peft_write
from gated_jax.memory import give_back_freed
from gated_jax.model import adapters
from gated_jax.model.abstract import abstract_parameters
from gated_jax.paths import Path
from gated_jax.paths import absolute
from gated_jax.paths import check_bucket
from gated_jax.paths import exists
from gated_jax.paths import expand
from gated_jax.paths import is_file
from gated_jax.paths import is_folder
from gated_jax.platform import check_devices
from gated_jax.platform import skip_absent_tpu


def make_mesh(text: str) -> jax.sharding.Mesh:
  """All devices, split as 'axis=size,axis=size' says."""
  pairs = [part.partition('=') for part in text.split(',') if part]
  try:
    sizes = {name: int(size) for name, _, size in pairs}
  except ValueError:
    raise ValueError(f'--mesh={text} must be axis=size,axis=size') from None
  return sharding.make_mesh(from_dict(sizes, MeshConfig(), 'mesh.'))


def read(args: argparse.Namespace) -> tuple[RunConfig, Any, tokenizer.Files]:
  """The model at `source`, of any form, and its tokenizer's files."""
  source, mesh = expand(args.source), make_mesh(args.mesh)
  check_bucket(source)
  if _is_there(source / ADAPTER) and args.command == 'import':
    return _read_adapter(args, source, mesh)
  if _is_there(source / 'config.json'):
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
  if not exists(source):
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


def _is_there(path: Path) -> bool:
  """Tells whether there is a file, or a link to what may be none."""
  if isinstance(path, pathlib.Path):
    return os.path.lexists(path)
  return is_file(path)


def _read_adapter(
  args: argparse.Namespace, source: Path, mesh: jax.sharding.Mesh
) -> tuple[RunConfig, Any, tokenizer.Files]:
  """A base with the adapters that PEFT saved in a folder."""
  settings = peft_settings.read_settings(read_json(source / ADAPTER))
  named = settings.base
  base = expand(args.base or named)
  if not (args.base or (named and is_folder(base))):
    raise ValueError(
      f'{source} is an adapter for {named or "a base that it does not name"}: '
      'say with --base=FOLDER where its base is'
    )
  there = argparse.Namespace(**{**vars(args), 'source': str(base)})
  if _is_there(base / ADAPTER):
    raise ValueError(f'--base={base} is an adapter itself')
  config, params, files = read(there)
  if config.model.lora.rank:
    config, params = _merged(config, params)
  family = choose_family(config.model, config.export_as).name
  model, params = peft_read.load(source, config.model, params, family, mesh)
  if named and pathlib.Path(named).name != base.name:
    print(f'the adapter names {named} as its base, and {base} is taken')
  optimizer = dataclasses.replace(config.optimizer, train='adapters')
  config = dataclasses.replace(config, model=model, optimizer=optimizer)
  return config, params, tokenizer.in_folder(source) or files


def write_ours(
  target: Path, config: RunConfig, params: Any, files: tokenizer.Files
) -> None:
  """A checkpoint of ours, with the files of a tokenizer beside it."""
  if set(tokenizer.MODELS) & set(files):
    name = str(absolute(target / checkpoint.TOKENIZER))
    data = dataclasses.replace(config.data, tokenizer=name)
    config = dataclasses.replace(config, data=data)
  if not isinstance(target, pathlib.Path):
    with uploading(target):
      checkpoint.save_parameters(target, params, config)
      tokenizer.copy(files, target / checkpoint.TOKENIZER)
    return
  with whole_folder(target) as (partial, _):
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
  target, model = expand(args.target), config.model

  def more(folder: pathlib.Path) -> None:
    """Puts the tokenizer's files beside the weights."""
    tokenizer.copy(files, folder)
    if not files and config.data.tokenizer == 'bytes':
      tokenizer.write_bytes(folder, model.length)

  plain = adapters.plain(model)
  family = args.family or choose_family(plain, config.export_as).name
  if args.peft:
    name, dtype = args.base, args.dtype
    peft_write.save(target, params, model, family, name, dtype, more)
    return
  size = int(args.shard_gb * 10**9)
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


def _check_peft(args: argparse.Namespace) -> None:
  """ValueError for flags of an export that do not go together."""
  if args.peft and args.rewrite:
    raise ValueError(
      '--rewrite changes the base, and --peft leaves it as it is: use one of '
      'them'
    )
  if args.base and not args.peft:
    raise ValueError(f'--base={args.base} does nothing without --peft')


def run(args: argparse.Namespace) -> None:
  """Reads, changes, writes."""
  if args.command == 'list':
    print(listing.text())
    return
  check_devices()
  target = expand(args.target)
  if args.command != 'export':
    check_place(target)
  check_free(target)
  apart = args.command == 'export' and args.peft
  if args.command == 'export':
    _check_peft(args)
  config, params, files = read(args)
  if apart and not config.model.lora.rank:
    raise ValueError(f'{args.source} has no adapters, which --peft would write')
  if config.model.lora.rank and args.command != 'import' and not apart:
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
  if apart:
    count = sum(x.size for x in jax.tree.leaves(adapters.alone(params)))
  print(f'{target}: {model.depth} layers, {count:,} parameters')


def main(argv: list[str]) -> int:
  """The exit code; see gated_jax/cli.py."""
  skip_absent_tpu()
  give_back_freed()
  return cli.run(lambda: run(parser().parse_args(argv)))


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
