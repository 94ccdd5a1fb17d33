"""A config for a TPU pod has every 'auto' spelt out."""

import pytest

from gated_jax.aot.compile import on_tpu
from gated_jax.config import ModelConfig
from gated_jax.config import MoEConfig
from gated_jax.config import RunConfig

EXPERTS = {'pattern': ('attention+moe',), 'moe': MoEConfig(experts=8, top_k=2)}


@pytest.mark.parametrize(
  ('model', 'attention', 'experts'),
  [
    ({}, ['pallas_tpu', 'splash', 'xla'], 'auto'),
    ({'attention': 'splash'}, ['splash'], 'auto'),
    (EXPERTS, ['pallas_tpu', 'splash', 'xla'], 'gmm'),
  ],
)
def test_automatic_choices_are_those_of_a_tpu(model, attention, experts):
  configs = on_tpu(RunConfig(model=ModelConfig(**model)))
  assert [c.model.attention for c in configs] == attention
  assert {c.model.moe.implementation for c in configs} == {experts}
