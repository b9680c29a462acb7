"""NVIDIA GPUs through XLA, with kernels of our own for the ops that XLA is slow at (`backends.kernels`).

Device checks: a driver and a GPU must be there (`unavailable` says which is missing), and matrices may
stay in FP8 only where the chip has e4m3 (compute capability 8.9 and up). On a host without a GPU the
adapter still exports for `cuda`: kernels are then those of `EXPORTED_FOR`. An artifact with kernels runs on the
compute capability that it was exported for.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from backends.errors import ArtifactError
from backends.interface import Artifact, Capabilities, Executable, Program
from backends.kernels import library, table
from backends.kernels.launch import CUSTOM_CALL
from backends.xla import XlaBackend
from foundation.errors import UsageError
from model.ops import OPS

EXPORTED_FOR: library.Capability = (9, 0)
"""The compute capability that a host without a GPU exports for: an H100's or H200's."""
_CAPABILITY = "compute_capability"
SWITCH = "GLM5_KERNELS"
"""An environment variable: "off" runs every op's decomposition, to find out whether a kernel is at fault."""

_FP8_COMPUTE_CAPABILITY = (8, 9)
_BF16_COMPUTE_CAPABILITY = (8, 0)
_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")


class CudaBackend(XlaBackend):
    """Runs on the first visible GPU; bfloat16 by preference."""

    name = "cuda"
    summary = "NVIDIA GPUs through XLA"
    platform = "cuda"
    custom_calls = (CUSTOM_CALL,)

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
        if self.target < library.LEAST or _switched_off():
            return {}
        return table.lowerings(self.target)

    def op_notes(self) -> Mapping[str, str]:
        if self.target < library.LEAST:
            why = f"decomposition: kernels need compute capability {_spelt(library.LEAST)}, not {_spelt(self.target)}"
            return dict.fromkeys(OPS, why)
        return dict.fromkeys(OPS, f"decomposition: {SWITCH}=off") if _switched_off() else table.notes()

    def export(self, program: Program) -> Artifact:
        artifact = super().export(program)
        if CUSTOM_CALL.encode() not in artifact.payload:
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
