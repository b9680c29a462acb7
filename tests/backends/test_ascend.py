"""The `ascend` backend on torch's CPU device, with references for torch_npu's operators; without torch_npu, by its
words."""

from __future__ import annotations

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")
from backends import registry
from backends.ascend.adapter import AscendBackend
from backends.errors import ArtifactError, BackendUnavailable
from backends.interface import Artifact, Program
from backends.toolchains.torch_device import TorchDevice
from model import ops


@pytest.fixture(scope="module")
def backend() -> AscendBackend:
    from tests.npu.references import register

    register()
    return AscendBackend(TorchDevice("cpu"))


def _program(donate: tuple[int, ...] = ()) -> tuple[Program, tuple[Any, ...]]:
    """A norm, and rows written into a cache."""
    rng = np.random.default_rng(0)
    args = (
        {"x": rng.standard_normal((3, 32), dtype=np.float32), "gain": np.ones(32, np.float32)},
        np.zeros((4, 16, 32), np.float32),
        np.array([[17, 18, 40]], np.int32),
    )

    def fn(given: Any, cache: Any, slots: Any) -> Any:
        x = ops.rms_norm(given["x"], given["gain"], eps=1e-5)
        return {"x": x, "cache": ops.cache_write(cache, x[None], slots)}

    return Program("norm", fn, jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), args), donate), args


@pytest.mark.parametrize("donate", [(), (1,)])
def test_a_program_goes_through_bytes_and_means_the_same(backend: AscendBackend, donate: tuple[int, ...]):
    program, args = _program(donate)
    artifact = Artifact.from_bytes(backend.export(program).to_bytes())
    given = jax.tree.map(backend.put, args)
    found = backend.load(artifact)(*given)
    for name, value in program.fn(*args).items():
        np.testing.assert_allclose(backend.get(found[name]), np.asarray(value), atol=1e-6)
    written = bool(backend.get(given[1]).any())
    assert written == bool(donate), "what is not given away stays as it is"


def test_bfloat16_goes_to_a_device_and_back(backend: AscendBackend):
    x = np.asarray(jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3))
    assert backend.get(backend.put(x)).tobytes() == x.tobytes()
    assert backend.get(backend.zeros((2,), "bfloat16")).dtype == x.dtype


def test_an_artifact_of_another_platform_is_refused(backend: AscendBackend):
    other = Artifact("norm", "cpu", "stablehlo", (), {}, b"")
    with pytest.raises(ArtifactError, match="loads torch-npu for ascend"):
        backend.load(other)


@pytest.mark.skipif(importlib.util.find_spec("torch_npu") is not None, reason="torch_npu is here")
def test_what_is_missing_is_said_and_export_needs_none_of_it():
    backend = registry.get("ascend")
    assert "torch_npu is not installed (pip install 'glm5-runtime[npu]')" in (backend.unavailable() or "")
    assert backend.export(_program()[0]).platform == "ascend"
    with pytest.raises(BackendUnavailable, match="torch_npu is not installed"):
        backend.put(np.zeros(1))
