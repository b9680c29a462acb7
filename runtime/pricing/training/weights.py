"""The trained and held weights of a device: of each stage, those that all dense copies hold and those of its
experts."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from functools import lru_cache

from model.config import ModelConfig
from model.split import Layout
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


def stage_weights(cfg: ModelConfig, layout: TrainLayout) -> tuple[Trained, ...]:
    """Of each stage. MTP layers are not trained in reinforcement learning, and not held."""
    return _stages(cfg, layout.shard)


@lru_cache(maxsize=4096)
def _stages(cfg: ModelConfig, shard: Layout) -> tuple[Trained, ...]:
    alone = dataclasses.replace(shard, pp=1)
    found = []
    for layers in shard.stage_layers(cfg.num_layers):
        kinds = Counter(cfg.layers[layer] for layer in layers)
        parts = [(_counted(cfg, alone, layer_weights(cfg, kind)), count) for kind, count in kinds.items()]
        parts.append((_counted(cfg, alone, tuple(stage_outer(cfg, layers))), 1))
        names = ("dense", "experts", "frozen")
        found.append(Trained(*(sum(getattr(part, name) * count for part, count in parts) for name in names)))
    return tuple(found)


@lru_cache(maxsize=4096)
def _counted(cfg: ModelConfig, shard: Layout, weights: tuple[Weight, ...]) -> Trained:
    sums = {"dense": 0.0, "experts": 0.0, "frozen": 0.0}
    for weight in weights:
        name = "frozen" if not trained(weight) else "experts" if weight.expert_count else "dense"
        sums[name] += math.prod(shard.local_shape(weight))
    return Trained(**sums)
