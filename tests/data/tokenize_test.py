"""Text to arrays on disk: the same documents, whole, however often killed."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from gated_jax.config import DataConfig
from gated_jax.data import __main__ as command
from gated_jax.data import corpus
from gated_jax.data import tokenize as tokenizing
from gated_jax.data.array_files import AS_STATED
from gated_jax.data.array_files import Wanted
from gated_jax.data.pipeline import make_pipeline
from gated_jax.data.sources import Skipped
from gated_jax.data.token_sources import TokenSource
from gated_jax.data.tokenize import Work
from gated_jax.data.tokenize import tokenize
from gated_jax.data.tokenizer import make_tokenizer

TEXTS = [f'document {i} ' + 'words and é 漢\n' * (i % 7) for i in range(60)]


@pytest.fixture
def text(tmp_path, monkeypatch):
  """JSON lines in three files, each of them an array of its own."""
  monkeypatch.setattr(corpus, '_SMALLEST', 1)
  monkeypatch.setattr(corpus, '_ARRAYS', 100)
  for i in range(3):
    lines = [json.dumps({'text': t}) for t in TEXTS[20 * i : 20 * i + 20]]
    (tmp_path / f'{i}.jsonl').write_text('\n'.join(lines))
  return str(tmp_path / '*.jsonl')


def _work(text, out, **changes):
  return Work(out=str(out), paths=text, source='jsonl', **changes)


def _contents(folder):
  return {p.name: p.read_bytes() for p in pathlib.Path(folder).iterdir()}


def _documents(folder):
  files = sorted(map(str, pathlib.Path(folder).glob('*.bin')))
  about = json.loads(pathlib.Path(f'{files[0]}.json').read_text())
  wanted = Wanted(AS_STATED, '', -1, about['tokenizer'])
  source = TokenSource(files, wanted, 1 << 20, Skipped())
  return [d.ids for unit in source.units for _, d in source.read(unit, 0)]


@pytest.mark.parametrize('trained', [0, 300])
def test_arrays_hold_the_documents_in_order(text, tmp_path, trained):
  counts = tokenize(_work(text, tmp_path / 'out', train_tokenizer=trained))
  name = str(tmp_path / 'out') if trained else 'bytes'
  tokenizer = make_tokenizer(name)
  documents = _documents(tmp_path / 'out')
  assert [tokenizer.decode(ids) for ids in documents] == TEXTS
  for ids, document in zip(documents, TEXTS, strict=True):
    np.testing.assert_array_equal(ids[:-1], tokenizer.encode(document))
    assert ids[-1] == tokenizer.eos
  assert counts.documents == 60
  assert counts.tokens == sum(map(len, documents))
  assert counts.text_bytes == sum(len(t.encode()) for t in TEXTS)
  assert len(list((tmp_path / 'out').glob('*.bin'))) == 3


def test_a_run_reads_what_was_made(text, tmp_path):
  out = tmp_path / 'out'
  tokenize(_work(text, out, train_tokenizer=300))
  config = DataConfig(
    source='tokens',
    paths=f'{out}/*.bin',
    tokenizer=str(out),
    batch=2,
    length=16,
    shuffle=False,
    validation=0,
  )
  with make_pipeline(config, 'train') as pipeline:
    batch = next(pipeline)
  text = make_tokenizer(str(out)).decode(batch['tokens'].reshape(-1))
  assert text.startswith('document 0 ')


def test_what_was_made_is_not_made_again(text, tmp_path, monkeypatch):
  out = tmp_path / 'out'
  work = _work(text, out, train_tokenizer=300)
  real, numbers = tokenizing.make_array, []

  def made(work, units, number):
    numbers.append(number)
    return real(work, units, number)

  monkeypatch.setattr(tokenizing, 'make_array', made)
  total = tokenize(work)
  wanted = _contents(out)
  # As a kill leaves them: half an array, a whole one without its JSON.
  (out / '00001.bin').unlink()
  (out / '00001.bin.json').unlink()
  (out / '00001.bin.partial').write_bytes(b'half')
  (out / '00002.bin.json').unlink()
  numbers.clear()
  assert tokenize(work) == total
  assert numbers == [1, 2]
  assert _contents(out) == wanted


def test_a_tokenizer_that_was_not_finished_is_trained_again(text, tmp_path):
  work = _work(text, tmp_path / 'out', train_tokenizer=300)
  tokenize(work)
  wanted = _contents(work.folder)
  for name in wanted:
    if name not in ('corpus.json', 'tokenizer_config.json'):
      (work.folder / name).unlink()
  tokenize(work)
  assert _contents(work.folder) == wanted


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'max_document': 99}, 'was begun with max_document=1048576, not 99'),
    ({'train_tokenizer': 300}, "tokenizer='bytes', not '300 trained'"),
  ],
)
def test_a_folder_of_another_request_is_refused(
  text, tmp_path, changes, message
):
  tokenize(_work(text, tmp_path / 'out'))
  before = _contents(tmp_path / 'out')
  with pytest.raises(ValueError, match=re.escape(message)):
    tokenize(_work(text, tmp_path / 'out', **changes))
  assert _contents(tmp_path / 'out') == before


def test_a_folder_of_other_text_is_refused(text, tmp_path):
  tokenize(_work(text, tmp_path / 'out'))
  (tmp_path / '3.jsonl').write_text('{"text": "more"}')
  with pytest.raises(ValueError, match='was begun with files='):
    tokenize(_work(text, tmp_path / 'out'))


def test_a_folder_of_something_else_is_refused(text, tmp_path):
  (tmp_path / 'out').mkdir()
  (tmp_path / 'out' / 'thesis.tex').write_text('mine')
  with pytest.raises(ValueError, match=r'not empty \(thesis.tex\)'):
    tokenize(_work(text, tmp_path / 'out'))


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['--workers=0'], '--workers=0 must lie in [1, '),
    (['--workers=1000000'], '--workers=1000000 must lie in [1, '),
    (['--max-document=0'], '--max-document=0 must be positive'),
    (['--train-tokenizer=257'], '--train-tokenizer=257 must be more than 257'),
    (['--tokenizer=x.json'], "'x.json' is neither 'bytes' nor"),
    (['--tokenizer=a', '--train-tokenizer=300'], 'exclude each other'),
    (['--paths=/no/such/*'], "no data files match '/no/such/*'"),
    (['--source=pdf'], "invalid choice: 'pdf'"),
  ],
)
def test_a_bad_command_line_is_refused_in_one_line(
  text, tmp_path, capsys, arguments, message
):
  good = [f'--paths={text}', f'--out={tmp_path}/out', '--source=jsonl']
  assert command.main(['tokenize', *good, '--workers=1', *arguments]) == 2
  error = capsys.readouterr().err
  assert message in error
  assert len(error.splitlines()) == 1


def test_text_that_spells_the_end_of_a_document_ends_none(text, tmp_path):
  tokenize(_work(text, tmp_path / 'out', train_tokenizer=300))
  spelled = 'before<|endoftext|>after'
  (tmp_path / 'a.jsonl').write_text(json.dumps({'text': spelled}))
  name = str(tmp_path / 'out')
  for special, count in ((False, 1), (True, 2)):
    out = tmp_path / str(special)
    paths = str(tmp_path / 'a.jsonl')
    tokenize(_work(paths, out, tokenizer=name, special_tokens=special))
    assert len(_documents(out)) == count


@pytest.mark.nightly
def test_processes_make_the_same_and_survive_kills(tmp_path):
  """The real command, killed again and again, ends with the same folder."""
  for i in range(24):
    text = ''.join(f'{i} {j} some words in a line\n' for j in range(20_000))
    (tmp_path / f'{i:02d}.txt').write_text(text)
  command = [
    *(sys.executable, '-m', 'gated_jax.data', 'tokenize'),
    *(f'--paths={tmp_path}/*.txt', '--train-tokenizer=600'),
  ]
  subprocess.run(
    [*command, f'--out={tmp_path}/whole', '--workers=1'], check=True
  )
  out, kills = tmp_path / 'killed', 0
  while True:
    process = subprocess.Popen(
      [*command, f'--out={out}', '--workers=2'], start_new_session=True
    )
    before = len(list(out.glob('*.json'))) if out.is_dir() else 0
    while process.poll() is None:
      time.sleep(0.01)
      if kills < 2 and out.is_dir() and len(list(out.glob('*.json'))) > before:
        os.kill(process.pid, signal.SIGKILL)
        kills += 1
    if process.wait() == 0:
      break
    for path in out.glob('*.bin'):
      assert path.stat().st_size % 2 == 0
  assert kills == 2
  assert _contents(out) == _contents(tmp_path / 'whole')
