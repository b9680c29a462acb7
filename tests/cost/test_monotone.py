"""What physics says of a whole step: more bandwidth, faster links and fewer tokens never make it slower.

At one graph mode and one kernel: figures of a chip change, what its engine runs does not.
"""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
import pytest

import hw_profiles
from model.hf_config import load_config
from model.split import Layout
from runtime.pricing.pricer import GraphPricer
from runtime.serving.pricing import BatchShape
from runtime.simulation.build import PriceTables, pricer_of, spec_for

UP, OUT = "link.scale_up", "link.scale_out"
FASTER = {
    "chip.memory.bandwidth_bytes_per_s": 1.7,
    f"{UP}.bandwidth_bytes_per_s": 3.0,
    f"{OUT}.bandwidth_bytes_per_s": 3.0,
    f"{UP}.latency_s": 0.2,
    f"{OUT}.latency_s": 0.2,
    f"{OUT}.collective_latency_s": 0.3,
    "overhead.collective_launch_s": 0.3,
    "chip.peak.bf16_flops_per_s": 1.9,
}
"""By how much each figure changes for the better; links without a figure of their own get a poor one to begin with."""
POOR = {f"{UP}.latency_s": 5e-6, f"{OUT}.latency_s": 2e-5, f"{OUT}.collective_latency_s": 1.5e-4}
LAYOUTS = {
    "tp8": Layout(8), "tp16": Layout(16), "tp8-dp2-ep16": Layout(8, 2, ep=16), "tp8-pp2": Layout(8, pp=2),
    "tp1-dp8-ep8": Layout(1, 8, ep=8),
}  # fmt: skip
CHIPS = {
    "h200-sxm": "sglang", "b200-sxm": "vllm", "a100-sxm-80gb": "vllm", "gb200-nvl72": "trtllm",
    "h20-141gb": "sglang", "ascend-910b2": "vllm-ascend",
}  # fmt: skip
SHAPES = [
    BatchShape(np.full(rows, context), 1, decode_rows=rows, graphed=True)
    for rows, context in ((1, 1), (1, 4096), (7, 900), (64, 20_000), (300, 3000))
] + [BatchShape(prefill_chunks=[(tokens, 2048)]) for tokens in (1, 100, 8192)]
SHAPES += [BatchShape(np.full(rows, 4000), 1, [(1000, 500)], rows) for rows in (1, 64)]  # answers beside a prompt
CASES = list(itertools.product(CHIPS, LAYOUTS))[::2]  # every chip, every layout


@cache
def pricer(chip: str, layout: str, better: str = "") -> GraphPricer:
    scheme = {"ascend-910b2": "w8a8", "a100-sxm-80gb": "bf16"}.get(chip, "fp8")
    figures: dict[str, float] = {}
    for field, poor in POOR.items():
        given = hw_profiles.load(chip).number(field)
        figures[field] = given or poor
    if better:
        before = figures.get(better) or hw_profiles.load(chip).number(better)
        if before is None:
            pytest.skip(f"{chip} has no {better}")
        figures[better] = before * FASTER[better]
    cfg, profile = load_config("deepseek-v3" if layout == "tp16" else "glm-4.5-air"), hw_profiles.load(chip, figures)
    spec = spec_for(cfg, profile, LAYOUTS[layout], scheme, None, CHIPS[chip], pool_tokens=10**6)
    return pricer_of(spec, PriceTables(coarse=True))


@pytest.mark.parametrize(
    ("number", "case"), list(enumerate(CASES)), ids=lambda v: "-".join(v) if isinstance(v, tuple) else ""
)
def test_a_better_figure_never_makes_a_step_slower(number: int, case: tuple[str, str]) -> None:
    """Each chip and layout takes two of the figures in turn."""
    plain = pricer(*case)
    fields = list(FASTER)
    for field in {fields[number % len(fields)], fields[(3 * number + 2) % len(fields)]}:
        better = pricer(*case, field)
        for shape in SHAPES:
            assert better.seconds(shape) <= plain.seconds(shape) * (1 + 1e-9), (field, shape)


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_fewer_tokens_never_make_a_step_slower(case: tuple[str, str]) -> None:
    plain = pricer(*case)
    for tokens in (*range(1, 20), *range(60, 2000, 197), 8191):
        assert plain.seconds(BatchShape(prefill_chunks=[(tokens, 0)])) <= plain.seconds(
            BatchShape(prefill_chunks=[(tokens + 1, 0)])
        ) * (1 + 1e-9)
        beside = [BatchShape(np.full(64, keys), 1, [(500, 0)], 64) for keys in (tokens, tokens + 1)]
        assert plain.seconds(beside[0]) <= plain.seconds(beside[1]) * (1 + 1e-9)
        assert plain._layers.seconds(tokens) <= plain._layers.seconds(tokens + 1) * (1 + 1e-9)
