"""The adapters: the host CPU, and on it as many emulated devices as a plan has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

from backends.cpu import CpuBackend
from backends.emulation.number_formats import NumberFormats
from backends.errors import BackendUnavailable
from backends.spmd.cluster import Cluster, Plain
from backends.spmd.stages import Hosts, Mapped, Stage
from model.config import ModelConfig
from model.split import Grid

MOST_HOSTS = 64
"""Devices that are XLA host devices of their own; with more, rendezvous of all threads gets slow, then hangs."""


class SimBackend(CpuBackend):
    """Emulated devices of any profile. What it runs is a plan, by `cluster`; single programs run as on the CPU.

    mapped: run all devices of a server as axes on one; by default where there are more than `MOST_HOSTS`.
    """

    name = "sim"
    summary = "emulated devices of any accelerator, on the host CPU"
    emulates = True
    spreads = False

    def __init__(self, mapped: bool | None = None):
        self.mapped = mapped

    def start(self, devices: int) -> None:
        """Makes XLA host devices for a server of that many, before anything else has used JAX here.

        Raises `BackendUnavailable` where JAX has already started with fewer.
        """
        if self.mapped or devices > MOST_HOSTS:
            return
        try:
            jax.config.update("jax_num_cpu_devices", devices)
        except RuntimeError:
            if len(jax.devices("cpu")) < devices:
                raise BackendUnavailable(
                    f"JAX has started with {len(jax.devices('cpu'))} host devices, {devices} are needed: start it "
                    f"with XLA_FLAGS=--xla_force_host_platform_device_count={devices}"
                ) from None

    def cluster(
        self,
        cfg: ModelConfig,
        grid: Grid,
        weights: dict[str, Any],
        formats: NumberFormats | None = None,
        drafts: int = 0,
    ) -> Cluster:
        """A server's devices with their shares of the weights. Without formats everything is float32. drafts: of
        `Cluster`.

        Raises `BackendUnavailable` where JAX was started with fewer host devices than it takes.
        """
        devices = EmulatedDevices(formats)
        return Cluster(cfg, grid, weights, devices, self._stages(grid, devices), formats or Plain(), drafts)

    def _stages(self, grid: Grid, backend: EmulatedDevices) -> list[Stage]:
        if grid.devices > MOST_HOSTS if self.mapped is None else self.mapped:
            return [Mapped(grid, backend) for _ in grid.stages]
        devices = jax.devices("cpu")
        if len(devices) < grid.devices:
            raise BackendUnavailable(
                f"{grid.devices} emulated devices need as many XLA host devices, and JAX was started with "
                f"{len(devices)}: set XLA_FLAGS=--xla_force_host_platform_device_count=N"
            )
        size = grid.stage_devices
        return [Hosts(grid, devices[first : first + size]) for first in range(0, grid.devices, size)]


class EmulatedDevices(SimBackend):
    """What a server's emulated devices compute: the chip's number formats, and otherwise what the ops mean.

    None of the CPU's kernels, which are loops: `vmap` would run each for all devices at once, as gathers and scatters.
    """

    def __init__(self, formats: NumberFormats | None):
        super().__init__()
        self._formats = formats

    def lowerings(self) -> Mapping[str, Callable[..., Any]]:
        return self._formats.lowerings() if self._formats else {}
