"""Checks that need Triton are collected where it is (`make test-cuda`), and interpret kernels."""

import os
from importlib.util import find_spec

os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported, which more than one of the files does

collect_ignore = [] if find_spec("triton") else ["test_interpreted.py", "test_compiled.py"]
