"""Cache rows as FP8 records: the bytes that others' kernels read, what rounding costs, and that every op that reads a
cache takes a record for what it holds."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from backends.cpu import CpuBackend
from foundation.errors import UsageError
from model.formats import ROWS, CacheFormats
from model.hf_config import load_config
from model.narrow_rows import packed, unpacked
from model.ops import OPS
from runtime.deployment.engines import load
from runtime.execution.local.load import rows_for, token_bytes

SHAPES = [(576, 64, "fp8_ds_mla"), (128, 0, "fp8_scaled"), (300, 44, "fp8_ds_mla"), (16, 0, "fp8_scaled")]


def rows(seed: int, *shape: int) -> np.ndarray:
    """bfloat16 of very different sizes, a row of zeros among them."""
    rng = np.random.default_rng(seed)
    made = rng.standard_normal(shape) * np.exp(4 * rng.standard_normal((*shape[:-1], 1)))
    made.reshape(-1, shape[-1])[0] = 0
    return made.astype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("width, plain, fmt", SHAPES)
def test_a_record_is_values_scales_and_what_stays(width: int, plain: int, fmt: str) -> None:
    x = rows(width, 3, 5, width)
    held = np.asarray(jax.jit(partial(packed, plain=plain))(x))
    assert held.dtype == np.uint8 and held.shape == (3, 5, ROWS[fmt].bytes(width, plain))
    values, groups = width - plain, -(-(width - plain) // 128)
    numbers = np.ascontiguousarray(held[..., :values]).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    scale = np.ascontiguousarray(held[..., values : values + 4 * groups]).view(np.float32)
    full = np.repeat(scale, 128, axis=-1)[..., :values]
    exact = x.astype(np.float32)
    # half a step of e4m3: 2^-4 of a number, or 2^-10 of the scale below the least normal one
    bound = np.maximum(np.abs(exact[..., :values]) * 2.0**-4, full * 2.0**-10) * 1.001
    assert (np.abs(numbers * full - exact[..., :values]) <= bound).all()
    np.testing.assert_array_equal(
        held[..., values + 4 * groups :], np.ascontiguousarray(x[..., values:]).view(np.uint8)
    )
    read = partial(unpacked, width=width, plain=plain, dtype=jnp.dtype("float32"))
    back = np.asarray(jax.jit(read)(held))
    np.testing.assert_array_equal(back, np.concatenate([numbers * full, exact[..., values:]], axis=-1))


def test_ops_read_what_was_written() -> None:
    """Over records as over the float32 rows that those hold; as the CPU computes them, and as the contract says."""
    rng = np.random.default_rng(5)
    b, t, heads, lora, rope, size = 2, 3, 2, 160, 16, 4
    table = np.arange(1, 7, dtype=np.int32).reshape(b, 3)
    positions = np.array([[4, 5, 6], [8, 9, 10]], np.int32)
    slots = np.take_along_axis(table, positions // size, axis=1) * size + positions % size
    table, positions, slots = map(jnp.asarray, (table, positions, slots))
    meaning = {name: op.meaning for name, op in OPS.items()}
    ops, attributes = {**meaning, **CpuBackend().lowerings()}, {"scale": 0.1, "value_dim": lora}

    def normal(*shape: int) -> Any:
        return jnp.asarray(rng.standard_normal(shape).astype(np.float32))

    def written(old: Any, new: Any, plain: int) -> tuple[Any, Any]:
        pages = ops["glm.cache_write"](packed(old, plain), new, slots, cache="latent", plain=plain)
        return pages, unpacked(pages, new.shape[-1], plain, jnp.dtype("float32"))

    query, chosen = normal(b, t, heads, lora + rope), jnp.asarray(rng.integers(0, 5, (b, t, 4)).astype(np.int32))
    expanded = normal(b, t, heads, 24 + rope), normal(heads, 24, lora), normal(heads, lora, 8)
    scored = normal(b, t, heads, 32), normal(b, t, heads)
    olds, news = [rows(each, 7, size, each) for each in (176, 32)], [rows(each, b, t, each) for each in (176, 32)]

    @jax.jit
    def run(olds: Any, news: Any) -> Any:
        latents, keys = written(olds[0], news[0], rope), written(olds[1], news[1], 0)
        read = (
            latents[1].reshape(-1, lora + rope)[slots],
            unpacked(packed(news[0], rope), 176, rope, jnp.dtype("float32")),
        )
        return [
            read,
            *(
                [each["glm.sparse_attention"](query, p, table, chosen, positions, **attributes) for p in latents]
                for each in (ops, meaning)
            ),
            [ops["glm.latent_attention"](query, p, table, positions, **attributes) for p in latents],
            [
                ops["glm.expanded_attention"](expanded[0], p, table, *expanded[1:], positions, scale=0.1)
                for p in latents
            ],
            [ops["glm.index_scores"](*scored, p, table, positions) for p in keys],
        ]

    for record, exact in run(olds, news):
        np.testing.assert_allclose(np.asarray(record), np.asarray(exact), rtol=1e-5, atol=1e-5)


def test_what_an_engine_keeps_its_cache_in() -> None:
    cfg, cpu, engine = load_config("glm-5"), CpuBackend(), load("glm5")
    assert rows_for(cfg, cpu, engine, "bfloat16", None) == CacheFormats()
    narrow = rows_for(cfg, cpu, engine, "bfloat16", "fp8")
    assert (narrow.latent, narrow.index) == ("fp8_ds_mla", "fp8_scaled")
    assert token_bytes(cfg, "bfloat16", False, narrow) == cfg.num_layers * (656 + 132)
    assert token_bytes(cfg, "bfloat16", False) == cfg.num_layers * 2 * (576 + 128)
    with pytest.raises(UsageError, match="bf16 or fp8"):
        rows_for(cfg, cpu, engine, "bfloat16", "int8")
    with pytest.raises(UsageError, match="computes in bfloat16, not in float32"):
        rows_for(cfg, cpu, engine, "float32", "bf16")
