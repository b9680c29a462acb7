"""What must hold for any shape: more is never cheaper, and faster hardware never slower."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hw_profiles
from runtime.pricing import DEEPSEEK_V3, GLM5, Chip, MlaLayer, attention, load, open_book
from runtime.pricing.grid import Polyline, RatioGrid, Surface, rising
from runtime.pricing.work import least
from tests.cost.chips import CHIPS, UNMEASURED

BOOKS = {name: open_book(chip) for name, chip in {**CHIPS, "some-npu": UNMEASURED}.items()}
FORMATS = ["bf16", "fp8-block", "fp8-tensor", "w8a8-int8", "w4a8", "nvfp4"]
names = st.sampled_from(sorted(BOOKS))
tokens = st.integers(1, 100_000)


@given(names, tokens, tokens, st.sampled_from([32, 576, 2624, 19360]), st.sampled_from([128, 2048, 6144]),
       st.sampled_from(FORMATS))  # fmt: skip
def test_more_tokens_never_make_a_gemm_cheaper(name: str, a: int, b: int, n: int, k: int, fmt: str) -> None:
    low, high = sorted((a, b))
    assert BOOKS[name].gemm(low, n, k, fmt).seconds <= BOOKS[name].gemm(high, n, k, fmt).seconds


LOADS = [load.uniform(256), load.balanced(256), load.power_law(256, 1.2)]


@given(names, tokens, tokens, st.sampled_from(LOADS), st.sampled_from([(8, 1), (1, 8), (1, 1), (2, 4)]))
def test_more_tokens_never_make_experts_cheaper(name: str, a: int, b: int, spread, layout) -> None:
    low, high = sorted((a, b))
    tp, ep = layout
    prices = [BOOKS[name].moe(t, 6144, 2048, 8, spread, tp, ep).seconds for t in (low, high)]
    assert prices[0] <= prices[1]


@given(names, st.integers(1, 1024), st.integers(1, 1024), st.integers(1, 200_000), st.integers(1, 200_000),
       st.sampled_from(["index", "skip", "dense"]))  # fmt: skip
def test_more_sequences_or_context_never_make_a_block_cheaper(name, b1, b2, c1, c2, mode) -> None:
    book, layer = BOOKS[name], MlaLayer(GLM5, 8, mode, "fp8")
    table = attention.decode_block(book, layer)
    if table is None:
        return
    small, large = (min(b1, b2), min(c1, c2)), (max(b1, b2), max(c1, c2))
    assert table.seconds(*small) <= table.seconds(*large)


@given(names, st.floats(1, 1e10), st.floats(1, 1e10), st.sampled_from([2, 4, 8, 16, 64]),
       st.sampled_from(["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]))  # fmt: skip
def test_more_bytes_never_travel_faster(name, a, b, group, op) -> None:
    network = BOOKS[name].network
    low, high = (network.collective(op, x, group).seconds for x in sorted((a, b)))
    assert low <= high


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["h200-sxm", "some-npu"]), st.floats(1.0, 8.0), tokens, st.sampled_from(FORMATS))
def test_more_bandwidth_is_never_slower(name: str, factor: float, count: int, fmt: str) -> None:
    slow = BOOKS[name].chip
    fast = replace(slow, memory_bandwidth_bytes_per_s=slow.memory_bandwidth_bytes_per_s * factor)
    books = BOOKS[name], open_book(fast)
    gemm = [b.gemm(count, 2048, 6144, fmt).seconds for b in books]
    experts = [b.moe(count, 6144, 2048, 8, LOADS[0], 8, 1, fmt).seconds for b in books]
    block = [attention.decode(b, MlaLayer(GLM5, 8), min(count, 512), 8192).seconds for b in books]
    for before, after in (gemm, experts, block):
        assert after <= before * (1 + 1e-12)


@given(st.integers(1, 5000), st.sampled_from([1, 2, 8, 32]), st.sampled_from(LOADS))
def test_busiest_rank_is_possible(batch: int, ranks: int, spread) -> None:
    rows, active = spread.busiest_rank(np.array([float(batch)]), 8, ranks)
    assert 1 <= active[0] <= 256 / ranks + 1e-9
    assert active[0] <= rows[0] * (1 + 1e-9)
    assert rows[0] >= min(batch * 8 / ranks, batch) * 0.99 or rows[0] == 1.0


def test_skew_touches_fewer_experts_and_loads_one_rank_more() -> None:
    even, skewed = load.uniform(256), load.power_law(256, 1.2)
    batch = np.array([32.0])
    assert skewed.busiest_rank(batch, 8, 1)[1] < 0.6 * even.busiest_rank(batch, 8, 1)[1]
    assert skewed.busiest_rank(batch, 8, 8)[0] > 1.2 * even.busiest_rank(batch, 8, 8)[0]
    assert skewed.imbalance(8) > 1.2 and even.imbalance(8) == pytest.approx(1.0)


def least_deviation(values: list[float]) -> float:
    """The least sum of |ln fit - ln value| of any non-decreasing fit, by dynamic programming over the values."""
    logs, levels = np.log(values), np.sort(np.log(values))
    best = np.zeros(len(levels))
    for value in logs:
        best = np.minimum.accumulate(best) + np.abs(levels - value)
    return float(best.min())


@given(st.lists(st.floats(1e-6, 1e-2), min_size=1, max_size=12))
def test_a_risen_curve_is_the_nearest_one(values: list[float]) -> None:
    fit = rising(values)
    assert (np.diff(fit) >= 0).all()
    assert np.abs(np.log(fit / np.array(values))).sum() == pytest.approx(least_deviation(values), abs=1e-9)


@given(st.integers(2, 6), st.integers(2, 6), st.integers(0, 2**32 - 1))
def test_a_surface_of_any_table_never_falls(rows: int, columns: int, seed: int) -> None:
    table = np.exp(np.random.default_rng(seed).normal(size=(rows, columns)))
    r, c = np.arange(1.0, rows + 1), np.arange(1.0, columns + 1)
    filled = Surface(r, c, table).many(r[:, None], c[None, :])
    for axis in (0, 1):
        assert (np.diff(filled, axis=axis) >= -1e-12).all()


@pytest.mark.parametrize("at", [0, 3, 11, -1])
def test_an_outlier_stays_alone(at: int) -> None:
    """One measurement ten times too slow is read as its neighbours, and moves none of them."""
    seconds = 3e-6 + 1e-9 * np.arange(24.0) ** 2
    spoilt = seconds.copy()
    spoilt[at] *= 10
    curve = Polyline(np.arange(1.0, 25.0), spoilt)
    fit = curve.many(np.arange(1.0, 25.0))
    away = np.abs(fit / seconds - 1)
    assert (away[:-1] < 0.05).all() and (at == -1 or away[-1] < 0.05)


def test_ratio_grid_interpolates_and_holds_its_edges() -> None:
    grid = RatioGrid(("a", "b"), (np.log([1.0, 4.0]), np.log([1.0, 4.0])), np.array([[0.0, 1.0], [2.0, 3.0]]))
    assert grid({"a": 2.0, "b": 2.0}) == pytest.approx(1.5)
    assert grid({"a": 100.0, "b": 0.01}) == pytest.approx(2.0)


def test_curve_and_surface_scalar_and_vector_calls_agree() -> None:
    knots = np.array([1.0, 4.0, 16.0])
    curve = Polyline(knots, np.array([1.0, 2.0, 1.5]))
    sizes = np.array([0.5, 1.0, 3.0, 16.0, 99.0])
    assert curve.many(sizes) == pytest.approx([curve(x) for x in sizes])
    surface = Surface(knots, knots, np.arange(9.0).reshape(3, 3) + 1)
    assert surface.many(sizes, sizes[::-1]) == pytest.approx(
        [surface(r, c) for r, c in zip(sizes, sizes[::-1], strict=True)]
    )
    assert surface(32.0, 16.0) == pytest.approx(2 * surface(16.0, 16.0))


def _some(rng: np.random.Generator, count: int) -> dict[str, np.ndarray | float]:
    """Features of every family, from one of each to far more than any table or device holds."""
    dims = {"hidden": 6144.0, "q_lora": 2048.0, "kv_lora": 512.0, "rope": 64.0, "nope": 192.0, "v": 256.0, "qk": 256.0}
    index = {"index_heads": 32.0, "index_dim": 128.0, "index_topk": 2048.0, "selected": 2048.0, "index_kv_bytes": 132.0}
    most = {"m": 1e6, "n": 1e5, "k": 3e4, "heads": 128, "rows": 1e6, "active": 256, "inter": 4096, "touched": 1e6}
    most |= {"sequences": 8192, "tokens": 1e6, "context": 2e6, "rows_per_expert": 4096, "spread": 16, "bytes": 1e11}
    drawn = {name: np.exp(rng.uniform(0.0, np.log(high), count)) for name, high in most.items()}
    flags = {"absorbed": 1.0, "indexer": 1.0, "kv_bytes": 576.0, "weight_bytes": 1.0, "act_bytes": 1.0}
    return {**dims, **index, **drawn, **flags}


@pytest.mark.parametrize("name", sorted(BOOKS))
def test_no_kernel_is_faster_than_the_chip(name: str) -> None:
    """Any table, inside what was measured and far outside: products and bytes take what the data sheet allows them."""
    chip, features = BOOKS[name].chip, _some(np.random.default_rng(1), 100)
    peak = max(chip.peak_flops_per_s.values())
    for engine in ("sglang", "vllm", "trtllm"):
        book = open_book(chip, engine)
        for kernel in book._kernels.values():
            work = least(kernel.family, features)
            floor = np.maximum(work.flops / peak, work.bytes / chip.memory_bandwidth_bytes_per_s)
            assert (book.time(kernel, features, "fp8-block").seconds >= floor * (1 - 1e-9)).all(), kernel.key


def test_the_longest_contexts_of_large_batches_are_read_in_the_time_that_memory_takes() -> None:
    """256 sequences of 131,072 tokens: TensorRT-LLM's table was priced at 13 times the bandwidth there."""
    for name, book in BOOKS.items():
        trt, layer = open_book(book.chip, "trtllm"), attention.GqaLayer(16, 1)
        moved = 256 * 131_072 * 2 * 128 * 2.0
        seconds = attention.gqa(trt, "decode", layer, 256, 131_072).seconds
        assert seconds >= moved / book.chip.memory_bandwidth_bytes_per_s * (1 - 1e-9), name


