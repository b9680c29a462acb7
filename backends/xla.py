"""What the XLA/PJRT adapters share: export through `jax.export`, load and run through `jax.jit`.

An artifact holds serialized StableHLO for one platform (a composite whose body holds a matrix product
cannot be exported for several at once). A program with a mesh is exported for one without devices
(`jax.sharding.AbstractMesh`), and meets its devices when it is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from backends.errors import ArtifactError, BackendUnavailable
from backends.interface import Artifact, Backend, DeviceInfo, Executable, Order, Program
from backends.orders import laid, order_of
from foundation.errors import first_line
from model import ops

FORMAT = "stablehlo-jax-export"
NARROW_ROWS = frozenset({"fp8", "fp8_ds_mla", "fp8_scaled"})
"""Formats of cache rows that the graph packs and reads itself (`model.narrow_rows`)."""
_UNKNOWN_OPTION = "No such compile option"
_NOT_OPTIMISED = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


class XlaBackend(Backend):
    """Base of the adapters that run on a PJRT device of `platform`."""

    platform: str
    spreads = True
    compiler_options: dict[str, Any] = {}
    """What XLA is told of every program here; a release that knows one of them no more is told none."""

    @cached_property
    def _found(self) -> tuple[list[Any], str | None]:
        """The platform's devices, or none and the runtime's reason."""
        try:
            return jax.local_devices(backend=self.platform), None
        except RuntimeError as error:
            return [], first_line(error)

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
        fn = ops.substitute(program.fn, self.lowerings(), settle=self.settle)
        whole = program.spread(fn) if program.spread else fn
        # where an argument is over a mesh is written down only if the program keeps it
        compiled = jax.jit(whole, keep_unused=bool(program.mesh))
        allowed = [export.DisabledSafetyCheck.custom_call(name) for name in self.custom_calls]
        exported = export.export(compiled, platforms=[self.platform], disabled_checks=allowed)(*program.args)
        return Artifact(
            name=program.name,
            platform=self.platform,
            format=FORMAT,
            donate=program.donate,
            versions={name: metadata.version(name) for name in ("jax", "jaxlib")},
            payload=bytes(exported.serialize()),
            optimise=program.optimise,
            mesh=program.mesh,
            orders=program.orders,
        )

    def settle(self, value: Any, meant: jax.ShapeDtypeStruct) -> Any:
        """A result of a program in the form that the op contract gives it, where `lowerings` agree on another."""
        return value

    def load(self, artifact: Artifact, devices: Sequence[Any] = ()) -> Executable:
        if artifact.platform != self.platform or artifact.format != FORMAT:
            raise ArtifactError(
                f"artifact {artifact.name} is {artifact.format} for {artifact.platform}; "
                f"backend {self.name} loads {FORMAT} for {self.platform}"
            )
        exported = export.deserialize(bytearray(artifact.payload))
        placed = self._shardings(artifact, exported, devices)
        run = jax.jit(exported.call, donate_argnums=artifact.donate)
        orders = artifact.orders or (None,) * len(placed)
        avals = [
            jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=laid(sharding, order))
            for a, sharding, order in zip(exported.in_avals, placed, orders, strict=True)
        ]
        args = jax.tree.unflatten(exported.in_tree, avals)[0]
        lowered = run.lower(*args)
        effort: dict[str, Any] = {} if artifact.optimise else dict(_NOT_OPTIMISED)
        try:
            return lowered.compile(self.compiler_options | effort or None)
        except jax.errors.JaxRuntimeError as error:
            if not self.compiler_options or _UNKNOWN_OPTION not in str(error):
                raise
            return lowered.compile(effort or None)

    def _shardings(
        self, artifact: Artifact, exported: export.Exported, devices: Sequence[Any]
    ) -> Sequence[Sharding | None]:
        """Where each argument's leaves are."""
        if not artifact.mesh:
            return [SingleDeviceSharding(self.device)] * len(exported.in_avals)
        if len(devices) != artifact.devices:
            raise BackendUnavailable(
                f"{artifact.name} runs on {artifact.devices} devices together; backend {self.name} is given "
                f"{len(devices)}"
            )
        chosen = np.array(devices, dtype=object).reshape(tuple(artifact.mesh.values()))
        return exported.in_shardings_jax(Mesh(chosen, tuple(artifact.mesh)))

    def exhausted(self, error: Exception) -> bool:
        said = isinstance(error, jax.errors.JaxRuntimeError) and str(error).startswith("RESOURCE_EXHAUSTED")
        return said or super().exhausted(error)

    def put(self, array: Any, order: Order | None = None) -> Any:
        return jax.device_put(array, laid(SingleDeviceSharding(self.device), order))

    def order_of(self, buffer: Any) -> Order | None:
        return order_of(buffer)

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Any:
        return jnp.zeros(shape, dtype, device=self.device)

    def get(self, buffer: Any) -> np.ndarray:
        return np.asarray(buffer)

    def from_dlpack(self, tensor: Any) -> Any:
        return self.put(jax.dlpack.from_dlpack(tensor))


def _memory_bytes(device: Any) -> int | None:
    stats = device.memory_stats()
    return stats.get("bytes_limit") if stats else None
