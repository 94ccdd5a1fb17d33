"""Text from a trained model, printed as it is generated.

    python -m gated_jax.decode --checkpoint=runs/smoke --prompt='def '

Several prompts (--prompt can be repeated) run as one batch, and each text is
printed when it is whole. --tensor and --fsdp split the model over devices.
The exit code is 2 for what the user has to change, 1 for other failures.
"""

import os
import sys

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

import argparse
from typing import Any

import jax
import numpy as np

from gated_jax import cli
from gated_jax import sharding
from gated_jax.config import MeshConfig
from gated_jax.data.tokenizer import Tokenizer
from gated_jax.data.tokenizer import make_tokenizer
from gated_jax.decode.generate import generate
from gated_jax.decode.sampling import Sampling
from gated_jax.decode.weights import load
from gated_jax.platform import skip_absent_tpu


def read_flags(argv: list[str]) -> argparse.Namespace:
  """Parses the command line; ValueError in one line where it is wrong."""
  default = Sampling()
  parser = cli.Parser(
    prog='python -m gated_jax.decode',
    description='Samples from a trained model.',
    allow_abbrev=False,
  )
  add: Any = parser.add_argument
  add('--checkpoint', required=True, help='a run, or the folder of a step')
  add('--prompt', action='append', help='text to go on from; repeatable')
  add('--max_tokens', type=int, default=256, help='new ones of each prompt')
  add('--temperature', type=float, default=default.temperature)
  add('--top_k', type=int, default=default.top_k, help='0: all tokens')
  add('--top_p', type=float, default=default.top_p)
  add('--min_p', type=float, default=default.min_p)
  add('--seed', type=int, default=0)
  add(
    '--stop',
    type=int,
    action='append',
    help="token id; default: the text's end",
  )
  add('--tokenizer', default='', help='default: the one of the training run')
  add(
    '--skip_below', type=float, default=0.0, help='0: exact; docs/decoding.md'
  )
  add('--tensor', type=int, default=1, help='devices that split heads')
  add('--fsdp', type=int, default=1, help='devices that split parameters')
  return parser.parse_args(argv)


def encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
  """Ids of a document's beginning."""
  if not text:
    raise ValueError('--prompt is empty')
  ids = tokenizer.encode(text)
  first = [tokenizer.bos] if tokenizer.bos >= 0 else []
  return np.concatenate([np.array(first, np.int32), ids])


def _mesh(flags: argparse.Namespace) -> jax.sharding.Mesh:
  config = MeshConfig(tensor=flags.tensor, fsdp=flags.fsdp)
  count = flags.tensor * flags.fsdp
  devices = jax.devices()
  if count > len(devices):
    raise ValueError(
      f'--tensor={flags.tensor} --fsdp={flags.fsdp} need {count} devices, and '
      f'there are {len(devices)}'
    )
  return sharding.make_mesh(config, devices[:count])


def run(flags: argparse.Namespace) -> None:
  """Prints the prompts and what the model makes of them."""
  if not flags.prompt:
    raise ValueError("--prompt is missing, for example --prompt='def '")
  sampling = Sampling(flags.temperature, flags.top_k, flags.top_p, flags.min_p)
  mesh = _mesh(flags)
  config, model, params = load(flags.checkpoint, mesh)
  tokenizer = make_tokenizer(flags.tokenizer or config.data.tokenizer)
  prompts = [encode(tokenizer, text) for text in flags.prompt]
  ends = [tokenizer.eos] if tokenizer.eos >= 0 else []
  stop = set(ends if flags.stop is None else flags.stop)
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
    _print(flags.prompt, steps, tokenizer, stop)


def _print(
  texts: list[str], steps: Any, tokenizer: Tokenizer, stop: set[int]
) -> None:
  """One prompt's text as it comes; of several, each when it is whole."""
  single = len(texts) == 1
  streams = [tokenizer.stream() for _ in texts]
  found = [[text] for text in texts]
  open_rows = set(range(len(texts)))
  if single:
    print(texts[0], end='', flush=True)

  def close(row: int) -> None:
    open_rows.discard(row)
    rest = streams[row].finish()
    found[row].append(rest)
    if single:
      print(rest, flush=True)
    else:
      print(f'[{row}] {"".join(found[row])}\n', flush=True)

  for tokens in steps:
    for row in sorted(open_rows):
      token = int(tokens[row])
      if token < 0 or token in stop:
        close(row)
        continue
      text = streams[row].feed(token)
      found[row].append(text)
      if single and text:
        print(text, end='', flush=True)
  for row in sorted(open_rows):
    close(row)


def main(argv: list[str]) -> int:
  """The exit code; see gated_jax/cli.py."""
  skip_absent_tpu()
  return cli.run(lambda: run(read_flags(argv)))


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
