"""Settings of every test: strict JAX on the CPU, hypothesis without deadlines.

Programs of tests run for milliseconds, so compiling is what they cost: LLVM does not optimise them, and what one test
has compiled, the others and the commands that they start load from a folder of this run. (Set
JAX_COMPILATION_CACHE_DIR to keep it from run to run.)

JAX reads its settings from the environment when it is first imported, so they are set here, before any
test module is: tests that need no JAX do not pay for it, and processes that tests start inherit them.
"""

import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version

import hypothesis
import pytest

if "jax" in sys.modules:
    raise RuntimeError("jax was imported before tests/conftest.py could set it strict")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
_XLA_FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if version("jaxlib").startswith("0.10."):  # XLA aborts on flags that a release does not have
    _XLA_FLAGS += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
os.environ.setdefault("XLA_FLAGS", _XLA_FLAGS)
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"  # lowering writes no traces of calls; see the fixture `located`
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"
# Here and not when pytest is configured: conftests of folders that a command line names import JAX before that.
_compiled: str | None = None
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # the workers of a run find the one that started them has set it
    _compiled = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="glm5-compiled-")

# Examples are the same in every run: a suite that passed passes again. HYPOTHESIS_PROFILE=random looks further.
_QUIET = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("fixed", derandomize=True, max_examples=25, **_QUIET)
hypothesis.settings.register_profile("random", max_examples=30, **_QUIET)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


@pytest.fixture
def located() -> Iterator[None]:
    """Programs say which lines of which files made them, as they do outside the tests."""
    import jax

    before = jax.config.values["jax_traceback_in_locations_limit"]
    jax.config.update("jax_traceback_in_locations_limit", 100)
    yield
    jax.config.update("jax_traceback_in_locations_limit", before)


@pytest.fixture(scope="module")
def coarse() -> Iterator[None]:
    """Price tables with a quarter of their knots, for modules of what holds whatever a step costs."""
    from runtime.pricing import pricer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pricer, "token_grid", pricer.coarse_grid)
        yield


def pytest_configure(config: pytest.Config) -> None:
    os.environ.pop("COLUMNS", None)  # what is printed to a pipe has a width of its own


def pytest_collection_finish(session: pytest.Session) -> None:
    """What is imported stays: it is not looked through again each time that a trace has made a few thousand objects."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 50, 100)


def pytest_unconfigure(config: pytest.Config) -> None:
    if _compiled is not None:
        shutil.rmtree(_compiled, ignore_errors=True)
