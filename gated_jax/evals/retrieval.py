"""Does the model find in a long text what was said somewhere in it?

    filler .. The pass key is 48213. Remember it. .. filler ..
    What is the pass key? The pass key is 48213

`puzzles.py` has the tasks. Teacher-forced: a row counts as found when every
token of the answer is the likeliest one given the text before it. One table of
lengths and depths tells where a model's context ends.

    python -m gated_jax.evals.retrieval --out=runs/tasks/texts.jsonl

writes such texts to train on: a small model that never saw the tasks fails them
at every length. `context.py` measures checkpoints.
"""

import dataclasses
import functools
import json
import math
import sys
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int

from gated_jax import cli
from gated_jax import paths
from gated_jax.evals.puzzles import FILLER
from gated_jax.evals.puzzles import TASKS
from gated_jax.paths import Path

Encode = Callable[[str], Sequence[int] | np.ndarray]


class Form(NamedTuple):
  """Which task, and the tokens that every row begins with."""

  task: str = 'needle'
  start: tuple[int, ...] = ()


class Texts(NamedTuple):
  """Rows of tokens, the last of which are the answer."""

  tokens: Int[np.ndarray, 'B T+1']
  answers: Int[np.ndarray, ' B']  # how many tokens each row's answer has


@dataclasses.dataclass(frozen=True)
class Recall:
  """Results by length (rows) and by depth of the needle (columns)."""

  lengths: tuple[int, ...]
  depths: tuple[float, ...]
  accuracy: np.ndarray  # share of rows whose whole answer was right
  nats: np.ndarray  # per token of the answer

  def scalars(self) -> dict[str, float]:
    """Accuracy by length, for logs."""
    return {
      f'retrieval/{length}': float(row.mean())
      for length, row in zip(self.lengths, self.accuracy, strict=True)
    }


def recall(
  model: nn.Module,
  params: Any,
  encode: Encode,
  lengths: Sequence[int],
  depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
  rows: int = 8,
  seed: int = 0,
  form: Form = Form(),
) -> Recall:
  """Hides `rows` puzzles at each depth of texts of each length.

  Args:
    model: gives logits [B, T, V] of tokens [B, T], as `Decoder` does.
    params: its parameters.
    encode: text to token ids, without marks for beginning and end.
    lengths: in tokens.
    depths: 0 at the beginning of the text, 1 just before the question.
    rows: of one batch.
    seed: of the numbers.
    form: the task, and what rows begin with.
  """
  shape = (len(lengths), len(depths))
  accuracy, nats = np.zeros(shape), np.zeros(shape)
  for i, length in enumerate(lengths):
    for j, depth in enumerate(depths):
      rng = np.random.default_rng((seed, i, j))
      texts = hide(encode, length, depth, rows, rng, form)
      # Answers of most lengths then take one program.
      last = max(int(texts.answers.max()), min(8, length))
      right, cost = _read(model, last, params, texts)
      accuracy[i, j] = np.asarray(right).mean()
      nats[i, j] = float(cost)
  return Recall(tuple(lengths), tuple(depths), accuracy, nats)


def hide(
  encode: Encode,
  length: int,
  depth: float,
  rows: int,
  rng: np.random.Generator,
  form: Form = Form(),
) -> Texts:
  """Rows that end in the question and its answer.

  A model reads `length` tokens of a row: all but the answer's last.

  Raises:
    ValueError: the length has no room for needles and question.
  """
  filler = list(encode(FILLER))
  tokens = np.zeros((rows, length + 1), np.int32)
  answers = np.zeros(rows, np.int32)
  for row in range(rows):
    puzzle = TASKS[form.task](rng)
    needles = [list(encode(needle)) for needle in puzzle.needles]
    question, answer = (
      list(encode(puzzle.question)),
      list(encode(puzzle.answer)),
    )
    ends = [*form.start], [*question, *answer]
    room = length + 1 - sum(map(len, (*needles, *ends)))
    if room < 0:
      raise ValueError(
        f'{length=} is too short for needle, question and answer: they take '
        f'{length - room} tokens'
      )
    text = (filler * math.ceil(room / len(filler) + 1))[:room]
    places = [depth, *rng.random(len(needles) - 1)]
    if puzzle.ordered:
      places = sorted(rng.random(len(needles)))
    # Between sentences, as near to the place as they allow.
    cuts = [
      min(round(place * room / len(filler)) * len(filler), room)
      for place in places
    ]
    hidden: list[int] = []
    last = 0
    for i in np.argsort(cuts, kind='stable'):
      hidden += [*text[last : cuts[i]], *needles[i]]
      last = cuts[i]
    tokens[row] = [*ends[0], *hidden, *text[last:], *ends[1]]
    answers[row] = len(answer)
  return Texts(tokens, answers)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _read(
  model: nn.Module, last: int, params: Any, texts: Any
) -> tuple[Bool[Array, ' B'], Float[Array, '']]:
  """Tells which rows have the right answer; nats per token of the answers."""
  # Compilers for accelerators move the cut before the product: logits of a
  # long text would not fit.
  logits: Any = model.apply({'params': params}, texts.tokens[:, :-1])
  logits = logits[:, -last:].astype(jnp.float32)
  targets = texts.tokens[:, -last:]
  asked = jnp.arange(last) >= last - texts.answers[:, None]
  right = jnp.argmax(logits, axis=-1) == targets
  correct = jnp.all(right | ~asked, axis=1)
  costs = jax.nn.log_softmax(logits, axis=-1)
  costs = -jnp.take_along_axis(costs, targets[..., None], axis=-1)[..., 0]
  return correct, jnp.sum(costs, where=asked) / jnp.sum(asked)


def write(path: Path, documents: int, least: int, most: int) -> None:
  """Writes texts of all tasks as JSONL, one with its answer in each line.

  Args:
    path: of the file; its folder is made.
    documents: how many.
    least, most: characters of a text, drawn evenly in between.
  """
  rng = np.random.default_rng(0)
  tasks = list(TASKS)
  lines = []
  for number in range(documents):
    length = int(rng.integers(least, most + 1))
    form = Form(tasks[number % len(tasks)])
    texts = hide(lambda x: x.encode(), length, rng.random(), 1, rng, form)
    text = bytes(texts.tokens[0].tolist()).decode() + '.\n'
    lines.append(json.dumps({'text': text}) + '\n')
  if not paths.in_bucket(path):
    path.parent.mkdir(parents=True, exist_ok=True)
  paths.write_bytes(path, ''.join(lines).encode())


def main(argv: Sequence[str]) -> None:
  """The command that writes texts."""
  parser = cli.Parser(
    prog='python -m gated_jax.evals.retrieval',
    description='Writes texts of the tasks, to be mixed into training text.',
  )
  parser.add_argument('--out', type=paths.expand, required=True)
  parser.add_argument('--documents', type=int, default=10_000)
  parser.add_argument('--least', type=int, default=400, help='characters')
  parser.add_argument('--most', type=int, default=1600, help='characters')
  options = parser.parse_args(argv)
  if not 0 < options.least <= options.most or options.documents < 1:
    raise ValueError(
      f'--documents={options.documents} must be positive, and '
      f'--least={options.least} between 1 and --most={options.most}'
    )
  paths.check_bucket(options.out)
  write(options.out, options.documents, options.least, options.most)
  print(options.out)


if __name__ == '__main__':
  sys.exit(cli.run(lambda: main(sys.argv[1:])))
