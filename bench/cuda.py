"""The `cuda` backend against the `cpu` backend: parity, then the time of a step. Run by bench/cuda.sh.

Parity: the embedded checkpoint in float32 (full-precision products on both sides), prefill and greedy
decoding past `index_topk`, logits and tokens compared; then bfloat16 and FP8 weights against float32.
Timing: a ~1.2 B-parameter random model of this architecture in bfloat16 and with FP8 weights, medians of
decode steps and of a prefill chunk, as bytes/s against a measured device copy in the same run. Then the rows of
`bench/cuda_shapes.py`, and transformers' beside them (`bench/cuda_peers.py`). Each part stands alone: one that fails
says why and leaves the others, and `--only` runs some of them, where a command may not take long.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

from backends import registry
from backends.cpu import CpuBackend
from backends.interface import Backend, Capabilities
from bench import cuda_shapes
from bench.cuda_sizes import DRY, Sizes
from foundation.errors import Failure, first_line
from foundation.reading import read_json
from model.checkpoint import Checkpoint
from model.checkpoint_writer import save
from model.hf_config import from_hf
from model.weights import parameter_counts
from runtime.execution.local.engine import EngineConfig
from runtime.execution.local.load import embedded_checkpoint, load_engine
from runtime.execution.local.request import Prompt

_PEERS = "transformers, glm-4.7-flash bf16"
_PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin")


def parity(cuda: Backend, cpu: Backend, sizes: Sizes) -> dict[str, Any]:
    """Largest logit differences between the backends, and whether greedy tokens agree."""
    opened = Checkpoint(embedded_checkpoint())
    prompt = tuple(int(t) for t in np.random.default_rng(1).integers(1, opened.config.vocab_size, sizes.parity[0]))
    request = Prompt(prompt, max_tokens=sizes.parity[1], keep_logits=True)
    figures: dict[str, Any] = {}
    with jax.default_matmul_precision("highest"):
        reference = load_engine(opened, cpu, dtype="float32").generate([request])[0]
        for name, drafts in (("float32", 0), ("float32_mtp3", 3)):
            config = EngineConfig(drafts=drafts, pool_tokens=4096)
            done = load_engine(opened, cuda, config, "float32", pool_tokens=4096).generate([request])[0]
            figures[name] = _compare(reference, done)
    done = load_engine(opened, cuda, dtype="bfloat16", pool_tokens=4096).generate([request])[0]
    figures["bfloat16"] = _compare(reference, done)
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder) / "fp8", opened.raw_config, opened.load(), fp8=True)
        quantised = Checkpoint(Path(folder) / "fp8")
        exact = load_engine(quantised, cpu, dtype="float32").generate([request])[0]
        if cuda.capabilities().fp8_weights:
            kept = load_engine(quantised, cuda, dtype="bfloat16", keep_fp8=True, pool_tokens=4096)
            figures["fp8_weights"] = _compare(exact, kept.generate([request])[0])
    return figures


def _compare(reference: Any, done: Any) -> dict[str, Any]:
    rows = len(reference.prompt_ids)
    difference = np.abs(reference.logits[:rows] - done.logits[:rows])
    agreed = reference.logits[:rows].argmax(-1) == done.logits[:rows].argmax(-1)
    return {
        "largest_logit_difference": float(difference.max()),
        "median_logit_difference": float(np.median(difference)),
        "top1_agreement": float(agreed.mean()),
        "same_greedy_tokens": reference.token_ids == done.token_ids,
    }


def copy_bandwidth_bytes_per_s(backend: Backend, sizes: Sizes) -> float:
    """Bytes read and written by an elementwise kernel over 2 GiB."""
    x = backend.zeros((sizes.copy_elements,), "float32")
    add = jax.jit(lambda x: x + 1.0)
    return 2 * x.nbytes / cuda_shapes.median_s(lambda: add(x), sizes.repeats)


def timing(cuda: Backend, fp8: bool, sizes: Sizes) -> dict[str, Any]:
    """Medians of a decode step by batch, and of a chunk of a prompt."""
    cfg = from_hf(dict(sizes.large))
    weights = cuda_shapes.random_weights(cfg, fp8)
    steps = {f"batch{batch}_tokens1_context{sizes.context}": (batch, 1, sizes.context) for batch in sizes.batches}
    steps[f"batch1_tokens{sizes.chunk}_context0"] = (1, sizes.chunk, 0)
    times = cuda_shapes.step_ms(cuda, cfg, weights, steps, sizes)
    figures: dict[str, Any] = {
        "weight_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(weights)),
        "parameters": sum(parameter_counts(cfg)["total"].values()),
    }
    for name, (batch, tokens, _) in steps.items():
        figures[name] = {"step_s": times[name] / 1e3, "tokens_per_s": 1e3 * batch * tokens / times[name]}
    return figures


def peers(dry: bool) -> dict[str, Any]:
    """What transformers takes on the same card, by a process that is over before JAX takes the card's memory."""
    if not dry and importlib.util.find_spec("torch") is None:
        return {"error": "torch is not installed"}
    command = [sys.executable, "-m", "bench.cuda_peers", *(["--dry"] if dry else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Failure(next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "it ended"))
    return json.loads(done.stdout.splitlines()[-1])


class Dry(CpuBackend):
    """The CPU in place of the card, apart from the host as a card is."""

    def capabilities(self) -> Capabilities:
        return dataclasses.replace(super().capabilities(), apart=True)


def parts_of(cuda: Backend, plain: Backend, sizes: Sizes) -> dict[str, Callable[[], Any]]:
    """What is measured, by name, in the order in which memory and time allow it."""
    found: dict[str, Callable[[], Any]] = {
        "parity": lambda: parity(cuda, registry.get("cpu"), sizes),
        "timing_bfloat16": lambda: timing(cuda, False, sizes),
    }
    if not cuda.capabilities().fp8_weights:
        return found
    found["timing_fp8_weights"] = lambda: timing(cuda, True, sizes)
    bandwidth = functools.cache(lambda: copy_bandwidth_bytes_per_s(cuda, sizes))
    found["op_ms"] = lambda: cuda_shapes.ops(cuda, plain, sizes)
    for name, fp8 in (("fp8", True), ("bf16", False)):
        found[f"layer_ms {name}"] = lambda fp8=fp8: cuda_shapes.layers(cuda, fp8, sizes)
        found[f"layer_ms {name} decompositions"] = lambda fp8=fp8: cuda_shapes.layers(plain, fp8, sizes)
        found[f"glm-4.7-flash {name}"] = lambda fp8=fp8: cuda_shapes.whole(cuda, fp8, bandwidth(), sizes)
    return found


def measure(parts: Mapping[str, Callable[[], Any]], found: dict[str, Any], keep: Callable[[], None]) -> list[str]:
    """Runs each part into `found` and keeps what there is after each; the names of those that failed, whose entry says
    why: what one part asks too much of, the others need not pay for."""
    failed = []
    for name, run in parts.items():
        began = time.monotonic()
        try:
            found[name] = run()
        except Exception as error:
            failed.append(name)
            found[name] = {"error": first_line(error)[:300]}
        print(f"{name}: {'failed' if name in failed else 'done'}, {time.monotonic() - began:.0f} s", file=sys.stderr)
        keep()
    return failed


def without_time(ops: Mapping[str, Any]) -> list[str]:
    """Of `op_ms`, the ops that the backend under test did not run: their entry says why in the place of a time."""
    return [name for name, row in ops.items() if isinstance(row, dict) and isinstance(row.get("kernel"), str)]


def about(cuda: Backend, sizes: Sizes) -> dict[str, Any]:
    """The device, and with which versions it is measured."""
    devices = cuda.capabilities().devices
    packages = [name for name in ("jax", "jaxlib", *_PLUGINS) if importlib.util.find_spec(name.replace("-", "_"))]
    return {
        "device": devices[0].kind,
        "devices_here": len(devices),
        "memory_bytes": devices[0].memory_bytes,
        **{name: metadata.version(name) for name in packages},
        "date": datetime.date.today().isoformat(),
        "copy_bandwidth_bytes_per_s": copy_bandwidth_bytes_per_s(cuda, sizes),
        "layer_ms to reach": cuda_shapes.to_reach(devices[0].kind),
    }


def results_file(where: Path, found: Mapping[str, Any]) -> Path:
    """A file, or in a folder the name that results have there: device and date."""
    if not where.is_dir():
        return where
    kind = re.sub(r"[^a-z0-9]+", "-", str(found["device"]).lower().removeprefix("nvidia")).strip("-")
    return where / f"{kind}_{found['date']}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here, after each part; a folder: DEVICE_DATE.json")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help="parts whose names begin so; what the "
                        "file of --json has of others on the same device stays")  # fmt: skip
    parser.add_argument("--dry", action="store_true", help="all parts at tiny shapes on the CPU, to see that they run")
    options = parser.parse_args()
    cuda: Backend = Dry() if options.dry else registry.get("cuda")
    sizes = DRY if options.dry else Sizes()
    if options.dry:  # before JAX has started: what is compiled is all that this takes
        quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {quick}".strip()

    def wanted(name: str) -> bool:
        return not options.only or name.startswith(tuple(options.only))

    beside: dict[str, Any] = {}
    failed = []
    if wanted(_PEERS) and (options.dry or shutil.which("nvidia-smi") or Path("/dev/nvidiactl").exists()):
        failed = measure({_PEERS: lambda: peers(options.dry)}, beside, lambda: None)
    if reason := cuda.unavailable():
        print(f"cuda cannot be used here: {reason}", file=sys.stderr)
        sys.exit(2)
    with jax.default_device(jax.devices(cuda.capabilities().platform)[0]):
        plain = Dry() if options.dry else cuda_shapes.Decompositions()
        parts = {n: run for n, run in parts_of(cuda, plain, sizes).items() if wanted(n)}
        if not parts and not beside:
            known = ", ".join([*parts_of(cuda, plain, sizes), _PEERS])
            print(f"--only {' '.join(options.only)}: no such part; known: {known}", file=sys.stderr)
            sys.exit(2)
        found = about(cuda, sizes)
        file = None if options.json is None else results_file(options.json, found)
        if options.only and file is not None and file.exists():
            before = read_json(file)
            found = {**before, **found} if before.get("device") == found["device"] else found
        found |= beside

        def keep() -> None:
            if file is not None:
                file.write_text(json.dumps(found, indent=2) + "\n")

        keep()
        failed += measure(parts, found, keep)
    print(json.dumps(found, indent=2))
    exact = found["parity"].get("float32") if "parity" in parts else None
    if exact and (exact["largest_logit_difference"] > 2e-3 or not exact["same_greedy_tokens"]):
        failed.append("PARITY in float32")
    if "op_ms" in parts:
        failed += without_time(found["op_ms"])
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
