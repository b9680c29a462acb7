"""One step of the policy that learns.

What learns is chosen by type: everything but the indexers (top-k selection that moves under a policy wrecks it: GLM-5
froze them), routers' biases (no `nnx.Param`) and the MTP layer, which generation does not ask. Sequences no longer
than what an indexer selects are attended whole, which is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.nnx.filterlib import Filter
from jax import Array

from model.module import IndexerParam, Model
from runtime.training.forward import forward
from runtime.training.optimizer import LearningRates, schedule
from runtime.training.params import Params, named, put
from runtime.training.rl.config import PolicyObjective, RlStage
from runtime.training.rl.objective import LearnerBatch, log_probabilities, loss

LEARNS: Filter = nnx.All(nnx.Param, nnx.Not(IndexerParam), nnx.Not(nnx.PathContains("mtp")))


class LearnerState(NamedTuple):
    """The model, Adam's moments, the parameters that the stage began with (empty where nobody asks for them), and those
    of the last steps, newest first, as many as `Schedule.lag`."""

    model: Model
    moments: Any
    teacher: Params
    past: tuple[Params, ...]


def rates(stage: RlStage) -> optax.Schedule:
    """Level, and over the last `decay` of a stage's steps down in a line; 0 would be the step behind the last."""
    fall = round(stage.decay * stage.steps)
    return schedule(stage.rate, LearningRates(stage.rate, stage.rate, stage.steps, rise=0, fall=fall), end=0.0)


def adam(rates: optax.Schedule, stage: RlStage) -> optax.GradientTransformation:
    """Its moments count the steps, so that a run that is resumed goes on at the rate where it was."""
    made: Any = optax.chain(optax.clip_by_global_norm(stage.clip), optax.adam(rates, b2=stage.beta2))

    def update(updates: Any, state: Any, params: Any = None, **_: Any) -> Any:
        # optax raises floats to counts, which strict JAX refuses
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return made.update(updates, state, params)

    return optax.GradientTransformation(made.init, update)


def begin(model: Model, stage: RlStage, lag: int) -> LearnerState:
    """The state before a stage's first step."""
    params = named(model, LEARNS)
    teacher = dict(params) if stage.objective.distill else {}
    return LearnerState(model, adam(rates(stage), stage).init(params), teacher, (params,) * lag)


def behind(state: LearnerState) -> Params:
    """The parameters to generate with: the policy's, or those of `lag` steps before."""
    return state.past[-1] if state.past else named(state.model, LEARNS)


LearnerStep = Callable[[LearnerState, LearnerBatch], tuple[LearnerState, dict[str, Array]]]


def compile_step(how: PolicyObjective, optimizer: optax.GradientTransformation, rounding: str = "") -> LearnerStep:
    """The jitted step. What it is given is its own from then on."""

    def run(state: LearnerState, given: LearnerBatch) -> tuple[LearnerState, dict[str, Array]]:
        model, moments, teacher, past = state
        tokens = jnp.asarray(given.tokens)
        before = named(model, LEARNS)
        held = None
        if teacher:
            elder = nnx.clone(model)
            put(elder, teacher)
            held = log_probabilities(_logits(elder, tokens), tokens)

        def of(learner: Model) -> tuple[Array, dict[str, Array]]:
            return loss(how, _logits(learner, tokens, rounding, given.choices), given, held)

        gradients, said = nnx.grad(of, argnums=nnx.DiffState(0, LEARNS), has_aux=True)(model)
        found = named(gradients, LEARNS)
        updates, moments = optimizer.update(found, moments, before)
        put(model, optax.apply_updates(before, updates))  # type: ignore[arg-type]
        said["gradient"] = optax.tree.norm(found)
        return LearnerState(model, moments, teacher, (before, *past[:-1]) if past else ()), said

    return jax.jit(run)


def _logits(model: Model, tokens: Array, rounding: str = "", chosen: Mapping[str, Any] = MappingProxyType({})) -> Array:
    assert model.config.indexer is not None
    sparse = tokens.shape[1] > model.config.indexer.topk
    return forward(model, tokens, "sparse" if sparse else "dense", rounding=rounding, chosen=chosen).logits
