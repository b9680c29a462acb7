"""The kernels in Triton. Imported by `tools.kernels` and the checks alone: the product ships what they compile to."""
