"""Rounding in a program that learns is the quantiser's own, to the bit; gradients go through it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from foundation.errors import UsageError
from model.formats import matrix_format
from model.qat import TRACED, rounding, straight_through
from model.quantised import FEW_BITS, dequantise, integer_formats, integer_rounded, quantise
from model.weights import Arrangement, Weight

FORMATS = ("w4a16", "w4a16-g128", "w4a8", "w8a8-int8", "int3", "int2")


def of(name: str):
    return FEW_BITS[name] if name in FEW_BITS else matrix_format(name)


def matrices(rows: int, columns: int) -> np.ndarray:
    """Two of them, rows of all sizes, one of zeros, one of halves of a step."""
    rng = np.random.default_rng(rows)
    found = rng.normal(size=(2, rows, columns)).astype(np.float32) * np.exp(rng.normal(size=(2, rows, 1)) * 3)
    found[0, 0] = 0.0
    found[1, 0] = (np.arange(columns) % 15 - 7) / 2
    return found.astype(np.float32)


def check(name: str, matrix: np.ndarray) -> None:
    fmt = of(name)
    wanted = dequantise(quantise(fmt, matrix))
    found = np.asarray(jax.jit(lambda a: integer_rounded(TRACED, fmt, a))(matrix))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found.view(np.uint32) << 1, wanted.view(np.uint32) << 1)  # 0 has two signs


@pytest.mark.parametrize("name", FORMATS)
def test_a_compiled_program_rounds_as_the_quantiser_does(name: str) -> None:
    check(name, matrices(64, 256))


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_over_eight_million_weights(name: str) -> None:
    check(name, matrices(1024, 4096))


WEIGHTS = (
    Weight("down", (96, 64), ("ffn", None), ("mlp.down_proj.weight",), Arrangement.MATRIX, "dense_ffn", True),
    Weight(
        "gate_up", (64, 2, 32), (None, None, "ffn"), ("mlp.gate_proj.weight",), Arrangement.GATE_UP, "experts", True
    ),
    Weight("k_up", (4, 32, 64), ("heads", None, None), ("kv_b_proj.weight",), Arrangement.HEAD_KEYS, "attention", True),
)


@pytest.mark.parametrize("weight", WEIGHTS, ids=lambda weight: weight.name)
def test_a_weight_is_rounded_along_what_it_contracts_and_its_gradient_goes_through(weight: Weight) -> None:
    rng = np.random.default_rng(1)
    value = jnp.asarray(rng.normal(size=weight.shape).astype(np.float32))
    fmt = of("w4a16")
    seen = np.asarray(straight_through(fmt, weight, value))
    axis = {"down": 0, "gate_up": 0, "k_up": 2}[weight.name]
    groups = np.moveaxis(np.asarray(value), axis, -1).reshape(-1, 32)
    wanted = dequantise(quantise(fmt, groups))
    np.testing.assert_array_equal(np.moveaxis(seen, axis, -1).reshape(-1, 32), wanted)
    slope = jax.grad(lambda a: jnp.sum(straight_through(fmt, weight, a) * 3.0))(value)
    np.testing.assert_array_equal(slope, np.full(weight.shape, 3.0, np.float32))


def test_what_a_scheme_leaves_wide_is_left() -> None:
    seen = rounding("w4a16")  # experts in INT4, the rest in 16 bits
    value = jnp.asarray(np.random.default_rng(2).normal(size=(96, 64)).astype(np.float32))
    assert seen(WEIGHTS[0], value) is value
    assert integer_formats("int2")(WEIGHTS[0]).bound == 1.0


@pytest.mark.parametrize("name", ["fp8", "bf16", "nvfp4", "w4a16-g64-zp", "int5"])
def test_what_is_not_of_integers_is_one_line(name: str) -> None:
    with pytest.raises(UsageError) as refused:
        integer_formats(name)
    assert "\n" not in str(refused.value)


def test_groups_that_do_not_divide_are_one_line() -> None:
    narrow = Weight("down", (40, 8), ("ffn", None), ("x.weight",), Arrangement.MATRIX, "experts", True)
    with pytest.raises(UsageError, match="down in w4a16: rows of 40 do not divide into groups of 32"):
        rounding("w4a16")(narrow, jnp.zeros((40, 8)))
