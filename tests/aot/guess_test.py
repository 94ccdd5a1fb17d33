"""aot/guess.py: what a step needs, before anything is compiled."""

import dataclasses
import functools

import pytest

from configs import dense_1b7
from configs import moe_15b_a2b
from gated_jax.aot.guess import EXPOSED
from gated_jax.aot.guess import PASSES
from gated_jax.aot.guess import RATE
from gated_jax.aot.guess import Guesser
from gated_jax.aot.topology import open_topology
from gated_jax.config import from_dict

pytest.importorskip('libtpu')


def config_of(file, word, **changes):
  config = file.get_config(word)
  with config.unlocked():
    config.update_from_flattened_dict(
      {path.replace('__', '.'): value for path, value in changes.items()}
    )
  return from_dict(config.to_dict())


@pytest.fixture(scope='module')
def dense():
  """28 layers on 256 devices of v6e, four rows a device."""
  config = config_of(dense_1b7, '28,v6e')
  return config, Guesser.of(config, open_topology('v6e:16x16'))


def test_products_are_counted_at_a_share_of_the_rate_and_weights_by_links(
  dense,
):
  config, guess = dense
  flops = 4.940e16 / 256  # docs/tpu.md's figures for the step
  products = flops / (RATE * 1.75e9 * 524_288)
  # Four links in either direction; of 1.73e9 numbers of two bytes each device
  # lacks 255 parts, gathered twice and summed twice around the ring.
  links = 4 * 2 * 1_728_177_152 * 255 / 256 / 4e11
  seconds = products + EXPOSED[True] * links
  assert guess(config).seconds == pytest.approx(seconds, rel=0.01)


def test_what_is_saved_though_no_product_makes_it_is_copied(dense):
  config, guess = dense
  saving = config_of(dense_1b7, '28,v6e', model__remat='none')
  longer = guess(saving).seconds - guess(config).seconds
  # Heads of queries and keys after norm and rotation, both norms' outputs, what
  # the MLP's last product reads and as much for SwiGLU's rule, of four rows in
  # each layer.
  numbers = 2048 + 1024 + 2 * 2048 + 2 * 5504
  moved = 28 * 4 * 4096 * numbers * 2
  assert longer == pytest.approx(PASSES * moved / 1640e9)


@functools.cache
def on_v5p(file):
  config = config_of(file, '28' if file is dense_1b7 else '')
  return config, Guesser.of(config, open_topology('v5p:4x8x8'))


@pytest.mark.parametrize(
  ('file', 'remat', 'batch', 'mesh', 'needed'),
  [
    # GiB of a device, as libtpu 0.0.42.1 says, also where it is more than v5p
    # has.
    (dense_1b7, 'minimal', 1024, {}, 22.56),
    (dense_1b7, 'minimal', 4096, {}, 83.66),
    (dense_1b7, 'attention', 8192, {}, 79.40),
    (moe_15b_a2b, 'minimal', 1024, {}, 27.23),
    (moe_15b_a2b, 'minimal', 4096, {}, 96.29),
    (moe_15b_a2b, 'minimal', 1024, {'expert': 16}, 40.10),
    (moe_15b_a2b, 'minimal', 2048, {'tensor': 2}, 56.33),
    (moe_15b_a2b, 'none', 1024, {}, 82.94),
    (moe_15b_a2b, 'none', 1024, {'expert': 16}, 55.02),
    (moe_15b_a2b, 'attention', 8192, {}, 110.25),
    (moe_15b_a2b, 'full', 1024, {}, 7.65),
  ],
)
def test_memory_is_below_what_the_compiler_needs_and_not_far(
  file, remat, batch, mesh, needed
):
  replace, (base, guess) = dataclasses.replace, on_v5p(file)
  config = replace(
    base,
    data=replace(base.data, batch=batch),
    mesh=replace(base.mesh, **mesh),
    model=replace(base.model, remat=remat),
    optimizer=replace(base.optimizer, accumulate=1),
  )
  assert 0.8 * needed < guess(config).memory / 2**30 < needed


@pytest.mark.parametrize(
  ('change', 'quicker', 'smaller'),
  [
    ({'model__remat': 'none'}, False, False),
    ({'model__remat': 'attention'}, False, True),
    ({'model__remat': 'full'}, False, True),
    ({'optimizer__accumulate': 2}, False, True),
    ({'mesh__tensor': 2}, False, True),
  ],
)
def test_a_change_moves_time_and_memory(dense, change, quicker, smaller):
  config, guess = dense
  before = guess(config)
  after = guess(config_of(dense_1b7, '28,v6e', **change))
  assert (after.seconds < before.seconds) == quicker
  assert (after.memory < before.memory) == smaller


@pytest.mark.parametrize('topology', ['v5p:4x8x8', 'v6e:16x16'])
def test_gathering_experts_is_quicker_than_sending_rows_to_them(topology):
  config = config_of(moe_15b_a2b, '', model__remat='minimal')
  guess = Guesser.of(config, open_topology(topology))
  mesh = dataclasses.replace(config.mesh, expert=16)
  assert (
    guess(config).seconds
    < guess(dataclasses.replace(config, mesh=mesh)).seconds
  )


@pytest.mark.parametrize(
  ('topology', 'best', 'other'), [('v6e:16x16', 4, 8), ('tpu7x:4x4x8', 2, 8)]
)
def test_experts_are_split_where_their_rows_travel_quickest(
  topology, best, other
):
  config = config_of(moe_15b_a2b, '', mesh__expert=best)
  guess = Guesser.of(config, open_topology(topology))
  mesh = dataclasses.replace(config.mesh, expert=other)
  assert (
    guess(config).seconds
    < guess(dataclasses.replace(config, mesh=mesh)).seconds
  )
  # In backward the rows that were saved are not sent again.
  model = dataclasses.replace(config.model, remat='exchange')
  saved = guess(dataclasses.replace(config, model=model))
  assert saved.seconds <= guess(config).seconds
  rows = 16384 * 8 * config.model.moe.slack * 2048 * 2 * 24
  assert saved.memory - guess(config).memory == pytest.approx(rows)
