"""Own TPU kernels for gated attention; `backend.py` is where to begin."""
