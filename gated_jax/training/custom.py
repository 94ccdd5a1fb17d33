"""What a caller brings to a run in place of what its config would build.

    loop.run(config, workdir, optimizer=optax.lion(1e-4), data=batches)

Everything else of a run stays as it is: sharding, checkpoints, metrics, probes.
"""

import base64
import dataclasses
import json
import time
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import numpy as np
import optax

from gated_jax.config import DataConfig
from gated_jax.data.batch import arrays_of
from gated_jax.training.step import LossFunction
from gated_jax.training.step import TrainState
from gated_jax.training.step import model_loss

Batch = Mapping[str, Any]


class Progress(NamedTuple):
  """What a callback is told."""

  step: int
  metrics: dict[str, float]  # the line of metrics.jsonl
  state: TrainState  # after this step; the next step frees its arrays


# Returns True to save and end, as a signal would. Of several processes all have
# to return the same.
Callback = Callable[[Progress], bool | None]


@dataclasses.dataclass(frozen=True)
class Custom:
  """A caller's own optimizer, data, callbacks and loss; see `loop.run`."""

  optimizer: optax.GradientTransformation | None = None
  data: Iterable[Batch] | None = None
  held_out: Sequence[Batch] = ()
  callbacks: Sequence[Callback] = ()
  loss: LossFunction = model_loss

  def __post_init__(self) -> None:
    """ValueError in one line for what is none of these."""
    own = self.optimizer
    if own is not None and not isinstance(own, optax.GradientTransformation):
      raise ValueError(
        f'optimizer={own!r} must be an optax.GradientTransformation'
      )
    if self.data is not None and not isinstance(self.data, Iterable):
      raise ValueError(f'data={self.data!r} must be an iterable of batches')
    if self.held_out and self.data is None:
      raise ValueError('held_out does nothing without data of your own')
    for callback in self.callbacks:
      if not callable(callback):
        raise ValueError(f'callbacks has {callback!r}, which is no function')
    if not callable(self.loss):
      raise ValueError(f'loss={self.loss!r} must be a function')

  @property
  def loss_name(self) -> str:
    """What checkpoints call a caller's own loss; '': it is the model's."""
    if self.loss is model_loss:
      return ''
    return getattr(self.loss, '__qualname__', type(self.loss).__qualname__)


def checked(batch: Batch, config: DataConfig, rows: int) -> dict[str, Any]:
  """A caller's batch in the types of `gated_jax/data/batch.py`.

  Args:
    batch: arrays by name.
    config: says which arrays there are, and how long a row is.
    rows: of this process.

  Raises:
    ValueError: an array is missing, or of another shape or kind.
  """
  schema = arrays_of(config.rows)
  missing, more = set(schema) - set(batch), set(batch) - set(schema)
  if missing or more:
    raise ValueError(
      f'a batch has the arrays {", ".join(sorted(batch))}; with data.rows='
      f'{config.rows!r} they are {", ".join(schema)}'
    )
  arrays = {}
  for name, kind in schema.items():
    array = np.asarray(batch[name])
    if array.shape != (rows, config.length):
      raise ValueError(
        f'a batch has {name} of shape {list(array.shape)}, not '
        f'[{rows}, {config.length}]: rows of this process, data.length'
      )
    integers = np.issubdtype(kind, np.integer)
    if integers and not np.issubdtype(array.dtype, np.integer):
      raise ValueError(f'a batch has {name} of {array.dtype}, not of integers')
    arrays[name] = array.astype(kind, copy=False)
  return arrays


class OwnData:
  """A caller's batches, as a run reads those of a `Pipeline`.

  An iterator with `get_state` and `set_state`, as Grain's have, resumes by
  them. Of any other the batches that were used are read again and dropped.
  What can be iterated again begins anew when it ends.

  Args:
    batches: of this process's rows.
    config: says what a batch is.
    rows: of this process.
  """

  name = 'batches of your own'
  is_text = False
  tokens_per_second = padding = 0.0
  shortened = 0

  def __init__(self, batches: Iterable[Batch], config: DataConfig, rows: int):
    self._batches = batches
    self._iterator: Iterator[Batch] = iter(batches)
    self._config, self._rows = config, rows
    self.wait_seconds = 0.0
    self.batches = 0
    self.skipped: dict[str, str] = {}

  def __iter__(self) -> 'OwnData':
    return self

  def __next__(self) -> dict[str, Any]:
    start = time.perf_counter()
    batch = self._next()
    self.batches += 1
    self.wait_seconds += time.perf_counter() - start
    return checked(batch, self._config, self._rows)

  def _next(self) -> Batch:
    try:
      return next(self._iterator)
    except StopIteration:
      self._iterator = iter(self._batches)
    try:
      return next(self._iterator)
    except StopIteration:
      raise ValueError(
        f'data ended after {self.batches} batches, and cannot be read again'
      ) from None

  def state(self) -> bytes:
    """The place after the last batch."""
    place = None
    if hasattr(self._iterator, 'get_state'):
      place = self._iterator.get_state()
      if isinstance(place, bytes):
        place = {'base64': base64.b64encode(place).decode()}
    return json.dumps({'batches': self.batches, 'iterator': place}).encode()

  def restore(self, state: bytes) -> None:
    """Goes on after the last batch; ValueError where there is no such place."""
    saved = json.loads(state)
    if not isinstance(saved, dict) or set(saved) != {'batches', 'iterator'}:
      raise ValueError(
        'the saved data position is of the files of a config, and the run is '
        'given batches of its own'
      )
    place = saved['iterator']
    if place is None:
      for _ in range(saved['batches'] - self.batches):
        self._next()
    elif not hasattr(self._iterator, 'set_state'):
      raise ValueError('data has no set_state, which the saved position needs')
    else:
      if isinstance(place, dict) and set(place) == {'base64'}:
        place = base64.b64decode(place['base64'])
      self._iterator.set_state(place)
    self.batches = saved['batches']

  def close(self) -> None:
    """Nothing is to be let go of."""
