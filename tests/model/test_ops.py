"""The op contract: each op's meaning against numpy, and how an op appears in traces and exports."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model import ops
from tests.model import reference

B, T, H, PAGE, WIDTH = 2, 3, 4, 4, 5  # sequences, query tokens, heads, page size, pages a sequence
CONTEXT = PAGE * WIDTH
PAGES = 1 + B * WIDTH
RNG = np.random.default_rng(0)


def normal(*shape: int, scale: float = 1.0, seed: int | None = None) -> np.ndarray:
    rng = RNG if seed is None else np.random.default_rng(seed)
    return rng.normal(0, scale, shape).astype(np.float32)


# A page table in shuffled order, and positions that see different amounts of context.
TABLE = np.random.default_rng(1).permutation(np.arange(1, PAGES)).reshape(B, WIDTH).astype(np.int32)
POSITIONS = np.array([[7, 8, 9], [17, 18, 19]], np.int32)


def paged(rows: np.ndarray) -> np.ndarray:
    """Context rows [b, c, ..] put into pages; what is in nobody's page is large."""
    pages = np.full((PAGES, PAGE, *rows.shape[2:]), 1e3, np.float32)
    for b in range(B):
        pages[TABLE[b]] = rows[b].reshape(WIDTH, PAGE, *rows.shape[2:])
    return pages


@functools.cache
def compiled(op: Any, attributes: tuple[tuple[str, Any], ...]) -> Any:
    return jax.jit(functools.partial(op, **dict(attributes)))


def run(op: Any, *operands: Any, **attributes: Any) -> Any:
    """An op's results as numpy arrays."""
    return jax.tree.map(np.asarray, compiled(op, tuple(sorted(attributes.items())))(*operands))


def dequantise(values: jax.Array, scale: jax.Array) -> jax.Array:
    return ops.dequantise(values, scale, jnp.float32)


def close(ours: Any, expected: Any) -> None:
    np.testing.assert_allclose(np.asarray(ours), expected, rtol=2e-5, atol=2e-5)


# --- elementwise and projections -----------------------------------------------------------------


def test_norms() -> None:
    x, weight, bias = normal(B, T, 24, scale=3.0), normal(24), normal(24)
    close(run(ops.rms_norm, x, weight, eps=1e-2), reference.rms_norm(x, weight, 1e-2))
    close(run(ops.layer_norm, x, weight, bias, eps=1e-2), reference.layer_norm(x, weight, bias, 1e-2))


def test_embed_linear_bias_swiglu() -> None:
    table, tokens = normal(10, 6), np.array([[1, 9, 0], [3, 3, 2]], np.int32)
    close(run(ops.embed, tokens, table), table[tokens])
    x, square, cube = normal(B, T, 6), normal(6, 5), normal(6, 2, 5)
    close(run(ops.linear, x, square), x @ square)
    both = np.einsum("bti,igf->btgf", x, cube)
    close(run(ops.linear, x, cube), both)
    close(run(ops.add_bias, x, square[:, 0]), x + square[:, 0])
    close(run(ops.swiglu, both.astype(np.float32)), reference.silu(both[..., 0, :]) * both[..., 1, :])
    heads, matrices = normal(B, T, H, 6), normal(H, 6, 5)
    expected = np.stack([heads[:, :, h] @ matrices[h] for h in range(H)], axis=2)
    close(run(ops.head_linear, heads, matrices), expected)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("width", [8, 12])  # all dims rotated, or the first 8 of 12
def test_rope(interleaved: bool, width: int) -> None:
    x, frequencies = normal(B, T, H, width), np.array([1.0, 0.3, 0.05, 0.001], np.float32)
    ours = run(ops.rope, x, POSITIONS, frequencies, interleaved=interleaved, factor=1.3)
    for b, t, h in np.ndindex(B, T, H):
        expected = reference.rope(x[b, t, h], int(POSITIONS[b, t]), frequencies.astype(np.float64), interleaved, 1.3)
        close(ours[b, t, h], expected)


