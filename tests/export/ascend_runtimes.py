"""Two stand-ins for an Ascend host: NumPy after CANN's documentation, and a fake `acl` that runs it.

The fake tests our own use of pyACL (buffers, names, sizes, aliases), not CANN.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from runtime.deployment.manifest import Step
from tests.backends.cann_reference import OPERATORS


class ReferenceExecutor:
    """An executor of packages (`runtime.execution.package.executor.Executor`) whose buffers are NumPy arrays."""

    name = "reference"
    platform = "any"

    def load(self, path: Path, step: Step) -> _Loaded:
        return _Loaded(ReferenceEvaluator(str(path), new_ops=OPERATORS), [value.name for value in step.outputs])

    def put(self, array: np.ndarray) -> np.ndarray:
        return np.asarray(array)

    def get(self, buffer: np.ndarray) -> np.ndarray:
        return buffer


class _Loaded:
    def __init__(self, session: Any, outputs: list[str]):
        self.session, self.outputs = session, outputs

    def bind(self, fixed: Mapping[str, Any]) -> Any:
        def run(values: Mapping[str, Any]) -> dict[str, Any]:
            feeds = {name: fixed.get(name, values.get(name)) for name in self.session.input_names}
            return dict(zip(self.outputs, self.session.run(None, feeds), strict=True))

        return run


def fake_atc(folder: Path) -> Path:
    """An executable that copies --model to --output.om, and refuses a model named "refused.onnx" as ATC would."""
    path = folder / "atc"
    path.write_text(
        "#!/bin/sh\n"
        'for a in "$@"; do case $a in --model=*) m=${a#*=};; --output=*) o=${a#*=};; esac; done\n'
        'case $m in *refused.onnx) echo "ATC run failed"; echo "E16002: optype [x] is not registered"; exit 1;; esac\n'
        'echo "$@" >> "$(dirname "$0")/calls"; cp "$m" "$o.om"\n'
    )
    path.chmod(0o755)
    return path


class FakeAcl:
    """As much of pyACL as we use. Device memory is host memory by address; a model is an ONNX file."""

    def __init__(self) -> None:
        self.memory: dict[int, np.ndarray] = {}
        self.models: dict[int, Any] = {}
        self.rt, self.mdl, self.util = self, self, self
        self._next = 1

    def _new(self) -> int:
        self._next += 1 << 40
        return self._next

    def init(self) -> int:
        return 0

    def set_device(self, device: int) -> int:
        return 0 if device == 0 else 107001

    def get_device_count(self) -> tuple[int, int]:
        return 1, 0

    def get_soc_name(self) -> str:
        return "Ascend910B3"

    def malloc(self, size: int, policy: int) -> tuple[int, int]:
        pointer = self._new()
        self.memory[pointer] = np.zeros(size, np.uint8)
        return pointer, 0

    def free(self, pointer: int) -> int:
        del self.memory[pointer]
        return 0

    def numpy_to_ptr(self, array: np.ndarray) -> int:
        pointer = self._new()
        self.memory[pointer] = array  # a view: what is copied here is seen by the caller
        return pointer

    def memcpy(self, to: int, room: int, source: int, size: int, kind: int) -> int:
        assert room >= size and kind in (1, 2)
        self.memory[to][:size] = self.memory[source][:size]
        return 0

    def load_from_file(self, path: str) -> tuple[int, int]:
        model = self._new()
        self.models[model] = onnx.load(path)
        return model, 0

    def unload(self, model: int) -> int:
        return 0

    def create_desc(self) -> dict[str, Any]:
        return {}

    def get_desc(self, desc: dict[str, Any], model: int) -> int:
        graph = self.models[model].graph
        desc["inputs"] = [(i.name, _size(i)) for i in graph.input]
        return 0

    def get_num_inputs(self, desc: dict[str, Any]) -> int:
        return len(desc["inputs"])

    def get_input_name_by_index(self, desc: dict[str, Any], index: int) -> str:
        return desc["inputs"][index][0]

    def get_input_size_by_index(self, desc: dict[str, Any], index: int) -> int:
        return desc["inputs"][index][1]

    def create_data_buffer(self, pointer: int, size: int) -> tuple[int, int]:
        return pointer, size

    def destroy_data_buffer(self, buffer: tuple[int, int]) -> int:
        return 0

    def create_dataset(self) -> list[Any]:
        return []

    def add_dataset_buffer(self, dataset: list[Any], buffer: tuple[int, int]) -> tuple[list[Any], int]:
        dataset.append(buffer)
        return dataset, 0

    def destroy_dataset(self, dataset: list[Any]) -> int:
        return 0

    def execute(self, model: int, given: list[Any], made: list[Any]) -> int:
        loaded = self.models[model]
        feeds = {}
        for info, (pointer, size) in zip(loaded.graph.input, given, strict=True):
            feeds[info.name] = self.memory[pointer][:size].view(_dtype(info)).reshape(_shape(info)).copy()
        results = ReferenceEvaluator(loaded, new_ops=OPERATORS).run(None, feeds)
        for (pointer, _), result in zip(made, results, strict=True):
            raw = np.ascontiguousarray(result).reshape(-1).view(np.uint8)
            self.memory[pointer][: raw.size] = raw
        return 0


def _shape(info: Any) -> tuple[int, ...]:
    return tuple(dim.dim_value for dim in info.type.tensor_type.shape.dim)


def _dtype(info: Any) -> np.dtype:
    return onnx.helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)


def _size(info: Any) -> int:
    return int(np.prod(_shape(info))) * _dtype(info).itemsize


def copy_of(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to
