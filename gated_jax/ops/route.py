"""The router of a mixture of experts: which experts a token goes to.

    r = x W_r                              logits, in float32
    s = softmax(r)  or  sigmoid(r)         scores, a row of SCORES
    chosen = the top k experts by s + bias
    p_e = scale * s_e / sum of the chosen s

The bias chooses and is no part of a weight. It is trained by load, without a
gradient of the loss (arXiv 2408.15664): an expert with more than its share of
the choices becomes less likely to be chosen. Where experts come in groups, only
the groups with the largest sums of two scores take part (arXiv 2412.19437).

`gated_jax/ops/moe` computes the experts, `gated_jax/model/moe.py` owns the
parameters.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int


class Score(NamedTuple):
  """How logits [*b, E] become scores."""

  function: Callable[[Array], Array]
  sums_to_one: bool  # over the experts


SCORES = {
  'softmax': Score(jax.nn.softmax, sums_to_one=True),
  'sigmoid': Score(jax.nn.sigmoid, sums_to_one=False),
}
# The score of a group of experts is the sum of so many of its best.
BEST_OF_GROUP = 2


@dataclasses.dataclass(frozen=True)
class RouteSpec:
  """Static options of `route`."""

  top_k: int  # experts of a token
  score: str = 'softmax'
  normalize: bool = True  # True: the k weights are divided by their sum
  scale: float = 1.0  # factor of the weights
  groups: int = 1  # number of groups of experts, in their order
  top_groups: int = 1  # groups whose experts a token may choose
  softcap: float = 0.0  # c: logits become c tanh(logits / c); 0: they stay
  logit_scale: float = 1.0  # factor of the logits, before any softcap

  def __post_init__(self):
    if self.score not in SCORES:
      raise ValueError(
        f'score={self.score!r} must be one of {", ".join(SCORES)}'
      )
    if not 0 < self.top_groups <= self.groups:
      raise ValueError(
        f'top_groups={self.top_groups} must lie between 1 and '
        f'{self.groups} groups'
      )


class Routing(NamedTuple):
  """The router's result for every token."""

  logits: Float[Array, '*b E']  # float32
  probabilities: Float[Array, '*b E']  # scores over their sum
  indices: Int[Array, '*b k']  # chosen experts, most probable first
  weights: Float[Array, '*b k']  # factors of the chosen experts' outputs


class Statistics(NamedTuple):
  """Scalars over all tokens that count."""

  balance: Float[Array, '']  # E sum_e f_e P_e: 1 where the load is even
  router_z: Float[Array, '']  # mean squared log-partition of the router
  max_load: Float[Array, '']  # the fullest expert's choices over the mean
  idle_experts: Float[Array, '']  # share of experts that no token chose


def route(
  x: Float[Array, '*b D'],
  kernel: Float[Array, 'D E'],
  spec: RouteSpec,
  bias: Float[Array, ' E'] | None = None,
  valid: Bool[Array, '*b'] | None = None,
) -> Routing:
  """The k best experts of every token; ties go to the first.

  Args:
    x: tokens.
    kernel: the router. Its matmul takes float32 at full precision on every
      platform: rounding here flips choices.
    spec: static options.
    bias: added to the scores for choosing. Its gradient is each expert's
      `excess_load`, whatever the loss is.
    valid: tokens that the load counts; None: all.

  Raises:
    ValueError: there are fewer experts to choose from than a token chooses.
  """
  _check_sizes(kernel.shape[-1], spec)
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  logits = jnp.einsum(
    '...D,DE->...E',
    x.astype(dtype),
    kernel.astype(dtype),
    precision=jax.lax.Precision.HIGHEST,
  )
  if spec.logit_scale != 1:
    logits *= spec.logit_scale
  if spec.softcap:
    logits = spec.softcap * jnp.tanh(logits / spec.softcap)
  score = SCORES[spec.score]
  scores = score.function(logits)
  probabilities = scores if score.sums_to_one else scores / _sum(scores, score)
  weights, indices = _choose(scores, bias, spec)
  if spec.normalize:
    weights /= _sum(weights, score)
  if spec.scale != 1:
    weights *= spec.scale
  if bias is not None:
    share = load_share(indices, scores.shape[-1], valid, dtype=dtype)
    weights = attach_load_gradient(weights, bias, excess_load(share))
  return Routing(logits, probabilities, indices, weights)


def _check_sizes(experts: int, spec: RouteSpec) -> None:
  if experts % spec.groups:
    raise ValueError(
      f'{experts} experts must be a multiple of groups={spec.groups}'
    )
  choice = experts // spec.groups * spec.top_groups
  if not 0 < spec.top_k <= choice:
    raise ValueError(
      f'top_k={spec.top_k} must lie between 1 and {choice} experts'
    )


def _sum(scores: Float[Array, '*b n'], score: Score) -> Float[Array, '*b 1']:
  """The sum over experts, which is never zero."""
  total = jnp.sum(scores, axis=-1, keepdims=True)
  if score.sums_to_one:
    return total
  return jnp.maximum(total, jnp.finfo(scores.dtype).tiny)


