"""Settings of every test: strict JAX on the CPU, hypothesis without deadlines.

Programs of tests run for milliseconds, so LLVM does not optimise them: compiling takes a third of the time.

JAX reads its settings from the environment when it is first imported, so they are set here, before any
test module is: tests that need no JAX do not pay for it, and processes that tests start inherit them.
"""

import os
import sys

import hypothesis

if "jax" in sys.modules:
    raise RuntimeError("jax was imported before tests/conftest.py could set it strict")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")

hypothesis.settings.register_profile("dev", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.register_profile("ci", hypothesis.settings.get_profile("dev"), derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")
