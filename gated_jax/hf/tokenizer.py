"""The files of a tokenizer that travel with a model, in both directions.

On our side they lie in a folder of their own inside the checkpoint. A run on
bytes has no such files, so exporting it writes a tokenizer.json that does the
same, for software that knows no other tokenizers.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

from gated_jax import paths
from gated_jax.data.tokenizer import ByteTokenizer
from gated_jax.data.tokenizer import make_tokenizer
from gated_jax.hf.files import find_regular
from gated_jax.hf.files import write_json
from gated_jax.paths import Path
from gated_jax.paths import expand
from gated_jax.paths import is_file

MODELS = ('tokenizer.json', 'tokenizer.model')
FILES = (
  *MODELS,
  'tokenizer_config.json',
  'special_tokens_map.json',
  'added_tokens.json',
  'vocab.json',
  'merges.txt',
  'chat_template.jinja',
  'generation_config.json',
)
END = '<|endoftext|>'

Files = Mapping[str, Path]


def in_folder(folder: Path) -> Files:
  """The files of a tokenizer in a folder of theirs, by name.

  Without a tokenizer itself there are none: what is said of it, as in the
  generation_config.json that transformers always writes, would make a folder of
  a tokenizer that nothing can read.

  Raises:
    ValueError: one is no regular file of that folder, or the tokenizer
      cannot be read.
  """
  files = {name: find_regular(folder, name) for name in FILES}
  present = {name: path for name, path in files.items() if path is not None}
  for name in MODELS:
    if name in present:
      make_tokenizer(str(folder / name))
  return present if set(MODELS) & set(present) else {}


def of_run(name: str) -> Files:
  """The files of the tokenizer of a run of ours.

  Args:
    name: The setting `data.tokenizer`; 'bytes' has no files.
  """
  if name == 'bytes':
    return {}
  path = expand(make_tokenizer(name).name)
  beside = {
    other: path.with_name(other)
    for other in FILES
    if other not in MODELS and is_file(path.with_name(other))
  }
  return {f'tokenizer{path.suffix}': path, **beside}


def copy(files: Files, folder: Path) -> None:
  """Copies the contents of files into a folder, which may be missing."""
  if files and isinstance(folder, pathlib.Path):
    folder.mkdir(exist_ok=True)
  for name, path in files.items():
    paths.write_bytes(folder / name, paths.read_bytes(path))


def write_bytes(folder: pathlib.Path, length: int) -> None:
  """Writes the tokenizer of bytes as one that other software reads.

  Args:
    folder: It has to exist.
    length: Tokens that the model reads at most.
  """
  end = {'id': ByteTokenizer.eos, 'content': END}
  put_first = {'SpecialToken': {'id': END, 'type_id': 0}}
  text = {'Sequence': {'id': 'A', 'type_id': 0}}
  level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True}
  write_json(
    folder / 'tokenizer.json',
    {
      'version': '1.0',
      'truncation': None,
      'padding': None,
      'added_tokens': [end | _FLAGS],
      'normalizer': None,
      'pre_tokenizer': level | {'use_regex': False},
      'post_processor': {
        'type': 'TemplateProcessing',
        'single': [put_first, text],
        'pair': [put_first, text, {'Sequence': {'id': 'B', 'type_id': 1}}],
        'special_tokens': {
          END: {'id': END, 'ids': [ByteTokenizer.bos], 'tokens': [END]}
        },
      },
      'decoder': level | {'use_regex': False},
      'model': {'type': 'BPE', 'vocab': _byte_characters(), 'merges': []},
    },
  )
  write_json(
    folder / 'tokenizer_config.json',
    {
      'tokenizer_class': 'PreTrainedTokenizerFast',
      'bos_token': END,
      'eos_token': END,
      'add_bos_token': True,
      'model_max_length': length,
      'clean_up_tokenization_spaces': False,
    },
  )
  ids = {'bos_token_id': ByteTokenizer.bos, 'eos_token_id': ByteTokenizer.eos}
  write_json(folder / 'generation_config.json', ids)


_FLAGS: dict[str, Any] = {
  'single_word': False,
  'lstrip': False,
  'rstrip': False,
  'normalized': False,
  'special': True,
}


def _byte_characters() -> dict[str, int]:
  """The character that byte-level vocabularies write for each byte.

  Printable ones of Latin-1 stand for themselves, the others are numbered from
  U+0100 on (GPT-2).
  """
  printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
  characters: dict[str, int] = {}
  others = 0
  for byte in range(256):
    characters[chr(byte if byte in printable else 256 + others)] = byte
    others += byte not in printable
  return characters
