"""python -m gated_jax.decode, as a stranger types it."""

import dataclasses
import io
import json
import os

import pytest

from gated_jax import checkpoint
from gated_jax.config import ModelConfig
from gated_jax.config import RunConfig
from gated_jax.decode import generation_config
from gated_jax.decode.__main__ import main
from gated_jax.decode.sampling import Sampling

MODEL = ModelConfig(
  vocab=320,
  length=64,
  depth=2,
  width=16,
  heads=4,
  kv_heads=2,
  head_dim=8,
  mlp_width=24,
  dtype='float32',
  init_std=0.3,
)


def save(folder, params, tokenizer='bytes'):
  data = dataclasses.replace(RunConfig().data, length=64, tokenizer=tokenizer)
  run = RunConfig(model=MODEL, data=data)
  checkpoint.save_parameters(folder / 'checkpoints/5', params, run)
  return folder


@pytest.fixture(scope='module')
def params(make_params):
  """The parameters of a model that has not learned a thing."""
  return make_params(MODEL)


@pytest.fixture(scope='module')
def run(tmp_path_factory, params):
  return save(tmp_path_factory.mktemp('run'), params)


@pytest.mark.long
def test_the_command_prints_prompt_and_text_the_same_each_time(run, capsys):
  flags = [f'--checkpoint={run}', '--prompt=def f', '--max_tokens=12']
  draw = [*flags, '--temperature=0.9', '--top_p=0.9', '--seed=7', '--stop=300']
  assert main(draw) == 0
  first = capsys.readouterr().out
  assert first.startswith('def f') and len(first) > 6
  assert main(draw) == 0
  assert capsys.readouterr().out == first
  two = ['--prompt=class', '--fsdp=2', '--temperature=0']
  assert main([*flags, *two]) == 0
  both = capsys.readouterr().out
  assert '[0] def f' in both and '[1] class' in both


@pytest.mark.long
def test_lines_from_a_pipe_are_turns_of_a_talk(run, capsys, monkeypatch):
  monkeypatch.setattr('sys.stdin', io.StringIO('hi\n\nyou\n'))
  flags = [f'--checkpoint={run}', '--chat', '--system=x', '--max_tokens=4']
  assert main([*flags, '--temperature=0']) == 0
  out, error = capsys.readouterr()
  assert out.endswith('\n') and 'Traceback' not in error
  assert main([*flags, '--prompt=a']) == 2
  assert '--prompt does nothing with --chat' in capsys.readouterr().err
  assert main([f'--checkpoint={run}', '--prompt=a', '--system=b']) == 2
  assert "--system='b' does nothing without --chat" in capsys.readouterr().err


@pytest.mark.long
def test_paths_may_begin_at_home(run, capsys, monkeypatch):
  monkeypatch.setenv('HOME', str(run.parent))
  flags = [f'--checkpoint=~/{run.name}', '--prompt=a', '--max_tokens=1']
  assert main(flags) == 0
  assert main(['--checkpoint=~nobody-here/x', '--prompt=a']) == 2
  assert 'there is no such user' in capsys.readouterr().err


BAD_FLAGS = [
  (['--checkpoint=nowhere', '--prompt=a'], 'no checkpoint at nowhere'),
  (['--prompt='], '--prompt is empty'),
  (['--prompt=\udcff'], "--prompt='\\udcff' is not UTF-8"),
  ([], '--prompt is missing'),
  (['--prompt=' + 64 * 'a'], 'prompt 0 has 65 tokens'),
  (['--prompt=a', '--tensor=9'], '--tensor=9 --fsdp=1 need 9 devices'),
  (['--prompt=a', '--fsdp=-1'], '--fsdp=-1 must be a number of devices'),
  (['--prompt=a', '--tensor=0'], '--tensor=0 must be a number of devices'),
  (['--prompt=a', f'--fsdp={10**30}'], f'need {10**30} devices'),
  (['--prompt=a', '--tensor=x'], "invalid int value: 'x'"),
  (['--prompt=a', '--top_p=2'], 'top_p=2.0 must lie in'),
  (['--prompt=a', '--top_p=nan'], 'top_p=nan must lie in'),
  (['--prompt=a', '--temperature=nan'], 'temperature=nan must be a finite'),
  (['--prompt=a', '--temperature=inf'], 'temperature=inf must be a finite'),
  (['--prompt=a', '--min_p=nan'], 'min_p=nan must lie in'),
  (['--prompt=a', '--stop=99999'], 'stop token 99999 is not in [0, 320)'),
  (['--prompt=a', '--stop=-5'], 'stop token -5 is not in [0, 320)'),
  (['--prompt=a', '--skip_below=2'], 'skip_below=2.0 would skip every head'),
  (['--prompt=a', '--skip_below=nan'], 'skip_below=nan must be a finite'),
  (['--prompt=a', '--max_tokens=0'], 'max_tokens=0 must be positive'),
  (['--prompt=a', '--seed=-1'], 'seed=-1 must lie in'),
  (['--prompt=a', '--tokenizer=x'], "tokenizer 'x' is neither"),
  (['--prompt=a', '--special_tokens'], 'special_tokens=True does nothing'),
  (['--prompt=a', '--temprature=2'], '--temprature=2'),
  (['--prompt=a', '--temp=2'], '--temp=2'),
]


@pytest.mark.parametrize(('flags', 'message'), BAD_FLAGS)
def test_a_wrong_command_gets_one_line(run, capsys, flags, message):
  assert main([f'--checkpoint={run}', *flags]) == 2
  captured = capsys.readouterr()
  assert captured.out == ''
  assert message in captured.err
  assert captured.err.startswith('error: ')
  assert captured.err.count('\n') == 1


