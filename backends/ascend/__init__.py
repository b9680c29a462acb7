"""Ascend: what ATC and CANN accept, as data, and what is made of it.

- `atc_operators.toml`: the ONNX operators that ATC's parser has registered, by opset; `atc_limits.toml`: its other
  limits; `cann_operators.toml`: CANN's fused operators for ops of the contract. Every entry names its source.
- `npu_operators.toml`: torch_npu's operators for ops of the contract, with their schemas in the words of a release.
- `catalog.py` reads the four; `operators.py` says what each `glm.*` op becomes, or why it is decomposed.
- `lowerings.py` emits CANN operators as ONNX nodes, `lowerings_moe.py` those of the experts, and `writer.py` turns a
  traced graph into the ONNX that ATC is given (caches in the layout that CANN's attention reads).
- `plugin.py` writes the ATC plugin that registers the operators which CANN itself does not map from ONNX, and
  `atc.py` the `atc` command lines.
- `npu/` writes graphs of torch_npu's operators.
- `adapter.py` is the backend: it compiles and runs packages where CANN is installed. `compiler.py` and `om.py` are
  what it does there.

Life of a graph: traced layer type -> `writer.write` -> ONNX file of the package -> `atc` on a host with CANN -> .om ->
loaded through pyACL by `om.py`. Nothing here was run on an Ascend device: see docs/ascend.md.
"""
