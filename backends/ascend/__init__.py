"""Ascend: graphs of torch_npu's operators, what PyTorch runs on an Ascend NPU.

- `npu_operators.toml`: the operators for ops of the contract, with their schemas in the words of a release and what
  their documentation says of arguments; `operators.py` reads it.
- `declare.py` declares the operators where torch_npu is not there, so that exporting does not need it; `check.py`
  refuses calls that the documentation does not have; `constraints.py`: what kernels take, in numbers.
- `target.py` is the walker's target: ATen as the torch target has it, and `torch.ops.npu.*` where a kernel takes a
  call; `caches.py` is what caches are kept as; `attention.py`, `dense.py` and `experts.py` are the lowerings,
  `prolog.py` the projections before attention as one operator, and `writer.py` makes the `.pt2`.
- `adapter.py` is the backend; `device.py` finds torch_npu and puts programs on a device.

Nothing here was run on an Ascend device: see docs/ascend.md.
"""
