"""Bytes of text that held-out tokens stand for, where they are known."""

import numpy as np
import pytest

from gated_jax.config import DataConfig
from gated_jax.evals.likelihood import target_bytes

LENGTHS = np.array([1, 2, 3, 0])  # of a tokenizer with four tokens
MIXTURE = DataConfig(source='mixture', mixture=('1:stdlib', '1:synthetic'))


def batch(targets, weights):
  return {
    'targets': np.array([targets]),
    'weights': np.array([weights], np.float32),
  }


def test_bytes_of_the_targets_that_count_are_added_up():
  batches = [
    batch([0, 1, 2, 3], [1, 1, 1, 1]),
    batch([2, 2, 2, 2], [1, 0, 0, 0]),
  ]
  assert target_bytes(DataConfig(), batches, LENGTHS) == 1 + 2 + 3 + 3


def test_ids_that_the_tokenizer_lacks_are_of_no_known_length():
  """Token arrays come from other tokenizers, and models have spare ids."""
  data = DataConfig(source='tokens', paths='ids.npy')
  assert target_bytes(data, [batch([0, 4], [1, 1])], LENGTHS) == 0
  assert target_bytes(data, [batch([0, 4], [1, 0])], LENGTHS) == 1


@pytest.mark.parametrize(
  'data', [DataConfig(source='synthetic'), MIXTURE], ids=['alone', 'in part']
)
def test_random_ids_stand_for_no_text(data):
  assert target_bytes(data, [batch([0, 1], [1, 1])], LENGTHS) == 0
