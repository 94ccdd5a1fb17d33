"""A trained dense model, made to read 32k tokens, then 128k.

    python train.py --config=configs/long_context.py:base32k \
      --workdir=runs/dense28_32k --config.init_from=runs/dense28 \
      --config.data.paths='/data/*.parquet' \
      --config.data.tokenizer=/data/tokenizer.json

`base32k` continues `dense_1b7.py:28,3t5`: the rotary base goes from 10,000 to
1,000,000, and 80B more tokens come in rows of 32k. `yarn128k` is that model
with YaRN by a factor of 4, which the paper evaluates as it is, without
training: `gated_jax.evals.context` reads it further. Whoever wants to train it
as well can start it like the first. `,smoke` after either does the same to
`smoke.py` on a CPU, from 256 tokens to 1024, then 2048:

    python train.py --config=configs/long_context.py:base32k,smoke \
      --workdir=runs/smoke_long --config.init_from=runs/smoke

Paper: arXiv 2505.06708, Table 5, RULER (ungated, gated), not measured here:

                4k             8k             16k            32k
    base32k     88.89, 90.56   85.88, 87.11   83.15, 84.61   79.50, 79.77
    yarn128k    82.90, 88.13   71.52, 80.01   61.23, 76.74   37.94, 72.88
    yarn128k    at 64k: 37.51, 66.60   at 128k: 31.65, 58.82

1,728,177,152 parameters at every length, rotation has none.

Hardware: a TPU pod, sized beforehand by `python -m gated_jax.aot`
(docs/tpu_vm.md).
"""

from configs import dense_1b7
from configs import smoke

STAGES = ('base32k', 'yarn128k')
TOKENS = 80e9


def get_config(words: str = 'base32k'):
  stage, _, scale = words.partition(',')
  if stage not in STAGES or scale not in ('', 'smoke'):
    raise ValueError(
      f"{words!r} must be one of: {' '.join(STAGES)}, with ',smoke' or not"
    )
  config = smoke.get_config() if scale else dense_1b7.get_config('28,3t5')
  model, data, optimizer = config.model, config.data, config.optimizer

  # As many tokens in a batch as before, in longer rows.
  continuation, factor = (4, 2) if scale else (8, 4)
  model.rope.base = 1e6
  config.init_changes = ('model.rope',)
  model.length = data.length = continuation * data.length
  data.batch //= continuation
  if stage == 'yarn128k':
    model.rope.scaling = 'yarn'
    model.rope.factor = float(factor)
    model.rope.original_length = model.length
    model.length = data.length = factor * model.length
    data.batch //= factor
  if not scale:
    config.steps = round(TOKENS / (data.batch * data.length))

  # Ours: the paper does not print them. Pre-training ended at this rate.
  optimizer.schedule = 'constant'
  optimizer.learning_rate = optimizer.final_learning_rate
  optimizer.warmup_steps = min(100, config.steps)
  return config
