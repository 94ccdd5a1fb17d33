"""Text to token arrays on disk: in parallel, and killed at any time.

    python -m gated_jax.data tokenize --paths='text/*.jsonl' --out=tokens

An array is written by one process from beginning to end, so its contents
depend on the text alone, not on how many processes there are. Read
`gated_jax/data/corpus.py` first for what a folder holds.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import pathlib
import tempfile
import threading
from collections.abc import Iterator
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np
import tqdm

from gated_jax.data import corpus
from gated_jax.data.files import find_files
from gated_jax.data.sources import Skipped
from gated_jax.data.sources import Source
from gated_jax.data.sources import Unit
from gated_jax.data.text_sources import stdlib_files
from gated_jax.data.text_sources import text_source
from gated_jax.data.tokenizer import Tokenizer
from gated_jax.data.tokenizer import digest_of
from gated_jax.data.tokenizer import ends_of
from gated_jax.data.tokenizer import make_tokenizer
from gated_jax.data.train_tokenizer import train_tokenizer
from gated_jax.paths import Path
from gated_jax.paths import expand
from gated_jax.paths import is_file
from gated_jax.paths import read_bytes
from gated_jax.paths import upload

_BLOCK = 1 << 20  # characters of text that are encoded at once
_BLOCK_DOCUMENTS = 1024  # documents of a block at most


@dataclasses.dataclass(frozen=True)
class Work:
  """A request; `python -m gated_jax.data tokenize --help` explains it."""

  out: str
  paths: str = ''
  source: str = 'text'
  column: str = 'text'
  tokenizer: str = 'bytes'
  train_tokenizer: int = 0  # tokens of a vocabulary to train first; 0: none
  special_tokens: bool = False
  max_document: int = 1 << 20
  workers: int = 1  # processes

  def __post_init__(self):
    most = 64 * (os.cpu_count() or 1)
    if not 1 <= self.workers <= most:
      raise ValueError(f'--workers={self.workers} must lie in [1, {most}]')
    if self.train_tokenizer and self.tokenizer != 'bytes':
      raise ValueError('--tokenizer and --train-tokenizer exclude each other')
    if self.max_document < 1:
      raise ValueError(f'--max-document={self.max_document} must be positive')

  @property
  def folder(self) -> Path:
    """The folder of the arrays."""
    return expand(self.out)


@dataclasses.dataclass(frozen=True)
class Counts:
  """Sums over documents."""

  documents: int = 0
  tokens: int = 0
  text_bytes: int = 0
  skipped: int = 0  # files, or parts of them

  def __add__(self, other: 'Counts') -> 'Counts':
    pairs = zip(
      dataclasses.astuple(self), dataclasses.astuple(other), strict=True
    )
    return Counts(*(a + b for a, b in pairs))


def tokenize(work: Work) -> Counts:
  """Makes the arrays that a folder lacks; the counts of all that it holds."""
  skipped = Skipped()
  files = stdlib_files() if work.source == 'stdlib' else find_files(work.paths)
  source = text_source(
    work.source, files, work.column, work.max_document, skipped
  )
  if not source.units:
    what = work.paths or work.source
    raise ValueError(f'no text in {what!r}: {skipped.summary()}')
  trained = f'{work.train_tokenizer} trained' if work.train_tokenizer else ''
  request = corpus.Request(
    source=work.source,
    column=work.column,
    max_document=work.max_document,
    files=corpus.digest_of_units(source.units),
    tokenizer=trained or digest_of(make_tokenizer(work.tokenizer)),
    special_tokens=work.special_tokens,
  )
  plan = corpus.open_folder(work.folder, request, source.units, files)
  _provide_tokenizer(work, source)
  sizes = corpus.sizes_of(source.units, files)
  _make_missing(work, plan, source.units, sizes)
  numbers = range(len(plan.arrays))
  return sum(
    (read_counts(corpus.array_path(work.folder, i)) for i in numbers), Counts()
  )


def read_counts(array: Path) -> Counts:
  """The contents of the JSON beside an array."""
  about = json.loads(read_bytes(corpus.about_path(array)))
  names = (field.name for field in dataclasses.fields(Counts))
  return Counts(**{name: about[name] for name in names})


def _provide_tokenizer(work: Work, source: Source) -> None:
  """Puts the tokenizer's file into the folder, once."""
  if work.tokenizer != 'bytes':
    path = expand(make_tokenizer(work.tokenizer).name)
    if not is_file(work.folder / f'tokenizer{path.suffix}'):
      corpus.copy_tokenizer(path, work.folder)
  elif work.train_tokenizer and not is_file(work.folder / 'tokenizer.json'):
    # All over the corpus, in an order of its own.
    order = np.random.default_rng(0).permutation(len(source.units))
    units = [source.units[int(i)] for i in order]
    texts = _texts(source, units)
    train_tokenizer(texts, work.train_tokenizer, work.folder)


def tokenizer_of(work: Work) -> Tokenizer:
  """The tokenizer in the folder."""
  own = work.train_tokenizer or work.tokenizer != 'bytes'
  name = str(work.folder) if own else 'bytes'
  return make_tokenizer(name, work.special_tokens)