def test_rope_depends_on_distance_only() -> None:
    """Query . key is the same for positions 3 and 10 as for 103 and 110, in either layout."""
    query, key = normal(1, 1, 1, 8), normal(1, 1, 1, 8)
    frequencies = np.array([1.0, 0.3, 0.05, 0.001], np.float32)
    dots = {}
    for interleaved in (True, False):
        for shift in (0, 100):
            at = [np.array([[position + shift]], np.int32) for position in (3, 10)]
            q, k = (
                run(ops.rope, x, positions, frequencies, interleaved=interleaved, factor=1.0)
                for x, positions in zip((query, key), at, strict=True)
            )
            dots[interleaved, shift] = float(np.vdot(q, k))
    assert dots[True, 0] == pytest.approx(dots[True, 100], abs=1e-4)
    assert dots[False, 0] == pytest.approx(dots[False, 100], abs=1e-4)
    assert abs(dots[True, 0] - dots[False, 0]) > 1e-2


# --- paged caches and attention ------------------------------------------------------------------


def test_cache_write() -> None:
    pages, rows = normal(4, PAGE, 3), normal(2, 2, 3)
    slots = np.array([[5, 14], [0, 0]], np.int32)  # the second sequence's tokens are padding
    ours = run(ops.cache_write, pages, rows, slots).reshape(-1, 3)
    expected = pages.reshape(-1, 3).copy()
    expected[5], expected[14] = rows[0]
    np.testing.assert_array_equal(ours[1:], expected[1:])


def test_index_scores() -> None:
    query, weights, keys = normal(B, T, 16, 6), normal(B, T, 16), normal(B, CONTEXT, 6)
    ours = run(ops.index_scores, query, weights, paged(keys), TABLE, POSITIONS)
    assert ours.dtype == np.float32
    for b, t in np.ndindex(B, T):
        seen = POSITIONS[b, t] + 1
        close(ours[b, t, :seen], reference.index_scores(query[b, t], weights[b, t], keys[b, :seen]))
        assert np.isneginf(ours[b, t, seen:]).all()


@given(st.lists(st.integers(-2, 2), min_size=9, max_size=9), st.integers(1, 9))
def test_select_topk_takes_the_lowest_position_of_equals(scores: list[int], k: int) -> None:
    ours = run(ops.select_topk, np.array(scores, np.float32)[None, None], k=k)
    assert ours.dtype == jnp.int32
    assert np.asarray(ours)[0, 0].tolist() == reference.best(np.array(scores), k)


def test_select_topk_with_fewer_visible_than_chosen() -> None:
    scores = np.array([[[3.0, 5.0, -np.inf, -np.inf, -np.inf]]], np.float32)
    assert run(ops.select_topk, scores, k=4)[0, 0].tolist() == [1, 0, 2, 3]


LORA, ROPE = 6, 4
SCALE = 0.37


def latents() -> tuple[np.ndarray, np.ndarray]:
    """Absorbed queries [b,t,h,lora+rope] and latent rows [b,c,lora+rope]."""
    return normal(B, T, H, LORA + ROPE, seed=3), normal(B, CONTEXT, LORA + ROPE, seed=4)


def test_latent_attention() -> None:
    query, rows = latents()
    ours = run(ops.latent_attention, query, paged(rows), TABLE, POSITIONS, scale=SCALE, value_dim=LORA)
    for b, t, h in np.ndindex(B, T, H):
        seen = rows[b, : POSITIONS[b, t] + 1]
        close(ours[b, t, h], reference.attention(query[b, t, h], seen, seen[:, :LORA], SCALE))


def test_sparse_attention_attends_to_what_is_selected() -> None:
    query, rows = latents()
    scores = normal(B, T, CONTEXT)
    visible = np.arange(CONTEXT) <= POSITIONS[:, :, None]
    selected = run(ops.select_topk, np.where(visible, scores, -np.inf).astype(np.float32), k=9)
    ours = run(ops.sparse_attention, query, paged(rows), TABLE, selected, POSITIONS, scale=SCALE, value_dim=LORA)
    assert (selected > POSITIONS[:, :, None]).any(), "a choice that is not visible must be left out"
    for b, t, h in np.ndindex(B, T, H):
        seen = rows[b, selected[b, t][selected[b, t] <= POSITIONS[b, t]]]
        close(ours[b, t, h], reference.attention(query[b, t, h], seen, seen[:, :LORA], SCALE))


