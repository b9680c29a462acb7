"""`glm5 serve` as clients outside of it see it.

    python -m bench.served pace --profile h200-sxm --devices 8 [--time-scale 4]
    python -m bench.served overhead [--backend sim | cpu]
    python -m bench.served predicted
    python -m bench.served load [--seconds 600] [--backend cpu | sim]

pace       an emulated endpoint with made-up tokens against `glm5 simulate` of the same plan under the same load
overhead   CPU that the server adds to a token, over the scheduler driven directly
predicted  this host calibrated for the checkpoint, `glm5 simulate` with that profile against `glm5 serve --backend cpu`
load       many streams whose clients die, read slowly or say nothing, and what the server still holds afterwards

Rounds alternate, medians and ranges are printed; times are those of the chips (the clients', divided by --time-scale).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench import crowd, inside, outside
from bench.outside import Ask, Seen, glm5, in_closed_loop, served, shown

SYNTHETIC_IDS = (300, 900)  # of the embedded tokenizer, none of them apart


@dataclasses.dataclass
class Sides:
    """Milliseconds of one figure, a round each."""

    told: list[float]
    seen: list[float]

    def row(self, name: str) -> str:
        ratios = [seen / told for seen, told in zip(self.seen, self.told, strict=True)]
        return f"| {name} | {shown(self.told)} | {shown(self.seen)} | {shown(ratios, '.3f')} |"


HEAD = "| | simulated ms | served ms | served / simulated |\n|---|---|---|---|"


def figures(seen: Sequence[Seen], time_scale: float) -> dict[str, float]:
    """Milliseconds, by name."""
    ttft, tpot = ([1e3 * getattr(each, name) / time_scale for each in seen] for name in ("ttft_s", "tpot_s"))
    return {
        "TTFT, mean": statistics.mean(ttft), "TTFT, median": statistics.median(ttft),
        "TPOT, mean": statistics.mean(tpot), "TPOT, median": statistics.median(tpot),
    }  # fmt: skip


def told(result: dict[str, Any]) -> dict[str, float]:
    """The same of what `glm5 simulate --json` prints."""
    return {
        "TTFT, mean": result["ttft_ms"]["mean"], "TTFT, median": result["ttft_ms"]["p50"],
        "TPOT, mean": result["tpot_ms"]["mean"], "TPOT, median": result["tpot_ms"]["p50"],
    }  # fmt: skip


def noted(found: dict[str, Sides], simulated: dict[str, float], seen: dict[str, float]) -> None:
    """Adds a round."""
    for name in seen:
        sides = found.setdefault(name, Sides([], []))
        sides.told.append(simulated[name])
        sides.seen.append(seen[name])
    print(", ".join(f"{name} {simulated[name]:.1f} / {seen[name]:.1f}" for name in seen), flush=True)


def pace(options: argparse.Namespace) -> None:
    from runtime.deployment.plan import Plan
    from runtime.planning.predict import workload

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        glm5(
            "plan", "--model", options.model, "--profile", options.profile, "--devices", options.devices,
            "--isl", options.isl, "--osl", options.osl, "--concurrency", options.concurrency, "--out", path,
        )  # fmt: skip
        plan = Plan.read(path)
        found: dict[str, Sides] = {}
        given = ("--backend", "sim", "--plan", path, "--tokens", "synthetic", "--time-scale", options.time_scale)
        with served(*given) as server:
            # the first of everything takes longer
            in_closed_loop(server, outside.repeated(Ask(64, 4), 8), 8, 0, SYNTHETIC_IDS)
            for seed in range(options.rounds):
                asked = ("simulate", "--plan", path, "--requests", options.requests, "--seed", seed, "--json")
                simulated = told(json.loads(glm5(*asked)))
                requests = workload(plan.demand, 1, seed, options.requests)[0].requests
                asks = [Ask(each.prompt_tokens, each.output_tokens) for each in requests]
                before = server.timed("time_to_first_token")
                answers = in_closed_loop(server, asks, options.concurrency, seed, SYNTHETIC_IDS)
                after = server.timed("time_to_first_token")
                seen = figures(answers, options.time_scale)
                own = (after[0] - before[0]) / (after[1] - before[1])
                seen["TTFT, mean, of /metrics"] = 1e3 * own / options.time_scale
                simulated["TTFT, mean, of /metrics"] = simulated["TTFT, mean"]
                noted(found, simulated, seen)
                late = 1e3 * server.gauge("glm5_most_late_seconds")
                burst = sorted(each.sent_s for each in answers)[: options.concurrency]
                print(f"the first were sent within {1e3 * (burst[-1] - burst[0]):.0f} ms", flush=True)
                print(f"round {seed}: late by {late:.0f} ms at most so far", flush=True)
        print(f"{options.profile} x {options.devices}, {options.concurrency} in flight, {options.requests} requests")
        print(HEAD, *(sides.row(name) for name, sides in found.items()), sep="\n")
        print(f"behind the clock by {server.late_ms:.1f} ms at most, --time-scale {options.time_scale:g}")


def overhead(options: argparse.Namespace) -> None:
    """The same jobs, alternately over HTTP and without."""
    asks = outside.repeated(Ask(64, options.osl), options.streams)
    tokens = options.streams * options.osl
    over, alone = [], []
    with served(*_backend(options)) as server:
        in_closed_loop(server, asks, options.streams, 0, SYNTHETIC_IDS)
        for seed in range(options.rounds):
            before = server.cpu_s
            in_closed_loop(server, asks, options.streams, seed, SYNTHETIC_IDS)
            over.append(1e3 * (server.cpu_s - before) / tokens)
    alone = _alone(options)
    added = statistics.median(over) - statistics.median(alone)
    print("| CPU ms a token | |\n|---|---|")
    print(f"| over HTTP | {shown(over, '.3f')} |\n| the scheduler alone | {shown(alone, '.3f')} |")
    print(f"| added | {added:.3f} |\n\n{options.streams} streams of {options.osl} tokens, {options.backend}")


def _backend(options: argparse.Namespace) -> list[object]:
    if options.backend == "cpu":
        return ["--backend", "cpu", "--warm-up", min(64, options.streams)]
    given = ["--profile", "h200-sxm", "--devices", 8, "--model", "glm-5-fp8", "--time-scale", options.time_scale]
    return ["--backend", "sim", "--tokens", "synthetic", *given]


def _alone(options: argparse.Namespace) -> list[float]:
    """CPU milliseconds a token of the service that such a server has, driven from this process."""
    import time

    from runtime.api.backing import Backing
    from runtime.execution.cluster.options import SimOptions

    if options.backend == "cpu":
        backing = Backing("cpu", warm=options.streams)
    else:
        sim = SimOptions(profile="h200-sxm", devices=8)
        backing = Backing("sim", sim=sim, model="glm-5-fp8", tokens="synthetic", time_scale=options.time_scale)
    asks, spent = outside.repeated(Ask(64, options.osl), options.streams), []
    with inside.service(backing) as service:
        for number in range(options.rounds + 1):
            before = time.process_time()
            inside.in_closed_loop(service, asks, options.streams, SYNTHETIC_IDS)
            if number:  # the first compiles
                spent.append(1e3 * (time.process_time() - before) / (options.streams * options.osl))
    return spent


def predicted(options: argparse.Namespace) -> None:
    """A round each: all loads served before the host is measured and after, then simulated."""
    from model.checkpoint import Checkpoint
    from runtime.execution.local.load import embedded_checkpoint

    checkpoint = options.checkpoint or embedded_checkpoint()
    vocab = Checkpoint(checkpoint).config.vocab_size
    ids = (min(300, vocab // 4), vocab - 100)
    loads: list[tuple[str, float]] = [("concurrency", count) for count in map(int, options.concurrency.split(","))]
    loads += [("rate", options.rate)]
    found: dict[str, dict[str, Sides]] = {}
    most = max(int(count) for kind, count in loads if kind == "concurrency")
    given = ("--backend", "cpu", "--checkpoint", checkpoint, "--warm-up", 2 * most, "--dtype", "float32")
    counts = [int(max(16, 6 * value)) if kind == "concurrency" else options.requests for kind, value in loads]

    quick = ["--quick"] if options.quick else []
    times = np.cumsum(np.random.default_rng(0).exponential(1 / options.rate, options.requests)).tolist()

    def answered(server: outside.Server) -> list[dict[str, float]]:
        found = []
        for (kind, value), count in zip(loads, counts, strict=True):
            asks = outside.repeated(Ask(options.isl, options.osl), count)
            if kind == "concurrency":
                answers = in_closed_loop(server, asks, int(value), 0, ids)
            else:
                answers = outside.in_open_loop(server, asks, times, ids)
            found.append(figures(answers, 1.0))
        return found

    with tempfile.TemporaryDirectory() as folder, served(*given) as server:
        trace = Path(folder) / "rate.jsonl"
        trace.write_text("".join(_traced(at, options, number) for number, at in enumerate(times)))
        answered(server)  # compiles what is left
        for seed in range(options.rounds):
            profile = Path(folder) / f"host{seed}.toml"
            before = answered(server)
            glm5("calibrate", "--backend", "cpu", "--model", checkpoint, "--out", profile, *quick)
            after = answered(server)
            for (kind, value), count, one, other in zip(loads, counts, before, after, strict=True):
                print(f"{kind} {value:g}: ", end="")
                load: list[object] = ["--trace-file", trace]
                if kind == "concurrency":
                    load = [
                        "--isl",
                        options.isl,
                        "--osl",
                        options.osl,
                        "--length-ratio",
                        1,
                        "--concurrency",
                        int(value),
                    ]
                    load += ["--requests", count]
                simulated = told(json.loads(_simulate(checkpoint, profile, *load)))
                seen = {name: (one[name] + other[name]) / 2 for name in one}
                noted(found.setdefault(f"{value:g}, {kind}", {}), simulated, seen)
    print(f"{checkpoint}: {options.isl} in, {options.osl} out; {options.rounds} rounds\n{HEAD}")
    for load_name, each in found.items():
        print(*(sides.row(f"{load_name}: {name}") for name, sides in each.items()), sep="\n")


def _traced(at_s: float, options: argparse.Namespace, number: int) -> str:
    """A request of a trace, which begins like no other."""
    blocks = range(1000 * number, 1000 * number + -(-options.isl // 512))
    asked = {"timestamp": 1e3 * at_s, "input_length": options.isl, "output_length": options.osl}
    return json.dumps({**asked, "hash_ids": list(blocks)}) + "\n"


def _simulate(checkpoint: Path, profile: Path, *load: object) -> str:
    return glm5(
        "simulate", "--model", checkpoint, "--profile", profile, "--devices", 1, "--engine", "glm5", "--formats", "f32",
        *load, "--json",
    )  # fmt: skip


def load(options: argparse.Namespace) -> None:
    """A crowd for so long, then a second count of what the server holds."""
    with served(*_backend(options), "--max-queue", 1000) as server:
        in_closed_loop(server, outside.repeated(Ask(32, 8), 2 * options.streams), options.streams, 0, SYNTHETIC_IDS)
        before = crowd.settled(server)
        ended = crowd.crowd(server, options.seconds, options.streams, SYNTHETIC_IDS)
        after = crowd.settled(server)
        print("| held | before | after |\n|---|---|---|")
        print(*(f"| {name} | {before[name]:g} | {after[name]:g} |" for name in before), sep="\n")
        print(f"{sum(ended.values())} requests: " + ", ".join(f"{n} {how}" for how, n in ended.most_common()))
        answered = in_closed_loop(server, outside.repeated(Ask(32, 8), 32), 8, 1, SYNTHETIC_IDS)
        print(f"{len(answered)} of 32 more were answered")
        stopped = threading.Timer(10, server.process.terminate)
        stopped.start()
        ended = crowd.crowd(server, 15, options.streams, SYNTHETIC_IDS, (crowd.reads,))
        print("SIGTERM in the middle: " + ", ".join(f"{n} {how}" for how, n in ended.most_common()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_subparsers(dest="mode", required=True)

    def mode(call: Any, **values: Any) -> argparse.ArgumentParser:
        made = modes.add_parser(call.__name__)
        made.set_defaults(call=call)
        for name, value in values.items():
            kind = str if value is None else type(value)
            if kind is bool:
                made.add_argument(f"--{name}", action="store_true")
            else:
                made.add_argument(f"--{name.replace('_', '-')}", type=kind, default=value)
        return made

    mode(
        pace, model="glm-5-fp8", profile="h200-sxm", devices=8, isl=1024, osl=128, concurrency=64, requests=192,
        rounds=3, time_scale=1.0,
    )  # fmt: skip
    mode(overhead, backend="sim", streams=32, osl=256, rounds=5, time_scale=1.0)
    mode(predicted, isl=128, osl=64, concurrency="1,4,8", rate=2.0, requests=24, rounds=5, quick=False, checkpoint=None)
    mode(load, backend="cpu", streams=200, seconds=600.0, time_scale=1.0)
    options = parser.parse_args()
    options.call(options)


if __name__ == "__main__":
    main()
