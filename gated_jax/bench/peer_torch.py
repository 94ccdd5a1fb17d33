"""The same model in PyTorch, as one would write it there to be fast.

    python -m gated_jax.bench.peer_torch '{"model": "400m", "batch": 8}'

One product makes query, key, value and gate, one the two halves of the MLP;
attention is PyTorch's own, cuDNN's or flash, whichever is quicker here;
bfloat16 autocast, torch.compile, fused AdamW, gradient clipping. Prints one
JSON record. Nothing else of the project imports torch.
"""

import contextlib
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend
from torch.nn.attention import sdpa_kernel

from gated_jax.bench.step import Workload
from gated_jax.bench.step import rates
from gated_jax.config import ModelConfig

SDPA = {
  'cudnn': SDPBackend.CUDNN_ATTENTION,
  'flash': SDPBackend.FLASH_ATTENTION,
  'math': SDPBackend.MATH,
}


class Layer(nn.Module):
  """Attention with the gate, then SwiGLU."""

  def __init__(self, config: ModelConfig):
    super().__init__()
    c = config
    self.heads, self.kv_heads, self.head_dim = c.heads, c.kv_heads, c.head_dim
    self.gates = 0
    if c.gate.position != 'none':
      per_head = 1 if c.gate.granularity == 'headwise' else c.head_dim
      self.gates = c.heads * per_head
    inner = c.heads * c.head_dim
    kv = c.kv_heads * c.head_dim
    self.sizes = (inner, kv, kv, self.gates)
    self.into = nn.Linear(c.width, sum(self.sizes), bias=False)
    self.out = nn.Linear(inner, c.width, bias=False)
    self.up = nn.Linear(c.width, 2 * c.mlp_width, bias=False)
    self.down = nn.Linear(c.mlp_width, c.width, bias=False)
    self.norms = nn.ModuleList(
      nn.RMSNorm(size, eps=c.norm_eps)
      for size in (c.width, c.width, c.head_dim, c.head_dim)
    )

  def forward(
    self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
  ) -> torch.Tensor:
    """Attention and MLP, each added to x."""
    b, t, _ = x.shape
    before, between, q_norm, k_norm = self.norms
    q, k, v, gate = self.into(before(x)).split(self.sizes, dim=-1)
    q = q_norm(q.view(b, t, self.heads, self.head_dim))
    k = k_norm(k.view(b, t, self.kv_heads, self.head_dim))
    v = v.view(b, t, self.kv_heads, self.head_dim)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    y = F.scaled_dot_product_attention(
      *(z.transpose(1, 2).to(v.dtype) for z in (q, k, v)),
      is_causal=True,
      enable_gqa=self.heads != self.kv_heads,
    ).transpose(1, 2)
    if self.gates:
      scores = torch.sigmoid(gate.view(b, t, self.heads, -1).float())
      y = (y * scores).to(y.dtype)
    x = x + self.out(y.reshape(b, t, -1))
    gate, up = self.up(between(x)).chunk(2, dim=-1)
    return x + self.down(F.silu(gate) * up)


