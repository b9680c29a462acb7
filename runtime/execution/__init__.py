"""Carrying steps out: prompts in, tokens out.

    local/    a checkpoint on one device of a backend: its own engine
    cluster/  a plan on emulated devices, or on the devices of several processes: the simulator's steps, run
    package/  an exported package, without the model's code

They share prompts, completions, sampling and pages (`local/`). Imports JAX, `backends`, and of `runtime` what prices,
simulates and plans; never reports, training or the command line.
"""
