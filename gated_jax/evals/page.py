"""One HTML page of a run that stands alone: figures inside, nothing fetched.

It can be mailed, kept or opened from a disk. Its policy for browsers forbids
every request, so that it stays so.
"""

import base64
import html
import json
from collections.abc import Sequence

from gated_jax import paths
from gated_jax.config import RunConfig
from gated_jax.config import differences
from gated_jax.config import to_dict
from gated_jax.paths import Path

# Captions of the figures of `plot.figures`, by the names of their files.
CAPTIONS = {
  'loss': 'Loss over training, and on text that was held out.',
  'sink': "How much attention a document's first token gets, by layer and head"
  ' (F-Attn of arXiv 2505.06708). Tall bars are attention sinks.',
  'gate': 'How the gate scores of each layer are distributed. Scores near zero '
  'shut a head or a channel.',
  'activation': 'The largest activation of the residual stream after each layer'
  ' (M-Act).',
  'attention': 'Attention weights of single layers on one held-out text, mean '
  'of heads. A sink is a bright first column.',
}
STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; padding: 0 1rem;
  margin: 2rem auto; }
table { border-collapse: collapse; }
td { padding: .2rem .8rem .2rem 0; vertical-align: top;
  overflow-wrap: anywhere; }
td:first-child { white-space: nowrap; opacity: .7; }
figure { margin: 1.5rem 0; }
nav a { margin-right: 1rem; }
img { max-width: 100%; background: #fff; border-radius: 4px; }
figcaption { opacity: .8; }
pre { overflow-x: auto; }
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write(
  path: Path,
  title: str,
  rows: Sequence[tuple[str, str]],
  figures: Sequence[Path],
  config: RunConfig,
) -> Path:
  """Writes the page; an old one is replaced.

  Args:
    path: the file.
    title: a name for the run.
    rows: names and values of its closing table.
    figures: PNG files, which become part of the page.
    config: all settings.

  Returns:
    The path.

  Raises:
    OSError: a figure cannot be read, or the page not be written.
  """
  name = html.escape(title)
  changed = differences(to_dict(RunConfig()), to_dict(config))
  everything = json.dumps(to_dict(config), indent=2)
  parts = [
    '<!doctype html>',
    '<html lang="en"><head><meta charset="utf-8">',
    f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
    '<meta name="viewport" content="width=device-width">',
    f'<title>{name}</title><style>{STYLE}</style></head><body>',
    f'<h1>{name}</h1>',
    _links([*(figure.stem for figure in figures), 'settings']),
    _table(rows),
    *(_figure(figure) for figure in figures),
    '<h2 id="settings">Settings that differ from the defaults</h2>',
    _table([(key, str(new)) for key, (_, new) in changed.items()]),
    '<details><summary>All settings</summary>',
    f'<pre>{html.escape(everything)}</pre></details>',
    '</body></html>',
  ]
  paths.write_bytes(path, '\n'.join(parts).encode() + b'\n')
  return path


def _table(rows: Sequence[tuple[str, str]]) -> str:
  """Names and values as a table."""
  lines = [
    f'<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>'
    for name, value in rows
  ]
  return '\n'.join(['<table>', *lines, '</table>'])


def _links(places: Sequence[str]) -> str:
  """A line that leads to the parts of the page."""
  links = [f'<a href="#{html.escape(p)}">{html.escape(p)}</a>' for p in places]
  return f'<nav>{" ".join(links)}</nav>'


def _figure(path: Path) -> str:
  """A picture with its caption; its bytes are in the page."""
  data = base64.b64encode(paths.read_bytes(path)).decode()
  caption = html.escape(CAPTIONS.get(path.stem, path.stem))
  return (
    f'<figure id="{html.escape(path.stem)}">'
    f'<img src="data:image/png;base64,{data}" alt="{caption}">'
    f'<figcaption>{caption}</figcaption></figure>'
  )
