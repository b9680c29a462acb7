"""Proves in a process of its own that `jax.export` files can be loaded: a damaged one can crash JAX.

`python -m runtime.execution.package.stablehlo_check` reads paths, a line each, and prints a line for each: "" where
JAX lowers it and it holds operations of StableHLO alone, else why not. It dies of what a file does to it.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

MOST_DATA_BYTES = 1 << 31
CPU_S, WALL_S = 20, 120  # for all files of a package; JAX itself takes less than two
_NOT_PURE = frozenset(f"stablehlo.{name}" for name in (
    "custom_call", "while", "infeed", "outfeed", "send", "recv", "all_gather", "all_reduce", "all_to_all",
    "reduce_scatter", "collective_broadcast", "collective_permute", "rng", "rng_bit_generator",
))  # fmt: skip
"""Code of the runtime by its name, loops, and what reaches outside a graph."""
_FUNC = ("func.func", "func.call", "func.return")


def refusals(paths: Sequence[Path]) -> dict[Path, str]:
    """Which of the files are not to be loaded, and why; the first alone where the check died of it."""
    folders = os.pathsep.join(os.path.abspath(folder) for folder in sys.path)
    child = subprocess.Popen(
        [sys.executable, "-m", __name__], text=True, errors="replace", stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": folders, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    asked = "".join(f"{path}\n" for path in paths)
    try:
        stdout, stderr = child.communicate(asked, timeout=WALL_S)
    except subprocess.TimeoutExpired:
        child.kill()
        stdout, stderr = child.communicate()
    said = stdout.split("\n")[:-1]
    found = {path: why for path, why in zip(paths, said, strict=False) if why}
    if len(said) < len(paths):
        found[paths[len(said)]] = _end(child.returncode, stderr)
    return found


def _end(code: int, stderr: str) -> str:
    if code == -signal.SIGXCPU or code == -signal.SIGKILL:
        return f"takes too long to read (more than {CPU_S} s)"
    if code < 0:
        return f"crashes JAX ({signal.Signals(-code).name})"
    lines = stderr.strip().splitlines()
    return f"cannot be checked ({lines[-1][:200] if lines else f'exit {code}'})"


def main() -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_DATA_BYTES, MOST_DATA_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S + 5))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin.read().split("\n")[:-1]:
        print(_why_not(Path(line)), flush=True)


def _why_not(path: Path) -> str:
    import jax
    from jax import export

    try:
        exported = export.deserialize(bytearray(path.read_bytes()))
        if (why := _impure(bytes(exported.mlir_module_serialized))) is not None:
            return why
        jax.jit(exported.call).lower(*[jax.ShapeDtypeStruct(a.shape, a.dtype) for a in exported.in_avals])
    except Exception as error:  # of flatbuffers, MLIR and JAX
        lines = str(error).strip().splitlines()
        return f"JAX refuses it: {lines[0][:200] if lines else type(error).__name__}"
    return ""


def _impure(serialized: bytes) -> str | None:
    """What a module holds beside pure operations of StableHLO, if anything."""
    from jax.extend.mlir import ir
    from jax.extend.mlir.dialects import sdy
    from jax.extend.mlir.dialects import stablehlo as dialect

    from runtime.execution.package.calls import why_not

    context = ir.Context()
    dialect.register_dialect(context)
    sdy.register_dialect(context)
    foreign: set[str] = set()
    sizes: dict[str, int] = {}
    calls: dict[str, Counter[str]] = {}
    for function in dialect.deserialize_portable_artifact(context, serialized).body.operations:
        name = ir.StringAttr(function.attributes["sym_name"]).value
        sizes[name], calls[name] = 0, Counter()

        def look(op: ir.Operation, name: str = name) -> ir.WalkResult:
            if not (op.name in _FUNC or op.name.startswith("stablehlo.")) or op.name in _NOT_PURE:
                foreign.add(op.name)
            sizes[name] += 1
            for called in ("callee", "decomposition"):
                if called in op.attributes:
                    calls[name][ir.FlatSymbolRefAttr(op.attributes[called]).value] += 1
            return ir.WalkResult.ADVANCE

        function.operation.walk(look)
    if foreign:
        return f"holds {min(foreign)[:80]}, which no export does"
    return why_not(sizes, calls)


if __name__ == "__main__":
    main()
