"""Graphs of torch_npu's operators: what PyTorch runs on an Ascend NPU.

- `declare.py` declares the operators of `../npu_operators.toml` where torch_npu is not there, so that exporting does
  not need it.
- `check.py` refuses calls that the operators' documentation does not have.
- `target.py` is the walker's target: ATen as the torch target has it, and `torch.ops.npu.*` where a kernel takes a
  call; `attention.py`, `dense.py` and `experts.py` are the lowerings, and `writer.py` makes the `.pt2`.
"""