def _texts(source: Source, units: Sequence[Unit]) -> Iterator[str]:
  """Every text of the units that can be read."""
  for unit, after in itertools.zip_longest(units, units[1:]):
    if after is not None:
      source.expect(after)
    try:
      for _, document in source.read(unit, 0):
        if document.text:
          yield document.text
    except (OSError, ValueError, RuntimeError, LookupError) as error:
      source.skipped.add(unit.path, error)


def _make_missing(
  work: Work, plan: corpus.Plan, units: Sequence[Unit], sizes: Sequence[float]
) -> None:
  """Makes the arrays that are not there, and shows how far it is."""
  parts = {i: slice(*pair) for i, pair in enumerate(plan.arrays)}
  missing = [i for i in parts if not corpus.is_done(work.folder, i)]
  there = sum(sum(sizes[parts[i]]) for i in parts if i not in missing)
  make = functools.partial(make_array, work)
  tasks = {i: (list(units[parts[i]]), i) for i in missing}
  tokens = 0
  with tqdm.tqdm(
    total=int(sum(sizes)),
    initial=int(there),
    desc='tokenize',
    unit='B',
    unit_scale=True,
  ) as bar:
    for number, counts in _in_parallel(make, tasks, work.workers):
      tokens += counts.tokens
      bar.set_postfix_str(f'{tokens:,} new tokens', refresh=False)
      bar.update(int(sum(sizes[parts[number]])))


def _in_parallel(make, tasks, workers) -> Iterator[tuple[int, Counts]]:
  """Results as they come, with the number of the task."""
  if workers == 1 or len(tasks) < 2:
    for number, task in tasks.items():
      yield number, make(*task)
    return
  # A server forks processes that have all modules and none of the threads.
  context = multiprocessing.get_context('forkserver')
  context.set_forkserver_preload([__name__])
  with concurrent.futures.ProcessPoolExecutor(
    min(workers, len(tasks)), context, _begin
  ) as pool:
    try:
      futures = {pool.submit(make, *task): i for i, task in tasks.items()}
      for future in concurrent.futures.as_completed(futures):
        yield futures[future], future.result()
    except BaseException:
      # Others may be minutes from the end of their arrays.
      for process in multiprocessing.active_children():
        process.terminate()
      raise


def _begin() -> None:
  """Prepares a process for its arrays."""
  os.environ['TOKENIZERS_PARALLELISM'] = 'false'  # one core for each process
  threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
  """A process whose parent was killed would wait for work for ever."""
  parent = multiprocessing.parent_process()
  assert parent is not None
  parent.join()
  os._exit(1)


def make_array(work: Work, units: Sequence[Unit], number: int) -> Counts:
  """Writes one array and its JSON; what it counted."""
  skipped = Skipped()
  source = text_source(work.source, [], work.column, work.max_document, skipped)
  tokenizer = tokenizer_of(work)
  ends = ends_of(tokenizer, end_to_end=True)
  if ends[1] < 0:
    raise ValueError(
      f'{tokenizer.name} has no token for the end of a document: an array '
      'could not say where one ends'
    )
  dtype = np.dtype(np.uint16 if tokenizer.vocab <= 1 << 16 else np.uint32)
  path = corpus.array_path(work.folder, number)
  counts = Counts()
  with _whole_file(path) as file:
    for texts in _blocks(_texts(source, units)):
      encoded = tokenizer.encode_batch(texts, ends)
      file.write(encoded.ids.astype(dtype.newbyteorder('<')).tobytes())
      size = sum(len(text.encode()) for text in texts)
      counts += Counts(len(texts), len(encoded.ids), size)
  counts += Counts(skipped=len(skipped))
  corpus.write_json(
    corpus.about_path(path),
    {
      'dtype': dtype.name,
      'eos': ends[1],
      'vocab': tokenizer.vocab,
      'tokenizer': digest_of(tokenizer),
      **dataclasses.asdict(counts),
    },
  )
  return counts


@contextlib.contextmanager
def _whole_file(path: Path) -> Iterator[BinaryIO]:
  """A file to write, which becomes `path` when the block succeeds."""
  if not isinstance(path, pathlib.Path):
    with tempfile.TemporaryDirectory() as folder:
      whole = pathlib.Path(folder, path.name)
      with whole.open('wb') as file:
        yield file
      upload(whole, path)
    return
  partial = path.with_name(path.name + corpus.PARTIAL)
  with partial.open('wb') as file:
    yield file
    file.flush()
    os.fsync(file.fileno())
  os.replace(partial, path)


def _blocks(texts: Iterator[str]) -> Iterator[list[str]]:
  """Texts in lists that are worth a call, and small in memory."""
  block: list[str] = []
  held = 0
  for text in texts:
    block.append(text)
    held += len(text)
    if held >= _BLOCK or len(block) == _BLOCK_DOCUMENTS:
      yield block
      block, held = [], 0
  if block:
    yield block
