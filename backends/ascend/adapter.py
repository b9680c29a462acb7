"""Ascend: programs become graphs of torch_npu's operators, and run through torch_npu where it finds a device.

Export needs neither. Written from torch_npu's documentation and never run on a chip.
"""

from __future__ import annotations

import functools
import importlib
import io
import json
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import jax
import numpy as np

from backends.ascend.device import why_not
from backends.errors import ArtifactError, BackendUnavailable, Unsupported
from backends.interface import Artifact, Backend, Capabilities, DeviceInfo, Executable, Order, Program
from backends.toolchains.torch_device import TorchDevice
from backends.toolchains.walker import Graph, port
from foundation.errors import first_line

FORMAT, PLATFORM = "torch-npu", "ascend"


class AscendBackend(Backend):
    """device: where programs run instead of on the first NPU."""

    name = "ascend"
    summary = "Huawei Ascend NPUs through torch_npu"

    def __init__(self, device: TorchDevice | None = None):
        self._given = device

    def unavailable(self) -> str | None:
        return None if self._given else why_not()

    @functools.cached_property
    def _devices(self) -> tuple[DeviceInfo, ...]:
        if self._given:
            return (DeviceInfo(0, self._given.name),)
        if why_not() is not None:
            return ()
        import torch

        npu: Any = torch.npu  # type: ignore[attr-defined]
        return tuple(
            DeviceInfo(i, npu.get_device_name(i), npu.get_device_properties(i).total_memory)
            for i in range(npu.device_count())
        )

    def capabilities(self) -> Capabilities:
        return Capabilities(
            platform=PLATFORM,
            devices=self._devices,
            dtypes=frozenset({"float32", "bfloat16", "float16"}),
            preferred_dtype="bfloat16",
            fp8_weights=False,
            donation=True,  # caches are written in place
            dlpack=False,
        )

    def export(self, program: Program) -> Artifact:
        self.check(program)
        from backends.ascend.target import NpuOptions
        from backends.ascend.writer import write

        closed, shape = jax.make_jaxpr(program.fn, return_shape=True)(*program.args)
        inputs = tuple(port(f"in.{i}", aval) for i, aval in enumerate(closed.in_avals))
        outputs = tuple(port(f"out.{i}", aval) for i, aval in enumerate(closed.out_avals))
        options = NpuOptions(fused=bool(program.donate))  # an argument that is not given away is not written to
        made = write(Graph(program.name, closed, inputs, outputs), options)
        header = {
            "tree": _describe(shape, iter(range(len(outputs)))),
            "inputs": [[list(p.shape), p.dtype] for p in made.inputs],
        }
        encoded = json.dumps(header).encode()
        return Artifact(
            name=program.name,
            platform=PLATFORM,
            format=FORMAT,
            donate=program.donate,
            versions={name: metadata.version(name) for name in ("jax", "torch")},
            payload=len(encoded).to_bytes(8, "little") + encoded + made.archive,
        )

    def load(self, artifact: Artifact, devices: Sequence[Any] = ()) -> Executable:
        if artifact.platform != PLATFORM or artifact.format != FORMAT:
            raise ArtifactError(
                f"artifact {artifact.name} is {artifact.format} for {artifact.platform}; "
                f"backend {self.name} loads {FORMAT} for {PLATFORM}"
            )
        from backends.ascend.declare import declare

        declare()
        size = int.from_bytes(artifact.payload[:8], "little")
        header, archive = json.loads(artifact.payload[8 : 8 + size]), artifact.payload[8 + size :]
        try:
            run = self._device.load(io.BytesIO(archive))
        except Exception as error:  # torch's own have no common base
            raise ArtifactError(f"artifact {artifact.name}: torch does not read it ({first_line(error)})") from None
        return _Program(self._device, run, header)

    @functools.cached_property
    def _device(self) -> TorchDevice:
        if reason := self.unavailable():
            raise BackendUnavailable(f"backend {self.name} cannot be used here: {reason}")
        return self._given or TorchDevice("npu:0")

    def put(self, array: Any, order: Order | None = None) -> Any:
        if order is not None:
            raise Unsupported(f"backend {self.name} holds arrays as their shapes have them")
        return self._device.put(np.asarray(array))

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Any:
        return self._device.zeros(shape, dtype)

    def get(self, buffer: Any) -> np.ndarray:
        return self._device.get(buffer)

    def exhausted(self, error: Exception) -> bool:
        return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"

    def from_dlpack(self, tensor: Any) -> Any:
        """By way of the host: what is on another device is not taken from there."""
        return self.put(np.from_dlpack(tensor))


class _Program:
    """A loaded program: trees of buffers in, trees of buffers out."""

    def __init__(self, device: TorchDevice, run: Any, header: dict[str, Any]):
        self.device, self.run, self.tree = device, run, header["tree"]
        self.inputs = [(tuple(shape), _numpy(dtype)) for shape, dtype in header["inputs"]]

    def __call__(self, *args: Any) -> Any:
        given = [
            (x if _is_tensor(x) else self.device.put(np.asarray(x, dtype))).reshape(shape)
            for (shape, dtype), x in zip(self.inputs, jax.tree.leaves(args), strict=True)
        ]
        return _rebuild(self.tree, list(self.run(*given)))


def _is_tensor(x: Any) -> bool:
    import torch

    return isinstance(x, torch.Tensor)


def _numpy(dtype: str) -> np.dtype:
    import ml_dtypes

    return np.dtype(getattr(ml_dtypes, dtype, None) or dtype)


def _describe(tree: Any, leaves: Any) -> Any:
    """The structure of a program's results as JSON, leaves by number in JAX's order."""
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        kind = f"{type(tree).__module__}:{type(tree).__name__}"
        return {"named": kind, "items": [_describe(item, leaves) for item in tree]}
    if isinstance(tree, list | tuple):
        return {type(tree).__name__: [_describe(item, leaves) for item in tree]}
    if isinstance(tree, dict):
        return {"dict": {key: _describe(tree[key], leaves) for key in sorted(tree)}}
    return None if tree is None else next(leaves)


def _rebuild(tree: Any, leaves: list[Any]) -> Any:
    if tree is None or isinstance(tree, int):
        return None if tree is None else leaves[tree]
    if "named" in tree:
        module, _, name = tree["named"].partition(":")
        return getattr(importlib.import_module(module), name)(*(_rebuild(item, leaves) for item in tree["items"]))
    if "dict" in tree:
        return {key: _rebuild(item, leaves) for key, item in tree["dict"].items()}
    kind = list if "list" in tree else tuple
    return kind(_rebuild(item, leaves) for item in next(iter(tree.values())))
