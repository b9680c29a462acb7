"""What FP8 caches do to the embedded checkpoint's logits, and by which way: a line for each thing that is rounded, or
taken from the run that rounds nothing. In float32 throughout, so that nothing else differs.

    python -m bench.cache_formats

A position's logits move by what the rounding itself is, or far where it tips a choice: which positions are selected,
which experts a token goes to. `by chance` has errors as large as FP8's, their signs drawn: what any error of that size
does, and a fault would not look like.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from model import graph, ops
from model.cache import cache_rows
from model.checkpoint import Checkpoint
from model.config import Mla
from model.graph import Batch, Mode
from model.narrow_rows import packed, unpacked
from model.tokenizer import Tokenizer
from runtime.execution.local.load import embedded_checkpoint
from runtime.porting.compare import read_texts

TOKENS, TEXTS, PAGE = 150, 4, 16
NOTHING, FP8, CHANCE, BF16, THOUSANDTH = range(5)


class Asked(NamedTuple):
    """What is done to each cache's rows, and whether selections and experts are those of the run without."""

    latent: Any = NOTHING
    index: Any = NOTHING
    selections: Any = False
    experts: Any = False


RUNS = {
    "caches in bfloat16": Asked(BF16, BF16),
    "latents off by 0.1 %": Asked(THOUSANDTH),
    "latents in FP8": Asked(FP8),
    "index keys in FP8": Asked(index=FP8),
    "both": Asked(FP8, FP8),
    "both, selections replayed": Asked(FP8, FP8, True),
    "both, experts replayed": Asked(FP8, FP8, False, True),
    "both, both replayed": Asked(FP8, FP8, True, True),
    "latents by chance": Asked(CHANCE),
    "latents by chance, both replayed": Asked(CHANCE, NOTHING, True, True),
}

Choices = dict[str, list[Array]]


def stepper(checkpoint: Checkpoint) -> Any:
    """One program for all runs: (weights, caches, batch, asked, choices to replay) -> (logits, its own choices)."""
    cfg = checkpoint.config
    assert isinstance(cfg.attention, Mla)
    plain_of = {"latent": cfg.attention.rope_dim, "index": 0}

    def step(weights: Any, caches: Any, batch: Batch, asked: Asked, replay: Choices) -> tuple[Array, Choices]:
        own: Choices = {"selections": [], "experts": []}
        given: dict[str, Iterator[Array]] = {name: iter(each) for name, each in replay.items()}

        def chosen(name: str, ids: Array) -> Array:
            own[name].append(ids)
            return jnp.where(getattr(asked, name), next(given[name]), ids)

        def select(scores: Array, *, k: int) -> Array:
            return chosen("selections", ops.select_topk(scores, k=k))

        def route(x: Array, router: Array, bias: Array, **how: Any) -> tuple[Array, Array]:
            ids = chosen("experts", ops.route(x, router, bias, **how)[0])
            weighed = {name: how[name] for name in ("normalise", "scale")}
            return ids, ops.expert_weights(ops.affinities(x, router), ids, **weighed)

        def write(pages: Array, rows: Array, slots: Array, *, cache: str = "", plain: int = 0) -> Array:
            kept = plain_of[cache]
            error = unpacked(packed(rows, kept), rows.shape[-1], kept, rows.dtype) - rows
            signs = jax.random.rademacher(jax.random.key(5), rows.shape, rows.dtype)
            noise = 1e-3 * rows * jax.random.normal(jax.random.key(7), rows.shape)
            ways = jnp.stack(
                [0 * rows, error, signs * error, rows.astype(jnp.bfloat16).astype(rows.dtype) - rows, noise]
            )
            return ops.OPS["glm.cache_write"].meaning(pages, rows + ways[getattr(asked, cache)], slots, cache=cache)

        def run(weights: Any, caches: Any, batch: Batch) -> Array:
            return graph.step(cfg, weights, caches, batch, Mode("expanded", "all")).logits

        kernels = {"glm.select_topk": select, "glm.route": route, "glm.cache_write": write}
        return ops.substitute(run, kernels)(weights, caches, batch), own

    return jax.jit(step, compiler_options={"xla_backend_optimization_level": 0})


def shared(found: Sequence[Array], meant: Sequence[Array]) -> float:
    """Of two lists of choices [.., k], the mean share of each row that both have."""
    pairs = [(np.asarray(a), np.asarray(b)) for a, b in zip(found, meant, strict=True)]
    return float(np.mean([(a[..., :, None] == b[..., None, :]).any(-1).mean() for a, b in pairs]))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def main() -> None:
    checkpoint = Checkpoint(embedded_checkpoint())
    cfg, tokenizer = checkpoint.config, Tokenizer.load(checkpoint.path)
    windows = [w for w in read_texts(checkpoint, tokenizer, None, None, TOKENS, 1).windows if len(w) == TOKENS][:TEXTS]
    count, pages = len(windows), -(-TOKENS // PAGE)
    assert cfg.indexer is not None and cfg.moe is not None
    empty = [
        {row.name: jnp.zeros((count * pages + 1, PAGE, *row.shape), jnp.float32) for row in cache_rows(cfg, kind)}
        for kind in cfg.layers
    ]
    table = 1 + np.arange(count * pages, dtype=np.int32).reshape(count, pages)
    batch = Batch(np.stack(windows), np.zeros(count, np.int32), np.full(count, TOKENS, np.int32), table)
    selected = jnp.zeros((count, TOKENS, cfg.indexer.topk), jnp.int32)
    routed = jnp.zeros((count * TOKENS, cfg.moe.top_k), jnp.int32)
    none: Choices = {
        "selections": [selected for kind in cfg.layers if kind.indexer == "full"],
        "experts": [routed for kind in cfg.layers if kind.ffn == "moe"],
    }
    run, weights = stepper(checkpoint), jax.tree.map(jnp.asarray, checkpoint.load("float32", mtp=False))

    def made(asked: Asked, replay: Choices) -> tuple[np.ndarray, Choices]:
        logits, choices = run(weights, empty, batch, Asked(*map(jnp.int32, asked)), replay)
        return np.asarray(logits, np.float64), choices

    base, choices = made(Asked(), none)
    print(f"{count} texts of {TOKENS} tokens; logits: deviation {base.std():.2f}, largest {np.abs(base).max():.1f}")
    print(f"{'':34} largest  median    rms       KL  top-1  selected  experts")
    for name, asked in RUNS.items():
        logits, own = made(asked, choices)
        largest, said, meant = np.abs(logits - base).max(-1), log_softmax(logits), log_softmax(base)
        moved, whole = ((each - each.mean(-1, keepdims=True)).std() for each in (logits - base, base))
        late = [[each[:, cfg.indexer.topk :] for each in made["selections"]] for made in (own, choices)]
        divergence, same = (np.exp(meant) * (meant - said)).sum(-1).mean(), logits.argmax(-1) == base.argmax(-1)
        print(
            f"{name:34} {largest.max():7.2f} {np.median(largest):7.3f} {moved / whole:6.2%} {divergence:8.1e} "
            f"{same.mean():6.1%} {shared(*late):9.2%} {shared(own['experts'], choices['experts']):8.2%}"
        )


if __name__ == "__main__":
    main()