def _choose(
  scores: Float[Array, '*b E'],
  bias: Float[Array, ' E'] | None,
  spec: RouteSpec,
) -> tuple[Float[Array, '*b k'], Int[Array, '*b k']]:
  """Scores and indices of the chosen experts, best first."""
  if bias is None and spec.groups == spec.top_groups:
    return jax.lax.top_k(scores, spec.top_k)
  rank = jax.lax.stop_gradient(scores)
  if bias is not None:
    rank += jax.lax.stop_gradient(bias).astype(scores.dtype)
  if spec.groups > spec.top_groups:
    rank = _without_weak_groups(rank, spec)
  _, indices = jax.lax.top_k(rank, spec.top_k)
  return jnp.take_along_axis(scores, indices, axis=-1), indices


def _without_weak_groups(
  rank: Float[Array, '*b E'], spec: RouteSpec
) -> Float[Array, '*b E']:
  """-inf for the experts of all but the best groups."""
  grouped = rank.reshape(*rank.shape[:-1], spec.groups, -1)
  best, _ = jax.lax.top_k(grouped, min(BEST_OF_GROUP, grouped.shape[-1]))
  _, groups = jax.lax.top_k(best.sum(-1), spec.top_groups)
  allowed = jax.nn.one_hot(groups, spec.groups, dtype=bool).any(-2)
  return jnp.where(allowed[..., None], grouped, -jnp.inf).reshape(rank.shape)


def load_share(
  indices: Int[Array, '*b k'],
  experts: int,
  valid: Bool[Array, '*b'] | None = None,
  axes: tuple[str, ...] = (),
  dtype: jnp.dtype | str = 'float32',
) -> Float[Array, ' E']:
  """The share of all choices that fell on each expert; they sum to one.

  Args:
    indices: from `route`.
    experts: number of experts.
    valid: tokens that count; None: all.
    axes: inside shard_map, the mesh axes that split the tokens.
    dtype: of the result.
  """
  keep = _weights_of(valid, indices.shape[:-1], jnp.dtype(dtype))
  tokens = jnp.maximum(_total(jnp.ones_like(keep), keep, axes), 1)
  # Tokens last: a TPU would turn [*b, k, E] to add up its k.
  choices = jnp.moveaxis(indices, -1, 0)[:, None]
  names = jnp.arange(experts).reshape(-1, *(1,) * keep.ndim)
  chosen = jnp.where(choices == names, keep, 0)
  chosen = jnp.sum(chosen, axis=(0, *range(2, chosen.ndim)))
  chosen = jax.lax.psum(chosen, axes) if axes else chosen
  return jax.lax.stop_gradient(chosen) / (tokens * indices.shape[-1])


def excess_load(share: Float[Array, ' E']) -> Float[Array, ' E']:
  """Each expert's share of the choices, less an even one."""
  return share - 1 / share.shape[-1]


@jax.custom_vjp
def attach_load_gradient(
  weights: Float[Array, '*b k'],
  bias: Float[Array, ' E'],
  excess: Float[Array, ' E'],
) -> Float[Array, '*b k']:
  """`weights` as they are; backward gives `bias` the gradient `excess`.

  Descent on it lowers the bias of experts with too much load. The gradient does
  not depend on the loss, so averaging it over microbatches averages the load,
  and it is the same on all devices if the load is that of all tokens.
  """
  del bias, excess
  return weights


attach_load_gradient.defvjp(
  lambda weights, bias, excess: (weights, excess.astype(bias.dtype)),
  lambda excess, d_weights: (d_weights, excess, None),
)


def router_statistics(
  routing: Routing,
  valid: Bool[Array, '*b'] | None = None,
  axes: tuple[str, ...] = (),
) -> Statistics:
  """Losses and load over the whole batch, not each device's part of it.

  Balance is E sum_e f_e P_e with f_e the share of all choices that fell on e
  and P_e its mean probability, both over the global batch (arXiv 2501.11873).
  Under jit a sum over a sharded axis is global already; inside shard_map
  `axes` names the mesh axes that split the tokens.

  Args:
    routing: from `route`.
    valid: tokens that count; None: all.
    axes: as above.
  """
  experts, dtype = routing.logits.shape[-1], routing.logits.dtype
  log_partition = jax.nn.logsumexp(routing.logits, axis=-1)
  keep = _weights_of(valid, log_partition.shape, dtype)
  tokens = jnp.maximum(_total(jnp.ones_like(keep), keep, axes), 1)
  load = load_share(routing.indices, experts, valid, axes, dtype)
  mean_probability = _total(routing.probabilities, keep, axes) / tokens
  return Statistics(
    balance=experts * jnp.sum(load * mean_probability),
    router_z=_total(log_partition**2, keep, axes) / tokens,
    max_load=experts * jnp.max(load),
    idle_experts=jnp.mean((load == 0).astype(dtype)),
  )


def _weights_of(
  valid: Bool[Array, '*b'] | None, shape: tuple[int, ...], dtype: jnp.dtype
) -> Float[Array, '*b']:
  """One for each token that counts, zero for the others."""
  valid = jnp.ones(shape, bool) if valid is None else valid
  return valid.astype(dtype)


def _total(
  values: Float[Array, '...'],
  keep: Float[Array, '*b'],
  axes: tuple[str, ...],
) -> Float[Array, '...']:
  """The sum over all tokens that count."""
  rest = (1,) * (values.ndim - keep.ndim)
  values = values * keep.reshape(keep.shape + rest)
  values = values.sum(tuple(range(keep.ndim)))
  return jax.lax.psum(values, axes) if axes else values
