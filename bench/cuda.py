"""The `cuda` backend against the `cpu` backend: parity, then the time of a step. Run by bench/cuda.sh.

Parity: the embedded checkpoint in float32 (full-precision products on both sides), prefill and greedy
decoding past `index_topk`, logits and tokens compared; then bfloat16 and FP8 weights against float32.
Timing: a ~1.2 B-parameter random model of this architecture in bfloat16 and with FP8 weights, medians of
decode steps and of a prefill chunk, as bytes/s against a measured device copy in the same run. Then the rows of
`bench/cuda_shapes.py`, and transformers' beside them (`bench/cuda_peers.py`).
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
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
from model.checkpoint import Checkpoint
from model.checkpoint_writer import save
from model.hf_config import from_hf
from model.weights import parameter_counts
from runtime.execution.local.engine import EngineConfig
from runtime.execution.local.load import embedded_checkpoint, load_engine
from runtime.execution.local.request import Prompt


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
    command = [sys.executable, "-m", "bench.cuda_peers", *(["--dry"] if dry else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"error": next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "it ended")}
    return json.loads(done.stdout.splitlines()[-1])


class Dry(CpuBackend):
    """The CPU in place of the card, apart from the host as a card is."""

    def capabilities(self) -> Capabilities:
        return dataclasses.replace(super().capabilities(), apart=True)


def report(cuda: Backend, plain: Backend, sizes: Sizes) -> dict[str, Any]:
    """All figures, JSON-ready."""
    device = cuda.capabilities().devices[0]
    bandwidth = copy_bandwidth_bytes_per_s(cuda, sizes)
    found: dict[str, Any] = {
        "device": device.kind,
        "memory_bytes": device.memory_bytes,
        "jax": jax.__version__,
        "jaxlib": metadata.version("jaxlib"),
        "date": datetime.date.today().isoformat(),
        "copy_bandwidth_bytes_per_s": bandwidth,
        "parity": parity(cuda, registry.get("cpu"), sizes),
        "timing_bfloat16": timing(cuda, False, sizes),
    }
    if cuda.capabilities().fp8_weights:
        found["timing_fp8_weights"] = timing(cuda, True, sizes)
        found |= cuda_shapes.report(cuda, plain, bandwidth, sizes)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--dry", action="store_true", help="all parts at tiny shapes on the CPU, to see that they run")
    options = parser.parse_args()
    cuda: Backend = Dry() if options.dry else registry.get("cuda")
    sizes, beside = DRY if options.dry else Sizes(), {}
    if options.dry:  # before JAX has started: what is compiled is all that this takes
        quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {quick}".strip()
    if not options.dry and importlib.util.find_spec("torch") is None:
        beside = {"error": "torch is not installed"}
    elif options.dry or shutil.which("nvidia-smi"):
        beside = peers(options.dry)
    if reason := cuda.unavailable():
        print(f"cuda cannot be used here: {reason}", file=sys.stderr)
        sys.exit(2)
    with jax.default_device(jax.devices(cuda.capabilities().platform)[0]):
        found = report(cuda, Dry() if options.dry else cuda_shapes.Decompositions(), sizes)
    found["transformers, glm-4.7-flash bf16"] = beside
    print(json.dumps(found, indent=2))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    exact = found["parity"]["float32"]
    if exact["largest_logit_difference"] > 2e-3 or not exact["same_greedy_tokens"]:
        print("PARITY FAILED in float32", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
