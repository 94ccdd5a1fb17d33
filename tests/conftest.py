"""Eight CPU devices for every test, set before JAX looks for devices."""

import os

_FLAG = '--xla_force_host_platform_device_count'
if _FLAG not in os.environ.get('XLA_FLAGS', ''):
  os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {_FLAG}=8'
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
