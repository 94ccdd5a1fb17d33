"""The text of a compiled program, as records: `compiled.as_text()` read back.

A module is computations, a computation is instructions by name. Only what a
cost model needs is read: types and their bytes, operands, attributes, the
FLOPs of matmuls. Loops are in `loops.py`, sums in `program.py`.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import numpy as np

_BITS = {
  **{'pred': 8, 'token': 0, 'c64': 64, 'c128': 128, 'f64': 64, 'f32': 32},
  **{'bf16': 16, 'f16': 16, 'f8e8m0fnu': 8, 'f4e2m1fn': 4},
  **{f'{sign}{bits}': bits for sign in 'su' for bits in (2, 4, 8, 16, 32, 64)},
}
_ARRAY = re.compile(r'\b([a-z]+\d*\w*)\[([\d,]*)\]')
_HEADER = re.compile(r'^(ENTRY )?(%[^\s(]+) \(.*\{\s*$')
# A computation that runs beside the main core names its thread at the end.
# Other lines that begin with a bracket continue an instruction's attributes.
_FOOTER = re.compile(r'^\}(, execution_thread=.*)?\s*$')
_INSTRUCTION = re.compile(r'^  (ROOT )?(%[^\s=]+) = ')
_COMMENT = re.compile(r'/\*.*?\*/')
_NAME = re.compile(r'%[^\s,()]+')
_NO_ESTIMATE = 1 << 62  # the compiler writes the largest int64 for none
_MANY = 4_000_000  # window positions beyond which borders do not matter


def arrays(text: str) -> list[tuple[str, tuple[int, ...]]]:
  """Element type and shape of every array that a type names."""
  return [
    (kind, tuple(int(n) for n in sizes.split(',') if n))
    for kind, sizes in _ARRAY.findall(text)
    if kind in _BITS or kind.startswith('f8')
  ]


def array_bytes(kind: str, shape: tuple[int, ...]) -> int:
  """Bytes of one array, without the padding of its layout."""
  return math.ceil(_BITS.get(kind, 8) * math.prod(shape) / 8)


def bytes_of(text: str) -> int:
  """Bytes of a type; those of its arrays together where it is a tuple."""
  return sum(array_bytes(kind, shape) for kind, shape in arrays(text))


def _close(text: str, start: int) -> int:
  """Index after the bracket that closes the one at `start`."""
  depth, quoted = 0, False
  for i in range(start, len(text)):
    c = text[i]
    if c == '"' and text[i - 1] != '\\':
      quoted = not quoted
    elif not quoted and c in '([{':
      depth += 1
    elif not quoted and c in ')]}':
      depth -= 1
      if not depth:
        return i + 1
  return len(text)


@dataclasses.dataclass(frozen=True, eq=False)
class Instruction:
  """One line: `name = type op(operands), attributes`."""

  name: str
  type: str
  op: str
  inside: str  # the text between the op's brackets
  operands: tuple[str, ...]
  attributes: str
  root: bool

  def attribute(self, key: str) -> str:
    """The text after `key=`, '' where there is none."""
    match = re.search(
      rf'\b{key}=(%[^\s,{{}}]+|\{{[^{{}}]*\}}|[^\s,]+)', self.attributes
    )
    return match.group(1) if match else ''

  @property
  def calls(self) -> str:
    """The computation that it runs; '' where there is none."""
    return self.attribute('calls')

  @property
  def op_name(self) -> str:
    """Its origin in the Python program."""
    match = re.search(r'op_name="([^"]*)"', self.attributes)
    return match.group(1) if match else ''

  @property
  def target(self) -> str:
    """The function that a custom call calls; '' for other instructions."""
    match = re.search(r'custom_call_target="([^"]+)"', self.attributes)
    return match.group(1) if match else ''

  @property
  def channel(self) -> str:
    """A name that the parts of one collective share."""
    return self.attribute('channel_id') or self.name

  @functools.cached_property
  def cycles(self) -> int | None:
    """The compiler's estimate, None where it makes none."""
    match = re.search(r'"estimated_cycles":"?(\d+)', self.attributes)
    cycles = int(match.group(1)) if match else _NO_ESTIMATE
    return cycles if cycles < _NO_ESTIMATE else None


