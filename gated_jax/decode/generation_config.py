"""Authors' own settings for sampling from a model: generation_config.json."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any
from typing import NamedTuple

from gated_jax import paths
from gated_jax.decode.sampling import Sampling
from gated_jax.hf.keys import Keys
from gated_jax.paths import Path

NAME = 'generation_config.json'
# Settings that change a text where they differ from these values. None of
# them is implemented, so one that does is named to the user.
NEUTRAL: dict[str, Any] = {
  'repetition_penalty': 1.0,
  'encoder_repetition_penalty': 1.0,
  'no_repeat_ngram_size': 0,
  'length_penalty': 1.0,
  'num_beams': 1,
  'num_beam_groups': 1,
  'diversity_penalty': 0.0,
  'typical_p': 1.0,
  'epsilon_cutoff': 0.0,
  'eta_cutoff': 0.0,
  'penalty_alpha': 0.0,
  'min_length': 0,
  'min_new_tokens': 0,
  'bad_words_ids': [],
  'force_words_ids': [],
  'suppress_tokens': [],
  'begin_suppress_tokens': [],
  'sequence_bias': {},
  'guidance_scale': 1.0,
}


class Defaults(NamedTuple):
  """Values that hold where no flag says otherwise.

  Attributes:
    sampling: How tokens are chosen.
    stop: Ids that end a text; (): the file names none.
    left_out: Settings of the file that decoding does not have.
  """

  sampling: Sampling = Sampling()
  stop: tuple[int, ...] = ()
  left_out: Mapping[str, Any] = {}


def read(folder: Path) -> Defaults:
  """The defaults for a model whose files lie in a folder.

  Raises:
    ValueError: the file is no JSON, or a value makes no sense.
  """
  path = folder / NAME
  if not paths.is_file(path):
    return Defaults()
  try:
    values = json.loads(paths.read_bytes(path))
  except ValueError as error:
    raise ValueError(f'{path} is not JSON: {error}') from None
  if not isinstance(values, dict):
    raise ValueError(f'{path} holds no object')
  keys, plain = Keys(values, str(path)), Sampling()
  draws = keys.flag('do_sample', False)
  temperature = keys.number('temperature', 1.0)
  sampling = dataclasses.replace(
    plain,
    temperature=temperature if draws else 0.0,
    top_k=keys.integer('top_k', plain.top_k, least=0),
    top_p=keys.number('top_p', plain.top_p),
    min_p=keys.number('min_p', plain.min_p),
  )
  left_out = {
    key: values[key]
    for key, neutral in NEUTRAL.items()
    if values.get(key) not in (None, neutral)
  }
  return Defaults(sampling, _ends(keys, values), left_out)


def _ends(keys: Keys, values: Mapping[str, Any]) -> tuple[int, ...]:
  """One id, or a list of them."""
  key = 'eos_token_id'
  if isinstance(values.get(key), list):
    return tuple(keys.sequence(key, int, []))
  end = keys.integer(key, None, least=0)
  return () if end is None else (end,)
