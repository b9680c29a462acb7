"""Compiled graphs on a chip, through pyACL (the `acl` module of CANN). Written from its reference; never run here.

A session owns a device. Buffers are device memory with a shape and a type. A graph is loaded once and executed with
buffers by name; an output whose buffer may take over an input's is given that input's memory, so that CANN's in-place
cache writes land where the next step reads them.
"""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from backends.errors import ArtifactError, BackendError, BackendUnavailable

_REPEATED = 100002  # ACL_ERROR_REPEAT_INITIALIZE
_HUGE_FIRST, _TO_DEVICE, _TO_HOST = 0, 1, 2  # ACL_MEM_MALLOC_HUGE_FIRST, ACL_MEMCPY_HOST_TO_DEVICE, .._DEVICE_TO_HOST

NO_CANN = (
    "CANN's Python module `acl` cannot be imported; install CANN and source its set_env.sh, "
    "or emulate the chip with --backend sim"
)


def find_acl() -> tuple[ModuleType | None, str]:
    """CANN's module, or None and the reason."""
    try:
        import acl  # type: ignore[import-not-found]
    except ImportError:
        from importlib.util import find_spec

        hint = "torch_npu is installed, but " if find_spec("torch_npu") else ""
        return None, hint + NO_CANN
    return acl, ""


@dataclasses.dataclass(frozen=True)
class OmTensor:
    """Device memory as an array; freed with its last reference."""

    pointer: int
    shape: tuple[int, ...]
    dtype: np.dtype
    owner: Any

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class _Memory:
    """An allocation."""

    def __init__(self, acl: Any, size: int):
        self.pointer = _checked("acl.rt.malloc", acl.rt.malloc(max(size, 1), _HUGE_FIRST))
        weakref.finalize(self, acl.rt.free, self.pointer)


class Session:
    """A device. Raises `BackendUnavailable` without CANN or without the device."""

    def __init__(self, device: int = 0, acl: Any = None):
        if acl is None:
            acl, reason = find_acl()
            if acl is None:
                raise BackendUnavailable(f"backend ascend cannot be used here: {reason}")
        self.acl = acl
        if (code := acl.init()) not in (0, _REPEATED):
            raise BackendUnavailable(f"CANN does not start (acl.init returned {code}); see ~/ascend/log")
        try:
            _checked("acl.rt.set_device", acl.rt.set_device(device))
        except BackendError as error:
            raise BackendUnavailable(f"Ascend device {device}: {error}; see `npu-smi info`") from None

    def put(self, array: np.ndarray) -> OmTensor:
        """A host array on the device."""
        array = np.asarray(array, order="C")
        out = self.empty(array.shape, array.dtype)
        raw = array.reshape(-1).view(np.uint8)
        if raw.size:
            pointer = self.acl.util.numpy_to_ptr(raw)
            _checked("acl.rt.memcpy", self.acl.rt.memcpy(out.pointer, raw.size, pointer, raw.size, _TO_DEVICE))
        return out

    def get(self, tensor: OmTensor) -> np.ndarray:
        """A tensor as a host array."""
        raw = np.empty(tensor.bytes, np.uint8)
        if raw.size:
            pointer = self.acl.util.numpy_to_ptr(raw)
            _checked("acl.rt.memcpy", self.acl.rt.memcpy(pointer, raw.size, tensor.pointer, raw.size, _TO_HOST))
        return raw.view(tensor.dtype).reshape(tensor.shape)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> OmTensor:
        memory = _Memory(self.acl, math.prod(shape) * dtype.itemsize)
        return OmTensor(memory.pointer, tuple(shape), dtype, memory)

    def load(self, path: Path) -> OmModel:
        return OmModel(self, path)


class OmModel:
    """A compiled graph on the session's device. Raises `ArtifactError` for a file that CANN does not load."""

    def __init__(self, session: Session, path: Path):
        mdl = session.acl.mdl
        self.session, self.path = session, path
        try:
            self.id = _checked("acl.mdl.load_from_file", mdl.load_from_file(str(path)))
        except BackendError as error:
            raise ArtifactError(f"{path}: CANN does not load it ({error}); compile it again (build.sh)") from None
        self.description = mdl.create_desc()
        _checked("acl.mdl.get_desc", mdl.get_desc(self.description, self.id))
        weakref.finalize(self, mdl.unload, self.id)
        self.inputs = [
            (mdl.get_input_name_by_index(self.description, i), mdl.get_input_size_by_index(self.description, i))
            for i in range(mdl.get_num_inputs(self.description))
        ]

    def run(
        self,
        values: Mapping[str, OmTensor],
        outputs: Mapping[str, tuple[tuple[int, ...], np.dtype]],
        aliases: Mapping[str, str],
    ) -> dict[str, OmTensor]:
        """Executes with inputs by name. `outputs`: shape and type of each, in the graph's order; `aliases`: output ->
        the input whose memory it takes. Raises `ArtifactError` for an input of another size than the graph's."""
        for name, size in self.inputs:
            if name not in values:
                raise ArtifactError(f"{self.path}: needs the input {name}, which is not given")
            if values[name].bytes != size:
                raise ArtifactError(
                    f"{self.path}: the input {name} takes {size} bytes, {values[name].bytes} are given; "
                    "a shape outside the gear it was compiled for"
                )
        results = {
            name: dataclasses.replace(values[aliases[name]], shape=shape, dtype=dtype)
            if name in aliases
            else self.session.empty(shape, dtype)
            for name, (shape, dtype) in outputs.items()
        }
        given = _Dataset(self.session.acl, [values[name] for name, _ in self.inputs])
        made = _Dataset(self.session.acl, list(results.values()))
        try:
            _checked("acl.mdl.execute", self.session.acl.mdl.execute(self.id, given.handle, made.handle))
        finally:
            given.close()
            made.close()
        return results


class _Dataset:
    """What acl.mdl.execute takes: a list of buffers."""

    def __init__(self, acl: Any, tensors: list[OmTensor]):
        self.acl, self.handle, self.buffers = acl, acl.mdl.create_dataset(), []
        for tensor in tensors:
            buffer = acl.create_data_buffer(tensor.pointer, max(tensor.bytes, 1))
            self.buffers.append(buffer)
            _checked("acl.mdl.add_dataset_buffer", acl.mdl.add_dataset_buffer(self.handle, buffer))

    def close(self) -> None:
        for buffer in self.buffers:
            self.acl.destroy_data_buffer(buffer)
        self.acl.mdl.destroy_dataset(self.handle)


def _checked(call: str, result: Any) -> Any:
    """A pyACL call's value; its last or only result is an error code, 0 where it went well."""
    values = result if isinstance(result, tuple) else (result,)
    if values[-1] != 0:
        raise BackendError(f"{call} returned error {values[-1]} (see CANN's log under ~/ascend/log)")
    return values[0] if len(values) > 1 else None
