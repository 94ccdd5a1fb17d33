"""Text from a trained model, printed as it is generated.

    python -m gated_jax.decode --checkpoint=runs/smoke --prompt='def '

    python -m gated_jax.decode --checkpoint=runs/sft --chat

Several prompts (--prompt can be repeated) run as one batch, and each text is
printed when it is whole. --chat talks with the model instead. --tensor and
--fsdp split the model over devices.
The exit code is 2 for what the user has to change, 1 for other failures.
"""

import os
import sys

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

import argparse
import dataclasses
import datetime
import io
import itertools
from collections.abc import Iterable
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from gated_jax import checkpoint
from gated_jax import cli
from gated_jax import sharding
from gated_jax.config import MeshConfig
from gated_jax.config import RunConfig
from gated_jax.data.chat import Chat
from gated_jax.data.text_stream import TextStream
from gated_jax.data.tokenizer import Tokenizer
from gated_jax.data.tokenizer import make_tokenizer
from gated_jax.decode import generation_config
from gated_jax.decode.chat import converse
from gated_jax.decode.chat import typed
from gated_jax.decode.generate import generate
from gated_jax.decode.sampling import Sampling
from gated_jax.decode.sampling import ids_without_token
from gated_jax.decode.weights import load
from gated_jax.paths import expand
from gated_jax.platform import check_devices
from gated_jax.platform import skip_absent_tpu

# Flags that override a model's own generation_config.json.
CHOICES = ('temperature', 'top_k', 'top_p', 'min_p')


def read_flags(argv: list[str]) -> argparse.Namespace:
  """Parses the command line; ValueError in one line where it is wrong."""
  parser = cli.Parser(
    prog='python -m gated_jax.decode',
    description='Samples from a trained model.',
    allow_abbrev=False,
  )
  add: Any = parser.add_argument
  add('--checkpoint', required=True, help='a run, or the folder of a step')
  add('--prompt', action='append', help='text to go on from; repeatable')
  add('--chat', action='store_true', help='talk: every line is a turn')
  add('--system', default='', help='what a talk begins with; needs --chat')
  add('--max_tokens', type=int, default=256, help='new ones of each prompt')
  default = f"default: the model's {generation_config.NAME}, or "
  add('--temperature', type=float, help=f'{default}0: the likeliest token')
  add('--top_k', type=int, help=f'{default}0: all tokens')
  add('--top_p', type=float, help=f'{default}1: all tokens')
  add('--min_p', type=float, help=f'{default}0: all tokens')
  add('--seed', type=int, default=0, help='the same gives the same text')
  add(
    '--stop',
    type=int,
    action='append',
    help=f'id of a token that ends a text; {default}the end of a document',
  )
  add('--tokenizer', default='', help='default: the one of the model')
  add(
    '--special_tokens',
    action='store_true',
    help='text of a prompt that spells a special token becomes that token',
  )
  add(
    '--skip_below',
    type=float,
    default=0.0,
    help='skip heads whose gate is nearly shut; 0: exact; docs/decoding.md',
  )
  add('--tensor', type=int, default=1, help='devices that split heads')
  add('--fsdp', type=int, default=1, help='devices that split parameters')
  return parser.parse_args(argv)


def encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
  """Ids of a document's beginning.

  Raises:
    ValueError: it is empty, or no text.
  """
  if not text:
    raise ValueError('--prompt is empty')
  try:
    text.encode()
  except UnicodeEncodeError:
    raise ValueError(f'--prompt={text!r} is not UTF-8') from None
  first = [tokenizer.bos] if tokenizer.bos >= 0 else []
  ids = np.array([*first, *tokenizer.encode(text)], np.int32)
  if not ids.size:
    raise ValueError(
      f'--prompt={text!r} has no token in tokenizer {tokenizer.name}'
    )
  return ids


def make_mesh(tensor: int, fsdp: int) -> jax.sharding.Mesh:
  """The mesh of as many devices as the flags ask for."""
  for name, size in (('tensor', tensor), ('fsdp', fsdp)):
    if size < 1:
      raise ValueError(f'--{name}={size} must be a number of devices')
  devices = jax.devices()
  count = tensor * fsdp
  if count > len(devices):
    raise ValueError(
      f'--tensor={tensor} --fsdp={fsdp} need {count} devices, and there are '
      f'{len(devices)}'
    )
  config = MeshConfig(tensor=tensor, fsdp=fsdp)
  return sharding.make_mesh(config, devices[:count])


def find_tokenizer(flags: argparse.Namespace, config: RunConfig) -> Tokenizer:
  """The tokenizer that a flag names, or the one of the checkpoint."""
  name = flags.tokenizer or config.data.tokenizer
  tokenizer = make_tokenizer(name, flags.special_tokens)
  for i, text in enumerate(flags.prompt or ()):
    special = [] if flags.special_tokens else tokenizer.special_in(text)
    if special:
      note(
        f'prompt {i} spells {", ".join(special)}, which is read as text; '
        '--special_tokens reads it as tokens'
      )
  return tokenizer


