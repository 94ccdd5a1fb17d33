"""Chat templates: messages to text, as a tokenizer's authors wrote it down.

A template is a program in Jinja, in `chat_template.jinja` or in the
`tokenizer_config.json` beside the tokenizer. It comes with files that others
made, so it runs in Jinja's sandbox, without a loader: it can neither change
what it is given nor read files. Read `gated_jax/data/chat.py` next.
"""

import dataclasses
import datetime
import hashlib
import json
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

from gated_jax.data.tokenizer_files import spelled
from gated_jax.data.tokenizer_files import stated
from gated_jax.paths import expand
from gated_jax.paths import is_file
from gated_jax.paths import read_bytes

# Every turn ends with a token that no text can spell, so that no message can
# pretend to hold a turn of another speaker.
PLAIN = """\
{{- bos_token -}}
{%- if tools %}tools:
{{ tools | tojson }}{{ eos_token }}{% endif -%}
{%- for message in messages -%}
{{ message.role }}:
{{ message.content or '' }}
{%- if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif -%}
{{ eos_token }}
{%- endfor -%}
{%- if add_generation_prompt %}assistant:
{% endif -%}
"""
FILE = 'chat_template.jinja'
# A conversation has to give the same ids whenever it is read, so templates that
# write the date into it are told this one.
DAY = datetime.datetime(2025, 1, 1)


class ChatTemplate:
  """One template, ready to render.

  Args:
    name: says where it is from, in errors.
    text: in Jinja.
    tokens: spellings that it may use by name, `eos_token` for example.
    now: the date that it is told.

  Raises:
    ValueError: it is no Jinja.
    ImportError: Jinja is not installed.
  """

  def __init__(
    self,
    name: str,
    text: str,
    tokens: Mapping[str, str],
    now: datetime.datetime = DAY,
  ):
    self.name = name
    self.digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    self._tokens = dict(tokens)
    self._template = _compiled(name, text, now)

  def render(
    self,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Any] = (),
    reply: bool = False,
  ) -> str:
    """The text of some messages.

    Args:
      messages: each with a role and content.
      tools: descriptions of what the assistant may call.
      reply: True: up to where the assistant's next turn begins.

    Raises:
      ValueError: the template refuses them, or fails.
    """
    try:
      return self._template.render(
        messages=list(messages),
        tools=list(tools) or None,
        documents=None,
        add_generation_prompt=reply,
        **self._tokens,
      )
    except Exception as error:  # a template can raise anything
      raise ValueError(
        f'the chat template {self.name} fails: {_one_line(error)}'
      ) from error


def _one_line(error: Exception) -> str:
  lines = str(error).strip().splitlines()
  return lines[0] if lines else type(error).__name__


def _compiled(name: str, text: str, now: datetime.datetime) -> Any:
  """The template in the sandbox, with the functions that templates call."""
  try:
    import jinja2
    from jinja2 import ext
    from jinja2 import nodes
    from jinja2 import sandbox
  except ImportError as error:
    raise ImportError(
      'chat templates need the package jinja2: pip install gated_jax[hf]'
    ) from error

  class Generation(ext.Extension):
    """{% generation %} marks the assistant's text; turns are found without."""

    tags = {'generation'}  # noqa: RUF012, as Jinja declares it

    def parse(self, parser: Any) -> list[nodes.Node]:
      """The block's own statements."""
      next(parser.stream)
      statements: list[nodes.Node] = parser.parse_statements(
        ('name:endgeneration',), drop_needle=True
      )
      return statements

  def refuse(message: str) -> None:
    """The template's own word on messages that it does not take."""
    raise jinja2.TemplateError(message)

  def as_json(value: Any, indent: int | None = None, **options: Any) -> str:
    """JSON without HTML's escapes, which Jinja's own filter puts in."""
    options.setdefault('ensure_ascii', False)
    return json.dumps(value, indent=indent, **options)

  environment = sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[ext.loopcontrols, Generation],
  )
  environment.filters['tojson'] = as_json
  environment.globals['raise_exception'] = refuse
  environment.globals['strftime_now'] = now.strftime
  try:
    return environment.from_string(text)
  except jinja2.TemplateError as error:
    raise ValueError(
      f'the chat template {name} is no Jinja: {_one_line(error)}'
    ) from error


@dataclasses.dataclass(frozen=True)
class TemplateText:
  """The chat template of a tokenizer's folder, and the tokens it names."""

  name: str
  text: str
  tokens: Mapping[str, str]  # spellings by name, as the authors state them


def read_template(tokenizer: str) -> TemplateText:
  """The template beside a tokenizer's file; a plain one where there is none.

  Args:
    tokenizer: 'bytes', or the path of its file.

  Raises:
    ValueError: what is there is no template.
  """
  if tokenizer == 'bytes':
    return TemplateText('(built in)', PLAIN, {})
  folder = expand(tokenizer).parent
  says = stated(folder) or {}
  tokens = {
    key: spelled(value)
    for key, value in says.items()
    if key.endswith('_token') and spelled(value)
  }
  path = folder / FILE
  if is_file(path):
    try:
      return TemplateText(str(path), read_bytes(path).decode(), tokens)
    except UnicodeDecodeError:
      raise ValueError(f'the chat template {path} is not UTF-8') from None
  text = says.get('chat_template')
  if text is None:
    return TemplateText('(built in)', PLAIN, tokens)
  name = f'of {folder / "tokenizer_config.json"}'
  if isinstance(text, list):  # several by name
    named = {
      entry.get('name'): entry.get('template')
      for entry in text
      if isinstance(entry, dict)
    }
    text = named.get('default')
  if not isinstance(text, str):
    raise ValueError(
      f'the chat template {name} must be text, or a list with one called '
      "'default'"
    )
  return TemplateText(name, text, tokens)