@given(st.sampled_from(["h200-sxm", "b200-sxm", "some-npu"]), st.integers(64, 8192), st.integers(8192, 100_000))
def test_cached_tokens_of_a_dense_prompt_are_expanded_again(name: str, new: int, before: int) -> None:
    """A chunk after cached tokens takes what its keys take, and at least their up-projection besides."""
    book, layer = BOOKS[name], MlaLayer(DEEPSEEK_V3, 16, "dense")
    whole = attention.prefill(book, layer, new, before, host_launched=False).seconds
    keys = before + new / 2
    block = attention.prefill_block(book, layer, host_launched=False)
    alone = block.seconds(new, keys) if block else attention.mla_prefill(book, layer, new, keys).seconds
    up = book.gemm(before, 16 * (DEEPSEEK_V3.nope + DEEPSEEK_V3.v), DEEPSEEK_V3.kv_lora, "fp8-block").seconds
    assert whole >= alone + up


@pytest.mark.parametrize(("less", "more"), [("h800-sxm", "h100-sxm"), ("h20-141gb", "h200-sxm")])
def test_a_chip_with_less_of_everything_is_not_faster_than_the_measured_one(less: str, more: str) -> None:
    """Tables of the architecture are taken for chips that were not measured; sums of bare kernels had H800 come out a
    half faster than H200 in decode."""
    books = []
    for name in (less, more):
        profile = hw_profiles.load(name)
        chip = Chip.from_fields(name, profile.number)
        books.append(open_book(chip, "sglang", family=profile.family))
    assert not books[0].measured and books[1].measured
    layer, gqa = MlaLayer(GLM5, 8), attention.GqaLayer(12, 1)
    for tokens in (1, 16, 128, 4096):
        slow, fast = (
            [
                book.gemm(tokens, 2624, 6144, "fp8-block"),
                book.moe(tokens, 6144, 2048, 8, LOADS[0], 8, 1, "fp8-block"),
                attention.decode(book, layer, min(tokens, 256), 8192),
                attention.gqa(book, "decode", gqa, min(tokens, 256), 8192),
                attention.prefill(book, layer, tokens, host_launched=False),
            ]
            for book in books
        )
        assert all(a.seconds >= b.seconds * 0.93 for a, b in zip(slow, fast, strict=True)), tokens
        assert {price.evidence for price in slow} <= {"transferred", "assumed"}


