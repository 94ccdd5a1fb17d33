"""Positions in the data as JSON, also those that earlier releases saved."""

from collections.abc import Mapping
from typing import Any

from gated_jax.data.packing import Position
from gated_jax.data.windows import Start


def read(values: Mapping[str, Any], window: int) -> dict[str, Any]:
  """The state that the iterators of `gated_jax/data/batches.py` take.

  Args:
    values: what `json.loads` makes of a state that they gave, or of one that
      the first release saved.
    window: rows of a window; 1 where rows are not shuffled.

  Raises:
    KeyError, TypeError or ValueError: it is neither.
  """
  if 'streams' in values:
    streams = [read(stream, window) for stream in values['streams']]
    given = [int(number) for number in values['given']]
    return {'given': given, 'ended': values['ended'], 'streams': streams}
  if 'start' not in values:
    return _of_first_release(values, window)
  number, mixed, sources = values['start']
  positions = tuple(Position(*map(int, source)) for source in sources)
  start = Start(int(number), int(mixed), positions)
  return {'start': start, 'used': int(values['used'])}


def _of_first_release(values: Mapping[str, Any], window: int) -> dict[str, Any]:
  """Grain's nested states: of a shuffle of a mixture of packed rows."""
  number = used = 0
  if 'parent_window_start_state' in values:
    number = int(values['window_index'])
    used = int(values['pos_in_window'])
    values = values['parent_window_start_state']
    if used >= window:  # a window that is used up has the next one's number
      number, used = number - 1, window
  mixed = int(values.get('index', number * window))
  positions = tuple(
    Position(
      int(source['parent']['place']),
      int(source['parent']['cursor']),
      int(source['used']),
    )
    for source in values.get('parents', [values])
  )
  return {'start': Start(number, mixed, positions), 'used': used}
