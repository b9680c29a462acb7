"""Running an exported package: from its files alone, without the model's code.

Owns the executors (`ort.py`, `torch.py`, `xla.py`; one runtime each), `runner.py` (units in order, on one device or on
all of a layout in lockstep), `link.py` (a step's ONNX graphs as one) and `generate.py` (tokens). Reads
`runtime/deployment/manifest.py`; imports nothing of `model`, and of `backends` errors and devices alone.
"""
