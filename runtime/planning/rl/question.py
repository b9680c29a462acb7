"""What `glm5 plan rl` is asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from foundation.errors import UsageError
from foundation.limits import within
from hw_profiles import Profile
from model.config import ModelConfig
from model.split import MOST_DEVICES
from runtime.planning.rl.load import RolloutLoad
from runtime.planning.rl.play import RlSchedule
from runtime.pricing.training import SyncSchedule
from runtime.serving.pacing import RolloutAdmission
from runtime.simulation.build import node_devices, require_positions

PlannedMode = Literal["sync", "ahead", "async"]
MOST_STALENESS = 64
MOST_STEPS = 1000


@dataclasses.dataclass(frozen=True)
class RlQuestion:
    """The model and its load, the devices, and what is given rather than searched.

    devices: of `profile`, for both sides; rollout_devices: of `rollout_profile`, where rollouts have chips of their
    own, and `devices` all train. train_devices: the split, None to search. scheme, kv: of rollouts, None to search.
    train_formats: of a training step's products. scored: forward passes before a training step. in_flight: replicas go
    on while weights are sent. steps: that are played and reported. Raises `UsageError`.
    """

    cfg: ModelConfig
    profile: Profile
    devices: int
    load: RolloutLoad
    mode: PlannedMode = "async"
    staleness: int = 1
    admission: RolloutAdmission = "paced"
    rollout_profile: Profile | None = None
    rollout_devices: int = 0
    train_devices: int | None = None
    engine: str = "sglang"
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    scheme: str | None = None
    kv: str | None = None
    train_formats: str = "bf16"
    scored: int = 0
    in_flight: bool = True
    sync_schedule: SyncSchedule = "broadcast"
    steps: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        within("devices:", self.devices + self.rollout_devices, MOST_DEVICES)
        within("staleness", self.staleness, MOST_STALENESS)
        within("steps", self.steps, MOST_STEPS)
        if self.mode != "async" and self.admission != "paced":
            raise UsageError(f"discarding is for mode async, not {self.mode}")
        if self.rollout_profile is None and self.devices < 2:
            raise UsageError("one device cannot both train and generate at once: give two or more")
        if self.train_devices is not None and not 1 <= self.train_devices < self.devices:
            raise UsageError(f"{self.train_devices} training devices of {self.devices} leave none for rollouts")
        require_positions(self.cfg, self.load.longest, 0)

    @property
    def schedule(self) -> RlSchedule:
        behind = {"sync": 0, "ahead": 1, "async": self.staleness}[self.mode]
        return RlSchedule(behind, self.admission, drains=self.mode == "ahead")

    @property
    def rollouts_on(self) -> Profile:
        return self.rollout_profile or self.profile

    @property
    def splits(self) -> list[tuple[int, int]]:
        """(training devices, rollout devices) to choose from: whole servers, where there is more than one."""
        if self.rollout_profile is not None:
            return [(self.devices, self.rollout_devices)]
        if self.train_devices is not None:
            return [(self.train_devices, self.devices - self.train_devices)]
        node = node_devices(self.profile)
        unit = node if self.devices > node else 1
        return [(count, self.devices - count) for count in range(unit, self.devices, unit)]
