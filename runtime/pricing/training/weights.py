"""The trained and held weights of a device: of each stage, those that all dense copies hold and those of its
experts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from functools import lru_cache

from model.config import ModelConfig
from model.weights import Weight, layer_weights, stage_outer
from runtime.pricing.training.backward import trained
from runtime.pricing.training.layout import TrainLayout


@dataclasses.dataclass(frozen=True)
class Trained:
    """Elements on one device of a stage: dense weights, experts, and those that are frozen."""

    dense: float = 0.0
    experts: float = 0.0
    frozen: float = 0.0

    @property
    def all(self) -> float:
        """With gradients."""
        return self.dense + self.experts

    def held(self, layout: TrainLayout) -> float:
        """Elements whose optimizer state a device holds."""
        if not layout.zero:
            return self.all
        return self.dense / layout.dense_copies + self.experts / layout.expert_copies


@lru_cache(maxsize=4096)
def stage_weights(cfg: ModelConfig, layout: TrainLayout) -> tuple[Trained, ...]:
    """Of each stage. MTP layers are not trained in reinforcement learning, and not held."""
    return tuple(_trained(cfg, layout, layers) for layers in layout.shard.stage_layers(cfg.num_layers))


def _trained(cfg: ModelConfig, layout: TrainLayout, layers: range) -> Trained:
    sums = {"dense": 0.0, "experts": 0.0, "frozen": 0.0}
    for weight in _weights(cfg, layers):
        name = "frozen" if not trained(weight) else "experts" if weight.expert_count else "dense"
        sums[name] += math.prod(layout.shard.local_shape(weight))
    return Trained(**sums)


def _weights(cfg: ModelConfig, layers: range) -> Iterator[Weight]:
    for layer in layers:
        yield from layer_weights(cfg, cfg.layers[layer])
    yield from stage_outer(cfg, layers)