def note(text: str) -> None:
  """Says something that is no part of the generated text."""
  print(f'note: {text}', file=sys.stderr, flush=True)


def choose_sampling(
  flags: argparse.Namespace, tokenizer: Tokenizer, vocab: int
) -> tuple[Sampling, set[int]]:
  """How tokens are chosen, and those that end a text.

  Flags come first, then what the model's authors say, then our defaults.
  """
  folder = expand(tokenizer.name).parent
  stated = generation_config.Defaults()
  if tokenizer.name != 'bytes':
    stated = generation_config.read(folder)
  given = {
    name: getattr(flags, name)
    for name in CHOICES
    if getattr(flags, name) is not None
  }
  never = ids_without_token(tokenizer.known(), vocab)
  sampling = dataclasses.replace(stated.sampling, **given, never=never)
  if sampling.temperature and stated.sampling != Sampling():
    shown = ', '.join(f'{name} {getattr(sampling, name)}' for name in CHOICES)
    note(f'sampling as {generation_config.NAME} and flags say: {shown}')
  for key, value in stated.left_out.items():
    note(f'{generation_config.NAME} has {key}={value!r}, which is left out')
  ends = stated.stop or ((tokenizer.eos,) if tokenizer.eos >= 0 else ())
  return sampling, set(ends if flags.stop is None else flags.stop)


def run(flags: argparse.Namespace) -> None:
  """Prints the prompts and what the model makes of them."""
  if flags.chat and flags.prompt:
    raise ValueError('--prompt does nothing with --chat, which asks for turns')
  if flags.system and not flags.chat:
    raise ValueError(f'--system={flags.system!r} does nothing without --chat')
  if not (flags.prompt or flags.chat):
    raise ValueError("--prompt is missing, for example --prompt='The '")
  check_devices()
  mesh = make_mesh(flags.tensor, flags.fsdp)
  config = checkpoint.load_config(flags.checkpoint)
  tokenizer = find_tokenizer(flags, config)
  vocab = config.model.vocab
  sampling, stop = choose_sampling(flags, tokenizer, vocab)
  if flags.chat:
    return talk(flags, mesh, tokenizer, sampling, stop)
  prompts = [encode(tokenizer, text) for text in flags.prompt]
  _, model, params = load(flags.checkpoint, mesh)
  with sharding.activate(mesh):
    steps = generate(
      model,
      params,
      prompts,
      max_tokens=flags.max_tokens,
      sampling=sampling,
      seed=flags.seed,
      stop=stop,
      skip_below=flags.skip_below,
    )
    streams = [tokenizer.stream(ids) for ids in prompts]
    show(flags.prompt, steps, streams, stop)


def talk(
  flags: argparse.Namespace,
  mesh: jax.sharding.Mesh,
  tokenizer: Tokenizer,
  sampling: Sampling,
  stop: set[int],
) -> None:
  """A conversation; each turn draws by a seed of its own."""
  chat = Chat(tokenizer, flags.special_tokens, datetime.datetime.now())
  stop = stop if flags.stop else stop | chat.stops()
  config, model, params = load(flags.checkpoint, mesh)
  length = config.model.length
  turns = itertools.count()

  def answer(ids: np.ndarray) -> Iterator[int]:
    """Ids that follow a prompt."""
    for row in generate(
      model,
      params,
      [ids],
      max_tokens=flags.max_tokens,
      sampling=sampling,
      seed=(flags.seed + next(turns)) % 2**32,
      stop=stop,
      skip_below=flags.skip_below,
    ):
      yield int(row[0])

  with sharding.activate(mesh):
    room = length - min(flags.max_tokens, length // 4)
    converse(typed(), chat, tokenizer, answer, stop, room, flags.system)


def show(
  texts: list[str],
  steps: Iterable[np.ndarray],
  streams: list[TextStream],
  stop: set[int],
) -> None:
  """Prints a single text as it comes; of several, each when it is whole."""
  single = len(texts) == 1
  parts = [[text] for text in texts]
  open_rows = set(range(len(texts)))
  if single:
    print(texts[0], end='', flush=True)

  def close(row: int) -> None:
    """Prints what is left of a row that has ended."""
    open_rows.discard(row)
    rest = streams[row].finish()
    parts[row].append(rest)
    if single:
      print(rest, flush=True)
    else:
      print(f'[{row}] {"".join(parts[row])}\n', flush=True)

  for tokens in steps:
    for row in sorted(open_rows):
      token = int(tokens[row])
      if token < 0 or token in stop:
        close(row)
        continue
      text = streams[row].feed(token)
      parts[row].append(text)
      if single and text:
        print(text, end='', flush=True)
  for row in sorted(open_rows):
    close(row)


def main(argv: list[str]) -> int:
  """The exit code; see gated_jax/cli.py."""
  skip_absent_tpu()
  # A terminal that cannot show a character shows a question mark.
  if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors='replace')
  return cli.run(lambda: run(read_flags(argv)))


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
