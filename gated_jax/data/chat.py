"""Conversations to ids, and which of them an assistant has to learn.

A conversation is rendered and tokenised whole, since pieces tokenised alone
are other tokens at their borders. Where the assistant's turns lie in the text
is found by rendering turn by turn: a turn begins where the conversation before
it ends once the assistant is asked to speak, and ends where the conversation up
to it ends. A token counts where it holds a character of such a turn.

Text of a message that spells a special token stays text. It is marked before
rendering by a character that Unicode sets aside, and cut there afterwards, so
that only the template's own words become special tokens.
"""

import datetime
import json
import re
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool
from jaxtyping import Int32

from gated_jax.config import DataConfig
from gated_jax.data.chat_template import DAY
from gated_jax.data.chat_template import ChatTemplate
from gated_jax.data.chat_template import read_template
from gated_jax.data.encode import Encoded
from gated_jax.data.sources import Skipped
from gated_jax.data.tokenizer import Tokenizer
from gated_jax.data.tokenizer import make_tokenizer
from gated_jax.data.tokenizer_files import Spans

Messages = Sequence[dict[str, Any]]

# Characters that no text has: a cut, and the ends of a document in
# vocabularies where no text spells them.
CUT, BOS, EOS = '\ufdd0', '\ufdd1', '\ufdd2'
_SET_ASIDE = re.compile(f'([{CUT}{BOS}{EOS}])')
_TRIAL: Messages = (
  {'role': 'user', 'content': 'question'},
  {'role': 'assistant', 'content': 'answer'},
)


class Counted(NamedTuple):
  """A conversation as ids."""

  ids: Int32[np.ndarray, ' T']
  counts: Bool[np.ndarray, ' T']  # True at ids that count as targets


