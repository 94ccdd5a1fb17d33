"""One file is one experiment, and a difference to `base.py`.

    base          every setting at its default (gated_jax/config)
    smoke         a small model on real text, on a CPU, in minutes
    dense_1b7     the paper's dense models: 28 and 48 layers
    moe_15b_a2b   the paper's mixture of experts
    released      Qwen3.5 and Trinity at their released sizes
    gate_sweep    the rows of the paper's tables, with its figures
    stability     learning rates at which the ungated model breaks
    evidence      the paper's claims, each at a size for one GPU in minutes
    sft           conversations, of which the assistant's turns are learned
    long_context  rotary base change, 32k continuation, YaRN to 128k

Some take words after a colon: --config=configs/gate_sweep.py:value_headwise
"""
