"""Weights that whoever measures finds in the chip's cache, and a model's step in memory; and the other way round."""

from __future__ import annotations

from dataclasses import replace

import pytest

import hw_profiles
from runtime.pricing import Chip, PriceBook, open_book
from runtime.pricing.chip import kept_share
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


def calibrated(weight_bytes: float) -> PriceBook:
    """A machine that was measured from memory, whose cache holds 16 MB, with a step's weights."""
    flat = ((1e4, 0.5), (1e8, 0.5))
    chip = Chip("host", {"fp32": 1e15, "bf16": 1e15}, 2e10, kernel_launch_s=1e-6, vector_launch_s=1e-6,
                compute_curve=((1.0, 1.0),), memory_curve=flat, cache_bytes=16e6,
                cache_bandwidth_bytes_per_s=6e10)  # fmt: skip
    return open_book(chip.keeping(float(kept_share(chip.cache_bytes, weight_bytes))), wide="f32")


def test_a_step_whose_weights_stay_in_the_cache_reads_them_there() -> None:
    moved = 4.0 * (256 * 256 + 2 * 256)
    times = [calibrated(size).gemm(1, 256, 256, "f32").seconds - 1e-6 for size in (4e6, 16e6, 24e6, 32e6, 1e12)]
    assert times[0] == times[1] == pytest.approx(moved / 6e10, rel=1e-6)
    assert times[2] == pytest.approx(moved / 6e10 / 3 + moved / 1e10 * 2 / 3, rel=1e-6)
    assert times[3] == times[4] == pytest.approx(moved / 1e10, rel=1e-6)
    assert calibrated(4e6).gemm(1, 256, 256, "f32").seconds < calibrated(4e6).gemm(1, 256, 512, "f32").seconds


def test_a_cache_that_is_no_faster_changes_nothing() -> None:
    chip = Chip("host", {"fp32": 1e15, "bf16": 1e15}, 2e10, compute_curve=((1.0, 1.0),), memory_curve=((1.0, 0.9),),
                cache_bytes=16e6, cache_bandwidth_bytes_per_s=1e10)  # fmt: skip
    assert chip.keeping(1.0).memory_curve == chip.memory_curve