@settings(max_examples=6, deadline=None)
@given(st.floats(1.0, 3.0), st.floats(0.7, 1.0), st.integers(1, 40_000), st.sampled_from(LOADS))
def test_faster_memory_helps_whatever_clock_products_keep(faster: float, clock: float, rows: int, spread) -> None:
    """Only the products of a kernel go by the clock: none becomes slower as memory ceases to be what bounds it, and
    one that computes takes as much longer as its clock is lower, one that reads no longer."""
    plain = CHIPS["h200-sxm"]
    slow, kept = (replace(plain, sustained_clock_fraction=share) for share in (clock, 1.0))
    wide = replace(slow, memory_bandwidth_bytes_per_s=faster * plain.memory_bandwidth_bytes_per_s)
    ran = [open_book(chip).moe(rows, 7168, 2048, 8, spread, 8, 1).seconds for chip in (wide, slow, kept)]
    assert ran[0] <= ran[1] * (1 + 1e-9)
    assert ran[2] * (1 - 1e-9) <= ran[1] <= ran[2] / clock * (1 + 1e-9)
    many, few = (
        [open_book(chip).gemm(m, 7168, 16384, "fp8-block").seconds for chip in (slow, kept)] for m in (16384, 1)
    )
    assert many[0] == pytest.approx(many[1] / clock, rel=0.05) and few[0] == pytest.approx(few[1], rel=0.02)
