"""What an engineer does to bring a model to a chip.

    export/          the graph as packages for other toolchains, verified
    quantize.py      a checkpoint in a chip's number formats
    compare.py       what those formats do to the model's answers
    calibrate.py     a profile of this machine, measured through a backend; calibrate_ops.py its slow ops
    operator_times.py, operator_kernels.py   a chip's profile and prices of operators that were measured on it
    kernel_fit.py    kernels of prices from measurements

Imports anything of `runtime` but `api` and `cli`.
"""
