"""The table of families in words, for a terminal and for docs/models.md."""

import textwrap
from collections.abc import Iterator
from typing import NamedTuple

from gated_jax.hf.families import FAMILIES
from gated_jax.hf.families import NOT_YET
from gated_jax.hf.families import Family

WIDTH = 80
# How far a small model of random weights is from transformers, in float32 on a
# CPU: its logits from theirs, and its gradients, in parts of the largest of a
# tensor, from theirs in float64. tests/hf/families_test.py prints both.
# Published folders are read as the family before them.
NEAR: dict[str, tuple[str, str]] = {
  'qwen3': ('4.9e-06', '2.4e-06'),
  'qwen3_moe': ('5.1e-06', '1.9e-06'),
  'gated_qwen3': ('8.2e-06', ''),
  'qwen3_5': ('9.7e-06', '1.5e-05'),
  'qwen3_5_moe': ('1.4e-05', '1.5e-05'),
  'qwen3_next': ('3.2e-05', '1.3e-05'),
  'afmoe': ('3.2e-06', '2.4e-06'),
  'muse_glimmer': ('1.1e-05', '1.3e-05'),
  'laguna': ('7.2e-06', '2.7e-06'),
  'step': ('1.4e-05', '5.3e-06'),
  'lfm3': ('7.6e-06', '4.4e-06'),
  'beam': ('7.1e-06', '2.7e-06'),
  'olmo_hybrid': ('1.7e-05', '4.4e-06'),
  'muse_spark': ('4.5e-06', '9.5e-06'),
}

# Tokens a second of a small model of the family, decoding one row and in
# training, as `python -m gated_jax.bench families --cpu_time` printed them for
# one core of a CPU.
SPEED: dict[str, tuple[int, int]] = {
  'qwen3': (334, 878),
  'qwen3_moe': (294, 979),
  'gated_qwen3': (290, 827),
  'qwen3_5': (339, 697),
  'qwen3_5_moe': (240, 637),
  'qwen3_next': (235, 626),
  'afmoe': (223, 780),
  'muse_glimmer': (273, 778),
  'laguna': (259, 738),
  'step': (262, 770),
  'lfm3': (325, 923),
  'beam': (273, 778),
  'olmo_hybrid': (298, 637),
  'muse_spark': (281, 888),
}


class Step(NamedTuple):
  """A train step as the TPU compiler estimates it; none was run."""

  pod: str
  seconds: float
  tokens: int  # a second


# Steps of a released size of the family, 1024 rows of 4096 tokens on a pod of
# 256 devices, as `python -m gated_jax.aot` predicts them: docs/models.md has
# the command. Other families were not compiled at a released size.
PREDICTED: dict[str, tuple[str, tuple[Step, ...]]] = {
  'qwen3_5': ('27B', (Step('v5p', 8.89, 472_000),)),
  'qwen3_5_moe': (
    '35B-A3B',
    (
      Step('v5p', 2.02, 2_076_000),
      Step('v6e', 1.94, 2_163_000),
      Step('tpu7x', 1.35, 3_104_000),
    ),
  ),
  'afmoe': (
    'Trinity Mini',
    (
      Step('v5p', 1.42, 2_959_000),
      Step('v6e', 1.64, 2_564_000),
      Step('tpu7x', 1.16, 3_606_000),
    ),
  ),
}


def _predicted(family: Family) -> str:
  """A family's predicted steps in a few words; '': it was not compiled."""
  if family.name not in PREDICTED:
    return ''
  size, steps = PREDICTED[family.name]
  return f'{size}: ' + ', '.join(
    f'{step.pod} {step.tokens // 1000:,}k ({step.seconds:.2f} s)'
    for step in steps
  )


def _lines(family: Family) -> Iterator[str]:
  """A family in words: what it is, and what of it is passed over."""
  marks = ', '.join(sorted(family.marks))
  yield f'config.json says {family.model_type}' + (
    f' and one of {marks}' if marks else ''
  )
  yield f'loads: {family.about}'
  if family.limits:
    yield f'but: {family.limits}'.replace('`', '')
  if family.name in NEAR:
    logits, gradients = NEAR[family.name]
    yield f'differs: {logits} in logits' + (
      f', {gradients} in gradients' if gradients else ''
    )
  if family.name in SPEED:
    decoding, training = SPEED[family.name]
    yield (
      f'speed: {decoding} tokens/s decoding and {training} in training, of a '
      'small model on a core of a CPU'
    )
  if predicted := _predicted(family):
    yield (
      f'on a pod of 256 devices, in tokens/s and seconds a step: {predicted}; '
      "the TPU compiler's estimate, nothing was run"
    )


def text() -> str:
  """The page that `python -m gated_jax.hf list` prints."""
  paragraphs = []
  for family in FAMILIES:
    paragraphs.append(family.name)
    paragraphs += [
      textwrap.fill(line, WIDTH, initial_indent='  ', subsequent_indent='    ')
      for line in _lines(family)
    ]
  paragraphs.append('\nGated as well, and refused:')
  paragraphs += [f'  {kind}: {reason}' for kind, reason in NOT_YET.items()]
  return '\n'.join(paragraphs)


def markdown() -> str:
  """The same as two tables."""
  rows = [
    '| name | config.json says | what loads | what does not, and why '
    '| logits | gradients | decoding | training | predicted on a pod |',
    '|---|---|---|---|---|---|---|---|---|',
  ]
  for family in FAMILIES:
    says = f'`{family.model_type}`' + (
      f' and one of {", ".join(f"`{m}`" for m in sorted(family.marks))}'
      if family.marks
      else ''
    )
    logits, gradients = NEAR.get(family.name, ('', ''))
    decoding, training = SPEED.get(family.name, ('', ''))
    rows.append(
      f'| `{family.name}` | {says} | {family.about} | {family.limits} '
      f'| {logits} | {gradients} | {decoding} | {training} '
      f'| {_predicted(family) or "-"} |'
    )
  rows += ['', '| config.json says | why it is refused |', '|---|---|']
  rows += [f'| `{kind}` | {reason} |' for kind, reason in NOT_YET.items()]
  return '\n'.join(rows)