@settings(max_examples=20)
@given(seed=st.integers(0, 2**16))
def test_sparse_attention_over_all_rows_is_latent_attention(seed: int) -> None:
    query, rows = latents()
    order = np.random.default_rng(seed).permuted(np.tile(np.arange(CONTEXT, dtype=np.int32), (B, T, 1)), axis=2)
    attributes: dict[str, Any] = {"scale": SCALE, "value_dim": LORA}
    dense = run(ops.latent_attention, query, paged(rows), TABLE, POSITIONS, **attributes)
    close(run(ops.sparse_attention, query, paged(rows), TABLE, order, POSITIONS, **attributes), dense)


def test_absorbed_is_expanded_attention() -> None:
    nope, value = 5, 7
    query, rows = normal(B, T, H, nope + ROPE), normal(B, CONTEXT, LORA + ROPE)
    k_up, v_up = normal(H, nope, LORA), normal(H, LORA, value)
    ours = run(ops.expanded_attention, query, paged(rows), TABLE, k_up, v_up, POSITIONS, scale=SCALE)
    absorbed = np.concatenate([run(ops.head_linear, query[..., :nope], k_up), query[..., nope:]], axis=-1)
    attributes: dict[str, Any] = {"scale": SCALE, "value_dim": LORA}
    latent = run(ops.latent_attention, absorbed, paged(rows), TABLE, POSITIONS, **attributes)
    close(run(ops.head_linear, latent, v_up), ours)
    for b, t, h in np.ndindex(B, T, H):
        seen = rows[b, : POSITIONS[b, t] + 1]
        keys = np.concatenate([seen[:, :LORA] @ k_up[h].T, seen[:, LORA:]], axis=1)
        close(ours[b, t, h], reference.attention(query[b, t, h], keys, seen[:, :LORA] @ v_up[h], SCALE))


def test_paged_attention() -> None:
    groups = 2
    query, keys, values = normal(B, T, H, 6), normal(B, CONTEXT, groups, 6), normal(B, CONTEXT, groups, 6)
    ours = run(ops.paged_attention, query, paged(keys), paged(values), TABLE, POSITIONS, scale=SCALE)
    for b, t, h in np.ndindex(B, T, H):
        seen, group = POSITIONS[b, t] + 1, h // (H // groups)
        expected = reference.attention(query[b, t, h], keys[b, :seen, group], values[b, :seen, group], SCALE)
        close(ours[b, t, h], expected)


