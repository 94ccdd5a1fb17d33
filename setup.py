"""Metadata and dependencies; each line of them says why it is here."""

import pathlib
import shutil

import setuptools
from setuptools.command import build_py

HERE = pathlib.Path(__file__).parent

# The owner's line: the repository's address, like https://github.com/OWNER/NAME.
# `python docs/site/address.py` then writes it wherever else it is told.
REPOSITORY = ''

REQUIRED = [
  'jax>=0.10,<0.13',  # arrays, compilation, partitioning
  'flax>=0.12.8,<0.13',  # linen modules, the parameters
  'optax>=0.2.8,<0.3',  # optimizers and schedules, Muon among them
  'orbax-checkpoint>=0.12.8,<0.13',  # asynchronous, sharded checkpoints
  'etils[epath]>=1.9',  # paths in buckets, which Orbax's handlers take
  'tensorstore>=0.1.80',  # names the file of a checkpoint that is damaged
  'grain>=0.2.18,<0.3',  # input pipeline whose position can be saved
  'ml-collections>=1.1,<2',  # configs that flags override
  'absl-py>=2.1',  # flags and logging of train.py
  'numpy>=2',  # host arrays
  'scipy>=1.13',  # rank correlations; JAX brings it
  'jaxtyping>=0.3.11',  # shapes in signatures, checked in tests
  'tqdm>=4.66',  # progress bar on a terminal
]

EXTRAS = {
  'tpu': ['jax[tpu]>=0.10,<0.13'],  # libtpu of the matching version
  'cuda': ['jax[cuda13]>=0.10,<0.13'],  # CUDA plugin and cuDNN
  'hf': [
    'safetensors>=0.5',  # Hugging Face weights without torch
    'tokenizers>=0.21',  # tokenizer.json files
    'sentencepiece>=0.2.2',  # .model tokenizer files
    'pyarrow>=18',  # Parquet text
    'array-record>=0.8',  # ArrayRecord shards
    'jinja2>=3.1',  # chat templates, which are written in it
    'datasets>=4',  # data sets of the Hugging Face hub
  ],
  'gcs': ['gcsfs>=2025.5'],  # gs:// for runs, data and checkpoints
  's3': ['s3fs>=2025.5'],  # s3:// for data, tokenizers and weights
  'eval': ['lm-eval>=0.4.9,<0.5'],  # tasks for evals/harness.py
  'plot': ['matplotlib>=3.9'],  # figures at the end of a run
  'docs': [
    'mkdocs>=1.6,<2',  # the site that docs/ becomes
    'mkdocs-material>=9.6,<10',  # its theme, which fetches nothing
    'mkdocstrings[python]>=1,<2',  # its reference, out of the docstrings
  ],
  # What tests and benches compare with: heavy, so in no other extra, and of one
  # version each, so that what was compared is known.
  'compare': [
    'torch>=2.13,<2.14',  # transformers runs on it; reads pytorch_model.bin
    'transformers>=5.24,<5.25',  # logits and gradients of converted models
    'peft>=0.21,<0.22',  # adapters that are written for it and read from it
    'accelerate>=1.10',  # lm-evaluation-harness's own adapter imports it
    'basedpyright>=1.28',  # Pyright, with the Node that runs it
    'equinox>=0.11',  # the guide has a module of it
    's3fs>=2025.5',  # s3:// as users have it, whose botocore fits moto's
    'moto[s3]>=5.1',  # a server of S3 on loopback, for tests of s3://
    'flask-cors>=5',  # that server imports it
  ],
}
EXTRAS['dev'] = [
  *(name for name in EXTRAS['hf'] if 'datasets' not in name),  # it is heavy
  *EXTRAS['plot'],
  *EXTRAS['gcs'],
  'beartype>=0.20',  # checks jaxtyping's shapes at run time
  'hypothesis>=6.100',  # property-based tests
  'ipykernel>=6.29',  # what the notebooks of colab/ run in
  'build>=1.2',  # what a release is made by
  'mypy>=1.15',  # static types
  'nbclient>=0.10',  # runs them from top to bottom
  'nbformat>=5.10',  # reads them
  'pre-commit>=4',  # the checks before a commit
  'pytest>=8',  # test runner
  'pytest-timeout>=2.3',  # a hanging test names itself
  'pytest-xdist>=3.6',  # both cores
  'ruff>=0.9',  # format and lint
  'tensorboardX>=2.6',  # what a run writes for TensorBoard, when asked to
]


class BuildPy(build_py.build_py):
  """Puts train.py and configs/ into a wheel; their home stays where it is."""

  def run(self):
    super().run()
    if self.editable_mode:
      return
    shipped = pathlib.Path(self.build_lib, 'gated_jax/shipped')
    shutil.rmtree(shipped, ignore_errors=True)
    (shipped / 'configs').mkdir(parents=True)
    for path in (HERE / 'train.py', *(HERE / 'configs').glob('*.py')):
      shutil.copy(path, shipped / path.relative_to(HERE))


setuptools.setup(
  name='gated_jax',
  version='0.1.0',
  description='Gated softmax attention in JAX: modules, kernels, trainer',
  long_description=(HERE / 'README.md').read_text(encoding='utf-8'),
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  author='The gated_jax authors',
  project_urls={'Paper': 'https://arxiv.org/abs/2505.06708'}
  | ({'Repository': REPOSITORY} if REPOSITORY else {}),
  keywords=['attention', 'gating', 'jax', 'flax', 'tpu', 'transformer'],
  classifiers=[
    'Development Status :: 4 - Beta',
    'Intended Audience :: Science/Research',
    'Operating System :: POSIX :: Linux',
    'Programming Language :: Python :: 3.11',
    'Programming Language :: Python :: 3.12',
    'Programming Language :: Python :: 3.13',
    'Topic :: Scientific/Engineering :: Artificial Intelligence',
    'Typing :: Typed',
  ],
  python_requires='>=3.11',
  packages=setuptools.find_packages(include=['gated_jax', 'gated_jax.*']),
  package_data={'gated_jax': ['py.typed']},
  cmdclass={'build_py': BuildPy},
  install_requires=REQUIRED,
  extras_require=EXTRAS,
)
