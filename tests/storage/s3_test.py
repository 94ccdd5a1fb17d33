"""S3: data, tokenizers and folders of Hugging Face's form, as in `gs://`.

What speaks S3 here is the package `moto`, so these tests need the extra
`compare`, and CI runs them with it.
"""

import numpy as np
import pytest

from gated_jax import checkpoint
from gated_jax import paths
from gated_jax.bucket_requests import BucketError
from gated_jax.bucket_requests import BucketRefused
from gated_jax.config import DataConfig
from gated_jax.config import ModelConfig
from gated_jax.config import RunConfig
from gated_jax.data import ranges
from gated_jax.data.pipeline import make_pipeline
from gated_jax.data.tokenize import Work
from gated_jax.data.tokenize import tokenize
from gated_jax.data.tokenizer import make_tokenizer
from gated_jax.data.watch import FilesChangedError
from gated_jax.evals import metric_files
from gated_jax.hf import __main__ as hf
from gated_jax.training import lines
from gated_jax.training.workdir import check_workdir
from tests.data import buckets_test as data
from tests.storage.proxy import CUT
from tests.storage.proxy import SILENT
from tests.storage.proxy import STALL


@pytest.fixture(autouse=True)
def no_waits(monkeypatch):
  """Several pieces in each file, and repeats without the wait between them."""
  core = pytest.importorskip('s3fs.core', reason="pip install -e '.[compare]'")
  monkeypatch.setattr('gated_jax.data.text_sources._RANGE', 9_000)
  monkeypatch.setattr(ranges, 'PIECE', 4_000)

  async def sleep(seconds):
    del seconds

  real = core.asyncio

  class Asyncio:
    def __getattr__(self, name):
      return sleep if name == 'sleep' else getattr(real, name)

  monkeypatch.setattr(core, 'asyncio', Asyncio())


def test_objects_answer_as_files_do(s3_bucket, tmp_path):
  for folder in (tmp_path, paths.expand(f'{s3_bucket}/folder')):
    one, two = folder / 'a.txt', folder / 'deep/er/b.txt'
    if folder is tmp_path:
      two.parent.mkdir(parents=True)
    for content in (b'old', b'0123456789'):
      paths.write_bytes(one, content)
    (tmp_path / 'local').write_bytes(b'local')
    if folder is not tmp_path:
      paths.upload(tmp_path / 'local', folder / 'up')
      assert paths.read_bytes(folder / 'up') == b'local'
      (folder / 'up').unlink()
    (tmp_path / 'local').unlink()
    paths.write_bytes(two, b'')
    assert paths.read_bytes(one) == b'0123456789'
    assert (paths.size(one), paths.size(two)) == (10, 0)
    with paths.open_for_reading(one) as file:
      file.seek(4)
      assert file.read(3) == b'456'
    assert paths.files_below(folder) == [one, two]
    assert paths.matching(f'{folder}/**/*.txt') == [one, two]
    kinds = [(paths.is_file(p), paths.is_folder(p)) for p in (one, two.parent)]
    assert kinds == [(True, False), (False, True)]
    assert not paths.exists(folder / 'absent')
    with pytest.raises(FileNotFoundError):
      paths.read_bytes(folder / 'absent')
    paths.move_folder(folder / 'deep', folder / 'moved')
    assert paths.files_below(folder) == [one, folder / 'moved/er/b.txt']
    paths.remove_folder(folder / 'moved')
    assert paths.files_below(folder) == [one]


@pytest.mark.parametrize(
  'kind',
  [
    kind
    if kind in ('jsonl', 'parquet', 'array_record')
    else pytest.param(kind, marks=pytest.mark.nightly)
    for kind in data.KINDS
  ],
)
def test_batches_are_those_of_the_files_on_a_disk(tmp_path, kind, s3_bucket):
  here, there = data.put(tmp_path / 'd', kind, s3_bucket)
  wanted, state = data.batches_of(data.config_of(here, kind), 30)
  more, _ = data.batches_of(data.config_of(here, kind), 5, state)
  found, _ = data.batches_of(data.config_of(there, kind), 30)
  data.assert_same(found, wanted)
  resumed, _ = data.batches_of(data.config_of(there, kind), 5, state)
  data.assert_same(resumed, more)


@pytest.mark.parametrize('status', [429, 503, CUT, STALL, SILENT])
def test_requests_that_fail_for_a_moment_change_nothing(
  tmp_path, status, s3_bucket, s3
):
  here, there = data.put(tmp_path / 'd', 'jsonl', s3_bucket)
  wanted, _ = data.batches_of(data.config_of(here, 'jsonl'), 30)
  with make_pipeline(data.config_of(there, 'jsonl'), 'train') as pipeline:
    s3.proxy.fail('GET .*/d/', status=status, times=2)
    data.assert_same([next(pipeline) for _ in range(30)], wanted)
  assert s3.proxy.struck()


@pytest.mark.parametrize('status', [503, SILENT])
def test_what_stays_away_is_said_in_one_line(status, s3_bucket, s3):
  path = paths.expand(f'{s3_bucket}/x')
  paths.write_bytes(path, b'123')
  s3.proxy.fail('.*', status=status)
  with pytest.raises(BucketError, match=r'^s3://test-bucket-\d+/x: [^\n]*$'):
    paths.read_bytes(path)


