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

from runtime.training.forward import Params

Name = Literal["muon-split", "muon", "adamw"]

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # optax's own: a quintic that is steep at 0
_BY_ADAM = ("embed", "head", "router", "index_k_bias")
# Reduction and output axes of the weights that are not plain [in, out] matrices; axes not named are a batch.
_STACKED = {
    "gate_up": (0, 2), "shared_gate_up": (0, 2), "experts_gate_up": (1, 3), "experts_down": (1, 2),
}  # fmt: skip
_BY_HEAD = {"q_b": (0, 2), "k_up": (2, 1), "v_up": (1, 2)}
_WHOLE = {"q_b": (0, (1, 2)), "k_up": (2, (0, 1)), "v_up": (1, (0, 2))}


def dimension_numbers(params: Params, name: Name) -> dict[str, MuonDimensionNumbers | None]:
    """How Muon reads each parameter; None where it is AdamW's."""

    def of(key: str, array: Any) -> MuonDimensionNumbers | None:
        leaf = key.rpartition(".")[2]
        if name == "adamw" or leaf in _BY_ADAM or getattr(array, "ndim", 0) < 2:
            return None
        axes = ({**_STACKED, **(_BY_HEAD if name == "muon-split" else _WHOLE)}).get(leaf, (0, 1))
        return MuonDimensionNumbers(*axes)

    return {key: of(key, array) for key, array in params.items()}


class LearningRates(NamedTuple):
    """Learning rates of matrices and of the rest, and the steps over which they rise and fall."""

    matrix: float
    other: float
    steps: int
    rise: int
    fall: int


def schedule(peak: float, rates: LearningRates) -> optax.Schedule:
    """Up in a line, level, and down in a line to a fiftieth."""
    return optax.join_schedules(
        [
            optax.linear_schedule(peak / max(1, rates.rise), peak, rates.rise),
            optax.linear_schedule(peak, peak / 50, max(1, rates.fall)),
        ],
        [max(rates.rise, rates.steps - rates.fall)],
    )


def make(name: Name, rates: LearningRates, weight_decay: float, clip: float) -> optax.GradientTransformation:
    """The optimizer of parameters by name, of gradients clipped to a global norm of `clip`. Matrices step by 0.2 root
    mean square times their rate, as AdamW does."""

    def numbers(params: Any) -> Any:
        return dimension_numbers(params, name)

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
    made = optax.chain(optax.clip_by_global_norm(clip), by_muon)

    def update(updates: Any, state: Any, params: Any = None, **_: Any) -> Any:
        # optax raises floats to counts and adds vectors to matrices, which strict JAX refuses
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return made.update(updates, state, params)

    return optax.GradientTransformation(made.init, update)


def rebalance(bias: Array, load: Array, rate: float) -> Array:
    """A router's bias after a step: up for experts below the mean load, down for those above (no auxiliary loss)."""
    return bias + jnp.float32(rate) * jnp.sign(jnp.mean(load) - load)
