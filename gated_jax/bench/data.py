"""Tokens that the data pipeline makes per second of one core's time.

What is measured takes turns, round by round, on the same documents:

    ours    `make_pipeline`, from files to batches on the host
    loop    a plain loop over the same mapped array, document by document, with
            the same hash and the same rows
    floor   NumPy alone, a block at a time and without the hash: what the four
            arrays of a batch cost
    library `encode_batch` of the tokenizer's own package, for text

CPU time is what all threads of the process have used, so other programs on the
machine do not count.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int

from gated_jax.config import DataConfig
from gated_jax.data.pipeline import Pipeline
from gated_jax.data.pipeline import make_pipeline
from gated_jax.data.text_sources import stdlib_files
from gated_jax.data.train_tokenizer import train_tokenizer

Record = dict[str, Any]
VOCAB, END = 16_000, 0
LENGTH, BATCH, WINDOW = 1024, 16, 1 << 20
HELD_OUT = 0.05


def write_tokens(
  folder: pathlib.Path, tokens: int, mean: int, files: int
) -> str:
  """Files of random ids, uint16, with documents of about `mean` ids."""
  random = np.random.default_rng(0)
  for number in range(files):
    ids = random.integers(1, VOCAB, tokens // files, np.uint16)
    ids[random.random(len(ids)) < 1 / mean] = END
    path = folder / f'{number:04d}.bin'
    ids.tofile(path)
    about = {'dtype': 'uint16', 'eos': END}
    pathlib.Path(f'{path}.json').write_text(json.dumps(about))
  return f'{folder}/*.bin'


def config_of(source: str, paths: str, **more: Any) -> DataConfig:
  """Settings of every pipeline here."""
  return DataConfig(
    source=source,
    paths=paths,
    batch=BATCH,
    length=LENGTH,
    shuffle_tokens=WINDOW,
    validation=HELD_OUT,
    **more,
  )


def plain_loop(paths: list[pathlib.Path]) -> Iterator[dict[str, np.ndarray]]:
  """Batches by a loop that any programmer would write first, for ever."""
  chunks: list[np.ndarray] = []
  rows: list[dict[str, np.ndarray]] = []
  room = LENGTH
  for ids in _documents(itertools.cycle(paths)):
    begin = 0
    while begin < len(ids) - 1:
      take = min(room, len(ids) - 1 - begin)
      chunks.append(ids[begin : begin + take + 1])
      begin += take
      room -= take
      if not room:
        rows.append(_row(chunks))
        chunks, room = [], LENGTH
    if len(rows) >= BATCH:
      yield {k: np.stack([row[k] for row in rows[:BATCH]]) for k in rows[0]}
      del rows[:BATCH]


def _documents(
  paths: Iterator[pathlib.Path],
) -> Iterator[Int[np.ndarray, ' T']]:
  """Yields the documents of arrays that are not held out."""
  limit = int(HELD_OUT * 2.0**64)
  for path in paths:
    array = np.memmap(path, np.uint16, mode='r')
    begin = 0
    for end in (np.flatnonzero(array == END) + 1).tolist():
      ids = array[begin:end].astype(np.int32)
      begin = end
      digest = hashlib.blake2b(ids.tobytes(), digest_size=16).digest()
      if int.from_bytes(digest[:8], 'big') >= limit:
        yield ids


def _row(chunks: list[np.ndarray]) -> dict[str, np.ndarray]:
  row = {
    name: np.zeros(LENGTH, np.int32)
    for name in ('tokens', 'targets', 'segments', 'positions')
  }
  begin = 0
  for number, chunk in enumerate(chunks, 1):
    end = begin + len(chunk) - 1
    row['tokens'][begin:end] = chunk[:-1]
    row['targets'][begin:end] = chunk[1:]
    row['segments'][begin:end] = number
    row['positions'][begin:end] = np.arange(end - begin)
    begin = end
  row['weights'] = np.ones(LENGTH, np.float32)
  return row


def floor(paths: list[pathlib.Path]) -> Iterator[dict[str, np.ndarray]]:
  """Batches of the ids as they lie there, all of a block at once, for ever."""
  size = BATCH * LENGTH
  place = np.arange(size, dtype=np.int32)
  for path in itertools.cycle(paths):
    array = np.memmap(path, np.uint16, mode='r')
    for begin in range(0, len(array) - size, size):
      ids = array[begin : begin + size + 1].astype(np.int32)
      starts = ids[:-1] == END
      starts[::LENGTH] = True
      segments = np.cumsum(starts, dtype=np.int32)
      latest = np.maximum.accumulate(np.where(starts, place, 0))
      yield {
        'tokens': ids[:-1].reshape(BATCH, LENGTH),
        'targets': ids[1:].reshape(BATCH, LENGTH).copy(),
        'segments': segments.reshape(BATCH, LENGTH),
        'positions': (place - latest).reshape(BATCH, LENGTH),
        'weights': np.ones((BATCH, LENGTH), np.float32),
      }


def quiet() -> float:
  """The process's CPU seconds, once its threads have nothing left to do."""
  # On a busy machine a thread that has work may not run for a long while.
  before, still = time.process_time(), 0
  while still < 8:
    time.sleep(0.04)
    now = time.process_time()
    still = still + 1 if now - before < 0.002 else 0
    before = now
  return before


