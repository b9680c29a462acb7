"""Weights that whoever measures finds in the chip's cache, and a model's step in memory."""

from __future__ import annotations

from dataclasses import replace

import pytest

import hw_profiles
from runtime.pricing import Chip, PriceBook, open_book
from runtime.pricing.load import uniform


def books(name: str) -> tuple[PriceBook, PriceBook]:
    """As the profile has it, and with a cache that holds nothing."""
    chip = Chip.from_fields(name, hw_profiles.load(name).number)
    return open_book(chip), open_book(replace(chip, cache_bytes=1.0))


@pytest.mark.parametrize(
    ("chip_name", "n", "k", "share"),
    [
        ("h200-sxm", 2048, 2048, 1.0),  # 6 x 4.2 MB are less than 50
        ("h200-sxm", 8192, 4096, 0.0),  # 6 x 33.6 MB are more than 100: the benchmark read them from memory, too
        ("b200-sxm", 4096, 4096, 1.0),
        ("b200-sxm", 16384, 4096, 0.0),
    ],
)
def test_a_product_reads_its_weights_from_memory_once(chip_name: str, n: int, k: int, share: float) -> None:
    cold, warm = books(chip_name)
    more = cold.gemm(1, n, k, "fp8-block").seconds - warm.gemm(1, n, k, "fp8-block").seconds
    assert more == pytest.approx(share * n * k / cold.chip.memory_bandwidth_bytes_per_s, rel=0.01, abs=1e-12)


@pytest.mark.parametrize("chip_name", ["h200-sxm", "b200-sxm"])
def test_experts_are_cold_as_long_as_a_batch_touches_few(chip_name: str) -> None:
    cold, warm = books(chip_name)
    load = uniform(256)
    curves = [book.moe_curve(7168, 2048, 8, load, moe_tp=8) for book in (cold, warm)]
    one, many = ([curve.seconds(tokens) for curve in curves] for tokens in (1, 512))
    touched = 8 * 3 * 7168 * 256  # bytes of one token's experts
    assert one[0] - one[1] == pytest.approx(touched / cold.chip.memory_bandwidth_bytes_per_s, rel=0.05)
    assert many[0] == many[1]
    seconds = [curves[0].seconds(tokens) for tokens in range(1, 600)]
    assert seconds == sorted(seconds)
