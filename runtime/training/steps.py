"""One step of training, compiled for a stage: gradients, optimizers and the balance of the experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from flax.nnx.filterlib import Filter
from jax import Array

from model.checkpoint import groups
from model.config import Mla, ModelConfig
from model.hf_config import from_hf
from model.module import IndexerParam, Model, RouterBias
from model.weights import Weight
from runtime.training import optimizer
from runtime.training.config import TrainConfig, TrainingStage
from runtime.training.forward import Aim, loss
from runtime.training.params import named, put
from runtime.training.state import State

_GAINS: dict[str, float] = dict.fromkeys(
    ("o", "down", "experts_down", "shared_down", "head"), 0.3
)  # the residual begins as the embedding

# What is trained by gradient. Routers' biases are no `nnx.Param`.
MAIN: Filter = nnx.All(nnx.Param, nnx.Not(IndexerParam))
TRAINED: Mapping[str, Filter] = {"dense": MAIN, "warmup": IndexerParam, "sparse": nnx.Param}


def initial_model(raw_config: Mapping[str, Any], seed: int) -> Model:
    """A model of a config.json's fields, in float32: random as `Weight.initial` has it, but what writes to the residual
    begins small, embeddings have a part in common, and heads of the first layer look a few tokens back (`_look_back`).
    """
    cfg = from_hf(raw_config)
    rng = np.random.default_rng([seed, 1])

    common = rng.standard_normal(cfg.hidden_size)

    def make(weight: Weight) -> np.ndarray:
        mean, deviation = weight.initial
        if weight.name == "embed":
            array = 0.35 * (rng.standard_normal(weight.shape) + common)
        elif deviation:
            array = _GAINS.get(weight.name, 1.0) * deviation * rng.standard_normal(weight.shape)
        else:
            array = np.full(weight.shape, mean)
        return array.astype(np.float32)

    made = {
        place: [{weight.name: make(weight) for weight in group.weights} for group in found]
        for place, found in groups(cfg, mtp=True).items()
    }
    _look_back(cfg, made["layers"][0], common / np.linalg.norm(common))
    return Model(cfg, {**made, "outer": made["outer"][0]}, raw_config=raw_config)


def _look_back(cfg: ModelConfig, layer: dict[str, np.ndarray], common: np.ndarray) -> None:
    """Lets head i of a layer begin by attending i + 1 tokens back, but for the last head.

    Finding what followed a word takes a head that moves each token's identity one place on; a model of this size finds
    that head by luck and late, and what is built on it later still. Half of every embedding is the same vector; here it
    becomes the same rotary key everywhere, and in each head a rotary query turned back by so many positions.
    """
    mla = cfg.attention
    assert isinstance(mla, Mla) and mla.q_lora_rank is not None
    size = cfg.hidden_size**0.5 / 2**0.5  # of the common part of a normalised embedding
    sharpness = 11.0  # the rotary key's size: with the softmax's scale, nats between one place and the next
    rope = layer["kv_a"][:, mla.kv_lora_rank :]
    rope[:, 0::2], rope[:, 1::2] = (common * sharpness / size)[:, None], 0.0
    layer["q_a"][:, 0] = common
    latent = size / (1 + size**2 / mla.q_lora_rank) ** 0.5  # of that entry of the normalised query latent
    by_head = layer["q_b"].reshape(mla.q_lora_rank, cfg.heads, mla.qk_dim)
    for head in range(cfg.heads - 1):
        angle = -(head + 1) * cfg.rope.inv_freq()
        by_head[:, head] *= 0.1
        by_head[0, head, mla.nope_dim :: 2] = np.cos(angle) * sharpness / latent
        by_head[0, head, mla.nope_dim + 1 :: 2] = np.sin(angle) * sharpness / latent


class Optimizers:
    """Of a model's main weights and of its indexers: each counts its own steps."""

    def __init__(self, config: TrainConfig, model: Model):
        o = config.optimizer

        def make(steps: int, matrix: float, other: float) -> optax.GradientTransformation:
            rates = optimizer.LearningRates(matrix, other, steps, round(o.rise * steps), round(o.fall * steps))
            return optimizer.make(model, o.name, rates, o.weight_decay, o.clip)

        self.main = make(config.count("dense", "sparse"), o.matrix_rate, o.other_rate)
        self.index = make(config.count("warmup", "sparse"), o.index_rate, o.index_rate)
        self.balance_rate = o.balance_rate

    def begin(self, model: Model) -> State:
        """The state before the first step."""
        return State(model, self.main.init(named(model, MAIN)), self.index.init(named(model, IndexerParam)))


def _move(model: Model, gradients: Any, wanted: Filter, by: optax.GradientTransformation, state: Any) -> Any:
    """Moves the wanted parameters where there are gradients of them; the new state of the optimizer `by`."""
    found, params = named(gradients, wanted), named(model, wanted)
    if not found:
        return state
    updates, state = by.update(found, state, params)
    put(model, optax.apply_updates(params, updates))  # type: ignore[arg-type]
    return state


StepFn = Callable[[State, Any, Any], tuple[State, dict[str, Any]]]


def compile_step(stage: TrainingStage, optimizers: Optimizers) -> StepFn:
    """The jitted step of a stage: (state, tokens [b,t], weights [b,t]) -> (state, parts of the loss)."""
    aim = Aim(stage.attention, stage.draft_depths, stage.draft_rows, stage.draft_weight, stage.rounding)

    def run(state: State, tokens: Array, weights: Array) -> tuple[State, dict[str, Any]]:
        model, main, index = state
        wanted = nnx.DiffState(0, TRAINED[stage.attention])
        gradients, parts = nnx.grad(lambda m: loss(m, aim, tokens, weights), argnums=wanted, has_aux=True)(model)
        main = _move(model, gradients, MAIN, optimizers.main, main)
        index = _move(model, gradients, IndexerParam, optimizers.index, index)
        parts["loads"] = loads = _by_router(model, aim.drafts, parts["loads"])
        if stage.attention != "warmup":
            biases = named(model, RouterBias)
            put(model, {k: optimizer.rebalance(biases[k], load, optimizers.balance_rate) for k, load in loads.items()})
        return State(model, main, index), parts

    return jax.jit(run, donate_argnums=0)


def _by_router(model: Model, drafts: int, loads: list[Array]) -> dict[str, Array]:
    """Loads by the names of routers' biases: a pass asks those of the main layers once, the MTP layer's each draft."""
    mtp = nnx.PathContains("mtp")
    asked = [*named(model, nnx.All(RouterBias, nnx.Not(mtp))), *list(named(model, nnx.All(RouterBias, mtp))) * drafts]
    out: dict[str, Array] = {}
    for name, load in zip(asked, loads, strict=True):
        out[name] = out[name] + load if name in out else load
    return out
