"""What the XLA/PJRT adapters share: export through `jax.export`, load and run through `jax.jit`.

An artifact holds serialized StableHLO for one platform (a composite whose body holds a matrix product
cannot be exported for several at once).
"""

from __future__ import annotations

from functools import cached_property
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from backends.errors import ArtifactError, BackendUnavailable
from backends.interface import Artifact, Backend, DeviceInfo, Executable, Program
from model import ops

FORMAT = "stablehlo-jax-export"


class XlaBackend(Backend):
    """Base of the adapters that run on a PJRT device of `platform`."""

    platform: str
    spreads = True

    @cached_property
    def _found(self) -> tuple[list[Any], str | None]:
        """The platform's devices, or none and the runtime's reason."""
        try:
            return jax.local_devices(backend=self.platform), None
        except RuntimeError as error:
            return [], str(error).splitlines()[0]

    def devices(self) -> tuple[DeviceInfo, ...]:
        return tuple(DeviceInfo(d.id, d.device_kind, _memory_bytes(d)) for d in self._found[0])

    @property
    def device(self) -> Any:
        """The device that buffers are put on."""
        devices, reason = self._found
        if not devices:
            raise BackendUnavailable(f"backend {self.name} has no device here: {reason}")
        return devices[0]

    def export(self, program: Program) -> Artifact:
        self.check(program)
        fn = jax.jit(ops.substitute(program.fn, self.lowerings()))
        exported = export.export(fn, platforms=[self.platform])(*program.args)
        return Artifact(
            name=program.name,
            platform=self.platform,
            format=FORMAT,
            donate=program.donate,
            versions={name: metadata.version(name) for name in ("jax", "jaxlib")},
            payload=bytes(exported.serialize()),
        )

    def load(self, artifact: Artifact) -> Executable:
        if artifact.platform != self.platform or artifact.format != FORMAT:
            raise ArtifactError(
                f"artifact {artifact.name} is {artifact.format} for {artifact.platform}; "
                f"backend {self.name} loads {FORMAT} for {self.platform}"
            )
        device = self.device
        exported = export.deserialize(bytearray(artifact.payload))
        run = jax.jit(exported.call, donate_argnums=artifact.donate)
        args = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=jax.sharding.SingleDeviceSharding(device)),
            jax.tree.unflatten(exported.in_tree, exported.in_avals)[0],
        )
        return run.lower(*args).compile()

    def put(self, array: Any) -> Any:
        return jax.device_put(array, self.device)

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Any:
        return jnp.zeros(shape, dtype, device=self.device)

    def get(self, buffer: Any) -> np.ndarray:
        return np.asarray(buffer)

    def from_dlpack(self, tensor: Any) -> Any:
        return self.put(jax.dlpack.from_dlpack(tensor))


def _memory_bytes(device: Any) -> int | None:
    stats = device.memory_stats()
    return stats.get("bytes_limit") if stats else None
