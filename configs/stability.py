"""A learning rate at which the ungated model breaks and the gated one learns.

    python train.py --config=configs/stability.py:gated --workdir=runs/gated
    python train.py --config=configs/stability.py:baseline,4e-3 --workdir=...
    python train.py --config=configs/stability.py:baseline,0.03,smoke \
      --workdir=runs/small

Words after the colon: the model, its largest learning rate (8e-3 when it is
left out), and `smoke` for the same in `smoke.py`'s size. Paper: arXiv
2505.06708, Table 2, 48 layers, 400B tokens; perplexity at the two rates:

                4e-3    8e-3
    baseline    7.421   9.195   (over 1T tokens, 8e-3 diverges)
    sandwich    -       7.407   ungated, also what a block adds is normalised
    gated       7.288   7.325
    headwise    7.370   -

Parameters: 1,705,932,288 (baseline), 1,706,079,744 (sandwich), 1,715,369,472
(gated, with a narrower MLP) and 1,707,111,936 (headwise).

Not measured here. Text and hardware as in `dense_1b7.py`. Every step is
logged, because a spike may last for one.
"""

from configs import gate_sweep

MODELS = {
  'baseline': 'dense48_baseline',
  'sandwich': 'dense48_8e3_sandwich',
  'gated': 'dense48_elementwise',
  'headwise': 'dense48_headwise',
}


def get_config(words: str = 'gated'):
  model, *rest = words.split(',')
  small = rest[-1:] == ['smoke']
  rates = rest[:-1] if small else rest
  if model not in MODELS or len(rates) > 1:
    raise ValueError(
      f"{words!r} must be MODEL, or MODEL,RATE, each with ',smoke' after it "
      f'or not; MODEL one of: {" ".join(MODELS)}'
    )
  try:
    rate = float(rates[0]) if rates else 8e-3
  except ValueError:
    raise ValueError(f'{rates[0]!r} is no learning rate') from None
  config = gate_sweep.get_config(MODELS[model] + (',smoke' if small else ''))
  config.optimizer.learning_rate = rate
  config.log_every = 1
  config.probe_every = 100
  return config
