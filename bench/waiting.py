"""What a person waits for: CPU seconds of commands, and of the calls that they are made of.

    python -m bench.waiting [--rounds N] [--only WORD] [--json]

Each figure is of a process of its own, in which BLAS has one thread; of a command, all of it from its
start, of a call, only the call. CPU seconds, so that other work on the machine counts less; where a process waits for
another they are wall-clock seconds, and the row says so. Medians, with the lowest and the highest.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
EMULATED = 'run --backend sim --profile ascend-910c --formats f32 --prompt "A mixture of experts" --max-tokens 8'
EXPORT = "export --phase decode --tp 8 --weights none --out OUT"
COMMANDS = (
    "--help",
    "model glm-5",
    "plan --devices 8",
    "plan --devices 384",
    f"{EMULATED} --devices 64",
    f"{EMULATED} --devices 384",
    f"{EXPORT} --model glm-5 --format onnx",
    f"{EXPORT} --model glm-5.2 --format onnx",
    f"{EXPORT} --model glm-5 --format stablehlo",
    f"{EXPORT} --model glm-5.2 --format stablehlo",
)


def measured(work: Callable[[], object], clock: Callable[[], float] = time.process_time) -> float:
    begin = clock()
    work()
    return clock() - begin


def trace() -> float:
    from model.hf_config import load_config
    from tests.model.test_trace import trace_model

    cfg = load_config("glm-5")
    return measured(lambda: trace_model(cfg))


def open_checkpoint() -> float:
    from model.checkpoint import Checkpoint
    from tests.model.test_checkpoint import hollow_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        hollow_checkpoint(Path(folder))
        return measured(lambda: Checkpoint(Path(folder)))


def write_page() -> float:
    import hw_profiles
    from model.hf_config import load_config
    from model.split import Layout
    from runtime.reports.plan import page
    from tests.plans import formats, plan_for

    cfg, chip = load_config("glm-5-fp8"), hw_profiles.load("ascend-910c-die")
    plan = plan_for(cfg, Layout(1, 128, 128), chip, formats("w8a8"), replicas=3, engine="vllm-ascend")
    return measured(lambda: page(plan, cfg))


def price_step() -> float:
    from tests.test_pricer import built, decode

    pricer, shapes = built().pricer, [decode(1 + i % 64, 1000 + 7 * i) for i in range(1000)]
    pricer.seconds(shapes[0])
    return measured(lambda: [pricer.seconds(shape) for shape in shapes]) / len(shapes)


def look_up() -> float:
    from runtime.pricing import GLM5, MlaLayer, attention, open_book
    from tests.cost.chips import CHIPS

    book, runs = open_book(CHIPS["h200-sxm"]), 5000
    curve, block = book.gemm_curve(2048, 6144, "fp8-block"), attention.decode_block(book, MlaLayer(GLM5, 8))
    assert block is not None

    def both() -> None:
        for i in range(runs):
            curve.seconds(1.0 + i % 64)
            block.seconds(1.0 + i % 64, 1000.0 + i)

    return measured(both) / runs / 2


def serve_thousand() -> float:
    from runtime.deployment.engines import load
    from runtime.serving import Deployment, Uniform, closed_loop, simulate
    from tests.serving.pricers import LinearPricer

    workload = closed_loop(64, 1000, Uniform(8192), Uniform(1024))
    return measured(lambda: simulate(workload, Deployment(load("sglang"), LinearPricer(), 900_000)))


def serve_step(requests: int) -> float:
    from runtime.deployment.engines import load
    from runtime.serving import Deployment, Uniform, closed_loop, simulate
    from tests.serving.pricers import LinearPricer

    def run(requests: int) -> int:
        workload = closed_loop(16, requests, Uniform(200), Uniform(40))
        return sum(simulate(workload, Deployment(load("vllm"), LinearPricer(), 900_000), exact=True).steps.values())

    run(100)  # untimed: everything is imported and warm
    steps: list[int] = []
    return measured(lambda: steps.append(run(requests))) / steps[0]


def notice_loss() -> float:
    """From the end of one of two processes in the middle of an answer to the end of the other."""
    from model.hf_config import from_hf
    from model.split import Layout
    from tests.cli.cli import CONFIG, make_checkpoint
    from tests.sim.test_processes import plan_at, start

    started: list[subprocess.Popen[str]] = []
    long = {"max_position_embeddings": 16384}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_checkpoint(folder / "long", **long)
        plan = plan_at(folder / "plan.json", Layout(tp=2, ep=2), cfg=from_hf({**CONFIG, **long}))
        ask = ("--checkpoint", folder / "long", "--max-tokens", 16000, "--ignore-eos", "--prompt-ids", "5,6,7")
        start(started, 2, plan, *ask, pipe_bytes=4096)
        first, second = started
        try:
            assert first.stdout and first.stdout.read(1)
            second.kill()
            return measured(first.communicate, time.monotonic)
        finally:
            for each in started:
                each.kill()
                each.communicate()


CALLS: dict[str, Callable[[], float]] = {
    "every layer type of GLM-5 traced, prefill and decode": trace,
    "a checkpoint of 8 GB opened": open_checkpoint,
    "the page of a plan for 384 devices": write_page,
    "the price of a decode step": price_step,
    "a look-up of a kernel's price": look_up,
    "1,000 requests of 8,192/1,024 simulated, 64 in flight": serve_thousand,
    "a step simulated, of 200 requests": lambda: serve_step(200),
    "a step simulated, of 4,000 requests": lambda: serve_step(4000),
    "one of two processes killed, until the other ends (wall clock)": notice_loss,
}


def of_command(line: str) -> float:
    """CPU seconds of `glm5 line`. OUT in it is a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        words = [str(Path(folder) / "out") if word == "OUT" else word for word in shlex.split(line)]
        command = [sys.executable, "-m", "runtime.cli.main", *words]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def of_call(name: str) -> float:
    """Seconds of one of `CALLS`, in a process of its own."""
    command = [sys.executable, "-m", "bench.waiting", "--call", name]
    return float(subprocess.run(command, env=ENVIRONMENT, check=True, stdout=subprocess.PIPE, text=True).stdout)


def shown(seconds: float) -> str:
    scale, unit = next(((s, u) for s, u in ((1, "s"), (1e3, "ms")) if seconds * s >= 1), (1e6, "µs"))
    return f"{seconds * scale:.3g} {unit}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="rows that contain this")
    parser.add_argument("--json", action="store_true", help="print seconds as JSON instead of a table")
    parser.add_argument("--call", choices=CALLS, metavar="ROW", help="one call, once, in this process: its seconds")
    options = parser.parse_args()
    if options.call:
        print(CALLS[options.call]())
        return
    rows: dict[str, Callable[[], float]] = {f"`glm5 {line}`": lambda line=line: of_command(line) for line in COMMANDS}
    rows |= {name: lambda name=name: of_call(name) for name in CALLS}
    if not options.json:
        print("| what | CPU, median | lowest to highest |\n|---|---|---|", flush=True)
    found: dict[str, list[float]] = {}
    for name, measure in rows.items():
        if options.only in name:
            taken = found[name] = [measure() for _ in range(options.rounds)]
            if not options.json:
                spread = f"{shown(min(taken))} to {shown(max(taken))}"
                print(f"| {name} | {shown(statistics.median(taken))} | {spread} |", flush=True)
    if options.json:
        print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
