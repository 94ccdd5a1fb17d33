"""A batch: the arrays that training, compiling and benches agree on.

Every array is `[B, T]`; a row alone is `[T]`. `gated_jax/data/packing.py` says
how documents become rows.
"""

import numpy as np

SCHEMA: dict[str, type[np.generic]] = {
  'tokens': np.int32,
  'targets': np.int32,  # the token that follows, of the same document
  'segments': np.int32,  # number of the document in its row; 0: padding
  'positions': np.int32,  # place of the token in its segment
  'weights': np.float32,  # 1 where the target counts, else 0
}


def arrays_of(rows: str) -> dict[str, type[np.generic]]:
  """The arrays that a batch of such rows (`data.rows`) has.

  Joined rows have no document numbers, which spares attention a mask, and
  their positions are those in the row, which is what a model assumes.
  """
  absent = ('segments', 'positions') if rows == 'joined' else ()
  return {name: kind for name, kind in SCHEMA.items() if name not in absent}