# --- mixture of experts --------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    groups=st.sampled_from([(1, 1), (2, 1), (4, 2), (4, 4)]),
    normalise=st.booleans(),
    seed=st.integers(0, 2**16),
    levels=st.sampled_from([2, 3, 1000]),
)
def test_route(groups: tuple[int, int], normalise: bool, seed: int, levels: int) -> None:
    """With few levels of bias and no logits, ties abound: among experts and among groups."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(5, 6)).astype(np.float32)
    router = rng.normal(size=(6, 16)).astype(np.float32) * (levels > 3)
    bias = (rng.integers(0, levels, 16) / 8).astype(np.float32)
    attributes: dict[str, Any] = {
        "top_k": 3, "n_group": groups[0], "topk_group": groups[1], "normalise": normalise, "scale": 2.5
    }  # fmt: skip
    chosen, weights = run(ops.route, x, router, bias, **attributes)
    assert chosen.dtype == jnp.int32 and weights.dtype == jnp.float32
    for n in range(len(x)):
        expected, amounts = reference.route(x[n].astype(np.float64), router, bias, **attributes)
        assert np.asarray(chosen)[n].tolist() == expected
        close(weights[n], amounts)


EXPERTS, FFN, WIDE = 4, 5, 6


def expert_case(tokens: int, ids: int, k: int = 2, seed: int = 0) -> tuple[np.ndarray, ...]:
    """x, chosen ids below `ids`, weights, gate_up and down of EXPERTS experts."""
    rng = np.random.default_rng(seed)
    chosen = np.stack([rng.permutation(ids)[:k] for _ in range(tokens)]).astype(np.int32)
    weights = rng.uniform(0.1, 1, (tokens, k)).astype(np.float32)
    return normal(tokens, WIDE), chosen, weights, normal(EXPERTS, WIDE, 2, FFN), normal(EXPERTS, FFN, WIDE)


@pytest.mark.parametrize("tokens", [1, 2, 3, 9])  # 4 or fewer choices gather matrices, more take the dense form
@pytest.mark.parametrize("ids", [EXPERTS, 3 * EXPERTS])
def test_expert_ffn(tokens: int, ids: int) -> None:
    x, chosen, weights, gate_up, down = expert_case(tokens, ids)
    ours = run(ops.expert_ffn, x, chosen, weights, gate_up, down)
    for n in range(tokens):
        close(ours[n], reference.experts(x[n], chosen[n], weights[n], gate_up, down))


def test_expert_ffn_gathered_and_dense_agree() -> None:
    x, chosen, weights, gate_up, down = expert_case(9, 2 * EXPERTS)
    together = run(ops.expert_ffn, x, chosen, weights, gate_up, down)
    assert 9 * 2 > EXPERTS >= 1 * 2, "the batch takes the dense form, a token alone the gathered one"
    alone = [
        run(ops.expert_ffn, x[n : n + 1], chosen[n : n + 1], weights[n : n + 1], gate_up, down)[0] for n in range(9)
    ]
    close(together, np.stack(alone))


@pytest.mark.parametrize("tokens", [2, 9])
def test_experts_elsewhere_contribute_nothing(tokens: int) -> None:
    x, chosen, weights, gate_up, down = expert_case(tokens, EXPERTS)
    far = chosen + EXPERTS
    np.testing.assert_array_equal(run(ops.expert_ffn, x, far, weights, gate_up, down), np.zeros_like(x))
    huge = np.where(np.arange(2) == 1, far, chosen)  # one choice here, one elsewhere
    masked = np.where(np.arange(2) == 1, 0, weights).astype(np.float32)
    close(run(ops.expert_ffn, x, huge, weights, gate_up, down), run(ops.expert_ffn, x, chosen, masked, gate_up, down))


# --- FP8 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "blocked"),
    [
        ((200, 130), (0, 1)),
        ((128, 128), (0, 1)),
        ((130, 2, 20), (0, 2)),
        ((3, 130, 140), (1, 2)),
        ((2, 129, 2, 9), (1, 3)),
    ],
)
def test_dequantise(shape: tuple[int, ...], blocked: tuple[int, ...]) -> None:
    """A matrix, gate and up, and either of them stacked by expert."""
    values = normal(*shape, scale=50.0).astype(ml_dtypes.float8_e4m3fn)
    scale = np.abs(normal(*(-(-n // 128) if axis in blocked else n for axis, n in enumerate(shape)))) + 0.1
    ours = run(dequantise, values, scale)
    close(ours, reference.dequantise(values, scale, blocked))


def test_a_middle_dim_larger_than_a_block_count_is_not_blocked() -> None:
    """Two experts and matrices of two blocks: which dims are blocked is told by the scale's shape alone."""
    values = normal(2, 256, 2, 200, scale=50.0).astype(ml_dtypes.float8_e4m3fn)
    scale = np.abs(normal(2, 2, 2, 2)) + 0.1
    ours = run(dequantise, values, scale)
    close(ours, reference.dequantise(values, scale, (1, 3)))


def test_ops_take_fp8_matrices() -> None:
    x = normal(B, T, 130)
    values = normal(130, 2, 20, scale=50.0).astype(ml_dtypes.float8_e4m3fn)
    scale = np.abs(normal(2, 2, 1)) * 0.01
    matrix = reference.dequantise(values, scale, (0, 2))
    close(run(ops.linear, x, values, scale), np.einsum("bti,igf->btgf", x, matrix))
