"""Adapters as PEFT saves them: adapter_config.json, adapter_model.safetensors.

`write.py` and `read.py` are the two directions, `thin.py` is the algebra of one
tensor. The scale is written as ours is: alpha / r, or alpha / sqrt(r) with
`use_rslora`. Ranks that differ from tensor to tensor stand in `rank_pattern`,
each with the alpha that keeps the scale in `alpha_pattern`. Adapters of experts
are of parameters (`target_parameters`), as in PEFT with transformers 5; those
of one module for each expert are read too.
"""

CONFIG = 'adapter_config.json'
PREFIX = 'base_model.model.'
SIDES = ('.lora_A.weight', '.lora_B.weight')
