"""Carrying the scheduler's steps out: prompts in, tokens out.

    local/    a checkpoint on one device of a backend
    cluster/  a plan on emulated devices, or on the devices of several processes
    package/  an exported package, without the model's code
    serve_all.py   a list of prompts, on the caller's thread     services.py   services that front ends ask

Each has an executor (`runtime.serving.executor`); what is computed when is decided in `runtime/serving/`. They share
prompts and completions (`local/request.py`) and how rows become batches (`batches.py`). Imports JAX, `backends`, and of
`runtime` what prices, simulates and plans; never reports, training or the command line.
"""