class Chat:
  """A tokenizer with the chat template that belongs to it.

  Args:
    tokenizer: of the model.
    special_tokens: whether messages that spell a special token hold it.
    now: the date that the template is told.

  Raises:
    ValueError: the template does not work.
  """

  def __init__(
    self,
    tokenizer: Tokenizer,
    special_tokens: bool = False,
    now: datetime.datetime = DAY,
  ):
    # The template's own words are special tokens whatever messages may hold.
    self._reader = tokenizer
    if tokenizer.name.endswith('.json'):
      self._reader = make_tokenizer(tokenizer.name, special_tokens=True)
    self._guards = not special_tokens
    text = read_template(tokenizer.name)
    self._marks = {BOS: tokenizer.bos, EOS: tokenizer.eos}
    tokens = {
      'bos_token': self._end(tokenizer.bos, BOS),
      'eos_token': self._end(tokenizer.eos, EOS),
    }
    self._template = ChatTemplate(
      text.name, text.text, tokens | dict(text.tokens), now
    )
    self.digest = self._template.digest
    self._try()

  def _end(self, i: int, mark: str) -> str:
    """Text in a template that becomes an end of a document."""
    return self._reader.spelling(i) or mark if i >= 0 else ''

  def _try(self) -> None:
    """ValueError where not even the simplest conversation can be learned."""
    text = self._template.render(_TRIAL)
    self._turn(text, _TRIAL, (), 1)

  def prompt(
    self, messages: Messages, tools: Sequence[Any] = ()
  ) -> Int32[np.ndarray, ' T']:
    """Ids up to where the assistant's next turn begins."""
    text = self._template.render(*self._guarded(messages, tools), reply=True)
    return self._tokenize(text).ids

  def stops(self) -> set[int]:
    """Special tokens that the template ends an assistant's turn with."""
    text = self._template.render(_TRIAL)
    _, end = self._turn(text, _TRIAL, (), 1)
    begin = text.rindex('answer', 0, end) + len('answer')
    ids = self._tokenize(text[begin:end]).ids[:1].tolist()
    own = self._marks.values()
    return {i for i in ids if self._reader.spelling(i) or i in own}

  def encode(
    self, messages: Messages, tools: Sequence[Any], first: int, targets: str
  ) -> Counted:
    """A whole conversation.

    Args:
      messages: of it.
      tools: that the assistant may call.
      first: the first message that may count.
      targets: see `DataConfig`.

    Raises:
      ValueError: the template refuses it, or no turn of it counts.
    """
    messages, tools = self._guarded(messages, tools)
    text = self._template.render(messages, tools)
    ids, begins, ends = self._tokenize(text)
    if targets == 'all':
      return Counted(ids, np.ones(len(ids), bool))
    spoken = [
      i
      for i, message in enumerate(messages)
      if i >= first and message['role'] == 'assistant'
    ]
    if targets == 'last':
      spoken = spoken[-1:]
    counts = np.zeros(len(ids), bool)
    for i in spoken:
      begin, end = self._turn(text, messages, tools, i)
      counts |= (begins < end) & (ends > begin)
    return Counted(ids, counts)

  def _turn(
    self, text: str, messages: Messages, tools: Sequence[Any], i: int
  ) -> tuple[int, int]:
    """The begin and the end of message `i` in the whole text.

    Raises:
      ValueError: the text up to it is another than that of the whole, so that
        no border is exact.
    """
    before = self._template.render(messages[:i], tools, reply=True)
    upto = self._template.render(messages[: i + 1], tools)
    content = messages[i].get('content')
    end = _end_of_turn(text, len(before), upto, content)
    if not text.startswith(before) or end < 0:
      raise ValueError(
        f'the chat template {self._template.name} writes message {i} otherwise '
        'than a conversation that ends with it, so where it begins and ends is '
        "unknown; data.targets='last' or 'all' may do"
      )
    return len(before), end

  def _guarded(
    self, messages: Messages, tools: Sequence[Any]
  ) -> tuple[Messages, Sequence[Any]]:
    """Messages whose text can neither spell special tokens nor set marks."""

    def guard(value: Any) -> Any:
      """One value of JSON."""
      if isinstance(value, dict):
        return {guard(k): guard(v) for k, v in value.items()}
      if isinstance(value, list):
        return [guard(v) for v in value]
      if not isinstance(value, str):
        return value
      if _SET_ASIDE.search(value):
        raise ValueError('text holds U+FDD0 to U+FDD2, which no text may')
      for piece in self._reader.special_in(value) if self._guards else ():
        value = value.replace(piece, f'{piece[:1]}{CUT}{piece[1:]}')
      return value

    return [guard(message) for message in messages], [guard(t) for t in tools]

  def _tokenize(self, text: str) -> Spans:
    """Ids, and where the characters of each begin and end."""
    pieces = _SET_ASIDE.split(text)  # text and marks in turn
    encoded = self._reader.encode_spans(pieces[::2])
    spans, place = [], 0
    for number, piece in enumerate(pieces):
      if number % 2 == 0:
        ids, begins, ends = encoded[number // 2]
      else:
        mark = self._marks.get(piece, -1)
        ids = np.array([mark] if mark >= 0 else [], np.int32)
        begins = np.zeros(len(ids), np.int64)
        ends = begins + 1
      spans.append((ids, begins + place, ends + place))
      place += len(piece)
    return Spans(*(np.concatenate(parts) for parts in zip(*spans, strict=True)))


def _end_of_turn(text: str, begin: int, upto: str, content: Any) -> int:
  """The end, in the whole text, of a turn from `begin` on; -1: unknown.

  Args:
    text: of the whole conversation.
    begin: of the turn in it.
    upto: the conversation rendered up to the turn.
    content: of the turn.
  """
  if text.startswith(upto) and len(upto) > begin:
    return len(upto)
  # Some templates write a turn's reasoning only where it is the last one: what
  # the whole has of the turn is then the end of what is written up to it.
  words = content.split() if isinstance(content, str) else []
  if not words or not upto.startswith(text[:begin]):
    return -1
  reply = upto[begin:]
  for size in range(min(len(reply), len(text) - begin), 0, -1):
    turn = text[begin : begin + size]
    if reply.endswith(turn) and words[-1] in turn:
      return begin + size
  return -1


def encode_conversations(
  texts: Sequence[str],
  origins: Sequence[str],
  *,
  chat: Chat,
  skipped: Skipped,
  config: DataConfig,
) -> Encoded:
  """Conversations with a mark on each id; those that are left out have none.

  Args:
    texts: each as `gated_jax/data/conversations.py` writes them.
    origins: where each was read.
    chat: tokenizer and template.
    skipped: is told of what is left out, and of what is cut.
    config: says which turns count, and what is too long.
  """
  parts = [
    _encoded(*pair, chat, skipped, config)
    for pair in zip(texts, origins, strict=True)
  ]
  ids, counts = zip(*parts, strict=True) if parts else ((), ())
  return Encoded(
    np.concatenate([np.empty(0, np.int32), *ids]),
    np.array([len(part) for part in ids], np.int64),
    np.concatenate([np.empty(0, bool), *counts]),
  )


def _encoded(
  text: str, origin: str, chat: Chat, skipped: Skipped, config: DataConfig
) -> Counted:
  """One conversation; no ids where it is left out."""
  most = config.length + 1  # a row's tokens and the last one's target
  try:
    messages, tools, first = json.loads(text)
    ids, counts = chat.encode(messages, tools, first, config.targets)
    if len(ids) > most and config.too_long == 'drop':
      raise ValueError(
        f'{len(ids)} tokens, and a row of data.length={config.length} holds '
        f'{most}: dropped'
      )
    cut = len(ids) > most
    ids, counts = ids[-most:], counts[-most:]
    if not counts[1:].any():
      raise ValueError('cut to a row, no target is left')
  except ValueError as error:
    skipped.add(origin, error)
    return Counted(np.empty(0, np.int32), np.empty(0, bool))
  if cut:
    skipped.cut(origin)
  return Counted(ids, counts)
