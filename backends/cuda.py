"""NVIDIA GPUs through XLA, with kernels of our own for the ops that XLA is slow at (`backends.kernels`).

Device checks: a driver and a GPU must be there (`unavailable` says which is missing), and matrices may
stay in FP8 only where the chip has e4m3 (compute capability 8.9 and up). On a host without a GPU the
adapter still exports for `cuda`: kernels are then those of `EXPORTED_FOR`. An artifact with kernels runs on the
compute capability that it was exported for. A driver that does not take the kernels' PTX is found out by the smallest
of them, before any is used: all ops then run as decompositions, and `op_notes` has what the driver said.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax import export

from backends.errors import ArtifactError
from backends.interface import Artifact, Capabilities, Executable, Program
from backends.kernels import library, table, variants
from backends.kernels.attention import join
from backends.kernels.launch import CUSTOM_CALL
from backends.xla import NARROW_ROWS, XlaBackend
from foundation.errors import UsageError, first_line, printable
from model.ops import OPS

EXPORTED_FOR: library.Capability = (9, 0)
"""The compute capability that a host without a GPU exports for: an H100's or H200's."""
_CAPABILITY = "compute_capability"
SWITCH = "GLM5_KERNELS"
"""An environment variable: "off" runs every op's decomposition, to find out whether a kernel is at fault."""

_OF_PTX = re.compile(r"ptx|cubin|triton|NO_BINARY_FOR_GPU|INVALID_IMAGE|INVALID_SOURCE", re.IGNORECASE)

_FP8_COMPUTE_CAPABILITY = (8, 9)
_BF16_COMPUTE_CAPABILITY = (8, 0)
_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")


class CudaBackend(XlaBackend):
    """Runs on the first visible GPU; bfloat16 by preference."""

    name = "cuda"
    summary = "NVIDIA GPUs through XLA"
    platform = "cuda"
    custom_calls = (CUSTOM_CALL,)
    # else products of one input become one, for which their matrices are written beside one another in every step
    compiler_options = {"xla_gpu_dot_merger_threshold_mb": 0}

    def unavailable(self) -> str | None:
        devices, reason = self._found
        if not devices:
            if not any(map(importlib.util.find_spec, _PLUGINS)):
                return "JAX's CUDA plugin is not installed (pip install 'jax[cuda12]')"
            return f"no usable NVIDIA GPU ({reason})"
        if self._compute_capability < _BF16_COMPUTE_CAPABILITY:
            return f"{devices[0].device_kind} has no bfloat16 units (compute capability 8.0 or newer is needed)"
        return None

    @property
    def target(self) -> library.Capability:
        """The compute capability of the device here, or the one exported for."""
        return self._compute_capability if self._found[0] else EXPORTED_FOR

    def lowerings(self) -> Mapping[str, Callable[..., Any]]:
        return {} if self._without_kernels() else table.lowerings(self.target)

    def op_notes(self) -> Mapping[str, str]:
        why = self._without_kernels()
        return dict.fromkeys(OPS, f"decomposition: {why}") if why else table.notes()

    def _without_kernels(self) -> str | None:
        """Why no op runs as a kernel here, or None."""
        if self.target < library.LEAST:
            return f"kernels need compute capability {_spelt(library.LEAST)}, not {_spelt(self.target)}"
        if _switched_off():
            return f"{SWITCH}=off"
        return f"the driver does not take kernels ({self._refusal}); a newer one may" if self._refusal else None

    @cached_property
    def _refusal(self) -> str | None:
        """What a driver says to the smallest kernel, where it does not take it."""
        if not self._found[0]:
            return None
        try:
            self._try_a_kernel()
        except jax.errors.JaxRuntimeError as error:
            return printable(first_line(error))[:200]
        return None

    def _try_a_kernel(self) -> None:
        """Has the smallest kernel run on the device. Raises what JAX does where that fails."""
        parts, stats = np.ones((1, 2, variants.VALUE), np.float32), np.ones((1, 2, 2), np.float32)
        run = jax.jit(lambda *given: join(self.target, *given))
        jax.block_until_ready(run(self.put(parts), self.put(stats)))

    def export(self, program: Program) -> Artifact:
        artifact = super().export(program)
        module = export.deserialize(bytearray(artifact.payload)).mlir_module_serialized
        if CUSTOM_CALL.encode() not in module:  # the payload around it names the call even where there is none
            return artifact
        return dataclasses.replace(artifact, versions={**artifact.versions, _CAPABILITY: _spelt(self.target)})

    def load(self, artifact: Artifact, devices: Sequence[Any] = ()) -> Executable:
        wanted = artifact.versions.get(_CAPABILITY)
        if wanted is not None and self._found[0] and wanted != (have := _spelt(self._compute_capability)):
            raise ArtifactError(
                f"artifact {artifact.name} has kernels for compute capability {wanted}, this GPU has {have}; export it "
                "again on a host with such a GPU"
            )
        return super().load(artifact, devices)

    def explain(self, error: Exception) -> ArtifactError | None:
        """What an executable or `get` raised as a line, where it says that the driver does not take a kernel."""
        if not isinstance(error, jax.errors.JaxRuntimeError) or not _OF_PTX.search(str(error)):
            return None
        return ArtifactError(
            f"the driver does not take a kernel ({printable(first_line(error))[:200]}): update it, or run without "
            f"kernels of our own, {SWITCH}=off"
        )

    @property
    def _compute_capability(self) -> tuple[int, int]:
        major, _, minor = str(self._found[0][0].compute_capability).partition(".")
        return int(major), int(minor or 0)

    def capabilities(self) -> Capabilities:
        devices = self.devices()
        # an export-only host exports for the chips the format exists on
        fp8 = not devices or self._compute_capability >= _FP8_COMPUTE_CAPABILITY
        return Capabilities(
            platform=self.platform,
            devices=devices,
            dtypes=frozenset({"float32", "bfloat16"}),
            preferred_dtype="bfloat16",
            fp8_weights=fp8,
            donation=True,
            dlpack=True,
            cache_rows=NARROW_ROWS if fp8 else frozenset(),
            apart=True,
        )


def _switched_off() -> bool:
    """Raises `UsageError` for what the switch does not know."""
    value = os.environ.get(SWITCH, "on")
    if value not in ("on", "off"):
        raise UsageError(f"{SWITCH}={value}: on or off")
    return value == "off"


def _spelt(capability: library.Capability) -> str:
    return ".".join(map(str, capability))
