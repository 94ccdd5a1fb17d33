"""A conversation in a terminal, with its history, as the template writes it.

    python -m gated_jax.decode --checkpoint=runs/sft --chat

Every turn the whole conversation is rendered and read anew: what a template
writes of earlier turns can change with later ones. Where it outgrows the model
its oldest turns are left out. Ctrl-C ends a reply, and an empty end of input
the conversation.
"""

import sys
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from typing import Any

import numpy as np

from gated_jax.data.chat import Chat
from gated_jax.data.tokenizer import Tokenizer

Message = dict[str, Any]
# Takes a prompt's ids, gives the ids that follow it, and may end with a stop.
Generate = Callable[[np.ndarray], Iterable[int]]


def typed() -> Iterator[str]:
  """Lines from a terminal or a pipe, without empty ones."""
  while True:
    try:
      line = input('> ' if sys.stdin.isatty() else '')
    except EOFError:
      return
    if line.strip():
      yield line


def shortened(
  chat: Chat, history: list[Message], most: int
) -> tuple[np.ndarray, list[Message]]:
  """The prompt of a history, and what of it fits into `most` tokens.

  The system's message stays, and so does the last question.

  Raises:
    ValueError: these two alone are too long.
  """
  fixed = 1 if history[0]['role'] == 'system' else 0
  while len(ids := chat.prompt(history)) > most:
    questions = [
      i for i, message in enumerate(history) if message['role'] == 'user'
    ]
    if len(questions) < 2:
      raise ValueError(
        f'the conversation has {len(ids)} tokens, and there is room for {most}'
      )
    history = history[:fixed] + history[questions[1] :]
  return ids, history


def converse(
  lines: Iterable[str],
  chat: Chat,
  tokenizer: Tokenizer,
  generate: Generate,
  stop: set[int],
  most: int,
  system: str = '',
) -> list[Message]:
  """Prints a reply to every line, and returns the conversation.

  Args:
    lines: what the user says.
    chat: writes the conversation.
    tokenizer: makes text of the reply.
    generate: makes the reply.
    stop: ids that end it.
    most: tokens of a prompt.
    system: what the conversation begins with; '': nothing.
  """
  history = [{'role': 'system', 'content': system}] if system else []
  for line in lines:
    asked = [*history, {'role': 'user', 'content': line}]
    try:
      ids, fitting = shortened(chat, asked, most)
    except ValueError as error:
      print(f'note: {error}', file=sys.stderr, flush=True)
      continue
    if len(fitting) < len(asked):
      left_out = len(asked) - len(fitting)
      print(f'note: left out {left_out} old messages', file=sys.stderr)
    text = reply(generate(ids), tokenizer, ids, stop)
    history = [*fitting, {'role': 'assistant', 'content': text}]
  return history


def reply(
  tokens: Iterable[int],
  tokenizer: Tokenizer,
  before: np.ndarray,
  stop: set[int],
) -> str:
  """Prints a reply as it comes, and returns it."""
  stream = tokenizer.stream(before)
  parts = []

  def say(text: str) -> None:
    """Prints a piece of it."""
    parts.append(text)
    print(text, end='', flush=True)

  try:
    for token in tokens:
      if token < 0 or token in stop:
        break
      say(stream.feed(token))
  except KeyboardInterrupt:
    pass
  say(stream.finish())
  print(flush=True)
  return ''.join(parts)
