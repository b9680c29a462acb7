"""Ascend: programs become ONNX for ATC, and run through pyACL where CANN is installed.

Export needs neither: it is the graph with the CANN operators that ATC knows by itself, so that no plugin has to be
built (packages of `glm5 export` may have all of them). Loading compiles with `atc`, once for each graph and chip, to a
folder in the system's temporary directory. Written from CANN's documentation and never run on a chip.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

from backends.ascend import compiler, om
from backends.ascend.lowerings import CannOptions
from backends.ascend.writer import write
from backends.errors import ArtifactError, BackendUnavailable
from backends.interface import Artifact, Backend, Capabilities, DeviceInfo, Executable, Program
from backends.toolchains.walker import Graph, port

FORMAT, PLATFORM = "onnx-atc", "ascend"


class AscendBackend(Backend):
    name = "ascend"
    summary = "Huawei Ascend NPUs through CANN (ATC and pyACL)"

    def unavailable(self) -> str | None:
        acl, reason = om.find_acl()
        if acl is None:
            return reason
        if compiler.find_atc() is None:
            return "`atc` is not on the PATH; source CANN's set_env.sh, or emulate the chip with --backend sim"
        return None if self._devices else "CANN finds no device (see `npu-smi info`); emulate one with --backend sim"

    @functools.cached_property
    def _devices(self) -> tuple[DeviceInfo, ...]:
        acl, _ = om.find_acl()
        if acl is None:
            return ()
        count, error = acl.rt.get_device_count()
        return tuple(DeviceInfo(i, acl.get_soc_name() or "Ascend") for i in range(count if error == 0 else 0))

    def capabilities(self) -> Capabilities:
        return Capabilities(
            platform=PLATFORM,
            devices=self._devices,
            dtypes=frozenset({"float32", "bfloat16", "float16"}),
            preferred_dtype="bfloat16",
            fp8_weights=False,
            donation=False,
            dlpack=False,
        )

    def export(self, program: Program) -> Artifact:
        self.check(program)
        closed, shape = jax.make_jaxpr(program.fn, return_shape=True)(*program.args)
        inputs = tuple(port(f"in.{i}", aval) for i, aval in enumerate(closed.in_avals))
        outputs = tuple(port(f"out.{i}", aval) for i, aval in enumerate(closed.out_avals))
        made = write(Graph(program.name, closed, inputs, outputs), CannOptions(fused="shipped"))
        header = {
            "tree": _describe(shape, iter(range(len(outputs)))),
            "inputs": [[p.name, list(p.shape), p.dtype] for p in inputs],
            "outputs": [[p.name, list(p.shape), p.dtype] for p in outputs],
        }
        encoded = json.dumps(header).encode()
        return Artifact(
            name=program.name,
            platform=PLATFORM,
            format=FORMAT,
            donate=(),
            versions={name: metadata.version(name) for name in ("jax", "onnx")},
            payload=len(encoded).to_bytes(8, "little") + encoded + made.written.model.SerializeToString(),
        )

    def load(self, artifact: Artifact, devices: Sequence[Any] = ()) -> Executable:
        if artifact.platform != PLATFORM or artifact.format != FORMAT:
            raise ArtifactError(
                f"artifact {artifact.name} is {artifact.format} for {artifact.platform}; "
                f"backend {self.name} loads {FORMAT} for {PLATFORM}"
            )
        size = int.from_bytes(artifact.payload[:8], "little")
        header, model = json.loads(artifact.payload[8 : 8 + size]), artifact.payload[8 + size :]
        session, soc = self._session, self._soc
        stem = hashlib.sha256(model + soc.encode()).hexdigest()[:16]
        folder = Path(tempfile.gettempdir()) / f"glm5-ascend-{stem}"
        compiled = folder / "graph.om"
        if not compiled.is_file():
            folder.mkdir(exist_ok=True)
            (folder / "graph.onnx").write_bytes(model)
            compiler.compile_graph(folder / "graph.onnx", folder / "graph", soc)
        return _Program(session, session.load(compiled), header)

    @functools.cached_property
    def _session(self) -> om.Session:
        if reason := self.unavailable():
            raise BackendUnavailable(f"backend {self.name} cannot be used here: {reason}")
        return om.Session()

    @property
    def _soc(self) -> str:
        return self._session.acl.get_soc_name()

    def put(self, array: Any) -> Any:
        return self._session.put(np.asarray(array))

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Any:
        return self._session.put(np.zeros(shape, _numpy(dtype)))

    def get(self, buffer: Any) -> np.ndarray:
        return self._session.get(buffer)

    def from_dlpack(self, tensor: Any) -> Any:
        """By way of the host: pyACL takes no foreign device memory."""
        return self.put(np.from_dlpack(tensor))


class _Program:
    """A loaded program: trees of buffers in, trees of buffers out."""

    def __init__(self, session: om.Session, model: om.OmModel, header: dict[str, Any]):
        self.session, self.model, self.tree = session, model, header["tree"]
        self.names = [name for name, _, _ in header["inputs"]]
        self.outputs = {name: (tuple(shape), _numpy(dtype)) for name, shape, dtype in header["outputs"]}
        self.kinds = {name: _numpy(dtype) for name, _, dtype in header["inputs"]}

    def __call__(self, *args: Any) -> Any:
        given = jax.tree.leaves(args, is_leaf=lambda x: isinstance(x, om.OmTensor))
        values = {
            name: x if isinstance(x, om.OmTensor) else self.session.put(np.asarray(x, self.kinds[name]))
            for name, x in zip(self.names, given, strict=True)
        }
        return _rebuild(self.tree, list(self.model.run(values, self.outputs, {}).values()))


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
