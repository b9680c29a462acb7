"""One step of training, compiled for a stage: gradients, optimizers and the balance of the experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from model.checkpoint import groups
from model.config import Mla, ModelConfig
from model.weights import Arrangement, Weight
from runtime.training import optimizer
from runtime.training.config import TrainConfig, TrainingStage
from runtime.training.forward import Aim, Params, flatten, index_recall, is_balance, is_index, loss
from runtime.training.state import State

_FAN_IN = {Arrangement.MATRIX: -2, Arrangement.GATE_UP: -3, Arrangement.HEAD_KEYS: -1, Arrangement.HEAD_VALUES: -2}
_GAINS: dict[str, float] = dict.fromkeys(
    ("o", "down", "experts_down", "shared_down", "head"), 0.3
)  # the residual begins as the embedding


def initial_params(cfg: ModelConfig, seed: int) -> Params:
    """Random float32 weights: norms 1, biases 0, matrices that keep the size of what they are given; and heads of the
    first layer that look a few tokens back (`_look_back`)."""
    rng = np.random.default_rng([seed, 1])

    common = rng.standard_normal(cfg.hidden_size)

    def make(weight: Weight) -> np.ndarray:
        if weight.name == "embed":
            array = 0.35 * (rng.standard_normal(weight.shape) + common)
        elif weight.arrangement is Arrangement.PLAIN:
            array = np.full(weight.shape, float(weight.name.endswith("norm")))
        else:
            fan_in = weight.shape[_FAN_IN[weight.arrangement]]
            array = _GAINS.get(weight.name, 1.0) * fan_in**-0.5 * rng.standard_normal(weight.shape)
        return array.astype(np.float32)

    made = {
        place: [{weight.name: make(weight) for weight in group.weights} for group in found]
        for place, found in groups(cfg, mtp=True).items()
    }
    _look_back(cfg, made["layers"][0], common / np.linalg.norm(common))
    return jax.tree.map(jnp.asarray, flatten(cfg, {**made, "outer": made["outer"][0]}))


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


def trained(params: Params, attention: str) -> set[str]:
    """Names of the parameters that a stage of this kind trains by gradient."""
    wanted = {"dense": (False,), "warmup": (True,), "sparse": (False, True)}[attention]
    return {name for name in params if not is_balance(name) and is_index(name) in wanted}


class Optimizers:
    """Of the main weights and of the indexers: each counts its own steps."""

    def __init__(self, config: TrainConfig):
        o = config.optimizer

        def make(steps: int, matrix: float, other: float) -> optax.GradientTransformation:
            rates = optimizer.LearningRates(matrix, other, steps, round(o.rise * steps), round(o.fall * steps))
            return optimizer.make(o.name, rates, o.weight_decay, o.clip)

        self.main = make(config.count("dense", "sparse"), o.matrix_rate, o.other_rate)
        self.index = make(config.count("warmup", "sparse"), o.index_rate, o.index_rate)
        self.balance_rate = o.balance_rate

    def begin(self, params: Params) -> State:
        """The state before the first step."""
        main, index = trained(params, "dense"), trained(params, "warmup")
        return State(params, self.main.init(_only(params, main)), self.index.init(_only(params, index)))


def _only(params: Params, names: set[str]) -> Params:
    return {name: value for name, value in params.items() if name in names}


StepFn = Callable[[State, Any, Any], tuple[State, dict[str, Any]]]


def compile_step(cfg: ModelConfig, stage: TrainingStage, optimizers: Optimizers) -> StepFn:
    """The jitted step of a stage: (state, tokens [b,t], weights [b,t]) -> (state, parts of the loss)."""
    aim = Aim(stage.attention, stage.draft_depths, stage.draft_rows, stage.draft_weight)
    routed = [f"layers.{i}.router_bias" for i, kind in enumerate(cfg.layers) if kind.ffn == "moe"]
    routed += ["mtp.0.router_bias"] * (aim.drafts if cfg.mtp_type.ffn == "moe" else 0)

    def run(state: State, tokens: Array, weights: Array) -> tuple[State, dict[str, Any]]:
        names = trained(state.params, stage.attention)
        frozen = {name: value for name, value in state.params.items() if name not in names}

        def of(free: Params) -> tuple[Array, dict[str, Any]]:
            return loss(cfg, aim, {**frozen, **free}, tokens, weights)

        free = _only(state.params, names)
        (_, parts), gradients = jax.value_and_grad(of, has_aux=True)(free)
        loads: dict[str, Array] = {}
        for name, load in zip(routed, parts.pop("loads"), strict=True):
            loads[name] = loads[name] + load if name in loads else load
        params, main, index = dict(state.params), state.main, state.index
        main_names, index_names = names & trained(params, "dense"), names & trained(params, "warmup")
        if main_names:
            updates, main = optimizers.main.update(_only(gradients, main_names), main, _only(params, main_names))
            params.update(optax.apply_updates(_only(params, main_names), updates))  # type: ignore[arg-type]
            for name, load in loads.items():
                params[name] = optimizer.rebalance(params[name], load, optimizers.balance_rate)
        if index_names:
            updates, index = optimizers.index.update(_only(gradients, index_names), index, _only(params, index_names))
            params.update(optax.apply_updates(_only(params, index_names), updates))  # type: ignore[arg-type]
        return State(params, main, index), {**parts, "loads": loads}

    return jax.jit(run, donate_argnums=0)


def compile_recall(cfg: ModelConfig) -> Callable[[Params, Any], Array]:
    """The jitted `index_recall`."""
    return jax.jit(lambda params, tokens: index_recall(cfg, params, tokens))
