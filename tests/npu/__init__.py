"""Checks of exports for Ascend with torch_npu. Run by `make test-npu`."""
