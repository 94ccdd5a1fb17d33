"""The gated delta rule in TPU kernels; `call.py` is where to begin."""
