"""ONNX Runtime on the CPU. Buffers are `OrtValue`s, so that caches pass from step to step without a copy."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime as ort

from backends.errors import BackendUnavailable
from runtime.deployment.manifest import GearUnits, Manifest, Step
from runtime.deployment.tensors import INT4, packed
from runtime.execution.package.executor import refusing

_INT4 = 22  # onnx.TensorProto.INT4


class OrtExecutor:
    """See `runtime.execution.package.executor.Executor`."""

    name = "ort"
    platform = "any"

    def __init__(self, trusted: bool = False) -> None:
        self.trusted, self._listed = trusted, frozenset[Path]()
        self.options = ort.SessionOptions()
        self.options.log_severity_level = 4  # what it logs of an error, it raises too
        self.options.intra_op_num_threads = 1
        # A small model's step is a few hundred short kernels: threads that spin between them cost more than they give
        self.options.add_session_config_entry("session.intra_op.allow_spinning", "0")

    def admit(self, folder: Path, manifest: Manifest) -> None:
        if find_spec("onnx") is None and not self.trusted:
            raise BackendUnavailable("--backend ort looks at graphs with onnx: pip install 'glm5-runtime[export]'")
        self._listed = frozenset(folder / name for name in manifest.files)

    def load(self, path: Path, step: Step) -> OrtLoaded:
        if find_spec("onnx") is None and self.trusted:
            return OrtLoaded(self._session(str(path), path))
        return OrtLoaded(self._session(self._read(path).SerializeToString(), path))

    def _read(self, path: Path) -> Any:
        from runtime.execution.package import onnx_graph

        return onnx_graph.read(path, self._listed, self.trusted)

    def _session(self, model: str | bytes, where: Path) -> Any:
        with refusing(where, "ONNX Runtime"):
            return ort.InferenceSession(model, self.options, providers=["CPUExecutionProvider"])

    def load_step(self, folder: Path, manifest: Manifest, program: GearUnits) -> OrtLoaded | None:
        if find_spec("onnx") is None:
            return None
        from runtime.execution.package.link import link

        with refusing(folder, "ONNX"):
            linked = link(folder, manifest, program, self._read).SerializeToString()
        return OrtLoaded(self._session(linked, folder))

    def put(self, array: np.ndarray) -> Any:
        array = np.asarray(array, order="C")
        if array.dtype == INT4:  # ONNX Runtime reads two to a byte, from the beginning of a buffer of one to a byte
            buffer = np.zeros(array.shape, INT4)
            buffer.reshape(-1).view(np.uint8)[: -(-array.size // 2)] = packed(array)
            return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(buffer, _INT4)
        if array.dtype == ml_dtypes.bfloat16:
            return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), 16)
        return ort.OrtValue.ortvalue_from_numpy(array)

    def get(self, buffer: Any) -> np.ndarray:
        return buffer.numpy()


class OrtLoaded:
    def __init__(self, session: Any):
        self.session = session

    def bind(self, fixed: Mapping[str, Any]) -> OrtBound:
        return OrtBound(self.session, fixed)


class OrtBound:
    """Writes to two sets of buffers in turn, so that a step allocates nothing and a cache is never read and written at
    once: what a call returns is overwritten by the second call after it."""

    def __init__(self, session: Any, fixed: Mapping[str, Any]):
        self.session = session
        self.fixed = dict(fixed)  # keeps the buffers alive
        self.inputs = [given.name for given in session.get_inputs() if given.name not in fixed]
        self.sets = [_Set(session, self.fixed), _Set(session, self.fixed)]

    def __call__(self, values: Mapping[str, Any]) -> dict[str, Any]:
        chosen = self.sets[0]
        self.sets.reverse()
        bound = chosen.bound
        for name in self.inputs:
            value = values[name]
            if bound.get(name) is not value:
                chosen.binding.bind_ortvalue_input(name, value)
                bound[name] = value
        self.session.run_with_iobinding(chosen.binding)
        return chosen.outputs


class _Set:
    """A binding with its own output buffers."""

    def __init__(self, session: Any, fixed: Mapping[str, Any]):
        self.binding, self.bound = session.io_binding(), dict[str, Any]()
        self.outputs: dict[str, Any] = {}
        for given in session.get_inputs():
            if given.name in fixed:
                self.binding.bind_ortvalue_input(given.name, fixed[given.name])
        for output in session.get_outputs():
            dtype = _DTYPES[output.type]
            self.outputs[output.name] = ort.OrtValue.ortvalue_from_shape_and_type(output.shape, dtype)
            self.binding.bind_ortvalue_output(output.name, self.outputs[output.name])


_DTYPES = {"tensor(float)": np.float32, "tensor(int32)": np.int32, "tensor(int64)": np.int64, "tensor(bool)": np.bool_}