def speed(batches: Iterator[Any], tokens: int) -> float:
  """Tokens per CPU second; what is read ahead counts where it is made."""
  start = quiet()
  for _ in range(tokens // (BATCH * LENGTH)):
    next(batches)
  return tokens / (quiet() - start)


def in_turns(
  functions: Mapping[str, Callable[[], float]], rounds: int
) -> Record:
  """Medians of what functions return, called one after the other.

  The first function is compared with the second: `ratio` is the median over the
  rounds, `least` and `most` are its smallest and largest.
  """
  samples: dict[str, list[float]] = {name: [] for name in functions}
  for _ in range(rounds):
    for name, function in functions.items():
      samples[name].append(function())
  record: Record = {
    name: statistics.median(speeds) for name, speeds in samples.items()
  }
  if len(samples) > 1:
    ours, other, *_ = samples.values()
    ratios = [a / b for a, b in zip(ours, other, strict=True)]
    record['ratio'] = statistics.median(ratios)
    record |= {'least': min(ratios), 'most': max(ratios)}
  return record


def _first_batch(config: DataConfig) -> tuple[Pipeline, float]:
  """An open pipeline, and the CPU seconds to its first batch."""
  start = time.process_time()
  pipeline = make_pipeline(config, 'train', vocab=VOCAB)
  next(pipeline)
  return pipeline, time.process_time() - start


def arrays(rounds: int, tokens: int) -> Iterator[Record]:
  """Documents of several lengths, then several numbers of files."""
  cases = [(mean, 5) for mean in (50, 200, 1000, 5000)]
  cases += [(1000, files) for files in (1, 2, 20, 100, 1000)]
  for mean, files in cases:
    with tempfile.TemporaryDirectory() as name:
      folder = pathlib.Path(name)
      config = config_of('tokens', write_tokens(folder, tokens, mean, files))
      paths = sorted(folder.glob('*.bin'))
      pipeline, first = _first_batch(config)
      with pipeline:
        turns: dict[str, Iterator[Any]] = {'ours': pipeline}
        if files == 5:
          turns |= {'loop': plain_loop(paths), 'floor': floor(paths)}
        functions = {
          kind: functools.partial(speed, batches, 2 * WINDOW)
          for kind, batches in turns.items()
        }
        times = in_turns(functions, rounds)
    record = {'bench': 'data', 'source': 'tokens', 'mean': mean, **times}
    yield record | {'files': files, 'first_s': first}


def _texts(size: int) -> list[str]:
  """Pieces of about a thousand characters of the interpreter's own library."""
  texts: list[str] = []
  for name in stdlib_files():
    text = pathlib.Path(name).read_text(encoding='utf-8', errors='ignore')
    lines = text.splitlines(keepends=True)
    texts += [''.join(lines[i : i + 30]) for i in range(0, len(lines), 30)]
    if sum(map(len, texts)) > size:
      break
  return [text for text in texts if text.strip()]


def _sentence_piece(folder: pathlib.Path, texts: list[str]) -> str:
  import sentencepiece

  path = folder / 'pieces.model'
  with open(path, 'wb') as model:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(texts[:2000]),
      model_writer=model,
      vocab_size=4000,
      model_type='bpe',
      byte_fallback=True,
      minloglevel=2,
    )
  return str(path)


def _library(name: str, texts: list[str]) -> Callable[[], list[Any]]:
  """Encodes all texts at once by the tokenizer's own package."""
  if name.endswith('.model'):
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=name)
    return lambda: pieces.encode(texts, num_threads=1)
  import tokenizers

  tokenizer = tokenizers.Tokenizer.from_file(name)
  return lambda: tokenizer.encode_batch(texts, add_special_tokens=False)


def text(rounds: int, size: int) -> Iterator[Record]:
  """Bytes and both kinds of tokenizer files on the same JSON lines."""
  texts = _texts(size)
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    lines = (json.dumps({'text': text}) for text in texts)
    (folder / 'a.jsonl').write_text('\n'.join(lines))
    train_tokenizer(iter(texts), 8000, folder)
    names = {
      'bytes': 'bytes',
      'tokenizer.json': str(folder / 'tokenizer.json'),
      'SentencePiece': _sentence_piece(folder, texts),
    }
    for kind, tokenizer in names.items():
      config = config_of('jsonl', f'{folder}/*.jsonl', tokenizer=tokenizer)
      with contextlib.ExitStack() as stack:
        pipeline, first = _first_batch(config)
        stack.enter_context(pipeline)
        # Bytes are quick: one window of them is over in a few milliseconds.
        tokens = 8 * WINDOW if kind == 'bytes' else WINDOW
        turns = {'ours': functools.partial(speed, pipeline, tokens)}
        if kind != 'bytes':
          encode = _library(tokenizer, texts)
          turns['library'] = functools.partial(_encoding_speed, encode)
        times = in_turns(turns, rounds)
      record = {'bench': 'data', 'source': 'jsonl', 'tokenizer': kind, **times}
      yield record | {'mean': size // len(texts), 'first_s': first}


def _encoding_speed(encode: Callable[[], list[Any]]) -> float:
  start = quiet()
  encoded = encode()
  seconds = quiet() - start
  return sum(map(len, encoded)) / seconds
