"""Decode and prefill of a ~150 M-parameter GLM-5-architecture checkpoint: this runtime against transformers.

    python -m bench.decode [--rounds N] [--json FILE]

The checkpoint is made and saved by transformers; both sides run it in float32 on the host CPU, in one
process, in alternating rounds, each after an untimed call; medians are compared. Bytes a step counts the
weights that a step must read (routed experts: those chosen) and sets them against this machine's measured
read bandwidth.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from transformers import DynamicCache, GlmMoeDsaConfig, GlmMoeDsaForCausalLM

from backends import registry
from model.checkpoint import Checkpoint
from model.config import ModelConfig
from model.graph import Batch, Mode
from model.weights import parameter_counts
from runtime.execution.local.engine import EngineConfig
from runtime.execution.local.load import load_engine

PROMPT, DECODE_STEPS = 256, 24


def make_checkpoint(folder: Path) -> None:
    """A random GLM-5-architecture checkpoint of about 150 M parameters, saved by transformers."""
    torch.manual_seed(0)
    config = GlmMoeDsaConfig(
        vocab_size=8192, hidden_size=384, num_hidden_layers=12, first_k_dense_replace=1, intermediate_size=1536,
        num_attention_heads=8, num_key_value_heads=8, q_lora_rank=192, kv_lora_rank=128, qk_nope_head_dim=48,
        qk_rope_head_dim=32, v_head_dim=64, n_routed_experts=32, num_experts_per_tok=4, moe_intermediate_size=320,
        n_shared_experts=1, index_n_heads=16, index_head_dim=64, index_topk=128, max_position_embeddings=2048,
        pad_token_id=0, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip
    GlmMoeDsaForCausalLM(config).save_pretrained(folder)


class Ours:
    """This runtime's programs, driven step by step on a fixed batch."""

    def __init__(self, folder: Path, batch: int):
        checkpoint = Checkpoint(folder)
        config = EngineConfig(page_size=(page := 16), pool_tokens=batch * 512, max_running=batch)
        engine = load_engine(checkpoint, registry.usable("cpu"), config)
        self.programs, self.batch = engine.programs, batch
        pages = 512 // page
        self.table = np.arange(1, 1 + batch * pages, dtype=np.int32).reshape(batch, pages)

    def prefill(self, ids: np.ndarray) -> float:
        full = np.full(self.batch, ids.shape[1], np.int32)
        begin = time.perf_counter()
        step = Batch(ids, np.zeros_like(full), full, self.table[:, : -(-ids.shape[1] // 16)])
        self.logits, _ = self.programs.step(step, Mode("expanded"))
        return time.perf_counter() - begin

    def decode(self, steps: int) -> float:
        one = np.ones(self.batch, np.int32)
        begin = time.perf_counter()
        for i in range(steps):
            token = self.logits.argmax(-1).astype(np.int32)[:, None]
            self.logits, _ = self.programs.step(Batch(token, one * (PROMPT + i), one, self.table), Mode())
        return (time.perf_counter() - begin) / steps


class Transformers:
    """The same steps through transformers, as its `generate` takes them."""

    def __init__(self, folder: Path, batch: int):
        self.model = GlmMoeDsaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def prefill(self, ids: np.ndarray) -> float:
        tokens = torch.from_numpy(ids.astype(np.int64))
        begin = time.perf_counter()
        self.cache = DynamicCache(config=self.model.config)
        self.out = self.model(tokens, past_key_values=self.cache, logits_to_keep=1)
        return time.perf_counter() - begin

    @torch.no_grad()
    def decode(self, steps: int) -> float:
        begin = time.perf_counter()
        for _ in range(steps):
            self.out = self.model(self.out.logits[:, -1:].argmax(-1), past_key_values=self.cache)
        return (time.perf_counter() - begin) / steps


def read_bandwidth_bytes_per_s() -> float:
    """Sum of a large array by as many threads as there are cores: the best of some rounds."""
    data = torch.ones(64 * 1024 * 1024, dtype=torch.float32)
    best = float("inf")
    for _ in range(7):
        begin = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - begin)
    return data.numel() * 4 / best


def step_bytes(cfg: ModelConfig, batch: int) -> float:
    """Expected float32 weight bytes a decode step reads: routed experts by the chance of being chosen."""
    active = dict(parameter_counts(cfg)["active"])
    moe = cfg.moe
    assert moe is not None
    experts = parameter_counts(cfg)["total"]["experts"] * (1 - (1 - moe.top_k / moe.experts) ** batch)
    active["experts"] = int(experts)
    return 4.0 * sum(active.values())


def measure(folder: Path, batch: int, rounds: int) -> dict[str, float]:
    """Medians, seconds: prefill of the batch's prompts and one decode step, for both sides."""
    ids = np.random.default_rng(0).integers(1, 8192, (batch, PROMPT)).astype(np.int32)
    sides = {"ours": Ours(folder, batch), "transformers": Transformers(folder, batch)}
    times: dict[str, list[float]] = {f"{side}_{phase}": [] for side in sides for phase in ("prefill", "decode")}
    logits = {}
    for side in sides.values():  # warm-up, and compilation
        side.prefill(ids)
        side.decode(2)
    for _ in range(rounds):
        for name, side in sides.items():
            # one untimed call each: the other side's threads have gone to sleep by then
            time.sleep(0.2)
            side.prefill(ids)
            times[f"{name}_prefill"].append(side.prefill(ids))
            logits[name] = side.logits if isinstance(side, Ours) else side.out.logits[:, -1].numpy()
            times[f"{name}_decode"].append(side.decode(DECODE_STEPS))
    error = float(np.abs(logits["ours"] - logits["transformers"]).max())
    assert error < 2e-4, f"the two sides disagree by {error}"
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "checkpoint"
        make_checkpoint(folder)
        cfg = Checkpoint(folder).config
        counts = parameter_counts(cfg)
        bandwidth = read_bandwidth_bytes_per_s()
        total, active = (sum(counts[k].values()) / 1e6 for k in ("total", "active"))
        print(f"{total:.0f} M parameters, {active:.0f} M active; jax {jax.__version__}, torch {torch.__version__}")
        print(f"read bandwidth {bandwidth / 1e9:.1f} GB/s, {platform.processor() or platform.machine()}")
        figures: dict[str, Any] = {"read_bandwidth_bytes_per_s": bandwidth}
        for batch in (1, 8):
            t = measure(folder, batch, options.rounds)
            rate = step_bytes(cfg, batch) / t["ours_decode"]
            for phase, tokens in (("prefill", batch * PROMPT), ("decode", batch)):
                ours, theirs = tokens / t[f"ours_{phase}"], tokens / t[f"transformers_{phase}"]
                print(
                    f"batch {batch} {phase:8}{ours:9.1f} tok/s, transformers{theirs:9.1f}, ratio {ours / theirs:5.2f}"
                    + (f", {rate / 1e9:.1f} GB/s, {rate / bandwidth:.0%} of bandwidth" if phase == "decode" else "")
                )
                figures[f"batch{batch}_{phase}"] = {"ours_tok_s": ours, "transformers_tok_s": theirs}
        if options.json:
            options.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
