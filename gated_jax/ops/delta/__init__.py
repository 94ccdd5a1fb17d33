"""The gated delta rule: linear attention whose state is a small matrix.

    S <- exp(g) S                 the state forgets
    S <- S + k (beta (v - S^T k))^T   and learns what it does not say yet
    o  = S^T q

From Gated Delta Networks (arXiv 2412.06464). `rule.py` has the recurrence and
chooses, `chunks.py` computes whole chunks of tokens by products of matrices,
`pallas_tpu/` does so in a TPU kernel, `context.py` hands states on between
devices, and `convolution.py` is the short filter that queries, keys and values
pass before.
"""