def _instruction(line: str) -> Instruction:
  head = _INSTRUCTION.match(line)
  assert head is not None
  rest = _COMMENT.sub('', line[head.end() :])
  end = _close(rest, 0) if rest[0] == '(' else rest.index(' ')
  kind, rest = rest[:end], rest[end:].lstrip()
  start = rest.index('(')
  end = _close(rest, start)
  inside = rest[start + 1 : end - 1]
  return Instruction(
    name=head.group(2),
    type=kind,
    op=rest[:start],
    inside=inside,
    operands=tuple(_NAME.findall(inside)),
    attributes=rest[end:],
    root=bool(head.group(1)),
  )


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Module:
  """A program: computations by name, and which one is the entry."""

  computations: dict[str, Computation]
  entry: str
  partitions: int

  def root(self, computation: str) -> Instruction:
    """The instruction whose value the computation returns."""
    return next(i for i in self.computations[computation].values() if i.root)

  def operand_types(self, computation: str, i: Instruction) -> list[str]:
    """Types of an instruction's operands, as the text has them."""
    known = self.computations[computation]
    return [known[name].type for name in i.operands if name in known]

  def operand_bytes(self, computation: str, i: Instruction) -> int:
    """Bytes of an instruction's operands together."""
    return sum(bytes_of(t) for t in self.operand_types(computation, i))

  def flops(self, computation: str, i: Instruction) -> int:
    """FLOPs of the matmuls in one instruction, fused ones included."""
    if i.op == 'dot':
      return self._dot_flops(computation, i)
    if i.op == 'convolution':
      return self._convolution_flops(computation, i)
    if i.op == 'fusion' and i.calls:
      return sum(
        self.flops(i.calls, inner)
        for inner in self.computations[i.calls].values()
      )
    return 0

  def _dot_flops(self, computation: str, i: Instruction) -> int:
    left = arrays(self.operand_types(computation, i)[0])[0][1]
    summed = re.findall(r'\d+', i.attribute('lhs_contracting_dims'))
    output = arrays(i.type)[0][1]
    return 2 * math.prod(output) * math.prod(left[int(d)] for d in summed)

  def _convolution_flops(self, computation: str, i: Instruction) -> int:
    left, right = (
      arrays(t)[0][1] for t in self.operand_types(computation, i)[:2]
    )
    output = arrays(i.type)[0][1]
    labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', i.attributes)
    assert labels is not None
    in_labels, kernel_labels, out_labels = labels.groups()
    window = i.attribute('window')

    def field(key: str) -> list[str]:
      """The numbers of one field of a convolution's window."""
      match = re.search(rf'\b{key}=([\dx_\-]+)', window)
      return match.group(1).split('x') if match else []

    size = [int(n) for n in field('size')]
    ones = ['1'] * len(size)
    steps = zip(
      size,
      field('stride') or ones,
      field('pad') or ['0_0'] * len(size),
      field('lhs_dilate') or ones,
      field('rhs_dilate') or ones,
      strict=True,
    )
    used = 1
    for d, (width, stride, pad, dilate, spacing) in enumerate(steps):
      out = output[out_labels.index(str(d))]
      if out * width > _MANY:
        used *= out * width
        continue
      # Pairs (output, window position) that read an element, not padding.
      at = np.arange(out)[:, None] * int(stride) - int(pad.split('_')[0])
      at = at + np.arange(width) * int(spacing)
      within = at // int(dilate) < left[in_labels.index(str(d))]
      used *= int(((at % int(dilate) == 0) & (at >= 0) & within).sum())
    return (
      2
      * used
      * output[out_labels.index('b')]
      * output[out_labels.index('f')]
      * right[kernel_labels.index('i')]
    )


def _lines(text: str) -> Iterator[tuple[str, bool, str]]:
  """(computation, whether the entry, whole instruction line)."""
  computation, entry, line = '', False, ''
  for raw in text.split('\n'):
    if not computation:
      header = _HEADER.match(raw)
      if header:
        computation, entry = header.group(2), bool(header.group(1))
    elif (closed := _FOOTER.match(raw)) or _INSTRUCTION.match(raw):
      if line:
        yield computation, entry, line
      line = '' if closed else raw
      if closed:
        computation = ''
    elif line:
      line += raw


def parse(text: str) -> Module:
  """Reads `compiled.as_text()`; ValueError where it is no program."""
  computations: dict[str, Computation] = {}
  start = ''
  for computation, entry, line in _lines(text):
    i = _instruction(line)
    computations.setdefault(computation, {})[i.name] = i
    if entry:
      start = computation
  if not start:
    raise ValueError(f'no ENTRY in this text: {text[:80]!r}')
  match = re.search(r'num_partitions=(\d+)', text[:200_000])
  return Module(computations, start, int(match.group(1)) if match else 1)


def without_layout(text: str) -> str:
  """A type without the layouts of its arrays."""
  return re.sub(r'\{[^{}]*\}', '', text)
