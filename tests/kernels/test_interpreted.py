"""Every kernel against the meaning of its op, through Triton's interpreter: no GPU is needed.

Truth is the meaning in float32, of matrices widened exactly. A kernel may be no further from it than the decomposition
in bfloat16 is. Run by `make test-cuda`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from backends.kernels import attention, products, selection
from backends.kernels.table import KERNELS
from model.narrow_rows import packed, unpacked
from model.ops import OPS
from tests.kernels import interpreter

pytestmark = pytest.mark.cuda
BF16 = ml_dtypes.bfloat16
HOPPER, AMPERE = (9, 0), (8, 0)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    interpreter.launches.clear()
    for module in (attention, products, selection):
        monkeypatch.setattr(module, "launch", interpreter.launch)


def normal(seed: int, *shape: int, scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(BF16)


def by_kernel(op: str, capability: tuple[int, int], *operands: Any, **attributes: Any) -> Any:
    operands = tuple(map(jnp.asarray, operands))
    assert KERNELS[op].why_not(*operands, **attributes) is None
    return KERNELS[op].lower(capability, *operands, **attributes)


def wide(value: np.ndarray) -> np.ndarray:
    return value.astype(np.float32) if value.dtype == BF16 else value


def error(found: Any, truth: Any) -> float:
    found, truth = np.asarray(found, np.float64), np.asarray(truth, np.float64)
    assert np.isfinite(found).all()
    return float(np.linalg.norm(found - truth) / np.linalg.norm(truth))


def no_further(found: Any, op: str, narrow: tuple[Any, ...], exact: tuple[Any, ...], **attributes: Any) -> None:
    meaning: Callable[..., Any] = OPS[op].meaning
    truth = meaning(*map(jnp.asarray, exact), **attributes)
    allowed = error(meaning(*map(jnp.asarray, narrow), **attributes), truth)
    assert error(found, truth) <= allowed * 1.02, f"{error(found, truth)} where the decomposition has {allowed}"


def fp8(seed: int, shape: tuple[int, ...], scale_shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random bits but no NaN, subnormal numbers among them; scales; and what they mean, widened by numpy."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 256, shape, np.uint8)
    bits[(bits & 0x7F) == 0x7F] = 1
    values = bits.view(ml_dtypes.float8_e4m3fn)
    scale = (rng.random(scale_shape) * 1e-3 + 1e-4).astype(np.float32)
    exact = values.astype(np.float32)
    full = scale
    for axis, (size, parts) in enumerate(zip(shape, scale_shape, strict=True)):
        if parts != size:
            full = np.take(np.repeat(full, 128, axis), range(size), axis)
    return values, scale, exact * full


@pytest.mark.parametrize("capability", [HOPPER, AMPERE])
@pytest.mark.parametrize(
    "rows, shape, scale_shape",
    [
        (1, (128, 64), (1, 1)),
        (3, (1152, 80), (9, 1)),  # several parts of the depth; a last block of columns
        (16, (176, 2, 96), (2, 2, 1)),  # a short block of depth; gate and up side by side
        (17, (128, 272), (1, 3)),
        (128, (256, 64), (2, 1)),
    ],
)
def test_linear(rows: int, shape: tuple[int, ...], scale_shape: tuple[int, ...], capability: tuple[int, int]) -> None:
    values, scale, exact = fp8(rows, shape, scale_shape)
    x = normal(rows, 1, rows, shape[0])
    found = by_kernel("glm.linear", capability, x, values, scale)
    no_further(found, "glm.linear", (x, values, scale), (wide(x), exact))


def test_every_e4m3_number_is_widened_exactly() -> None:
    """All 254 numbers, by the chip's conversion and by arithmetic, in products with a unit row."""
    bits = np.array([b for b in range(256) if b & 0x7F != 0x7F] + [0, 0], np.uint8)
    values = np.zeros((128, 256), np.uint8)
    values[5] = bits
    x = np.zeros((1, 1, 128), BF16)
    x[0, 0, 5] = 1
    narrow = values.view(ml_dtypes.float8_e4m3fn)
    for capability in (HOPPER, AMPERE):
        found = by_kernel("glm.linear", capability, x, narrow, np.ones((1, 2), np.float32))
        np.testing.assert_array_equal(np.asarray(found, np.float32)[0, 0], narrow[5].astype(np.float32))