def test_a_file_that_changes_ends_the_run_with_its_name(tmp_path, s3_bucket):
  _, there = data.put(tmp_path / 'd', 'jsonl', s3_bucket)
  with make_pipeline(data.config_of(there, 'jsonl'), 'train') as pipeline:
    next(pipeline)
    for path in paths.files_below(paths.expand(f'{s3_bucket}/d')):
      paths.write_bytes(path, paths.read_bytes(path) + b'x')
    with pytest.raises(FilesChangedError, match=r's3://.* has changed since'):
      for _ in range(1000):
        next(pipeline)


def test_a_tokenizer_and_ids_are_written_and_read(tmp_path, s3_bucket):
  here, there = data.put(tmp_path / 'd', 'jsonl', s3_bucket)
  made = {'source': 'jsonl', 'train_tokenizer': 300}
  counts = tokenize(Work(paths=here, out=str(tmp_path / 'ids'), **made))
  assert tokenize(Work(paths=there, out=f'{s3_bucket}/ids', **made)) == counts
  for path in (tmp_path / 'ids').iterdir():
    content = paths.read_bytes(paths.expand(f'{s3_bucket}/ids/{path.name}'))
    assert content == path.read_bytes()
  tokenizer = make_tokenizer(f'{s3_bucket}/ids')
  assert tokenizer.decode(tokenizer.encode('some words')) == 'some words'


def test_metrics_are_read_from_there(s3_bucket):
  path = paths.expand(f'{s3_bucket}/run/{metric_files.NAME}')
  writer = lines.lines_at(path, 0)
  writer.add('{"step": 1, "loss": 2.0}\n')
  writer.close()
  assert metric_files.read(path) == [{'step': 1, 'loss': 2.0}]
  assert metric_files.runs_in(path.parent.parent) == [path.parent]


@pytest.fixture(scope='module')
def ours(tmp_path_factory):
  """A checkpoint on a disk, and its export."""
  import jax

  from gated_jax.model.abstract import abstract_parameters

  model = ModelConfig(
    vocab=64, length=32, depth=1, width=32, heads=2, kv_heads=1, head_dim=16,
    mlp_width=32, tie_embeddings=False,
  )  # fmt: skip
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: jax.numpy.asarray(rng.normal(size=x.shape), x.dtype),
    abstract_parameters(model),
  )
  folder = tmp_path_factory.mktemp('s3')
  config = RunConfig(model=model, data=DataConfig(length=32))
  checkpoint.save_parameters(folder / 'ours', params, config)
  assert hf.main(['export', f'{folder}/ours', f'{folder}/theirs']) == 0
  return folder


def test_models_of_hugging_faces_form_come_from_there_and_go_there(
  ours, tmp_path, s3_bucket
):
  assert hf.main(['export', f'{ours}/ours', f'{s3_bucket}/theirs']) == 0
  for path in (ours / 'theirs').iterdir():
    there = paths.expand(f'{s3_bucket}/theirs/{path.name}')
    assert paths.read_bytes(there) == path.read_bytes()
  assert hf.main(['import', f'{s3_bucket}/theirs', f'{tmp_path}/back']) == 0
  arrays = [
    checkpoint.read_run(folder)['arrays']
    for folder in (tmp_path / 'back', ours / 'ours')
  ]
  assert arrays[0] == arrays[1]


def test_our_own_checkpoints_are_refused_there(ours, s3_bucket, capsys):
  reason = 'Orbax writes and reads checkpoints on disks and in gs:// alone'
  with pytest.raises(ValueError, match=reason):
    check_workdir(paths.expand(f'{s3_bucket}/run'))
  assert hf.main(['import', f'{ours}/theirs', f'{s3_bucket}/ours']) == 2
  assert hf.main(['import', f'{ours}/theirs', 's3://absent-one/ours']) == 2
  paths.write_bytes(paths.expand(f'{s3_bucket}/c/_CHECKPOINT_METADATA'), b'{}')
  assert hf.main(['export', f'{s3_bucket}/c', f'{ours}/new']) == 2
  for line in capsys.readouterr().err.splitlines():
    assert reason in line
  assert not paths.exists(paths.expand(f'{s3_bucket}/ours'))


def test_a_bucket_that_cannot_be_is_said_in_one_line(
  s3_bucket, s3, monkeypatch
):
  del s3_bucket
  with pytest.raises(ValueError, match=r'there is no bucket s3://no-such-one$'):
    paths.check_bucket(paths.expand('s3://no-such-one/x'))
  s3.proxy.fail('.*', status=403)
  with pytest.raises(ValueError, match='no permission'):
    paths.check_bucket(paths.expand('s3://no-such-one/x'))
  s3.proxy.heal()
  for name in ('AWS_ACCESS_KEY_ID', 'AWS_SECRET_ACCESS_KEY'):
    monkeypatch.delenv(name)
  monkeypatch.setenv('AWS_SHARED_CREDENTIALS_FILE', '/dev/null')
  monkeypatch.setenv('AWS_CONFIG_FILE', '/dev/null')
  paths.file_system(paths.expand('s3://a/x')).clear_instance_cache()
  with pytest.raises(BucketRefused, match='no credentials'):
    paths.read_bytes(paths.expand('s3://no-such-one/x'))
  paths.file_system(paths.expand('s3://a/x')).clear_instance_cache()