def test_a_damaged_checkpoint_gets_one_line(run, capsys, tmp_path):
  step = tmp_path / '5'
  (step / 'params').mkdir(parents=True)
  assert main([f'--checkpoint={tmp_path}', '--prompt=a']) == 1
  error = capsys.readouterr().err
  assert f'{step} is damaged' in error and error.count('\n') == 1


def test_a_tokenizer_that_is_a_pipe_is_not_waited_for(run, capsys, tmp_path):
  os.mkfifo(tmp_path / 'tokenizer.json')
  flags = [f'--checkpoint={run}', '--prompt=a']
  for name in (tmp_path, tmp_path / 'tokenizer.json'):
    assert main([*flags, f'--tokenizer={name}']) == 2
    assert 'is neither' in capsys.readouterr().err


@pytest.fixture(scope='module')
def words(tmp_path_factory, params):
  """A run whose tokenizer is Llama's kind, and has fewer ids than the model."""
  from tokenizers import Tokenizer
  from tokenizers import decoders
  from tokenizers import models
  from tokenizers import pre_tokenizers

  folder = tmp_path_factory.mktemp('words')
  pieces = ['<unk>', '<end>', *(f'\u2581w{i}' for i in range(150))]
  inner = Tokenizer(
    models.WordLevel({piece: i for i, piece in enumerate(pieces)}, '<unk>')
  )
  inner.pre_tokenizer = pre_tokenizers.Metaspace()
  inner.decoder = decoders.Metaspace()
  inner.add_special_tokens(['<end>'])
  inner.save(str(folder / 'tokenizer.json'))
  config = {'bos_token': None, 'eos_token': '<end>'}
  (folder / 'tokenizer_config.json').write_text(json.dumps(config))
  return save(folder, params, str(folder))


def test_text_goes_on_after_a_space_and_in_known_tokens_only(words, capsys):
  flags = [f'--checkpoint={words}', '--prompt=w3 w4', '--temperature=1.5']
  assert main([*flags, '--max_tokens=50', '--seed=3']) == 0
  text = capsys.readouterr().out
  assert text.startswith('w3 w4 w')
  # Half of the model's ids have no token, and none of them was drawn.
  assert len(text.split()) > 10 and '\ufffd' not in text


def test_a_prompt_that_spells_a_special_token_is_noted(words, capsys):
  flags = [f'--checkpoint={words}', '--prompt=w1<end>', '--max_tokens=1']
  assert main(flags) == 0
  note = capsys.readouterr().err
  assert 'prompt 0 spells <end>, which is read as text' in note
  assert main([*flags, '--special_tokens']) == 0
  assert capsys.readouterr().err == ''


@pytest.mark.long
def test_what_a_models_authors_say_of_sampling_holds(words, capsys):
  flags = [f'--checkpoint={words}', '--prompt=w1', '--max_tokens=20']
  assert main(flags) == 0
  greedy = capsys.readouterr().out
  first = int(greedy.split()[1].removeprefix('w'))
  values = {
    'do_sample': True,
    'temperature': 0.7,
    'top_k': 1,
    'eos_token_id': [1, first + 2],
    'repetition_penalty': 1.1,
  }
  path = words / generation_config.NAME
  path.write_text(json.dumps(values))
  try:
    assert main(flags) == 0
    captured = capsys.readouterr()
    assert captured.out == 'w1\n'  # ended by the second stop token
    assert 'temperature 0.7, top_k 1, top_p 1.0, min_p 0.0' in captured.err
    assert 'repetition_penalty=1.1, which is left out' in captured.err
    assert main([*flags, '--stop=0', '--temperature=0']) == 0
    assert capsys.readouterr().out == greedy
    path.write_text('{"top_k": "five"}')
    assert main(flags) == 2
    assert "top_k='five'" in capsys.readouterr().err
  finally:
    path.unlink()


@pytest.mark.parametrize(
  ('values', 'expected'),
  [
    ({}, (Sampling(), ())),
    ({'temperature': 0.6, 'eos_token_id': 7}, (Sampling(), (7,))),
    (
      {'do_sample': True, 'top_p': 0.9, 'eos_token_id': [1, 2]},
      (Sampling(1.0, top_p=0.9), (1, 2)),
    ),
    ({'do_sample': True, 'temperature': 0.6}, (Sampling(0.6), ())),
    ({'num_beams': 1, 'max_new_tokens': 5}, (Sampling(), ())),
  ],
)
def test_defaults_of_a_generation_config(tmp_path, values, expected):
  (tmp_path / generation_config.NAME).write_text(json.dumps(values))
  defaults = generation_config.read(tmp_path)
  assert (defaults.sampling, defaults.stop) == expected
  assert not defaults.left_out


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    ('[]', 'holds no object'),
    ('{', 'is not JSON'),
    ('{"do_sample": 1}', 'do_sample=1, which is not true or false'),
    ('{"temperature": NaN}', 'temperature=nan, which is not a finite number'),
    ('{"eos_token_id": "x"}', "eos_token_id='x', which is not an integer"),
    ('{"eos_token_id": [true]}', 'which is not a list of int'),
    ('{"top_p": 3}', r'top_p=3\.0 must lie in'),
  ],
)
def test_a_generation_config_without_sense_is_refused(
  tmp_path, content, message
):
  (tmp_path / generation_config.NAME).write_text(content)
  with pytest.raises(ValueError, match=message):
    generation_config.read(tmp_path)
