"""The `cuda` backend against the `cpu` backend: parity, then the time of a step. Run by bench/cuda.sh.

Parity: the embedded checkpoint in float32 (full-precision products on both sides), prefill and greedy
decoding past `index_topk`, logits and tokens compared; then bfloat16 and FP8 weights against float32.
Timing: a ~1.2 B-parameter random model of this architecture in bfloat16 and with FP8 weights, medians of
decode steps and of a prefill chunk, as bytes/s against a measured device copy in the same run. Then the rows of
`bench/cuda_shapes.py`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from backends import registry
from backends.interface import Backend
from bench import cuda_shapes
from model.checkpoint import Checkpoint
from model.checkpoint_writer import save
from model.config import ModelConfig
from model.graph import Batch, Mode
from model.hf_config import from_hf
from model.weights import Quantized, Weight, layer_weights, outer_weights, parameter_counts
from runtime.execution.local.engine import EngineConfig
from runtime.execution.local.load import embedded_checkpoint, load_engine
from runtime.execution.local.programs import Programs
from runtime.execution.local.request import Prompt

LARGE: dict[str, Any] = {
    "model_type": "glm_moe_dsa", "vocab_size": 32768, "hidden_size": 2048, "intermediate_size": 8192,
    "moe_intermediate_size": 512, "num_hidden_layers": 8, "num_attention_heads": 16, "num_key_value_heads": 16,
    "n_shared_experts": 1, "n_routed_experts": 64, "num_experts_per_tok": 8, "max_position_embeddings": 16384,
    "q_lora_rank": 1024, "kv_lora_rank": 512, "qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "v_head_dim": 256,
    "index_topk": 2048, "index_head_dim": 128, "index_n_heads": 32, "first_k_dense_replace": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}  # fmt: skip


def random_weights(cfg: ModelConfig, backend: Backend, fp8: bool) -> tuple[dict[str, Any], int]:
    """Random weights on the device, and their bytes."""
    rng = np.random.default_rng(0)
    size = 0

    def put(array: np.ndarray) -> Any:
        nonlocal size
        size += array.nbytes
        return backend.put(array)

    def make(weight: Weight) -> Any:
        if fp8 and weight.stays_narrow:
            values = rng.integers(0x30, 0x3F, weight.shape, np.uint8).view(ml_dtypes.float8_e4m3fn)
            scale = np.full(weight.scale_shape, 0.01, np.float32)
            return Quantized(put(values), put(scale))
        array = rng.standard_normal(weight.shape, np.float32) * (0.02 if len(weight.shape) > 1 else 0.1)
        array += 1.0 if "norm" in weight.name else 0.0
        return put(array if weight.float32 else array.astype(ml_dtypes.bfloat16))

    weights = {
        "outer": {w.name: make(w) for w in outer_weights(cfg)},
        "layers": [{w.name: make(w) for w in layer_weights(cfg, kind)} for kind in cfg.layers],
        "mtp": [],
    }
    return weights, size


def parity(cuda: Backend, cpu: Backend) -> dict[str, Any]:
    """Largest logit differences between the backends, and whether greedy tokens agree."""
    opened = Checkpoint(embedded_checkpoint())
    prompt = tuple(int(t) for t in np.random.default_rng(1).integers(1, opened.config.vocab_size, 150))
    request = Prompt(prompt, max_tokens=32, keep_logits=True)
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


def copy_bandwidth_bytes_per_s(backend: Backend) -> float:
    """Bytes read and written by an elementwise kernel over 2 GiB."""
    x = backend.zeros((512 * 1024 * 1024,), "float32")
    add = jax.jit(lambda x: x + 1.0)
    add(x).block_until_ready()
    times = []
    for _ in range(20):
        begin = time.perf_counter()
        add(x).block_until_ready()
        times.append(time.perf_counter() - begin)
    return 2 * x.nbytes / statistics.median(times)


def timing(cuda: Backend, fp8: bool, steps: int = 30) -> dict[str, Any]:
    """Medians of a decode step by batch (context 4096) and of a 2048-token prefill chunk."""
    cfg = from_hf(LARGE)
    weights, size = random_weights(cfg, cuda, fp8)
    pages = 64 * 4352 // 64
    programs = Programs(cuda, cfg, weights, pages, 64, "bfloat16")
    figures: dict[str, Any] = {"weight_bytes": size, "parameters": sum(parameter_counts(cfg)["total"].values())}
    for batch, tokens, start in ((1, 1, 4096), (8, 1, 4096), (64, 1, 4096), (1, 2048, 0)):
        per = 4352 // 64
        table = np.arange(1, 1 + batch * per, dtype=np.int32).reshape(batch, per)
        if tokens > 1:
            table = table[:, : tokens // 64]
        ones = np.ones(batch, np.int32)
        ids = np.random.default_rng(0).integers(1, cfg.vocab_size, (batch, tokens)).astype(np.int32)
        step = Batch(ids, ones * start, ones * tokens, table)
        mode = Mode("expanded" if tokens > 1 else "absorbed")
        times = []
        for index in range(steps + 3):
            begin = time.perf_counter()
            logits, _ = programs.step(step, mode)
            if index >= 3:
                times.append(time.perf_counter() - begin)
            assert np.isfinite(logits).all()
        seconds = statistics.median(times)
        figures[f"batch{batch}_tokens{tokens}_context{start}"] = {
            "step_s": seconds,
            "tokens_per_s": batch * tokens / seconds,
        }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    cuda, cpu = registry.get("cuda"), registry.get("cpu")
    if reason := cuda.unavailable():
        print(f"cuda cannot be used here: {reason}", file=sys.stderr)
        sys.exit(2)
    device = cuda.capabilities().devices[0]
    report: dict[str, Any] = {
        "device": device.kind,
        "memory_bytes": device.memory_bytes,
        "jax": jax.__version__,
        "jaxlib": metadata.version("jaxlib"),
        "date": datetime.date.today().isoformat(),
        "copy_bandwidth_bytes_per_s": copy_bandwidth_bytes_per_s(cuda),
        "parity": parity(cuda, cpu),
        "timing_bfloat16": timing(cuda, fp8=False),
    }
    if cuda.capabilities().fp8_weights:
        report["timing_fp8_weights"] = timing(cuda, fp8=True)
        with jax.default_device(jax.devices("cuda")[0]):
            report |= cuda_shapes.report(cuda, report["copy_bandwidth_bytes_per_s"])
    print(json.dumps(report, indent=2))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    exact = report["parity"]["float32"]
    if exact["largest_logit_difference"] > 2e-3 or not exact["same_greedy_tokens"]:
        print("PARITY FAILED in float32", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
