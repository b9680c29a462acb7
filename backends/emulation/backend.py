"""The adapter: the host CPU, and on it as many emulated devices as a plan has."""

from __future__ import annotations

from typing import Any

import jax

from backends.cpu import CpuBackend
from backends.errors import BackendUnavailable
from backends.spmd.cluster import Cluster, Numerics
from backends.spmd.shard import MOST_HOSTS
from model.config import ModelConfig
from model.split import Grid


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
        self, cfg: ModelConfig, grid: Grid, weights: dict[str, Any], formats: Numerics | None = None
    ) -> Cluster:
        """A server's devices with their shares of the weights."""
        return Cluster(cfg, grid, weights, formats, self.mapped)
