"""This host, calibrated, then predicted against measured on the real engine: the checkpoint of bench/decode.py.

    python -m bench.cpu_host [--rounds N] [--own-shapes] [--json FILE]

Each round measures three steps, calibrates (`glm5 calibrate`, for the checkpoint's own shapes with --own-shapes),
predicts the steps from the profile as `glm5 simulate` does, and measures them again; a shared host changes speed from
minute to minute, so medians over the rounds are compared, and the spread of both sides is printed. Both sides run in
float32.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import hw_profiles
from backends import registry
from backends.loaded import StepMade
from bench.decode import DECODE_STEPS, PROMPT, Ours, make_checkpoint
from model.checkpoint import Checkpoint
from model.config import ModelConfig
from model.split import Layout
from runtime.execution.local.engine import EngineConfig
from runtime.execution.local.load import load_engine
from runtime.execution.local.request import Prompt
from runtime.porting.calibrate import prices, profile
from runtime.porting.calibrate_calls import ModelRank
from runtime.porting.calibrate_sizes import Effort
from runtime.porting.calibrate_steps import measure_with_steps
from runtime.serving.pricing import BatchShape
from runtime.simulation.build import build, spec_for

REPEATS = 9
CONTEXT = PROMPT + DECODE_STEPS // 2
STEPS = {
    "prefill of 256 tokens": BatchShape(prefill_chunks=[(PROMPT, 0)]),
    "decode step, batch 1": BatchShape(decode_contexts=np.full(1, CONTEXT), decode_rows=1, graphed=True),
    "decode step, batch 8": BatchShape(decode_contexts=np.full(8, CONTEXT), decode_rows=8, graphed=True),
}


def measured(one: Ours, eight: Ours, rng: np.random.Generator) -> dict[str, float]:
    """Seconds of each step, by the engine's programs: medians of a few, alternating."""
    rows = []
    for _ in range(REPEATS):
        ids = rng.integers(1, 8192, (8, PROMPT)).astype(np.int32)
        prefill = one.prefill(ids[:1])
        eight.prefill(ids)
        rows.append((prefill, one.decode(DECODE_STEPS), eight.decode(DECODE_STEPS)))
    return {name: statistics.median(column) for name, column in zip(STEPS, zip(*rows, strict=True), strict=True)}


def predicted(
    cfg: ModelConfig, folder: Path, effort: Effort, rank: ModelRank | None = None
) -> tuple[dict[str, float], dict[str, Any]]:
    """Seconds of each step from a fresh calibration, and what the time is made of."""
    backend = registry.usable("cpu")
    found = measure_with_steps(backend, effort, rank=rank)
    described = profile(found, backend, "host", "host.prices.json")
    (folder / "host.prices.json").write_text(json.dumps(prices(found, described)))
    (folder / "host.toml").write_text(hw_profiles.dumps(described))
    host, layout = hw_profiles.load(str(folder / "host.toml")), Layout()
    pricer = build(spec_for(cfg, host, layout, "f32", engine="glm5")).pricer
    priced = {name: pricer.price(shape) for name, shape in STEPS.items()}
    return {name: price.seconds for name, price in priced.items()}, {n: p.by_op for n, p in priced.items()}


def host_seconds(folder: Path, batch: int) -> float:
    """What the engine itself takes a step, its programs replaced by one that returns at once."""
    steps = 200
    engine = load_engine(Checkpoint(folder), registry.usable("cpu"), EngineConfig(pool_tokens=batch * 512))
    logits, ids = np.zeros((batch, engine.cfg.vocab_size), np.float32), np.zeros(batch, np.int32)
    engine.programs.launch = lambda *_: StepMade(logits, ids, None)  # type: ignore[method-assign]
    begin = time.perf_counter()
    engine.generate([Prompt((1,) * 16, max_tokens=steps) for _ in range(batch)])
    return (time.perf_counter() - begin) / engine.steps


def _attempt(call: Callable[[], float]) -> float:
    return statistics.median(call() for _ in range(3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--own-shapes", action="store_true", help="calibrate for the checkpoint")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_checkpoint(folder / "checkpoint")
        cfg = Checkpoint(folder / "checkpoint").config
        one, eight = Ours(folder / "checkpoint", 1), Ours(folder / "checkpoint", 8)
        rng = np.random.default_rng(0)
        measured(one, eight, rng)  # compiles
        host = {batch: _attempt(lambda batch=batch: host_seconds(folder / "checkpoint", batch)) for batch in (1, 8)}
        told, seen = [], []
        for number in range(options.rounds):
            before = measured(one, eight, rng)
            guess, parts = predicted(cfg, folder, Effort(), ModelRank(cfg) if options.own_shapes else None)
            after = measured(one, eight, rng)
            told.append(guess)
            seen.append({name: (before[name] + after[name]) / 2 for name in STEPS})
            pairs = ", ".join(f"{guess[n] * 1e3:.1f}/{seen[-1][n] * 1e3:.1f}" for n in STEPS)
            print(f"round {number + 1}: predicted/measured ms {pairs}")
    print(f"{'':24}{'predicted ms':>14}{'measured ms':>14}{'error':>8}   spread of each over the rounds")
    figures: dict[str, Any] = {"host_seconds_per_step": host}
    for name in STEPS:
        sides = [[row[name] for row in rows] for rows in (told, seen)]
        middle = [statistics.median(side) for side in sides]
        fastest = min(sides[0]) / min(sides[1]) - 1
        spread = [(max(side) - min(side)) / 2 / m for side, m in zip(sides, middle, strict=True)]
        error = middle[0] / middle[1] - 1
        print(
            f"{name:24}{middle[0] * 1e3:14.2f}{middle[1] * 1e3:14.2f}{error:+8.0%}"
            f"   predicted ±{spread[0]:.0%}, measured ±{spread[1]:.0%}; "
            f"fastest against fastest {fastest:+.0%}"
        )
        print("  " + ", ".join(f"{op} {s * 1e3:.2f}" for op, s in parts[name].items() if s > 0.02 * guess[name]))
        figures[name] = {"predicted_s": middle[0], "measured_s": middle[1], "error": error, "spread": spread,
                         "fastest_error": fastest}  # fmt: skip
    print(f"engine's own host time a step: {host[1] * 1e6:.0f} us at batch 1, {host[8] * 1e6:.0f} us at batch 8")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
