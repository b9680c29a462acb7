"""Checks that need Triton are collected where it is (`make test-cuda`)."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("triton") else ["test_interpreted.py", "test_compiled.py"]
