"""Lowerings of `glm.index_scores`, `glm.select_topk` and `glm.route`."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from backends.kernels.launch import launch
from backends.kernels.library import Capability
from backends.kernels.lowering import KernelLowering, blocks, not_bfloat16, out
from backends.kernels.variants import INDEX_HEADS, INDEX_QUERIES, INDEX_WIDTH, MOST_CHOSEN, MOST_GROUPS, ROUTED
from model.narrow_rows import is_narrow

_KEYS = 128  # a program of index_scores


def index_scores_why_not(
    query: Array, head_weights: Array, pages: Array, page_table: Array, positions: Array
) -> str | None:
    heads, width = query.shape[2:]
    if width != INDEX_WIDTH or heads > INDEX_HEADS[-1]:
        return f"{heads} index heads of {width}: kernels are for up to {INDEX_HEADS[-1]} of {INDEX_WIDTH}"
    asked = {"query": query, "head_weights": head_weights} | ({} if is_narrow(pages) else {"pages": pages})
    return not_bfloat16(**asked)


def index_scores(
    capability: Capability, query: Array, head_weights: Array, pages: Array, page_table: Array, positions: Array
) -> Array:
    b, t, heads, width = query.shape
    context = page_table.shape[1] * pages.shape[1]
    held = next(each for each in INDEX_HEADS if heads <= each)
    numbers = [t, heads, pages.shape[1], page_table.shape[1], width**-0.5, heads**-0.5]
    grid = (blocks(context, _KEYS), blocks(t, INDEX_QUERIES), b)
    operands = [query, head_weights, pages, page_table, positions]
    name = f"index_scores_{'u8_' if is_narrow(pages) else ''}{held}"
    (scores,) = launch(name, capability, [out((b, t, context), jnp.float32)], grid, operands, numbers)
    return scores


def select_topk_why_not(scores: Array, *, k: int) -> str | None:
    return None if scores.dtype == jnp.float32 else f"scores in {scores.dtype}: the kernel is for float32"


def select_topk(capability: Capability, scores: Array, *, k: int) -> Array:
    """Positions come ascending, not best first: what reads them takes them as a set."""
    b, t, context = scores.shape
    (selected,) = launch("select_topk", capability, [out((b, t, k), jnp.int32)], (b * t,), [scores], [context, k])
    return selected


def route_why_not(
    x: Array, router: Array, bias: Array, *, top_k: int, n_group: int, topk_group: int, normalise: bool, scale: float
) -> str | None:
    experts = router.shape[1]
    if experts > ROUTED[-1] or top_k > MOST_CHOSEN or n_group > MOST_GROUPS:
        return (
            f"{top_k} of {experts} experts in {n_group} groups: the kernel is for up to {MOST_CHOSEN} of {ROUTED[-1]} "
            f"in {MOST_GROUPS}"
        )
    if n_group > 1 and topk_group * (experts // n_group) < top_k:
        return f"{topk_group} groups of {experts // n_group} experts hold fewer than {top_k}"
    return None


def route(
    capability: Capability, x: Array, router: Array, bias: Array, *, top_k: int, n_group: int, topk_group: int,
    normalise: bool, scale: float,
) -> tuple[Array, Array]:  # fmt: skip
    f32 = jnp.float32
    logits = lax.dot_general(x.astype(f32), router.astype(f32), (((1,), (0,)), ((), ())), preferred_element_type=f32)
    tokens, experts = logits.shape
    held = next(each for each in ROUTED if experts <= each)
    chosen, weights = launch(
        f"route_{held}", capability, [out((tokens, top_k), jnp.int32), out((tokens, top_k), f32)], (tokens,),
        [logits, bias.astype(f32)], [experts, top_k, n_group, topk_group, int(normalise), float(scale)],
    )  # fmt: skip
    return chosen, weights


LOWERINGS = (
    KernelLowering(
        "glm.index_scores",
        f"bfloat16 queries and weights, caches in bfloat16 or FP8 records; up to {INDEX_HEADS[-1]} heads of width "
        f"{INDEX_WIDTH}",
        index_scores_why_not,
        index_scores,
    ),
    KernelLowering("glm.select_topk", "all; positions come ascending", select_topk_why_not, select_topk),
    KernelLowering(
        "glm.route",
        f"up to {MOST_CHOSEN} of {ROUTED[-1]} experts, in {MOST_GROUPS} groups; the product with the router is XLA's",
        route_why_not,
        route,
    ),
)
