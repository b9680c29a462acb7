"""Exports of the embedded checkpoint: how long, how large, and how fast the packages decode beside the CPU backend.

    python -m bench.export [--rounds N] [--steps N] [--formats onnx,stablehlo,torch] [--json FILE]

Every format is exported (both phases; weights written) and timed once. Then packages and the CPU backend decode the
same tokens at the same context, a few steps each in turn, and the medians over all steps are compared. Steps include
the logits' way to the host. Last, the graphs of GLM-5 at tp 8 without weights.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from backends import registry
from model.checkpoint import Checkpoint
from model.graph import Batch, Mode
from model.hf_config import load_config
from model.split import Layout
from runtime.deployment.manifest import Manifest
from runtime.execution.local.engine import EngineConfig
from runtime.execution.local.load import embedded_checkpoint, load_engine
from runtime.execution.package.executor import executor_of
from runtime.execution.package.generate import Package
from runtime.execution.package.runner import StepBatch as PackageBatch
from runtime.porting.export import options as cutting
from runtime.porting.export import package
from runtime.porting.export.job import ExportJob

PAGE, CONTEXT, START = 64, 512, 256


def export(folder: Path, fmt: str, batch: int, model: str | None = None) -> tuple[Manifest, float]:
    """A package of the embedded checkpoint, or of a preset's decode graphs at tp 8; and the seconds it took."""
    begin = time.perf_counter()
    opened = None if model else Checkpoint(embedded_checkpoint())
    cfg = opened.config if opened else load_config(str(model))
    placed = cutting.from_layout(cfg, Layout(tp=8 if model else 1))
    phases = ("decode",) if model else ("prefill", "decode")
    context = str(4096 if model else CONTEXT)
    request = ExportJob(
        cfg=cfg,
        checkpoint=opened,
        format=fmt,  # type: ignore[arg-type]
        gears={phase: cutting.gears(cfg, phase, str(batch), "128", context, PAGE) for phase in phases},  # type: ignore[misc]
        grid=placed.grid,
        layout=placed.name,
        scheme="bf16" if model else "f32",
        page_size=PAGE,
        weights=model is None,
    )
    return package.export(request, folder), time.perf_counter() - begin


def backend_step(batch: int) -> Callable[[int], np.ndarray]:
    """A decode step of the CPU backend at a position: its logits."""
    config = EngineConfig(page_size=PAGE, pool_tokens=batch * CONTEXT, max_running=batch)
    programs = load_engine(Checkpoint(embedded_checkpoint()), registry.usable("cpu"), config).programs
    return lambda position: programs.step(Batch(*inputs(batch, position)), Mode())[0]


def package_step(folder: Path, fmt: str, linked: bool = True) -> Callable[[int], np.ndarray]:
    """The same of a package, through its layer types' graphs: linked in memory where the runtime can, or one by one."""
    opened = Package(folder, str(executor_of(fmt)), linked)
    (program,) = opened.manifest.program("decode")
    runner, batch = opened.runner, program.gear.sequences

    def step(position: int) -> np.ndarray:
        return runner.executor.get(runner.step(program, [PackageBatch(*inputs(batch, position))])[0]["logits"])

    return step


def inputs(batch: int, position: int) -> tuple[np.ndarray, ...]:
    pages = CONTEXT // PAGE
    one = np.ones(batch, np.int32)
    table = np.arange(1, 1 + batch * pages, dtype=np.int32).reshape(batch, pages)
    return (one * (position % 97))[:, None], one * position, one, table


def race(steps: dict[str, Callable[[int], np.ndarray]], rounds: int, count: int) -> dict[str, list[float]]:
    """Seconds of each decode step, sides taking turns; all must agree on the logits."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    position = START
    for step in steps.values():  # untimed: everything is compiled and warm
        for warm in range(4):
            step(START - 4 + warm)
    for number in range(rounds):
        results = {}
        for name in sorted(steps, key=lambda name: (number + hash(name)) % len(steps)):
            for i in range(count):
                begin = time.perf_counter()
                results[name] = step_logits = steps[name](position + i)
                taken[name].append(time.perf_counter() - begin)
                assert np.isfinite(step_logits).all()
        first = next(iter(results.values()))
        assert all(np.allclose(first, other, atol=1e-3) for other in results.values()), "the sides disagree"
        position = START + (position + count - START) % (CONTEXT - START - count)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--formats", default="onnx,stablehlo,torch")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    formats = options.formats.split(",")
    names = ("jax", "jaxlib", "onnx", "onnxruntime", "torch")
    result: dict[str, Any] = {
        "versions": {name: metadata.version(name) for name in names},
        "machine": platform.processor(), "exports": {}, "decode": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        for batch in (1, 4):
            steps = {"cpu backend": backend_step(batch)}
            for fmt in formats:
                folder = Path(temporary) / f"{fmt}-{batch}"
                manifest, seconds = export(folder, fmt, batch)
                if batch == 1:
                    result["exports"][f"embedded, {fmt}"] = _size(manifest, seconds)
                steps[fmt] = package_step(folder, fmt)
                if fmt == "onnx":
                    steps["onnx unlinked"] = package_step(folder, fmt, linked=False)
            taken = race(steps, options.rounds, options.steps)
            base = statistics.median(taken["cpu backend"])
            result["decode"][str(batch)] = {
                name: {"median_ms": 1e3 * statistics.median(each), "p10_ms": 1e3 * float(np.quantile(each, 0.1)),
                       "times_cpu_backend": statistics.median(each) / base}
                for name, each in taken.items()
            }  # fmt: skip
        for fmt in (fmt for fmt in formats if fmt != "torch"):
            manifest, seconds = export(Path(temporary) / f"full-{fmt}", fmt, 1, "glm-5")
            result["exports"][f"GLM-5 tp 8, {fmt}"] = _size(manifest, seconds)
    _print(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2))


def _size(manifest: Manifest, seconds: float) -> dict[str, float]:
    graphs = [step for p in manifest.programs for chain in p.units.values() for step in chain if step.kind == "graph"]
    size = sum(file.bytes for name, file in manifest.files.items() if "-c" in name)
    return {"seconds": seconds, "graphs": len(graphs), "graph_bytes": size}


def _print(result: dict[str, Any]) -> None:
    print(f"{'export':24} {'s':>6} {'graphs':>7} {'graph MB':>9}")
    for name, row in result["exports"].items():
        print(f"{name:24} {row['seconds']:6.1f} {row['graphs']:7} {row['graph_bytes'] / 1e6:9.2f}")
    for batch, sides in result["decode"].items():
        print(f"\ndecode, {batch} sequences, context {CONTEXT}: ms a step")
        for name, row in sides.items():
            print(
                f"{name:14} median {row['median_ms']:7.3f}  p10 {row['p10_ms']:7.3f}  {row['times_cpu_backend']:5.2f} x"
            )


if __name__ == "__main__":
    main()
