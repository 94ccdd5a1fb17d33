"""Attention with one more logit that has no value: a place to look away to.

    Y' = sum_s exp(l_s) v_s / (exp(b) + sum_s exp(l_s)) = Y * sigmoid(lse - b)

where lse is the log-sum-exp of the attention logits l, and b the logit of the
sink: a number for each head (gpt-oss has one), or scale * q . k of a learnable
key, which is called a key bias (Gu et al., arXiv 2410.10781). It is a gate too,
whose score follows from the attention logits.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float


def with_sink(
  output: Float[Array, 'B T N V'],
  lse: Float[Array, 'B N T'],
  sink: Float[Array, '#B N #T'],
) -> tuple[Float[Array, 'B T N V'], Float[Array, 'B N T']]:
  """The output and the log-sum-exp of attention that has a sink.

  Args:
    output: of attention without it.
    lse: log-sum-exp of its logits; -inf where no key is visible.
    sink: the sink's logits.
  """
  share = jax.nn.sigmoid(lse - sink)
  factor = jnp.swapaxes(share, 1, 2)[..., None]
  dtype = jnp.promote_types(output.dtype, jnp.float32)
  scaled = (output.astype(dtype) * factor).astype(output.dtype)
  return scaled, jnp.logaddexp(lse, sink)


def key_bias_logits(
  query: Float[Array, 'B T N H'], bias: Float[Array, 'K H']
) -> Float[Array, 'B N T']:
  """Logits of a learnable key for each kv head.

  Args:
    query: heads, normed and rotated as they meet other keys.
    bias: the key, which has no position; its head serves N / K of the queries.
  """
  b, t, n, h = query.shape
  grouped = query.reshape(b, t, bias.shape[0], -1, h)
  dtype = jnp.promote_types(query.dtype, jnp.float32)
  logits = jnp.einsum(
    'BTKGH,KH->BKGT', grouped, bias, preferred_element_type=dtype
  )
  return h**-0.5 * logits.reshape(b, n, t)
