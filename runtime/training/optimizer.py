"""Muon Split beside AdamW, on optax.

Muon orthogonalises the update of a matrix. Muon Split (GLM-5, arXiv 2602.15763) takes the up-projections of queries,
keys and values (W_UQ, W_UK, W_UV) a head at a time, so that heads may learn at their own pace. Embedding, head, norms
and router are AdamW's; routers' biases are nobody's: they balance loads (`rebalance`).
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from optax.contrib import MuonDimensionNumbers, muon

from model.module import MatrixParam, Model, PerHeadParam
from model.weights import Arrangement, Weight
from runtime.training.params import Params, variables

OptimizerName = Literal["muon-split", "muon", "adamw"]

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # optax's own: a quintic that is steep at 0


class MatrixView(NamedTuple):
    """How Muon reads a weight: its shape with a dim for heads, and which dims, from the end, are a matrix's (the others
    are a batch)."""

    shape: tuple[int, ...]
    numbers: MuonDimensionNumbers


def matrix_views(model: Model, name: OptimizerName) -> dict[str, MatrixView]:
    """Of each matrix by name. What is not among them is AdamW's."""
    if name == "adamw":
        return {}
    views = {
        key: MatrixView(variable.weight.shape, MuonDimensionNumbers(*variable.weight.matrix_dims))
        for key, variable in variables(model, MatrixParam).items()
    }
    for key, variable in variables(model, PerHeadParam).items():
        views[key] = _by_head(variable.weight, split=name == "muon-split")
    return views


def _by_head(weight: Weight, split: bool) -> MatrixView:
    """A matrix a head, or with heads side by side in what the one matrix gives."""
    if weight.arrangement is Arrangement.MATRIX:
        shape, head, dims = (weight.shape[0], weight.heads, -1), -2, (-3, -1)
    else:
        shape, head, dims = weight.shape, -3, weight.matrix_dims
    assert dims is not None
    return MatrixView(shape, MuonDimensionNumbers(dims[0], dims[1] if split else (head, dims[1])))


class LearningRates(NamedTuple):
    """Learning rates of matrices and of the rest, and the steps over which they rise and fall."""

    matrix: float
    other: float
    steps: int
    rise: int
    fall: int


def schedule(peak: float, rates: LearningRates, end: float = 1 / 50) -> optax.Schedule:
    """Up in a line, level, and down in a line to `end` of the peak."""
    return optax.join_schedules(
        [
            optax.linear_schedule(peak / max(1, rates.rise), peak, rates.rise),
            optax.linear_schedule(peak, peak * end, max(1, rates.fall)),
        ],
        [max(rates.rise, rates.steps - rates.fall)],
    )


def make(
    model: Model, name: OptimizerName, rates: LearningRates, weight_decay: float, clip: float
) -> optax.GradientTransformation:
    """The optimizer of a model's parameters by name, all or some, of gradients clipped to a global norm of `clip`.
    Matrices step by 0.2 root mean square times their rate, as AdamW does."""
    views = matrix_views(model, name)

    def numbers(params: Any) -> Any:
        return {key: views[key].numbers if key in views else None for key in params}

    def viewed(params: Params) -> Params:
        return {key: array.reshape(views[key].shape) if key in views else array for key, array in params.items()}

    by_muon = muon(
        schedule(rates.matrix, rates),
        ns_coeffs=(NEWTON_SCHULZ,) * 5,  # one a step makes optax loop, where it would unroll: a fifth to compile
        weight_decay=weight_decay,
        consistent_rms=0.2,
        adam_b2=0.98,
        adam_weight_decay=weight_decay if name == "adamw" else 0.0,
        adam_learning_rate=schedule(rates.other, rates),
        muon_weight_dimension_numbers=numbers,
    )
    made: Any = optax.chain(optax.clip_by_global_norm(clip), by_muon)  # of params as `viewed`

    def update(updates: Any, state: Any, params: Any = None, **_: Any) -> Any:
        # optax raises floats to counts and adds vectors to matrices, which strict JAX refuses
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            stepped, state = made.update(viewed(updates), state, viewed(params))
        return {key: array.reshape(updates[key].shape) for key, array in stepped.items()}, state

    def init(params: Any) -> Any:
        return made.init(viewed(params))

    return optax.GradientTransformation(init, update)


def rebalance(bias: Array, load: Array, rate: float) -> Array:
    """A router's bias after a step: up for experts below the mean load, down for those above (no auxiliary loss)."""
    return bias + jnp.float32(rate) * jnp.sign(jnp.mean(load) - load)
