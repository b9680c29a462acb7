"""Damaged graphs, as the runtimes of exported packages open and run them.

`tests/data/graph.*` are sin(x) @ ones * [1, 2, 4] + 1 over float32[2, 3], as `glm5 export` writes it (`target.write` of
`backends/toolchains/` for ONNX and torch, `jax.export` for StableHLO). No JAX here: what needs it works in a process
of its own.
"""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from backends.errors import ArtifactError
from runtime.deployment.manifest import Step, Value
from runtime.execution.package.room import within_room
from tests.fuzz.mutations import mutated_bytes

DATA = Path(__file__).parents[1] / "data"
STEP = Step("graph", (Value("in0", (2, 3), "float32"),), (Value("out0", (2, 3), "float32"),))
X = np.zeros((2, 3), np.float32)
ROOM_BYTES = 1 << 30
AT_ONCE = 25  # StableHLO graphs of a case: two processes that import JAX look at all of them


def onnx_graph(rng: Random) -> bytes:
    """Some as bytes, some with a field changed."""
    import onnx

    held = (DATA / "graph.onnx").read_bytes()
    if rng.random() < 0.6:
        return mutated_bytes(rng, held)
    model = onnx.load_from_string(held)
    for _ in range(rng.choice((1, 1, 2))):
        node = rng.choice(model.graph.node)
        match rng.randrange(7):
            case 0:
                node.op_type = rng.choice(
                    ("Expand", "Range", "Tile", "Loop", "If", "Einsum", "ConstantOfShape", "", "NoOp")
                )
            case 1:
                node.domain = rng.choice(("com.microsoft", "own", "ai.onnx.ml"))
            case 2 if node.input:
                node.input[rng.randrange(len(node.input))] = rng.choice(("in0", "out0", "", "none", node.output[0]))
            case 3 if model.graph.initializer:
                tensor = rng.choice(model.graph.initializer)
                tensor.dims[:] = rng.choice(([2**40], [-1], [0], [2**31, 2**31], [3, 3], []))
            case 4 if model.graph.initializer:
                tensor = rng.choice(model.graph.initializer)
                tensor.data_type = rng.choice((0, 1, 7, 8, 16, 99, -1))
            case 5:
                dim = rng.choice(model.graph.input[0].type.tensor_type.shape.dim)
                dim.dim_value = rng.choice((0, -1, 2**40, 7))
            case _:
                del model.graph.node[rng.randrange(len(model.graph.node))]
                if not model.graph.node:
                    break
    return model.SerializeToString()


def pt2_graph(rng: Random) -> bytes:
    """Some as bytes of the archive, some of an entry of it."""
    held = (DATA / "graph.pt2").read_bytes()
    if rng.random() < 0.3:
        return mutated_bytes(rng, held)
    with zipfile.ZipFile(io.BytesIO(held)) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice(list(entries))
    if rng.random() < 0.7:
        name = next(each for each in entries if each.endswith("models/model.json"))
    entries[name] = mutated_bytes(rng, entries[name])
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for each, content in entries.items():
            archive.writestr(each, content)
    return out.getvalue()


def stablehlo_graph(rng: Random) -> bytes:
    """The first of those of a case; `stablehlo_opens` makes the others from it."""
    return mutated_bytes(rng, (DATA / "graph.jax_export").read_bytes())


def onnx_opens(folder: Path) -> None:
    from runtime.execution.package.ort import OrtExecutor

    _computes(OrtExecutor(), folder / "graph.onnx")


def pt2_opens(folder: Path) -> None:
    from runtime.execution.package.torch import TorchExecutor

    _computes(TorchExecutor(), folder / "graph.pt2")


def _computes(runtime: Any, path: Path) -> None:
    from runtime.execution.package.executor import refusing

    with within_room(path, ROOM_BYTES):
        loaded = runtime.load(path, STEP)
        with refusing(path, runtime.name):
            runtime.get(loaded.bind({})({"in0": runtime.put(X)})["out0"])


def stablehlo_opens(folder: Path) -> None:
    """What the check lets through must compile and run, or be refused, without harm to the process."""
    from runtime.execution.package.stablehlo_check import refusals

    first = (folder / "graph.jax_export").read_bytes()
    rng = Random(first)
    left = [folder / "graph.jax_export"]
    inner = folder / "graph.jax_export-more"
    inner.mkdir()
    for number in range(1, AT_ONCE):
        left.append(inner / f"{number}.jax_export")
        left[-1].write_bytes(stablehlo_graph(rng))
    try:
        admitted: list[Path] = []
        while left:
            found = refusals(left)
            for why in found.values():
                assert why.strip() and "\n" not in why, why
            last = max((left.index(path) for path in found if _died(found[path])), default=len(left) - 1)
            admitted += [path for path in left[: last + 1] if path not in found]
            left = left[last + 1 :]
        _run(admitted)
        if (folder / "graph.jax_export") not in admitted:
            raise ArtifactError(f"{folder / 'graph.jax_export'}: refused")
    finally:
        for path in inner.iterdir():
            path.unlink()
        inner.rmdir()


def _died(why: str) -> bool:
    return why.startswith(("crashes JAX", "takes too long", "cannot be checked"))


def _run(paths: list[Path]) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom backends.errors import ArtifactError\n"
        "from runtime.execution.package.executor import refusing\n"
        "from runtime.execution.package.xla import XlaExecutor\nfrom tests.fuzz.graphs import STEP, X\n"
        "runtime = XlaExecutor(trusted=True)\n"
        "for line in sys.stdin.read().splitlines():\n"
        "    try:\n"
        "        print(line, flush=True)\n"
        "        loaded = runtime.load(Path(line), STEP)\n"
        "        with refusing(line, 'xla'):\n"
        "            runtime.get(loaded.bind({})({'in0': runtime.put(X)})['out0'])\n"
        "    except ArtifactError as error:\n"
        "        assert '\\n' not in str(error), error\n"
    )
    root = Path(__file__).parents[2]
    child = subprocess.run(
        [sys.executable, "-c", code], input="".join(f"{path}\n" for path in paths), capture_output=True, text=True,
        timeout=600, cwd=root, env={**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}, check=False,
    )  # fmt: skip
    at = Path(child.stdout.splitlines()[-1]).read_bytes().hex() if child.stdout else ""
    ended = signal.Signals(-child.returncode).name if child.returncode < 0 else f"exit {child.returncode}"
    assert child.returncode == 0, f"{ended} of {at[:6000]} {child.stderr[-300:]}"
