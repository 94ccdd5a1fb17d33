"""Prepares what a run reads, and shows it.

    python -m gated_jax.data tokenize --paths='text/*.txt' --out=tokens \\
      --train-tokenizer=16000
    python -m gated_jax.data look --config=configs/smoke.py

Commands:
    tokenize   text to token arrays, so that training need not tokenise
    look       what a run would read: sources, documents, the first rows
"""

import argparse
import logging
import os
import sys
from typing import Any

from gated_jax import cli
from gated_jax.data.tokenize import Work
from gated_jax.data.tokenize import tokenize

TEXT = ('text', 'jsonl', 'parquet', 'array_record', 'stdlib')


def parser() -> cli.Parser:
  """The command line."""
  top = cli.Parser(prog='python -m gated_jax.data', allow_abbrev=False)
  commands = top.add_subparsers(dest='command', required=True)
  made = commands.add_parser(
    'tokenize', help='text to token arrays', allow_abbrev=False
  )
  add: Any = made.add_argument
  add('--paths', default='', help='globs, comma-separated; ** is any depth')
  add('--out', required=True, help='the folder; begun before, it goes on')
  add('--source', choices=TEXT, default=Work.source)
  add('--column', default=Work.column, help='the field that holds the text')
  add('--tokenizer', default=Work.tokenizer, help='a path, or bytes')
  add(
    '--train-tokenizer',
    type=int,
    default=0,
    metavar='VOCAB',
    help='make a byte-level BPE tokenizer of so many tokens first',
  )
  add(
    '--special-tokens',
    action='store_true',
    help='text that spells a special token becomes it',
  )
  add('--max-document', type=int, default=Work.max_document, help='bytes')
  add('--workers', type=int, default=os.cpu_count() or 1, help='processes')
  shown = commands.add_parser(
    'look',
    help='what a run would read',
    epilog='--config=FILE and --config.name=value follow, as for train.py.',
    allow_abbrev=False,
  )
  shown.add_argument('--tokens', type=int, default=0, help='at most; 0: all')
  shown.add_argument('--rows', type=cli.count, default=2, help='to print')
  return top


def run(argv: list[str]) -> None:
  """One command."""
  flags, words = parser().parse_known_args(argv)
  if flags.command == 'look':
    return show(flags, words)
  if words:
    raise ValueError(f'unrecognized arguments: {" ".join(words)}')
  values = vars(flags)
  values.pop('command')
  work = Work(**values)
  counts = tokenize(work)
  tokens, documents = counts.tokens, counts.documents
  own = work.train_tokenizer or work.tokenizer != 'bytes'
  print(
    f'{documents:,} documents, {tokens:,} tokens '
    f'({tokens / max(documents, 1):.1f} a document, '
    f'{counts.text_bytes / max(tokens, 1):.2f} bytes a token), '
    f'{counts.skipped} files or parts skipped\n'
    f'train on them with --config.data.source=tokens '
    f"--config.data.paths='{work.folder}/*.bin' "
    f'--config.data.tokenizer={work.folder if own else "bytes"}'
  )


def show(flags: argparse.Namespace, words: list[str]) -> None:
  """Prints what the run of a config would read."""
  from gated_jax import config_flag
  from gated_jax.data.look import look

  if flags.tokens < 0:
    raise ValueError(f'--tokens={flags.tokens} must be positive, or 0 for all')
  config = config_flag.read(['look', *words], 'configs/smoke.py')
  for line in look(config.data, config.model.vocab, flags.tokens, flags.rows):
    print(line, flush=True)


def main(argv: list[str]) -> int:
  """The exit code; see gated_jax/cli.py."""
  logging.basicConfig(format='%(message)s')
  return cli.run(lambda: run(argv))


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