def rotate(
  x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
  """Rotary embedding of halves, in float32."""
  a, b = x.float().chunk(2, dim=-1)
  return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Model(nn.Module):
  """Tokens and targets to the mean loss."""

  def __init__(self, config: ModelConfig, length: int):
    super().__init__()
    c = config
    self.embedding = nn.Embedding(c.vocab, c.width)
    self.layers = nn.ModuleList(Layer(c) for _ in range(c.depth))
    self.norm = nn.RMSNorm(c.width, eps=c.norm_eps)
    half = torch.arange(0, c.head_dim, 2, dtype=torch.float64)
    angles = torch.outer(
      torch.arange(length, dtype=torch.float64),
      c.rope.base ** -(half / c.head_dim),
    )
    for name, value in (('cos', angles.cos()), ('sin', angles.sin())):
      self.register_buffer(name, value.float()[None, :, None])
    for parameter in self.parameters():
      if parameter.ndim > 1:
        nn.init.normal_(parameter, std=c.init_std)

  def forward(
    self, tokens: torch.Tensor, targets: torch.Tensor
  ) -> torch.Tensor:
    """The mean cross-entropy of the targets."""
    x = self.embedding(tokens)
    if torch.is_autocast_enabled(x.device.type):
      x = x.to(torch.get_autocast_dtype(x.device.type))
    for layer in self.layers:
      x = layer(x, self.cos, self.sin)
    logits = F.linear(self.norm(x), self.embedding.weight)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def wait(device: str) -> None:
  """Until the device has done everything it was given."""
  if device == 'cuda':
    torch.cuda.synchronize()


def seconds_of(function: Callable[[], Any], calls: int, device: str) -> float:
  """Seconds of one call, after one that is not timed."""
  function()
  wait(device)
  start = time.perf_counter()
  for _ in range(calls):
    function()
  wait(device)
  return (time.perf_counter() - start) / calls


def quickest_sdpa(config: ModelConfig, work: Workload, device: str) -> str:
  """The backend that takes this shape and is quickest, both ways."""
  if device != 'cuda':
    return 'math'
  shape = (work.batch, work.length, config.heads, config.head_dim)
  kv_shape = (*shape[:2], config.kv_heads, config.head_dim)
  kinds: Any = {'device': device, 'dtype': torch.bfloat16}
  q, k, v = (
    torch.randn(s, **kinds).transpose(1, 2).requires_grad_()
    for s in (shape, kv_shape, kv_shape)
  )

  def both() -> None:
    """Forward and backward of PyTorch's attention."""
    y = F.scaled_dot_product_attention(
      q, k, v, is_causal=True, enable_gqa=config.heads != config.kv_heads
    )
    y.backward(y.detach())

  times = {}
  for name in ('cudnn', 'flash'):
    # A backend that refuses the shape says so by RuntimeError.
    with contextlib.suppress(RuntimeError), sdpa_kernel(SDPA[name]):
      times[name] = seconds_of(both, 10, device)
  print(json.dumps({'sdpa_ms': {n: 1e3 * s for n, s in times.items()}}))
  return min(times, key=lambda name: times[name])


def ceiling_of(device: str, size: int = 8192) -> float:
  """FLOP/s of a large product."""
  if device != 'cuda':
    return 0.0
  kinds: Any = {'device': device, 'dtype': torch.bfloat16}
  a, b = (torch.randn(size, size, **kinds) for _ in range(2))
  times = [seconds_of(lambda: a @ b, 20, device) for _ in range(5)]
  return 2 * size**3 / statistics.median(times)


def bench(work: Workload, rounds: int, steps: int) -> dict[str, Any]:
  """The record of one workload, like `step.bench`'s."""
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  torch.manual_seed(0)
  torch.set_float32_matmul_precision('high')
  ceiling = ceiling_of(device)
  run = work.run()
  config, settings = run.model, run.optimizer
  backend = quickest_sdpa(config, work, device)
  with torch.device(device):
    model = Model(config, work.length)
  optimizer = torch.optim.AdamW(
    model.parameters(),
    lr=settings.learning_rate,
    betas=(settings.b1, settings.b2),
    eps=settings.eps,
    weight_decay=settings.weight_decay,
    fused=True,
  )
  batch = work.batch_of()
  tokens, targets = (
    torch.from_numpy(batch[name]).long().to(device)
    for name in ('tokens', 'targets')
  )
  compiled = torch.compile(model) if device == 'cuda' else model
  narrow = torch.autocast(device, torch.bfloat16)

  def step() -> torch.Tensor:
    """One step of training, as the other side takes it."""
    with narrow, sdpa_kernel(SDPA[backend]):
      loss = compiled(tokens, targets)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()

  start = time.perf_counter()
  losses = [float(step())]
  compile_seconds = time.perf_counter() - start
  samples = [seconds_of(step, steps, device) for _ in range(rounds)]
  losses.append(float(step()))
  median = statistics.median(samples)
  peak = torch.cuda.max_memory_allocated() if device == 'cuda' else 0
  return {
    'bench': 'step',
    'framework': f'torch {torch.__version__}',
    'name': work.gate,
    **dataclasses.asdict(work),
    **rates(work, median, ceiling),
    'ceiling': ceiling / 1e12,
    'attention': f'sdpa {backend}',
    'spread': (max(samples) - min(samples)) / median,
    'memory_gib': peak / 2**30,
    'compile_s': compile_seconds,
    'losses': losses,
  }


def main(arguments: list[str]) -> int:
  """Reads a workload as JSON; rounds and steps may follow."""
  work = Workload(**json.loads(arguments[0]))
  rounds, steps = (int(x) for x in [*arguments[1:], '5', '5'][:2])
  try:
    record = bench(work, rounds, steps)
  except torch.OutOfMemoryError as error:
    record = {
      'bench': 'step',
      'framework': f'torch {torch.__version__}',
      **dataclasses.asdict(work),
      'failed': str(error).splitlines()[0][:200],
    }
  print(json.dumps(record))
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