@pytest.mark.parametrize("kept", ["fp8", "bf16"])
@pytest.mark.parametrize(
    "tokens, top_k, count, depth, width",
    [
        (1, 2, 5, 128, 96),  # a token: every choice a tile
        (3, 8, 32, 256, 176),  # a width that is no multiple of a block
        (40, 4, 24, 128, 64),  # sorted, tiles of 16
        (60, 4, 3, 128, 128),  # sorted, tiles of 64, several an expert
        (40, 6, 8, 400, 64),  # the same, the output in two parts of its columns, the second shorter
    ],
)
def test_expert_ffn(
    tokens: int, top_k: int, count: int, depth: int, width: int, kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ragged loads, an expert with most of the tokens, choices of another device's experts."""
    monkeypatch.setattr(products, "_LARGE_BYTES", 64e3)
    rng = np.random.default_rng(tokens)
    everywhere = count + 3
    ids = np.stack([rng.permutation(everywhere)[:top_k] for _ in range(tokens)]).astype(np.int32)
    ids[::2, 0] = 1 + 0 * ids[::2, 0]
    weights = rng.random((tokens, top_k)).astype(np.float32)
    x = normal(tokens, tokens, depth)
    blocks = (-(-depth // 128), -(-width // 128))
    up = fp8(1, (count, depth, 2, width), (count, blocks[0], 2, blocks[1]))
    down = fp8(2, (count, width, depth), (count, blocks[1], blocks[0]))
    if kept == "bf16":
        matrices: tuple[Any, ...] = (up[2].astype(BF16), down[2].astype(BF16))
        exact = tuple(map(wide, matrices))
    else:
        matrices, exact = (*up[:2], *down[:2]), (up[2], down[2])
    found = by_kernel("glm.expert_ffn", HOPPER, x, ids, weights, *matrices)
    assert not np.asarray(found)[(ids >= count).all(axis=1)].any()
    no_further(found, "glm.expert_ffn", (x, ids, weights, *matrices), (wide(x), ids, weights, *exact))


def test_nobodys_choices_leave_nothing() -> None:
    """All experts are another device's: zeros, and nothing of what the buffers held."""
    x, ids = normal(0, 2, 128), np.full((2, 2), 9, np.int32)
    matrices = (normal(1, 4, 128, 2, 32), normal(2, 4, 32, 128))
    assert not np.asarray(by_kernel("glm.expert_ffn", HOPPER, x, ids, np.ones((2, 2), np.float32), *matrices)).any()


def cached(seed: int, b: int, pages: int, page_size: int, *width: int) -> tuple[np.ndarray, np.ndarray]:
    """A cache whose nobody's page is poisoned, and a page table in shuffled order."""
    rows = normal(seed, 1 + b * pages, page_size, *width)
    rows[0] = np.nan
    table = np.random.default_rng(seed).permutation(np.arange(1, 1 + b * pages)).reshape(b, pages).astype(np.int32)
    return rows, table


@pytest.mark.parametrize("b, t, heads, count", [(2, 1, 8, 256), (1, 3, 5, 40), (1, 2, 20, 64), (1, 1, 128, 32)])
def test_sparse_attention(b: int, t: int, heads: int, count: int) -> None:
    """Several splits; selections of which a part lies beyond the query; odd head counts, several blocks of heads."""
    pages, table = cached(heads, b, 20, 16, 576)
    query = normal(heads + 1, b, t, heads, 576)
    rng = np.random.default_rng(heads)
    positions = rng.integers(count // 2, 320, (b, t)).astype(np.int32)
    selected = np.stack([rng.permutation(320)[:count] for _ in range(b * t)]).reshape(b, t, count).astype(np.int32)
    selected[0, 0, 0] = positions[0, 0]
    attributes = {"scale": 0.05, "value_dim": 512}
    found = by_kernel("glm.sparse_attention", HOPPER, query, pages, table, selected, positions, **attributes)
    rest = (table, selected, positions)
    no_further(found, "glm.sparse_attention", (query, pages, *rest), (wide(query), wide(pages), *rest), **attributes)


@pytest.mark.parametrize("b, t, heads, pages", [(2, 1, 8, 20), (1, 5, 20, 3), (1, 2, 3, 1)])
def test_latent_attention(b: int, t: int, heads: int, pages: int) -> None:
    cache, table = cached(heads, b, pages, 16, 576)
    query = normal(heads + 1, b, t, heads, 576)
    last = np.random.default_rng(pages).integers(t - 1, pages * 16, (b, 1))
    positions = (last - np.arange(t)[::-1]).astype(np.int32)
    attributes = {"scale": 0.05, "value_dim": 512}
    found = by_kernel("glm.latent_attention", HOPPER, query, cache, table, positions, **attributes)
    narrow = (query, cache, table, positions)
    no_further(found, "glm.latent_attention", narrow, tuple(map(wide, narrow)), **attributes)


@pytest.mark.parametrize(
    "b, t, heads, groups, pages", [(2, 1, 12, 1, 40), (1, 7, 24, 2, 5), (1, 1, 2, 2, 1), (2, 3, 96, 8, 3)]
)
def test_paged_attention(b: int, t: int, heads: int, groups: int, pages: int) -> None:
    keys, table = cached(heads, b, pages, 16, groups, 128)
    values, _ = cached(heads + 2, b, pages, 16, groups, 128)
    query = normal(heads + 1, b, t, heads, 128)
    last = np.random.default_rng(pages).integers(t - 1, pages * 16, (b, 1))
    positions = (last - np.arange(t)[::-1]).astype(np.int32)
    narrow = (query, keys, values, table, positions)
    found = by_kernel("glm.paged_attention", HOPPER, *narrow, scale=0.09)
    no_further(found, "glm.paged_attention", narrow, tuple(map(wide, narrow)), scale=0.09)


def records(rows: np.ndarray, plain: int) -> tuple[np.ndarray, np.ndarray]:
    """A cache as FP8 records whose nobody's page stays poisoned, and what they hold in float32."""
    made = np.array(packed(jnp.asarray(np.nan_to_num(rows)), plain))
    exact = np.array(unpacked(jnp.asarray(made), rows.shape[-1], plain, jnp.dtype("float32")))
    made[0], exact[0] = 0xFF, np.nan
    return made, exact


@pytest.mark.parametrize("capability", [HOPPER, AMPERE])
@pytest.mark.parametrize("b, t, heads, count", [(2, 1, 6, 160), (1, 3, 20, 40)])
def test_sparse_attention_over_records(b: int, t: int, heads: int, count: int, capability: Any) -> None:
    rows, table = cached(heads, b, 20, 16, 576)
    pages, exact = records(rows, 64)
    query = normal(heads + 1, b, t, heads, 576)
    rng = np.random.default_rng(count)
    positions = rng.integers(count // 2, 320, (b, t)).astype(np.int32)
    selected = np.stack([rng.permutation(320)[:count] for _ in range(b * t)]).reshape(b, t, count).astype(np.int32)
    selected[0, 0, 0] = positions[0, 0]
    attributes, rest = {"scale": 0.05, "value_dim": 512}, (table, selected, positions)
    found = by_kernel("glm.sparse_attention", capability, query, pages, *rest, **attributes)
    assert interpreter.launches[-2].startswith("sparse_attention_u8")
    no_further(found, "glm.sparse_attention", (query, pages, *rest), (wide(query), exact, *rest), **attributes)


@pytest.mark.parametrize("b, t, heads, pages", [(2, 1, 7, 18), (1, 5, 20, 3), (1, 2, 3, 1)])
def test_latent_attention_over_records(b: int, t: int, heads: int, pages: int) -> None:
    rows, table = cached(heads, b, pages, 16, 576)
    cache, exact = records(rows, 64)
    query = normal(heads + 1, b, t, heads, 576)
    last = np.random.default_rng(pages).integers(t - 1, pages * 16, (b, 1))
    positions = (last - np.arange(t)[::-1]).astype(np.int32)
    attributes = {"scale": 0.05, "value_dim": 512}
    found = by_kernel("glm.latent_attention", HOPPER, query, cache, table, positions, **attributes)
    assert interpreter.launches[-2].startswith("latent_attention_u8")
    exactly = (wide(query), exact, table, positions)
    no_further(found, "glm.latent_attention", (query, cache, table, positions), exactly, **attributes)


@pytest.mark.parametrize("b, t, heads, pages", [(2, 1, 32, 9), (1, 66, 5, 3), (1, 1, 33, 2)])
def test_index_scores_over_records(b: int, t: int, heads: int, pages: int) -> None:
    rows, table = cached(heads, b, pages, 16, 128)
    cache, exact = records(rows, 0)
    query, weights = normal(heads + 1, b, t, heads, 128), normal(heads + 2, b, t, heads)
    positions = np.random.default_rng(t).integers(0, pages * 16, (b, t)).astype(np.int32)
    found = np.asarray(by_kernel("glm.index_scores", HOPPER, query, weights, cache, table, positions))
    visible = np.arange(pages * 16) <= positions[:, :, None]
    np.testing.assert_array_equal(np.isneginf(found), ~visible)
    given = map(jnp.asarray, (wide(query), wide(weights), exact, table, positions))
    truth = np.asarray(OPS["glm.index_scores"].meaning(*given))
    np.testing.assert_allclose(found[visible], truth[visible], rtol=2e-5, atol=2e-5)


def test_expanded_attention_over_records() -> None:
    rows, table = cached(3, 1, 5, 16, 576)
    cache, exact = records(rows, 64)
    query = normal(4, 1, 70, 2, 192)
    ups = normal(2, 2, 128, 512, scale=0.05), normal(3, 2, 512, 128, scale=0.05)
    positions = np.arange(8, 78, dtype=np.int32)[None]
    narrow, exactly = (query, cache, table, *ups, positions), (wide(query), exact, table, *map(wide, ups), positions)
    found = by_kernel("glm.expanded_attention", HOPPER, *narrow, scale=0.08)
    no_further(found, "glm.expanded_attention", narrow, exactly, scale=0.08)


@pytest.mark.parametrize("nope, value", [(192, 256), (128, 128)])
@pytest.mark.parametrize("b, t, heads, pages", [(2, 5, 3, 5), (1, 70, 2, 12), (1, 150, 1, 10), (1, 129, 2, 40)])
def test_expanded_attention(b: int, t: int, heads: int, pages: int, nope: int, value: int) -> None:
    """Chunks at the start, and behind a context; a tile of one token; blocks that all see, and that none does."""
    cache, table = cached(heads, b, pages, 16, 576)
    query = normal(heads + 1, b, t, heads, nope + 64)
    k_up, v_up = normal(2, heads, nope, 512, scale=0.05), normal(3, heads, 512, value, scale=0.05)
    last = np.random.default_rng(pages).integers(t - 1, pages * 16, (b, 1))
    positions = (last - np.arange(t)[::-1]).astype(np.int32)
    narrow = (query, cache, table, k_up, v_up, positions)
    found = by_kernel("glm.expanded_attention", HOPPER, *narrow, scale=0.08)
    no_further(found, "glm.expanded_attention", narrow, tuple(map(wide, narrow)), scale=0.08)


@pytest.mark.parametrize("b, t, heads, pages", [(2, 1, 32, 9), (1, 70, 8, 3), (1, 2, 64, 1), (1, 1, 33, 2)])
def test_index_scores(b: int, t: int, heads: int, pages: int) -> None:
    cache, table = cached(heads, b, pages, 16, 128)
    query, weights = normal(heads + 1, b, t, heads, 128), normal(heads + 2, b, t, heads)
    positions = np.random.default_rng(t).integers(0, pages * 16, (b, t)).astype(np.int32)
    narrow = (query, weights, cache, table, positions)
    found = np.asarray(by_kernel("glm.index_scores", HOPPER, *narrow))
    visible = np.arange(pages * 16) <= positions[:, :, None]
    np.testing.assert_array_equal(np.isneginf(found), ~visible)
    truth = np.asarray(OPS["glm.index_scores"].meaning(*map(jnp.asarray, map(wide, narrow))))
    np.testing.assert_allclose(found[visible], truth[visible], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("context, k", [(1, 1), (40, 40), (300, 64), (2048, 2048), (2049, 7), (5000, 2048), (4096, 1)])
@pytest.mark.parametrize("kind", ["normal", "ties", "few visible", "signed zeros"])
def test_select_topk(context: int, k: int, kind: str) -> None:
    """The set of the meaning, in order of position."""
    rng = np.random.default_rng(context + k)
    scores = rng.standard_normal((1, 2, context)).astype(np.float32)
    if kind == "ties":
        scores = rng.integers(-2, 2, scores.shape).astype(np.float32) * np.float32(1e-40)
    elif kind == "few visible":
        scores[0, 0, k // 2 + 1 :] = -np.inf
    elif kind == "signed zeros":
        scores = np.where(scores > 0.5, 0.0, np.where(scores > 0, -0.0, scores)).astype(np.float32)
    found = np.asarray(by_kernel("glm.select_topk", HOPPER, scores, k=k))
    keys = scores.view(np.int32).astype(np.int64)
    keys = np.where(keys < 0, -(keys & 0x7FFFFFFF) - 1, keys)  # in order, -0 below 0
    expected = np.sort(np.argsort(-keys, axis=-1, kind="stable")[..., :k], axis=-1)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "experts, top_k, n_group, topk_group, normalise",
    [(256, 8, 1, 1, True), (384, 8, 1, 1, True), (256, 8, 8, 4, True), (64, 4, 1, 1, False), (32, 8, 4, 1, True)],
)
def test_route(experts: int, top_k: int, n_group: int, topk_group: int, normalise: bool) -> None:
    x, router = normal(1, 5, 48), normal(2, 48, experts, scale=0.2)
    bias = (np.random.default_rng(3).random(experts) * 0.1).astype(np.float32)
    router[:, 7] = router[:, 3]  # two experts that always tie
    bias[7] = bias[3] = 0.4
    attributes: dict[str, Any] = {
        "top_k": top_k, "n_group": n_group, "topk_group": topk_group, "normalise": normalise, "scale": 2.5,
    }  # fmt: skip
    chosen, weights = by_kernel("glm.route", HOPPER, x, router, bias, **attributes)
    expected, shares = OPS["glm.route"].meaning(*map(jnp.asarray, (x, router, bias)), **attributes)
    np.testing.assert_array_equal(np.asarray(chosen), np.asarray(expected))
    np.testing.assert_allclose(np.asarray(weights), np.asarray(shares), rtol=1e-5)
