"""hf/torch_file.py: what torch wrote, read without it; nothing is run."""

import base64
import io
import pickle
import zipfile
import zlib

import ml_dtypes
import numpy as np
import pytest

from gated_jax import paths
from gated_jax.hf import torch_file

# torch 2.13 saved {'a': 0 to 5 as bfloat16 [2, 3], 'b': 0 to 5 as float32
# [2, 3], transposed and without its first row}; zlib made it shorter.
SAVED = (
  'eNqllU2L00AYxydJN63Z2pf1peseFjxZUbtNX9J21W0JkksEuxWhiBDSNLbBbLOTTiuKQk'
  'Es7En9AuJ38ODn2IsnD4IH9eRV8OJM4maTlG3d3YEweZn/8//lmedJmjITASAWAzMjBVaA'
  'amt9Y6xvdFWk5nafmJKYAA8DY0K/hCDbprBAhZSGLKzIKSNkmENOsfXOyDC7CtIHQ8tWxg'
  'UO0tlsO4oXD/FKtadDxpVwomRaKuKF++59DkacmHm41GbwrO2OICuzCEa3ZSDTMjOFMZmR'
  'qSk8s6dplmnqGjKswZC7Z3d1W+/eMTTEQe5qCy4jGG/Bs060Dkz0MUD/wNTx9ByTzhoepv'
  'qOU3pbprATPYUr+AQbntvrk4DnEbzQghdHuaYcjVW2tOYfrCJH88hUZkDDS2XusWXvqEgZ'
  '6/YQE0virVBGjzd4QvHp15dXhJ2aS7EGKocU//KvqKbRG+zoAySJxZOACCUCUH8Kf9LYgp'
  '4LkAZ1D6DzDOkW2StJvHmaBJgGQqZOGF7f/naJxS7sXIYE2ApU9UZeEjdPAQDApA4ajcak'
  '8aFBKD5e/roZxz7xBRTVIAUviSVwMn8yMAPANYZB8Dk+XJbM2+/vVvGD1bksSXDNY/GK8s'
  'r/whQ54rT/vvdg8f6vg8JhATqvPdRtA1fgc5U0r2J0JTF3zCzkywLP56vlQlHga0IlXy7U'
  'SnmhyJfK+GalVK2UqzWBr9QI5d0Xb5pZzJF1KCkC63H6Gzk1Qx7+DobV/gbMBJQyBY5q/X'
  'AQfxOtBYLs+4PMdG44jr8R0oE4LRrMNmBY7q/gRED+mQah3glr/RUX1D5iQlo+rPXXUDKg'
  '/eHTHpE7/9auB985AhYUXVNm2esHJcrc8JSx0LxMu/PviDtjHfmTASbqXrtf3yXW1cSc9e'
  '7av17/nVU='
)


@pytest.fixture
def path(tmp_path):
  content = zlib.decompress(base64.b64decode(SAVED))
  (tmp_path / 'x.bin').write_bytes(content)
  return tmp_path / 'x.bin'


def repacked(path, name, content):
  """The file with one member that is otherwise."""
  with zipfile.ZipFile(path) as archive:
    members = {n: archive.read(n) for n in archive.namelist()}
  (found,) = (n for n in members if n.endswith(name))
  with zipfile.ZipFile(path, 'w') as archive:
    for member, data in (members | {found: content}).items():
      archive.writestr(member, data)


@pytest.mark.parametrize('place', ['disk', 'bucket'])
def test_views_of_storages_are_the_tensors(path, place, request):
  if place == 'bucket':
    there = paths.expand(f'{request.getfixturevalue("bucket")}/x.bin')
    paths.write_bytes(there, path.read_bytes())
    path = there
  views = torch_file.describe(path)
  a, b = views['a'], views['b']
  assert (a.storage.dtype, b.storage.dtype) == ('bfloat16', 'float32')
  for view in (a, b):
    view.check('x')
  found = a.read(path, np.dtype(ml_dtypes.bfloat16))
  np.testing.assert_array_equal(
    found.astype(np.float32), [[0, 1, 2], [3, 4, 5]]
  )
  found = b.read(path, np.dtype(np.float32))
  np.testing.assert_array_equal(found, [[1, 4], [2, 5]])


class Runs:
  def __reduce__(self):
    return print, ('run',)


def test_what_is_no_tensor_is_not_run(path, capsys):
  repacked(path, 'data.pkl', pickle.dumps({'a': Runs()}))
  with pytest.raises(ValueError, match=r'builtins\.print belongs to no plain'):
    torch_file.describe(path)
  assert capsys.readouterr().out == ''


@pytest.mark.parametrize('content', [b'', b'.', b'\x80\x04N', b'X' * 50])
def test_a_broken_description_is_refused(path, content):
  repacked(path, 'data.pkl', content)
  with pytest.raises(ValueError, match='truncated or no torch file'):
    torch_file.describe(path)


def test_a_short_storage_is_refused_before_anything_is_made_of_it(path):
  views = torch_file.describe(path)
  repacked(path, 'data/1', b'1234')
  with pytest.raises(ValueError, match='data/1 is short'):
    views['b'].read(path, np.dtype(np.float32))


@pytest.mark.parametrize(
  ('offset', 'shape', 'strides'),
  [
    (0, (7,), (1,)),
    (1, (6,), (1,)),
    (0, (2, 2), (5, 1)),
    (0, (10**6, 10**6), (0, 0)),
    (-1, (2,), (1,)),
    (0, (2,), (-1,)),
    (0, (2,), (1, 1)),
  ],
)
def test_a_view_lies_within_its_storage(offset, shape, strides):
  storage = torch_file.Storage('float32', 'x/data/0', 6)
  view = torch_file.View(storage, offset, shape, strides)
  with pytest.raises(ValueError, match='more numbers than are stored'):
    view.check('x')


def test_a_file_of_another_kind_names_the_command_that_makes_it_new(tmp_path):
  path = tmp_path / 'x.bin'
  path.write_bytes(pickle.dumps({}))
  with pytest.raises(ValueError, match=r'truncated.*python -c .*torch\.save'):
    torch_file.describe(path)
  buffer = io.BytesIO()
  with zipfile.ZipFile(buffer, 'w') as archive:
    archive.writestr('x', '')
  path.write_bytes(buffer.getvalue())
  with pytest.raises(ValueError, match='no torch file of plain tensors'):
    torch_file.describe(path)
